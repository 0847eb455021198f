"""Input files of a run: each is read once, and encoded by the model's autoencoders."""

import os
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product, tee
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import color, exr, latents, media
from .audio_vae import log_mel
from .base import UserError
from .cache import read_contexts
from .guidance import Contexts
from .latents import SPACE_SCALE, TIME_SCALE, Size
from .lora import Lora, adapter_file
from .request import LoraFile
from .tiles import Span, Tiles, blended, cells, sized_spans

Frames = Iterator[np.ndarray]  # (H, W, 3) uint8, or of EXR files float32


class InputFiles:
    """The user's images, clips and LoRAs, each opened once until it changes."""

    def __init__(self) -> None:
        self._read: dict[tuple, Any] = {}

    def _once(self, read: Callable[[str], Any], path: str) -> Any:
        changed = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
        key = read, str(path), changed
        if key not in self._read:
            self._read[key] = read(path)
        return self._read[key]

    def image(self, path: str) -> np.ndarray:
        """Pixels (H, W, 3), uint8 or, of an EXR file, float32."""
        return self._once(exr.still if exr.frames_in(path) else media.load_image, path)

    def probe(self, path: str) -> media.Media:
        """What a clip or sound file contains."""
        return self._once(exr.probe, path) if exr.frames_in(path) else media.probe(path)

    def lora_file(self, path: str) -> Path:
        """The file of a LoRA; one of the Hub is downloaded."""
        return self._once(adapter_file, path)

    def lora(self, path: str) -> Lora:
        """A LoRA whose factors are read where they are first used."""
        return self._once(Lora.planned, str(self.lora_file(path)))

    def reference_factors(self, loras: Iterable[LoraFile]) -> tuple[int, int]:
        """By how much a reference is smaller and slower, by the LoRAs' metadata."""
        factors = [1, 1]
        for lora in loras:
            metadata = self.lora(lora.path).metadata
            for i, axis in enumerate(("downscale", "temporal_scale")):
                name, other = f"reference_{axis}_factor", factors[i]
                value = metadata.get(name, str(other))
                if not re.fullmatch("[1-9]", value) or other not in (1, int(value)):
                    fault = "is not supported, or differs from another LoRA's"
                    raise UserError(f"LoRA {lora.path}: {name} {value!r} {fault}")
                factors[i] = int(value)
        return tuple(factors)

    def contexts(self, path: str) -> Contexts:
        """Contexts of video and audio in a file, None if missing."""
        return self._once(read_contexts, path)

    def clear(self) -> None:
        """Free everything that was read."""
        self._read.clear()


