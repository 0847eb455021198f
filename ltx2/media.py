"""Images, video and sound, in and out: the only file that knows ffmpeg."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import tempfile
import warnings
import zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Iterable, Iterator

import imageio_ffmpeg
import numpy as np

from .base import UserError

PathLike = str | Path

# --- ffmpeg ---

# Said of a file that stops in the middle, even with exit code 0.
DAMAGE = re.compile("partial file|ended prematurely|overread|truncated|corrupt")


def _command(*options: str | list[str]) -> list[str]:
    """ffmpeg with options as in a shell, but for lists: their items are not split."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-xerror"]
    for option in options:
        command += option.split() if isinstance(option, str) else option
    return command


def _judge(complaint: str, returncode: int, messages: bytes) -> None:
    """Raise `complaint` with ffmpeg's first words if it failed or saw damage."""
    text = messages.decode(errors="replace").strip()
    if returncode or DAMAGE.search(text):
        reason = re.sub(r"^(\[.*?\] )+", "", text.partition("\n")[0])
        if re.search("matches no|not contain any stream", reason):
            reason = "there is none in it"
        raise UserError(f"{complaint} ({reason or f'ffmpeg exit code {returncode}'})")


def _run(complaint: str, *options: str | list[str], data: bytes = b"") -> bytes:
    """Run ffmpeg with `data` as its standard input; returns its standard output."""
    done = subprocess.run(_command(*options), input=data, capture_output=True)
    _judge(complaint, done.returncode, done.stderr)
    return done.stdout


@contextmanager
def _running(
    complaint: str, *options: str | list[str], **pipes
) -> Iterator[subprocess.Popen]:
    """ffmpeg beside the block; its messages go to a file, so that none blocks it."""
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(
            _command(*options),
            **{"stdin": subprocess.DEVNULL, "stderr": messages, **pipes},
        ) as process,
    ):
        try:
            yield process
        except BrokenPipeError:
            pass  # ffmpeg is gone; its exit code and words tell why
        except BaseException:
            process.kill()
            raise
        finally:
            if process.stdin:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        code = process.wait()
        messages.seek(0)
        _judge(complaint, code, messages.read())


@contextmanager
def _complaining(complaint: str) -> Iterator[None]:
    """Turn what the system refuses in the block into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{complaint} ({error.strerror})") from None


def _input(path: PathLike) -> list[str]:
    """The option that opens an existing file, whatever its name looks like."""
    with _complaining(f"{path}: cannot be opened"), open(path, "rb") as file:
        if not file.read(1):
            raise UserError(f"{path}: the file is empty")
    return ["-i", f"file:{path}"]


def _raw_input(height: int, width: int, fps: int | Fraction = 1) -> str:
    """The options that read raw RGB frames from standard input."""
    size = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height}"
    return f"{size} -framerate {fps} -i pipe:0"


def _frames(complaint: str, *options: str | list[str]) -> Iterator[np.ndarray]:
    """ffmpeg's frames (H, W, 3) uint8 one by one, as PPM, which tells its own size."""
    ppm = "-pix_fmt rgb24 -c:v ppm -f image2pipe pipe:1"
    with _running(complaint, *options, ppm, stdout=subprocess.PIPE) as process:
        while process.stdout.readline():  # b"P6\n"
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()  # b"255\n"
            pixels = process.stdout.read(height * width * 3)
            if len(pixels) == height * width * 3:
                yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


# --- images ---

# As close to libjpeg's and libwebp's own decoders as swscale comes.
STILL = "-sws_flags accurate_rnd+full_chroma_int+full_chroma_inp+bilinear -frames:v 1"

# The EXIF entry of the orientation (tag 0x112, one short) in both byte orders.
ORIENTATION = re.compile(
    rb"\x12\x01\x03\0\x01\0\0\0([\1-\x08])\0|\x01\x12\0\x03\0\0\0\x01\0([\1-\x08])"
)
QUARTER_TURNS = {3: 2, 6: 3, 8: 1}  # against the clock; mirrored ones are ignored

