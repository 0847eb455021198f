"""Latent shapes, token positions, the latent state and the conditionings on it.

A conditioning is a method of the state: it replaces tokens, appends tokens that only
guide, or chooses which tokens are generated. Each feature is a chain of conditionings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Callable, Optional, Sequence

import mlx.core as mx
import numpy as np

Streams = dict[str, mx.array]  # by "video", "audio": latents, or tokens (1, T, C)

TIME_SCALE, SPACE_SCALE = 8, 32  # pixel frames and pixels per latent
AUDIO_TOKENS_PER_SECOND = 25
SAMPLE_RATE, HOP_LENGTH, MEL_BINS = 16000, 160, 64  # of mel spectrograms
MEL_FRAMES_PER_TOKEN = 4


@dataclass(frozen=True)
class Size:
    """Size of a clip: pixels, frames and frames per second, and its audio tokens."""

    width: int
    height: int
    num_frames: int
    fps: float
    audio_tokens: int = 0
    conditioned_fps: Optional[float] = None  # of the positions; None: fps
    shown: Optional[tuple[int, int]] = None  # height, width; the rest is padding

    @property
    def latent(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return (latent_frames(self.num_frames), *self.latent_sides)

    @property
    def rate(self) -> float:
        """The frame rate of the tokens' positions."""
        return self.conditioned_fps or self.fps

    @property
    def latent_sides(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return self.height // SPACE_SCALE, self.width // SPACE_SCALE

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        return math.prod(self.latent_sides)

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return math.prod(self.latent)

    def bounds(self, stream: str) -> np.ndarray:
        """[start, end) of each token of a stream: (axes, T, 2)."""
        if stream == "audio":
            return audio_bounds(self.audio_tokens)
        return video_bounds(*self.latent, self.rate)

    def divided(self, by: Fraction | int) -> Size:
        """The size with smaller sides."""
        sides = round(self.width / by), round(self.height / by)
        shown = self.shown and tuple(round(side / by) for side in self.shown)
        return replace(self, width=sides[0], height=sides[1], shown=shown)

    def doubled(self) -> Size:
        """The size at twice the frame rate; the first frame is not doubled."""
        rate = self.conditioned_fps and 2 * self.conditioned_fps
        frames = 2 * self.num_frames - 1
        return replace(self, num_frames=frames, fps=2 * self.fps, conditioned_fps=rate)


def latent_frames(num_frames: int) -> int:
    """Latent frames of 8k+1 pixel frames: the first one covers a single frame."""
    return (num_frames - 1) // TIME_SCALE + 1


def audio_tokens(num_frames: int, fps: float) -> int:
    """Audio tokens for the video's duration, rounded half to even as in training."""
    return round(num_frames / fps * AUDIO_TOKENS_PER_SECOND)


def video_bounds(
    frames: int, height: int, width: int, fps: float, causal: bool = True
) -> np.ndarray:
    """[start, end) of each token in seconds, rows and columns of pixels: (3, T, 2); with
    `causal`, the first latent frame covers one pixel frame, like the encoder's."""
    time, row, column = np.indices((frames, height, width)).reshape(3, -1)
    edges = np.arange(frames + 1, dtype=np.float32) * TIME_SCALE
    if causal:
        edges = np.maximum(edges - (TIME_SCALE - 1), 0)
    edges = edges / np.float32(fps)
    starts = edges[time], row * SPACE_SCALE, column * SPACE_SCALE
    ends = edges[time + 1], (row + 1) * SPACE_SCALE, (column + 1) * SPACE_SCALE
    return np.stack([starts, ends], axis=-1).astype(np.float32)


def audio_bounds(tokens: int) -> np.ndarray:
    """[start, end) of each audio token in seconds: (1, T, 2); the first is 10 ms."""
    edges = np.arange(tokens + 1, dtype=np.float32) * MEL_FRAMES_PER_TOKEN
    edges = np.maximum(edges - (MEL_FRAMES_PER_TOKEN - 1), 0)
    seconds = edges * HOP_LENGTH / SAMPLE_RATE
    return np.stack([seconds[:-1], seconds[1:]], axis=-1)[None]


def to_tokens(latents: mx.array) -> mx.array:
    """Latents of video (B, F, H, W, C) as tokens (B, F * H * W, C), or of audio
    (B, T, mel, C) as (B, T, C * mel)."""
    if latents.ndim == 5:
        return latents.flatten(1, 3)
    return latents.swapaxes(2, 3).flatten(2)


def audio_from_tokens(tokens: mx.array, channels: int) -> mx.array:
    """(B, T, C * mel) to (B, T, mel, C)."""
    return tokens.reshape(*tokens.shape[:2], channels, -1).swapaxes(2, 3)


@dataclass(frozen=True)
class LatentState:
    """The tokens of one stream, the clean values they are held to, and how strongly.

    `denoise_mask` is 1 where a token is generated and 0 where it stays `clean_latent`.
    Only the first `num_target_tokens` tokens are output; the rest guide and are dropped.
    """

    latent: mx.array  # (1, T, C) float32
    clean_latent: mx.array  # (1, T, C) float32
    denoise_mask: np.ndarray  # (T,) float32
    bounds: np.ndarray  # (axes, T, 2) float32
    num_target_tokens: int
    keyframes: np.ndarray  # (T,) 1 where a token covers a single pixel frame
    attention: Optional[np.ndarray] = None  # (T, T) in [0, 1]; None: all visible
    starts_as_noise: bool = False  # even where the mask holds the clean tokens

    @classmethod
    def initial(cls, bounds: np.ndarray, channels: int, initial=None) -> LatentState:
        """A state in which every token is generated, from zeros or initial tokens."""
        tokens = bounds.shape[1]
        if initial is None:
            initial = mx.zeros((1, tokens, channels))
        initial = initial.astype(mx.float32)
        ones = np.ones(tokens, np.float32)
        keyframes = (bounds[0, :, 0] == 0).astype(np.float32)  # the first frame
        return cls(initial, initial, ones, bounds, tokens, keyframes)

    frozen = property(lambda self: not self.denoise_mask.any())

    @cached_property
    def levels(self) -> tuple[np.ndarray, Optional[mx.array]]:
        """The distinct mask values, and each token's index into them if several."""
        levels, index = np.unique(self.denoise_mask, return_inverse=True)
        return levels, None if len(levels) == 1 else mx.array(index)

    @cached_property
    def denoise_mask_tokens(self) -> mx.array:
        return mx.array(self.denoise_mask)[None, :, None]

    def blend(self, x: mx.array) -> mx.array:
        """Mix `x` with the clean tokens by the denoise mask; 0 and 1 are exact."""
        if (self.denoise_mask == 1).all():
            return x
        m = self.denoise_mask_tokens
        return x * m + self.clean_latent * (1 - m)

    def noised(self, noise: mx.array, scale: float = 1.0) -> mx.array:
        """The initial tokens: mixed with noise (1, T, C), then blended."""
        if self.starts_as_noise:
            return noise
        return self.blend(self.latent * (1 - scale) + noise * scale)

    def start_from(self, latents: mx.array) -> LatentState:
        """Start from latents (video or audio, of the target's size) instead of zeros."""
        tokens = to_tokens(latents).astype(mx.float32)
        return replace(self, latent=tokens, clean_latent=tokens)

    def hold(self, latents: mx.array, at: int = 0, strength=1.0) -> LatentState:
        """Hold latents in place, from latent frame or audio token `at` on."""
        tokens = to_tokens(latents)
        start = at * (tokens.shape[1] // latents.shape[1])
        stop = start + tokens.shape[1]
        clean, mask = mx.array(self.clean_latent), self.denoise_mask.copy()
        clean[:, start:stop], mask[start:stop] = tokens, 1 - strength
        return replace(self, clean_latent=clean, denoise_mask=mask)

    def regenerate(self, start: float, end: float) -> LatentState:
        """Generate the tokens that overlap these seconds, keep the rest: a retake."""
        begin, stop = self.bounds[0, :, 0], self.bounds[0, :, 1]
        inside = (stop > start) & (begin < end)
        return replace(self, denoise_mask=inside.astype(np.float32))

    def freeze(self, from_noise: bool = False) -> LatentState:
        """Keep the stream; `from_noise`: start from noise, as the reference's retake does."""
        mask = np.zeros_like(self.denoise_mask)
        return replace(self, denoise_mask=mask, starts_as_noise=from_noise)

    def append(
        self,
        tokens: mx.array,
        bounds: np.ndarray,
        strength: float = 1.0,
        attention: Optional[np.ndarray] = None,
        keyframes: bool = False,
        initial: Optional[mx.array] = None,
    ) -> LatentState:
        """Append tokens (1, n, C) at their own positions: they guide (strength 1) or
        are generated (strength 0), from zeros or `initial`. `attention` (n,) weighs
        attention to target tokens; if used, groups do not attend to each other."""
        n, old = tokens.shape[1], len(self.denoise_mask)
        grown = self.attention
        if grown is not None or attention is not None:
            weights = np.ones(n, np.float32) if attention is None else attention
            grown = np.zeros((old + n, old + n), np.float32)
            grown[:old, :old] = 1 if self.attention is None else self.attention
            grown[old:, old:] = 1
            grown[: self.num_target_tokens, old:] = weights
            grown[old:, : self.num_target_tokens] = weights[:, None]
        initial = mx.zeros(tokens.shape) if initial is None else initial
        both = lambda a, b: mx.concatenate([a, b.astype(mx.float32)], axis=1)
        mask = np.full(n, 1 - strength, np.float32)
        return replace(
            self,
            latent=both(self.latent, initial),
            clean_latent=both(self.clean_latent, tokens),
            denoise_mask=np.append(self.denoise_mask, mask),
            bounds=np.concatenate([self.bounds, bounds], axis=1),
            keyframes=np.append(self.keyframes, np.full(n, keyframes, np.float32)),
            attention=grown,
        )

    def guide(
        self, latents: mx.array, frame: int, fps: float, strength: float = 1.0
    ) -> LatentState:
        """Guide with an image or short clip (1, f, H, W, C) placed at pixel frame `frame`."""
        _, frames, height, width, _ = latents.shape
        causal = frame == 0 or frames == 1  # a still lasts one pixel frame
        bounds = video_bounds(frames, height, width, 1.0, causal)
        bounds[0] = (bounds[0] + frame) / np.float32(fps)
        return self.append(to_tokens(latents), bounds, strength)

    def guide_stills(
        self, stills: mx.array, frames: Sequence[int], fps: float, strength: float = 1.0
    ) -> LatentState:
        """Guide with single frames (1, K, H, W, C) at these pixel frames."""
        state = self
        for n, frame in enumerate(frames):
            state = state.guide(stills[:, n : n + 1], frame, fps, strength)
        return state

    def generate_stills(
        self, frames: tuple[int, ...], size: Size, initial: Optional[mx.array] = None
    ) -> LatentState:
        """Also generate single frames, from zeros or latents (1, K, H, W, C)."""
        bounds = video_bounds(len(frames), *size.latent_sides, 1.0)
        starts = np.repeat(np.float32(frames), size.frame_tokens)
        bounds[0] = np.stack([starts, starts + 1], axis=-1) / np.float32(size.rate)
        empty = mx.zeros((1, bounds.shape[1], self.latent.shape[-1]))
        initial = None if initial is None else to_tokens(initial)
        return self.append(empty, bounds, 0.0, keyframes=True, initial=initial)

    def show(
        self,
        latents: mx.array,
        fps: float,
        strength: float = 1.0,
        downscale: int = 1,
        slow: int = 1,
        visibility: float | np.ndarray = 1.0,
        skip: int = 0,
    ) -> LatentState:
        """Show a reference clip (1, f, H, W, C), `downscale` times smaller and `slow`
        times slower, to an IC-LoRA. `visibility` in [0, 1] (scalar or by token) weighs
        attention between the two; `skip` latent frames are left out."""
        _, frames, height, width, _ = latents.shape
        bounds = video_bounds(frames, height, width, fps)
        bounds[1:] *= downscale
        if slow != 1:
            late = np.float32((slow - 1) / fps)
            bounds[0] = np.maximum(bounds[0] * np.float32(slow) - late, 0)
        bounds = bounds[:, skip * height * width :]
        tokens = to_tokens(latents[:, skip:])
        visible = np.broadcast_to(np.asarray(visibility, np.float32), tokens.shape[1])
        attention = None if (visible == 1).all() else visible
        return self.append(tokens, bounds, strength, attention)

    def show_sound(self, latents: mx.array) -> LatentState:
        """Show a sound (1, T, mel, C) to an IC-LoRA; it ends 40 ms before the target starts."""
        bounds = audio_bounds(latents.shape[1])
        bounds = bounds - bounds[0, -1, 1] - np.float32(0.04)
        return self.append(to_tokens(latents), bounds)


Conditioning = Callable[[LatentState], LatentState]
States = dict[str, LatentState]  # by stream


def divided_evenly(total: int, count: int) -> list[int]:
    """The `count` + 1 boundaries of nearly equal parts of a length, longer ones first."""
    length, longer = divmod(total, count)
    return [n * length + min(n, longer) for n in range(count + 1)]
