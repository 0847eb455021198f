"""Checkpoints: official files and converted folders, checked and strictly loaded."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import (
    Any,
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

from . import (
    audio_vae,
    diffusion_decoder,
    dit,
    duration,
    hub,
    text,
    upsampler,
    vae,
    vocoder,
)
from .base import UserError, checked, note
from .hub import File
from .layers import Component, quantize

TEXT_ENCODER = "mlx-community/gemma-3-12b-it-qat-4bit"
GENERATIONS = {(2, 0): "2.0", (2, 3): "2.3", (2, 5): "2.5"}  # since model_version
GEMMA_4 = (2, 4)  # the first version that packs its own text encoder
KINDS = ("dev", "distilled")
# Computed in float32 whatever the dtype: the vocoder as in the reference, the other
# convolutions because Metal's fast ones lose up to 5 % a layer in 16 bits.
FLOAT32 = ("vae", "audio_vae", "vocoder", "spatial_upsampler", "temporal_upsampler")
FLOAT32 += ("spatial_upsampler_x1.5",)

Weights = dict[str, mx.array]
Tensors = dict[str, tuple[File, str]]  # file and key by the component's own name
Parts = dict[str, Tensors]  # by component

COMPONENTS: dict[str, tuple[str, type[Component]]] = {  # section and class by name
    "transformer": ("transformer", dit.DiT),
    "connectors": ("transformer", text.TextConnectors),
    "vae": ("vae", vae.VideoVAE),
    "audio_vae": ("audio_vae", audio_vae.AudioVAE),
    "vocoder": ("vocoder", vocoder.Vocoder),
    # From 2.5 on
    "gemma": ("gemma", text.Gemma4),
    "diffusion_decoder": ("diffusion_decoder", diffusion_decoder.DiffusionDecoder),
    "duration_head": ("duration_head", duration.DurationHead),
} | {
    name: (name, upsampler.LatentUpsampler)
    for name in ("spatial_upsampler", "spatial_upsampler_x1.5", "temporal_upsampler")
}
CONNECTORS = (
    "video_embeddings_connector.",
    "audio_embeddings_connector.",
    "text_embedding_projection.",
)
# Component and the prefix that official files and other tools' have, then beginnings of
# keys in files of one component, which have none.
PREFIXES = (
    ("transformer", "model.diffusion_model."),
    ("transformer", "diffusion_model."),
    ("vae", "vae."),
    ("audio_vae", "audio_vae."),
    ("vocoder", "vocoder."),
    ("duration_head", "duration_head."),
)
STARTS = {
    "vae": ("encoder.", "decoder.", "per_channel_statistics."),
    "gemma": ("model.layers.", "model.embed_tokens.", "model.norm.", "tokenizer_json"),
    "transformer": (*CONNECTORS, "transformer_blocks.", "av_ca_", "keyframes_abs_pos"),
}
STARTS["gemma"] += text.UNUSED_KEYS
STARTS["transformer"] += tuple(
    f"{stream}{name}"
    for stream in ("", "audio_")
    for name in ("patchify_proj.", "adaln_single.", "prompt_adaln_single.", "proj_out.")
    + ("caption_projection.", "scale_shift_table")
)
# ComfyUI's names of fp8 scales, and its marks, which add nothing to the dtypes.
RENAMED = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
MARKS = ("comfy_quant", "scaled_fp8")


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
    defaults: dict[str, float] = field(default_factory=dict)


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
    parts: Mapping[str, str] = {},
) -> Checkpoint:
    """A model from an official file or folder, a converted folder, or the Hub.

    `kind` overrides what the name says, `file` chooses a checkpoint, `upsamplers` replace
    those next to it, `parts` are files by component. Files to download are listed first;
    without `fetch` only headers and config.json are. Raises UserError if no model is found.
    """
    files, file = hub.resolve(name, file)
    files = hub.choose(name, files, file)
    if files[0].name == "config.json":
        model = converted_checkpoint(files)
    else:
        model = official_checkpoint(files, {*parts})
    found = [f for f in files if f.role == "upsampler"]
    if upsamplers:  # instead of a converted folder's own, too
        model.parts = {k: v for k, v in model.parts.items() if "upsampler" not in k}
        found = []
    for f in found:
        try:
            add_upsampler(model, f)
        except UserError as error:
            model.problems.append(Problem({*COMPONENTS} - {*STARTS}, str(error)))
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


class Part(NamedTuple):
    """Tensors that one file has of a component."""

    file: File
    config: dict[str, Any]  # the file's sections
    tensors: Tensors


def official_checkpoint(files: list[File], skip: set[str] = set()) -> Checkpoint:
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
                check_part(model, piece[0], part)
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


def read_parts(f: File) -> dict[tuple[str, str], Part]:
    """What a file holds, by component and, as only connectors can be in several files,
    the connectors' piece."""
    if f.problem:
        raise UserError(f.problem)
    config, parts = sections(f), {}
    for key in f.keys:
        places = map_key(key, "diffusion_decoder" in config)
        if places is None:
            raise UserError(f"{f.name}: unexpected tensor {key}")
        for component, inner in places:
            piece = inner.split(".")[0] if component == "connectors" else ""
            part = parts.setdefault((component, piece), Part(f, config, {}))
            part.tensors[inner] = f, key
    return parts


