"""From a source to a model folder for MLX: quantised, streamed, with its papers."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import mlx.core as mx

from . import __version__
from .base import UserError
from .hub import DTYPES, File
from .lora import Lora, fuse
from .weights import FLOAT32, Checkpoint, Weights, shard_names

SHARD = 5 * 10**9  # bytes a file, at most
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
LICENCE = "https://github.com/Lightricks/LTX-2/blob/main/LICENSE"
OFFICIAL = {  # generation: repository, name and text of the licence
    "2.0": ("Lightricks/LTX-2", "ltx-2-community-license-agreement", LICENCE),
    "2.3": ("Lightricks/LTX-2.3", "ltx-2-community-license-agreement", LICENCE),
    "2.5": (
        "Lightricks/LTX-2.5",
        "ltx-2.x-community-license-agreement",
        f"{LICENCE}-2_x",
    ),
}

Progress = Callable[[int], Any]


def quantization(
    mode: str = "affine", bits: Optional[int] = None, group_size: Optional[int] = None
) -> dict[str, Any]:
    """The arguments of `mx.quantize`; only affine leaves a choice of bits and groups."""
    groups, default = MODES[mode]
    how = {"group_size": group_size or groups, "bits": bits or default, "mode": mode}
    if mode != "affine" and (how["group_size"], how["bits"]) != MODES[mode]:
        raise UserError(f"{mode} means {default} bits in groups of {groups}")
    return how


def block_linears(path: str) -> bool:
    """Attention and feed-forward of the blocks of the transformer and of Gemma, which
    are quantised by default; gates, modulations and projections are small and sensitive.
    """
    layer = r"transformer_blocks\.\d+\.\w+\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)"
    gemma = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    return re.fullmatch(f"{layer}|{gemma}", path) is not None


def quantize(weights: Weights, how: dict, predicate: Callable[[str], bool]) -> Weights:
    """Quantise the linear layers that `predicate` picks by path, where the group size
    divides their width."""
    done: Weights = {}
    for key, w in weights.items():
        path, _, leaf = key.rpartition(".")
        fits = leaf == "weight" and w.ndim == 2 and w.shape[1] % how["group_size"] == 0
        if fits and predicate(path):
            keys = (key, f"{path}.scales", f"{path}.biases")
            done.update(zip(keys, mx.quantize(w, **how)))
        else:
            done[key] = w
    if len(done) == len(weights):
        raise UserError(f"no layer can be quantised in groups of {how['group_size']}")
    return done


def dequantize(weights: Weights, how: dict, dtype: Optional[mx.Dtype]) -> Weights:
    """The opposite of `quantize`, but for what was lost."""
    done = dict(weights)
    for path in [key[: -len(".scales")] for key in weights if key.endswith(".scales")]:
        rest = [done.pop(f"{path}.{leaf}", None) for leaf in ("scales", "biases")]
        w = mx.dequantize(done[f"{path}.weight"], *rest, **how, dtype=dtype)
        done[f"{path}.weight"] = w
    return done


@dataclass
class Conversion:
    """What shall become of a source. All is lazy until `write`, which reads, converts
    and writes one tensor after the other."""

    source: Checkpoint
    quantization: Optional[dict[str, Any]] = None
    dequantize: bool = False
    dtype: Optional[mx.Dtype] = None
    text_encoder: Optional[str] = None
    predicate: Callable[[str], bool] = block_linears
    loras: Sequence[tuple[str, float]] = ()  # files and strengths

    def __post_init__(self):
        if self.loras and self.source.quantization:
            raise UserError(
                "a LoRA is fused before quantising: take unquantised weights"
            )
        if self.quantization and self.source.quantization:
            raise UserError("the model is quantised already: --dequantize it first")
        self.source.encoder(self.text_encoder)
        if self.dequantize and not self.source.quantization:
            raise UserError("the model is not quantised: nothing to dequantize")

    def weights(self, name: str) -> Weights:
        """A component's tensors as they will be written."""
        dtype = None if name in FLOAT32 else self.dtype
        weights = self.source.weights(name, dtype)
        module = self.source.module(name, weights)  # or a UserError: they do not fit
        if self.loras and name == "transformer":
            # Read anew each time, so that factors are held no longer than their layer.
            loras = [(Lora.read(path), strength) for path, strength in self.loras]
            for lora, _ in loras:
                lora.check(module)
            weights = fuse(weights, loras)
        if self.dequantize:
            return dequantize(weights, self.source.quantization, dtype)
        if self.quantization and name in ("transformer", "gemma"):
            return quantize(weights, self.quantization, self.predicate)
        return weights

    def files(self, name: str) -> dict[str, Weights]:
        """A component's tensors by the file they go to."""
        shards: list[Weights] = [{}]
        size = 0
        for key, w in self.weights(name).items():
            size += w.nbytes
            if size > SHARD and shards[-1]:
                shards.append({})
                size = w.nbytes
            shards[-1][key] = w
        return dict(zip(shard_names(name, len(shards)), shards))

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        source, dtype = self.source, self.dtype
        how = self.quantization or (None if self.dequantize else source.quantization)
        weights = [f for f in source.files if f.role]
        origin = source.provenance or {
            "source": weights[0].repo or "local files",
            "files": {f.name: f.checksum() for f in weights},
        }
        return {
            "model_type": "ltx2",
            "model_version": source.model_version,
            "kind": source.kind,
            **source.config,
            **({"quantization": how, "quantization_config": how} if how else {}),
            "text_encoder": source.encoder(self.text_encoder),
            **({"defaults": source.defaults} if source.defaults else {}),
            "provenance": {
                **origin,
                "tool": f"ltx2 {__version__}, mlx {mx.__version__}",
                "recipe": {
                    "quantization": how,
                    "dtype": dtype and str(dtype)[9:],
                    "loras": {Path(path).name: s for path, s in self.loras},
                },
            },
        }

    def write(
        self,
        folder: Path,
        overwrite: bool = False,
        name: Optional[str] = None,
        progress: Progress = lambda size: None,
    ) -> None:
        """Write the model folder, whole or not at all: it grows beside its place and is
        renamed at the end. `name` is for the model card; `progress` hears of bytes."""
        check_target(folder, overwrite)
        growing, old = (folder.with_name(f".{folder.name}.{s}") for s in ("new", "old"))
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        try:
            for part in self.source.components:
                index, files = {}, self.files(part)
                for file, weights in files.items():
                    index.update(dict.fromkeys(weights, file))
                    write_safetensors(growing / file, weights, progress)
                if len(files) > 1:
                    path = growing / f"{part}.safetensors.index.json"
                    path.write_text(json.dumps({"weight_map": index}, indent=2))
            config = self.config()
            (growing / "config.json").write_text(json.dumps(config, indent=2))
            card = model_card(config, self.source.generation, name or folder.name)
            (growing / "README.md").write_text(card)
            for f in self.source.files:
                if f.name.startswith("LICENSE"):
                    shutil.copyfile(f.fetch(), growing / "LICENSE.md")
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            growing.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(growing, ignore_errors=True)


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is in the way, and to replace what is no model."""
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder} exists: --overwrite replaces it")
    config = folder / "config.json"
    if not config.is_file() or not File(config.name, 0, config).is_ours:
        raise UserError(f"{folder} holds no converted model, so it is not replaced")


def write_safetensors(path: Path, weights: Weights, progress: Progress) -> None:
    """Write tensors and empty the dictionary: only one at a time is in memory."""
    names = {dtype: name for name, dtype in DTYPES.items() if name != "F8_E4M3"}
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for key, w in weights.items():
        offsets = [end, end := end + w.nbytes]
        header[key] = dict(dtype=names[w.dtype], shape=w.shape, data_offsets=offsets)
    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    with open(path, "wb") as f:
        f.write(len(start).to_bytes(8, "little") + start)
        for key in list(weights):
            w = mx.contiguous(weights.pop(key))
            # Python has no bfloat16; as bytes there could be more than 2^31 elements.
            f.write(memoryview(w.view(mx.uint16) if w.dtype == mx.bfloat16 else w))
            progress(w.nbytes)
            del w
            mx.clear_cache()


def model_card(config: dict[str, Any], generation: str, name: str) -> str:
    """README.md of a model folder, with the metadata that the Hub reads."""
    from huggingface_hub import ModelCardData

    repo, licence, link = OFFICIAL[generation]
    origin, how = config["provenance"], config.get("quantization")
    base = origin["source"] if "/" in origin["source"] else repo
    data = ModelCardData(
        base_model=base,
        library_name="mlx",
        pipeline_tag="text-to-video",
        license="other",
        license_name=licence,
        license_link=link,
        tags=["ltx-2", "text-to-audio-video"],
    )
    gemma = " and the text encoder's" if generation == "2.5" else ""
    quantized = (
        f"The transformer's{gemma} blocks are "
        "quantised: {bits} bits ({mode}) in groups of {group_size}."
    )
    return f"""---
{data.to_yaml()}
---

# {name}

LTX-2 {generation} ({config["kind"]}) for MLX, video with its sound from a prompt:

    python generate.py --model {name} --prompt "..."

{quantized.format(**how) if how else "Nothing is quantised."}

**Notice of change.** These files were made by {origin["tool"]} from
{", ".join(origin["files"])} of [{base}](https://huggingface.co/{base}): tensors are
renamed, laid out for MLX, split by component, and quantised as said above. They remain
under the [{licence}]({link}).
"""
