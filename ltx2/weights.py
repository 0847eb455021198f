"""Checkpoints: official files and converted folders, checked and strictly loaded."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cache, partialmethod
from itertools import islice
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import hub, media, parts
from .base import UserError, checked, user_path
from .hub import File
from .layers import Weights
from .linear import Quantization, layer_formats, quantize_stored
from .parts import COMPONENTS, GEMMA_4, KINDS, UPSAMPLERS, Parts, Tensors, read_chosen
from .text import TOKENIZERS, text_name

TEXT_ENCODER = "mlx-community/gemma-3-12b-it-qat-4bit"
# Computed in float32 whatever the dtype: the vocoder as in the reference, the other
# convolutions because Metal's fast ones lose up to 5 % a layer in 16 bits.
FLOAT32 = ("vae", "audio_vae", "vocoder", *UPSAMPLERS)
# Of a video, where neither the request nor the folder's `defaults` have them
SIZE = {"height": 512, "width": 768, "num_frames": 121, "fps": 24.0}
SMALL_GROUP = 1 << 20  # bytes to evaluate at a time, if they are computed


@dataclass(kw_only=True)
class FolderConfig:
    """The keys of a converted folder's config.json, except the checkpoint's sections."""

    model_type: str = "ltx2"
    model_version: str
    kind: str  # "dev" or "distilled"
    text_encoder: str
    provenance: Optional[dict[str, Any]]  # None: not converted
    quantization: Optional[dict[str, Any]] = None
    quantization_config: Optional[dict[str, Any]] = None  # the same, for the Hub
    defaults: dict[str, Any] = field(default_factory=dict)  # of videos and training


@dataclass(kw_only=True)
class Checkpoint(FolderConfig):
    """A model as its headers and configuration describe it; no weights are read yet."""

    kind_assumed: bool = False  # neither chosen nor in the file's name
    problems: Sequence[parts.Problem] = ()
    config: dict[str, dict[str, Any]]  # the checkpoint's sections, and its parts'
    found: InitVar[Parts]
    parts: dict[str, Tensors] = field(init=False)
    others: list[File]  # config.json and the license
    # What `open_model` was given
    opened: dict[str, Any] = field(default_factory=lambda: {"model": ""})

    def __post_init__(self, found: Parts):
        parts.parse_version(self.model_version)
        sizes = {k: v for k, v in self.defaults.items() if k in SIZE}
        checked(dict[str, float], sizes, "config.json: defaults")
        held: dict[str, Tensors] = {}
        for part in found.values():
            held.setdefault(part.component, {}).update(part.tensors)
            section = COMPONENTS[part.component][0]
            if section != "transformer" and part.section is not None:
                self.config[section] = part.section
        self.parts = {name: held[name] for name in COMPONENTS if name in held}
        used = {COMPONENTS[name][0] for name in held}
        unused = {section for section, _ in COMPONENTS.values()} - used
        self.config = {k: v for k, v in self.config.items() if k not in unused}
        count = sum(map(len, self.parts.values()))
        for name, tensors in self.parts.items():
            section = self.config.get(COMPONENTS[name][0])
            parts.check_config(name, section, tensors, count)
        # Components without weights, for planning: each is built once.
        self.sketch = cache(lambda name: self.build(name, self.shapes(name)))

    @property
    def files(self) -> list[File]:
        """The files that are used."""
        used = (f for tensors in self.parts.values() for f, _ in tensors.values())
        return [*dict.fromkeys(used), *self.others]

    version = property(lambda self: parts.parse_version(self.model_version))
    generation = property(lambda self: parts.generation(self.version))  # "2.0", "2.3"
    components = property(lambda self: list(self.parts))

    def require(self, *names: str) -> None:
        """UserError for parts that this model does not have."""
        if missing := [name for name in names if name not in self.parts]:
            problems = [text for held, text in self.problems if held & {*missing}]
            reasons = f" (not used: {'; '.join(problems[:3])})" if problems else ""
            text = f"missing model parts: {', '.join(missing)}{reasons}; pass a folder"
            raise UserError(f"{text} that holds all files, or --part NAME=FILE")

    def check(self, *names: str) -> None:
        """UserError for components that are missing or do not fit, by headers alone."""
        self.require(*names)
        for name in names:
            self.sketch(name)
        keys = {"transformer": "in_channels", "vae": "latent_channels"}
        keys |= dict.fromkeys(UPSAMPLERS, "in_channels")
        latent = {n: self.config[n].get(keys[n], 128) for n in names if n in keys}
        if len({*latent.values()}) > 1:
            sizes = ", ".join(f"{name} {n}" for name, n in latent.items())
            raise UserError(f"parts of different models: latent channels are {sizes}")

    def encoder(self, name: Optional[str] = None) -> str:
        """The text encoder to use: the model's own, or `name` if it is usable."""
        if self.version >= GEMMA_4 and name not in (None, self.text_encoder):
            own = f"LTX-2 {self.model_version} has its own Gemma 4"
            raise UserError(f"{own} and cannot use {name}: remove --text-encoder")
        return name or self.text_encoder

    def weights(
        self, name: str, dtype: Optional[mx.Dtype] = None, read: Callable = File.arrays
    ) -> Weights:
        """A component's tensors, lazily, with its module's names and layouts; floating
        ones cast to `dtype`, fp8 decoded to bfloat16."""
        self.require(name)
        part = self.parts[name]
        arrays = {f: read(f) for f in {f for f, _ in part.values()}}
        weights = {inner: arrays[f][key] for inner, (f, key) in part.items()}
        if any(f.metadata.get("format") != "mlx" for f in arrays):
            fp8 = [k for k, (f, key) in part.items() if f.header[key][0] == "F8_E4M3"]
            weights = COMPONENTS[name][1].sanitize(decode_fp8(weights, fp8))
        cast = lambda w: w.astype(dtype) if mx.issubdtype(w.dtype, mx.floating) else w
        return {key: cast(w) for key, w in weights.items()} if dtype else weights

    # The same as zeros, for planning: only headers are read
    shapes = partialmethod(weights, read=lambda file: file.zeros)

    def build(self, name: str, weights: Weights) -> nn.Module:
        """The component as configured, not loaded; `weights` must fit it exactly."""
        section, component = COMPONENTS[name]
        file = parts.first_file(self.parts[name]).name
        shapes = {key: w.shape for key, w in weights.items()}
        with parts.config_errors(file):
            sized = component.infer_sizes(self.config[section], shapes)
            module = component.from_config(sized)
        if any(key.endswith(".scales") for key in weights):
            try:
                quantize_stored(module, self.quantization, weights)
            except (AttributeError, TypeError, ValueError):
                how = layer_formats(self.quantization).get("")
                raise UserError(f"{file} cannot be quantized with {how}") from None
        fits = {key: p.shape for key, p in tree_flatten(module.parameters())}
        if wrong := sorted({key for key, _ in fits.items() ^ shapes.items()}):
            has = lambda k: f"{shapes.get(k, 'missing')}, not {fits.get(k, 'expected')}"
            texts = [f"{key} is {has(key)}" for key in wrong[:5]]
            texts += [f"and {len(wrong) - 5} more"] * (len(wrong) > 5)
            text = f"tensors do not match its config: {'; '.join(texts)}"
            raise UserError(f"{file}: {name} {text}")
        return module

    def load(
        self, name: str, dtype: Optional[mx.Dtype] = None, lazy: bool = False
    ) -> nn.Module:
        """A component with its weights, floating ones cast to `dtype` (except FLOAT32);
        they are read when they are used (`lazy`) or now, in groups, so that no command
        buffer waits long for the disk; UserError if they do not fit."""
        weights = self.weights(name, mx.float32 if name in FLOAT32 else dtype)
        module = self.build(name, weights)
        module.load_weights(list(weights.items()))
        if not lazy:
            # What is computed, not only read, is held twice: in small groups.
            found = {f.header[key][0] for f, key in self.parts[name].values()}
            floats = {hub.DTYPES[kind] for kind in found if "F" in kind}
            read = name not in FLOAT32 and floats == {dtype}
            evaluate(weights.values(), 1 << 28 if read else SMALL_GROUP)
        return module


