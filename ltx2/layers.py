"""The layers that the transformer, the text connectors and the decoders share."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, ClassVar, Iterator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import shard_inplace
from mlx.utils import tree_map_with_path

from .base import Config

Stride = tuple[int, int, int]  # in time, height and width
Rope = tuple[mx.array, mx.array]  # cos and sin, each (heads, T, head_dim / 2)


class Component(nn.Module):
    """A part of the model: built from its section of a checkpoint's configuration."""

    config_class: ClassVar[type[Config]]

    @classmethod
    def from_config(cls, section: dict[str, Any]) -> nn.Module:
        """The module with parameters of the configured shapes, not loaded."""
        return cls(cls.config_class.from_dict(section))

    @classmethod
    def infer_sizes(
        cls, section: dict[str, Any], shapes: dict[str, tuple]
    ) -> dict[str, Any]:
        """The section with the sizes that only the tensors' shapes say."""
        return section

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Official names and layouts to the module's."""
        return weights


def rms_norm(x: mx.array, eps: float = 1e-6) -> mx.array:
    """RMS-normalise the last axis, without weight."""
    return mx.fast.rms_norm(x, None, eps)


def rope_cos_sin(
    positions: np.ndarray,
    dim: int,
    heads: int,
    max_pos: Sequence[int],
    theta: float = 10000.0,
) -> Rope:
    """Rotary tables of `positions` (axes, T), float32, each (heads, T, dim / heads / 2).

    Every axis gets the same dim // (2 * axes) frequencies from pi/2 to theta * pi/2,
    interleaved (t, h, w of one band side by side); what is missing to dim / 2 is
    filled with zero angles in front. The grid is float64, the angles are float32, as
    the model was trained: numpy, because MLX computes float64 sines in float32 on CPU.
    """
    axes = len(positions)
    grid = theta ** np.linspace(0.0, 1.0, dim // (2 * axes)) * (np.pi / 2)
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


# Rows from which on it is faster to dequantise a layer and multiply: a quantised matmul
# is slow on MLX's CPU backend (measured) and, at many rows, on M1 and M2 (g13, g14).
DEQUANTIZE_FROM = {"cpu": 6, "applegpu_g13": 512, "applegpu_g14": 512}


@cache
def dequantize_from() -> float:
    """The rows of DEQUANTIZE_FROM for this machine; infinity on all others."""
    cpu = mx.default_device().type == mx.cpu
    chip = "cpu" if cpu else mx.device_info().get("architecture", "")
    return next((n for k, n in DEQUANTIZE_FROM.items() if chip.startswith(k)), math.inf)


class QuantizedLinear(nn.QuantizedLinear):
    """Multiplies by the quantised weight or dequantises it first, by what is faster."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size // x.shape[-1] < dequantize_from():
            return super().__call__(x)
        parts = self.weight, self.scales, self.get("biases")
        how = self.group_size, self.bits, self.mode
        y = x @ mx.dequantize(*parts, *how, dtype=x.dtype).T
        return y + self.bias if "bias" in self else y


def quantize(model: nn.Module, **options) -> None:
    """`nn.quantize` with layers that multiply as it suits the machine."""
    nn.quantize(model, **options)
    for layer in model.modules():
        if type(layer) is nn.QuantizedLinear:
            layer.__class__ = QuantizedLinear


def prefetch(modules: list[nn.Module]) -> Iterator[nn.Module]:
    """Modules, taken out of the list: while one computes what its user has begun to
    evaluate, the weights of the next are read; then it is let go."""
    mx.eval(modules[0].parameters())
    while modules:
        yield modules.pop(0)
        if modules:
            mx.eval(modules[0].parameters())
        mx.synchronize()


# Layers that are split over the ranks of a group, each of which has all of the input.


def shard_columns(layer: nn.Module, group: mx.distributed.Group) -> None:
    """Keep this rank's outputs of a linear layer (or its entries of a vector)."""
    whole = ("lora_a", "strength")  # of a LoRA beside it
    shard_inplace(layer, lambda k, _: None if k.endswith(whole) else 0, group=group)


def shard_rows(layer: nn.Module, group: mx.distributed.Group) -> None:
    """Keep what this rank's inputs add to the outputs; the bias is the first rank's."""
    whole = ("bias", "lora_b", "strength")
    shard_inplace(layer, lambda k, _: None if k.endswith(whole) else -1, group=group)
    if group.rank() > 0:
        zero = lambda k, w: mx.zeros_like(w) if k.endswith("bias") else w
        layer.update(tree_map_with_path(zero, layer.parameters()))


def all_sum(x: mx.array, group: Optional[mx.distributed.Group]) -> mx.array:
    """The sum of the ranks' parts."""
    return x if group is None else mx.distributed.all_sum(x, group=group)


class ShardedRMSNorm(nn.Module):
    """RMS norm over a width of which each rank has a part."""

    def __init__(self, norm: nn.RMSNorm, group: mx.distributed.Group):
        super().__init__()
        self.weight, self.eps, self.group = norm.weight, norm.eps, group
        shard_columns(self, group)

    def __call__(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32)
        total = all_sum(y.square().sum(-1, keepdims=True), self.group)
        width = self.group.size() * x.shape[-1]
        return (y * mx.rsqrt(total / width + self.eps) * self.weight).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with q/k norms over the whole width and, from 2.3 on, gated
    heads: each head's output times 2 sigmoid(logit of the query-side input)."""

    group: Optional[mx.distributed.Group] = None  # that the heads are split over

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

    def shard(self, group: mx.distributed.Group) -> None:
        """Keep this rank's heads."""
        self.group, self.heads = group, self.heads // group.size()
        self.q_norm = ShardedRMSNorm(self.q_norm, group)
        self.k_norm = ShardedRMSNorm(self.k_norm, group)
        for name in ("to_q", "to_k", "to_v", "to_gate_logits"):
            if name in self:
                shard_columns(self[name], group)
        shard_rows(self.to_out[0], group)

    def _split(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def keys_values(
        self, context: mx.array, rope: Optional[Rope] = None
    ) -> tuple[mx.array, mx.array]:
        """Keys and values of `context` (B, S, context_dim), each (B, heads, S, d)."""
        k = self._split(self.k_norm(self.to_k(context)))
        v = self._split(self.to_v(context))
        return (apply_rope(k, *rope) if rope else k), v

    def __call__(
        self,
        x: mx.array,
        keys_values: Optional[tuple[mx.array, mx.array]] = None,
        rope: Optional[Rope] = None,
        mask: Optional[mx.array] = None,
        values_only: bool = False,
    ) -> mx.array:
        """Attend from `x` (B, T, query_dim) to itself, or to given keys and values.

        `values_only` is the STG perturbation: attention is replaced by its values,
        head by head; gate and output projection still apply.
        """
        if values_only:
            out = self._split(self.to_v(x))
        else:
            q = self._split(self.q_norm(self.to_q(x)))
            q = apply_rope(q, *rope) if rope else q
            k, v = keys_values or self.keys_values(x, rope)
            scale = 1 / math.sqrt(q.shape[-1])
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        if "to_gate_logits" in self:
            gate = 2 * mx.sigmoid(self.to_gate_logits(x))
            out = out * gate.swapaxes(1, 2)[..., None]
        return all_sum(self.to_out[0](out.swapaxes(1, 2).flatten(2)), self.group)


class GELU(nn.Module):
    """A projection followed by the tanh-approximated GELU."""

    def __init__(self, dim: int, hidden: int, bias: bool = True):
        super().__init__()
        self.proj = nn.Linear(dim, hidden, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return nn.gelu_approx(self.proj(x))


class FeedForward(nn.Module):
    """Linear, GELU, Linear with four times the width inside."""

    group: Optional[mx.distributed.Group] = None  # that the inner width is split over

    def __init__(self, dim: int, bias: bool = True):
        super().__init__()
        # The checkpoint counts a dropout between the two layers.
        down = nn.Linear(4 * dim, dim, bias=bias)
        self.net = [GELU(dim, 4 * dim, bias), nn.Identity(), down]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.net:
            x = layer(x)
        return all_sum(x, self.group)

    def shard(self, group: mx.distributed.Group) -> None:
        """Keep this rank's part of the inner width."""
        self.group = group
        shard_columns(self.net[0].proj, group)
        shard_rows(self.net[2], group)


def timestep_embedding(timesteps: mx.array, dim: int = 256) -> mx.array:
    """Sinusoidal embedding of `timesteps` (N,), float32, cosines first: (N, dim)."""
    half = dim // 2
    freqs = mx.exp(-math.log(10000) / half * mx.arange(half, dtype=mx.float32))
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


# Time and space for channels, and back.


def space_to_depth(x: mx.array, stride: Stride) -> mx.array:
    """(B, F p, H q, W r, C) to (B, F, H, W, C p q r)."""
    B, F, H, W, C = x.shape
    p, q, r = stride
    x = x.reshape(B, F // p, p, H // q, q, W // r, r, C)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, F // p, H // q, W // r, -1)


def depth_to_space(x: mx.array, stride: Stride) -> mx.array:
    """(B, F, H, W, C p q r) to (B, F p, H q, W r, C)."""
    B, F, H, W, _ = x.shape
    p, q, r = stride
    x = x.reshape(B, F, H, W, -1, p, q, r).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, F * p, H * q, W * r, -1)


def patchify(x: mx.array, size: int) -> mx.array:
    """Pixels to patches, in which the column counts before the row."""
    return space_to_depth(x.swapaxes(2, 3), (1, size, size)).swapaxes(2, 3)


def unpatchify(x: mx.array, size: int) -> mx.array:
    return depth_to_space(x.swapaxes(2, 3), (1, size, size)).swapaxes(2, 3)
