"""Read and write images, video and sound: all uses of Pillow and ffmpeg."""

import functools
import glob
import io
import json
import math
import os
import re
import shlex
import shutil
import struct
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from subprocess import PIPE, Popen, run
from typing import Any, Callable, Iterator, TypeVar

import imageio_ffmpeg
import numpy as np
import pillow_heif
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageCms, ImageOps

from .base import UserError, hann_sinc, listed, lock, note, parse_json, user_path

PathLike, Metadata, T = str | Path, dict[str, Any], TypeVar("T")

pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = 2**28  # phones make 200 megapixels

# Messages of ffmpeg about a file that ends too early; it may still exit with 0.
DAMAGE = re.compile("partial file|ended prematurely|overread|truncated|corrupt")

# What a folder of EXR frames has besides them, and all its names.
FOLDER_FILES = "sound.wav", "metadata.json"
OF_FRAMES = r"frame_\d{5,}\.exr|sound\.wav|metadata\.json"

# Pixels made square; swscale's "bilinear" is the reference's conversion to RGB.
SQUARE = "scale=w=round(iw*sar):h=ih:flags=bilinear"

# HDR to SDR: white is its reference white, 203 nits (ITU-R BT.2408); more is clipped.
SDR = "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709:t=bt709:r=pc,format=gbrp"