def sections(f: File) -> dict[str, Any]:
    """The configuration of an official file by section."""
    if "gemma_config" in f.metadata:
        return {"gemma": f.json_metadata("gemma_config")}
    config = f.config
    with config_errors(f.name):
        video = checked(dict, config.get("vae", {}), "vae")
        if video.get("_class_name") == "CausalDiffusionVAE":
            output = {"model_output_type": video.get("model_output_type")}
            config["diffusion_decoder"] = video["decoder"] | output
            config["vae"] = vae.encoder_alone(video)
    return config


def map_key(key: str, diffusion: bool = False) -> Optional[list[tuple[str, str]]]:
    """Components and inner names of an official tensor, or None; a `diffusion` VAE's are
    the decoder's, the encoder's, or both's."""
    key = key.replace("_orig_mod.", "")  # of a compiled module
    stem, _, leaf = key.rpartition(".")
    if leaf in MARKS:
        return []
    key = f"{stem}.{RENAMED[leaf]}" if leaf in RENAMED else key
    named = [(c, key[len(start) :]) for c, start in PREFIXES if key.startswith(start)]
    bare = [(c, key) for c, starts in STARTS.items() if key.startswith(starts)]
    component, inner = (named or bare or [("", "")])[0]
    if component == "transformer" and inner.startswith(CONNECTORS):
        component = "connectors"
    if component == "vae" and diffusion:
        side = inner.split(".")[0]
        decodes = [("diffusion_decoder", inner.removeprefix("decoder."))]
        return decodes * (side != "encoder") + [("vae", inner)] * (side != "decoder")
    return [(component, inner)] if component else None


def claims(f: File) -> set[str]:
    """The components that a file seems to hold; all, if its header cannot be read."""
    try:
        return {c for key in f.keys for c, _ in map_key(key) or ()}
    except UserError:
        return {*COMPONENTS}


def best(component: str, parts: list[Part], kind: str, noted: bool) -> Part:
    """Of a part that exists several times: the video decoder that convolves, what is
    named like the checkpoint, and what is not fp8 come first."""
    if component == "vae":
        convolves = [p for p in parts if "decoder_blocks" in p.config.get("vae", {})]
        parts = convolves or parts
    other = KINDS[kind == "dev"]

    def order(part: Part) -> tuple:
        fp8 = any(f.header[key][0] == "F8_E4M3" for f, key in part.tensors.values())
        return other in part.file.name.lower(), fp8, part.file.name

    first, *rest = sorted(parts, key=order)
    if rest and noted:
        note(f"using {first.file.name}, not {', '.join(p.file.name for p in rest)}")
    return first


def check_part(model: Checkpoint, component: str, part: Part) -> None:
    """A part must be of the checkpoint's generation, and its Gemma 4 the version that
    the checkpoint was trained with, which is not Google's."""
    f, checkpoint = part.file, first_file(model.parts["transformer"])
    version = f.metadata.get("model_version")
    if version and generation(parse_version(version)) != model.generation:
        raise UserError(f"{f.name} is for LTX-2 {version}, not {model.model_version}")
    if component == "gemma":
        have, want = part.config.get("gemma", {}).get("gemma_version"), None
        if "gemma_source_checkpoint" in checkpoint.metadata:
            source = checkpoint.json_metadata("gemma_source_checkpoint")
            want = source.get("gemma_version")
        if have is None or have != want:
            raise UserError(
                f"{f.name} is Gemma 4 {have or 'as Google released it'}, but "
                f"{checkpoint.name} was trained with {want or 'another text encoder'}: "
                "use the encoder that was published with it"
            )
    if component != "connectors":
        check_config(component, own_section(component, part), part.tensors)


