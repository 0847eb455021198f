"""The layers that the transformer, the text connectors and the decoders share."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Iterator, NamedTuple, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import linear
from .base import Config
from .linear import Group, QuantizedLinear, ShardedRMSNorm

Section, Shapes = dict[str, Any], dict[str, tuple]  # of a configuration; by tensor
Weights = dict[str, mx.array]
Stride = tuple[int, int, int]  # in time, height and width
Rope = tuple[mx.array, mx.array]  # cos and sin, each (heads, T, head_dim / 2)


@contextmanager
def no_random_weights() -> Iterator[None]:
    """Keep `mx.random.state` while modules are built: MLX's layers draw initial weights
    lazily, and the state's graph would grow with every module."""
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


class Component(nn.Module):
    """A part of the model, built from its section of a checkpoint's configuration."""

    config_class: ClassVar[type[Config]]
    UNUSED: ClassVar[tuple[str, ...]] = ()  # prefixes of official tensors

    @classmethod
    def from_config(cls, section: Section) -> nn.Module:
        """The module with parameters of the configured shapes, without weights."""
        with no_random_weights():
            return cls.build(section)

    @classmethod
    def build(cls, section: Section) -> nn.Module:
        return cls(cls.config_class.from_dict(section))

    @classmethod
    def infer_sizes(cls, section: Section, shapes: Shapes) -> Section:
        """The section with the sizes that only the tensors' shapes tell."""
        return section

    @classmethod
    def sanitize(cls, weights: Weights) -> Weights:
        """Official tensors as the module has them: convolutions in MLX's layout."""
        # (O, I, ...) to (O, ..., I); a view would be copied by each convolution.
        turn = lambda w: mx.contiguous(w.moveaxis(1, -1)) if w.ndim > 2 else w
        return {k: turn(w) for k, w in weights.items() if not k.startswith(cls.UNUSED)}


def rms_norm(x: mx.array, eps: float = 1e-6) -> mx.array:
    """RMS-normalize the last axis, without weight."""
    return mx.fast.rms_norm(x, None, eps)


