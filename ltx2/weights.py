"""Checkpoints: official files and converted folders, checked and strictly loaded."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import (
    Any,
    Container,
    Iterable,
    Iterator,
    Literal,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
)

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import hub
from .base import UserError, checked
from .hub import File
from .linear import quantize
from .parts import (
    COMPONENTS,
    KINDS,
    Part,
    Parts,
    best,
    check_config,
    check_part,
    check_version,
    claims,
    config_errors,
    first_file,
    generation,
    limit_depth,
    own_section,
    parse_version,
    read_parts,
)
from .upsampler import UpsamplerConfig

TEXT_ENCODER = "mlx-community/gemma-3-12b-it-qat-4bit"
GEMMA_4 = (2, 4)  # the first version that packs its own text encoder
# Computed in float32 whatever the dtype: the vocoder as in the reference, the other
# convolutions because Metal's fast ones lose up to 5 % a layer in 16 bits.
FLOAT32 = ("vae", "audio_vae", "vocoder", "spatial_upsampler", "temporal_upsampler")
FLOAT32 += ("spatial_upsampler_x1.5",)

Weights = dict[str, mx.array]


@dataclass
class Quantization:
    """How layers are quantized: the arguments of mx.quantize."""

    group_size: Literal[16, 32, 64, 128]
    bits: Literal[2, 3, 4, 5, 6, 8]
    mode: Literal["affine", "mxfp4", "nvfp4", "mxfp8"] = "affine"


@dataclass
class FolderConfig:
    """What config.json of a converted folder has beside the checkpoint's sections."""

    model_type: str
    model_version: str
    kind: str
    text_encoder: str
    provenance: dict[str, Any]
    quantization: Optional[Quantization] = None
    quantization_config: Optional[Quantization] = None  # the same, as the Hub reads it
    defaults: dict[str, Any] = field(default_factory=dict)


class Problem(NamedTuple):
    """A file that is not used: the components it seems to hold, and why."""

    components: set[str]
    text: str


# Models


