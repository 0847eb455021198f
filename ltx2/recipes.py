"""The official adapters by file name, and what their cards ask for."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Mapping, Optional

from .base import UserError
from .options import is_set
from .request import Request

NAME = r"ltx-2\.[35]-22b-(?:ic-)?lora-(.+)-\d+(?:\.\d+)*\.safetensors"
# The reference's settings of this adapter for dev models: no guidance.
PLAIN = {"cfg_scale": 1.0, "stg_scale": 0.0, "rescale_scale": 0.7}


@dataclass(frozen=True)
class Recipe:
    """What an adapter was made for."""

    trigger: str = ""  # words that were in all prompts of its training
    defaults: Mapping[str, Any] = ()  # for options that are not set
    frames: int = 2049  # at most
    kind: str = "distilled"  # the kind of model that it needs
    scale: int = 1  # the result's sides, relative to the clip's
    # Sides of tiles for a wide clip, swapped for an upright one
    tile: tuple[int, ...] = ()
    no_prompt: bool = False  # the prompt may be empty
    uses_sound: bool = False  # the clip's sound is a reference, too
    extra: int = 0  # frames that are generated and cut off
    pads: bool = False  # clips of any even sides are padded
    codes: str = ""  # encoding of its HDR frames, of color.SPACES
    matte: bool = False  # its result is the clip's alpha channel
    advice: str = ""


# Of the official distilled LoRAs, for a dev model and a distilled one
DISTILLS = "makes this model a distilled one: add --kind distilled"
ONCE = "is for dev models, but this one is distilled: remove it, or pass --kind dev"
ONE = {"stages": "one"}
NIGHT = ONE | {"fps": 24.0}
WINDOWS = ONE | {"chunk_frames": 97, "carry_frames": 17}
DUB = {"stages": "two", "reference_in_stage_2": True}
LIGHT = {"color_space": "srgb_linear"}
MATTE = ONE | {"video_guidance": PLAIN}
SLOW = "add --conditioned-fps, fps / speed (1 to 0.025): 48 at 24 fps is half speed"
RECIPES = {
    "alpha-gen": Recipe("", MATTE, 145, "dev", no_prompt=True, matte=True),
    "clean-plate": Recipe("", ONE, 49, advice="the prompt describes the empty scene"),
    "water-simulation": Recipe("ADD WATER", ONE, 185),
    "deblur": Recipe("DEBLUR", ONE, 121),
    "decompression": Recipe("ENHANCE QUALITY", ONE, 121),
    "colorization": Recipe("COLORIZE", ONE, 121),
    "restore": Recipe("", WINDOWS, tile=(544, 960)),
    "refine-details": Recipe("", ONE, tile=(576, 1024), extra=8),
    "pixel-spatial-upscaler-x2": Recipe("", ONE, scale=2),
    "day-to-night": Recipe("", NIGHT, 97, "dev", advice="use --steps 30 --cfg-scale 3"),
    "sdr-to-hdr": Recipe("", ONE | LIGHT, codes="acescct"),
    "hdr": Recipe("", DUB | LIGHT, codes="logc3"),
    "lipdub": Recipe("", DUB, uses_sound=True),
    "dubit": Recipe("", DUB, uses_sound=True),  # its later name
    "layout-to-render": Recipe("", {"stages": "two"}),
    "ingredients": Recipe("", ONE, 121),
    "cinemagraph": Recipe("CINEMAGRAPH_MOTION", {}, 25),
    "slow-motion-control": Recipe(advice=SLOW),
}


def find(path: str) -> Optional[Recipe]:
    """The recipe of an official adapter, None for any other file."""
    match = re.fullmatch(NAME, Path(path).name)
    return RECIPES.get(match[1]) if match else None


def makes_matte(r: Request) -> bool:
    """Whether the result is the alpha channel of the request's clip."""
    return any((recipe := find(x.path)) and recipe.matte for x in r.loras)


def follow(r: Request, kind: str) -> tuple[Request, Recipe, list[str]]:
    """Fill in what the adapters' cards ask for: the request, all recipes as one, and
    notes. Raises UserError for an adapter that cannot be used."""
    shown, notes = r.has_reference, []
    rules = {field.name: field.metadata for field in fields(Request)}
    found = [(Path(x.path).name, find(x.path)) for x in r.loras]
    if shown and r.stages != "one" and found and not any(x for _, x in found):
        notes = [f"{found[0][0]} is unknown: its card may ask for --stages one"]
    for name, recipe in found:
        if "distilled-lora" in name:
            notes.append(f"{name} {ONCE if kind == 'distilled' else DISTILLS}")
        if recipe is None:
            continue
        if (recipe.codes or recipe.matte) and not shown:
            raise UserError(f"{name} changes a clip: add --video")
        if recipe.codes and not r.contexts_file:
            if not r.prompt:
                raise UserError(f"{name} needs its text embeddings: add --contexts")
            notes.append(f"{name} was made for its text embeddings (--contexts)")
        usual = dict(recipe.defaults) if shown or not r.video else {}
        mode = r.stages or usual.get("stages", "one")
        allowed = [k for k in usual if mode in rules[k].get("modes", mode).split()]
        changes = {k: usual[k] for k in allowed if not is_set(r, k)}
        if kind == "distilled":  # has no guidance
            changes.pop("video_guidance", None)
        if recipe.trigger and not re.search(rf"\b{recipe.trigger}\b", r.prompt, re.I):
            changes["prompt"] = f"{recipe.trigger} {r.prompt}".strip()
        texts = [f"{k} {v!r}" for k, v in changes.items() if k != "video_guidance"]
        notes += [f"{name}: " + ", ".join(texts)] if texts else []
        named = {x.replace("-", "_") for x in re.findall(r"--([\w-]+)", recipe.advice)}
        if recipe.advice and not any(is_set(r, x) for x in named & vars(r).keys()):
            notes.append(f"{name}: {recipe.advice}")
        if recipe.no_prompt and r.prompt:
            notes.append(f'{name} was made for an empty prompt: --prompt ""')
        if recipe.kind != kind:
            notes.append(f"{name} was made for a {recipe.kind} model")
        r = replace(r, **changes)
    recipes = [Recipe(), *(recipe for _, recipe in found if recipe)]
    names = "tile", "no_prompt", "codes", *("scale", "uses_sound", "extra") * shown
    most = {k: max(getattr(recipe, k) for recipe in recipes) for k in names}
    frames, pads = min(recipe.frames for recipe in recipes), shown and len(recipes) > 1
    return r, Recipe(frames=frames, pads=pads, **most), notes
