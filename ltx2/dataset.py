"""Clips to train on: found with their captions, fitted to buckets, encoded once.

Latents and contexts are kept on the disk by all that they depend on, and read when they
are needed. A file that cannot be used is named and skipped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

import mlx.core as mx

from . import media
from .base import LOG, UserError, checked, note, user_path
from .cache import ContextCache
from .guidance import Contexts
from .hub import File, read_arrays
from .inputs import Encoders, InputFiles
from .latents import SPACE_SCALE, TIME_SCALE, Size, Streams, audio_tokens
from .options import check_step, match_groups
from .parts import first_file
from .pipeline import Pipeline
from .weights import save_arrays

PICTURES = frozenset(".png .jpg .jpeg .webp .bmp .tif .tiff .heic .heif".split())
VIDEOS = frozenset(".mp4 .mov .mkv .webm .avi .m4v .gif .mpg .ts".split())
SOUNDS = frozenset(".wav .flac .mp3 .ogg .m4a .aac".split())
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.json", "train.jsonl")
COLUMNS = {  # of lists, as the Hub, the reference's trainer and mlx-examples name them
    "path": ("file_name", "video", "media_path", "image", "audio"),
    "caption": ("caption", "prompt", "text"),
    "reference": ("reference_video", "ref_media_path", "reference"),
}
MAX_FPS = 120.0
STILL_FPS = 1.0  # a picture lasts a second, as in the reference's training
SIDES = ((576, 576), (768, 448), (448, 768))
LENGTHS = (49, 25, 9, 1)
PROMPTS_AT_ONCE = 16  # whose hidden states are held together


@dataclass(frozen=True)
class Clip:
    """A file of the data, its caption and, for an IC-LoRA, its reference clip."""

    path: Path
    caption: str
    reference: Optional[Path] = None


@dataclass(frozen=True)
class Item:
    """A clip as it is trained on."""

    clip: Clip
    size: Size
    streams: tuple[str, ...]
    key: str  # of its latents on the disk


@dataclass(frozen=True)
class Sample:
    """What is read of an item: latents by stream and those of the reference, both with a
    batch axis, and contexts."""

    item: Item
    latents: Streams
    contexts: Contexts
    reference: Optional[mx.array] = None


# Finding clips


def find_clips(data: str, references: Optional[str] = None) -> list[Clip]:
    """The clips of a list, or of a folder with a list or with captions in .txt files.
    `references` is a folder of clips with the same names."""
    path = user_path(data)
    lists = [path] if path.is_file() else [path / name for name in LISTS]
    listed = next((p for p in lists if p.is_file()), None)
    if not path.exists():
        raise UserError(f"{data}: no such folder or list of clips")
    clips = list(_listed(listed) if listed else _captioned(path))
    if references is not None:
        clips = [replace(c, reference=_same_name(c, references)) for c in clips]
        for c in clips:
            if c.reference is None:
                note(f"{c.path.name} is skipped: no clip of that name in {references}")
        clips = [c for c in clips if c.reference is not None]
    if not clips:
        raise UserError(
            f"{data} has no clips: put a .txt with its caption next to each, or list "
            "them in metadata.jsonl with file_name and caption"
        )
    return clips


def _captioned(folder: Path) -> Iterator[Clip]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES | VIDEOS | SOUNDS:
            text = path.with_suffix(".txt")
            caption = _text(text).strip() if text.is_file() else ""
            if caption:
                yield Clip(path, " ".join(caption.split()))
            else:
                note(f"{path.name} is skipped: it has no caption in {text.name}")


def _listed(path: Path) -> Iterator[Clip]:
    """Rows of a .jsonl, .json or .csv; paths are relative to it."""
    for n, row in enumerate(_rows(path), 1):
        found = {
            k: next((row[c] for c in names if str(row.get(c) or "").strip()), None)
            for k, names in COLUMNS.items()
        }
        if found["path"] is None or found["caption"] is None:
            note(f"row {n} of {path.name} is skipped: it needs file_name and caption")
            continue
        where = {
            k: path.parent / checked(str, found[k], f"{path}, row {n}: {k}")
            for k in ("path", "reference")
            if found[k]
        }
        caption = checked(str, found["caption"], f"{path}, row {n}: caption")
        yield Clip(caption=" ".join(caption.split()), **where)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8") from None


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    text = _text(path)
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix == ".csv":
        return csv.DictReader(lines)
    text = text if path.suffix == ".json" else f"[{','.join(lines)}]"
    try:
        return checked(list[dict[str, Any]], json.loads(text), str(path))
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None


def _same_name(clip: Clip, folder: str) -> Optional[Path]:
    found = sorted(user_path(folder).glob(f"{clip.path.stem}.*"))
    return next((p for p in found if p.suffix.lower() in PICTURES | VIDEOS), None)


# Buckets


def parse_bucket(text: str) -> Size:
    """WxHxF, the value of --resolution."""
    form = "WxHxF (--resolution 768x512x49)"
    w, h, f = map(int, match_groups(form, r"(\d+)x(\d+)x(\d+)", text))
    for name, side in (("width", w), ("height", h)):
        check_step(f"--resolution {text}: {name}", side, SPACE_SCALE, SPACE_SCALE, 4096)
    check_step(f"--resolution {text}: frames", f, TIME_SCALE, 1, 1001, plus=1)
    return Size(w, h, f, 0)


def default_buckets(defaults: Mapping[str, float]) -> list[Size]:
    """The model's own size, or three shapes; each with several lengths."""
    sides, lengths = SIDES, LENGTHS
    if "width" in defaults:
        sides = ((defaults["width"], defaults["height"]),)
        longest = defaults["num_frames"]
        lengths = [n for n in range(longest, 0, -1) if n % TIME_SCALE == 1]
    return [Size(w, h, f, 0) for w, h in sides for f in lengths]