@dataclass
class Checkpoint:
    """A model as its headers and its configuration describe it; nothing is read yet."""

    model_version: str
    kind: str  # "dev" or "distilled"
    kind_assumed: bool  # neither chosen nor in the file's name
    config: dict[str, dict[str, Any]]  # the checkpoint's sections
    parts: Parts
    others: list[File] = field(default_factory=list)  # config.json and the license
    quantization: Optional[dict[str, Any]] = None
    text_encoder: str = TEXT_ENCODER
    provenance: Optional[dict[str, Any]] = None  # of converted models
    defaults: dict[str, Any] = field(default_factory=dict)  # the video's size and rate
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self):
        parse_version(self.model_version)
        self.parts = {k: self.parts[k] for k in COMPONENTS if k in self.parts}
        for name, tensors in self.parts.items():
            check_config(name, self.config, tensors)

    @property
    def files(self) -> list[File]:
        """The files that are used."""
        used = (f for tensors in self.parts.values() for f, _ in tensors.values())
        return [*dict.fromkeys(used), *self.others]

    @property
    def version(self) -> tuple[int, ...]:
        return parse_version(self.model_version)

    @property
    def generation(self) -> str:
        """ "2.0", "2.3" or "2.5"."""
        return generation(self.version)

    @property
    def components(self) -> list[str]:
        return list(self.parts)

    def require(self, *names: str) -> None:
        """Raise UserError for parts that this model does not have."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            problems = [p.text for p in self.problems if p.components & {*missing}]
            reasons = f" (not used: {'; '.join(problems[:3])})" if problems else ""
            raise UserError(
                f"missing model parts: {', '.join(missing)}{reasons}; place their files "
                "next to the others, or pass --part NAME=FILE"
            )

    def check(self, *names: str) -> None:
        """Raise UserError for components that are missing or whose tensors do not match
        their configuration or each other; only headers are read."""
        self.require(*names)
        for name in names:
            self.build(name, self.weights(name))
        keys = {"transformer": "in_channels", "vae": "latent_channels"}
        latent = {
            name: self.config[name].get(keys.get(name, "in_channels"), 128)
            for name in names
            if name in ("transformer", "vae") or "upsampler" in name
        }
        if len(set(latent.values())) > 1:
            sizes = ", ".join(f"{name} {n}" for name, n in latent.items())
            raise UserError(f"parts of different models: latent channels are {sizes}")

    def encoder(self, name: Optional[str] = None) -> str:
        """The text encoder to use: the model's, or `name` if that is possible."""
        if self.version >= GEMMA_4 and name not in (None, self.text_encoder):
            raise UserError(
                f"LTX-2 {self.model_version} has its own Gemma 4 and cannot use {name}: "
                "remove --text-encoder"
            )
        return name or self.text_encoder

    def weights(self, name: str, dtype: Optional[mx.Dtype] = None) -> Weights:
        """A component's tensors, lazily, with its module's names and layouts; floating
        ones cast to `dtype`, fp8 decoded to bfloat16."""
        self.require(name)
        part = self.parts[name]
        arrays = {f: f.arrays() for f in {f for f, _ in part.values()}}
        weights = {inner: arrays[f][key] for inner, (f, key) in part.items()}
        if any(f.metadata.get("format") != "mlx" for f in arrays):
            fp8 = [k for k, (f, key) in part.items() if f.header[key][0] == "F8_E4M3"]
            weights = COMPONENTS[name][1].sanitize(decode_fp8(weights, fp8))
        if dtype is not None:
            for key, w in weights.items():
                if mx.issubdtype(w.dtype, mx.floating):
                    weights[key] = w.astype(dtype)
        return weights

    def build(self, name: str, weights: Weights) -> nn.Module:
        """The component as configured, not loaded; `weights` must fit it exactly."""
        section, component = COMPONENTS[name]
        file = first_file(self.parts[name]).name
        shapes = {key: w.shape for key, w in weights.items()}
        with config_errors(file):
            limit_depth(self.config[section], sum(map(len, self.parts.values())))
            sized = component.infer_sizes(self.config[section], shapes)
            module = component.from_config(sized)
        mx.eval(
            mx.random.state
        )  # initial values, never computed, make its graph longer
        if any(key.endswith(".scales") for key in weights):
            options, picked = self.quantization, lambda k, _: f"{k}.scales" in weights
            try:
                quantize(module, **options, class_predicate=picked)
            except (TypeError, ValueError):
                raise UserError(f"{file} cannot be quantized with {options}") from None
        expected = {key: p.shape for key, p in tree_flatten(module.parameters())}
        wrong = [
            f"{key} is {shapes.get(key, 'missing')}, not {expected.get(key, 'expected')}"
            for key in sorted(expected.keys() | shapes.keys())
            if expected.get(key) != shapes.get(key)
        ]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(
                f"{file}: {name} tensors do not match its config: "
                f"{'; '.join(wrong[:5])}{more}"
            )
        return module

    def load(
        self, name: str, dtype: Optional[mx.Dtype] = None, lazy: bool = False
    ) -> nn.Module:
        """A component with its weights; only its own files are opened.

        `dtype` casts floating weights (except FLOAT32). With `lazy` they are read when
        they are first used, else now, in groups, so that no command buffer waits long
        for the disk. Raises UserError if a tensor is missing, unknown or of another
        shape than the configuration says.
        """
        weights = self.weights(name, mx.float32 if name in FLOAT32 else dtype)
        if name in FLOAT32:  # a permuted kernel would be copied by each convolution
            weights = {key: mx.contiguous(w) for key, w in weights.items()}
        module = self.build(name, weights)
        module.load_weights(list(weights.items()))
        if not lazy:
            # What is computed, not only read, is held twice: in small groups.
            found = {f.header[key][0] for f, key in self.parts[name].values()}
            floats = {hub.DTYPES[kind] for kind in found if "F" in kind}
            read = name not in FLOAT32 and floats == {dtype}
            evaluate(weights.values(), 1 << (28 if read else 22))
        return module


