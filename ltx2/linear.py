"""Linear layers that are quantized, or split over the ranks of a group."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Callable, Literal, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace
from mlx.utils import tree_map_with_path

from .chips import this_chip

Group = mx.distributed.Group
Change = Callable[[slice], mx.array]


@dataclass
class Quantization:
    """How layers are quantized: the arguments of mx.quantize."""

    group_size: Literal[16, 32, 64, 128]
    bits: Literal[2, 3, 4, 5, 6, 8]
    mode: Literal["affine", "mxfp4", "nvfp4", "mxfp8"] = "affine"


class QuantizedLinear(nn.QuantizedLinear):
    """Multiplies by the quantized weight, or dequantizes it first if that is faster."""

    parts = property(lambda self: (self.weight, self.scales, self.get("biases")))
    format = property(lambda self: (self.group_size, self.bits, self.mode))

    def dequantized(self, dtype: mx.Dtype, rows: slice = slice(None)) -> mx.array:
        parts = (None if part is None else part[rows] for part in self.parts)
        return mx.dequantize(*parts, *self.format, dtype=dtype)

    def product(self, x: mx.array, change: Optional[Change] = None) -> mx.array:
        """Without the bias; `change(rows)` is added to these rows of the weight."""
        chip, inputs, outputs = this_chip(), x.shape[-1], len(self.weight)
        if change is None and x.size // inputs < chip.dequantize_from:
            return mx.quantized_matmul(x, *self.parts, True, *self.format)
        size = int(min(outputs, max(chip.weights_at_a_time / inputs, 1)))
        rows = [slice(i, i + size) for i in range(0, outputs, size)]
        parts = [self.dequantized(x.dtype, r) for r in rows]
        if change is not None:
            parts = [w + change(r) for w, r in zip(parts, rows)]
        return mx.concatenate([x @ w.T for w in parts], axis=-1)

    def __call__(self, x: mx.array, change: Optional[Change] = None) -> mx.array:
        y = self.product(x, change)
        return y + self.bias if "bias" in self else y


MANY_ROWS = 2048  # from which on the parts below pay


def apply_in_parts(layer: nn.Module, x: mx.array) -> mx.array:
    """`layer(x)`, of a dense layer with many inputs as a sum over parts of them where the
    chip multiplies these faster; equal up to rounding."""
    size, inputs = this_chip().inputs_at_a_time, x.shape[-1]
    if type(layer) is not nn.Linear or inputs <= size or x.size < MANY_ROWS * inputs:
        return layer(x)
    parts = (slice(i, i + size) for i in range(0, inputs, size))
    y = sum(x[..., part] @ layer.weight[:, part].T for part in parts)
    return y + layer.bias if "bias" in layer else y


def layer_format(quantization: dict[str, Any], path: str) -> dict[str, Any]:
    """A layer's arguments of `mx.quantize`: the common ones, or its path's, as in mlx-lm."""
    common = {k: v for k, v in quantization.items() if not isinstance(v, dict)}
    return common | quantization.get(path, {})


def layer_formats(quantization: Optional[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All formats: the common one under "", and those of single layers by path."""
    own = [k for k, v in (quantization or {}).items() if isinstance(v, dict)]
    return {k: layer_format(quantization, k) for k in ["", *own] if quantization}


def quantize_stored(
    model: nn.Module, quantization: dict[str, Any], weights: Container, prefix: str = ""
) -> None:
    """Quantize the layers whose scales are in `weights`, each in its format; `prefix` is
    the path of the model in the quantization."""
    stored = lambda path: f"{path}.scales" in weights
    how = lambda path, _: stored(path) and layer_format(quantization, prefix + path)
    quantize(model, class_predicate=how)


def quantize(model: nn.Module, **options) -> None:
    """`nn.quantize` with QuantizedLinear layers."""
    nn.quantize(model, **options)
    for layer in model.modules():
        if type(layer) is nn.QuantizedLinear:
            layer.__class__ = QuantizedLinear


# Layers split over the ranks of a group; every rank has the complete input.


def shard_columns(layer: nn.Module, group: Group) -> None:
    """Keep this rank's outputs of a linear layer, or its part of a vector."""
    complete = ("lora_a", "strength")  # of a LoRALinear
    shard_inplace(layer, lambda k, _: None if k.endswith(complete) else 0, group=group)


def shard_rows(layer: nn.Module, group: Group) -> None:
    """Keep this rank's inputs of a linear layer; outputs must be summed over the ranks,
    and rank 0 adds the bias."""
    complete = ("bias", "lora_b", "strength")
    shard_inplace(layer, lambda k, _: None if k.endswith(complete) else -1, group=group)
    if group.rank() > 0:
        zero = lambda k, w: mx.zeros_like(w) if k.endswith("bias") else w
        layer.update(tree_map_with_path(zero, layer.parameters()))


def all_sum(x: mx.array, group: Optional[Group]) -> mx.array:
    """The sum over the ranks of a group, if there is one."""
    return x if group is None else mx.distributed.all_sum(x, group=group)


class ShardedRMSNorm(nn.Module):
    """RMS norm over a width that is split over the ranks."""

    def __init__(self, norm: nn.RMSNorm, group: Group):
        super().__init__()
        self.weight, self.eps, self.group = norm.weight, norm.eps, group
        shard_columns(self, group)

    def __call__(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32)
        total = all_sum(y.square().sum(-1, keepdims=True), self.group)
        width = self.group.size() * x.shape[-1]
        return (y * mx.rsqrt(total / width + self.eps) * self.weight).astype(x.dtype)
