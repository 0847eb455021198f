"""The diffusion decoder of the video VAE of LTX-2.5: latents to pixels in one step.

Four stages of neighborhood attention upsample the latents to contexts of the pixels'
size, with which a fifth one denoises the pixels. A layer turns an iterator of single
frames (1, 1, H, W, C) into another one and keeps only the frames that its attention
windows span. The result is the same as if all frames were computed at once.

Keyframes that were generated with a video guide it: they pass the same layers as single
frames, "planes", and attend to the nearest frames, which attend to them.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, tee
from typing import Callable, Iterator, NamedTuple, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import layers
from .base import Config, Trace, traced
from .layers import Component, Section, Shapes, Statistics, Weights

Frames = Iterator[mx.array]
Size = tuple[int, int, int]  # frames, rows, columns
TYPE_EMB = 128  # its released size; the small test checkpoints have no other


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
    type_emb: bool = False  # whether the file has this optional weight

    FIXED = {
        "_class_name": ("NADiffusionDecoder",),
        "out_channels": (3,),
        "default_num_inference_steps": (1,),
        "model_output_type": ("x0",),
        "rope_dim_split": (None,),
        "stage5_channels": (None,),
    }


@dataclass
class Clip:
    """Frames one by one, and planes at `times` (in frames), in order."""

    frames: Frames
    length: int
    planes: Frames
    times: np.ndarray


class Keyframes(NamedTuple):
    """Latents (1, P, h, w, C) of single frames at places in a video, in order; the
    video is decoded from frame `start` on."""

    latents: mx.array
    places: tuple[int, ...]
    start: int = 0

    def times(self, rate: int) -> np.ndarray:
        """Their places in frames; all but the first cover `rate` pixel frames."""
        frames = np.array([*self.places, self.start], np.float32)
        times = np.where(frames == 0, 0, (frames + (rate - 1) / 2) / rate)
        return times[:-1] - times[-1]


# Neighborhoods


def nearest(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Indices (n, 2) of the two nearest others of each place; if equal, the first."""
    distances = np.abs(np.subtract.outer(places, others))
    return np.argsort(distances, axis=1, kind="stable")[:, :2]


