"""Convert a checkpoint to a model folder: quantize, stream to disk, add card and license."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Sequence, Union

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import __version__, media
from . import quantization as rounding
from .base import UserError, dtype_name, listed, taken, user_path
from .hub import DTYPES, converted_config, folder_files, gigabytes, split_repository
from .layers import Weights
from .linear import QuantizedLinear, layer_format, layer_formats, quantize
from .lora import Lora, adapter_file, attach, check_once
from .parts import COMPONENTS, GEMMA_4
from .quantization import quant_predicate, quantization  # noqa: F401, names of the API
from .weights import FLOAT32, Checkpoint, FolderConfig, check_text_encoder, shard_names

SHARD = 5 * 10**9  # bytes a file, at most
LICENSE = "https://github.com/Lightricks/LTX-2/blob/main/LICENSE"
LICENSE_2_X = f"{LICENSE}-2_x"
OFFICIAL = {  # generation: repository, name and text of the license
    "2.0": ("Lightricks/LTX-2", "ltx-2-community-license-agreement", LICENSE),
    "2.3": ("Lightricks/LTX-2.3", "ltx-2-community-license-agreement", LICENSE),
    "2.5": ("Lightricks/LTX-2.5", "ltx-2.x-community-license-agreement", LICENSE_2_X),
}

NAMES = {"2.0": "LTX-2-19b", "2.3": "LTX-2.3-22b", "2.5": "LTX-2.5-22b"}
SAMPLE = """<!-- A clip that these weights made: upload it and remove this line and the next.
<video controls src="sample.mp4"></video> -->
"""
FLOATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

Progress = Callable[[int], Any]


@dataclass
class Conversion:
    """The recipe for a model folder; `write` converts one tensor at a time."""

    source: Checkpoint
    quantization: Optional[dict[str, Any]] = None
    dequantize: bool = False
    dtype: Optional[mx.Dtype] = None
    text_encoder: Optional[str] = None
    predicate: Callable[[str], bool] = quant_predicate
    loras: Sequence[tuple[str, float]] = ()  # files and strengths
    expected: Optional[float] = None  # error of x0 with this quantization, if measured

    def __post_init__(self):
        self.layers: Weights = {}  # before they are rounded
        self.rounded: Weights = {}  # what is made of them
        self.squares = [0.0, 0.0]  # norms of their errors and of themselves, squared
        self.mean_bits = 0.0  # a weight of the transformer's blocks
        quantized = bool(self.source.quantization)
        if self.loras and quantized:
            raise UserError("LoRAs can only be fused into unquantized weights")
        if self.quantization and quantized:
            raise UserError("the model is already quantized: use --dequantize first")
        if self.dequantize and not quantized:
            raise UserError("the model is not quantized: remove --dequantize")
        stored = self.quantization or self.source.quantization  # in the folder
        self.stored = None if self.dequantize else stored
        self._files = [(adapter_file(path), strength) for path, strength in self.loras]
        check_once(path for path, _ in self._files)
        for path, _ in self._files:
            Lora.planned(path)
        passed = self.text_encoder  # the recorded one may have been moved
        self.text_encoder = self.source.encoder(passed)
        folder = user_path(self.text_encoder)
        is_local = folder.is_dir() or passed and not split_repository(passed)[0]
        if self.source.version < GEMMA_4 and is_local:
            check_text_encoder(self.text_encoder, self.source)
            self.text_encoder = str(folder.resolve())  # from any working directory

    def weights(self, name: str) -> Weights:
        """A component's tensors as they will be written; none is rounded yet."""
        dtype = None if name in FLOAT32 else self.dtype
        weights = self.source.weights(name, dtype)
        module = self.source.build(name, weights)  # UserError if they do not fit
        module.load_weights(list(weights.items()))
        if self.loras and name == "transformer":
            # Read again each time: factors are held no longer than their layer.
            loras = [(Lora.read(path), strength) for path, strength in self._files]
            attach(module, loras)
            fused = dict(tree_flatten(module.parameters()))
            weights = {key: fused[key] for key in weights}
        for path, layer in module.named_modules() if self.dequantize else ():
            if isinstance(layer, QuantizedLinear):
                del weights[f"{path}.scales"]
                weights.pop(f"{path}.biases", None)
                weights[f"{path}.weight"] = layer.dequantized(dtype)
        if self.quantization and name in ("transformer", "gemma"):
            quantize(module, class_predicate=self.chosen)
            done = dict(tree_flatten(module.parameters()))
            self.layers = {k: w for k, w in weights.items() if done[k] is not w}
            if not self.layers:
                group = self.quantization["group_size"]
                raise UserError(f"no layer can be quantized in groups of {group}")
            if name == "transformer":
                inside = lambda x: [w for k, w in x.items() if "_blocks." in k]
                size = sum(w.size for w in inside(weights))
                self.mean_bits = 8 * sum(w.nbytes for w in inside(done)) / size
            return done
        return weights

    def chosen(self, path: str, layer: nn.Module) -> Union[bool, dict[str, Any]]:
        """How a layer is quantized: if it is chosen and groups divide its width."""
        how = layer_format(self.quantization, path)
        linear = isinstance(layer, nn.Linear) and self.predicate(path)
        return linear and layer.weight.shape[1] % how["group_size"] == 0 and how

    def tensor(self, key: str, w: mx.array) -> mx.array:
        """A tensor of `weights` as it is written; UserError if it is not finite."""
        is_rounded = key in self.layers
        w = mx.contiguous(self.rounded.pop(key, self.layers.pop(key, w)))
        mx.eval(w)
        # 0 times NaN or infinity is NaN; mx.isfinite would need more memory.
        if mx.issubdtype(w.dtype, mx.floating) and (w * 0).sum().item():
            raise UserError(f"{key} has NaN or infinite values: not converted")
        if is_rounded:
            path = key.removesuffix(".weight")
            how = layer_format(self.quantization, path)
            parts = rounding.quantize(w, **how)
            squares = rounding.squared_error(w, parts, how)
            self.squares = [a + b for a, b in zip(self.squares, squares)]
            self.rounded |= zip((f"{path}.scales", f"{path}.biases"), parts[1:])
            return parts[0]
        return w

    def files(self, name: str) -> dict[str, Weights]:
        """A component's tensors, by the file that they are written to."""
        shards, size = [{}], 0
        for key, w in self.weights(name).items():
            size += w.nbytes
            if size > SHARD and shards[-1]:
                shards, size = [*shards, {}], w.nbytes
            shards[-1][key] = w
        return dict(zip(shard_names(name, len(shards)), shards))

    @property
    def own_encoder(self) -> Optional[Path]:
        """The text encoder's folder, if it is inside the source's folder."""
        path, model = Path(self.text_encoder), self.source.files[0].path
        inside = self.source.provenance and model.parent.resolve() in path.parents
        return path if inside else None

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        source, encoder = self.source, self.own_encoder
        files = [f for f in source.files if f.role]
        origin = source.provenance or {
            "source": files[0].repo or "local files",
            "files": {f.name: f.checksum() for f in files},
        }
        recipe = {
            "quantization": layer_formats(self.stored).get(""),
            "dtype": self.dtype and dtype_name(self.dtype),
            "loras": {Path(path).name: strength for path, strength in self.loras},
        }
        tool = f"ltx2 {__version__}, mlx {mx.__version__}"
        facts = {key: getattr(source, key) for key in FolderConfig.__dataclass_fields__}
        facts["text_encoder"] = encoder.name if encoder else self.text_encoder
        facts["provenance"] = {**origin, "tool": tool, "recipe": recipe}
        facts["quantization"] = facts["quantization_config"] = self.stored
        return {**source.config, **{k: v for k, v in facts.items() if v}}

    @property
    def hub_name(self) -> str:
        """The name that mlx-community gives it, like LTX-2.3-22b-distilled-4bit."""
        how = FLOATS[dtype_name(self.dtype or mx.bfloat16)]
        if q := layer_formats(self.stored).get(""):
            how = f"{q['bits']}bit" if q["mode"] == "affine" else q["mode"]
        return f"{NAMES[self.source.generation]}-{self.source.kind}-{how}"

    def summary(self) -> str:
        """How the weights are quantized, and with which error, for the card."""
        if not (how := layer_formats(self.stored)):
            return "The weights are not quantized."
        several = lambda key: ", ".join(sorted({str(f[key]) for f in how.values()}))
        gemma = " and the text encoder's" if "gemma" in self.source.parts else ""
        bits = f"{several('bits')} bits ({several('mode')})"
        groups = f"in groups of {several('group_size')}"
        text = f"The transformer's{gemma} blocks are quantized: {bits} {groups}"
        if self.mean_bits:
            text += f", {self.mean_bits:.2f} bits per weight with scales"
        if self.squares[1]:
            error = (self.squares[0] / self.squares[1]) ** 0.5
            text += f". Rounding changed these weights by {error:.1%} (relative norm)"
        if self.expected is not None:
            text += f"; {self.expected:.2g} is expected as the relative error of x0"
        return f"{text}."

    def write(
        self,
        folder: Path,
        overwrite: bool = False,
        name: Optional[str] = None,
        progress: Progress = lambda size: None,
        peaks: Callable[[Path], str] = lambda folder: "",
    ) -> None:
        """Write the model folder completely or not at all. `name` and `peaks` (its
        memory) are for the model card; `progress` gets numbers of bytes."""
        folder = user_path(folder).resolve()
        check_target(folder, overwrite)
        with media.workspace(folder, ".*") as hidden:
            partial = Path(hidden, "new")
            partial.mkdir()
            self._write_files(partial, progress)
            sizes = (path.stat().st_size for path in partial.rglob("*.safetensors"))
            rows = {"size": gigabytes(sum(sizes)), "weights": self.summary()}
            rows["peak memory, computed"] = peaks(partial)
            names = name or folder.name, self.source.generation
            card = model_card(self.config(), *names, rows)
            (partial / "README.md").write_text(card, "utf-8", "replace")

    def _write_files(self, partial: Path, progress: Progress) -> None:
        for part in self.source.components:
            index, files = {}, self.files(part)
            for file, weights in files.items():
                index.update(dict.fromkeys(weights, file))
                self.write_file(partial / file, weights, progress)
            if len(files) > 1:
                path = partial / f"{part}.safetensors.index.json"
                path.write_text(json.dumps({"weight_map": index}, indent=2), "utf-8")
        if self.own_encoder:
            shutil.copytree(self.own_encoder, partial / self.own_encoder.name)
        config = self.config()
        (partial / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        for f in self.source.files:
            if f.name.startswith("LICENSE"):
                shutil.copyfile(f.fetch(), partial / "LICENSE.md")

    def write_file(self, path: Path, weights: Weights, progress: Progress) -> None:
        """Write a safetensors file, one tensor in memory; empties the dictionary."""
        names = {dtype: name for name, dtype in DTYPES.items() if name != "F8_E4M3"}
        header, end = {"__metadata__": {"format": "mlx"}}, 0
        for key, w in weights.items():
            span = [end, end := end + w.nbytes]
            header[key] = dict(dtype=names[w.dtype], shape=w.shape, data_offsets=span)
        start = json.dumps(header).encode()
        padding = b" " * (-len(start) % 8)
        with open(path, "wb") as f:
            f.write(len(start + padding).to_bytes(8, "little") + start + padding)
            for key in list(weights):
                w = self.tensor(key, weights.pop(key))
                # Python has no bfloat16; as bytes there could be more than 2^31 elements.
                f.write(memoryview(w.view(mx.uint16) if w.dtype == mx.bfloat16 else w))
                progress(w.nbytes)
                del w
                mx.clear_cache()


def check_target(folder: Path, overwrite: bool) -> None:
    """UserError for a target that contains anything but a converted model."""
    if not taken(folder):
        return
    if not overwrite:
        raise UserError(f"{folder} exists: pass --overwrite to replace it")
    if not (config := converted_config(folder_files(folder))):
        raise UserError(f"{folder} is not a converted model; refusing to overwrite it")
    own = ["config.json", "README.md", "LICENSE.md", "LICENSE"]
    own += [config.json().get("text_encoder")]
    own += [".cache", ".gitattributes"]  # of the Hub
    names = "|".join(map(re.escape, COMPONENTS))
    part = re.compile(rf"({names})(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    for path in listed(folder):
        if not part.fullmatch(path.name) and path.name not in own:
            raise UserError(f"{folder} also holds {path.name}: move it away first")


def model_card(config: dict, name: str, generation: str, rows: dict[str, str]) -> str:
    """README.md of a model folder, with the metadata that the Hub reads."""
    origin, (repo, *license) = config["provenance"], OFFICIAL[generation]
    base = origin["source"] if "/" in origin["source"] else repo
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    relation = "quantized" if "quantization" in config else ""
    return f"""{card_head(name, (base, *license), relation, "mlx, ltx-2")}
LTX-2 {generation} ({config["kind"]}) for MLX: video with sound from a prompt.

| | |
|---|---|
{table}

```bash
python generate.py --model {shlex.quote(name)} --prompt "..."
```

{SAMPLE}
**Notice of change.** These files were made by {origin["tool"]} from
{", ".join(origin["files"])} of [{base}](https://huggingface.co/{base}): tensors are
renamed, laid out for MLX, split by component, and quantized as described above. They
remain under the [{license[0]}]({license[1]}).
"""


def card_head(name: str, base: Sequence[str], relation: str, tags: str) -> str:
    """The start of a card, with the metadata that the Hub reads; `base` is a repository,
    name and text of its license, as in OFFICIAL."""
    relation = f"base_model_relation: {relation}\n" * bool(relation)
    return f"""---
base_model: {base[0]}
{relation}library_name: mlx
pipeline_tag: text-to-video
license: other
license_name: {base[1]}
license_link: {base[2]}
tags: [{tags}, text-to-audio-video]
---

# {name}
"""