def open_model(
    name: str,
    kind: Optional[str] = None,
    file: Optional[str] = None,
    upsamplers: Sequence[str] = (),
    fetch: bool = True,
    parts: Optional[Mapping[str, str]] = None,
) -> Checkpoint:
    """A model from an official file or folder, a converted folder, or the Hub; `kind`
    overrides its name, `file` chooses a checkpoint, `upsamplers` and `parts` (by
    component) replace its own; without `fetch` only headers are downloaded."""
    chosen = read_chosen(upsamplers, parts or {})
    files = hub.choose(name, *hub.resolve(name, file))
    read = converted if files[0].name == "config.json" else official
    model = read(files, chosen)
    path = f"{name}/{file}" if file else name
    model.opened = {"model": path, "upsamplers": upsamplers, "parts": parts or {}}
    if kind is not None:
        model.kind, model.kind_assumed = kind, False
    if model.kind not in KINDS:
        raise UserError(f"kind must be {' or '.join(KINDS)}, got {model.kind!r}")
    if fetch:
        hub.fetch_all(model.files)
    return model


def official(files: list[File], chosen: Parts) -> Checkpoint:
    """A model from released files: the checkpoint, then others that may hold parts."""
    first, *rest = files
    if first.role in ("lora", "upsampler"):
        kind = {"lora": "a LoRA", "upsampler": "an upsampler"}[first.role]
        raise UserError(f"{first.name} is {kind}: pass it with --{first.role}")
    own = parts.read_parts(first)
    if ("transformer", "") not in own:
        held = ", ".join({component: 0 for component, _ in own}) or "no part of LTX-2"
        raise UserError(f"{first.name} is not a model, it holds {held}")
    version = parts.check_version(first, own["transformer", ""].section)
    named = re.search(r"(?<![a-z])(dev|distilled)(?![a-z])", first.name.lower())
    kind = named[0] if named else "dev"
    packed = parts.parse_version(version) >= GEMMA_4
    found, problems = parts.join_parts(own, chosen, rest, version, kind)
    return Checkpoint(
        model_version=version,
        kind=kind,
        kind_assumed=not named,
        text_encoder="gemma" if packed else TEXT_ENCODER,
        provenance=None,
        config=parts.sections(first),
        found=found,
        others=[f for f in rest if f.name.startswith("LICENSE")],
        problems=problems,
    )


