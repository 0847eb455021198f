"""LoRAs: read as any trainer writes them, checked, and added to linear layers."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Literal, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from . import hub
from .base import UserError, checked, note, parse_json, user_path
from .linear import QuantizedLinear

# What tools put in front of a module's name: peft, ComfyUI, diffusers, torch.compile
PREFIXES = "base_model.model. model. diffusion_model. transformer. _orig_mod. ".split()
FACTOR = re.compile(
    r"(.+)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.[^.]+)?\.weight"
)
# What is more than a LoRA, or something else
UNSUPPORTED = {
    r"(text_encoder|lora_te|te\d?[._]).*": "changes the text encoder",
    r".*\.lokr_\w+": "is a LoKr",
    r".*\.hada_\w+": "is a LoHa",
    r".*\.b?oft_\w+": "is an OFT",
    r".*\.(dora_scale|lora_magnitude_vector.*)": "is a DoRA",
    r".*\.(diff_b|lora_\w+\.bias)": "changes biases",
    r".*\.lora_mid\.weight": "has convolutions",
    r".*\.diff": "replaces weights",
}
# Modules that diffusers has renamed: the official names and those
DIFFUSERS_NAMES = {
    "patchify_proj": "proj_in",
    "adaln_single": "time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
DIFFUSERS_NAMES |= {f"audio_{k}": f"audio_{v}" for k, v in DIFFUSERS_NAMES.items()}
# Ends of modules' names, and those of ltx-2-mlx's trainer
MLX_NAMES = {"to_out.0": "to_out", "net.0.proj": "proj_in", "net.2": "proj_out"}
MLX_NAMES |= {"linear_1": "linear1", "linear_2": "linear2"}
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMED = "adapters.safetensors", PEFT_FILE
LORA = re.compile(r"[^/]*\.safetensors")
MERGE_FROM = 4000  # rows from which on LoRALinear adds B A to the weight first


@dataclass
class Lora:
    """Factors by module, B times alpha / r; `check` finds the model's modules."""

    name: str
    factors: dict[str, tuple[mx.array, mx.array]]  # A (r, in), B (out, r)
    metadata: dict[str, str]
    alphas: set[float] = field(default_factory=set)  # of all modules, if there are any
    fits: bool = False  # it has been checked against the model

    @classmethod
    def read(cls, path: str | Path) -> Lora:
        """Read a LoRA file or an adapter's folder, lazily."""
        path = adapter_file(str(path))
        tensors, metadata = hub.read_arrays(path)
        adapter = Adapter.read(path, metadata)
        parts: dict[str, dict[str, mx.array]] = {}
        for key, tensor in tensors.items():
            module, part = parse(path, key)
            if part in parts.setdefault(module, {}):
                raise UserError(f"LoRA {path} has two factors {part} for {module}")
            parts[module][part] = tensor
        if not parts:
            raise UserError(f"LoRA {path} has no factors")
        mx.eval([p["alpha"] for p in parts.values() if "alpha" in p])
        factors, alphas = {}, set()
        for module, p in parts.items():
            if not {"A", "B"} <= p.keys():
                raise UserError(f"LoRA {path}: missing lora_A or lora_B for {module}")
            a, b = p["A"], p["B"]
            fit = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] > 0
            if not fit or not all(mx.issubdtype(x.dtype, mx.floating) for x in (a, b)):
                shapes = f"{a.shape} {a.dtype} and {b.shape} {b.dtype}"
                raise UserError(f"LoRA {path}: {module}: factors do not fit: {shapes}")
            alpha = adapter.alpha(module, p.get("alpha"))
            if alpha is not None:
                if not math.isfinite(alpha) or alpha == 0:
                    raise UserError(f"LoRA {path}: invalid alpha {alpha} of {module}")
                rank = math.sqrt(len(a)) if adapter.use_rslora else len(a)
                b = b if alpha == rank else b.astype(mx.float32) * (alpha / rank)
                alphas.add(alpha)
            factors[module] = a, b
        return cls(path.name, factors, metadata, alphas)

    @classmethod
    def planned(cls, path: str | Path) -> Lora:
        """As `read`, but factors become zeros after their values were tested."""
        lora, changes = cls.read(path), False
        for module, pair in lora.factors.items():
            lora.check_finite(module)
            changes = changes or pair[1].any().item()
            lora.factors[module] = tuple(mx.zeros(w.shape, w.dtype) for w in pair)
        if not changes:
            note(f"LoRA {path}: all its B are 0: it changes nothing")
        return lora

    def check_finite(self, *modules: str) -> None:
        """Read modules' factors (default: all); UserError if one is not finite."""
        for module in modules or self.factors:
            for name, w in zip("AB", self.factors[module]):
                if not mx.isfinite(w).all().item():
                    where = f"LoRA {self.name}: {module}.lora_{name}"
                    raise UserError(f"{where} has NaN or infinite values")

    @property
    def nbytes(self) -> int:
        """The bytes of all factors."""
        return sum(a.nbytes + b.nbytes for a, b in self.factors.values())

    def check(self, model: nn.Module) -> None:
        """Rename modules to the model's; UserError unless each pair fits one."""
        layers = linear_layers(model)
        found = self.find(layers)
        for module, (a, b) in self.factors.items():
            path = found.get(module)
            shape = path and linear_shape(layers[path])
            if shape != (b.shape[0], a.shape[1]):
                there = f"has {shape[0]}x{shape[1]}" if shape else "has no such layer"
                other = f"LoRA {self.name} was made for another model: it changes"
                by = f"{path or module} by a matrix of {b.shape[0]}x{a.shape[1]}"
                raise UserError(f"{other} {by}, and this model {there}")
        self.factors = {found[k]: pair for k, pair in self.factors.items()}
        if len(self.factors) < len(found):
            twice = next(p for p in self.factors if [*found.values()].count(p) > 1)
            raise UserError(f"LoRA {self.name} has two factors A and B for {twice}")
        self.fits = True

    def find(self, paths: Iterable[str]) -> dict[str, str]:
        """The model's path of each module, compared as kohya writes it, with _; tools
        put names of their own in front."""
        names: dict[str, str] = {}
        for path in paths:
            head, _, rest = path.partition(".")
            other = f"{DIFFUSERS_NAMES.get(head, head)}.{rest}".strip(".")
            ends = [end for end in MLX_NAMES if path.endswith(f".{end}")]
            own = [path.removesuffix(end) + MLX_NAMES[end] for end in ends]
            names |= {name.replace(".", "_"): path for name in (other, path, *own)}
        found = {}
        for module in self.factors:
            name, between = module, "." if "." in module else "_"
            while name and name.replace(".", "_") not in names:
                name = name.partition(between)[2]
            if name:
                found[module] = names[name.replace(".", "_")]
        return found

    def describe(self, strength: float) -> str:
        """One line: what was found, and the strength."""
        ranks = {len(a) for a, _ in self.factors.values()}
        numbers = lambda n: " to ".join(f"{x:g}" for x in sorted({min(n), max(n)}))
        alpha = f"alpha {numbers(self.alphas)}" if self.alphas else "no alpha"
        what = f"{len(self.factors)} layers of rank {numbers(ranks)}, {alpha}"
        return f"LoRA {self.name}: {what}, strength {strength:g}"


