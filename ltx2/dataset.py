"""Clips to train on: found with captions, fitted to buckets, encoded once."""

import csv
import glob
import hashlib
import io
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

import mlx.core as mx

from . import base, media
from .base import LOG, UserError, checked, note, parse_json, read_text, user_path
from .cache import ContextCache
from .defaults import frames_at
from .guidance import Contexts
from .hub import File, read_arrays
from .inputs import Encoders, InputFiles
from .latents import SPACE_SCALE, TIME_SCALE, Size, Streams, audio_tokens
from .options import check_range, check_step, match_groups
from .parts import first_file
from .pipeline import Pipeline
from .weights import save_arrays

PICTURES = frozenset(".png .jpg .jpeg .webp .bmp .tif .tiff .heic .heif .avif".split())
VIDEOS = frozenset(".mp4 .mov .mkv .webm .avi .m4v .gif .mpg .ts".split())
SOUNDS = frozenset(".wav .flac .mp3 .ogg .m4a .aac".split())
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.json", "train.jsonl")
COLUMNS = {  # of lists, as the Hub, the reference's trainer and mlx-examples name them
    "path": ("file_name", "video", "media_path", "image", "audio"),
    "caption": ("caption", "prompt", "text"),
    "reference": ("reference_video", "ref_media_path", "reference"),
}
ENCODERS = {"video": "vae", "audio": "audio_vae"}
MAX_FPS = 120.0
STILL_FPS = 1.0  # a picture lasts a second, as in the reference's training
SIDES = ((576, 576), (768, 448), (448, 768))
LENGTHS = (49, 25, 9, 1)
PROMPTS_AT_ONCE = 16  # whose hidden states are held together


@dataclass(frozen=True)
class Clip:
    """A clip of the data with its caption and reference, and how it is trained on."""

    path: Path
    caption: str
    reference: Optional[Path] = None
    size: Size = Size(0, 0, 0, 0)
    streams: tuple[str, ...] = ()
    key: str = ""  # of its latents on the disk
    held_out: bool = False


def of_streams(size: Size, streams: Sequence[str]) -> Size:
    """What a clip has of these streams."""
    width, height = (size.width, size.height) if "video" in streams else (0, 0)
    sound = size.audio_tokens if "audio" in streams else 0
    return replace(size, width=width, height=height, audio_tokens=sound)


def find_clips(data: str) -> list[Clip]:
    """The clips of a list, or of a folder with a list or captions in .txt files."""
    path = user_path(data)
    lists = [path] if path.is_file() else [path / name for name in LISTS]
    listed = next((p for p in lists if p.is_file()), None)
    if not (listed or path.is_dir()):
        raise UserError(f"{data}: no such folder or list of clips")
    clips = list(_listed(listed) if listed else _captioned(path))
    if not clips:
        how = "put a .txt with its caption next to each, or list them in metadata.jsonl"
        raise UserError(f"{data} has no clips to train on: {how}")
    return clips


def _captioned(folder: Path) -> Iterator[Clip]:
    for path in base.listed(folder):
        text = path.with_suffix(".txt")
        known = path.suffix.lower() in PICTURES | VIDEOS | SOUNDS
        # Of other endings, what has a caption is meant: ffmpeg may read it
        if path.is_file() and path != text and (known or text.is_file()):
            with skipping(path):
                caption = read_text(str(text)).split() if text.is_file() else ()
                if not caption:
                    raise UserError(f"it has no caption in {text.name}")
                yield Clip(path, " ".join(caption))


def _listed(path: Path) -> Iterator[Clip]:
    """Rows of a .jsonl, .json or .csv; their paths are relative to it."""
    for n, row in enumerate(_rows(path), 1):
        found = {}
        with skipping(f"row {n} of {path.name}"):
            for k, names in COLUMNS.items():
                value = next((row[c] for c in names if row.get(c)), None)
                kind = str if k == "caption" else base.PathName
                found[k] = checked(Optional[kind], value, k)
            caption = (found["caption"] or "").split()
            if not found["path"] or not caption:
                raise UserError("it needs file_name and caption")
            clip, shown = path.parent / found["path"], found["reference"]
            yield Clip(clip, " ".join(caption), shown and path.parent / shown)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    text = read_text(str(path))
    if path.suffix.lower() == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text)))
        except csv.Error as error:
            raise UserError(f"{path} is not a valid CSV file: {error}") from None
    if path.suffix.lower() == ".json":
        return parse_json(text, str(path), list[dict[str, Any]])
    lines = enumerate(text.split("\n"), 1)
    return [parse_json(x, f"{path}, line {n}: ") for n, x in lines if x.strip()]