@dataclass
class Encoders:
    """Encode input files; latents are evaluated, so that encoders can be freed."""

    files: InputFiles
    component: Callable[[str], nn.Module]
    frozen_from_noise: bool = False  # see LatentState.freeze
    codes: str = "srgb"  # what the video VAE sees of other files, of color.SPACES
    space: str = "srgb"  # what EXR files hold; the VAE sees them as ACEScct

    def encoder_input(self, frames: np.ndarray, light: bool = False) -> mx.array:
        """Frames (n, H, W, 3), in [-1, 1] or EXR's, as the VAE sees them, (1, ...)."""
        if light:
            frames = 2 * color.convert(frames, self.space, "acescct").clip(0, 1) - 1
        elif self.codes != "srgb":
            frames = 2 * color.convert(frames / 2 + 0.5, "srgb", self.codes) - 1
        return mx.array(frames)[None]

    def seen(self, path: str, frames: Iterable, size: Size, pads=False) -> Iterator:
        """A file's frames (H, W, 3) at the size's sides, each as the VAE sees it; cropped,
        EXR frames padded with `pads`."""
        light = bool(exr.frames_in(path))
        for frame in frames:
            frame = filling(frame, size, light, not (light and pads))
            yield self.encoder_input(frame[None], light)

    def image(self, path: str, crf: int, size: Size) -> mx.array:
        """One latent frame (1, 1, h, w, C)."""
        pixels = self.files.image(path)
        pixels = pixels if exr.frames_in(path) else media.recompress(pixels, crf)
        [pixels] = self.seen(path, [pixels], size)
        x = self.component("vae.encoder").encode(pixels)
        mx.eval(x)
        return x

    def clip(
        self,
        path: str,
        start: int,
        num_frames: int,
        size: Size,
        slow: int = 1,
        tiles: Tiles = (),
        repeats: int = 1,
        pads: bool = False,
    ) -> mx.array:
        """Latents (1, f, h, w, C) of a clip, of every `slow`-th frame, with each frame
        `repeats` times; encoded in `tiles` of latents, or whole. See `seen`."""
        size = replace(size, num_frames=1 - (1 - num_frames) // slow)
        lengths = zip(size.latent, tiles or ((n, 0) for n in size.latent))
        times, *sides = (sized_spans(side, *length) for side, length in lengths)
        places, encoder = [*product(*sides)], self.component("vae.encoder")
        total = mx.zeros((1, *size.latent, encoder.config.latent_channels))
        for time in times:
            # A tile's first latent covers one frame, so later tiles have one more.
            first, stop = max(time.start - 1, 0), (time.stop - 1) * TIME_SCALE + 1
            frames = frames_of(path, start, -(-num_frames // repeats), size.fps)
            frames = islice((x for x in frames for _ in range(repeats)), num_frames)
            frames = (x for n, x in enumerate(frames, -1) if n < 0 or n % slow == 0)
            frames = islice(frames, first * TIME_SCALE, stop if time.after else None)
            parts = zip(tee(self.seen(path, frames, size, pads), len(places)), places)
            made = zip(*(encoder.encode_stream(cropped(*part)) for part in parts))
            for x, place in zip(zip(*made), places):
                x = mx.concatenate(x, axis=1)[:, time.start - first :]
                total = blended(total, x, (time, *place))
        return total

    def weights(
        self,
        path: str,
        start: int,
        num_frames: int,
        size: Size,
        grid: Size,
        slow: int,
        of: str,
    ) -> np.ndarray:
        """The brightness (f, h, w) in [0, 1] of a picture or of a clip's frames at the
        sides of `size`, averaged over each latent of `grid` that `clip` would give; as
        the reference `of` which it weighs, it is cropped or padded."""
        still = self.files.probe(path).num_frames == 1
        frames = frames_of(path, start, num_frames, size.fps)
        frames = [self.files.image(path)] if still else frames
        padded = bool(exr.frames_in(of))
        if padded:
            clip = self.files.probe(of)
            frames = (media.resize(x, clip.height, clip.width) for x in frames)
        _, h, w = grid.latent
        shape = h, size.height // h, w, size.width // w, 3
        pixels = (filling(x, size, crop=not padded).reshape(shape) for x in frames)
        shown = np.array([x.mean((1, 3, 4)) / 2 + 0.5 for x in pixels])
        shown = shown.repeat(num_frames if still else 1, axis=0)
        # As in the reference, also frames count that a slow clip leaves out.
        count = -(-(num_frames - 1) // slow) // latents.TIME_SCALE
        per_latent = max(num_frames - 1, 1) // max(count, 1)
        rest = shown[1 : 1 + count * per_latent].reshape(count, per_latent, h, w)
        return np.concatenate([shown[:1], rest.mean(axis=1)])

    def sound(self, path: str, start: float, seconds: float, tokens: int) -> mx.array:
        """Latents (1, tokens, mel, C) of a sound in stereo, padded with zeros."""
        sound = stereo(path, start, seconds, latents.SAMPLE_RATE)
        x = self.component("audio_vae").encode(log_mel(mx.array(sound)[None]))
        x = x[:, :tokens]
        x = mx.pad(x, [(0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0)])
        mx.eval(x)
        return x


def stereo(path: str, start: float, seconds: float, rate: int) -> np.ndarray:
    """A waveform (samples, 2) of a part of a sound."""
    sound, own = media.read_audio(path, start, seconds)
    sound = media.resample(sound[:, :2], own, rate)
    return sound.repeat(2, axis=1) if sound.shape[1] == 1 else sound


def cropped(frames: Iterable[mx.array], place: Iterable[Span]) -> Iterator[mx.array]:
    """The part of frames (1, 1, H, W, 3) under these rows and columns of latents."""
    rows, columns = cells(place, SPACE_SCALE)
    return (x[:, :, rows, columns] for x in frames)


def filling(frame: np.ndarray, size: Size, light=False, crop=True) -> np.ndarray:
    """A frame (H, W, 3) uint8 at the size's sides, in [-1, 1]: brought by `media.resize`
    to what is shown of it, which the padding reflects; `light` is not scaled."""
    frame = media.resize(frame, *(size.shown or (size.height, size.width)), crop)
    frame = frame if light else frame / np.float32(127.5) - 1
    rest = size.height - frame.shape[0], size.width - frame.shape[1]
    small = any(a >= b for a, b in zip(rest, frame.shape))
    pads = (0, rest[0]), (0, rest[1]), (0, 0)
    return np.pad(frame, pads, "edge" if small else "reflect")


def frames_of(path: str, start: int, num_frames: int, fps: float) -> Frames:
    """Frames of a clip; the last one is repeated. EXR files have no rate of their own."""
    read = exr.read if exr.frames_in(path) else partial(media.read_video, fps=fps)
    for frame in read(path, start, num_frames):
        yield frame
        num_frames -= 1
    yield from (frame for _ in range(num_frames))