def adapter_file(name: str) -> Path:
    """The file of a LoRA: the path itself, or the one of a folder of train.py or peft or
    of a Hub repository (owner/name, owner/name/file), from which it is downloaded."""
    path = user_path(name)
    if path.is_file():
        return path
    files, inner = hub.resolve(name, what="LoRA ")
    is_one = lambda name: name == inner or not inner and LORA.fullmatch(name)
    found = [f for f in files if is_one(f.name)]
    found = [f for f in found if f.name in NAMED] or found
    if len(found) != 1:
        some = ", ".join(f.name for f in found[:5]) + ", ..." * (len(found) > 5)
        many = f"has {len(found)} safetensors files: add the name of one ({some})"
        none = "is not there" if inner else "has no .safetensors file"
        raise UserError(f"LoRA {name} {many if found else none}")
    hub.fetch_all([*found, *(f for f in files if f.name == PEFT_CONFIG)])
    return found[0].path


def check_once(files: Iterable[Path]) -> None:
    """UserError if two of the files of LoRAs used together are the same."""
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            how = "pass it once, with the sum of the strengths"
            raise UserError(f"LoRA {path.name} is used twice: {how}")
        seen.add(path.resolve())


def parse(path: Path, key: str) -> tuple[str, str]:
    """The module of a key, without prefixes, and the part: "A", "B" or "alpha"."""
    name = key
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    for pattern, what in UNSUPPORTED.items():
        if re.fullmatch(pattern, name):
            raise UserError(f"LoRA {path} {what} ({key}), which is not supported")
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    if match := FACTOR.fullmatch(name):
        return match[1], {"down": "A", "up": "B"}.get(match[2], match[2])
    raise UserError(f"LoRA {path}: unrecognized key {key}")


