"""Where weights come from: official files and converted folders, strictly loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence

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
from .base import UserError
from .hub import File
from .layers import Component
from .linear import quantize

TEXT_ENCODER = "mlx-community/gemma-3-12b-it-qat-4bit"
GENERATIONS = {(2, 0): "2.0", (2, 3): "2.3", (2, 5): "2.5"}  # since model_version
GEMMA_4 = (2, 4)  # the first version that packs its own text encoder
KINDS = ("dev", "distilled")
CONVERTED = (  # what config.json holds beside the checkpoint's sections
    "model_type model_version kind quantization quantization_config "
    "text_encoder provenance".split()
)
# Computed in float32 whatever the dtype: the vocoder as in the reference, the other
# convolutions because Metal's fast ones lose up to 5 % a layer in 16 bits.
FLOAT32 = ("vae", "audio_vae", "vocoder", "spatial_upsampler", "temporal_upsampler")
FLOAT32 += ("spatial_upsampler_x1.5",)

Weights = dict[str, mx.array]
Parts = dict[str, dict[str, tuple[File, str]]]  # component, tensor: where it is


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
# Component, the part of an official name that is stripped and what follows it; the
# first that fits counts.
PREFIXES = (
    ("connectors", "model.diffusion_model.", "video_embeddings_connector."),
    ("connectors", "model.diffusion_model.", "audio_embeddings_connector."),
    ("connectors", "", "text_embedding_projection."),
    ("transformer", "model.diffusion_model.", ""),
    ("vae", "vae.", ""),
    ("audio_vae", "audio_vae.", ""),
    ("vocoder", "vocoder.", ""),
    # Where a component has its own file, from 2.5 on
    *(("vae", "", f"{k}.") for k in ("encoder", "decoder", "per_channel_statistics")),
    *(("gemma", "", f"model.{k}.") for k in ("layers", "embed_tokens", "norm")),
    *(("gemma", "", k) for k in ("tokenizer_json", *text.UNUSED_KEYS)),
    ("duration_head", "duration_head.", ""),
)


# Models


@dataclass
class Checkpoint:
    """A model as its headers and its configuration describe it; nothing is read yet."""

    files: list[File]
    model_version: str
    kind: str  # "dev" or "distilled"
    kind_assumed: bool  # neither said nor in the file's name
    config: dict[str, dict[str, Any]]  # the checkpoint's sections
    parts: Parts
    quantization: Optional[dict[str, Any]] = None
    text_encoder: str = TEXT_ENCODER
    provenance: Optional[dict[str, Any]] = None  # of converted models
    defaults: dict[str, Any] = field(default_factory=dict)  # the video's size and rate

    def __post_init__(self):
        self.parts = {
            name: self.parts[name] for name in COMPONENTS if name in self.parts
        }
        for name in self.parts:
            if COMPONENTS[name][0] not in self.config:
                file = self.files[0].name
                raise UserError(f"{file} has no configuration of the {name}")

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
        """Raise UserError for parts that this model has not."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            raise UserError(
                f"this model has no {' and no '.join(missing)}, only "
                f"{', '.join(self.parts)}: put the file that holds it beside the others"
            )

    def encoder(self, given: Optional[str] = None) -> str:
        """The text encoder to use: the model's, or a `given` one where that may be."""
        if self.version >= GEMMA_4 and given not in (None, self.text_encoder):
            raise UserError(
                f"LTX-2 {self.model_version} reads a Gemma 4 of its own, from a file "
                f"beside the others, and not {given}: drop the text encoder"
            )
        return given or self.text_encoder

    def weights(self, name: str, dtype: Optional[mx.Dtype] = None) -> Weights:
        """A component's tensors, lazily, under its module's names and in its layouts;
        floating ones cast to `dtype`, fp8 decoded to bfloat16."""
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

    def module(self, name: str, weights: Weights) -> nn.Module:
        """The component as configured, not filled yet; `weights` must fit it exactly."""
        section, component = COMPONENTS[name]
        file = next(iter(self.parts[name].values()))[0].name
        shapes = {key: w.shape for key, w in weights.items()}
        section = component.infer_sizes(self.config[section], shapes)
        module = component.from_config(section)
        if any(key.endswith(".scales") for key in weights):
            how, picked = self.quantization, lambda path, _: f"{path}.scales" in weights
            try:
                quantize(module, **how, class_predicate=picked)
            except (TypeError, ValueError):
                raise UserError(f"{file} cannot be quantised as {how}") from None
        wanted = {key: p.shape for key, p in tree_flatten(module.parameters())}
        wrong = [
            f"{key} is {shapes.get(key, 'missing')}, not {wanted.get(key, 'expected')}"
            for key in sorted(wanted.keys() | shapes.keys())
            if wanted.get(key) != shapes.get(key)
        ]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(
                f"{file}: tensors of the {name} contradict its configuration: "
                f"{'; '.join(wrong[:5])}{more}"
            )
        return module

    def load(
        self, name: str, dtype: Optional[mx.Dtype] = None, lazy: bool = False
    ) -> nn.Module:
        """A component with its weights; only its own files are opened.

        `dtype` casts floating weights (FLOAT32 has the exceptions). With `lazy` they are
        read where they are first used, else now, in groups, so that no command buffer
        waits long for the disk. Raises UserError if a tensor is missing, unknown or of
        another shape than the configuration says.
        """
        weights = self.weights(name, mx.float32 if name in FLOAT32 else dtype)
        # A permuted kernel would be copied by each convolution.
        weights = {key: mx.contiguous(w) for key, w in weights.items()}
        module = self.module(name, weights)
        module.load_weights(list(weights.items()))
        if not lazy:
            evaluate(weights.values())
        return module