# The header of an ICC profile, from its size on.
ICC = re.compile(rb".{12}(mntr|scnr|spac)(RGB |GRAY|CMYK)(XYZ |Lab ).{12}acsp", re.S)


def load_image(path: PathLike) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8, upright (mirrored EXIF ignored), alpha dropped.

    A JPEG or WebP with subsampled chroma loses an odd last row or column. ffmpeg cannot
    convert ICC profiles: an embedded one other than sRGB is ignored with a warning.
    """
    complaint = f"{path}: cannot be read as an image"
    source, data = _input(path), Path(path).read_bytes()
    if data[4:8] == b"ftyp":  # HEIC, AVIF: ffmpeg joins their tiles and turns them
        images = list(_frames(complaint, source, STILL))
        turns = 0
    else:
        # The crop makes pictures with subsampled chroma even: odd ones have it drift.
        options = f"{STILL} -vf crop"
        images = list(_frames(complaint, "-noautorotate", source, options))
        exif = ORIENTATION.search(data)
        turns = QUARTER_TURNS.get(exif[exif.lastindex][0], 0) if exif else 0
    if not images:
        raise UserError(complaint)
    if _has_foreign_profile(data):
        warnings.warn(f"{path}: its ICC profile is ignored, colours may be off")
    return np.rot90(images[0], turns).copy()


def _has_foreign_profile(data: bytes) -> bool:
    """Whether an image file embeds an ICC profile that does not call itself sRGB."""
    packed = data.find(b"iCCP", 0, data.find(b"IDAT"))
    if data.startswith(b"\x89PNG") and packed > 0:
        with suppress(zlib.error):
            start = data.index(b"\0", packed) + 2
            data = zlib.decompressobj().decompress(data[start:])
    if (header := ICC.search(data)) is None:
        return False
    profile = data[header.start() :][: int.from_bytes(header[0][:4], "big")]
    return b"sRGB" not in profile.replace(b"\0", b"")  # which may be UTF-16


def recompress(image: np.ndarray, crf: int) -> np.ndarray:
    """Pass an image (H, W, 3) uint8 through H.264 at `crf`, as the training data was.

    Sides are cropped to even ones; crf 0 or a side below 2 leaves the image as it is.
    """
    height, width = (side // 2 * 2 for side in image.shape[:2])
    if crf == 0 or min(height, width) == 0:
        return image
    stream = _run(
        f"cannot re-compress {width}x{height} pixels at crf {crf}",
        _raw_input(height, width),
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


def resize_and_crop(
    frames: Iterable[np.ndarray], height: int, width: int
) -> np.ndarray:
    """Fill a size with frames (H, W, 3) uint8 -> (F, height, width, 3) in [-1, 1].

    The aspect is kept and the centre cropped; bilinear, when shrinking too without
    antialiasing, as the reference. `frames` may be an array or an iterator.
    """

    def fit(frame):
        scale = max(height / frame.shape[0], width / frame.shape[1])
        top, bottom, y = _neighbours(frame.shape[0], scale, height)
        left, right, x = _neighbours(frame.shape[1], scale, width)
        x, y = x[None, :, None], y[:, None, None]
        rows = frame[top] * (1 - y) + frame[bottom] * y
        return (rows[:, left] * (1 - x) + rows[:, right] * x) / np.float32(127.5) - 1

    return np.fromiter(map(fit, frames), np.dtype((np.float32, (height, width, 3))))


def _neighbours(size: int, scale: float, kept: int) -> tuple[np.ndarray, ...]:
    """Both source indices of each pixel kept of a resized axis, the second's weight."""
    resized = math.ceil(size * scale)
    pixels = np.arange(kept, dtype=np.float32) + (resized - kept) // 2
    position = np.maximum((pixels + 0.5) * np.float32(size / resized) - 0.5, 0)
    first = position.astype(int)
    return first, np.minimum(first + 1, size - 1), position - first.astype(np.float32)


# --- video and sound ---


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