@dataclass
class Adapter:
    """What a trainer says about a LoRA, in peft's terms."""

    peft_type: Literal["LORA"] = "LORA"
    use_dora: Literal[False, None] = False
    use_rslora: Optional[bool] = False  # alpha / sqrt(r)
    lora_alpha: Optional[float] = None
    alpha_pattern: Optional[dict[str, float]] = None  # by pattern of module names

    @classmethod
    def read(cls, path: Path, metadata: dict[str, str]) -> Adapter:
        """From peft's file, or the metadata of diffusers, kohya and others."""
        text = metadata.get("lora_adapter_metadata", "{}")
        file = path.parent / PEFT_CONFIG
        if path.name == PEFT_FILE and file.is_file():
            text = file.read_bytes()
        config = parse_json(text, f"LoRA {path}: ")
        config = {k.removeprefix("transformer."): v for k, v in config.items()}
        for key in ("ss_network_alpha", "lora_alpha", "alpha"):
            with suppress(ValueError):  # kohya writes None
                config.setdefault("lora_alpha", float(metadata.get(key, "")))
        used = {k: v for k, v in config.items() if k in cls.__dataclass_fields__}
        found = checked(cls, used, f"LoRA {path}: ")
        patterns = (found.alpha_pattern or {}).items()
        try:  # compiled from here on
            found.alpha_pattern = {re.compile(rf"(.*\.)?({k})"): a for k, a in patterns}
        except re.error as error:
            raise UserError(f"LoRA {path}: alpha_pattern: {error}") from None
        return found

    def alpha(self, module: str, tensor: Optional[mx.array]) -> Any:
        """A module's alpha: its tensor, its pattern (as in peft), or the one."""
        if tensor is not None:
            return tensor.item() if tensor.size == 1 else math.nan
        found = (a for k, a in self.alpha_pattern.items() if k.fullmatch(module))
        return next(found, self.lora_alpha)


# Layers


