"""Latent shapes, token positions, the latent state and the conditionings on it.

Everything a user can ask for is a list of conditionings: each replaces tokens of the
state, appends tokens that only guide, or says which tokens are to be generated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Callable, Iterable, Optional

import mlx.core as mx
import numpy as np

TIME_SCALE, SPACE_SCALE = 8, 32  # pixel frames and pixels a latent
AUDIO_TOKENS_PER_SECOND = 25
MEL_HOP, MEL_RATE = 160, 16000  # samples a mel frame, a second
MEL_FRAMES_PER_TOKEN = 4


def latent_frames(num_frames: int) -> int:
    """Latent frames of 8k+1 pixel frames: the first stands alone."""
    return (num_frames - 1) // TIME_SCALE + 1


def audio_tokens(num_frames: int, fps: float) -> int:
    """Audio tokens as long as the video: rounded half to even, as in training."""
    return round(num_frames / fps * AUDIO_TOKENS_PER_SECOND)


def video_bounds(
    frames: int, height: int, width: int, fps: float, causal: bool = True
) -> np.ndarray:
    """[start, end) of each token in seconds, rows and columns of pixels: (3, T, 2).

    With `causal`, the first latent frame is one pixel frame long, as the encoder makes
    it.
    """
    edges = np.arange(frames + 1, dtype=np.float32) * TIME_SCALE
    if causal:
        edges = np.maximum(edges - (TIME_SCALE - 1), 0)
    sides = (edges / np.float32(fps), np.arange(height + 1), np.arange(width + 1))
    grids = [
        np.stack(np.meshgrid(*(s[k : len(s) - 1 + k] for s in sides), indexing="ij"))
        for k in (0, 1)
    ]
    bounds = np.stack(grids, axis=-1).reshape(3, -1, 2).astype(np.float32)
    bounds[1:] *= SPACE_SCALE
    return bounds


def audio_bounds(tokens: int) -> np.ndarray:
    """[start, end) of each audio token in seconds: (1, T, 2); the first is 10 ms."""
    edges = np.arange(tokens + 1, dtype=np.float32) * MEL_FRAMES_PER_TOKEN
    edges = np.maximum(edges - (MEL_FRAMES_PER_TOKEN - 1), 0)
    seconds = edges * MEL_HOP / MEL_RATE
    return np.stack([seconds[:-1], seconds[1:]], axis=-1)[None]


def video_tokens(latents: mx.array) -> mx.array:
    """(B, F, H, W, C) to (B, T, C): frame, row, column."""
    return latents.flatten(1, 3)


def audio_to_tokens(latents: mx.array) -> mx.array:
    """(B, T, mel, C) to (B, T, C * mel): the checkpoint counts channels before mel."""
    return latents.swapaxes(2, 3).flatten(2)


def audio_from_tokens(tokens: mx.array, channels: int) -> mx.array:
    """(B, T, C * mel) to (B, T, mel, C)."""
    return tokens.reshape(*tokens.shape[:2], channels, -1).swapaxes(2, 3)


@dataclass(frozen=True)
class LatentState:
    """One stream on its way: tokens, what they are pulled to, and how strongly.

    `mask` is 1 where a token is generated and 0 where it stays `clean`. Only the first
    `size` tokens are the picture or the sound; the others guide and are dropped.
    """

    latent: mx.array  # (1, T, C) float32
    clean: mx.array  # (1, T, C) float32
    mask: np.ndarray  # (T,) float32
    bounds: np.ndarray  # (axes, T, 2) float32
    size: int
    keyframes: np.ndarray  # (T,) 1: the token stands for a single pixel frame
    attention: Optional[np.ndarray] = None  # (T, T) in [0, 1]; None: all is visible

    @classmethod
    def start(
        cls, bounds: np.ndarray, channels: int, initial: Optional[mx.array] = None
    ) -> LatentState:
        """A state where all is to be generated, from zeros or an initial latent."""
        tokens = bounds.shape[1]
        if initial is None:
            initial = mx.zeros((1, tokens, channels))
        initial = initial.astype(mx.float32)
        first_frame = bounds[0, :, 0] == 0
        ones = np.ones(tokens, np.float32)
        keyframes = first_frame.astype(np.float32)
        return cls(initial, initial, ones, bounds, tokens, keyframes)

    @property
    def frozen(self) -> bool:
        return not self.mask.any()

    @cached_property
    def levels(self) -> tuple[np.ndarray, Optional[mx.array]]:
        """The distinct mask values, and each token's index into them if several."""
        levels, index = np.unique(self.mask, return_inverse=True)
        return levels, None if len(levels) == 1 else mx.array(index)

    @cached_property
    def mask_tokens(self) -> mx.array:
        return mx.array(self.mask)[None, :, None]

    def blend(self, x: mx.array) -> mx.array:
        """Pull `x` to the clean tokens where the mask says so; 0 and 1 are exact."""
        if (self.mask == 1).all():
            return x
        m = self.mask_tokens
        return x * m + self.clean * (1 - m)

    def noised(self, noise: mx.array, scale: float = 1.0) -> mx.array:
        """The tokens to start from: mixed with noise (1, T, C), then blended."""
        return self.blend(self.latent * (1 - scale) + noise * scale)

    def replace_tokens(self, at: int, tokens: mx.array, strength: float) -> LatentState:
        """Hold `tokens` (1, n, C) at position `at` with the given strength."""
        stop = at + tokens.shape[1]
        clean = mx.array(self.clean)
        clean[:, at:stop] = tokens
        mask = self.mask.copy()
        mask[at:stop] = 1 - strength
        return replace(self, clean=clean, mask=mask)

    def append(
        self,
        tokens: mx.array,
        bounds: np.ndarray,
        strength: float = 1.0,
        attention: Optional[np.ndarray] = None,
        keyframes: bool = False,
        initial: Optional[mx.array] = None,
    ) -> LatentState:
        """Add tokens (1, n, C) that guide from their own positions, or that are generated
        themselves, from zeros or initial ones.

        `attention` (n,) in [0, 1] is how much the picture and they see of each other;
        appended groups never see each other once any of them is weighted.
        """
        n, old = tokens.shape[1], len(self.mask)
        grown = self.attention
        if grown is not None or attention is not None:
            weights = np.ones(n, np.float32) if attention is None else attention
            grown = np.zeros((old + n, old + n), np.float32)
            grown[:old, :old] = 1 if self.attention is None else self.attention
            grown[old:, old:] = 1
            grown[: self.size, old:] = weights
            grown[old:, : self.size] = weights[:, None]
        both = lambda a, b: mx.concatenate([a, b.astype(mx.float32)], axis=1)
        return replace(
            self,
            latent=both(
                self.latent, mx.zeros(tokens.shape) if initial is None else initial
            ),
            clean=both(self.clean, tokens),
            mask=np.append(self.mask, np.full(n, 1 - strength, np.float32)),
            bounds=np.concatenate([self.bounds, bounds], axis=1),
            keyframes=np.append(self.keyframes, np.full(n, keyframes, np.float32)),
            attention=grown,
        )


