"""Read and write video and sound: the only file that calls ffmpeg."""

from __future__ import annotations

import fcntl
import glob
import io
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Iterator

import imageio_ffmpeg
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .base import UserError, hann_sinc
from .images import (  # noqa: F401 (public here)
    PathLike,
    check_file,
    load_image,
    resize_and_crop,
    system_errors,
)

# --- ffmpeg ---

# Messages about a file that ends too early; ffmpeg may still exit with 0.
DAMAGE = re.compile("partial file|ended prematurely|overread|truncated|corrupt")


@contextmanager
def _ffmpeg(
    problem: str, *options: str | list[str], **pipes
) -> Iterator[subprocess.Popen]:
    """Run ffmpeg during a block; raise `problem` with its reason if it fails.

    Options are split at spaces, but for those in lists.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-xerror"]
    for option in options:
        command += option.split() if isinstance(option, str) else option
    pipes = {"stdin": subprocess.DEVNULL} | pipes
    with (
        tempfile.TemporaryFile() as messages,  # a pipe that nobody reads would block
        subprocess.Popen(command, stderr=messages, **pipes) as process,
    ):
        try:
            yield process
        except BrokenPipeError:
            process.communicate()
            if process.returncode == 0:
                raise  # of another pipe
        except BaseException:
            process.kill()
            raise
        finally:
            process.communicate()  # closes its input and waits
        messages.seek(0)
        text = messages.read().decode(errors="replace").strip()
    if process.returncode or DAMAGE.search(text):
        reason = re.sub(r"^(\[.*?\] )+", "", text.partition("\n")[0])
        if re.search("matches no|not contain any stream", reason):
            reason = "there is none in it"
        reason = reason or f"ffmpeg exit code {process.returncode}"
        raise UserError(f"{problem} ({reason})")


def _run(problem: str, *options: str | list[str], data: bytes = b"") -> bytes:
    """Run ffmpeg with `data` as its standard input; returns its standard output."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with _ffmpeg(problem, *options, **pipes) as process:
        output, _ = process.communicate(data)
    return output


def _input(path: PathLike) -> list[str]:
    """The option that opens an existing file, whatever characters its name has."""
    check_file(path)
    return ["-i", f"file:{path}"]