def open_model(
    name: str,
    kind: Optional[str] = None,
    file: Optional[str] = None,
    upsamplers: Sequence[str] = (),
    fetch: bool = True,
) -> Checkpoint:
    """A model from an official file or folder, a converted folder, or the Hub.

    `kind` overrules what the name says; `upsamplers` are used instead of those beside
    the checkpoint. What is to be fetched is listed first; without `fetch` only headers
    and config.json are. Raises UserError for whatever is not a whole model.
    """
    files = hub.find(name, file)
    if files[0].name == "config.json":
        source, beside = converted_source(files), []
    else:
        beside = [f for f in files[1:] if f.role == "upsampler"]
        source = official_source([f for f in files if f not in beside])
    given = [f for other in upsamplers for f in hub.find(other)]
    if given:  # instead of a converted folder's own, too
        source.parts = {k: v for k, v in source.parts.items() if "upsampler" not in k}
    for f in given or beside:
        add_upsampler(source, f)
    if kind is not None:
        source.kind, source.kind_assumed = kind, False
    if source.kind not in KINDS:
        raise UserError(f"the kind is {source.kind!r}, not {' or '.join(KINDS)}")
    if fetch:
        hub.fetch_all(source.files)
    return source


def official_source(files: list[File]) -> Checkpoint:
    """Released files say in their metadata what they are and how they are built."""
    config: dict[str, Any] = {}
    parts: Parts = {}
    versions: dict[str, str] = {}
    for f in files:
        if f.role in ("lora", "upsampler"):
            raise UserError(f"{f.name} is not a model, it is of use as --{f.role}")
    described = {f: sections(f) for f in files if f.role}
    convolves = any("decoder_blocks" in d.get("vae", {}) for d in described.values())
    for f, own in described.items():
        if "diffusion_decoder" in own and convolves:
            del own["vae"]  # both files have the same encoder
        # Of what several files say, the checkpoint's word counts.
        config = own | config if f.role == "part" else config | own
        if "model_version" in f.metadata:
            versions[f.name] = f.metadata["model_version"]
        for key in f.keys:
            for part, inner in place(f, key, own):
                other, _ = parts.setdefault(part, {}).setdefault(inner, (f, key))
                if other is not f:
                    raise UserError(f"{other.name} and {f.name} both hold the {part}")
    if "duration_head" in parts:
        config.setdefault("duration_head", {})
    if "transformer" not in parts:
        found = ", ".join(parts) or "none of its parts"
        raise UserError(f"{files[0].name} is not a model, it holds {found}")
    checkpoint = next(iter(parts["transformer"].values()))[0]
    version = check_versions(versions, checkpoint.name, config.get("transformer", {}))
    if "gemma" in parts:
        check_gemma(config["gemma"], next(iter(parts["gemma"].values()))[0], checkpoint)
    kind = re.search(r"(?<![a-z])(dev|distilled)(?![a-z])", checkpoint.name.lower())
    source = Checkpoint(
        files, version, kind[0] if kind else "dev", not kind, config, parts
    )
    if source.version >= GEMMA_4:
        source.text_encoder = "gemma"
    return source


