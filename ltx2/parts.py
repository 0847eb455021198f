"""The parts of official files: which tensors of which component are in a file."""

import re
from collections import defaultdict
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Optional

from mlx.utils import tree_flatten

from . import audio_vae, diffusion_decoder, dit, duration, text, vae, vocoder
from .base import UserError, checked, note
from .hub import File, Unreachable, single_file
from .layers import Component
from .upsampler import LatentUpsampler, UpsamplerConfig

GENERATIONS = {(2, 0): "2.0", (2, 3): "2.3", (2, 5): "2.5"}  # since model_version
SUPPORTED = "LTX-2, LTX-2.3 and LTX-2.5 are supported"
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
CONNECTORS = "(video|audio)_embeddings_connector|text_embedding_projection"
# Prefixes of official keys, which are cut off, or (?=) how keys without one begin.
KEYS = {
    "transformer": rf"(model\.)?diffusion_model\.|(?={CONNECTORS}|transformer_blocks\.|"
    r"av_ca_|keyframes_abs_pos|(audio_)?(patchify_proj|proj_out|scale_shift_table|"
    r"caption_projection|(prompt_)?adaln_single))",
    "vae": r"vae\.|(?=(encoder|decoder|per_channel_statistics)\.)",
    "audio_vae": r"audio_vae\.",
    "vocoder": r"vocoder\.",
    "duration_head": r"duration_head\.",
    "gemma": r"(?=model\.(layers|embed_tokens|norm)\.|tokenizer_json|"
    + "|".join(map(re.escape, text.Gemma4.UNUSED))
    + ")",
}
# ComfyUI's names of fp8 scales, and its marks, which add nothing to the dtypes.
RENAMED = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
MARKS = ("comfy_quant", "scaled_fp8")


class Part(NamedTuple):
    """Tensors of a component in a file, and the section that configures them."""

    file: File
    component: str
    section: Optional[dict[str, Any]]
    tensors: Tensors


# By component and, as only connectors can be in several files, the connectors' piece
Parts = dict[tuple[str, str], Part]


def read_parts(f: File) -> Parts:
    """What an official file contains."""
    if f.problem:
        raise UserError(f.problem)
    if f.role == "upsampler":
        section = f.json_metadata("config")
        tensors = {key: (f, key) for key in f.header}
        name = upsampler_name(f, section)
        return {(name, ""): Part(f, name, section, tensors)}
    config, parts = sections(f), {}
    for key in f.header:
        if (places := map_key(key, "diffusion_decoder" in config)) is None:
            raise UserError(f"{f.name}: unexpected tensor {key}")
        for component, inner in places:
            add_tensor(parts, config, component, inner, (f, key))
    return parts


def add_tensor(
    parts: Parts, config: dict, component: str, inner: str, source: tuple[File, str]
) -> None:
    piece = inner.split(".")[0] if component == "connectors" else ""
    part = Part(source[0], component, config.get(COMPONENTS[component][0]), {})
    parts.setdefault((component, piece), part).tensors[inner] = source


def upsampler_name(f: File, section: dict[str, Any]) -> str:
    """Which component an upsampler is."""
    with config_errors(f.name):
        c = UpsamplerConfig.from_dict(section)
    axis = "temporal" if c.temporal_upsample else "spatial"
    scale = "" if c.spatial_scale in (1, 2) else f"_x{c.spatial_scale:g}"
    name = f"{axis}_upsampler{scale}"
    if name not in UPSAMPLERS:
        raise UserError(f"{f.name}: {name} is not implemented")
    return name


