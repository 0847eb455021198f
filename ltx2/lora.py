"""LoRAs: read from files, attached to linear layers or fused into weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .base import UserError

# Modules that diffusers has renamed: its names and the official ones
DIFFUSERS_NAMES = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
KEY = re.compile(
    r"(?P<style>diffusion_model|transformer)\.(?P<path>.+)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_down\.weight|lora_up\.weight|alpha)"
)


@dataclass(frozen=True)
class Lora:
    """Factors by module path: A (r, in), B (out, r) times alpha / r."""

    name: str
    factors: dict[str, tuple[mx.array, mx.array]]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> Lora:
        """Read a LoRA with keys as in official files, ComfyUI or diffusers, lazily.

        `path` may be a folder that train.py wrote. Raises UserError if the file is not a
        LoRA or has other keys.
        """
        path = Path(path)
        path = path / "adapters.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"LoRA {path}: no such file")
        try:
            tensors, metadata = mx.load(str(path), "safetensors", return_metadata=True)
        except RuntimeError:
            raise UserError(f"LoRA {path} is not a safetensors file") from None
        parts: dict[str, dict[str, mx.array]] = {}
        for key, tensor in tensors.items():
            match = KEY.fullmatch(key.removeprefix("model."))
            if match is None:
                raise UserError(f"LoRA {path}: unrecognized key {key}")
            module = match["path"]
            if match["style"] == "transformer":
                head, _, rest = module.partition(".")
                module = f"{DIFFUSERS_NAMES.get(head, head)}.{rest}".rstrip(".")
            part = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
            name = part.get(match["part"], match["part"][5:6])
            parts.setdefault(module, {})[name] = tensor
        if not parts:
            raise UserError(f"LoRA {path} has no factors")
        factors = {}
        for module, p in parts.items():
            if not {"A", "B"} <= p.keys():
                raise UserError(f"LoRA {path}: missing lora_A or lora_B for {module}")
            a, b = p["A"], p["B"]
            if "alpha" in p:
                b = b.astype(mx.float32) * (p["alpha"].astype(mx.float32) / a.shape[0])
            factors[module] = (a, b)
        return cls(path.name, factors, metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(a.nbytes + b.nbytes for a, b in self.factors.values())

    def check(self, model: nn.Module) -> None:
        """Raise UserError unless each pair of factors fits a linear layer of `model`."""
        layers = dict(model.named_modules())
        for path, (a, b) in self.factors.items():
            layer = layers.get(path)
            shape = None if layer is None else linear_shape(layer)
            if shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
                found = "no such layer" if shape is None else "%dx%d" % shape
                raise UserError(
                    f"LoRA {self.name} does not fit this model: factors "
                    f"{b.shape[0]}x{b.shape[1]} and {a.shape[0]}x{a.shape[1]} for {path}, "
                    f"where the model has {found}; it was made for another generation"
                )


def linear_shape(layer: nn.Module) -> Optional[tuple[int, int]]:
    """Outputs and inputs of a linear layer; None for any other layer."""
    if isinstance(layer, LoRALinear):
        return linear_shape(layer.linear)
    if isinstance(layer, nn.QuantizedLinear):
        return len(layer.weight), layer.scales.shape[1] * layer.group_size
    return layer.weight.shape if isinstance(layer, nn.Linear) else None


class LoRALinear(nn.Module):
    """A linear layer plus its LoRAs: x W^T + (x A^T s) B^T, where A and B hold the rows
    of all LoRAs. The strengths s (r,) are not folded into B, which 16 bits would round.
    """

    def __init__(self, linear: nn.Module, a: mx.array, b: mx.array, s: mx.array):
        super().__init__()
        self.linear, self.lora_a, self.lora_b, self.strength = linear, a, b, s

    @property
    def bias(self) -> mx.array:  # its dtype is the layer's
        return self.linear.bias

    def __call__(self, x: mx.array) -> mx.array:
        a, b, s = (w.astype(x.dtype) for w in (self.lora_a, self.lora_b, self.strength))
        return self.linear(x) + (x @ a.T * s) @ b.T


def attach(
    model: nn.Module, loras: Sequence[tuple[Lora, float]], prefix: str = ""
) -> None:
    """Wrap the linear layers in LoRALinear for these LoRAs, each with a strength, in
    place of those attached before. The layers themselves do not change."""
    layers = {prefix + k: m for k, m in model.named_modules()}
    changed = {k: m.linear for k, m in layers.items() if isinstance(m, LoRALinear)}
    paths: dict[str, list[tuple[mx.array, ...]]] = {}
    for lora, strength in loras:
        if not prefix:
            lora.check(model)
        if strength != 0:
            for path, (a, b) in lora.factors.items():
                if not path.startswith(prefix):
                    continue
                s = mx.full(len(a), strength, mx.float32)
                paths.setdefault(path, []).append((a, b, s))
    for path, factors in paths.items():
        a, b, s = zip(*factors)
        parts = mx.concatenate(a), mx.concatenate(b, axis=1), mx.concatenate(s)
        changed[path] = LoRALinear(changed.get(path, layers[path]), *parts)
    changed = [(k.removeprefix(prefix), layer) for k, layer in changed.items()]
    model.update_modules(tree_unflatten(changed))


def fuse(
    weights: dict[str, mx.array], loras: Sequence[tuple[Lora, float]]
) -> dict[str, mx.array]:
    """The weights plus LoRAs, W + sum of s B A, computed in float32 and rounded once to
    W's dtype, lazily. Call `Lora.check` first."""
    fused = dict(weights)
    for path in dict.fromkeys(path for lora, _ in loras for path in lora.factors):
        w = weights[f"{path}.weight"]
        total = w.astype(mx.float32)
        for lora, strength in loras:
            if path in lora.factors:
                a, b = (f.astype(mx.float32) for f in lora.factors[path])
                total = total + strength * (b @ a)
        fused[f"{path}.weight"] = total.astype(w.dtype)
    return fused