def group_size(kernel: int) -> int:
    """The number of queries along an axis that share the keys of all their windows."""
    return max(4, (kernel + 1) // 2)


class QueryGroups:
    """An axis cut into groups of one size, of which the last may overlap the one before:
    positions of each group's queries and keys, and which keys a query sees. A window is
    centered on its query; at the borders it is `shifted`, or else cut off."""

    def __init__(self, length: int, kernel: int, shifted: bool = True):
        size = min(group_size(kernel), length)
        span = min(size + kernel - 1, length)
        starts = np.minimum(np.arange(0, length, size), length - size)
        self.queries = starts[:, None] + np.arange(size)
        first_keys = np.clip(starts - kernel // 2, 0, length - span)
        self.keys = first_keys[:, None] + np.arange(span)
        windows = self.queries - kernel // 2
        if shifted:
            windows = np.clip(windows, 0, max(length - kernel, 0))
        seen = self.keys[:, None] - windows[..., None]
        self.visible = (seen >= 0) & (seen < kernel)
        # The index of each position of the axis among the queries of all groups.
        positions, groups = np.arange(length), np.arange(length) // size
        self.order = mx.array(positions + groups * size - starts[groups])


def rope_cos_sin(
    times: np.ndarray, height: int, width: int, dim: int
) -> tuple[mx.array, mx.array]:
    """Cosines and sines (F, H, W, 1, dim / 2) of the three axes' angles, float32: about
    a quarter of the pairs is for time, the rest for rows and columns."""
    places = np.ix_(times, np.arange(height), np.arange(width))
    time = dim // 4 // 2 * 2
    time -= (dim - time) // 2 % 2 * 2
    angles = []
    for place, part in zip(places, (time, (dim - time) // 2, (dim - time) // 2)):
        frequencies = (10000.0 ** -(np.arange(0, part, 2) / part)).astype(np.float32)
        table = mx.array(place[..., None, None].astype(np.float32) * frequencies)
        angles.append(mx.broadcast_to(table, (len(times), height, width, 1, part // 2)))
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

    def __call__(
        self,
        x: mx.array,
        times: np.ndarray,
        queries: mx.array,
        visible: mx.array,
        shifted: bool = True,
    ) -> mx.array:
        """Frames (1, R, H, W, C) at `times` to those at the indices `queries` (Q,);
        `visible` (Q, R) says which frames each of them attends to."""
        _, _, height, width, _ = x.shape
        down = QueryGroups(height, self.kernel[1], shifted)
        across = QueryGroups(width, self.kernel[2], shifted)
        qkv = mx.unflatten(self.qkv(x[0]), -1, (3, -1, self.head_dim))
        tables = rope_cos_sin(times, height, width, self.head_dim)
        q = apply_rope(self.q_norm(qkv[..., 0, :, :]), *tables)[queries]
        k = apply_rope(self.k_norm(qkv[..., 1, :, :]), *tables)
        v = qkv[..., 2, :, :]

        def cut(x: mx.array, rows: np.ndarray, columns: np.ndarray) -> mx.array:
            x = x[:, rows[0] : rows[-1] + 1][:, :, mx.array(columns)]
            # (frames, rows, groups, columns, heads, C)
            # to (groups, heads, frames rows columns, C)
            return x.transpose(2, 4, 0, 1, 3, 5).flatten(2, 4)

        out, visible_columns = [], mx.array(across.visible)
        for rows, key_rows, seen in zip(down.queries, down.keys, down.visible):
            # (groups, query frames, rows, columns, key frames, rows, columns)
            mask = visible[None, :, None, None, :, None, None]
            mask = mask & mx.array(seen)[None, None, :, None, None, :, None]
            mask = mask & visible_columns[:, None, None, :, None, None, :]
            mask = mask.flatten(4).flatten(1, 3)[:, None]  # (groups, 1, queries, keys)
            y = mx.fast.scaled_dot_product_attention(
                cut(q, rows, across.queries),
                *(cut(x, key_rows, across.keys) for x in (k, v)),
                scale=1 / math.sqrt(self.head_dim),
                mask=mask,
            )
            y = mx.unflatten(y, 2, (len(queries), len(rows), -1))
            # (groups, heads, Q, rows, columns, C) to (Q, rows, groups columns, heads C)
            y = y.transpose(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)
            out.append(y[:, :, across.order])
            mx.eval(out[-1])  # else the keys of all groups are held
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


def modulate(x: mx.array, scale_shift: Optional[mx.array]) -> mx.array:
    return x if scale_shift is None else x * (1 + scale_shift[0]) + scale_shift[1]


class Held:
    """A stream of frames for several readers; one that all have read is dropped."""

    def __init__(self, frames: Frames, readers: int):
        self.frames, self.held, self.start = frames, [], 0
        self.done = [0] * readers

    def read(self, reader: int, first: int, stop: int, done: int) -> list[mx.array]:
        """Frames [first, stop); the reader will not read those before `done` again."""
        self.held += islice(self.frames, max(stop - self.start - len(self.held), 0))
        found = self.held[first - self.start : stop - self.start]
        self.done[reader] = done
        self.held = self.held[min(self.done) - self.start :]
        self.start = min(self.done)
        return found


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, dim: int, head_dim: int, kernel: Size):
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, 1e-6)
        self.attn = NeighborhoodAttention(dim, head_dim, kernel)
        self.norm2 = nn.RMSNorm(dim, 1e-6)
        self.mlp = SwiGLU(dim)

    def __call__(self, clip: Clip, planes=True, before=(None, None)) -> Clip:
        """A clip to another one, without `planes` only its frames; `before` are scales
        and shifts before attention and feed-forward."""
        readers = 1 + (planes and len(clip.times) > 0)
        held = Held(clip.frames, readers), Held(clip.planes, readers)
        attend = partial(self.attend, shifted=not len(clip.times), before=before)
        made = self.frames(clip, *held, attend), self.planes(clip, *held, attend)
        return replace(clip, frames=made[0], planes=made[1])

    def attend(self, window, times, queries, visible, shifted, before) -> Frames:
        """The frames of a window at `queries` (see NeighborhoodAttention)."""
        y = modulate(self.norm1(mx.concatenate(window, axis=1)), before[0])
        y = self.attn(y, times, mx.array(queries), mx.array(visible), shifted)
        for i, attended in zip(queries, mx.split(y, len(queries), axis=1)):
            x = window[i] + attended
            x = x + self.mlp(modulate(self.norm2(x), before[1]))
            mx.eval(x)
            yield x

    def frames(self, clip: Clip, frames: Held, planes: Held, attend) -> Frames:
        """A clip's frames, each from its window and its two nearest planes."""
        near, count = nearest(np.arange(clip.length), clip.times), len(clip.times)
        last, done = near.max(axis=1, initial=-1), 0
        time = QueryGroups(clip.length, self.attn.kernel[0], shifted=not count)
        starts = [*time.keys[1:, 0], clip.length]
        groups = zip(time.queries, time.keys, time.visible, starts)
        for queries, keys, seen, then in groups:
            window = frames.read(0, keys[0], keys[-1] + 1, then)
            new, done = np.flatnonzero(queries >= done), queries[-1] + 1
            # Of a group, what needs no further plane is made first: a plane may need it.
            for part in np.split(new, np.flatnonzero(np.diff(last[queries[new]])) + 1):
                to = near[queries[part]]
                first, stop = to.min(initial=count), to.max(initial=-1) + 1
                guides = planes.read(0, first, stop, first) if count else []
                index = np.arange(first, stop)
                visible = (to[..., None] == index).any(axis=1)
                yield from attend(
                    guides + window,
                    np.append(clip.times[index], keys),
                    len(guides) + queries[part] - keys[0],
                    np.append(visible, seen[part], axis=1),
                )

    def planes(self, clip: Clip, frames: Held, planes: Held, attend) -> Frames:
        """A clip's planes, each from itself and the two frames nearest to it."""
        near = np.sort(nearest(clip.times, np.arange(clip.length)), axis=1)
        for n, (close, then) in enumerate(zip(near, [*near[1:, 0], clip.length])):
            plane = planes.read(1, n, n + 1, n + 1)
            window = plane + frames.read(1, close[0], close[-1] + 1, then)
            times = np.append(clip.times[n], close)
            visible = np.ones((1, len(window)), bool)
            yield from attend(window, times, np.array([0]), visible)


class DiffusionBlock(Block):
    """A block conditioned on each frame's context and on the noise level."""

    def __init__(self, dim: int, head_dim: int, kernel: Size):
        super().__init__(dim, head_dim, kernel)
        self.context_proj = nn.Linear(dim, dim)
        self.scale_shift_table = mx.zeros((7, dim))

    def __call__(self, clip: Clip, context: Clip, time: mx.array, planes: bool) -> Clip:
        add = lambda x, c: x + self.context_proj(c)
        frames = map(add, clip.frames, context.frames)
        guides = map(add, clip.planes, context.planes)
        clip = replace(clip, frames=frames, planes=guides)
        rows = (self.scale_shift_table + time).astype(self.scale_shift_table.dtype)
        # The other rows are gates, which released weights have folded in.
        return super().__call__(clip, planes, (rows[0:2], rows[3:5]))


class Upsample(nn.Module):
    """Channels to time and space."""

    def __init__(self, dim: int, stride: Size, channel_reduction: int):
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(dim, dim * math.prod(stride) // channel_reduction)

    def __call__(self, frames: Frames) -> Frames:
        frames = (layers.depth_to_space(self.proj(x), self.stride) for x in frames)
        frames = chain.from_iterable(mx.split(x, x.shape[1], axis=1) for x in frames)
        # Doubled in time, a clip of 8k + 1 frames has one too many, the first.
        return islice(frames, self.stride[0] - 1, None)

    def planes(self, planes: Frames) -> Frames:
        """Each as a clip of one frame."""
        return chain.from_iterable(self(iter([x])) for x in planes)


class DiffusionDecoder(Component):
    """Normalized latents (1, F, h, w, C) to pixels (1, 8F - 7, 32h, 32w, 3)."""

    config_class = DiffusionDecoderConfig
    UNUSED = ("coarse_",)

    def __init__(self, config: DiffusionDecoderConfig):
        super().__init__()
        self.config = c = config
        *widths, last = c.stage_channels
        patch = 3 * c.patch_size**2
        self.conv_in = nn.Linear(c.in_channels, widths[0])
        if c.type_emb:
            self.type_emb = mx.zeros(c.in_channels)
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
        noise: Callable[[str, tuple[int, ...]], mx.array],
        bias: float = 0.0,
        trace: Trace = None,
        keyframes: Optional[Keyframes] = None,
    ) -> Frames:
        """Frames (1, 1, 32h, 32w, 3), float32 in [0, 1], guided by keyframes.
        `noise("frame<i>", shape)` is called for a few frames more, and for larger ones if
        the latents are smaller than the first attention windows; "keyframe<i>" likewise.
        """
        size, windows = latents.shape[1:4], self.config.stage_kernels[0]
        pad_t, pad_h, pad_w = (max(k - n, 0) for k, n in zip(windows, size))
        sides = ((pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2))

        def embed(latents: mx.array, frames: int, type_emb: mx.array | int = 0):
            x = self.per_channel_statistics.denormalize(latents) + type_emb
            pad = ((0, 0), (0, frames), *sides, (0, 0))
            x = mx.pad(x, pad, mode="edge").astype(self.conv_in.weight.dtype)
            return (self.conv_in(x[:, i : i + 1]) for i in range(x.shape[1]))

        # The last latent is repeated so that the last frames' windows are centered.
        pad_frames = windows[0] // 2 * 2
        pad = pad_t + pad_frames
        keyframes = keyframes or Keyframes(latents[:, :0], ())
        planes = embed(keyframes.latents, 0, self.get("type_emb", 0))
        clip = Clip(embed(latents, pad), size[0] + pad, planes, keyframes.times(8))
        clip = self.contexts(clip, keyframes, trace)
        length = max(clip.length - 8 * pad_frames, self.config.stage5_kernel[0])
        clip = replace(clip, frames=islice(clip.frames, length), length=length)
        frames, height, width = size
        top, left = 32 * (pad_h // 2), 32 * (pad_w // 2)
        for x in islice(self.denoise(clip, noise, trace), 8 * frames - 7):
            x = x[:, :, top : top + 32 * height, left : left + 32 * width]
            x = mx.contiguous(mx.clip((x.astype(mx.float32) + 1) / 2 + bias, 0, 1))
            mx.eval(x)
            yield x

    def contexts(self, clip: Clip, keyframes: Keyframes, trace) -> Clip:
        """The pixels' contexts of latent frames and planes."""
        rate = 8
        for i, (blocks, up) in enumerate(zip(self.det_stages, self.upsamples)):
            for block in blocks:
                clip = block(clip)
            length = clip.length * up.stride[0] - up.stride[0] + 1
            rate //= up.stride[0]
            frames = map(partial(traced, trace, f"stage{i + 1}"), up(clip.frames))
            clip = Clip(frames, length, up.planes(clip.planes), keyframes.times(rate))
        return clip

    def denoise(self, contexts: Clip, noise, trace) -> Frames:
        """Frames of pixels from noise, in one step from noise level 1."""
        size = self.config.patch_size
        level = mx.array([self.config.timestep_scale_multiplier])
        time = layers.timestep_embedding(level)
        for layer in self.t_embedder["mlp"]:
            time = layer(time.astype(self.conv_out.weight.dtype))
        time = self.shared_adaln["proj"](nn.silu(time)).reshape(7, -1)
        count = 1 + len(self.diff_blocks)
        tees = zip(tee(contexts.frames, count), tee(contexts.planes, count))
        first, *others = (replace(contexts, frames=f, planes=p) for f, p in tees)

        def embed(name: str, item: tuple[int, mx.array]) -> mx.array:
            i, context = item
            _, _, height, width, _ = context.shape
            x = noise(f"{name}{i}", (1, 1, height * size, width * size, 3))
            return self.conv_in_x_t(layers.patchify(x.astype(context.dtype), size))

        frames = map(partial(embed, "frame"), enumerate(first.frames))
        guides = map(partial(embed, "keyframe"), enumerate(first.planes))
        clip = replace(first, frames=frames, planes=guides)
        for n, (block, context) in enumerate(zip(self.diff_blocks, others), 2):
            clip = block(clip, context, time, planes=n < count)
        for x in clip.frames:
            x = self.conv_out(self.norm_out(traced(trace, "stage5", x)))
            yield layers.unpatchify(x, size)

    @classmethod
    def infer_sizes(cls, section: Section, shapes: Shapes) -> Section:
        return section | {"type_emb": "type_emb" in shapes}

    @classmethod
    def sanitize(cls, weights: Weights) -> Weights:
        """Official names as the module's; released files nest the fused projection."""
        width = weights["conv_in.weight"].shape[1] if "conv_in.weight" in weights else 0
        odd = lambda k, w: k == "type_emb" and w.shape == (TYPE_EMB,) != (width,)
        name = lambda k: k.replace("attn.qkv.qkv.", "attn.qkv.")
        named = {name(k): w for k, w in weights.items() if not odd(k, w)}
        return super().sanitize(named)