def rope_cos_sin(
    positions: np.ndarray,
    dim: int,
    heads: int,
    max_pos: Sequence[int],
    theta: float = 10000.0,
) -> Rope:
    """Rotary tables of `positions` (axes, T), float32, each (heads, T, dim / heads / 2).

    Every axis has the same dim // (2 * axes) frequencies from pi/2 to theta * pi/2,
    interleaved (t, h and w of a frequency are neighbors); zero angles in front fill up
    to dim / 2. Frequencies are float64 and angles float32, as in training; in numpy,
    because MLX computes float64 sines in float32 on the CPU.
    """
    grid = theta ** np.linspace(0.0, 1.0, dim // (2 * len(positions))) * (np.pi / 2)
    scale = np.asarray(max_pos, np.float32)[:, None]
    fraction = positions.astype(np.float32) / scale * np.float32(2) - np.float32(1)
    angles = fraction.T[:, None, :] * grid.astype(np.float32)[:, None]
    angles = angles.reshape(positions.shape[1], -1)
    angles = np.pad(angles, ((0, 0), (dim // 2 - angles.shape[1], 0)))
    angles = angles.reshape(len(angles), heads, -1).swapaxes(0, 1)
    return mx.array(np.cos(angles)), mx.array(np.sin(angles))


@mx.compile
def apply_rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the two halves of each head of `x` (B, heads, T, head_dim)."""
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def prefetch(modules: Iterator[nn.Module]) -> Iterator[nn.Module]:
    """Modules with their weights loaded: loads the next one while the current one
    computes (the caller uses `mx.async_eval`), then frees the current one."""
    for current in modules:
        mx.eval(current.parameters())
        mx.synchronize()  # of the one before
        yield current


# macOS ends a process whose GPU command takes more than about 5 s: 1 s on an M1.
MAX_FLOPS = 2 * 10**12
MAX_TOKENS = 8192  # at a time; also keeps the feed-forward's hidden state small


def pieces(x: mx.array, limit: float = math.inf) -> list[slice]:
    """Equal slices of axis 1 of `x` (B, T, D), each at most `limit` and MAX_TOKENS."""
    length = x.shape[1]
    size = math.ceil(length / math.ceil(length / min(limit, MAX_TOKENS)))
    return [slice(i, i + size) for i in range(0, length, size)]


@dataclass(frozen=True)
class Nag:
    """Normalized attention guidance: moves the attention to a prompt away from that to
    a negative prompt. The defaults are those of other tools."""

    scale: float
    tau: float = 2.5
    alpha: float = 0.25

    def __call__(self, z: mx.array, other: mx.array, group: Group | None) -> mx.array:
        """From the results of attention to both prompts (B, heads, T, d), before gates and
        output projection; `group` are the ranks that share the heads."""
        g, norms = _extrapolated(z, other, self.scale)
        return _normalized(z, g, linear.all_sum(norms, group), self.tau, self.alpha)


@mx.compile
def _extrapolated(z, negative, scale):
    """scale z - (scale - 1) negative, and a token's 1-norms of that and of z, float32."""
    z = z.astype(mx.float32)
    g = scale * z - (scale - 1) * negative
    return g, mx.stack([mx.abs(x).sum((1, 3), keepdims=True) for x in (g, z)])


@mx.compile
def _normalized(z, g, norms, tau, alpha):
    """A mix of z and g, whose norm becomes at most tau times that of z."""
    most = tau * norms[1] / mx.maximum(norms[0], 1e-30)
    return (z + alpha * (mx.minimum(most, 1) * g - z)).astype(z.dtype)


class Steering(NamedTuple):
    """How tokens read a prompt: which part, by a mask (1, 1, T, n), away from what."""

    mask: Optional[mx.array] = None
    nag: Optional[Nag] = None

    def __call__(self, prompt: dict, negative: Optional[dict] = None) -> dict:
        """Arguments of `Attention`, made of those of both prompts."""
        negative = self.nag and negative["keys_values"]
        return prompt | {"mask": self.mask, "nag": self.nag, "negative": negative}


class Attention(nn.Module):
    """Multi-head attention with q/k norms over all heads and, from 2.3 on, head gates:
    each head's output times 2 sigmoid(logit of the query-side input)."""

    group: Optional[Group] = None  # the ranks that share the heads

    def __init__(
        self,
        query_dim: int,
        heads: int,
        head_dim: int,
        context_dim: Optional[int] = None,
        gated: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner)
        self.to_k = nn.Linear(context_dim or query_dim, inner)
        self.to_v = nn.Linear(context_dim or query_dim, inner)
        self.q_norm = nn.RMSNorm(inner, eps)
        self.k_norm = nn.RMSNorm(inner, eps)
        self.to_out = [nn.Linear(inner, query_dim)]
        if gated:
            self.to_gate_logits = nn.Linear(query_dim, heads)

    def shard(self, group: Group) -> None:
        """Keep this rank's heads."""
        self.group, self.heads = group, self.heads // group.size()
        self.q_norm = ShardedRMSNorm(self.q_norm, group)
        self.k_norm = ShardedRMSNorm(self.k_norm, group)
        for name in ("to_q", "to_k", "to_v", "to_gate_logits"):
            if name in self:
                linear.shard_columns(self[name], group)
        linear.shard_rows(self.to_out[0], group)

    def _split(self, x: mx.array) -> mx.array:
        """(B, T, heads d) to (B, T, heads, d)."""
        return x.reshape(*x.shape[:2], self.heads, -1)

    def keys_values(
        self, context: mx.array, rope: Optional[Rope] = None
    ) -> tuple[mx.array, mx.array]:
        """Keys and values of `context` (B, S, context_dim), each (B, heads, S, d)."""
        parts = [context[:, rows] for rows in pieces(context)]
        k = mx.concatenate([self.k_norm(self.to_k(x)) for x in parts], axis=1)
        v = mx.concatenate([self.to_v(x) for x in parts], axis=1)
        k, v = self._split(k).swapaxes(1, 2), self._split(v).swapaxes(1, 2)
        return (apply_rope(k, *rope) if rope else k), v

    def __call__(
        self,
        x: mx.array,
        keys_values: Optional[tuple[mx.array, mx.array]] = None,
        rope: Optional[Rope] = None,
        mask: Optional[mx.array] = None,
        values_only: bool = False,
        nag: Optional[Nag] = None,
        negative: Optional[tuple[mx.array, mx.array]] = None,
    ) -> mx.array:
        """Attend from `x` (B, T, query_dim) to `keys_values`, or to itself if None.
        `mask` (1, 1, T, S) is additive or boolean; it may be (1, 1, T, n), for n equal
        parts of the keys. `values_only` is the STG perturbation: each head returns its
        values; gate and output projection still apply. `nag` moves the result away from
        attention to `negative` keys and values.
        """
        limit = math.inf
        if not values_only:
            k, v = keys_values or self.keys_values(x, rope)
            limit = MAX_FLOPS // (4 * k.size)

        def attend(rows: slice) -> mx.array:
            if values_only:
                out = self._split(self.to_v(x[:, rows]))
            else:
                q = self._split(self.q_norm(self.to_q(x[:, rows]))).swapaxes(1, 2)
                q = apply_rope(q, *(table[:, rows] for table in rope)) if rope else q
                scale, seen = 1 / math.sqrt(q.shape[-1]), mask
                if mask is not None:
                    seen = mx.repeat(mask[:, :, rows], k.shape[2] // mask.shape[3], 3)
                attention = partial(mx.fast.scaled_dot_product_attention, scale=scale)
                out = attention(q, k, v, mask=seen)
                if nag is not None:
                    out = nag(out, attention(q, *negative), self.group)
                out = out.swapaxes(1, 2)  # (B, heads, T, d) to (B, T, heads, d)
            if "to_gate_logits" in self:
                out = out * (2 * mx.sigmoid(self.to_gate_logits(x[:, rows])))[..., None]
            return self.to_out[0](out.flatten(2))

        out = mx.concatenate([attend(rows) for rows in pieces(x, limit)], axis=1)
        return linear.all_sum(out, self.group)


@mx.compile
def add_gelu(x: mx.array, bias: mx.array) -> mx.array:
    return nn.gelu_approx(x + bias)


class GELU(nn.Module):
    """A projection followed by the tanh-approximated GELU."""

    def __init__(self, dim: int, hidden: int, bias: bool = True):
        super().__init__()
        self.proj = nn.Linear(dim, hidden, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        if isinstance(self.proj, QuantizedLinear) and "bias" in self.proj:
            return add_gelu(self.proj.product(x), self.proj.bias)
        return nn.gelu_approx(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU, Linear with a hidden width of 4 dim."""

    group: Optional[Group] = None  # the ranks that share the hidden width

    def __init__(self, dim: int, bias: bool = True):
        super().__init__()
        # In checkpoints the dropout between the layers has an index, too.
        down = nn.Linear(4 * dim, dim, bias=bias)
        self.net = [GELU(dim, 4 * dim, bias), nn.Identity(), down]

    def __call__(self, x: mx.array) -> mx.array:
        up, _, down = self.net
        out = [linear.apply_in_parts(down, up(x[:, rows])) for rows in pieces(x)]
        return linear.all_sum(mx.concatenate(out, axis=1), self.group)

    def shard(self, group: Group) -> None:
        """Keep this rank's part of the hidden width."""
        self.group = group
        linear.shard_columns(self.net[0].proj, group)
        linear.shard_rows(self.net[2], group)


def timestep_embedding(timesteps: mx.array) -> mx.array:
    """Sinusoidal embedding of `timesteps` (N,), float32, cosines first: (N, 256)."""
    freqs = mx.exp(-math.log(10000) / 128 * mx.arange(128, dtype=mx.float32))
    angles = timesteps.astype(mx.float32)[:, None] * freqs
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.silu(self.linear_1(x)))


class TimestepEmbedding(nn.Module):
    """Sinusoid (float32, 256) and MLP: timesteps (N,) to (N, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = TimestepMLP(256, dim)

    def __call__(self, timesteps: mx.array) -> mx.array:
        dtype = self.timestep_embedder.linear_1.bias.dtype
        return self.timestep_embedder(timestep_embedding(timesteps).astype(dtype))


class AdaLayerNormSingle(nn.Module):
    """Timesteps (N,) to `rows` modulation rows (N, rows, dim) and the embedding (N, dim)."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.rows = rows
        self.emb = TimestepEmbedding(dim)
        self.linear = nn.Linear(dim, rows * dim)

    def __call__(self, timesteps: mx.array) -> tuple[mx.array, mx.array]:
        embedded = self.emb(timesteps)
        rows = self.linear(nn.silu(embedded))
        return rows.reshape(len(timesteps), self.rows, -1), embedded


class Statistics(nn.Module):
    """Mean and standard deviation of an autoencoder's latents over its training set: by
    channel, or by channel and mel bin, which are stored with the channel first."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shape = shape
        self["mean-of-means"] = mx.zeros(math.prod(shape))
        self["std-of-means"] = mx.ones(math.prod(shape))

    def _mean_std(self) -> tuple[mx.array, mx.array]:
        """As the last axes of latents, (C,) or (bins, C)."""
        names = "mean-of-means", "std-of-means"
        return tuple(self[name].reshape(self.shape).T for name in names)

    def normalize(self, latents: mx.array) -> mx.array:
        """The encoder's latents to the transformer's."""
        mean, std = self._mean_std()
        return ((latents - mean) / std).astype(latents.dtype)

    def denormalize(self, latents: mx.array) -> mx.array:
        """Undo `normalize`."""
        mean, std = self._mean_std()
        return (latents * std + mean).astype(latents.dtype)


# Space and time to channels, and back


def space_to_depth(x: mx.array, stride: Stride) -> mx.array:
    """(B, F p, H q, W r, C) to (B, F, H, W, C p q r)."""
    B, F, H, W, C = x.shape
    p, q, r = stride
    x = x.reshape(B, F // p, p, H // q, q, W // r, r, C)
    return x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, F // p, H // q, W // r, -1)


def depth_to_space(x: mx.array, stride: Stride) -> mx.array:
    """(B, F, H, W, C p q r) to (B, F p, H q, W r, C)."""
    B, F, H, W, _ = x.shape
    p, q, r = stride
    x = x.reshape(B, F, H, W, -1, p, q, r).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, F * p, H * q, W * r, -1)


def patchify(x: mx.array, size: int) -> mx.array:
    """Pixels to patches, whose channels are ordered (c, column, row)."""
    return space_to_depth(x.swapaxes(2, 3), (1, size, size)).swapaxes(2, 3)


def unpatchify(x: mx.array, size: int) -> mx.array:
    return depth_to_space(x.swapaxes(2, 3), (1, size, size)).swapaxes(2, 3)