def sections(f: File) -> dict[str, Any]:
    """The configuration in an official file, by section."""
    if "gemma_config" in f.metadata:
        return {"gemma": f.json_metadata("gemma_config")}
    config = {"duration_head": {}} | f.json_metadata("config")
    with config_errors(f.name):
        transformer = checked(dict, config.get("transformer", {}), "transformer")
        if transformer.get("_class_name") == "Transformer3DModel":
            raise UserError(f"this is LTX-Video, an older model: {SUPPORTED}")
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
    starts = ((name, re.match(pattern, key)) for name, pattern in KEYS.items())
    component, start = next((found for found in starts if found[1]), ("", None))
    if start is None:
        return None
    inner = key[start.end() :]
    if component == "transformer" and re.match(CONNECTORS, inner):
        component = "connectors"
    if component == "vae" and diffusion:
        side = inner.split(".")[0]
        decodes = [("diffusion_decoder", inner.removeprefix("decoder."))]
        return decodes * (side != "encoder") + [("vae", inner)] * (side != "decoder")
    return [(component, inner)]


# Which parts are used


def read_chosen(upsamplers: Iterable[str], files: Mapping[str, str]) -> Parts:
    """The parts that a user chose: upsamplers, and files by component."""
    names = [c for c in COMPONENTS if c not in ("transformer", *UPSAMPLERS)]
    for name in files.keys() - {*names}:
        raise UserError(f"unknown part {name!r}: choose from {', '.join(names)}")
    chosen: Parts = {}
    wanted = [(UPSAMPLERS, file) for file in upsamplers]
    for components, file in [*wanted, *(((name,), f) for name, f in files.items())]:
        held = read_parts(single_file(file))
        found = {k: part for k, part in held.items() if part.component in components}
        if not found:
            raise UserError(f"{file} does not hold the {' or '.join(components)}")
        chosen |= found
    return chosen


def join_parts(
    own: Parts, chosen: Parts, others: list[File], version: str, kind: str = ""
) -> tuple[Parts, list[Problem]]:
    """A checkpoint's `own` parts; `chosen` ones replace them (an upsampler all of
    them), missing ones are from the `others`; and files among these that do not fit."""
    checkpoint = next((part.file for part in own.values()), None)
    for part in chosen.values():
        check_part(part, version, checkpoint)
    candidates, problems = defaultdict(list), []
    for f in (f for f in others if f.role):
        try:
            held = read_parts(f)
            for part in held.values():
                check_part(part, version, checkpoint)
        except Unreachable:
            raise
        except UserError as error:
            problems.append((claims(f), str(error)))
            continue
        for where, part in held.items():
            if where not in {**own, **chosen}:
                candidates[where].append(part)
    found = {where: best(parts, kind) for where, parts in candidates.items()} | own
    if any(part.component in UPSAMPLERS for part in chosen.values()):
        found = {k: p for k, p in found.items() if p.component not in UPSAMPLERS}
    for f in (f for f in others if f.role and f.problem):  # copies in other formats
        held = claims(f)
        used = {k: p.file.name for (k, _), p in found.items() if k in held}
        if used and used.keys() == held and "config" in " ".join(f.metadata):
            note(f"using {next(iter(used.values()))}, not {f.problem}")
    return found | chosen, problems


def claims(f: File) -> set[str]:
    """The components that a file seems to have; all if its header cannot be read."""
    if f.role == "upsampler":
        return {*UPSAMPLERS}
    try:
        return {component for key in f.header for component, _ in map_key(key) or ()}
    except UserError:
        return {*COMPONENTS}


def best(parts: list[Part], kind: str) -> Part:
    """Choose among duplicates: a conv decoder, the checkpoint's kind, not fp8."""

    def order(part: Part) -> tuple:
        other = KINDS[kind == "dev"] in part.file.name.lower()
        fp8 = any(f.header[key][0] == "F8_E4M3" for f, key in part.tensors.values())
        return other, fp8, part.file.name

    convolves = [p for p in parts if "decoder_blocks" in (p.section or {})]
    first, *rest = sorted(convolves or parts, key=order)
    if rest:
        note(f"using {first.file.name}, not {', '.join(p.file.name for p in rest)}")
    return first


