"""The diffusion decoder of the video VAE of LTX-2.5: latents to pixels in one step.

Four stages of neighborhood attention upsample the latents to contexts of the pixels'
size, with which a fifth one denoises the pixels. A layer turns an iterator of single
frames (1, 1, H, W, C) into another one and keeps only the frames that its attention
windows span. The result is the same as if all frames were computed at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, tee
from typing import Callable, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .base import Config, Trace, traced
from .layers import (
    Component,
    Statistics,
    depth_to_space,
    patchify,
    timestep_embedding,
    unpatchify,
)

Frames = Iterator[mx.array]
Size = tuple[int, int, int]  # frames, rows, columns
ScaleShift = tuple[mx.array, mx.array]
UNUSED_KEYS = ("type_emb", "coarse_")  # prefixes


@dataclass
class DiffusionDecoderConfig(Config):
    """The decoder's section of a diffusion VAE's configuration."""

    in_channels: int
    stage_channels: list[int]
    stage_depths: list[int]
    stage_kernels: list[list[int]]
    upsamples: list[tuple[list[int], int]]  # of (stride, channel reduction)
    stage5_kernel: list[int]
    head_dim: int = 64
    patch_size: int = 4
    t_emb_dim: int = 384
    timestep_scale_multiplier: float = 1000.0

    FIXED = {
        "_class_name": ("NADiffusionDecoder",),
        "out_channels": (3,),
        "default_num_inference_steps": (1,),
        "model_output_type": ("x0",),
        "rope_dim_split": (None,),
        "stage5_channels": (None,),
    }


# Neighborhoods


def tile(kernel: int) -> int:
    """The number of queries along an axis that share the keys in all their windows."""
    return max(4, (kernel + 1) // 2)


class Tiles:
    """An axis cut into tiles of one size, of which the last may overlap the one before:
    positions of each tile's queries and keys, and which keys a query sees. A window is
    centered on its query, but shifted at the borders."""

    def __init__(self, length: int, kernel: int):
        kernel, size = min(kernel, length), min(tile(kernel), length)
        span = min(size + kernel - 1, length)
        starts = np.minimum(np.arange(0, length, size), length - size)
        self.queries = starts[:, None] + np.arange(size)
        first_keys = np.clip(starts - kernel // 2, 0, length - span)
        self.keys = first_keys[:, None] + np.arange(span)
        windows = np.clip(self.queries - kernel // 2, 0, length - kernel)[..., None]
        seen = self.keys[:, None] - windows
        self.visible = mx.array((seen >= 0) & (seen < kernel))
        # The index of each position of the axis among the queries of all tiles.
        positions, tiles = np.arange(length), np.arange(length) // size
        self.order = mx.array(positions + tiles * size - starts[tiles])


def rope_cos_sin(size: Size, dim: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines (F, H, W, 1, dim / 2) of the three axes' angles, float32: about
    a quarter of the pairs is for time, the rest for rows and columns."""
    time = dim // 4 // 2 * 2
    time -= (dim - time) // 2 % 2 * 2
    angles = []
    for axis, part in enumerate((time, (dim - time) // 2, (dim - time) // 2)):
        frequencies = 10000.0 ** -(np.arange(0, part, 2) / part)
        positions = np.arange(size[axis], dtype=np.float32)
        shape = [1, 1, 1, 1, part // 2]
        shape[axis] = -1
        table = mx.array(positions[:, None] * frequencies.astype(np.float32))
        angles.append(mx.broadcast_to(table.reshape(shape), (*size, 1, part // 2)))
    x = mx.concatenate(angles, axis=-1)
    return mx.cos(x), mx.sin(x)


@mx.compile
def apply_rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate adjacent pairs of channels, in float32."""
    pairs = mx.unflatten(x.astype(mx.float32), -1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    rotated = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.flatten(-2).astype(x.dtype)


class NeighborhoodAttention(nn.Module):
    """Each position attends to a window of `kernel` positions around it."""

    def __init__(self, dim: int, head_dim: int, kernel: Size):
        super().__init__()
        self.kernel, self.head_dim = kernel, head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(head_dim, 1e-6)
        self.k_norm = nn.RMSNorm(head_dim, 1e-6)
        self.proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array, queries: mx.array, visible: mx.array) -> mx.array:
        """Frames (1, R, H, W, C) to those at the indices `queries` (Q,); `visible` (Q, R)
        says which frames each of them attends to."""
        _, length, height, width, _ = x.shape
        down, across = Tiles(height, self.kernel[1]), Tiles(width, self.kernel[2])
        qkv = mx.unflatten(self.qkv(x[0]), -1, (3, -1, self.head_dim))
        tables = rope_cos_sin((length, height, width), self.head_dim)
        q = apply_rope(self.q_norm(qkv[..., 0, :, :]), *tables)[queries]
        k = apply_rope(self.k_norm(qkv[..., 1, :, :]), *tables)
        v = qkv[..., 2, :, :]

        def cut(x: mx.array, rows: np.ndarray, columns: np.ndarray) -> mx.array:
            x = x[:, rows[0] : rows[-1] + 1][:, :, mx.array(columns)]
            # (frames, rows, tiles, columns, heads, C)
            # to (tiles, heads, frames rows columns, C)
            return x.transpose(2, 4, 0, 1, 3, 5).flatten(2, 4)

        out = []
        for rows, key_rows, visible_rows in zip(down.queries, down.keys, down.visible):
            # (tiles, query frames, rows, columns, key frames, rows, columns)
            mask = visible[None, :, None, None, :, None, None]
            mask = mask & visible_rows[None, None, :, None, None, :, None]
            mask = mask & across.visible[:, None, None, :, None, None, :]
            mask = mask.flatten(4).flatten(1, 3)[:, None]  # (tiles, 1, queries, keys)
            y = mx.fast.scaled_dot_product_attention(
                cut(q, rows, across.queries),
                *(cut(x, key_rows, across.keys) for x in (k, v)),
                scale=1 / math.sqrt(self.head_dim),
                mask=mask,
            )
            y = mx.unflatten(y, 2, (len(queries), len(rows), -1))
            # (tiles, heads, Q, rows, columns, C) to (Q, rows, tiles columns, heads C)
            y = y.transpose(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)
            out.append(y[:, :, across.order])
            mx.eval(out[-1])  # else the keys of all tiles are held
        return self.proj(mx.concatenate(out, axis=1)[:, down.order])[None]


# Layers


class SwiGLU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.w_gate = nn.Linear(dim, 4 * dim, bias=False)
        self.w_up = nn.Linear(dim, 4 * dim, bias=False)
        self.w_down = nn.Linear(4 * dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w_down(nn.silu(self.w_gate(x)) * self.w_up(x))


def modulate(x: mx.array, scale_shift: Optional[ScaleShift]) -> mx.array:
    return x if scale_shift is None else x * (1 + scale_shift[0]) + scale_shift[1]


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, dim: int, head_dim: int, kernel: Size):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, 1e-6)
        self.attn = NeighborhoodAttention(dim, head_dim, kernel)
        self.norm2 = nn.RMSNorm(dim, 1e-6)
        self.mlp = SwiGLU(dim)

    def __call__(
        self,
        frames: Frames,
        length: int,
        before_attn: Optional[ScaleShift] = None,
        before_mlp: Optional[ScaleShift] = None,
    ) -> Frames:
        """`length` frames to as many."""
        time = Tiles(length, self.attn.kernel[0])
        window, start, done = [], 0, 0  # frames from `start` on; `done` were yielded
        for queries, keys, visible in zip(time.queries, time.keys, time.visible):
            window, start = window[keys[0] - start :], keys[0]
            window += islice(frames, len(keys) - len(window))
            new = np.flatnonzero(queries >= done)
            indices, done = queries[new] - start, queries[-1] + 1
            y = modulate(self.norm1(mx.concatenate(window, axis=1)), before_attn)
            y = self.attn(y, mx.array(indices), visible[mx.array(new)])
            for i, attended in zip(indices, mx.split(y, len(indices), axis=1)):
                x = window[i] + attended
                x = x + self.mlp(modulate(self.norm2(x), before_mlp))
                mx.eval(x)
                yield x


class DiffusionBlock(Block):
    """A block conditioned on the context of each frame and on the noise level."""

    def __init__(self, dim: int, head_dim: int, kernel: Size):
        super().__init__(dim, head_dim, kernel)
        self.context_proj = nn.Linear(dim, dim)
        self.scale_shift_table = mx.zeros((7, dim))

    def __call__(
        self, frames: Frames, length: int, contexts: Frames, time: mx.array
    ) -> Frames:
        frames = map(lambda x, c: x + self.context_proj(c), frames, contexts)
        rows = (self.scale_shift_table + time).astype(self.scale_shift_table.dtype)
        # The other rows are gates, which released weights have folded in.
        return super().__call__(frames, length, (rows[0], rows[1]), (rows[3], rows[4]))


class Upsample(nn.Module):
    """Channels to time and space."""

    def __init__(self, dim: int, stride: Size, channel_reduction: int):
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(dim, dim * math.prod(stride) // channel_reduction)

    def __call__(self, frames: Frames) -> Frames:
        frames = (depth_to_space(self.proj(x), self.stride) for x in frames)
        frames = chain.from_iterable(mx.split(x, x.shape[1], axis=1) for x in frames)
        # Doubled in time, a clip of 8k + 1 frames has one too many, the first.
        return islice(frames, self.stride[0] - 1, None)


class DiffusionDecoder(Component):
    """Normalized latents (1, F, h, w, C) to pixels (1, 8F - 7, 32h, 32w, 3)."""

    config_class = DiffusionDecoderConfig

    def __init__(self, config: DiffusionDecoderConfig):
        super().__init__()
        self.config = c = config
        *widths, last = c.stage_channels
        patch = 3 * c.patch_size**2
        self.conv_in = nn.Linear(c.in_channels, widths[0])
        self.det_stages = [
            [Block(dim, c.head_dim, tuple(kernel)) for _ in range(depth)]
            for dim, depth, kernel in zip(widths, c.stage_depths, c.stage_kernels)
        ]
        self.upsamples = [
            Upsample(dim, tuple(stride), reduction)
            for dim, (stride, reduction) in zip(widths, c.upsamples)
        ]
        self.conv_in_x_t = nn.Linear(patch, last)
        mlp = [nn.Linear(256, c.t_emb_dim), nn.SiLU()]
        self.t_embedder = {"mlp": [*mlp, nn.Linear(c.t_emb_dim, c.t_emb_dim)]}
        self.shared_adaln = {"proj": nn.Linear(c.t_emb_dim, 7 * last)}
        self.diff_blocks = [
            DiffusionBlock(last, c.head_dim, tuple(c.stage5_kernel))
            for _ in range(c.stage_depths[-1])
        ]
        self.norm_out = nn.RMSNorm(last, 1e-6)
        self.conv_out = nn.Linear(last, patch)
        self.per_channel_statistics = Statistics(c.in_channels)

    def decode_stream(
        self,
        latents: mx.array,
        noise: Callable[[int, tuple[int, ...]], mx.array],
        bias: float = 0.0,
        trace: Optional[Trace] = None,
    ) -> Frames:
        """Frames (1, 1, 32h, 32w, 3), float32 in [0, 1]. `noise(i, shape)` is called for
        a few frames more, and for larger ones if the latents are smaller than the first
        attention windows."""
        latents = self.per_channel_statistics.denormalize(latents)
        size, windows = latents.shape[1:4], self.config.stage_kernels[0]
        pad_t, pad_h, pad_w = (max(k - n, 0) for k, n in zip(windows, size))
        # The last latent is repeated so that the last frames' windows are centered.
        pad_frames = windows[0] // 2 * 2
        sides = ((pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2))
        pad = ((0, 0), (0, pad_t + pad_frames), *sides, (0, 0))
        latents = mx.pad(latents, pad, mode="edge").astype(self.conv_in.weight.dtype)
        contexts, length = self.contexts(latents, trace)
        length = max(length - 8 * pad_frames, self.config.stage5_kernel[0])
        pixels = self.denoise(islice(contexts, length), length, noise, trace)
        frames, height, width = size
        top, left = 32 * (pad_h // 2), 32 * (pad_w // 2)
        for x in islice(pixels, 8 * frames - 7):
            x = x[:, :, top : top + 32 * height, left : left + 32 * width]
            x = mx.contiguous(mx.clip((x.astype(mx.float32) + 1) / 2 + bias, 0, 1))
            mx.eval(x)
            yield x

    def contexts(self, latents: mx.array, trace) -> tuple[Frames, int]:
        """The pixels' contexts, one frame at a time, and their number."""
        length = latents.shape[1]
        frames: Frames = iter(mx.split(self.conv_in(latents), length, axis=1))
        for i, (blocks, up) in enumerate(zip(self.det_stages, self.upsamples)):
            for block in blocks:
                frames = block(frames, length)
            frames = up(frames)
            length = length * up.stride[0] - up.stride[0] + 1
            frames = map(partial(traced, trace, f"stage{i + 1}"), frames)
        return frames, length

    def denoise(self, contexts: Frames, length: int, noise, trace) -> Frames:
        """Frames of pixels from noise, in one step from noise level 1."""
        size = self.config.patch_size
        time = timestep_embedding(mx.array([self.config.timestep_scale_multiplier]))
        for layer in self.t_embedder["mlp"]:
            time = layer(time.astype(self.conv_out.weight.dtype))
        time = self.shared_adaln["proj"](nn.silu(time)).reshape(7, -1)
        first, *contexts = tee(contexts, 1 + len(self.diff_blocks))

        def embed(i: int, context: mx.array) -> mx.array:
            _, _, height, width, _ = context.shape
            x = noise(i, (1, 1, height * size, width * size, 3))
            return self.conv_in_x_t(patchify(x.astype(context.dtype), size))

        frames: Frames = (embed(i, context) for i, context in enumerate(first))
        for block, context in zip(self.diff_blocks, contexts):
            frames = block(frames, length, context, time)
        for x in frames:
            x = self.conv_out(self.norm_out(traced(trace, "stage5", x)))
            yield unpatchify(x, size)

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Official names to the module's; released files nest the fused projection."""
        return {
            key.replace("attn.qkv.qkv.", "attn.qkv."): w
            for key, w in weights.items()
            if not key.startswith(UNUSED_KEYS)
        }
