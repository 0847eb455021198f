"""EXR pictures: one file or a folder of frames, whose light has no upper limit.

ffmpeg reads and writes them. Its conversions between floating-point formats clip light
at 1, so frames are read in the file's own format and with this file's tags.
"""

import math
import os
import re
import struct
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Iterator

import numpy as np

from . import color, media
from .base import UserError, listed

FORMAT = rb"Video: exr, (gray|gbrp|gbrap)f(16|32)([lb]e).*? (\d+)x(\d+)"
LAYOUT = rb"channels\0chlist\0.{4}(?:[^\0]+\0.{16})*|dataWindow\0box2i\0.{20}"
LIST = "-f concat -safe 0 -i list -fps_mode passthrough -f rawvideo pipe:1"
# How many there are, and those of red, green and blue
PLANES = {b"gray": (1, [0] * 3), b"gbrp": (3, [2, 0, 1]), b"gbrap": (4, [2, 0, 1])}


def frames_in(path: media.PathLike) -> list[Path]:
    """An EXR file, or the EXR files of a folder by name; [] for anything else."""
    found = [Path(path)] if os.path.isfile(path) else listed(Path(path))
    return [file for file in found if file.suffix.lower() == ".exr"]


def probe(path: media.PathLike) -> media.Media:
    """The size and number of frames; EXR files have no frame rate."""
    files = frames_in(path)
    *_, width, height = _format(files[0])
    for file in files:
        _layout(file)
    return media.Media(int(width), int(height), num_frames=len(files))


def _format(path: Path) -> tuple[bytes, ...]:
    """Planes, bits, byte order, width and height of a file, as ffmpeg reads it."""
    if (found := re.search(FORMAT, media.describe(path))) is None:
        raise UserError(f"{path}: cannot be read as an EXR picture of gray or RGB")
    return found.groups()


def read(
    path: media.PathLike, start: int = 0, count: int | None = None
) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) float32 of a file or folder, from `start` on, without alpha."""
    files = frames_in(path)[start : count and start + count]
    for _, same in groupby(files, _layout):  # one process reads all that are alike
        files = [*same]
        planes, bits, order, width, height = _format(files[0])
        kind = {b"le": "<", b"be": ">"}[order] + {b"16": "f2", b"32": "f4"}[bits]
        number, colors = PLANES[planes]
        frame = np.empty((number, int(height), int(width)), kind)
        with tempfile.TemporaryDirectory() as folder:
            names = (str(f.absolute()).replace("'", r"'\''") for f in files)
            lines = "".join(f"file 'file:{name}'\n" for name in names)
            Path(folder, "list").write_bytes(os.fsencode(lines))
            problem = f"{path}: cannot be read"
            with media.ffmpeg(problem, LIST, folder=folder) as process:
                for _ in files:
                    if process.stdout.readinto(frame) == frame.nbytes:  # else it failed
                        yield frame[colors].transpose(1, 2, 0).astype(np.float32)


def _layout(path: Path) -> list[bytes]:
    """The channels and sides in a file's header."""
    with open(path, "rb") as file:
        head = file.read(2**20)
        try:
            tiled, several = b"tiledimage" in head or head[5] & 2, head[5] & 16
            before = (16 if tiled else 4) + 4 * bool(several)
            file.seek(int(_chunks(head)[1].max()) + before)  # to the last one's size
            size = struct.unpack("<i", file.read(4))[0] + file.tell()
        except struct.error:
            size = math.inf
        except (IndexError, ValueError):  # unless the header is longer than that
            size = math.inf if len(head) < 2**20 else 0
    if os.path.getsize(path) < size:  # ffmpeg would read the rest as black
        raise UserError(f"{path}: the file ends too early: copy or render it again")
    return re.findall(LAYOUT, head, re.DOTALL)


def _chunks(data: bytes, start: int = 8) -> tuple[int, np.ndarray]:
    """Where a file's table of chunks of pixels begins, and the chunks' places in it."""
    while data[start]:  # attributes: name, type, size, value
        kind_end = data.index(0, data.index(0, start) + 1)
        start = kind_end + 5 + struct.unpack_from("<i", data, kind_end + 1)[0]
    start, several = start + 1, bool(data[5] & 16)
    if several and data[start]:  # the next part's header
        return _chunks(data, start)
    start += several
    places = np.frombuffer(data, "<u8", (len(data) - start) // 8, start)
    ends = start + 8 * np.arange(1, len(places) + 1)
    count = np.argmax(ends >= np.minimum.accumulate(places)) + 1  # the first chunk's
    return start, places[:count]


def still(path: media.PathLike) -> np.ndarray:
    """A file's pixels (H, W, 3) float32."""
    return next(read(path))


def with_color(data: bytes, space: color.Space) -> bytes:
    """An EXR file of one part in scan lines with the attributes `chromaticities` and
    `colorSpace`, which ffmpeg does not write."""
    name = space.name.encode()
    added = struct.pack("<i8f", 32, *space.primaries)
    added = b"chromaticities\0chromaticities\0" + added
    added += b"colorSpace\0string\0" + struct.pack("<i", len(name)) + name
    start, table = _chunks(data)
    rest = data[start + table.nbytes :]
    return data[: start - 1] + added + b"\0" + (table + len(added)).tobytes() + rest
