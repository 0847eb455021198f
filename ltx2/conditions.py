"""What a stage is conditioned on: images, clips, sounds, keyframes, earlier latents.

A condition holds paths and numbers, so that a stage can be planned, compared and saved;
`load` turns it into a conditioning of the latent state when its source is there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar, Mapping, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import media
from .audio_vae import log_mel
from .guidance import Guidance
from .latents import (
    AUDIO_TOKENS_PER_SECOND,
    MEL_FRAMES_PER_TOKEN,
    MEL_HOP,
    MEL_RATE,
    Conditioning,
    Freeze,
    Keyframe,
    KeyframeSlots,
    LatentState,
    Reference,
    Regenerate,
    Replace,
    Size,
    StartFrom,
    Streams,
    condition,
    latent_frames,
)
from .lora import Lora
from .request import LoraFile
from .windows import WHOLE, Tile, Whole

ANCHOR_STRENGTH = 0.95  # the reference's: a tile can still smooth its seams


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
        """Pixels (H, W, 3) uint8."""
        return self._once(media.load_image, path)

    def probe(self, path: str) -> media.Media:
        """What a clip or sound file holds."""
        return self._once(media.probe, path)

    def lora(self, path: str) -> Lora:
        """A LoRA whose factors are read where they are first used."""
        return self._once(Lora.read, path)

    def clear(self) -> None:
        """Free what was read."""
        self._read.clear()


class Encoders:
    """Encodes input files with the model's autoencoders, which `component` loads."""

    def __init__(
        self,
        files: InputFiles,
        component: Callable[[str], nn.Module],
        frozen_from_noise: bool = False,
    ):
        self.files, self.component = files, component
        self.frozen_from_noise = frozen_from_noise

    def image(self, path: str, crf: int, size: Size) -> mx.array:
        """One latent frame (1, 1, h, w, C)."""
        pixels = media.recompress(self.files.image(path), crf)
        pixels = media.resize_and_crop(pixels[None], size.height, size.width)
        return self._evaluated(self.component("vae").encode(mx.array(pixels)[None]))

    def clip(self, path: str, num_frames: int, size: Size, slow: int = 1) -> mx.array:
        """Latents (1, f, h, w, C) of a clip at the size's sides and rate, as a stream;
        of every `slow`-th frame after the first."""
        frames = media.read_video(path, 0, num_frames, size.fps)
        chunks = (
            mx.array(media.resize_and_crop(frame[None], size.height, size.width))[None]
            for i, frame in enumerate(frames)
            if i == 0 or (i - 1) % slow == 0
        )
        latents = list(self.component("vae").encode_stream(chunks))
        return self._evaluated(mx.concatenate(latents, axis=1))

    def sound(self, path: str, start: float, seconds: float, tokens: int) -> mx.array:
        """Latents (1, tokens, mel, C) of a sound; mono is doubled, a short one padded
        with silence."""
        sound, rate = media.read_audio(path, start, seconds)
        sound = media.resample(sound[:, :2], rate, MEL_RATE)
        if sound.shape[1] == 1:
            sound = np.repeat(sound, 2, axis=1)
        if len(sound) // MEL_HOP < (tokens - 1) * MEL_FRAMES_PER_TOKEN:
            samples = tokens * MEL_FRAMES_PER_TOKEN * MEL_HOP
            sound = np.pad(sound, ((0, samples - len(sound)), (0, 0)))
        latents = self.component("audio_vae").encode(log_mel(mx.array(sound)[None]))
        return self._evaluated(latents[:, :tokens])

    @staticmethod
    def _evaluated(x: mx.array) -> mx.array:
        """Computed now, so that the encoder can be freed."""
        mx.eval(x)
        return x


class Condition:
    """One condition of a stage on one stream."""

    encoder: ClassVar[str] = ""  # the component that `load` needs
    frames_at_once: ClassVar[int] = 1  # that it encodes
    carried: ClassVar[bool] = False  # made from the previous stage's latents

    def tokens(self, size: Size) -> int:
        """How many tokens it appends."""
        return 0

    def load(self, size: Size, source: Any) -> Conditioning:
        """The conditioning at a size; `source` are the Encoders or, of a carried
        condition, the previous stage's latents."""
        raise NotImplementedError


# Conditions on input files


@dataclass(frozen=True)
class ShowImage(Condition):
    """Hold an image as the first frame."""

    path: str
    strength: float
    crf: int
    encoder = "vae"

    def load(self, size: Size, source: Encoders) -> Conditioning:
        return Replace(source.image(self.path, self.crf, size), 0, self.strength)


@dataclass(frozen=True)
class GuideImage(Condition):
    """Guide with an image at a frame."""

    path: str
    strength: float
    crf: int
    frame: int
    encoder = "vae"

    def tokens(self, size: Size) -> int:
        return size.frame_tokens

    def load(self, size: Size, source: Encoders) -> Conditioning:
        latents = source.image(self.path, self.crf, size)
        return Keyframe(latents, self.frame, size.fps, self.strength)


@dataclass(frozen=True)
class ClipPart(Condition):
    """The video or the sound of a clip, from its start."""

    path: str
    stream: str
    num_frames: int

    @property
    def encoder(self) -> str:
        return {"video": "vae", "audio": "audio_vae"}[self.stream]

    frames_at_once = 8

    def latents(self, size: Size, source: Encoders) -> mx.array:
        """Encoded, not longer than the target."""
        if self.stream == "video":
            return source.clip(self.path, self.num_frames, size)
        seconds = self.num_frames / size.fps
        tokens = min(round(seconds * AUDIO_TOKENS_PER_SECOND), size.audio_tokens)
        return source.sound(self.path, 0.0, seconds, tokens)


