"""Read image files by Pillow, and fit images to a size."""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Iterable, Iterator

import numpy as np

from .base import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

PathLike = str | Path


@contextmanager
def system_errors(problem: str) -> Iterator[None]:
    """Turn an error of the operating system in the block into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem} ({error.strerror or error})") from None


def check_file(path: PathLike) -> None:
    """Raise if `path` is not a file with contents that can be opened."""
    with system_errors(f"{path}: cannot be opened"):
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait
            raise UserError(f"{path}: is a folder, pipe or device, give a file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise UserError(f"{path}: the file is empty")


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

    check_file(path)
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
    return np.asarray(image)


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


def resize_and_crop(
    frames: Iterable[np.ndarray], height: int, width: int
) -> np.ndarray:
    """Fill a size with frames (H, W, 3) uint8 -> (F, height, width, 3) in [-1, 1].

    The aspect is kept and the center cropped; bilinear, when shrinking too without
    antialiasing, as the reference. `frames` may be an array or an iterator.
    """

    def fit(frame: np.ndarray) -> np.ndarray:
        scale = max(height / frame.shape[0], width / frame.shape[1])
        for axis, kept in enumerate((height, width)):
            size = frame.shape[axis]
            resized = math.ceil(size * scale)
            pixels = np.arange(kept, dtype=np.float32) + (resized - kept) // 2
            position = np.maximum((pixels + 0.5) * np.float32(size / resized) - 0.5, 0)
            first = position.astype(int)
            weight = position - first.astype(np.float32)
            weight = np.expand_dims(weight, [1, 2][: 2 - axis])
            second = frame.take(np.minimum(first + 1, size - 1), axis) * weight
            frame = frame.take(first, axis) * (1 - weight) + second
        return frame / np.float32(127.5) - 1

    return np.fromiter(map(fit, frames), np.dtype((np.float32, (height, width, 3))))