def open_model(
    name: str,
    kind: Optional[str] = None,
    file: Optional[str] = None,
    upsamplers: Sequence[str] = (),
    fetch: bool = True,
    parts: Optional[Mapping[str, str]] = None,
) -> Checkpoint:
    """A model from an official file or folder, a converted folder, or the Hub.

    `kind` overrides what the name says, `file` chooses a checkpoint, `upsamplers` replace
    those next to it, `parts` are files by component. Files to download are listed first;
    without `fetch` only headers and config.json are. Raises UserError if no model is found.
    """
    parts, (files, file) = parts or {}, hub.resolve(name, file)
    files = hub.choose(name, files, file)
    if files[0].name == "config.json":
        model = converted_checkpoint(files)
    else:
        model = official_checkpoint(files, parts)
    found = [f for f in files if f.role == "upsampler"]
    if upsamplers:  # instead of a converted folder's own, too
        model.parts = {k: v for k, v in model.parts.items() if "upsampler" not in k}
        found = []
    for f in found:
        try:
            add_upsampler(model, f)
        except UserError as error:
            model.problems.append(
                Problem({c for c in COMPONENTS if "upsampler" in c}, str(error))
            )
    for other in upsamplers:
        add_upsampler(model, hub.single_file(other))
    for part, other in parts.items():
        replace_part(model, part, hub.single_file(other))
    if kind is not None:
        model.kind, model.kind_assumed = kind, False
    if model.kind not in KINDS:
        raise UserError(f"kind must be {' or '.join(KINDS)}, got {model.kind!r}")
    if fetch:
        hub.fetch_all(model.files)
    return model


# Official files


def official_checkpoint(files: list[File], skip: Container[str] = ()) -> Checkpoint:
    """A model from released files: the checkpoint first, then files that may hold other
    parts. Those that do not fit are remembered, in case that a part is missing; of
    several that do, the best is used and noted, except for the components to `skip`."""
    first, *rest = files
    if first.role in ("lora", "upsampler"):
        option = {"lora": "a LoRA", "upsampler": "an upsampler"}[first.role]
        raise UserError(f"{first.name} is {option}: pass it with --{first.role}")
    found = read_parts(first)
    if "transformer" not in {component for component, _ in found}:
        held = ", ".join({c: 0 for c, _ in found}) or "no part of LTX-2"
        raise UserError(f"{first.name} is not a model, it holds {held}")
    config = found["transformer", ""].config
    kind = re.search(r"(?<![a-z])(dev|distilled)(?![a-z])", first.name.lower())
    model = Checkpoint(
        check_version(first, config),
        kind[0] if kind else "dev",
        not kind,
        config,
        {"transformer": found["transformer", ""].tensors},
        [f for f in rest if f.name.startswith("LICENSE")],
    )
    if model.version >= GEMMA_4:
        model.text_encoder = "gemma"
    candidates: dict[tuple[str, str], list[Part]] = {}
    for f in (f for f in rest if f.role in ("part", "checkpoint")):
        try:
            for piece, part in read_parts(f).items():
                check_part(part, piece[0], model.version, first)
                candidates.setdefault(piece, []).append(part)
        except hub.Unreachable:
            raise
        except UserError as error:
            model.problems.append(Problem(claims(f), str(error)))
    for piece, parts in candidates.items():
        if piece not in found:
            found[piece] = best(piece[0], parts, model.kind, piece[0] not in skip)
    for (component, _), part in found.items():
        add_part(model, component, part)
    absent = {s for c, (s, _) in COMPONENTS.items()} - {
        COMPONENTS[c][0] for c in model.parts
    }
    model.config = {k: v for k, v in model.config.items() if k not in absent}
    model.__post_init__()
    return model