def converted(files: list[File], chosen: Parts) -> Checkpoint:
    """A folder that `Conversion.write` made, checked to be complete."""
    config, names = files[0].json(), {f.name for f in files}
    own, expected = {}, set()
    for f in files:
        shard = re.fullmatch(r"(.+?)(?:-\d+-of-(\d+))?\.safetensors", f.name)
        if shard and shard[1] in COMPONENTS:
            if f.problem:
                raise UserError(f.problem)
            shards = shard_names(shard[1], int(shard[2] or 1))
            expected.update(islice(shards, len(files)))  # of more, one is missing
            for key in f.header:
                parts.add_tensor(own, config, shard[1], key, (f, key))
    held = {part.component for part in own.values()}
    lacks = {k for k, (section, _) in COMPONENTS.items() if section in config} - held
    expected |= {f"{name}.safetensors" for name in lacks}
    if expected - names:
        raise UserError(f"the model lacks {', '.join(sorted(expected - names)[:5])}")
    path = f"{files[0].path}: "
    known = FolderConfig.__dataclass_fields__.keys() & config.keys()
    found = checked(FolderConfig, {key: config.pop(key) for key in known}, path)
    for layer, how in layer_formats(found.quantization).items():
        checked(Quantization, how, f"{path}quantization{layer and '.'}{layer}")
    for key, kind in {"source": str, "files": dict[str, str]}.items():
        checked(kind, (found.provenance or {}).get(key), f"{path}provenance.{key}")
    version, encoder, repo = found.model_version, found.text_encoder, files[0].repo
    if (files[0].path.parent / encoder).is_dir():
        found.text_encoder = str(files[0].path.parent / encoder)
    elif repo and "/" not in encoder and parts.parse_version(version) < GEMMA_4:
        found.text_encoder = f"{repo}/{encoder}"
    return Checkpoint(
        **vars(found),
        config=config,
        found=parts.join_parts(own, chosen, [], version)[0],
        others=[f for f in files if not f.name.endswith(".safetensors")],
    )


def shard_names(name: str, count: int) -> Iterator[str]:
    """The names of a component's `count` files."""
    for i in range(count):
        shard = f"-{i + 1:05d}-of-{count:05d}" if count > 1 else ""
        yield f"{name}{shard}.safetensors"


# Text encoders in folders


def text_encoder_files(name: str) -> list[File]:
    """The files of a text encoder that are used: its config.json first, all in one
    folder or repository, or as diffusers has them, in text_encoder and tokenizer."""
    folder, (repo, inner) = user_path(name), hub.split_repository(name)
    if folder.is_file() or not (folder.is_dir() or repo):
        what = "a single file" if folder.is_file() else "no such folder"
        like = f"pass a folder or repository like {TEXT_ENCODER}"
        raise UserError(f"text encoder {name}: {what}: {like}")
    place = lambda sub: os.path.normpath(f"/{inner}/{sub}").strip("/")
    of_folder = lambda sub: hub.folder_files(folder / sub)
    of_repository = lambda sub: hub.repository_files(repo, place(sub))
    read = of_folder if folder.is_dir() else of_repository
    found, sibling = read(""), "../tokenizer"
    has = lambda *names: {f.name.split("/")[-1] for f in found} & {*names}
    if not has("config.json"):
        found, sibling = read("text_encoder"), "tokenizer"
    if not has(*TOKENIZERS):
        found += read(sibling)
    found = [f for f in found if f.name.endswith((".safetensors", ".json", ".model"))]
    return sorted(found, key=lambda f: f.name.split("/")[-1] != "config.json")