def sections(f: File) -> dict[str, Any]:
    """The configuration of an official file by section."""
    if "gemma_config" in f.metadata:
        return {"gemma": f.described("gemma_config")}
    config = f.config
    video = config.get("vae", {})
    if video.get("_class_name") == "CausalDiffusionVAE":
        output = {"model_output_type": video.get("model_output_type")}
        config["diffusion_decoder"] = video["decoder"] | output
        config["vae"] = vae.encoder_alone(video)
    return config


def place(f: File, key: str, own: dict[str, Any]) -> list[tuple[str, str]]:
    """Component and inner name of an official tensor of a file with the sections `own`.
    A diffusion VAE's are the decoder's, the encoder's, or both's."""
    for component, stripped, start in PREFIXES:
        if not key.startswith(stripped + start):
            continue
        inner = key[len(stripped) :]
        if component != "vae" or "diffusion_decoder" not in own:
            return [(component, inner)]
        side = inner.split(".")[0]
        decodes = [("diffusion_decoder", inner.removeprefix("decoder."))]
        encodes = [("vae", inner)] if "vae" in own else []
        return decodes * (side != "encoder") + encodes * (side != "decoder")
    raise UserError(f"{f.name}: {key} belongs to no known part of LTX-2")


def add_upsampler(source: Checkpoint, f: File) -> None:
    """Add an official upsampler's file; its name tells the generation it is for."""
    if f.role != "upsampler":
        raise UserError(f"{f.name} is no latent upsampler")
    version = re.match(r"ltx-(2[\d.]*)-", f.name.split("/")[-1])
    if version and generation(parse_version(version[1])) != source.generation:
        raise UserError(f"{f.name} does not go with LTX-2 {source.model_version}")
    axis = "temporal" if f.config.get("temporal_upsample") else "spatial"
    scale = f.config.get("spatial_scale", 2)
    name = f"{axis}_upsampler" + (f"_x{scale:g}" if scale not in (1, 2) else "")
    if name not in COMPONENTS:
        raise UserError(f"{f.name}: there is no implementation of a {name}")
    source.files.append(f)
    source.config[name] = f.config
    source.parts[name] = {key: (f, key) for key in f.keys}


def parse_version(model_version: str) -> tuple[int, ...]:
    """ "2.4-rc2" is (2, 4, 0); what is older than 2 is another model."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", model_version)
    version = tuple(int(n or 0) for n in numbers.groups()) if numbers else ()
    if version < (2,):
        raise UserError(f"model_version {model_version!r} is none of LTX-2")
    return version


def generation(version: tuple[int, ...]) -> str:
    """The newest generation that a version has reached."""
    return GENERATIONS[max(since for since in GENERATIONS if since <= version)]


def check_versions(versions: dict[str, str], checkpoint: str, config: dict) -> str:
    """The checkpoint's model_version (the first files had none), which must agree with
    its transformer's configuration and with the other files."""
    modulated = config.get("cross_attention_adaln", False)  # since 2.3
    mine = versions.get(checkpoint, "2.3" if modulated else "2.0")
    if (parse_version(mine) >= (2, 3)) != modulated:
        looks = "2.3 or later" if modulated else "2.0"
        raise UserError(f"{checkpoint} says it is {mine}, but is configured as {looks}")
    for name, other in versions.items():
        if generation(parse_version(other)) != generation(parse_version(mine)):
            raise UserError(f"{name} is of version {other}, {checkpoint} of {mine}")
    return mine