def add_part(model: Checkpoint, component: str, part: Part) -> None:
    model.config.update(own_section(component, part))
    model.parts.setdefault(component, {}).update(part.tensors)


def replace_part(model: Checkpoint, name: str, f: File) -> None:
    """Take a component from a file that the user named."""
    names = [c for c in COMPONENTS if c != "transformer" and "upsampler" not in c]
    if name not in names:
        raise UserError(f"unknown part {name!r}: choose from {', '.join(names)}")
    found = {piece: part for piece, part in read_parts(f).items() if piece[0] == name}
    if not found:
        raise UserError(f"{f.name} does not hold the {name}")
    for (_, piece), part in found.items():
        checkpoint = first_file(model.parts["transformer"])
        check_part(part, name, model.version, checkpoint)
        old = model.parts.pop(name, {}) if piece else {}  # other pieces stay
        kept = {k: v for k, v in old.items() if not k.startswith(f"{piece}.")}
        model.parts[name] = kept
        add_part(model, name, part)
    model.__post_init__()


def add_upsampler(model: Checkpoint, f: File) -> None:
    """Add an official upsampler's file; its name says which generation it is for."""
    if f.role != "upsampler":
        raise UserError(f.problem or f"{f.name} is not a latent upsampler")
    version = re.match(r"ltx-(2[\d.]*)-", f.name.split("/")[-1])
    if version and generation(parse_version(version[1])) != model.generation:
        raise UserError(f"{f.name} does not go with LTX-2 {model.model_version}")
    with config_errors(f.name):
        c = UpsamplerConfig.from_dict(f.config)
    axis = "temporal" if c.temporal_upsample else "spatial"
    scale = "" if c.spatial_scale in (1, 2) else f"_x{c.spatial_scale:g}"
    name = f"{axis}_upsampler{scale}"
    if name not in COMPONENTS:
        raise UserError(f"{f.name}: {name} is not implemented")
    model.config[name] = f.config
    model.parts[name] = {key: (f, key) for key in f.keys}


# Converted folders


def converted_checkpoint(files: list[File]) -> Checkpoint:
    """A folder that `Conversion.write` made, checked to be complete."""
    config, names = files[0].json(), {f.name for f in files}
    parts: Parts = {}
    expected: set[str] = set()
    for f in files:
        shard = re.fullmatch(r"(.+?)(?:-\d+-of-(\d+))?\.safetensors", f.name)
        if shard and shard[1] in COMPONENTS:
            if f.problem:
                raise UserError(f.problem)
            # Of more shards than files, one of the first is missing.
            expected.update(
                islice(shard_names(shard[1], int(shard[2] or 1)), len(files))
            )
            parts.setdefault(shard[1], {}).update({key: (f, key) for key in f.keys})
    for name, (section, _) in COMPONENTS.items():
        if section in config and name not in parts:
            expected.add(f"{name}.safetensors")
    if expected - names:
        raise UserError(f"the model lacks {', '.join(sorted(expected - names)[:5])}")
    path = f"{files[0].path}: "
    known = FolderConfig.__dataclass_fields__.keys() & config.keys()
    found = checked(FolderConfig, {key: config.pop(key) for key in known}, path)
    for key, kind in {"source": str, "files": dict[str, str]}.items():
        checked(kind, found.provenance.get(key), f"{path}provenance.{key}")
    inside = files[0].path.parent / found.text_encoder
    return Checkpoint(
        found.model_version,
        found.kind,
        False,
        config,
        parts,
        [f for f in files if not f.name.endswith(".safetensors")],
        asdict(found.quantization) if found.quantization else None,
        str(inside) if inside.is_dir() else found.text_encoder,
        found.provenance,
        found.defaults,
    )


def shard_names(name: str, count: int) -> Iterator[str]:
    """Names of `count` files of a component."""
    for i in range(count):
        shard = f"-{i + 1:05d}-of-{count:05d}" if count > 1 else ""
        yield f"{name}{shard}.safetensors"


# Text encoders in folders


