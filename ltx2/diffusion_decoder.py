"""The diffusion decoder of the video VAE of LTX-2.5: latents to pixels in one step.

Four stages of attention among neighbours bring the latents to pixels' size, a fifth one
denoises the pixels beside what came of them. A layer turns an iterator of single frames
(1, 1, H, W, C) into another one, and as it knows how many there are, it keeps no more of
them than its windows span. The frames are the same as if all were computed at once.
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
from .layers import Component, depth_to_space, patchify, timestep_embedding, unpatchify

Frames = Iterator[mx.array]
Size = tuple[int, int, int]  # frames, rows, columns
Rows = tuple[mx.array, mx.array]  # scale and shift
STATISTICS = ("mean-of-means", "std-of-means")  # of the latents, by channel
UNUSED_KEYS = ("type_emb", "coarse_")  # beginnings


@dataclass
class DiffusionDecoderConfig(Config):
    """The decoder's section of a diffusion VAE's configuration."""

    in_channels: int
    stage_channels: list
    stage_depths: list
    stage_kernels: list
    upsamples: list  # stride and by how much fewer channels
    stage5_kernel: list
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


# Neighbourhoods


def tile(kernel: int) -> int:
    """How many queries along an axis share the keys that all their windows span."""
    return max(4, (kernel + 1) // 2)


class Tiles:
    """An axis cut into tiles of one size, the last one laid over the one before: places
    of their queries, of the keys, and which keys a query sees. A window is centred, but
    shifted at the borders."""

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
        # Where each place of the axis is among all queries.
        places, tiles = np.arange(length), np.arange(length) // size
        self.order = mx.array(places + tiles * size - starts[tiles])


def rope_cos_sin(size: Size, dim: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines (F, H, W, 1, dim / 2) of the three axes' angles, float32: a
    quarter of the pairs is for time, the rest for rows and columns."""
    time = dim // 4 // 2 * 2
    time -= (dim - time) // 2 % 2 * 2
    angles = []
    for axis, part in enumerate((time, (dim - time) // 2, (dim - time) // 2)):
        frequencies = 10000.0 ** -(np.arange(0, part, 2) / part)
        places = np.arange(size[axis], dtype=np.float32)
        shape = [1, 1, 1, 1, part // 2]
        shape[axis] = -1
        table = mx.array(places[:, None] * frequencies.astype(np.float32))
        angles.append(mx.broadcast_to(table.reshape(shape), (*size, 1, part // 2)))
    x = mx.concatenate(angles, axis=-1)
    return mx.cos(x), mx.sin(x)


@mx.compile
def apply_rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate neighbouring pairs of channels, in float32."""
    pairs = mx.unflatten(x.astype(mx.float32), -1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    rotated = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.flatten(-2).astype(x.dtype)


class NeighborhoodAttention(nn.Module):
    """Each place attends to a window of `kernel` places around it."""

    def __init__(self, dim: int, head_dim: int, kernel: Size):
        super().__init__()
        self.kernel, self.head_dim = kernel, head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(head_dim, 1e-6)
        self.k_norm = nn.RMSNorm(head_dim, 1e-6)
        self.proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array, asked: mx.array, visible: mx.array) -> mx.array:
        """From frames (1, R, H, W, C) to those of them that are `asked` for, of which
        each sees what is `visible` (asked, R)."""
        _, length, height, width, _ = x.shape
        down, across = Tiles(height, self.kernel[1]), Tiles(width, self.kernel[2])
        qkv = mx.unflatten(self.qkv(x[0]), -1, (3, -1, self.head_dim))
        tables = rope_cos_sin((length, height, width), self.head_dim)
        q = apply_rope(self.q_norm(qkv[..., 0, :, :]), *tables)[asked]
        k = apply_rope(self.k_norm(qkv[..., 1, :, :]), *tables)
        v = qkv[..., 2, :, :]

        def cut(x: mx.array, rows: np.ndarray, columns: np.ndarray) -> mx.array:
            x = x[:, rows[0] : rows[-1] + 1][:, :, mx.array(columns)]
            # tiles, heads, (frames, rows, columns), channels
            return x.transpose(2, 4, 0, 1, 3, 5).flatten(2, 4)

        out = []
        for queries, keys, seen in zip(down.queries, down.keys, down.visible):
            mask = visible[None, :, None, None, :, None, None]
            mask = mask & seen[None, None, :, None, None, :, None]
            mask = mask & across.visible[:, None, None, :, None, None, :]
            mask = mask.flatten(4).flatten(1, 3)[:, None]
            y = mx.fast.scaled_dot_product_attention(
                cut(q, queries, across.queries),
                *(cut(x, keys, across.keys) for x in (k, v)),
                scale=1 / math.sqrt(self.head_dim),
                mask=mask,
            )
            y = mx.unflatten(y, 2, (len(asked), len(queries), -1))
            y = y.transpose(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)
            out.append(y[:, :, across.order])
            mx.eval(out[-1])  # or the keys of all tiles are held
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


def modulate(x: mx.array, rows: Optional[Rows]) -> mx.array:
    return x if rows is None else x * (1 + rows[0]) + rows[1]


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
        first: Optional[Rows] = None,
        second: Optional[Rows] = None,
    ) -> Frames:
        """`length` frames to as many, modulated before the attention and after it."""
        time = Tiles(length, self.attn.kernel[0])
        held, at, done = [], 0, 0  # what the windows of the next frames span
        for queries, keys, visible in zip(time.queries, time.keys, time.visible):
            held, at = held[keys[0] - at :], keys[0]
            held += islice(frames, len(keys) - len(held))
            fresh = mx.array(np.flatnonzero(queries >= done))
            asked, done = queries[queries >= done] - at, queries[-1] + 1
            y = modulate(self.norm1(mx.concatenate(held, axis=1)), first)
            y = self.attn(y, mx.array(asked), visible[fresh])
            own = [held[i] for i in asked]
            for x, y in zip(own, mx.split(y, len(own), axis=1)):
                x = x + y
                x = x + self.mlp(modulate(self.norm2(x), second))
                mx.eval(x)
                yield x


class DiffusionBlock(Block):
    """A block that also reads the frame it is to become, and is told the time."""

    def __init__(self, dim: int, head_dim: int, kernel: Size):
        super().__init__(dim, head_dim, kernel)
        self.context_proj = nn.Linear(dim, dim)
        self.scale_shift_table = mx.zeros((7, dim))

    def __call__(
        self, frames: Frames, length: int, contexts: Frames, time: mx.array
    ) -> Frames:
        joined = map(lambda x, c: x + self.context_proj(c), frames, contexts)
        rows = (self.scale_shift_table + time).astype(self.scale_shift_table.dtype)
        # The other rows were gates, which are part of the weights now.
        return super().__call__(joined, length, (rows[0], rows[1]), (rows[3], rows[4]))


class Upsample(nn.Module):
    """Channels to time and space."""

    def __init__(self, dim: int, stride: Size, fewer: int):
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(dim, dim * math.prod(stride) // fewer)

    def __call__(self, frames: Frames) -> Frames:
        frames = (depth_to_space(self.proj(x), self.stride) for x in frames)
        frames = chain.from_iterable(mx.split(x, x.shape[1], axis=1) for x in frames)
        # Doubled in time, a clip of 8k + 1 frames has one too many, the first.
        return islice(frames, self.stride[0] - 1, None)


class DiffusionDecoder(Component):
    """Normalised latents (1, F, h, w, C) to pixels (1, 8F - 7, 32h, 32w, 3)."""

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
            Upsample(dim, tuple(stride), fewer)
            for dim, (stride, fewer) in zip(widths, c.upsamples)
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
        plain = mx.zeros(c.in_channels), mx.ones(c.in_channels)
        self.per_channel_statistics = dict(zip(STATISTICS, plain))

    def decode_stream(
        self,
        latents: mx.array,
        noise: Callable[[int, tuple[int, ...]], mx.array],
        trace: Optional[Trace] = None,
    ) -> Frames:
        """Frames (1, 1, 32h, 32w, 3), float32 in [0, 1]. `noise(i, shape)` is asked for
        a few more of them, and larger ones if the latents are fewer than the first
        windows span."""
        mean, std = map(self.per_channel_statistics.get, STATISTICS)
        latents = latents * std + mean
        _, frames, height, width, _ = latents.shape
        short, low, narrow = (
            max(k - n, 0)
            for k, n in zip(self.config.stage_kernels[0], (frames, height, width))
        )
        # The last latent comes twice more, so that the last frames' windows are centred.
        ghosts = self.config.stage_kernels[0][0] // 2 * 2
        around = ((low // 2, low - low // 2), (narrow // 2, narrow - narrow // 2))
        pad = ((0, 0), (0, short + ghosts), *around, (0, 0))
        latents = mx.pad(latents, pad, mode="edge").astype(self.conv_in.weight.dtype)
        contexts, length = self.contexts(latents, trace)
        length = max(length - 8 * ghosts, self.config.stage5_kernel[0])
        pixels = self.denoise(islice(contexts, length), length, noise, trace)
        top, left = 32 * (low // 2), 32 * (narrow // 2)
        for x in islice(pixels, 8 * frames - 7):
            x = x[:, :, top : top + 32 * height, left : left + 32 * width]
            x = mx.contiguous(mx.clip((x.astype(mx.float32) + 1) / 2, 0, 1))
            mx.eval(x)
            yield x

    def contexts(self, latents: mx.array, trace) -> tuple[Frames, int]:
        """What the pixels are made beside, a frame at a time, and how many there are."""
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
        """Frames of noise to frames of pixels, in one step from noise level 1."""
        size = self.config.patch_size
        time = timestep_embedding(mx.array([self.config.timestep_scale_multiplier]))
        for layer in self.t_embedder["mlp"]:
            time = layer(time.astype(self.conv_out.weight.dtype))
        time = self.shared_adaln["proj"](nn.silu(time)).reshape(7, -1)
        first, *contexts = tee(contexts, 1 + len(self.diff_blocks))

        def enter(i: int, context: mx.array) -> mx.array:
            _, _, height, width, _ = context.shape
            x = noise(i, (1, 1, height * size, width * size, 3))
            return self.conv_in_x_t(patchify(x.astype(context.dtype), size))

        frames: Frames = (enter(i, context) for i, context in enumerate(first))
        for block, context in zip(self.diff_blocks, contexts):
            frames = block(frames, length, context, time)
        for x in frames:
            x = self.conv_out(self.norm_out(traced(trace, "stage5", x)))
            yield unpatchify(x, size)

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Official names to this module's; released files nest the fused projection."""
        return {
            key.replace("attn.qkv.qkv.", "attn.qkv."): w
            for key, w in weights.items()
            if not key.startswith(UNUSED_KEYS)
        }