@dataclass(frozen=True)
class HoldClip(ClipPart):
    """Hold a clip at the start of the result, or at its end: an extension."""

    at_end: bool = False

    def load(self, size: Size, source: Encoders) -> Conditioning:
        latents = self.latents(size, source)
        total = size.latent[0] if self.stream == "video" else size.audio_tokens
        before = total - latents.shape[1] if self.at_end else 0
        # Only at the start of a stream does the first latent cover a single frame.
        skip = 1 if before else 0
        return Replace(latents[:, skip:], before + skip)


@dataclass(frozen=True)
class RetakeClip(ClipPart):
    """Start from a clip and regenerate a span of seconds, or nothing (None)."""

    span: Optional[tuple[float, float]] = None

    def load(self, size: Size, source: Encoders) -> Conditioning:
        start = StartFrom(self.latents(size, source))
        if self.span is not None:
            return in_order(start, Regenerate(*self.span))
        return in_order(start, Freeze(from_noise=source.frozen_from_noise))


@dataclass(frozen=True)
class HoldSound(Condition):
    """Keep a sound file as the audio stream."""

    path: str
    start: float
    encoder = "audio_vae"

    def load(self, size: Size, source: Encoders) -> Conditioning:
        tokens = size.audio_tokens
        seconds = tokens / AUDIO_TOKENS_PER_SECOND + 1
        latents = source.sound(self.path, self.start, seconds, tokens)
        return in_order(StartFrom(latents), Freeze())


@dataclass(frozen=True)
class ReferenceClip(Condition):
    """Show a clip to an IC-LoRA, `downscale` times smaller and `slow` times slower."""

    path: str
    num_frames: int
    strength: float
    attention: float
    downscale: int = 1
    slow: int = 1
    encoder, frames_at_once = "vae", 8

    def tokens(self, size: Size) -> int:
        frames = latent_frames(self.num_frames)
        return frames * size.frame_tokens // self.downscale**2

    def load(self, size: Size, source: Encoders) -> Conditioning:
        smaller = size.divided(self.downscale)
        latents = source.clip(self.path, self.num_frames, smaller, self.slow)
        scale = self.downscale, self.slow
        return Reference(latents, size.fps, self.strength, *scale, self.attention)


# Conditions on the previous stage's latents


@dataclass(frozen=True)
class NewKeyframes(Condition):
    """Generate single frames at these places, from those of the stage before."""

    frames: tuple[int, ...]
    carried = True

    def tokens(self, size: Size) -> int:
        return len(self.frames) * size.frame_tokens

    def load(self, size: Size, source: Streams) -> Conditioning:
        initial = source.get("keyframes")
        return KeyframeSlots(self.frames, size.latent, size.fps, initial)


@dataclass(frozen=True)
class PreviousAsReference(Condition):
    """Show the previous stage's smaller video to an IC-LoRA."""

    downscale: int
    carried = True

    def tokens(self, size: Size) -> int:
        return size.tokens // self.downscale**2

    def load(self, size: Size, source: Streams) -> Conditioning:
        return Reference(source["smaller"], size.fps, 1.0, self.downscale)


@dataclass(frozen=True)
class TileKeyframes(Condition):
    """Guide a tile with the canvas's keyframes and generate one in each segment."""

    tile: Tile
    carried = True

    def tokens(self, size: Size) -> int:
        return 2 * len(self.tile.slots) * size.frame_tokens

    def load(self, size: Size, source: Streams) -> Conditioning:
        anchors = (
            Keyframe(latents, frame, size.fps, ANCHOR_STRENGTH)
            for frame, latents in self.tile.anchors(source["keyframes"])
        )
        initial = self.tile.seeds(source["video"])
        slots = KeyframeSlots(self.tile.slots, size.latent, size.fps, initial)
        return in_order(*anchors, slots)


def in_order(*conditionings: Conditioning) -> Conditioning:
    """Several conditionings as one."""
    return lambda state: condition(state, conditionings)


@dataclass(frozen=True)
class Stage:
    """One denoising loop: its size, schedule and conditions."""

    name: str
    size: Size
    sigmas: tuple[float, ...]
    sampler: str = "euler"
    noise_scale: float = 1.0
    guidance: Mapping[str, Guidance] = field(default_factory=dict)  # by stream
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    step_cache: float = 0.0
    loras: tuple[LoraFile, ...] = ()
    upsampler: Optional[str] = None  # brings the previous latents to this size
    conditions: Mapping[str, tuple[Condition, ...]] = field(default_factory=dict)
    final: tuple[str, ...] = ("video", "audio")  # streams that the result takes from it
    part: Whole = WHOLE  # of the previous latents

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that it denoises."""
        return tuple(self.conditions)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def skips_steps(self) -> bool:
        """Whether a step may reuse the last prediction by guidance's skip_step."""
        return any(g.skip_step for g in self.guidance.values())

    @property
    def upsampled(self) -> tuple[str, ...]:
        """What its upsampler enlarges: keyframes only if they are generated again."""
        slots = any(isinstance(c, NewKeyframes) for c in self.conditions["video"])
        return ("video", "keyframes") if slots else ("video",)

    def appended_tokens(self, stream: str) -> int:
        """How many tokens the conditions append to a stream."""
        return sum(c.tokens(self.size) for c in self.conditions.get(stream, ()))

    def state(
        self, stream: str, initial: Optional[mx.array], channels: int
    ) -> LatentState:
        """A stream's state before its conditions, from latents or zeros."""
        bounds = self.size.bounds(stream)
        state = LatentState.initial(bounds, channels)
        return state if initial is None else StartFrom(initial)(state)