@contextmanager
def system_errors(problem: str) -> Iterator[None]:
    """Turn an error of the operating system in the block into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem} ({error.strerror or error})") from None


def check_file(path: PathLike) -> None:
    """UserError if `path` is not a file with contents."""
    with system_errors(f"{path}: cannot be opened"):
        size = os.stat(path).st_size
    if not os.path.isfile(path):  # reading a pipe would wait
        raise UserError(f"{path}: is a folder, pipe or device: pass a file")
    if not size:
        raise UserError(f"{path}: the file is empty")


# --- images ---


def load_image(path: PathLike) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 sRGB, upright, without its alpha channel: as the
    reference does with Pillow, but mirrored EXIF orientations and ICC profiles are
    applied, and 16-bit gray is scaled instead of clipped."""
    check_file(path)
    # What Pillow raises for a damaged file depends on its format.
    damage = OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error
    try:
        with Image.open(path) as file:
            if file.format in ("GIF", "PNG", "WEBP") and file.n_frames > 1:
                note(f"{path}: is animated; its first frame is used")
            image = ImageOps.exif_transpose(file)
        profile = image.info.get("icc_profile")
        if image.mode == "F":
            raise ValueError("its pixels are floating-point, save it with 8 bits")
        if image.mode.startswith("I"):  # gray with 16 bits
            pixels = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(pixels.round().astype(np.uint8))
        alpha = image.has_transparency_data and image.convert("RGBA").getchannel("A")
        if alpha and alpha.getextrema()[0] < 255:
            note(f"{path}: its transparency is ignored")
        image = _to_srgb(image, profile, path) if profile else image.convert("RGB")
    except (*damage, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None
    return np.asarray(image)


def _to_srgb(image: Image.Image, profile: bytes, path: PathLike) -> Image.Image:
    """Convert an image from its ICC profile, if that is valid, to sRGB."""
    modes = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "sRGB" not in ImageCms.getProfileDescription(source):
            image = image.convert(modes.get(image.mode, "RGB"))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        note(f"{path}: its ICC profile is ignored ({error})")
    return image.convert("RGB")


def resize(frame: np.ndarray, height: int, width: int, crop: bool = True) -> np.ndarray:
    """A frame (H, W, 3) as float32 that fills a size, with the center cropped, or without
    `crop` fits in it and is not enlarged. The aspect is kept; bilinear, when shrinking
    too without antialiasing, as the reference."""
    ratios = height / frame.shape[0], width / frame.shape[1]
    scale, whole = (max(ratios), math.ceil) if crop else (min(1, *ratios), round)
    sides = [whole(n * scale) for n in frame.shape[:2]]
    for axis, count in enumerate((height, width) if crop else sides):
        size, side = frame.shape[axis], sides[axis]
        pixels = np.arange(count, dtype=np.float32) + (side - count) // 2
        position = np.maximum((pixels + 0.5) * np.float32(size / side) - 0.5, 0)
        first = position.astype(int)
        weight = np.expand_dims(position % 1, [1, 2][: 2 - axis])
        second = frame.take(np.minimum(first + 1, size - 1), axis) * weight
        frame = frame.take(first, axis) * (1 - weight) + second
    return frame


def enlarge(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame (H, W, 3) uint8 at a larger size, (height, width, 3) in [-1, 1]."""
    larger = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(larger, np.float32) / np.float32(127.5) - 1


@contextmanager
def ffmpeg(problem: str, *options: str, folder: str = ".") -> Iterator[Popen]:
    """Run ffmpeg during a block; UserError with `problem` and why if it fails."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-xerror"]
    command += shlex.split(" ".join(options))
    with (
        tempfile.TemporaryFile() as messages,  # a pipe that nobody reads would block
        Popen(command, stdin=PIPE, stdout=PIPE, stderr=messages, cwd=folder) as process,
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


def run_ffmpeg(problem: str, *options: str, data=b"", folder: str = ".") -> bytes:
    """Run ffmpeg with `data` as its standard input; returns its standard output."""
    with ffmpeg(problem, *options, folder=folder) as process:
        return process.communicate(data)[0]


@functools.cache
def encoders() -> frozenset[str]:
    """The names of the encoders that ffmpeg has."""
    listing = run_ffmpeg("ffmpeg does not run", "-encoders").decode()
    return frozenset(re.findall(r"^ [VAS][\w.]{5} (\w+)", listing, re.MULTILINE))


def input_option(path: PathLike) -> str:
    """The option that opens an existing file, whatever its name contains."""
    check_file(path)
    return f"-i {shlex.quote(f'file:{os.path.abspath(path)}')}"


def once(read: Callable[[PathLike], T]) -> Callable[[PathLike], T]:
    """`read`, which starts ffmpeg, only of files that are new or have changed."""
    kept = functools.lru_cache(lambda path, *state: read(path))

    @functools.wraps(read)
    def call(path: PathLike) -> T:
        check_file(path)
        state = os.stat(path)
        changes = state.st_ino, state.st_size, state.st_mtime_ns
        return kept(path, os.path.abspath(path), *changes)

    return call


@once
def describe(path: PathLike) -> bytes:
    """What ffmpeg prints about a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *shlex.split(input_option(path))]
    return run(command, capture_output=True).stderr


def recompress(image: np.ndarray, crf: int) -> np.ndarray:
    """Pass an image (H, W, 3) uint8 through H.264 at `crf`, as the training data was,
    with sides cropped to even ones; crf 0 or a side below 2 leaves it as it is."""
    height, width = (side // 2 * 2 for side in image.shape[:2])
    if crf == 0 or min(height, width) == 0:
        return image
    pixels = run_ffmpeg(
        f"cannot re-compress {width}x{height} pixels at crf {crf}",
        f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -framerate 1 -i pipe:0",
        f"-map 0:v -vf scale=flags=bilinear -pix_fmt yuv420p -c:v libx264 -crf {crf}",
        # The result depends on the threads; these are the reference's.
        "-preset veryfast -x264-params sliced-threads=1:threads=2 -f null -",
        "-dec 0:0 -filter_complex [dec:0]scale=flags=bilinear[decoded]",
        "-map [decoded] -frames:v 1 -pix_fmt rgb24 -f rawvideo pipe:1",
        data=image[:height, :width].tobytes(),
    )
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


# --- reading video and sound ---


@dataclass(frozen=True)
class Media:
    """What a file contains; 0 and "" stand for a missing stream."""

    width: int = 0
    height: int = 0
    fps: Fraction = Fraction(0)
    num_frames: int = 0
    start: Fraction = Fraction(0)  # seconds of the video, where times of sound are 0
    sample_rate: int = 0
    audio_codec: str = ""
    audio_duration: float = 0.0

    has_video = property(lambda self: self.num_frames > 0)
    has_audio = property(lambda self: self.sample_rate > 0)

    @property
    def duration(self) -> float:
        """Seconds of the video, or else of the sound."""
        return float(self.num_frames / self.fps) if self.fps else self.audio_duration


def frame_rate(fps: float | Fraction) -> Fraction:
    """The exact rate that a rounded one means: 23.976 is 24000/1001, 23.998 is 24."""
    for exact in (Fraction(round(fps)), Fraction(1000 * round(fps), 1001)):
        if abs(fps - exact) < 0.01:
            return exact
    return Fraction(fps).limit_denominator(1001)


def _packets(path: PathLike, options: str) -> dict[str, tuple[dict[str, str], list]]:
    """Facts and packets of a file's first video and sound: decoding time, display time
    and duration in ticks of facts["tb"] seconds, and a text if it is hidden."""
    problem = f"{path}: cannot be read as sound or video"
    options = f"-map 0:V:0? -map 0:a:0? {options} -f framecrc pipe:1"
    listing = run_ffmpeg(problem, input_option(path), options).decode()
    streams = {}
    for n in "01":
        facts = dict(re.findall(rf"^#(\w+) {n}: (.*)$", listing, re.MULTILINE))
        row = rf"^{n}, *(-?\d+), *(-?\d+), *(\d+),.*?(F=0x[4-7].*)?$"
        if packets := re.findall(row, listing, re.MULTILINE):
            streams[facts["media_type"]] = facts, packets
    if not streams:
        raise UserError(problem)
    return streams


def times_shown(packets: list) -> list[int]:
    """When a video's frames are displayed, in ticks."""
    return [int(time) for _, time, _, hidden in packets if not hidden]


def count_frames(path: PathLike) -> int:
    return len(times_shown(_packets(path, "-an -c copy")["video"][1]))


@once
def probe(path: PathLike) -> Media:
    """Measure the first video and sound of a file by reading all their packets."""
    streams, found = _packets(path, "-c copy"), {}
    if "video" in streams:
        facts, packets = streams["video"]
        # The first picture as it is shown: rotated, with square pixels.
        first, _ = _packets(path, f"-frames:v 1 -an -vf {SQUARE}")["video"]
        found["width"], found["height"] = map(int, first["dimensions"].split("x"))
        tick, nominal = Fraction(facts["tb"]), 1 / Fraction(first["tb"])
        elapsed = (int(packets[-1][0]) - int(packets[0][0])) * tick
        mean = (len(packets) - 1) / elapsed if elapsed else nominal
        found["fps"] = frame_rate(nominal if abs(mean / nominal - 1) < 0.05 else mean)
        shown = times_shown(packets)
        found["num_frames"] = len(shown)
        found["start"] = max(0, min(shown, default=0)) * tick
    if "audio" in streams:
        facts, packets = streams["audio"]
        layout = facts.get("channel_layout_name", "")
        if re.match(r"\d+ channels", layout):  # ffmpeg cannot mix these
            raise UserError(f"{path}: has {layout} audio: mix it to stereo first")
        end = sum(map(int, packets[-1][1:3])) * Fraction(facts["tb"])
        found["audio_duration"] = float(end - found.get("start", 0))
        found["sample_rate"] = int(facts["sample_rate"])
        found["audio_codec"] = facts["codec_id"]
    return Media(**found)


def read_video(
    path: PathLike, start_frame: int = 0, num_frames: int | None = None, fps=None
) -> Iterator[np.ndarray]:
    """Stream the frames (H, W, 3) uint8 of a video, counted from 0.

    They are upright, deinterlaced, SDR, and have square pixels. `fps` first brings the
    video to that constant rate by repeating and dropping frames. Where it ends early
    there are fewer frames; it is an error if there are none.
    """
    problem = f"{path}: cannot be read as video from frame {start_frame} on"
    hdr = re.search(rb"Video: .*(smpte2084|arib-std-b67)", describe(path))  # PQ, HLG
    rate = "" if fps is None else f"fps={frame_rate(fps)},"
    end = "" if num_frames is None else f":end_frame={start_frame + num_frames}"
    filters = f"bwdif=send_frame:deint=interlaced,{rate}trim=start_frame={start_frame}"
    filters += f"{end},{SDR + ',' if hdr else ''}{SQUARE}"
    options = f"-map 0:V:0 -fps_mode passthrough -vf {filters} -pix_fmt rgb24"
    frame, ppm = None, "-c:v ppm -f image2pipe pipe:1"  # its header has the size
    with ffmpeg(problem, input_option(path), options, ppm) as process:
        while process.stdout.readline():  # b"P6\n"
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()  # b"255\n"
            frame = np.empty((height, width, 3), np.uint8)
            if process.stdout.readinto(frame) == frame.size:  # else ffmpeg has failed
                yield frame
    if frame is None:
        raise UserError(f"{problem} (it has no such frame)")


def read_audio(
    path: PathLike, start: float = 0.0, duration: float | None = None
) -> tuple[np.ndarray, int]:
    """Read sound, also of a video: a waveform (samples, channels) float32, its rate.

    The window begins at sample round(start * rate), counted from the file's beginning
    or a video's first picture, with silence where a track starts later, and has
    round(duration * rate) samples, or fewer at the end. Surround is mixed to stereo.
    """
    media, problem = probe(path), f"{path}: cannot be read as sound"
    rate = media.sample_rate
    first = round((Fraction(float(start)) + media.start) * rate)
    end = "" if duration is None else f":end_sample={first + round(duration * rate)}"
    filters = "aresample=async=1:first_pts=0:rematrix_maxval=1,"
    filters += f"aformat=channel_layouts=mono|stereo,atrim=start_sample={first}{end}"
    options = f"-map 0:a:0 -af {filters} -c:a pcm_f32be -f au pipe:1"
    sound = run_ffmpeg(problem, input_option(path), options)
    # The header of AU: a magic number, the header's size, 0, encoding, rate, channels.
    _, size, _, _, rate, channels = map(int, np.frombuffer(sound, ">u4", 6))
    waveform = np.frombuffer(sound, ">f4", offset=size).reshape(-1, channels)
    if not len(waveform):
        raise UserError(f"{path} has no sound at {start} s")
    return waveform.astype(np.float32), rate


def resample(waveform: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """Bring a waveform (samples, channels) float32 to another rate, samples rounded up,
    by torchaudio's default: a Hann-windowed sinc of 6 zero crossings, rolloff 0.99."""
    if old_rate == new_rate:
        return waveform
    new, old = Fraction(new_rate, old_rate).as_integer_ratio()
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
def workspace(path: PathLike, folder: str = "") -> Iterator[str]:
    """A hidden folder next to `path`; "new" in it, a file or a folder with names like
    `folder`, replaces `path`. Its lock lets the next run remove what is left."""
    path, problem = user_path(path), f"{path}: cannot be written"
    if path.is_dir() and not folder:
        raise UserError(f"{path}: is a folder: pass the name of a file")
    if path.is_dir() and not all(re.fullmatch(folder, p.name) for p in listed(path)):
        raise UserError(f"{path}: has other files in it: pass a new folder")
    name = f".{path.name[:100]}-"
    for leftover in path.parent.glob(f"{glob.escape(name)}????????.partial"):
        with suppress(OSError), open(leftover / "lock") as file:
            if lock(file):  # else its run lives
                shutil.rmtree(leftover)
    with system_errors(problem):
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(".partial", name, path.parent)
    with made as hidden, open(f"{hidden}/lock", "w") as file:
        lock(file)
        yield hidden
        if os.path.exists(f"{hidden}/new"):
            with system_errors(problem):
                if path.is_dir():
                    os.replace(path, f"{hidden}/old")
                os.replace(f"{hidden}/new", path)


def check_output(path: PathLike, folder: str = "") -> None:
    """UserError before any work if a file, or a folder of frames with names that match
    the pattern `folder`, cannot be written at `path`; no folder is left behind."""
    made = [p for p in user_path(path).absolute().parents if not p.exists()]
    with workspace(path, folder):
        pass
    for parent in made:
        parent.rmdir()


def png(image: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def save_png(path: PathLike, image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8, or frames (F, H, W, 3) as a horizontal strip."""
    if image.ndim == 4:
        image = np.concatenate(list(image), axis=1)
    with workspace(path) as folder, system_errors(f"{path}: cannot be written"):
        Path(folder, "new").write_bytes(png(image))


def mux(path: PathLike, folder: str, options: str, metadata: Any, data: bytes) -> None:
    """Write "new" in a workspace by ffmpeg: input 0 is metadata, `options` the rest."""
    text = re.sub(r"([=;#\\])", r"\\\1", json.dumps(metadata)) if metadata else ""
    # As an argument it might be too long.
    Path(folder, "metadata").write_text(f";FFMETADATA1\ncomment={text}\n", "utf-8")
    options = f"-f ffmetadata -i metadata {options}"
    # Nothing else of a sound file comes along.
    only = "-map_metadata 0 -map_metadata:s -1 -map_chapters -1 new"
    run_ffmpeg(f"{path}: cannot be written", options, only, data=data, folder=folder)


def write_wav(path: PathLike, waveform: np.ndarray, rate: int, metadata=None) -> None:
    """Write a waveform (samples, channels) float32 as 16-bit sound, clipped to [-1, 1]."""
    options = f"-f f32le -ar {rate} -ac {waveform.shape[1]} -i pipe:0 -f wav"
    with workspace(path) as folder:
        mux(path, folder, options, metadata, waveform.astype("<f4").tobytes())


def read_metadata(path: PathLike) -> Metadata:
    """The metadata that `VideoWriter` or `write_wav` put into a file or folder."""
    problem = f"{path}: does not say how it was made"
    if os.path.isfile(inside := Path(path, FOLDER_FILES[1])):
        return parse_json(inside.read_bytes(), f"{inside}")
    listing = run_ffmpeg(problem, input_option(path), "-f ffmetadata pipe:1").decode()
    comment = re.search(r"^comment=(.*)$", listing, re.MULTILINE | re.IGNORECASE)
    with suppress(UserError):
        return parse_json(re.sub(r"\\(.)", r"\1", comment[1] if comment else ""), "")
    raise UserError(problem)