def check_gemma(config: dict[str, Any], encoder: File, checkpoint: File) -> None:
    """A checkpoint was trained with one version of Gemma 4, which is not Google's."""
    have, want = config.get("gemma_version"), None
    if "gemma_source_checkpoint" in checkpoint.metadata:
        want = checkpoint.described("gemma_source_checkpoint").get("gemma_version")
    if have is None or have != want:
        raise UserError(
            f"{encoder.name} is Gemma 4 {have or 'as Google released it'}, but "
            f"{checkpoint.name} was trained with {want or 'another text encoder'}: "
            "take the encoder that was published with it"
        )


def converted_source(files: list[File]) -> Checkpoint:
    """A folder that `Conversion.write` made, checked to be whole."""
    config, names = files[0].json(), {f.name for f in files}
    parts: Parts = {}
    wanted, strays = set(), []
    for f in files:
        shard = re.fullmatch(r"(.+?)(?:-\d+-of-(\d+))?\.safetensors", f.name)
        if shard and shard[1] in COMPONENTS:
            wanted.update(shard_names(shard[1], int(shard[2] or 1)))
            parts.setdefault(shard[1], {}).update({key: (f, key) for key in f.keys})
        elif shard:
            strays.append(f)
    for name, (section, _) in COMPONENTS.items():
        if section in config and name not in parts:
            wanted.add(f"{name}.safetensors")
    if wanted - names:
        raise UserError(f"the model lacks {', '.join(sorted(wanted - names))}")
    said = {key: config.pop(key, None) for key in CONVERTED}
    missing = [k for k, v in said.items() if v is None and not k.startswith("quant")]
    if missing:
        raise UserError(f"{files[0].path} has no {missing[0]}: convert again")
    said.pop("model_type")
    said.pop("quantization_config")
    said["defaults"] = config.pop("defaults", {})
    inside = files[0].path.parent / said["text_encoder"]
    if inside.is_dir():
        said["text_encoder"] = str(inside)
    files = [f for f in files if f not in strays]
    return Checkpoint(files, kind_assumed=False, config=config, parts=parts, **said)


def shard_names(name: str, count: int) -> list[str]:
    if count == 1:
        return [f"{name}.safetensors"]
    return [f"{name}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def text_encoder_files(name: str) -> list[File]:
    """What is read of a text encoder's folder or repository."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and "/" not in name:
        raise UserError(f"text encoder {name}: no such folder")
    there = hub.folder_files(folder) if folder.is_dir() else hub.repository_files(name)
    kinds = (".safetensors", ".json", ".model")
    return [f for f in there if f.name.endswith(kinds)]


def fetch_text_encoder(name: str) -> Path:
    """The folder of a text encoder in Hugging Face's layout, fetched if need be."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        files = text_encoder_files(name)
        hub.fetch_all(files)
        folder = files[0].fetch().parent
    return folder


# Tensors


def decode_fp8(weights: Weights, names: Iterable[str]) -> Weights:
    """Official fp8 layers, weight times weight_scale, as bfloat16; input_scale serves
    fp8 activations, which there are none of here."""
    for name in names:
        w = mx.from_fp8(weights[name], mx.float32)
        scale = weights.pop(f"{name}_scale", mx.array(1.0))
        if scale.size != 1:
            raise UserError(
                f"{name} is scaled by block: only whole fp8 tensors are read"
            )
        w = w * scale
        weights.pop(f"{name.removesuffix('weight')}input_scale", None)
        weights[name] = w.astype(mx.bfloat16)
    return weights


def evaluate(arrays: Iterable[mx.array], limit: int = 1 << 22) -> None:
    """Evaluate arrays in groups of about `limit` bytes: what they are made of is there
    for one group at a time. Files are read one tensor after the other anyway."""
    group, size = [], 0
    for x in arrays:
        group.append(x)
        size += x.nbytes
        if size >= limit:
            mx.eval(group)
            group, size = [], 0
    mx.eval(group)