# Something the user asks for, as a change of one stream's state.
Conditioning = Callable[[LatentState], LatentState]


def condition(state: LatentState, items: Iterable[Conditioning]) -> LatentState:
    """Apply conditionings in order."""
    for item in items:
        state = item(state)
    return state


@dataclass(frozen=True)
class Replace:
    """Latents held in place from latent frame or audio token `at` on: video
    (1, f, H, W, C) or audio (1, t, mel, C)."""

    latents: mx.array
    at: int = 0
    strength: float = 1.0

    def __call__(self, state: LatentState) -> LatentState:
        if self.latents.ndim == 4:
            tokens, tokens_each = audio_to_tokens(self.latents), 1
        else:
            _, _, height, width, _ = self.latents.shape
            tokens, tokens_each = video_tokens(self.latents), height * width
        return state.replace_tokens(self.at * tokens_each, tokens, self.strength)


@dataclass(frozen=True)
class Keyframe:
    """An image or short clip (1, f, H, W, C) that guides from pixel frame `frame`."""

    latents: mx.array
    frame: int
    fps: float
    strength: float = 1.0

    def __call__(self, state: LatentState) -> LatentState:
        _, frames, height, width, _ = self.latents.shape
        bounds = video_bounds(frames, height, width, 1.0, causal=self.frame == 0)
        if frames == 1:  # a still lasts one pixel frame
            bounds[0] = (0, 1)
        bounds[0] = (bounds[0] + self.frame) / np.float32(self.fps)
        return state.append(video_tokens(self.latents), bounds, self.strength)