def find_reference(clip: Clip, folder: str) -> Path:
    """The clip of the same name in a folder of reference clips."""
    found = sorted(user_path(folder).glob(f"{glob.escape(clip.path.stem)}.*"))
    found = [p for p in found if p.suffix.lower() in PICTURES | VIDEOS]
    if not found:
        raise UserError(f"no clip of that name in {folder}")
    return found[0]


@contextmanager
def skipping(what: Path | str) -> Iterator[None]:
    """Note a mistake in a part of the data, which is then skipped."""
    try:
        yield
    except UserError as error:
        note(f"{getattr(what, 'name', what)} is skipped: {error}")


def parse_bucket(text: str) -> Size:
    """The value of --resolution, WxHxF."""
    form = "WxHxF (--resolution 768x512x49)"
    w, h, f = map(int, match_groups(form, r"(\d+)x(\d+)x(\d+)", text))
    for side in (w, h):
        check_step(f"--resolution {text}: side", side, SPACE_SCALE, SPACE_SCALE, 4096)
    check_step(f"--resolution {text}: frames", f, TIME_SCALE, 1, 1001, plus=1)
    return Size(w, h, f, 0)


def default_buckets(defaults: Mapping[str, float]) -> list[Size]:
    """The model's own size, or three shapes, each with several lengths."""
    sides, lengths = SIDES, LENGTHS
    if "width" in defaults:
        sides = ((defaults["width"], defaults["height"]),)
        lengths = range(defaults["num_frames"], 0, -1)
    return [Size(w, h, f, 0) for w, h in sides for f in lengths if f % TIME_SCALE == 1]


def choose_bucket(width: int, height: int, frames: int, buckets: list[Size]) -> Size:
    """The bucket of the nearest shape, longest, largest, not longer than the clip."""
    if not (short := [b for b in buckets if b.num_frames <= frames]):
        least = f"the {min(b.num_frames for b in buckets)} of the shortest bucket"
        raise UserError(f"it has {frames} frames, fewer than {least}")
    off = lambda b: abs(math.log(width / height * b.height / b.width))
    order = lambda b: (round(off(b), 6), -b.num_frames, -b.width * b.height)
    return min(short, key=order)


def fit(clip: Clip, buckets: Sequence[Size], streams: str) -> tuple[Clip, str]:
    """A clip with its size and streams, and what is done to it; else UserError."""
    wants = ("video", "audio") if streams == "both" else (streams,)
    if clip.path.suffix.lower() in PICTURES:
        height, width = media.load_image(clip.path).shape[:2]
        found = media.Media(width, height, Fraction(STILL_FPS), 1)
    else:
        found = media.probe(clip.path)
    has = tuple(s for s in wants if getattr(found, f"has_{s}"))
    if not has:
        raise UserError(f"it has no {' and no '.join(wants)}")
    fps = min(float(found.fps or 24), MAX_FPS)
    frames = frames_at(found, fps)
    b = choose_bucket(found.width or 1, found.height or 1, frames, buckets)
    sound = audio_tokens(b.num_frames, fps) if "audio" in has else 0
    done = f"frames 1 to {b.num_frames} of {frames} at {fps:g} fps"
    if "video" in has:
        done += f", {found.width}x{found.height} to {b.width}x{b.height}"
    done += "".join(f", without {s}" for s in wants if s not in has)
    size = replace(b, fps=fps, audio_tokens=sound)
    return replace(clip, size=size, streams=has), done