def choose_bucket(
    width: int, height: int, frames: int, buckets: Sequence[Size]
) -> Size:
    """Of the buckets that are not longer, the one of the nearest shape, then the longest,
    then the largest: the reference's rule."""
    short = [b for b in buckets if b.num_frames <= frames]
    if not short:
        least = min(b.num_frames for b in buckets)
        raise UserError(
            f"it has {frames} frames, fewer than the {least} of the shortest bucket"
        )

    def rank(b: Size) -> tuple:
        off = abs(math.log(width / height * b.height / b.width))
        return round(off, 6), -b.num_frames, -b.width * b.height

    return min(short, key=rank)


def fit(clip: Clip, buckets: Sequence[Size], streams: str) -> tuple[Size, list, str]:
    """A clip's size and streams, and what has to be done to it. UserError if it cannot be
    used."""
    wants = ("video", "audio") if streams == "both" else (streams,)
    suffix = clip.path.suffix.lower()
    if suffix in PICTURES:
        height, width = media.load_image(clip.path).shape[:2]
        found = media.Media(width, height, Fraction(STILL_FPS), 1)
    else:
        found = media.probe(clip.path)
    has = [s for s in wants if getattr(found, f"has_{s}")]
    if not has:
        raise UserError(f"{clip.path.name} has no {' and no '.join(wants)}")
    fps, frames = min(float(found.fps or 24), MAX_FPS), found.num_frames
    if "video" not in has or fps != found.fps:
        frames = math.floor(found.duration * fps + 0.01)
    b = choose_bucket(found.width or 1, found.height or 1, frames, buckets)
    sound = audio_tokens(b.num_frames, fps) if "audio" in has else 0
    size = Size(b.width, b.height, b.num_frames, fps, sound)
    done = f"frames 1 to {b.num_frames} of {frames} at {fps:g} fps"
    if "video" in has:
        done += f", {found.width}x{found.height} to {b.width}x{b.height}"
    lacks = [s for s in wants if s not in has]
    return size, has, done + "".join(f", without {s}" for s in lacks)


# Encoding