def check_part(part: Part, model_version: str, checkpoint: File) -> None:
    """Check a part's generation, and that Gemma 4 is the checkpoint's, not Google's."""
    f, wanted = part.file, generation(parse_version(model_version))
    version = f.metadata.get("model_version")
    if part.component in UPSAMPLERS:
        named = re.match(r"ltx-(2[\d.]*)-", f.name.split("/")[-1])
        version = named and named[1]
    if version and generation(parse_version(version)) != wanted:
        problem = f"{f.name} is for LTX-2 {version}, not for {wanted}"
        if part.component not in UPSAMPLERS or wanted != "2.5":
            raise UserError(problem)
        note(f"{problem}: the second stage may be wrong")  # known by its name alone
    if part.component == "gemma":
        have, want = (part.section or {}).get("gemma_version"), None
        if "gemma_source_checkpoint" in checkpoint.metadata:
            source = checkpoint.json_metadata("gemma_source_checkpoint")
            want = source.get("gemma_version")
        if have is None or have != want:
            have, want = have or "as Google released it", want or "another text encoder"
            other = f"{checkpoint.name} was trained with {want}: use that encoder"
            raise UserError(f"{f.name} is Gemma 4 {have}, but {other}")
    if part.component != "connectors":  # the checkpoint configures them
        check_config(part.component, part.section, part.tensors)


# Versions and configurations


def parse_version(model_version: str) -> tuple[int, ...]:
    """ "2.4-rc2" as (2, 4, 0); UserError for versions below 2, another model."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", model_version)
    version = tuple(int(n or 0) for n in numbers.groups()) if numbers else ()
    if version < (2,):
        raise UserError(f"unsupported model_version {model_version!r}: {SUPPORTED}")
    return version


def generation(version: tuple[int, ...]) -> str:
    """The newest generation that a version has reached."""
    return GENERATIONS[max(since for since in GENERATIONS if since <= version)]


def check_version(checkpoint: File, section: Any) -> str:
    """The model_version (the first files had none), which fits the configuration."""
    section = checked(dict, section or {}, "transformer")
    modulated = section.get("cross_attention_adaln", False) is True  # since 2.3
    version = checkpoint.metadata.get("model_version", "2.3" if modulated else "2.0")
    if (parse_version(version) >= (2, 3)) != modulated:
        found = "2.3 or later" if modulated else "2.0"
        raise UserError(f"{checkpoint.name} is {version}, but configured as {found}")
    return version


def first_file(tensors: Tensors) -> File:
    return next(iter(tensors.values()))[0]


# What code that builds a model raises for a configuration that no model has.
ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
ERRORS += (RecursionError,)


@contextmanager
def config_errors(file: str) -> Iterator[None]:
    """Turn anything that is wrong with a configuration from outside into one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except ERRORS as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(f"{file}: invalid configuration ({text})") from error


def check_config(name: str, section: Any, tensors: Tensors, count=float("inf")) -> None:
    """Check a component's section, without building it; a model of `count` tensors."""
    component, file = COMPONENTS[name][1], first_file(tensors).name
    if section is None:
        raise UserError(f"{file} has no configuration of the {name}")
    shapes = {inner: f.header[key][1] for inner, (f, key) in tensors.items()}
    with config_errors(file):
        found = checked(dict, section, COMPONENTS[name][0])
        if hasattr(component, "config_class"):  # the vocoder has one of several
            component.config_class.from_dict(component.infer_sizes(found, shapes))
        limit_depth(found, count)


def limit_depth(section: Any, tensors: float) -> None:
    """UserError for more layers than tensors; building those would not end."""
    for path, value in tree_flatten(section):
        *_, name = re.sub(r"(\.\d+)+$", "", path).split(".")  # of a list's items, too
        counts = isinstance(value, int) and re.search("layers|blocks|depth", name)
        if counts and value > tensors:
            raise UserError(f"{name} is {value}, but there are {tensors} tensors")