class Dataset:
    """Clips whose latents and contexts are in a folder."""

    def __init__(self, folder: str | Path, pipe: Pipeline, options: Any):
        """`options` are those of training."""
        self.folder, self.pipe, self.options = Path(folder), pipe, options
        self.clips: list[Clip] = []

    # Clips to train on, and those that are held out
    items = property(lambda self: [c for c in self.clips if not c.held_out])
    held_out = property(lambda self: [c for c in self.clips if c.held_out])
    has_references = property(lambda self: any(c.reference for c in self.clips))

    def find(self, data: str) -> None:
        """Find clips, choose their buckets, hold out some; skipped ones are named."""
        o = self.options
        buckets = [parse_bucket(text) for text in o.resolution]
        buckets = buckets or default_buckets(self.pipe.checkpoint.defaults)
        if o.reference_data and o.streams == "audio":
            raise UserError("--reference-data cannot be combined with --streams audio")
        step = SPACE_SCALE * o.reference_downscale
        if any(side % step for b in buckets for side in (b.width, b.height)):
            option = f"--reference-downscale {o.reference_downscale}"
            raise UserError(f"{option} needs a --resolution in multiples of {step}")
        references = o.reference_data
        if references and not user_path(references).is_dir():
            raise UserError(f"{references}: no such folder of reference clips")
        for clip in find_clips(data):
            with skipping(clip.path), media.system_errors("it cannot be opened"):
                if references:
                    clip = replace(clip, reference=find_reference(clip, references))
                clip, done = fit(clip, buckets, o.streams)
                caption = f"{o.trigger} {clip.caption}".strip()
                clip = replace(clip, caption=caption, key=self.key(clip))
                LOG.info(f"{clip.path.name}: {done}")
                self.clips.append(clip)
        self._check()
        there = len(self.clips)
        count = min(there // 10, 8) if o.val_clips is None else o.val_clips
        check_range("val_clips", count, 0, there - 1)
        for i in range(count):
            place = (2 * i + 1) * there // (2 * count)
            self.clips[place] = replace(self.clips[place], held_out=True)

    @cached_property
    def contexts(self) -> ContextCache:
        return self.pipe.context_cache(self.folder)

    def key(self, clip: Clip) -> str:
        """What a clip's latents depend on."""
        print_of = lambda p: File(p.name, p.stat().st_size, p).fingerprint
        parts = self.pipe.checkpoint.parts
        depends = [print_of(clip.path), repr(clip.size), clip.streams]
        depends += [self.options.reference_downscale]
        depends += [first_file(parts[ENCODERS[s]]).fingerprint for s in clip.streams]
        depends += [print_of(clip.reference)] if clip.reference else []
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()

    def path(self, clip: Clip) -> Path:
        return self.folder / f"{clip.key}.latents.safetensors"

    def encode(self, prompts: Sequence[str] = ()) -> None:
        """Encode captions, other prompts and clips that are not in the folder yet."""
        captions = dict.fromkeys([*(clip.caption for clip in self.clips), *prompts])
        missing = [c for c in captions if self.contexts.read(c) is None]
        for i in range(0, len(missing), PROMPTS_AT_ONCE):
            self.contexts(missing[i : i + PROMPTS_AT_ONCE], self.pipe.encode_prompts)
        encoders, clips = Encoders(InputFiles(), self.pipe.component), self.clips
        self.clips = []
        for clip in base.counted(clips, "clips"):
            with skipping(clip.path):
                if not self.has(clip):
                    self._save(clip, encoders)
                self.clips.append(clip)
            encoders.files.clear()
        self.pipe.free("vae", "audio_vae")
        self._check()

    def _check(self) -> None:
        if not self.items:
            raise UserError("none of the clips can be used: the notes say why")

    def _save(self, clip: Clip, encoders: Encoders) -> None:
        size, arrays = clip.size, {}
        if "video" in clip.streams:
            arrays["video"] = self._video(clip.path, size, encoders)
        if "audio" in clip.streams:
            sound = clip.path, 0.0, size.num_frames / size.fps, size.audio_tokens
            arrays["audio"] = encoders.sound(*sound)
        if clip.reference:
            smaller = size.divided(self.options.reference_downscale)
            arrays["reference"] = self._video(clip.reference, smaller, encoders)
        save_arrays(self.path(clip), arrays, {"file": clip.path.name})

    def _video(self, path: Path, size: Size, encoders: Encoders) -> mx.array:
        """Latents (1, f, h, w, C) of a picture or of a clip's first frames."""
        if path.suffix.lower() in PICTURES:
            return encoders.image(str(path), 0, size)
        x = encoders.clip(str(path), 0, size.num_frames, size)
        if x.shape[1] != size.latent[0]:
            raise UserError(f"it ends before frame {size.num_frames}")
        return x

    def has(self, clip: Clip) -> bool:
        """Whether a clip's latents are in the folder, undamaged."""
        try:
            return bool(read_arrays(self.path(clip)))
        except UserError:
            return False

    def load(self, clip: Clip) -> Streams:
        """A clip's latents by stream and those of its "reference", with a batch axis."""
        return read_arrays(self.path(clip))[0]

    def context(self, caption: str) -> Contexts:
        return self.contexts([caption], self.pipe.encode_prompts)[caption]
