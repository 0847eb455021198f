"""The files that a run writes: names that are free, and what is next to each video."""

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Iterable, Iterator, Optional

from . import formats, media
from .base import UserError, lock, taken

LATENTS, PREVIEW, SHEET = ".latents.safetensors", ".preview.png", "-sheet.png"


def next_to(output: str, kind: str) -> Path:
    """A file of another kind next to an output, with the same stem."""
    return Path(output).with_name(Path(output).stem + kind)


def names(output: str, videos: int, number: int = 1) -> list[str]:
    """out.mp4, or out-1.mp4, ... of several; of set 2 out-2.mp4, or out-2-1.mp4, ..."""
    path = Path(output)
    if not path.name:
        raise UserError(f"--output {output}: no file name: use a file or a new folder")
    stem = path.stem + f"-{number}" * (number > 1)
    stems = [f"{stem}-{n}" for n in range(1, videos + 1)] if videos > 1 else [stem]
    return [str(path.with_name(stem + path.suffix)) for stem in stems]


@contextmanager
def claimed(outputs: Iterable[str]) -> Iterator[None]:
    """Keep these names from other runs; UserError if another run has one of them."""
    with ExitStack() as held:
        for output in outputs:
            path = lock_of(output)
            path.parent.mkdir(parents=True, exist_ok=True)
            if lock(held.enter_context(path.open("w"))) is False:
                raise UserError(f"another run writes {output}: pass another --output")
            held.callback(path.unlink, missing_ok=True)
        yield


def lock_of(output: str) -> Path:
    return Path(output).with_name(f".{Path(output).name}.lock")


def is_claimed(output: str) -> bool:
    """Whether another run is writing it, by its lock, which ends with that run."""
    path = lock_of(output)
    if not path.exists():
        return False
    with path.open("a") as file:
        return lock(file) is False


@dataclass(frozen=True)
class Files:
    """What a run may write for each video: also files of these `kinds` next to it."""

    kinds: tuple[str, ...]
    codec: Optional[str]
    space: str
    sound_only: bool

    def of(self, output: str) -> list[Path]:
        """All files of a video, itself first."""
        how = self.codec, self.space
        made = [output] if self.sound_only else formats.written(output, *how)
        return [*map(Path, made), *(next_to(output, k) for k in self.kinds)]

    def free(self, output: str, videos: int, kept: Optional[str] = None) -> list[str]:
        """The first names without files or other runs; the file `kept` does not count."""
        for number in count(1):
            found = names(output, videos, number)
            paths = {path for name in found for path in self.of(name)}
            there = any(map(taken, paths - {Path(kept or "")}))
            if not there and not any(map(is_claimed, found)):
                return found

    def check(self, output: str, inputs: Iterable[str]) -> None:
        """UserError unless all files can be written and none is an input."""
        formats.check_output(output, self.codec, self.space, self.sound_only)
        inputs = [file for file in inputs if os.path.exists(file)]
        for path in self.of(output):
            if path.name.endswith(self.kinds):
                media.check_output(path)
            # By the file itself: a Mac's disk may not tell A.mp4 from a.mp4.
            if path.exists() and any(path.samefile(file) for file in inputs):
                raise UserError(f"{path} would be overwritten, but is an input")