def text_encoder_files(name: str) -> list[File]:
    """The files of a text encoder's folder or repository that are used."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UserError(
            f"text encoder {name} is a single file without tokenizer: pass a folder or "
            f"repository like {TEXT_ENCODER}"
        )
    if not folder.is_dir() and "/" not in name:
        raise UserError(f"text encoder {name}: no such folder")
    found = hub.folder_files(folder) if folder.is_dir() else hub.repository_files(name)
    kinds = (".safetensors", ".json", ".model")
    return [f for f in found if f.name.endswith(kinds)]


def check_text_encoder(name: str) -> None:
    """Raise UserError unless a Gemma 3 folder or repository is complete: configuration,
    tokenizer, all shards, all layers' tensors. Only headers are read."""
    files = {f.name: f for f in text_encoder_files(name)}
    if "config.json" not in files or not {"tokenizer.json", "tokenizer.model"} & {
        *files
    }:
        lacks = "tokenizer" if "config.json" in files else "config.json"
        raise UserError(f"text encoder {name} has no {lacks}")
    config = files["config.json"].json()
    path = f"text encoder {name}, config.json: "
    section = checked(dict, config.get("text_config", config), f"{path}text_config")
    layers = section.get("num_hidden_layers", 26)
    layers = checked(int, layers, f"{path}num_hidden_layers", 1000)
    if "model.safetensors.index.json" in files:
        index = files["model.safetensors.index.json"].json().get("weight_map")
        shards = {
            *checked(dict[str, str], index, f"text encoder {name}: weight_map").values()
        }
        if shards - files.keys():
            lacks = ", ".join(sorted(shards - files.keys())[:5])
            raise UserError(f"text encoder {name} lacks {lacks}: download it again")
    shards = [
        f for f in files.values() if re.fullmatch(r"model.*\.safetensors", f.name)
    ]
    for f in shards:
        if f.problem:
            raise UserError(f"text encoder {name}: {f.problem}")
    keys = {key for f in shards for key in f.keys}
    prefix = "language_model.model." if "text_config" in config else "model."
    leaves = {k.split(".0.", 1)[1] for k in keys if k.startswith(f"{prefix}layers.0.")}
    expected = {f"{prefix}layers.{i}.{leaf}" for i in range(layers) for leaf in leaves}
    expected |= {f"{prefix}{k}.weight" for k in ("embed_tokens", "norm")}
    missing = sorted(expected - keys)
    if missing or not leaves:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        example = f"it has {min(keys)}" if keys else "it has no weights"
        name = f"text encoder {name} lacks {missing[0] if missing else 'layers'}{more}"
        raise UserError(f"{name}; {example}")


def fetch_text_encoder(name: str) -> Path:
    """The folder of a text encoder in Hugging Face's layout, downloaded if needed."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        files = text_encoder_files(name)
        hub.fetch_all(files)
        folder = files[0].fetch().parent
    return folder


# Tensors


def decode_fp8(weights: Weights, names: Iterable[str]) -> Weights:
    """Official fp8 layers, weight times weight_scale, as bfloat16; input_scale is for
    fp8 activations, which are not used here."""
    for name in names:
        w = mx.from_fp8(weights[name], mx.float32)
        scale = weights.pop(f"{name}_scale", mx.array(1.0))
        if scale.size != 1:
            raise UserError(f"{name}: block-scaled fp8 is not supported")
        w = w * scale
        weights.pop(f"{name.removesuffix('weight')}input_scale", None)
        weights[name] = w.astype(mx.bfloat16)
    return weights


def evaluate(arrays: Iterable[mx.array], limit: int = 1 << 28) -> None:
    """Evaluate arrays in groups of about `limit` bytes: several files' tensors are read
    at a time, and what they are computed from is held for one group at a time."""
    group, size = [], 0
    for x in arrays:
        group.append(x)
        size += x.nbytes
        if size >= limit:
            mx.eval(group)
            group, size = [], 0
    mx.eval(group)