def evenly_spaced(count: int, num_frames: int) -> tuple[int, ...]:
    """Frames that cut a video into `count` + 1 equal parts."""
    places = np.rint(np.linspace(0, num_frames - 1, count + 2))
    return tuple(map(int, places[1:-1]))


@dataclass(frozen=True)
class KeyframeSlots:
    """Single frames, generated beside the video of latents (F, H, W), that keep it sharp
    at these places, from zeros or initial latents (1, K, H, W, C): from 2.5 on."""

    frames: tuple[int, ...]
    latent_size: tuple[int, int, int]
    fps: float
    initial: Optional[mx.array] = None

    def __call__(self, state: LatentState) -> LatentState:
        grid = video_bounds(1, *self.latent_size[1:], 1.0)
        bounds = np.concatenate([grid] * len(self.frames), axis=1)
        starts = np.repeat(np.float32(self.frames), grid.shape[1])
        bounds[0] = np.stack([starts, starts + 1], axis=-1) / np.float32(self.fps)
        empty = mx.zeros((1, bounds.shape[1], state.latent.shape[-1]))
        initial = None if self.initial is None else video_tokens(self.initial)
        return state.append(empty, bounds, 0.0, keyframes=True, initial=initial)


@dataclass(frozen=True)
class Reference:
    """A reference clip (1, f, H, W, C) for an IC-LoRA, over the whole target.

    A smaller or slower reference is laid over the target by its factors. `visibility`
    in [0, 1] (scalar or by token) weighs the attention between it and the target.
    """

    latents: mx.array
    fps: float
    strength: float = 1.0
    downscale_factor: int = 1
    temporal_scale_factor: int = 1
    visibility: float | np.ndarray = 1.0

    def __call__(self, state: LatentState) -> LatentState:
        _, frames, height, width, _ = self.latents.shape
        bounds = video_bounds(frames, height, width, self.fps)
        bounds[1:] *= self.downscale_factor
        slow = self.temporal_scale_factor
        if slow != 1:
            late = np.float32((slow - 1) / self.fps)
            bounds[0] = np.maximum(bounds[0] * np.float32(slow) - late, 0)
        tokens = video_tokens(self.latents)
        visible = np.broadcast_to(
            np.asarray(self.visibility, np.float32), tokens.shape[1]
        )
        attention = None if (visible == 1).all() else visible
        return state.append(tokens, bounds, self.strength, attention)


@dataclass(frozen=True)
class Regenerate:
    """Generate what touches (start, end) seconds, keep all else: a retake."""

    start: float
    end: float

    def __call__(self, state: LatentState) -> LatentState:
        begin, stop = state.bounds[0, :, 0], state.bounds[0, :, 1]
        inside = (stop > self.start) & (begin < self.end)
        return replace(state, mask=inside.astype(np.float32))


@dataclass(frozen=True)
class Freeze:
    """Keep the whole stream as it is given."""

    def __call__(self, state: LatentState) -> LatentState:
        return replace(state, mask=np.zeros_like(state.mask))