class Dataset:
    """Items whose latents and contexts are in a folder."""

    def __init__(self, folder: str | Path, pipe: Pipeline, downscale: int = 1):
        """Reference clips have `downscale` times smaller sides."""
        self.folder, self.pipe, self.downscale = Path(folder), pipe, downscale
        self.items: list[Item] = []
        self.held_out: list[Item] = []

    def fit(
        self, clips: Sequence[Clip], buckets: Sequence[Size], streams: str, trigger: str
    ) -> None:
        """Choose each clip's bucket; files that cannot be used are named."""
        for clip in clips:
            try:
                size, has, done = fit(clip, buckets, streams)
                key = self.key(clip, size, has)
            except (UserError, OSError) as error:
                note(f"{clip.path.name} is skipped: {error}")
                continue
            LOG.info(f"{clip.path.name}: {done}")
            if trigger:
                clip = replace(clip, caption=f"{trigger} {clip.caption}")
            self.items.append(Item(clip, size, tuple(has), key))
        self._check()

    @cached_property
    def contexts(self) -> ContextCache:
        return self.pipe.context_cache(self.folder)

    def key(self, clip: Clip, size: Size, streams: Sequence[str]) -> str:
        """What an item's latents depend on."""
        print_of = lambda p: File(p.name, p.stat().st_size, p).fingerprint
        parts = self.pipe.checkpoint.parts
        names = {"video": "vae", "audio": "audio_vae"}
        depends = [print_of(clip.path), repr(size), list(streams), self.downscale]
        depends += [first_file(parts[names[s]]).fingerprint for s in streams]
        depends += [print_of(clip.reference)] if clip.reference else []
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()

    def path(self, item: Item) -> Path:
        return self.folder / f"{item.key}.latents.safetensors"

    def encode(self) -> None:
        """Encode what is not there yet: captions, then clips, each as a stream."""
        items = self.items + self.held_out
        self.encode_captions(list(dict.fromkeys(i.clip.caption for i in items)))
        encoders, broken = Encoders(InputFiles(), self.pipe.component), []
        for item in items:
            try:
                if not self._is_encoded(item):
                    self._save(item, encoders)
            except UserError as error:
                note(f"{item.clip.path.name} is skipped: {error}")
                broken.append(item)
            encoders.files.clear()
        self.pipe.free("vae", "audio_vae")
        self.items = [item for item in self.items if item not in broken]
        self.held_out = [item for item in self.held_out if item not in broken]
        self._check()

    def _check(self) -> None:
        if not self.items:
            raise UserError("none of the clips can be used")

    def encode_captions(self, captions: Sequence[str]) -> None:
        missing = [c for c in captions if not self.contexts.path(c).exists()]
        for i in range(0, len(missing), PROMPTS_AT_ONCE):
            self.contexts(missing[i : i + PROMPTS_AT_ONCE], self.pipe.encode_prompts)

    def _save(self, item: Item, encoders: Encoders) -> None:
        clip, size, arrays = item.clip, item.size, {}
        if "video" in item.streams:
            arrays["video"] = self._video(clip.path, size, encoders)
        if "audio" in item.streams:
            seconds = size.num_frames / size.fps
            sound = encoders.sound(clip.path, 0.0, seconds, size.audio_tokens)
            arrays["audio"] = sound
        if clip.reference:
            smaller = size.divided(self.downscale)
            arrays["reference"] = self._video(clip.reference, smaller, encoders)
        save_arrays(self.path(item), arrays, {"file": clip.path.name})

    def _video(self, path: Path, size: Size, encoders: Encoders) -> mx.array:
        """Latents (1, f, h, w, C) of a picture or of a clip's first frames."""
        if path.suffix.lower() in PICTURES:
            return encoders.image(str(path), 0, size)
        x = encoders.clip(str(path), 0, size.num_frames, size)
        if x.shape[1] != size.latent[0]:
            raise UserError(f"{path.name} ends before frame {size.num_frames}")
        return x

    def _is_encoded(self, item: Item) -> bool:
        """Whether an item's file is there; a damaged one is made again."""
        with suppress(UserError):
            read_arrays(self.path(item))
            return True
        return False

    def load(self, item: Item) -> Sample:
        """An item's latents and contexts, from the disk."""
        arrays = mx.load(str(self.path(item)))
        reference = arrays.pop("reference", None)
        return Sample(item, arrays, self.context(item.clip.caption), reference)

    def context(self, caption: str) -> Contexts:
        return self.contexts([caption], self.pipe.encode_prompts)[caption]

    def hold_out(self, count: int) -> None:
        """Move so many items, evenly spaced, to those that are not trained on."""
        places = {(2 * i + 1) * len(self.items) // (2 * count) for i in range(count)}
        self.held_out = [self.items[i] for i in sorted(places)]
        self.items = [item for i, item in enumerate(self.items) if i not in places]