def recompress(image: np.ndarray, crf: int) -> np.ndarray:
    """Pass an image (H, W, 3) uint8 through H.264 at `crf`, as the training data was.

    Sides are cropped to even ones; crf 0 or a side below 2 leaves the image as it is.
    """
    height, width = (side // 2 * 2 for side in image.shape[:2])
    if crf == 0 or min(height, width) == 0:
        return image
    stream = _run(
        f"cannot re-compress {width}x{height} pixels at crf {crf}",
        f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -framerate 1 -i pipe:0",
        f"-vf scale=flags=bilinear -pix_fmt yuv420p -c:v libx264 -crf {crf}",
        # The result depends on the threads; these are the reference's.
        "-preset veryfast -x264-params sliced-threads=1:threads=2 -f h264 pipe:1",
        data=image[:height, :width].tobytes(),
    )
    pixels = _run(
        "cannot decode what was re-compressed",
        "-f h264 -i pipe:0 -vf scale=flags=bilinear -pix_fmt rgb24 -f rawvideo pipe:1",
        data=stream,
    )
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


# --- reading video and sound ---


@dataclass(frozen=True)
class Media:
    """What a file holds; 0 and "" stand for a stream that is not there."""

    width: int = 0
    height: int = 0
    fps: Fraction = Fraction(0)
    num_frames: int = 0
    duration: float = 0.0  # seconds of the video, or else of the sound
    sample_rate: int = 0
    audio_codec: str = ""
    audio_duration: float = 0.0
    start: Fraction = Fraction(0)  # of the video, which times of the sound count from

    @property
    def has_video(self) -> bool:
        return self.num_frames > 0

    @property
    def has_audio(self) -> bool:
        return self.sample_rate > 0


def frame_rate(fps: float | Fraction) -> Fraction:
    """The exact rate that a rounded one means: 23.976 is 24000/1001, 23.998 is 24."""
    for exact in (Fraction(round(fps)), Fraction(1000 * round(fps), 1001)):
        if abs(fps - exact) < 0.01:
            return exact
    return Fraction(fps).limit_denominator(1001)


def _packets(path: PathLike, problem: str, limit: str = "") -> list[tuple]:
    """The packets of a file's first video and sound, whichever there are.

    A stream is its facts, a dictionary, and its packets as tuples of decoding time,
    display time, duration (in ticks of facts["tb"] seconds) and whether it is hidden.
    """
    options = f"-map 0:V:0? -map 0:a:0? -c copy {limit} -f framecrc pipe:1"
    listing = _run(problem, _input(path), options).decode()
    streams = []
    for n in "01":
        facts = dict(re.findall(rf"^#(\w+) {n}: (.*)$", listing, re.MULTILINE))
        rows = [
            (*map(int, row.split(",")[:3]), bool(re.search("F=0x[4-7]", row)))
            for row in re.findall(rf"^{n}, *(.*)$", listing, re.MULTILINE)
        ]
        streams += [(facts, rows)] if rows else []
    return streams


def _video_start(facts: dict[str, str], packets: list[tuple]) -> Fraction:
    """Seconds from the file's beginning to the first picture."""
    shown = [time for _, time, _, hidden in packets if not hidden]
    return max(0, min(shown, default=0)) * Fraction(facts["tb"])


def probe(path: PathLike) -> Media:
    """Measure the first video and sound of a file by reading all their packets."""
    problem = f"{path}: cannot be read as video or sound"
    found = {}
    for facts, packets in _packets(path, problem):
        dts, pts, duration, _ = packets[-1]
        tick = Fraction(facts["tb"])
        if facts["media_type"] == "audio":
            layout = facts.get("channel_layout_name", "")
            if re.match(r"\d+ channels", layout):  # ffmpeg cannot mix these
                raise UserError(f"{path}: has {layout} of sound, mix them to stereo")
            end = (pts + duration) * tick - found.get("start", 0)
            found["sample_rate"] = int(facts["sample_rate"])
            found["audio_codec"] = facts["codec_id"]
            found["audio_duration"] = float(end)
            found.setdefault("duration", found["audio_duration"])
        else:
            # The first picture as it is shown: rotated, with square pixels.
            decode = f"-frames:v 1 -an -c:v rawvideo -vf {SQUARE}"
            if not (first := _packets(path, problem, decode)):
                raise UserError(problem)
            size, nominal = first[0][0]["dimensions"], 1 / Fraction(first[0][0]["tb"])
            found["width"], found["height"] = map(int, size.split("x"))
            elapsed = (dts - packets[0][0]) * tick
            mean = (len(packets) - 1) / elapsed if elapsed else nominal
            steady = abs(mean / nominal - 1) < 0.05
            found["fps"] = frame_rate(nominal if steady else mean)
            found["num_frames"] = sum(not hidden for *_, hidden in packets)
            found["duration"] = float(found["num_frames"] / found["fps"])
            found["start"] = _video_start(facts, packets)
    if not found:
        raise UserError(problem)
    return Media(**found)


# Pixels made square; swscale's "bilinear" is the reference's conversion to RGB.
SQUARE = "scale=w=round(iw*sar):h=ih:flags=bilinear"

# HDR to SDR: its reference white, 203 nits (ITU-R BT.2408), becomes white, what is
# brighter is clipped.
SDR = "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709:t=bt709:r=pc,format=gbrp"


def _is_hdr(path: PathLike) -> bool:
    """Whether a file's video has the PQ or HLG transfer function."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *_input(path)]
    description = subprocess.run(command, capture_output=True).stderr
    return bool(re.search(rb"Video: .*(smpte2084|arib-std-b67)", description))


def read_video(
    path: PathLike,
    start_frame: int = 0,
    num_frames: int | None = None,
    fps: float | Fraction | None = None,
) -> Iterator[np.ndarray]:
    """Stream the frames (H, W, 3) uint8 of a video, counted from 0.

    They are upright, deinterlaced, SDR, and have square pixels. `fps` first brings the
    video to that constant rate by repeating and dropping frames. Where it ends early
    there are fewer frames; it is an error if there are none.
    """
    problem = f"{path}: cannot be read as video from frame {start_frame} on"
    filters = ["bwdif=send_frame:deint=interlaced"]
    filters += [f"fps={frame_rate(fps)}"] if fps is not None else []
    filters += [f"trim=start_frame={start_frame}"]
    if num_frames is not None:
        filters[-1] += f":end_frame={start_frame + num_frames}"
    filters += [SDR, SQUARE] if _is_hdr(path) else [SQUARE]
    options = f"-map 0:V:0 -fps_mode passthrough -vf {','.join(filters)}"
    # As PPM, whose header has the size.
    ppm = "-pix_fmt rgb24 -c:v ppm -f image2pipe pipe:1"
    pipe, found = subprocess.PIPE, False
    with _ffmpeg(problem, _input(path), options, ppm, stdout=pipe) as process:
        while process.stdout.readline():  # b"P6\n"
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()  # b"255\n"
            pixels = process.stdout.read(height * width * 3)
            if found := len(pixels) == height * width * 3:
                yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    if not found:
        raise UserError(f"{problem} (it has no such frame)")


def read_audio(
    path: PathLike, start: float = 0.0, duration: float | None = None
) -> tuple[np.ndarray, int]:
    """Read sound, also of a video: a waveform (samples, channels) float32, its rate.

    The window begins at sample round(start * rate), counted from the file's beginning
    or a video's first picture, with silence where a track starts later, and has
    round(duration * rate) samples, or fewer at the end. Surround is mixed to stereo.
    soundfile reads what it can, ffmpeg the rest (m4a, videos).
    """
    import soundfile  # late, it takes 60 ms

    problem = f"{path}: cannot be read as sound"
    source, begin = _input(path), Fraction(float(start))
    try:
        file = soundfile.SoundFile(path)
        # Left to ffmpeg: surround, whose layout soundfile does not report; wav shorter
        # than its header says, which it accepts; and Ogg, where it seeks inexactly.
        left = file.channels > 2 or file.format == "OGG" or "should" in file.extra_info
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless (.raw)
        left = True
    if left:
        for facts, packets in _packets(path, problem, "-frames:v 16"):
            if facts["media_type"] == "video":
                begin += _video_start(facts, packets)
        # A decoder needs a run-up; whole seconds are whole samples at every rate.
        skipped = max(0, int(begin) - 1)
        begin -= skipped
        window = f"-ss {skipped}" if skipped else ""
        if duration is not None:
            window += f" -t {float(begin) + duration + 1}"
        options = "-map 0:a:0 -af aresample=async=1:first_pts=0:rematrix_maxval=1,"
        options += "aformat=channel_layouts=mono|stereo -c:a pcm_f32be -f au pipe:1"
        file = soundfile.SoundFile(io.BytesIO(_run(problem, window, source, options)))
    with file:
        rate = file.samplerate
        first = min(round(begin * rate), file.frames)
        samples = file.frames if duration is None else round(duration * rate)
        last = min(first + samples, file.frames)
        try:
            file.seek(first)
            waveform = file.read(last - first, "float32", always_2d=True)
        except (soundfile.LibsndfileError, MemoryError):  # by a wrong header
            waveform = []
    if len(waveform) < last - first:
        raise UserError(f"{problem} (it is damaged or incomplete)")
    if not len(waveform):
        raise UserError(f"{path}: there is no sound at {start} s")
    return waveform, rate


def resample(waveform: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """Bring a waveform (samples, channels) float32 to another rate, samples rounded up.

    A Hann-windowed sinc of 6 zero crossings and rolloff 0.99, torchaudio's defaults.
    """
    if old_rate == new_rate:
        return waveform
    common = math.gcd(old_rate, new_rate)
    old, new = old_rate // common, new_rate // common
    cutoff = 0.99 * min(1, new / old)
    width = math.ceil(6 / cutoff)
    padded = np.pad(waveform, ((width, width + old), (0, 0)))
    samples = math.ceil(len(waveform) * new / old)
    resampled = np.empty((samples, waveform.shape[1]), np.float32)
    # Every `new`-th sample lies equally between old ones and has the same taps.
    for phase in range(min(new, samples)):
        before, after = divmod(phase * old, new)
        time = np.arange(-width, width + 1) - after / new
        taps = (hann_sinc(time * cutoff) * cutoff).astype(np.float32)
        # (steps, channels, taps)
        windows = sliding_window_view(padded[before:], len(taps), axis=0)[::old]
        target = resampled[phase::new]
        target[:] = windows[: len(target)] @ taps
    return resampled


# --- writing ---


@contextmanager
def _workspace(path: PathLike) -> Iterator[str]:
    """A hidden folder next to `path`; a file "new" in it becomes `path` at the end.

    It is locked, so that the next run can remove what a killed one has left.
    """
    path, problem = Path(path), f"{path}: cannot be written"
    if path.is_dir():
        raise UserError(f"{path}: is a folder, give the name of a file")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-????????.partial"):
        with suppress(OSError), _locked(leftover):  # not if its run is alive
            shutil.rmtree(leftover)
    with system_errors(problem):
        made = tempfile.TemporaryDirectory(".partial", f".{path.name}-", path.parent)
    with made as folder, ExitStack() as lock:
        with suppress(OSError):  # some network drives have no locks
            lock.enter_context(_locked(folder))
        yield folder
        if os.path.exists(f"{folder}/new"):
            with system_errors(problem):
                os.replace(f"{folder}/new", path)


@contextmanager
def _locked(folder: PathLike) -> Iterator[None]:
    """Lock a folder during a block; OSError if another program has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def check_output(path: PathLike, suffix: str) -> None:
    """Raise before any work if a file with this suffix cannot be written at `path`."""
    if Path(path).suffix.lower() != suffix:
        raise UserError(f"{path}: the output's name must end in {suffix}")
    with _workspace(path):
        pass


def save_png(path: PathLike, image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8, or frames (F, H, W, 3) as a horizontal strip."""
    from PIL import Image  # late, it takes 20 ms

    if image.ndim == 4:
        image = np.concatenate(list(image), axis=1)
    with _workspace(path) as folder, system_errors(f"{path}: cannot be written"):
        Image.fromarray(image).save(f"{folder}/new", "PNG")


def _metadata(folder: str, metadata: dict[str, Any] | None) -> list[str]:
    """The options that read metadata, from a file because arguments may not be long."""
    text = re.sub(r"([=;#\\])", r"\\\1", json.dumps(metadata)) if metadata else ""
    Path(folder, "metadata").write_text(f";FFMETADATA1\ncomment={text}\n")
    return ["-f", "ffmetadata", "-i", f"file:{folder}/metadata"]


def write_wav(
    path: PathLike,
    waveform: np.ndarray,
    rate: int,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a waveform (samples, channels) float32 as 16-bit sound, clipped to [-1, 1].

    By ffmpeg, because soundfile drops comments above 2 KB without an error.
    """
    data = waveform.astype("<f4").tobytes()
    with _workspace(path) as folder:
        raw = f"-f f32le -ar {rate} -ac {waveform.shape[1]} -i pipe:0"
        options = ["-map_metadata", "1", "-f", "wav", f"file:{folder}/new"]
        metadata_file = _metadata(folder, metadata)
        _run(f"{path}: cannot be written", raw, metadata_file, options, data=data)


def read_metadata(path: PathLike) -> dict[str, Any]:
    """The metadata that `VideoWriter` or `write_wav` put into a file."""
    problem = f"{path}: does not say how it was made"
    listing = _run(problem, _input(path), "-f ffmetadata pipe:1").decode()
    comment = re.search(r"^comment=(.*)$", listing, re.MULTILINE)
    try:
        metadata = json.loads(re.sub(r"\\(.)", r"\1", comment[1] if comment else ""))
    except (json.JSONDecodeError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(problem)
    return metadata


@dataclass
class VideoWriter:
    """Writes an mp4: `with VideoWriter(path, fps) as video: video.write(frames)`.

    The file appears when the block has succeeded and its frames have been counted; an
    earlier one stays until then, and a failure leaves nothing new. `sound`, cut or
    padded to the video's length, is a waveform (samples, channels) with its rate or a
    file, whose AAC is copied in whole packets if there is enough of it. `sound`
    and `metadata`, a JSON object, may be set until the block ends.
    """

    path: PathLike
    fps: float | Fraction
    sound: tuple[np.ndarray, int] | PathLike | None = None
    metadata: dict[str, Any] | None = None

    # In the frames' own properties: with -color_* options players see "unknown".
    BT709: ClassVar = (
        "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:"
        "color_trc=bt709:colorspace=bt709:range=tv"
    )

    def __enter__(self) -> VideoWriter:
        self._open, self._encoder, self.num_frames = ExitStack(), None, 0
        return self

    def _start(self, height: int, width: int) -> subprocess.Popen:
        """Start the encoder of frames; from here on a failure has to clean up."""
        if height % 2 or width % 2:
            raise UserError(f"{self.path}: {width}x{height} is odd, give even sides")
        self._folder = self._open.enter_context(_workspace(self.path))
        self._open.push(self._finish)
        encoder = _ffmpeg(
            f"{self.path}: cannot be written",
            f"-f rawvideo -pix_fmt rgb24 -s {width}x{height}",
            f"-framerate {frame_rate(self.fps)} -i pipe:0 -vf {self.BT709}",
            "-pix_fmt yuv420p -c:v libx264 -crf 19 -preset veryfast -f mp4",
            [f"file:{self._folder}/picture"],
            stdin=subprocess.PIPE,
        )
        return self._open.enter_context(encoder)

    def write(self, frames: np.ndarray) -> None:
        """Append frames (F, H, W, 3) uint8, all of one size with even sides."""
        if self._encoder is None:
            self._size = frames.shape[1:3]
            self._encoder = self._start(*self._size)
        if frames.shape[1:3] != self._size or frames.dtype != np.uint8:
            raise ValueError(f"{frames.shape} {frames.dtype} frames after {self._size}")
        self._encoder.stdin.write(frames.tobytes())
        self.num_frames += len(frames)

    def __exit__(self, *failure) -> None:
        # In this order: the encoder ends, `_finish`, the workspace is cleaned up.
        self._open.__exit__(*failure)
        if failure[0] is None and not self.num_frames:
            raise ValueError(f"{self.path}: no frames were written")

    def _finish(self, *failure) -> None:
        """Join picture and sound and count the frames, if nothing has failed."""
        if failure[0] or not self.num_frames:
            return
        sound, data = self._exact_sound(self.num_frames / frame_rate(self.fps))
        metadata, new = _metadata(self._folder, self.metadata), f"{self._folder}/new"
        _run(
            f"{self.path}: cannot be written",
            ["-i", f"file:{self._folder}/picture", *metadata, *sound],
            # Nothing else of a sound file comes along.
            "-map 0:v -c:v copy -map_metadata 1 -map_metadata:s -1 -map_chapters -1",
            ["-movflags", "+faststart", "-f", "mp4", f"file:{new}"],
            data=data,
        )
        if (found := probe(new).num_frames) != self.num_frames:
            raise RuntimeError(f"{found} frames in the mp4 after {self.num_frames}")

    def _exact_sound(self, duration: Fraction) -> tuple[list[str], bytes]:
        """The options that add `duration` seconds of sound, and what they read."""
        if self.sound is None:
            return [], b""
        if isinstance(self.sound, tuple):
            waveform, rate = self.sound
        else:
            media = probe(self.sound)
            if media.audio_codec == "aac" and media.audio_duration >= duration:
                seek = ["-ss", f"{float(media.start)}"] if media.start else []
                options = f"-map 2:a:0 -c:a copy -t {float(duration)}".split()
                return [*seek, *_input(self.sound), *options], b""
            waveform, rate = read_audio(self.sound, duration=float(duration))
        exact = np.zeros((round(duration * rate), waveform.shape[1]), "<f4")
        exact[: len(waveform)] = waveform[: len(exact)]
        options = f"-f f32le -ar {rate} -ac {exact.shape[1]} -i pipe:0 -map 2:a"
        return [*options.split(), "-c:a", "aac", "-b:a", "192k"], exact.tobytes()