def probe(path: PathLike) -> Media:
    """Measure the first video and sound of a file by reading all their packets."""
    complaint = f"{path}: cannot be read as video or sound"
    options = "-map 0:V:0? -map 0:a:0? -c copy -f framecrc pipe:1"
    listing = _run(complaint, _input(path), options).decode()
    facts = dict(re.findall(r"^#(\w+ \d): (.*)$", listing, re.MULTILINE))
    found = {}
    for stream in "01":
        # A row is a packet's dts, pts, duration, size, checksum and perhaps flags.
        rows = re.findall(rf"^{stream}, *(.*)$", listing, re.MULTILINE)
        if not rows:
            continue
        tick = Fraction(facts[f"tb {stream}"])
        dts, pts, duration = map(int, rows[-1].split(",")[:3])
        if facts[f"media_type {stream}"] == "audio":
            found["sample_rate"] = int(facts[f"sample_rate {stream}"])
            found["audio_codec"] = facts[f"codec_id {stream}"]
            found["audio_duration"] = float((pts + duration) * tick)
            found.setdefault("duration", found["audio_duration"])
        else:
            found["width"], found["height"], nominal = _first_picture(path)
            elapsed = (dts - int(rows[0].split(",")[0])) * tick
            mean = (len(rows) - 1) / elapsed if elapsed else nominal
            steady = abs(mean / nominal - 1) < 0.05
            found["fps"] = frame_rate(nominal if steady else mean)
            hidden = [row for row in rows if re.search("F=0x[4-7]", row)]
            found["num_frames"] = len(rows) - len(hidden)
            found["duration"] = float(found["num_frames"] / found["fps"])
    if not found:
        raise UserError(complaint)
    return Media(**found)


def _first_picture(path: PathLike) -> tuple[int, int, Fraction]:
    """Width, height and nominal frame rate of a video, once it is upright."""
    complaint = f"{path}: cannot be read as video"
    options = "-map 0:V:0 -frames:v 1 -pix_fmt yuv420p -f yuv4mpegpipe pipe:1"
    picture = _run(complaint, _input(path), options)
    header = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+)", picture)
    if header is None:
        raise UserError(complaint)
    width, height, *rate = map(int, header.groups())
    return width, height, Fraction(*rate)


def read_video(
    path: PathLike,
    start_frame: int = 0,
    num_frames: int | None = None,
    fps: float | Fraction | None = None,
) -> Iterator[np.ndarray]:
    """Stream the upright frames (H, W, 3) uint8 of a video, counted from 0.

    `fps` first brings it to that constant rate by repeating and dropping frames. Where
    the video ends early there are fewer frames; it is an error if there are none.
    """
    complaint = f"{path}: cannot be read as video from frame {start_frame} on"
    filters = f"trim=start_frame={start_frame}"
    if num_frames is not None:
        filters += f":end_frame={start_frame + num_frames}"
    if fps is not None:
        filters = f"fps={frame_rate(fps)},{filters}"
    options = f"-map 0:V:0 -fps_mode passthrough -vf {filters},scale=flags=bilinear"
    frame = None
    for frame in _frames(complaint, _input(path), options):
        yield frame
    if frame is None:
        raise UserError(f"{complaint} (it has no such frame)")


def read_audio(
    path: PathLike, start: float = 0.0, duration: float | None = None
) -> tuple[np.ndarray, int]:
    """Read sound, a video's too, as a waveform (samples, channels) float32 and its rate.

    The window begins at sample round(start * rate) of the file's time, a track that sets
    in later with silence, and has round(duration * rate) samples or fewer at the end.
    """
    # A decoder needs a run-up; whole seconds are whole samples at every rate.
    skipped = max(0, int(start) - 1)
    window = f"-ss {skipped}" if skipped else ""
    if duration is not None:
        window += f" -t {start - skipped + duration + 1}"
    sound = _run(
        f"{path}: cannot be read as sound",
        window,
        _input(path),
        "-map 0:a:0 -af aresample=async=1:first_pts=0 -c:a pcm_f32be -f au pipe:1",
    )
    header, _, _, rate, channels = struct.unpack(">5I", sound[4:24])
    waveform = np.frombuffer(sound, ">f4", offset=header).reshape(-1, channels)
    first = round(start * rate) - skipped * rate
    last = None if duration is None else first + round(duration * rate)
    if not len(waveform[first:last]):
        raise UserError(f"{path}: there is no sound at {start} s")
    return waveform[first:last].astype(np.float32), rate


