"""The parts of official files: which tensors of which component a file holds."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import Any, Container, Iterator, NamedTuple, Optional

from . import audio_vae, diffusion_decoder, dit, duration, text, vae, vocoder
from .base import UserError, checked, note
from .hub import File, Unreachable
from .layers import Component
from .upsampler import LatentUpsampler

GENERATIONS = {(2, 0): "2.0", (2, 3): "2.3", (2, 5): "2.5"}  # since model_version
GEMMA_4 = (2, 4)  # the first version that packs its own text encoder
KINDS = ("dev", "distilled")

Tensors = dict[str, tuple[File, str]]  # file and key by the component's own name
Problem = tuple[set[str], str]  # components that an unused file holds, and why it is

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
}
UPSAMPLERS = ("spatial_upsampler", "spatial_upsampler_x1.5", "temporal_upsampler")
COMPONENTS |= {name: (name, LatentUpsampler) for name in UPSAMPLERS}
PREFIXES = (
    ("transformer", "model.diffusion_model."),
    ("transformer", "diffusion_model."),  # as other tools write it
    ("vae", "vae."),
    ("audio_vae", "audio_vae."),
    ("vocoder", "vocoder."),
    ("duration_head", "duration_head."),
)
CONNECTORS = re.compile("(video|audio)_embeddings_connector|text_embedding_projection")
BARE = {  # beginnings of the keys in files of one component that have no prefix
    "vae": r"(encoder|decoder|per_channel_statistics)\.",
    "gemma": r"model\.(layers|embed_tokens|norm)\.|tokenizer_json|"
    + "|".join(map(re.escape, text.UNUSED_KEYS)),
    "transformer": CONNECTORS.pattern
    + r"|transformer_blocks\.|av_ca_|keyframes_abs_pos|(audio_)?(patchify_proj|proj_out|"
    "scale_shift_table|caption_projection|(prompt_)?adaln_single)",
}
# ComfyUI's names of fp8 scales, and its marks, which add nothing to the dtypes.
RENAMED = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
MARKS = ("comfy_quant", "scaled_fp8")


# Models


def official(files: list[File], skip: Container[str] = ()) -> dict[str, Any]:
    """A model from released files, as arguments of `Checkpoint`: the first is the
    checkpoint, the others may hold other parts. Files that do not fit are remembered, in
    case that a part is missing. Of several that do, the best is used and noted, except
    for components to `skip`."""
    first, *rest = files
    if first.role in ("lora", "upsampler"):
        kind = {"lora": "a LoRA", "upsampler": "an upsampler"}[first.role]
        raise UserError(f"{first.name} is {kind}: pass it with --{first.role}")
    found = read_parts(first)
    if ("transformer", "") not in found:
        held = ", ".join({component: 0 for component, _ in found}) or "no part of LTX-2"
        raise UserError(f"{first.name} is not a model, it holds {held}")
    config = found["transformer", ""].config
    version = check_version(first, config)
    named = re.search(r"(?<![a-z])(dev|distilled)(?![a-z])", first.name.lower())
    kind = named[0] if named else "dev"
    candidates: dict[tuple[str, str], list[Part]] = {}
    problems: list[Problem] = []
    for f in (f for f in rest if f.role in ("part", "checkpoint")):
        try:
            held = read_parts(f)
            for (component, _), part in held.items():
                check_part(component, part, parse_version(version), first)
        except Unreachable:
            raise
        except UserError as error:
            problems.append((claims(f), str(error)))
            continue
        for piece, part in held.items():
            candidates.setdefault(piece, []).append(part)
    for piece in candidates.keys() - found.keys():
        noted = piece[0] not in skip
        found[piece] = best(piece[0], candidates[piece], kind, noted)
    parts: dict[str, Tensors] = {}
    for (component, _), part in found.items():
        parts.setdefault(component, {}).update(part.tensors)
        config.update(own_section(component, part))
    used = {COMPONENTS[component][0] for component in parts}
    absent = {section for section, _ in COMPONENTS.values()} - used
    return {
        "model_version": version,
        "kind": kind,
        "kind_assumed": not named,
        "config": {k: v for k, v in config.items() if k not in absent},
        "parts": parts,
        "others": [f for f in rest if f.name.startswith("LICENSE")],
        "problems": problems,
        **({"text_encoder": "gemma"} if parse_version(version) >= GEMMA_4 else {}),
    }


# Parts of files


class Part(NamedTuple):
    """Tensors that one file has of a component."""

    file: File
    config: dict[str, Any]  # the file's sections
    tensors: Tensors


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
    bare = [(c, key) for c, pattern in BARE.items() if re.match(pattern, key)]
    component, inner = (named or bare or [("", "")])[0]
    if component == "transformer" and CONNECTORS.match(inner):
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


def check_part(
    component: str, part: Part, model_version: tuple[int, ...], checkpoint: File
) -> None:
    """A part must be of the checkpoint's generation, and its Gemma 4 the version that
    the checkpoint was trained with, which is not Google's."""
    f, wanted = part.file, generation(model_version)
    version = f.metadata.get("model_version")
    if version and generation(parse_version(version)) != wanted:
        raise UserError(f"{f.name} is for LTX-2 {version}, not for {wanted}")
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


# What code that builds a model raises for a configuration that no model has.
ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
ERRORS += (RecursionError,)


@contextmanager
def config_errors(file: str) -> Iterator[None]:
    """Whatever is wrong with a configuration from outside, as one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except ERRORS as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(f"{file}: invalid configuration ({text})") from error


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
