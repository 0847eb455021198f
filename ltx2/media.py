"""Read and write images, video and sound: the only file that calls ffmpeg."""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import subprocess
import tempfile
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Iterable, Iterator

import imageio_ffmpeg
import numpy as np

from .base import UserError, hann_sinc

if TYPE_CHECKING:
    from PIL.Image import Image

PathLike = str | Path

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


@contextmanager
def _system_errors(problem: str) -> Iterator[None]:
    """Turn an error of the operating system in the block into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem} ({error.strerror or error})") from None


def _input(path: PathLike) -> list[str]:
    """The option that opens an existing file, whatever characters its name has."""
    with _system_errors(f"{path}: cannot be opened"), open(path, "rb") as file:
        if not file.read(1):
            raise UserError(f"{path}: the file is empty")
    return ["-i", f"file:{path}"]


def _raw_input(height: int, width: int, fps: int | Fraction = 1) -> str:
    """The options that read raw RGB frames from standard input."""
    size = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height}"
    return f"{size} -framerate {fps} -i pipe:0"


# --- images ---


@cache
def _pillow() -> ModuleType:
    """`PIL.Image` with HEIC and a limit above the 200 megapixels of phones."""
    import pillow_heif  # late, with Pillow it takes 50 ms
    from PIL import Image

    pillow_heif.register_heif_opener()
    Image.MAX_IMAGE_PIXELS = 2**28
    return Image


def load_image(path: PathLike) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 sRGB, upright, without its alpha channel.

    As the reference does with Pillow, except that mirrored EXIF orientations and ICC
    profiles are applied, and that 16-bit gray is scaled instead of clipped.
    """
    from PIL import ImageOps

    _input(path)
    # What Pillow raises for a damaged file depends on its format.
    damage = OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error
    try:
        with _pillow().open(path) as file:
            image = ImageOps.exif_transpose(file)
        profile = image.info.get("icc_profile")
        if image.mode == "F":
            raise ValueError("its pixels are floating-point, save it with 8 bits")
        if image.mode.startswith("I"):  # gray with 16 bits
            pixels = np.asarray(image).clip(0, 65535) / 257
            image = _pillow().fromarray(pixels.round().astype(np.uint8))
        if image.has_transparency_data:
            if image.convert("RGBA").getextrema()[3][0] < 255:
                warnings.warn(f"{path}: its transparency is ignored")
        image = _to_srgb(image, profile, path) if profile else image.convert("RGB")
    except (*damage, _pillow().DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None
    return np.array(image)


def _to_srgb(image: Image, profile: bytes, path: PathLike) -> Image:
    """Convert an image from its ICC profile, if that is valid, to sRGB."""
    from PIL import ImageCms

    modes = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "sRGB" not in ImageCms.getProfileDescription(source):
            image = image.convert(modes.get(image.mode, "RGB"))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        warnings.warn(f"{path}: its ICC profile is ignored ({error})")
    return image.convert("RGB")


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

    The aspect is kept and the center cropped; bilinear, when shrinking too without
    antialiasing, as the reference. `frames` may be an array or an iterator.
    """

    def fit(frame):
        scale = max(height / frame.shape[0], width / frame.shape[1])
        top, bottom, y = _neighbors(frame.shape[0], scale, height)
        left, right, x = _neighbors(frame.shape[1], scale, width)
        x, y = x[None, :, None], y[:, None, None]
        rows = frame[top] * (1 - y) + frame[bottom] * y
        return (rows[:, left] * (1 - x) + rows[:, right] * x) / np.float32(127.5) - 1

    return np.fromiter(map(fit, frames), np.dtype((np.float32, (height, width, 3))))


def _neighbors(size: int, scale: float, kept: int) -> tuple[np.ndarray, ...]:
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
    problem = f"{path}: cannot be read as video or sound"
    options = "-map 0:V:0? -map 0:a:0? -c copy -f framecrc pipe:1"
    listing = _run(problem, _input(path), options).decode()
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
        raise UserError(problem)
    return Media(**found)


def _first_picture(path: PathLike) -> tuple[int, int, Fraction]:
    """Width, height and nominal frame rate of a video, once it is upright."""
    problem = f"{path}: cannot be read as video"
    options = "-map 0:V:0 -frames:v 1 -pix_fmt yuv420p -f yuv4mpegpipe pipe:1"
    picture = _run(problem, _input(path), options)
    header = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+)", picture)
    if header is None:
        raise UserError(problem)
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
    problem = f"{path}: cannot be read as video from frame {start_frame} on"
    filters = f"trim=start_frame={start_frame}"
    if num_frames is not None:
        filters += f":end_frame={start_frame + num_frames}"
    if fps is not None:
        filters = f"fps={frame_rate(fps)},{filters}"
    options = f"-map 0:V:0 -fps_mode passthrough -vf {filters},scale=flags=bilinear"
    # As PPM, whose header has the size.
    ppm = "-pix_fmt rgb24 -c:v ppm -f image2pipe pipe:1"
    source, pipe, found = _input(path), subprocess.PIPE, False
    with _ffmpeg(problem, source, options, ppm, stdout=pipe) as process:
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
    """Read sound, a video's too, as a waveform (samples, channels) float32 and its rate.

    The window begins at sample round(start * rate) of the file's time, with silence
    where a track starts later, and has round(duration * rate) samples, or fewer at the
    end. soundfile reads what it can, ffmpeg the rest (m4a, videos).
    """
    import soundfile  # late, it takes 60 ms

    problem, source, skipped = f"{path}: cannot be read as sound", _input(path), 0
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: headerless (.raw)
        file = None
    # Left to ffmpeg: Ogg, where soundfile seeks inexactly, and a wav that is shorter
    # than its header says, which soundfile reads without an error.
    if file is None or file.format == "OGG" or "should be" in file.extra_info:
        # A decoder needs a run-up; whole seconds are whole samples at every rate.
        skipped = max(0, int(start) - 1)
        window = f"-ss {skipped}" if skipped else ""
        if duration is not None:
            window += f" -t {start - skipped + duration + 1}"
        options = "-map 0:a:0 -af aresample=async=1:first_pts=0"
        sound = _run(problem, window, source, options, "-c:a pcm_f32be -f au pipe:1")
        file = soundfile.SoundFile(io.BytesIO(sound))
    with file:
        rate = file.samplerate
        first = min(round(start * rate) - skipped * rate, file.frames)
        last = file.frames
        if duration is not None:
            last = min(last, first + round(duration * rate))
        file.seek(first)
        waveform = file.read(last - first, "float32", always_2d=True)
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
        windows = np.lib.stride_tricks.sliding_window_view(
            padded[before:], len(taps), axis=0
        )[
            ::old
        ]  # (steps, channels, taps)
        target = resampled[phase::new]
        target[:] = windows[: len(target)] @ taps
    return resampled


# --- output ---


@contextmanager
def _workspace(path: PathLike) -> Iterator[str]:
    """A hidden folder next to `path`; a file "new" in it becomes `path` at the end."""
    path, problem = Path(path), f"{path}: cannot be written"
    if path.is_dir():
        raise UserError(f"{path}: is a folder, give the name of a file")
    with _system_errors(problem):
        temporary = tempfile.TemporaryDirectory(
            prefix=f".{path.name}-", dir=path.parent
        )
    with temporary as folder:
        yield folder
        if os.path.exists(f"{folder}/new"):
            with _system_errors(problem):
                os.replace(f"{folder}/new", path)


def check_output(path: PathLike, suffix: str) -> None:
    """Raise before any work if a file with this suffix cannot be written at `path`."""
    if Path(path).suffix.lower() != suffix:
        raise UserError(f"{path}: the output's name must end in {suffix}")
    with _workspace(path):
        pass


def save_png(path: PathLike, image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8, or frames (F, H, W, 3) side by side as a strip."""
    if image.ndim == 4:
        image = np.concatenate(list(image), axis=1)
    with _workspace(path) as folder, _system_errors(f"{path}: cannot be written"):
        _pillow().fromarray(image).save(f"{folder}/new", "PNG")


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
    """Write a waveform (samples, channels) float32 as 16-bit sound, clipped to [-1, 1].

    By ffmpeg, because soundfile drops comments above 2 KB without an error.
    """
    options = _raw_sound(waveform, rate), _tag(metadata), "-c:a pcm_s16le -f wav"
    data = waveform.astype("<f4").tobytes()
    with _workspace(path) as folder:
        _run(f"{path}: cannot be written", *options, [f"file:{folder}/new"], data=data)


def read_metadata(path: PathLike) -> dict[str, Any]:
    """The metadata that `VideoWriter` or `write_wav` put into a file."""
    problem = f"{path}: does not say how it was made"
    listing = _run(problem, _input(path), "-f ffmetadata pipe:1").decode()
    comment = re.search(r"^comment=(.*)$", listing, re.MULTILINE)
    try:
        return json.loads(re.sub(r"\\(.)", r"\1", comment[1] if comment else ""))
    except json.JSONDecodeError:
        raise UserError(problem) from None


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
            f"{_raw_input(height, width, frame_rate(self.fps))} -vf {self.BT709}",
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
        new = f"{self._folder}/new"
        _run(
            f"{self.path}: cannot be written",
            ["-i", f"file:{self._folder}/picture", *sound],
            ["-c:v", "copy", *_tag(self.metadata), "-movflags", "+faststart"],
            ["-f", "mp4", f"file:{new}"],
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
                options = f"-map 0:v -map 1:a:0 -c:a copy -t {float(duration)}"
                return _input(self.sound) + options.split(), b""
            waveform, rate = read_audio(self.sound, duration=float(duration))
        exact = np.zeros((round(duration * rate), waveform.shape[1]), "<f4")
        exact[: len(waveform)] = waveform[: len(exact)]
        options = f"{_raw_sound(exact, rate)} -c:a aac -b:a 192k"
        return options.split(), exact.tobytes()