def linear_layers(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The linear layers by path; a LoRALinear counts as one."""
    layers = {prefix + k: m for k, m in model.named_modules()}
    inner = {f"{k}.linear" for k, m in layers.items() if isinstance(m, LoRALinear)}
    return {k: m for k, m in layers.items() if linear_shape(m) and k not in inner}


def linear_shape(layer: nn.Module) -> Optional[tuple[int, int]]:
    """Outputs and inputs of a linear layer; None for any other layer."""
    if isinstance(layer, LoRALinear):
        return linear_shape(layer.linear)
    if isinstance(layer, nn.QuantizedLinear):
        return len(layer.weight), layer.scales.shape[1] * layer.group_size
    return layer.weight.shape if isinstance(layer, nn.Linear) else None


class FusedLinear(nn.Linear):
    """A linear layer into whose weight LoRAs are fused."""


class LoRALinear(nn.Module):
    """A linear layer plus its LoRAs: x W^T + (x A^T s) B^T, where A and B hold
    the rows of all LoRAs. The strengths s (r,) are not folded into B, which 16 bits would
    round. From MERGE_FROM rows on it is faster to add B A to the dequantized weight."""

    apart = False  # always, as in training: 16 bits would round small changes away

    def __init__(self, linear: nn.Module, a: mx.array, b: mx.array, s: mx.array):
        super().__init__()
        self.linear, self.lora_a, self.lora_b, self.strength = linear, a, b, s

    bias = property(lambda self: self.linear.bias)  # its dtype is the layer's

    def __call__(self, x: mx.array) -> mx.array:
        a, b, s = (w.astype(x.dtype) for w in (self.lora_a, self.lora_b, self.strength))
        rows, linear = x.size // x.shape[-1], self.linear
        if self.apart or rows < MERGE_FROM or not isinstance(linear, QuantizedLinear):
            return linear(x) + (x @ a.T * s) @ b.T if a.size else linear(x)
        return linear(x, lambda rows: b[rows] * s @ a)


def merge(w: mx.array, factors: Iterable[tuple], stored=None) -> mx.array:
    """W + sum of s B A, computed in float32 and rounded once to the `stored` dtype of W
    (None: its own), lazily: the reference adds LoRAs to the weights as stored."""
    total = w.astype(mx.float32)
    for a, b, s in factors:
        total = total + s * (b.astype(mx.float32) @ a.astype(mx.float32))
    return total.astype(stored or w.dtype).astype(w.dtype)


def attach(
    model: nn.Module,
    loras: Sequence[tuple[Lora, float]],
    read: Optional[Callable[[list[str]], dict[str, mx.array]]] = None,
    prefix: str = "",
    stored: Optional[mx.Dtype] = None,
    apart: bool = False,
) -> None:
    """Add LoRAs, each with a strength, to the model in place of those attached before.

    They are added to the weights of unquantized layers, rounded to the checkpoint's
    `stored` dtype, unless these are to be trained `apart`; quantized layers become a
    LoRALinear. To remove LoRAs from weights, `read(keys)` returns those of the base.
    With a `prefix`, the model is a part of the checked one.
    """
    layers, changes = linear_layers(model, prefix), {}
    for lora, strength in loras:
        if not math.isfinite(strength) or strength == 0:
            text = f"LoRA {lora.name}: strength {strength} has no effect: remove it"
            raise UserError(text)
        if not prefix:
            lora.check(model)
        for module, path in lora.find(layers).items():
            changes.setdefault(path, []).append((*lora.factors[module], strength))
    fused = [k for k, layer in layers.items() if isinstance(layer, FusedLinear)]
    base = read([f"{k}.weight" for k in fused]) if fused else {}
    for path in fused:
        layers[path].weight = base[f"{path}.weight"]
        layers[path].__class__ = nn.Linear
    replaced = {k: m.linear for k, m in layers.items() if isinstance(m, LoRALinear)}
    for path, factors in changes.items():
        layer = replaced.get(path, layers[path])
        if type(layer) is nn.Linear and not apart:
            layer.weight = merge(layer.weight, factors, stored)
            layer.__class__ = FusedLinear
            continue
        a, b = zip(*(pair[:2] for pair in factors))
        s = mx.concatenate([mx.full(len(f[0]), f[2], mx.float32) for f in factors])
        a, b = mx.concatenate(a), mx.concatenate(b, axis=1)
        replaced[path] = LoRALinear(layer, a, b, s)
        replaced[path].apart = apart
    changed = [(k.removeprefix(prefix), layer) for k, layer in replaced.items()]
    model.update_modules(tree_unflatten(changed))