def resample(waveform: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """Bring a waveform (samples, channels) float32 to another rate, samples rounded up.

    A Hann-windowed sinc of 6 zero crossings and rolloff 0.99, torchaudio's defaults.
    """
    if old_rate == new_rate:
        return waveform
    common = math.gcd(old_rate, new_rate)
    old, new = old_rate // common, new_rate // common
    cutoff = 0.99 * min(old, new)
    width = math.ceil(6 * old / cutoff)
    # `old` samples become `new` ones, each by its own filter over them and `width` around.
    time = np.arange(-width, width + old) / old - np.arange(new)[:, None] / new
    time = np.clip(time * cutoff, -6, 6)
    filters = np.sinc(time) * np.cos(time * np.pi / 12) ** 2 * cutoff / old
    padded = np.pad(waveform, ((width, width + old), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, width * 2 + old, axis=0)
    resampled = windows[::old] @ filters.T.astype(np.float32)  # (steps, channels, new)
    samples = math.ceil(len(waveform) * new / old)
    return resampled.swapaxes(1, 2).reshape(-1, waveform.shape[1])[:samples]


# --- output ---


def _workspace(path: PathLike) -> tempfile.TemporaryDirectory:
    """A hidden folder beside a file to be written, which a rename then finishes."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, give the name of a file")
    with _complaining(f"{path}: cannot be written"):
        return tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)


def check_output(path: PathLike, suffix: str) -> None:
    """Say before any work what would keep a file out`suffix` from being written."""
    if Path(path).suffix.lower() != suffix:
        raise UserError(f"{path}: the output's name must end in {suffix}")
    _workspace(path).cleanup()


def _write(path: PathLike, *options: str | list[str], data: bytes) -> None:
    """Have ffmpeg make a file of `data` that takes its name once it is complete."""
    complaint = f"{path}: cannot be written"
    with _workspace(path) as folder, _complaining(complaint):
        made = f"{folder}/made"
        _run(complaint, *options, [f"file:{made}"], data=data)
        os.replace(made, path)


def save_png(path: PathLike, image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8, or frames (F, H, W, 3) side by side as a strip."""
    if image.ndim == 4:
        image = np.concatenate(list(image), axis=1)
    options = f"{_raw_input(*image.shape[:2])} -c:v png -f image2 -update 1"
    _write(path, options, data=image.tobytes())


def _raw_sound(waveform: np.ndarray, rate: int) -> str:
    """The options that read a waveform (samples, channels) from standard input."""
    return f"-f f32le -ar {rate} -ac {waveform.shape[1]} -i pipe:0"


def _tag(metadata: dict[str, Any] | None) -> list[str]:
    return ["-metadata", f"comment={json.dumps(metadata)}"] if metadata else []


def write_wav(
    path: PathLike,
    waveform: np.ndarray,
    rate: int,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a waveform (samples, channels) float32 as 16-bit sound, clipped to [-1, 1]."""
    options = (_raw_sound(waveform, rate), _tag(metadata), "-c:a pcm_s16le -f wav")
    _write(path, *options, data=waveform.astype("<f4").tobytes())


def read_metadata(path: PathLike) -> dict[str, Any]:
    """The metadata that `VideoWriter` or `write_wav` put into a file."""
    complaint = f"{path}: does not say how it was made"
    listing = _run(complaint, _input(path), "-f ffmetadata pipe:1").decode()
    comment = re.search(r"^comment=(.*)$", listing, re.MULTILINE)
    try:
        return json.loads(re.sub(r"\\(.)", r"\1", comment[1] if comment else ""))
    except json.JSONDecodeError:
        raise UserError(complaint) from None


class VideoWriter:
    """An mp4 in the making: `with VideoWriter(path, fps) as video: video.write(frames)`.

    The file appears when the block has ended well and its frames have been counted; an
    earlier one stays till then, and after a failure nothing new is left. `sound`, cut or
    padded to the video's length, is a waveform (samples, channels) with its rate or a
    file, whose AAC or MP3 is copied in whole packets if there is enough of it. `sound`
    and `metadata`, a JSON object, may be set until the block ends.
    """

    COPIED = ("aac", "mp3")  # what every player expects in an mp4
    # In the frames' own properties: with -color_* options players see "unknown".
    BT709 = (
        "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:"
        "color_trc=bt709:colorspace=bt709:range=tv"
    )

    def __init__(
        self,
        path: PathLike,
        fps: float | Fraction,
        sound: tuple[np.ndarray, int] | PathLike | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        self.path, self.fps = Path(path), frame_rate(fps)
        self.sound, self.metadata = sound, metadata
        self.num_frames = 0
        self._complaint = f"{path}: cannot be written"

    def __enter__(self) -> VideoWriter:
        self._open, self._encoding, self._encoder = ExitStack(), ExitStack(), None
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames (F, H, W, 3) uint8, all of one size with even sides."""
        if self._encoder is None:
            self._size = height, width = frames.shape[1:3]
            if height % 2 or width % 2:
                raise UserError(
                    f"{self.path}: {width}x{height} is odd, give even sides"
                )
            # Not before: a program that is killed till then leaves nothing behind.
            self._folder = self._open.enter_context(_workspace(self.path))
            self._picture = f"file:{self._folder}/picture"
            encoder = _running(
                self._complaint,
                f"{_raw_input(height, width, self.fps)} -vf {self.BT709}",
                "-pix_fmt yuv420p -c:v libx264 -crf 19 -preset veryfast -f mp4",
                [self._picture],
                stdin=subprocess.PIPE,
            )
            self._encoder = self._encoding.enter_context(encoder)
        if frames.shape[1:3] != self._size or frames.dtype != np.uint8:
            raise ValueError(f"{frames.shape} {frames.dtype} frames after {self._size}")
        self._encoder.stdin.write(frames.tobytes())
        self.num_frames += len(frames)

    def __exit__(self, *failure) -> None:
        with self._open:
            self._encoding.__exit__(*failure)
            if failure[0] is None:
                self._finish()

    def _finish(self) -> None:
        """Join picture and sound, count the frames, give the file its name."""
        if not self.num_frames:
            raise ValueError(f"{self.path}: no frames were written")
        made = f"{self._folder}/made"
        sound, data = self._exact_sound(self.num_frames / self.fps)
        _run(
            self._complaint,
            ["-i", self._picture, *sound],
            ["-c:v", "copy", *_tag(self.metadata), "-movflags", "+faststart"],
            ["-f", "mp4", f"file:{made}"],
            data=data,
        )
        if (found := probe(made).num_frames) != self.num_frames:
            raise RuntimeError(f"{found} frames in the mp4 after {self.num_frames}")
        with _complaining(self._complaint):
            os.replace(made, self.path)

    def _exact_sound(self, duration: Fraction) -> tuple[list[str], bytes]:
        """The options that add `duration` seconds of sound, and what they read."""
        if self.sound is None:
            return [], b""
        if isinstance(self.sound, tuple):
            waveform, rate = self.sound
        else:
            media = probe(self.sound)
            if media.audio_codec in self.COPIED and media.audio_duration >= duration:
                options = f"-map 0:v -map 1:a:0 -c:a copy -t {float(duration)}"
                return _input(self.sound) + options.split(), b""
            waveform, rate = read_audio(self.sound, duration=float(duration))
        exact = np.zeros((round(duration * rate), waveform.shape[1]), "<f4")
        exact[: len(waveform)] = waveform[: len(exact)]
        options = f"{_raw_sound(exact, rate)} -c:a aac -b:a 192k"
        return options.split(), exact.tobytes()