def own_section(component: str, part: Part) -> dict[str, Any]:
    """The section of a part, by name; the transformer's is the checkpoint's."""
    name = COMPONENTS[component][0]
    config = {"duration_head": {}} | part.config
    return {name: config[name]} if name in config and name != "transformer" else {}


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
        check_part(model, name, part)
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
        c = upsampler.UpsamplerConfig.from_dict(f.config)
    axis = "temporal" if c.temporal_upsample else "spatial"
    scale = "" if c.spatial_scale in (1, 2) else f"_x{c.spatial_scale:g}"
    name = f"{axis}_upsampler{scale}"
    if name not in COMPONENTS:
        raise UserError(f"{f.name}: {name} is not implemented")
    model.config[name] = f.config
    model.parts[name] = {key: (f, key) for key in f.keys}


# Versions and configurations


def parse_version(model_version: str) -> tuple[int, ...]:
    """ "2.4-rc2" is (2, 4, 0); what is older than 2 is another model."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", model_version)
    version = tuple(int(n or 0) for n in numbers.groups()) if numbers else ()
    if version < (2,):
        raise UserError(f"unsupported model_version {model_version!r}")
    return version


def generation(version: tuple[int, ...]) -> str:
    """The newest generation that a version has reached."""
    return GENERATIONS[max(since for since in GENERATIONS if since <= version)]


def check_version(checkpoint: File, config: dict[str, Any]) -> str:
    """The checkpoint's model_version (the first files had none), which must agree with
    its transformer's configuration."""
    section = checked(dict, config.get("transformer", {}), "transformer")
    modulated = section.get("cross_attention_adaln", False) is True  # since 2.3
    version = checkpoint.metadata.get("model_version", "2.3" if modulated else "2.0")
    if (parse_version(version) >= (2, 3)) != modulated:
        found = "2.3 or later" if modulated else "2.0"
        raise UserError(
            f"{checkpoint.name} has model_version {version}, but is configured as {found}"
        )
    return version


def first_file(tensors: Tensors) -> File:
    return next(iter(tensors.values()))[0]


@contextmanager
def config_errors(file: str) -> Iterator[None]:
    """Whatever is wrong with a configuration from outside, as one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(f"{file}: invalid configuration ({kind}: {error})") from error
    except (ArithmeticError, RecursionError) as error:
        raise UserError(f"{file}: invalid configuration ({error})") from error


def check_config(name: str, config: dict[str, Any], tensors: Tensors) -> None:
    """Check a component's section, as far as it can be without building a module."""
    section, component = COMPONENTS[name]
    file = first_file(tensors).name
    if section not in config:
        raise UserError(f"{file} has no configuration of the {name}")
    shapes = {inner: f.header[key][1] for inner, (f, key) in tensors.items()}
    with config_errors(file):
        found = checked(dict, config[section], section)
        if hasattr(component, "config_class"):  # the vocoder has one of several
            component.config_class.from_dict(component.infer_sizes(found, shapes))


def limit_depth(section: Any, tensors: int, name: str = "") -> None:
    """No model has more layers than tensors; building those would not end."""
    if isinstance(section, dict):
        for key, value in section.items():
            limit_depth(value, tensors, key)
    elif isinstance(section, list):
        for value in section:
            limit_depth(value, tensors, name)
    elif re.search("layers|blocks|depth", name) and isinstance(section, int):
        if section > tensors:
            raise UserError(f"{name} is {section}, but there are {tensors} tensors")


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
    expected |= {
        f"{prefix}{k}.weight" for k in ("embed_tokens", "norm", "layers.0.mlp.up_proj")
    }
    if expected - keys:
        example = f"has {min(keys)}" if keys else "has no weights"
        raise UserError(
            f"text encoder {name} lacks {len(expected - keys)} tensors, as "
            f"{min(expected - keys)} ({example})"
        )


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