def check_text_encoder(name: str, model: Optional[Checkpoint] = None) -> None:
    """Raise UserError unless a Gemma 3 folder or repository is complete and of the size
    that `model` was trained with, by headers alone."""
    where = f"text encoder {name}"
    files = {f.name.split("/")[-1]: f for f in text_encoder_files(name)}
    for names in (["config.json"], TOKENIZERS):
        if not files.keys() & {*names}:
            raise UserError(f"{where} has no {' or '.join(names)}")
    config = files["config.json"].json()
    if (kind := config.get("model_type")) not in ("gemma3", "gemma3_text"):
        raise UserError(f"{where} is {kind!r}, not Gemma 3: use {TEXT_ENCODER}")
    section = checked(dict, config.get("text_config", config), f"{where}: text_config")
    sizes = {k: v for k, v in section.items() if re.search("size$|num_|_dim$", k)}
    sizes = checked(dict[str, Optional[int]], sizes, f"{where}: text_config", 10**7)
    if index := files.get("model.safetensors.index.json"):
        shards = index.json().get("weight_map")
        shards = checked(dict[str, str], shards, f"{where}: weight_map")
        if lacks := sorted({*shards.values()} - files.keys()):
            raise UserError(f"{where} lacks {', '.join(lacks[:5])}: download it again")
    shapes = {}
    for file, f in files.items():
        if re.fullmatch(r"model.*\.safetensors", file):
            if f.problem:
                raise UserError(f"{where}: {f.problem}")
            shapes |= {key: shape for key, (_, shape) in f.header.items()}
    example = f"it has {min(shapes, default='no weights (model*.safetensors)')}"
    shapes = {name: shape for k, shape in shapes.items() if (name := text_name(k))}
    others = [k for k in shapes if not k.endswith((".weight", ".scales", ".biases"))]
    if others:
        other = f"{where} is quantized by another tool than MLX ({others[0]})"
        raise UserError(f"{other}: use {TEXT_ENCODER}")
    packed = any(k.endswith(".scales") for k in shapes)
    if packed and not {"quantization", "quantization_config"} & {*section, *config}:
        raise UserError(f"{where} is quantized, but its config.json does not say how")
    first, count = "layers.0.", sizes.get("num_hidden_layers") or 0
    leaves = [key.removeprefix(first) for key in shapes if key.startswith(first)]
    names = [f"layers.{i}.{k}" for i in range(min(count, 999)) for k in leaves]
    names += ["norm.weight", "embed_tokens.weight", "layers.0.mlp.up_proj.weight"]
    if lacks := [name for name in names if name not in shapes]:
        first = f"{len(lacks)} tensors: {lacks[0]}, ..."
        raise UserError(f"{where} lacks {first}; {example}")
    width, found = sizes.get("hidden_size"), shapes["norm.weight"]
    if found != (width,):
        raise UserError(f"{where}: hidden_size is {width}, but norm.weight is {found}")
    for inner, (f, key) in model.parts["connectors"].items() if model else ():
        states = f.header[key][1][-1]
        if inner.endswith("aggregate_embed.weight") and states != width * (count + 1):
            what = f"{where} has {count} layers of {width}, this model was trained"
            raise UserError(f"{what} with another size: use {TEXT_ENCODER}")


def fetch_text_encoder(name: str) -> Path:
    """The folder of a text encoder in Hugging Face layout, downloaded if needed."""
    if not (files := text_encoder_files(name)):
        raise UserError(f"text encoder {name} has no files")
    hub.fetch_all(files)
    return files[0].path.parent


def decode_fp8(weights: Weights, names: Iterable[str]) -> Weights:
    """Official fp8 layers times weight_scale, as bfloat16; activations are not fp8."""
    for name in names:
        w = mx.from_fp8(weights[name], mx.float32)
        scale = weights.pop(f"{name}_scale", mx.array(1.0))
        if scale.size != 1:
            raise UserError(f"{name}: block-scaled fp8 is not supported")
        weights.pop(f"{name.removesuffix('weight')}input_scale", None)
        weights[name] = (w * scale).astype(mx.bfloat16)
    return weights


def save_arrays(path: str | Path, arrays: Weights, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; it gets its name when it is complete."""
    with media.workspace(path) as folder:
        file = Path(folder, "arrays.safetensors")
        try:
            mx.save_safetensors(str(file), arrays, dict(metadata))
        except RuntimeError as error:  # the disk is full
            raise OSError(f"{path}: cannot be written ({error})") from None
        file.rename(f"{folder}/new")


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
