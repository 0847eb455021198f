"""The diffusion decoder of the video VAE of LTX-2.5: latents to pixels in one step.

Four stages of attention among neighbours bring the latents to pixels' size, a fifth one
denoises the pixels beside what came of them. A layer turns an iterator of single frames
(1, 1, H, W, C) into another one, and as it knows how many there are, it keeps no more of
them than its windows span. The frames are the same as if all were computed at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, islice, tee
from typing import Callable, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .base import Config, Trace, traced
from .layers import depth_to_space, patchify, sinusoid, unpatchify

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


def window_starts(places: np.ndarray, length: int, kernel: int) -> np.ndarray:
    """Where the windows of some places begin: centred, but shifted at the borders."""
    return np.clip(places - kernel // 2, 0, length - kernel)


@dataclass
class Tile:
    """Queries along an axis, the keys their windows span, and which of them they see."""

    queries: np.ndarray
    keys: np.ndarray
    visible: np.ndarray  # (queries, keys)

    @classmethod
    def at(cls, start: int, length: int, kernel: int) -> Tile:
        queries = np.arange(start, min(start + tile(kernel), length))
        starts = window_starts(queries, length, kernel)
        keys = np.arange(starts[0], starts[-1] + kernel)
        after = keys >= starts[:, None]
        return cls(queries, keys, after & (keys < starts[:, None] + kernel))


def tiles(length: int, kernel: int) -> Iterator[Tile]:
    """An axis cut into tiles; no window is longer than the axis."""
    kernel = min(kernel, length)
    for start in range(0, length, tile(kernel)):
        yield Tile.at(start, length, kernel)


def equal_tiles(length: int, kernel: int) -> tuple[Tile, np.ndarray]:
    """The same with tiles of one size, stacked, and each place's index in them."""
    kernel = min(kernel, length)
    size = min(tile(kernel), length)
    span = min(size + kernel - 1, length)
    starts = np.minimum(np.arange(0, length, size), length - size)
    queries = starts[:, None] + np.arange(size)
    keys = np.clip(starts - kernel // 2, 0, length - span)[:, None] + np.arange(span)
    first = window_starts(queries, length, kernel)[..., None]
    visible = (keys[:, None] >= first) & (keys[:, None] < first + kernel)
    place = np.arange(length)
    return (
        Tile(queries, keys, visible),
        place + (place // size) * size - starts[place // size],
    )


def rope_tables(places: tuple[np.ndarray, ...], dim: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines (F, H, W, 1, dim / 2) of the three axes' angles, a quarter of
    the pairs for time and the rest for rows and columns, float32."""
    time = dim // 4 // 2 * 2
    if (dim - time) // 2 % 2:
        time -= 2
    sizes = (time, (dim - time) // 2, (dim - time) // 2)
    grid = tuple(len(p) for p in places)
    cos, sin = [], []
    for axis, (size, place) in enumerate(zip(sizes, places)):
        frequencies = 1 / 10000.0 ** (np.arange(0, size, 2) / size)
        angles = place.astype(np.float32)[:, None] * frequencies.astype(np.float32)
        shape = [1, 1, 1, 1, size // 2]
        shape[axis] = len(place)
        for table, f in ((cos, np.cos), (sin, np.sin)):
            values = mx.array(f(angles)).reshape(shape)
            table.append(mx.broadcast_to(values, (*grid, 1, size // 2)))
    return mx.concatenate(cos, axis=-1), mx.concatenate(sin, axis=-1)


@mx.compile
def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
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

    def __call__(self, x: mx.array, time: Tile) -> mx.array:
        """From the frames `time.keys` (1, R, H, W, C) to the frames `time.queries`."""
        _, _, height, width, dim = x.shape
        rows, columns = np.arange(height), np.arange(width)
        qkv = mx.unflatten(self.qkv(x[0]), -1, (3, -1, self.head_dim))
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        q = q[mx.array(time.queries - time.keys[0])]
        tables = rope_tables((time.queries, rows, columns), self.head_dim)
        q = rotate(self.q_norm(q), *tables)
        tables = rope_tables((time.keys, rows, columns), self.head_dim)
        k = rotate(self.k_norm(k), *tables)
        across, place = equal_tiles(width, self.kernel[2])
        out = []
        for down in tiles(height, self.kernel[1]):
            y = self.attend(q, k, v, time, down, across)
            y = y[:, :, mx.array(place)]
            mx.eval(y)  # or the keys of all tiles are held
            out.append(y)
        return self.proj(mx.concatenate(out, axis=1))[None]

    def attend(self, q, k, v, time: Tile, down: Tile, across: Tile) -> mx.array:
        """A row of tiles, all of them at once: (frames, rows, tiles * columns, C)."""

        def cut(x: mx.array, rows: np.ndarray, columns: np.ndarray) -> mx.array:
            x = x[:, rows[0] : rows[-1] + 1][:, :, mx.array(columns)]
            x = x.transpose(2, 4, 0, 1, 3, 5)  # tiles, heads, frames, rows, columns, d
            return x.flatten(2, 4)

        q = cut(q, down.queries, across.queries)
        k, v = (cut(x, down.keys, across.keys) for x in (k, v))
        seen = mx.array(time.visible)[None, :, None, None, :, None, None]
        seen = seen & mx.array(down.visible)[None, None, :, None, None, :, None]
        seen = seen & mx.array(across.visible)[:, None, None, :, None, None, :]
        mask = seen.reshape(len(q), 1, q.shape[2], k.shape[2])
        scale = 1 / math.sqrt(self.head_dim)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        sizes = (len(time.queries), len(down.queries), -1)
        out = mx.unflatten(out, 2, sizes).transpose(2, 3, 0, 4, 1, 5)
        return out.flatten(4).flatten(2, 3)


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
        held: list[mx.array] = []  # what the windows of the next frames span
        at = 0
        for time in tiles(length, self.attn.kernel[0]):
            held = held[time.keys[0] - at :]
            at = time.keys[0]
            held += islice(frames, len(time.keys) - len(held))
            x = mx.concatenate(held, axis=1)
            y = self.attn(modulate(self.norm1(x), first), time)
            own = [held[i] for i in time.queries - at]
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


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = [nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim)]

    def __call__(self, time: float) -> mx.array:
        x = sinusoid(mx.array([time])).astype(self.mlp[0].bias.dtype)
        for layer in self.mlp:
            x = layer(x)
        return x


class DiffusionDecoder(nn.Module):
    """Normalised latents (1, F, h, w, C) to pixels (1, 8F - 7, 32h, 32w, 3)."""

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
        self.t_embedder = TimeEmbedding(c.t_emb_dim)
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
            frames = (traced(trace, f"stage{i + 1}", x) for x in frames)
        return frames, length

    def denoise(self, contexts: Frames, length: int, noise, trace) -> Frames:
        """Frames of noise to frames of pixels, in one step from noise level 1."""
        size = self.config.patch_size
        time = self.t_embedder(self.config.timestep_scale_multiplier)
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


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Official names to this module's; released files nest the fused projection."""
    return {
        key.replace("attn.qkv.qkv.", "attn.qkv."): w
        for key, w in weights.items()
        if not key.startswith(UNUSED_KEYS)
    }
