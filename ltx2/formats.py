"""Write video: the formats by file ending or codec, the encoder."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Optional

import numpy as np

from . import color, exr, media
from .base import UserError
from .media import Metadata, PathLike
from .options import check_choice

# As properties of the frames: with -color_* options players see "unknown".
TAGS = "setparams=color_primaries={}:color_trc={}:colorspace={}:range={}"
BT709 = f"scale=out_color_matrix=bt709:out_range=tv,{TAGS.format(*['bt709'] * 3, 'tv')}"
HLG = TAGS.format("bt2020", "arib-std-b67", "bt2020nc", "tv")
RGB = TAGS.format("bt709", "iec61966-2-1", "gbr", "pc")
X265 = "log-level=error:colorprim=bt2020:transfer=arib-std-b67:colormatrix=bt2020nc"
FRAME = "frame_%05d.exr"


def _pam(frame: np.ndarray, space: str, first: bool) -> bytes:
    """A frame (H, W, 3 or 4) as a PAM picture: 16 bits for float or alpha, else 8."""
    if frame.dtype != np.uint8:
        frame = np.rint(frame.clip(0, 1) * 65535).astype(">u2")
    elif frame.shape[-1] == 4:
        frame = frame.astype(">u2") * 257
    height, width, depth = frame.shape
    header = f"P7\nWIDTH {width}\nHEIGHT {height}\nDEPTH {depth}\n"
    header += f"MAXVAL {256 ** frame.itemsize - 1}\n"
    header += f"TUPLTYPE RGB{'_ALPHA' * (depth == 4)}\nENDHDR\n"
    return header.encode() + frame.tobytes()


def _y4m(frame: np.ndarray, space: str, first: bool) -> bytes:
    """A frame as HLG in 10-bit 4:2:0."""
    height, width = frame.shape[:2]
    header = f"YUV4MPEG2 W{width} H{height} F1:1 Ip A1:1 C420p10\n" * first + "FRAME\n"
    planes = color.hlg_planes(color.convert(frame, space, "srgb_linear"))
    return header.encode() + b"".join(plane.tobytes() for plane in planes)


def _pfm(frame: np.ndarray, space: str, first: bool) -> bytes:
    """A frame as float32, bottom row first; sRGB becomes linear."""
    height, width = frame.shape[:2]
    frame = color.convert(frame, space, exr_space(space)).clip(-65504, 65504)
    frame = frame.astype(np.float16).astype("<f4")  # ffmpeg would not round
    return b"PF\n%d %d\n-1.0\n" % (width, height) + frame[::-1].tobytes()


def exr_space(space: str) -> str:
    """The color space of EXR frames."""
    return "srgb_linear" if space == "srgb" else space


class Format(NamedTuple):
    """How a kind of file is written."""

    suffix: str
    encoder: str  # of ffmpeg
    options: str
    pack: Callable[[np.ndarray, str, bool], bytes]  # a frame as ffmpeg reads it
    source: str  # options for that
    container: str
    sound: str = "aac -b:a 192k"
    hdr: bool = False  # holds more than sRGB
    even: bool = False  # has even sides only
    alpha: bool = False  # in addition to colors


PIPE = "-f image2pipe -framerate {fps} -c:v"
FASTSTART = "-movflags +faststart -f"
# fmt: off
FORMATS = {
    "h264": Format(".mp4", "libx264", f"-vf {BT709} -pix_fmt yuv420p -crf 19 -preset veryfast",
                   _pam, f"{PIPE} pam", f"{FASTSTART} mp4", even=True),
    "hevc": Format(".mp4", "libx265", f"-vf {HLG} -crf 12 -preset ultrafast -tag:v hvc1 -x265-params {X265}",
                   _y4m, "-r {fps} -f yuv4mpegpipe", f"-tag:v hvc1 {FASTSTART} mp4", hdr=True, even=True),
    "prores": Format(".mov", "prores_ks", f"-vf {BT709},format=yuv444p10le|yuva444p10le -profile:v 4444 -vendor apl0",
                     _pam, f"{PIPE} pam", f"{FASTSTART} mov", "pcm_s16le", alpha=True),
    "ffv1": Format(".mkv", "ffv1", f"-vf format=gbrp|gbrp16le,{RGB} -level 3 -g 1 -slicecrc 1",
                   _pam, f"{PIPE} pam", "-f matroska", "flac"),
    "exr": Format("", "exr", "-format half -compression zip16 -start_number 0",
                  _pfm, f"{PIPE} pfm", "-f image2", hdr=True),
}
# fmt: on


def choose(path: PathLike, codec: Optional[str] = None, space: str = "srgb") -> str:
    """The codec of a file, by its ending unless `codec` names it: .mp4, .mov, .mkv, or
    a folder. Frames that are not sRGB go into an .mp4 as HLG."""
    suffix, hdr = Path(path).suffix.lower(), space != "srgb"
    other = "h264" if hdr else "hevc"
    usual = {f.suffix: k for k, f in FORMATS.items() if k != other}
    if not Path(path).name or codec is None and suffix not in usual:
        allowed = "end in .mp4, .mov or .mkv, or have no ending: a folder of EXR frames"
        raise UserError(f"{path or 'output'}: the name must {allowed}")
    codec = codec or usual[suffix]
    check_choice("codec", codec, tuple(FORMATS))
    if suffix != (ending := FORMATS[codec].suffix) and (ending or suffix in usual):
        name = f"end in {ending}" if ending else f"be a folder, not a {suffix}"
        raise UserError(f"{path}: {codec} must {name}")
    if hdr and not FORMATS[codec].hdr:
        instead = "use hevc, a folder of EXR frames, or set color_space to srgb"
        raise UserError(f"{path}: {codec} cannot hold {space}: {instead}")
    return codec


def written(path: PathLike, codec: Optional[str], space: str) -> dict[PathLike, str]:
    """The codec of a video, and of the folder of EXR frames next to an HDR one."""
    names = {path: choose(path, codec, space)}
    if names[path] == "hevc" and space != "srgb":
        names[Path(path).with_name(f"{Path(path).stem}_{space}_exr")] = "exr"
    return names


def check_output(
    path: PathLike,
    codec: Optional[str] = None,
    space: str = "srgb",
    sound_only: bool = False,
) -> None:
    """UserError before any work if a video, or sound as .wav, cannot be written."""
    if sound_only and (codec or Path(path).suffix.lower() != ".wav"):
        raise UserError(f"{path}: sound alone must end in .wav, and has no codec")
    names = {} if sound_only else written(path, codec, space)
    for encoder in (FORMATS[name].encoder for name in names.values()):
        if encoder not in media.encoders():
            raise UserError(f"{path}: this ffmpeg has no {encoder}, use another codec")
    for file in names or [path]:
        media.check_output(file, media.OF_FRAMES * (names.get(file) == "exr"))


@dataclass
class VideoWriter:
    """Writes a video: `with VideoWriter(path, fps) as video: video.write(frames)`.

    The file appears when the block has succeeded and its frames have been counted; an
    earlier one stays until then, and a failure leaves nothing new. `sound`, cut or
    padded to the video's length, is a waveform (samples, channels) with its rate or a
    file, whose AAC is copied in whole packets if there is enough of it. `sound`
    and `metadata`, a JSON object, may be set until the block ends. `color_space`, one
    of color.SPACES, says what frames hold; `codec` is by `choose`. With `picture`, an
    iterator of frames uint8, and a format with alpha, those are the colors and the
    written frames their alpha.
    """

    path: PathLike
    fps: float | Fraction
    sound: tuple[np.ndarray, int] | PathLike | None = None
    metadata: Metadata | None = None
    codec: Optional[str] = None
    color_space: str = "srgb"
    picture: Optional[Iterator[np.ndarray]] = None

    def __enter__(self) -> VideoWriter:
        (_, codec), *folders = written(self.path, self.codec, self.color_space).items()
        self.format, self.num_frames, self._size = FORMATS[codec], 0, None
        self._blocks = ExitStack()
        self._blocks.enter_context(self._written())
        facts = self.fps, None, None, "exr", self.color_space
        writers = (VideoWriter(path, *facts) for path, _ in folders)
        self._copies = [*map(self._blocks.enter_context, writers)]
        return self

    def __exit__(self, *failure) -> None:
        for writer in self._copies:
            writer.metadata = self.metadata
        self._blocks.__exit__(*failure)

    def write(self, frames: np.ndarray) -> None:
        """Append frames (F, H, W, 3) of one size, uint8 or float."""
        height, width = size = frames.shape[1:3]
        if self.format.even and (height % 2 or width % 2):
            odd = f"{width}x{height} has an odd side: both must be even"
            raise UserError(f"{self.path}: {odd}")
        self._size = self._size or size
        if size != self._size or frames.dtype not in (np.uint8, np.float32):
            raise ValueError(f"{frames.shape} {frames.dtype} frames after {self._size}")
        for writer in self._copies:
            writer.write(frames)
        for frame in frames:
            if self.picture and self.format.alpha:
                matte = frame.mean(-1, keepdims=True).round().astype(np.uint8)
                frame = np.concatenate([next(self.picture), matte], axis=-1)
            first = self.num_frames == 0
            self._frames.write(self.format.pack(frame, self.color_space, first))
            self.num_frames += 1

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Encode what is written in the block, then add sound and count the frames."""
        fps, problem = media.frame_rate(self.fps), f"{self.path}: cannot be written"
        kind = self.format
        source = kind.source.format(fps=fps) + " -i pipe:0"
        with media.workspace(self.path, media.OF_FRAMES * (not kind.suffix)) as folder:
            target = "picture" if kind.suffix else f"new/{FRAME}"
            if not kind.suffix:
                os.mkdir(f"{folder}/new")
            codec = f"-c:v {kind.encoder} {kind.options} {kind.container} {target}"
            with media.ffmpeg(problem, source, codec, folder=folder) as encoder:
                self._frames = encoder.stdin
                yield
                if not self.num_frames:
                    raise ValueError(f"{self.path}: no frames were written")
            if kind.suffix:
                sound, data = self._sound_options(self.num_frames / fps)
                options = f"-i picture {sound} -map 1:v -c:v copy {kind.container}"
                media.mux(self.path, folder, options, self.metadata, data)
                found = media.count_frames(f"{folder}/new")
            else:
                found = self._finish_folder(Path(folder, "new"))
            if found != self.num_frames:
                there = f"{found} frames in the {kind.suffix[1:] or 'folder'}"
                raise RuntimeError(f"{there} after {self.num_frames}")

    def _finish_folder(self, folder: Path) -> int:
        """Tag EXR frames, add the sound and metadata; returns the number of frames."""
        space = color.SPACES[exr_space(self.color_space)]
        frames = sorted(folder.glob("*.exr"))
        for path in frames:
            path.write_bytes(exr.with_color(path.read_bytes(), space))
        if (sound := self.sound) is not None:
            if not isinstance(sound, tuple):
                duration = self.num_frames / media.frame_rate(self.fps)
                sound = media.read_audio(sound, duration=duration)
            media.write_wav(folder / media.FOLDER_FILES[0], *sound)
        if self.metadata:
            text = json.dumps(self.metadata)
            (folder / media.FOLDER_FILES[1]).write_text(text, "utf-8")
        return len(frames)

    def _sound_options(self, duration: Fraction) -> tuple[str, bytes]:
        """The options that add `duration` seconds of sound, and their input."""
        if self.sound is None:
            return "", b""
        limit = f"-t {float(duration)} -c:a"
        if isinstance(self.sound, tuple):
            waveform, rate = self.sound
        else:
            sound = media.probe(self.sound)
            fits = sound.audio_codec == "aac" and sound.audio_duration >= duration
            if fits and self.format.suffix == ".mp4":
                seek = f"-ss {float(sound.start)}" if sound.start else ""
                file = media.input_option(self.sound)
                return f"{seek} {file} -map 2:a:0 {limit} copy", b""
            waveform, rate = media.read_audio(self.sound, duration=duration)
        source = f"-f f32le -ar {rate} -ac {waveform.shape[1]} -i pipe:0 -map 2:a"
        data = waveform.astype("<f4").tobytes()
        return f"{source} {limit} {self.format.sound} -af apad", data
