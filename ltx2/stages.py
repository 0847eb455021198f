"""From a request to a job: defaults by model, limits, and the table of stages."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional

from . import media
from .base import UserError
from .conditions import (
    ClipPart,
    Condition,
    GuideImage,
    HoldClip,
    HoldSound,
    InputFiles,
    NewKeyframes,
    PreviousAsReference,
    ReferenceClip,
    RetakeClip,
    ShowImage,
    Stage,
    TileKeyframes,
)
from .duration import whole_frames
from .guidance import Guidance
from .latents import SPACE_SCALE, TIME_SCALE, Size, audio_tokens, evenly_spaced
from .memory import MemoryPlan
from .options import check, check_range
from .request import MAX_FRAMES, Image, LoraFile, Request, frame_index
from .sampling import DISTILLED_SIGMAS, REFINE_SIGMAS, shifted_sigmas
from .weights import Checkpoint
from .windows import MAX_FPS, canvas, tiles

NEGATIVE_PROMPT = (
    "low quality, blurry, distorted, flickering, watermark, text on screen, "
    "muffled sound, noise, clipping, silence"
)
SIZE = {"height": 512, "width": 768, "num_frames": 121, "fps": 24.0}
MAX_SIDE = 4096
AUTO_DURATION = (1.0, 20.0)  # seconds, the reference's
DECODERS = {"conv": "vae", "diffusion": "diffusion_decoder"}
BOTH = ("video", "audio")
OWN = None  # a dev model's schedule by its steps, a distilled model's own
MODEL = None  # the sampler that the reference uses with the model


class Row(NamedTuple):
    """One stage of a mode."""

    size: str  # "small": divided by the upsampler's scale, "full", "doubled" in rate
    sigmas: Optional[tuple[float, ...]]
    sampler: Optional[str]
    guided: bool
    distilled_lora: float  # times its strength; 0: without
    upsampler: Optional[str]  # axis of the upsampler that it starts with
    final: tuple[str, ...]  # streams that the result takes from it
    keyframes: bool  # generates keyframes


# fmt: off
MODES = {
    "one": (
        Row("full", OWN, MODEL, True, 0, None, BOTH, True),
    ),
    "two": (
        Row("small", OWN, MODEL, True, 0, None, (), True),
        Row("full", REFINE_SIGMAS, "euler", False, 1, "spatial", BOTH, False),
    ),
    "two of a dev model": (  # refining needs the sound, but does not improve it
        Row("small", OWN, MODEL, True, 0, None, ("audio",), True),
        Row("full", REFINE_SIGMAS, "euler", False, 1, "spatial", ("video",), False),
    ),
    "hq": (
        Row("small", OWN, "res_2s", True, 0.25, None, ("audio",), True),
        Row("full", REFINE_SIGMAS, "res_2s", False, 0.5, "spatial", ("video",), False),
    ),
    "dfr": (
        Row("small", DISTILLED_SIGMAS, "euler", False, 1, None, ("audio",), True),
        Row("full", REFINE_SIGMAS, "euler", False, 1, "spatial", ("video",), True),
    ),
}
DOUBLED = Row("doubled", REFINE_SIGMAS, "euler", False, 1, "temporal", ("video",), False)
# fmt: on
TILE_SIGMAS, TILE_SAMPLER = DISTILLED_SIGMAS[4:], "euler_half_ancestral"


@dataclass(frozen=True)
class Job:
    """A request made definite: all that will be done and what it takes."""

    request: Request  # with every default filled in
    stages: tuple[Stage, ...]
    prompts: tuple[str, ...]  # and, if a pass reads it, the negative prompt
    decoder: str  # the component that makes the pixels
    notes: tuple[str, ...]  # what was changed about the inputs
    memory: Optional[MemoryPlan] = field(default=None, compare=False)

    @property
    def negative_prompt(self) -> Optional[str]:
        """The one that is used, None if no pass reads it."""
        return self.prompts[1] if len(self.prompts) > 1 else None

    @property
    def streams(self) -> tuple[str, ...]:
        return self.stages[0].streams

    @property
    def size(self) -> Size:
        """Of the result."""
        r = self.request
        rate = 2 ** (r.temporal_rounds + r.temporal_upsample)
        frames = (r.num_frames - 1) * rate + 1
        return Size(r.width, r.height, frames, r.fps * rate, self.audio_tokens)

    @property
    def audio_tokens(self) -> int:
        return self.stages[0].size.audio_tokens

    @property
    def has_media_inputs(self) -> bool:
        """Whether any condition needs an encoder."""
        return any(
            c.encoder for s in self.stages for cs in s.conditions.values() for c in cs
        )


@dataclass(frozen=True)
class Planner:
    """A request on its way to a job, with the facts about its model and its inputs."""

    request: Request
    checkpoint: Checkpoint
    files: InputFiles
    clip_frames: int = 0  # that are read of the input video
    clip_has_audio: bool = False
    notes: tuple[str, ...] = ()

    @property
    def distilled(self) -> bool:
        return self.checkpoint.kind == "distilled"

    @property
    def upsampler(self) -> str:
        """The spatial upsampler, "" if there is none."""
        names = self.checkpoint.components
        return next((n for n in names if n.startswith("spatial_upsampler")), "")

    @property
    def mode(self) -> str:
        """The value of `stages`, or its default."""
        r = self.request
        simple = r.changes_clip or r.audio_only or not self.distilled
        return r.stages or ("two" if self.upsampler and not simple else "one")

    @property
    def rows(self) -> tuple[Row, ...]:
        """The stages of the mode."""
        r, mode = self.request, self.mode
        if mode == "two" and not self.distilled and not r.keyframes:
            mode = "two of a dev model"
        return MODES[mode] + (DOUBLED,) * r.temporal_upsample

    @property
    def scale(self) -> Fraction:
        """By which the first stage is smaller."""
        if self.mode == "one":
            return Fraction(1)
        scale = self.checkpoint.config[self.upsampler]["spatial_scale"]
        return Fraction(scale).limit_denominator(4)

    @property
    def streams(self) -> tuple[str, ...]:
        r = self.request
        return BOTH[r.audio_only : 2 - r.no_audio]

    @property
    def reference_scale(self) -> tuple[int, int]:
        """By how much a reference clip is smaller and slower, say the IC-LoRAs."""
        r = self.request
        loras = [lora for lora in r.loras if lora.stage in (None, 1)]
        return reference_scale(loras, self.files) if r.has_reference else (1, 1)


def plan(request: Request, checkpoint: Checkpoint, files: InputFiles) -> Job:
    """Check a request against a model, fill in its defaults and lay out its stages.

    Raises UserError for whatever cannot be done; reads headers and input files, no
    weights.
    """
    p = Planner(request, checkpoint, files)
    check(request, p.mode, unmet_requirements(p))
    for fault, message in FAULTS:
        if fault(p):
            raise UserError(message(p) if callable(message) else message)
    check_parts(p)
    check_loras(p)
    p = with_size(with_duration(p))
    r = p.request
    images = tuple(placed(image, r, files) for image in r.images)
    p = replace(p, request=replace(r, images=images))
    guidance = guidance_by_stream(p)
    stages = tuple(lay_out(p, guidance))
    frames = stages[0].size.num_frames
    notes = p.notes
    if frames != r.num_frames and r.auto_duration is None:
        notes += (
            f"{frames} frames are generated, in whole segments between keyframes, and "
            f"cut to {r.num_frames}",
        )
    if "audio" in p.streams and not stages[0].size.audio_tokens:
        raise UserError(
            f"{r.num_frames} frames at {r.fps:g} fps are too short for audio: increase "
            "num_frames or set no_audio"
        )
    prompts = (r.prompt, *negative_prompt(r, guidance))
    # As it was asked for: planned again, the same job comes out.
    request = replace(r, images=request.images)
    return Job(request, stages, prompts, decoder(p), notes)


# Limits


def unmet_requirements(p: Planner) -> dict[str, str]:
    """What options need of a model and this one is not (see `options.check`)."""
    unmet = {}
    if p.distilled:
        unmet["dev"] = "a dev model (this one is distilled)"
    if not p.checkpoint.config["transformer"].get("use_keyframes_abs_pos_embedding"):
        unmet["2.5"] = f"LTX-2.5 (this model is {p.checkpoint.model_version})"
    return unmet


def _guided(p: Planner) -> Iterator[Any]:
    r = p.request
    return (g for g in (r.video_guidance, r.audio_guidance) if g)


def _needs_lora(p: Planner) -> bool:
    return p.mode != "one" and not p.distilled


def _bad_strength(lora: Optional[LoraFile]) -> bool:
    return lora is not None and bool(lora.stage or not lora.strength)


Fault = tuple[Callable[[Planner], Any], "str | Callable[[Planner], str]"]
FAULTS: list[Fault] = [  # what no single field can declare
    (
        lambda p: p.distilled
        and any(not isinstance(g, Guidance) or g.active for g in _guided(p)),
        "guidance needs a dev model (this one is distilled): remove the guidance "
        "settings",
    ),
    (
        lambda p: len(p.streams) == 1
        and any("modality_scale" in g for g in _guided(p) if isinstance(g, Mapping)),
        "modality_scale needs both video and audio",
    ),
    (
        lambda p: p.request.retake
        and p.request.no_audio
        and "video" not in p.request.retake_streams,
        "retake has nothing to regenerate: audio is off and video is kept",
    ),
    (
        lambda p: not p.request.retake_streams
        or set(p.request.retake_streams) - set(BOTH),
        lambda p: f"unknown retake_streams {','.join(p.request.retake_streams)!r}: "
        "choose from video, audio",
    ),
    (
        lambda p: p.request.has_reference and not p.request.loras,
        "a reference video needs an IC-LoRA: add --lora (to change the video, use "
        "--retake or --extend)",
    ),
    (
        lambda p: p.request.guidance_interval[0] > p.request.guidance_interval[1],
        "guidance_interval must be from a lower to a higher sigma",
    ),
    (
        lambda p: p.mode == "dfr" and "2.5" in unmet_requirements(p),
        lambda p: f"--stages dfr needs {unmet_requirements(p)['2.5']}",
    ),
    (
        lambda p: p.mode != "one" and not p.upsampler,
        lambda p: f"--stages {p.mode} needs a latent upsampler, which this model does "
        "not have: add its file with --upsampler",
    ),
    (
        lambda p: p.mode == "hq" and p.distilled,
        "--stages hq needs a dev model (this one is distilled): use --stages two",
    ),
    (
        lambda p: _needs_lora(p) and p.request.distilled_lora is None,
        lambda p: f"--stages {p.mode} of a dev model needs its distilled LoRA: add "
        "--distilled-lora",
    ),
    (
        lambda p: not _needs_lora(p) and p.request.distilled_lora,
        "distilled_lora needs a dev model and --stages two, hq or dfr",
    ),
    (
        lambda p: _bad_strength(p.request.distilled_lora),
        "distilled_lora takes no stage, and its strength must not be 0",
    ),
    (
        lambda p: _bad_strength(p.request.detailing_lora),
        "detailing_lora takes no stage, and its strength must not be 0",
    ),
    (
        lambda p: (p.request.temporal_upsample or p.request.temporal_rounds)
        and "temporal_upsampler" not in p.checkpoint.components,
        "doubling the frame rate needs a temporal latent upsampler, which this model "
        "does not have: add its file with --upsampler",
    ),
    (
        lambda p: p.request.temporal_upsample
        and not p.distilled
        and p.request.distilled_lora is None,
        "temporal_upsample of a dev model needs --stages two and --distilled-lora",
    ),
    (
        lambda p: p.mode == "dfr" and p.scale != 2,
        lambda p: f"--stages dfr needs an x2 upsampler (this one is x{float(p.scale):g})",
    ),
    (
        lambda p: p.mode == "dfr" and p.request.num_frames == 1,
        "--stages dfr needs at least 9 frames",
    ),
    (
        lambda p: p.distilled
        and p.mode != "dfr"
        and p.request.steps not in (None, len(DISTILLED_SIGMAS) - 1),
        lambda p: f"steps is {p.request.steps}, but a distilled model has its own "
        f"{len(DISTILLED_SIGMAS) - 1} steps: remove it, or pass sigmas",
    ),
]


def check_parts(p: Planner) -> None:
    """UserError if the model lacks a component that the request needs."""
    needed = {"transformer", "connectors"}
    needed |= {"vae"} if "video" in p.streams else set()
    needed |= {"audio_vae", "vocoder"} if "audio" in p.streams else set()
    needed |= {"gemma"} if p.checkpoint.text_encoder == "gemma" else set()
    p.checkpoint.require(*sorted(needed))


def check_loras(p: Planner) -> None:
    """UserError for a stage or a strength that has no meaning, or an unreadable file."""
    count = 1 if p.mode == "one" else 2
    for lora in p.request.loras:
        if lora.stage is not None and not 1 <= lora.stage <= count:
            raise UserError(
                f"LoRA {lora.path} is for stage {lora.stage}, but there are {count}"
            )
        if lora.strength == 0:
            raise UserError(f"LoRA {lora.path} has strength 0, no effect: remove it")
        check_range(f"LoRA {lora.path}: strength", lora.strength, -10, 10)


def check_side(name: str, value: int, multiple: int, checkpoint: Checkpoint) -> None:
    """UserError unless a side is whole latents in every stage; a decoder that reflects
    its borders needs two."""
    padding = checkpoint.config.get("vae", {}).get("spatial_padding_mode", "reflect")
    low = max(multiple, 2 * SPACE_SCALE) if padding == "reflect" else multiple
    high = MAX_SIDE // multiple * multiple
    if not isinstance(value, int) or value % multiple or not low <= value <= high:
        nearest = min(max(round(value / multiple) * multiple, low), high)
        raise UserError(
            f"{name} must be a multiple of {multiple} from {low} to {high}, got "
            f"{value}: use {nearest}"
        )


def check_frames(value: int) -> None:
    """UserError unless `value` is 8k+1."""
    valid = isinstance(value, int) and value % TIME_SCALE == 1
    if not valid or not 1 <= value <= MAX_FRAMES:
        nearest = max(round((value - 1) / TIME_SCALE), 0) * TIME_SCALE + 1
        raise UserError(
            f"num_frames must be 8k+1 from 1 to {MAX_FRAMES}, got {value}: use "
            f"{min(nearest, MAX_FRAMES)}"
        )


# Defaults


def with_duration(p: Planner) -> Planner:
    """With the most frames that the duration head may predict, if it decides: by
    default where the model has one and no input has a duration."""
    r, parts = p.request, p.checkpoint.components
    fixed = r.video or r.audio or r.num_frames is not None
    if r.auto_duration is None and (fixed or "duration_head" not in parts):
        return p
    p.checkpoint.require("duration_head")
    fps = SIZE["fps"] if r.fps is None else r.fps
    low, high = r.auto_duration or AUTO_DURATION
    check_range("auto_duration", low, 0, MAX_FRAMES / fps)
    check_range("auto_duration", high, low, MAX_FRAMES / fps)
    longest = whole_frames(high, fps, low, high)
    frames = longest if r.num_frames is None else min(r.num_frames, longest)
    return replace(p, request=replace(r, auto_duration=(low, high), num_frames=frames))


def with_size(p: Planner) -> Planner:
    """With size, length and rate: the user's, the clip's, or the model's."""
    multiple = SPACE_SCALE * p.scale.numerator * p.reference_scale[0]
    if p.request.video is None:
        usual = SIZE | {k: v for k, v in p.checkpoint.defaults.items() if k in SIZE}
        missing = {k: v for k, v in usual.items() if getattr(p.request, k) is None}
        p = replace(p, request=replace(p.request, **missing))
    else:
        p = fit_clip(p, multiple)
    r = p.request
    if r.audio:
        check_sound(r, p.files.probe(r.audio).audio_duration)
    check_side("height", r.height, multiple, p.checkpoint)
    check_side("width", r.width, multiple, p.checkpoint)
    check_frames(r.num_frames)
    check_range(
        "generated_keyframes", r.generated_keyframes, 0, max(r.num_frames - 2, 0)
    )
    check_range("fps", r.fps, 1, 120)
    return p


def fit_clip(p: Planner, multiple: int) -> Planner:
    """Size, length and rate of the input video as far as the model can have them, how
    much of it is read, and notes about what was changed."""
    r = p.request
    clip = p.files.probe(r.video)
    if not clip.has_video:
        raise UserError(f"{r.video} has no video: pass a sound with --audio")
    fps = float(clip.fps if r.fps is None else r.fps)
    check_range("fps", fps, 1, 120)
    same_rate = media.frame_rate(fps) == clip.fps
    there = clip.num_frames if same_rate else math.floor(clip.duration * fps + 0.01)
    frames = (min(max(there, 1), MAX_FRAMES) - 1) // TIME_SCALE * TIME_SCALE + 1
    low = -(-2 * SPACE_SCALE // multiple) * multiple
    fit = lambda side: max(min(side, MAX_SIDE) // multiple * multiple, low)
    height = fit(clip.height) if r.height is None else r.height
    width = fit(clip.width) if r.width is None else r.width
    total = frames if r.num_frames is None else r.num_frames
    if r.extend is not None:
        check_range("extend", abs(r.extend), 1 / fps, MAX_FRAMES / fps)
        total = frames + max(round(abs(r.extend) * fps / TIME_SCALE), 1) * TIME_SCALE
    if r.retake is not None and total > frames:
        raise UserError(
            f"num_frames must be at most {frames} in a retake of this clip, got {total}"
        )
    frames = min(frames, total)
    if r.retake:
        check_span(r.retake, frames / fps)
    notes = {
        f"{clip.width}x{clip.height} resized and cropped to {width}x{height}": (
            (height, width) != (clip.height, clip.width)
        ),
        f"{float(clip.fps):g} fps changed to {fps:g}": not same_rate,
        f"{frames} of {there} frames are read (8k+1)": frames != there,
    }
    return replace(
        p,
        request=replace(r, height=height, width=width, num_frames=total, fps=fps),
        clip_frames=frames,
        clip_has_audio=clip.has_audio,
        notes=tuple(f"{r.video}: {note}" for note, applies in notes.items() if applies),
    )


def check_sound(r: Request, seconds: float) -> None:
    """UserError unless the audio input has sound where it is to start."""
    if not seconds:
        raise UserError(f"{r.audio} has no sound")
    if r.audio_start >= seconds:
        raise UserError(
            f"{r.audio}: there is no sound at {r.audio_start:g} s, it is {seconds:.2f} s "
            "long"
        )


def check_span(span: tuple[float, float], seconds: float) -> None:
    """UserError unless a retake begins inside a clip of so many seconds."""
    start, end = span
    if not 0 <= start < end or start >= seconds:
        raise UserError(
            f"retake is {start:g}-{end:g}, but the clip is from 0 to {seconds:.2f} s: "
            "use a start before an end inside it"
        )


def placed(image: Image, r: Request, files: InputFiles) -> Image:
    """An image with its frame as an index."""
    try:
        frame = frame_index(image.frame, r.num_frames, r.fps)
    except UserError as error:
        raise UserError(f"image {image.path}: {error}") from None
    check_range(f"image {image.path}: strength", image.strength, 0.01, 1)
    files.image(image.path)
    return replace(image, frame=frame)


def image_crf(p: Planner) -> int:
    """How strongly images are compressed first: as the model's training images were."""
    default = 18 if p.checkpoint.version >= (2, 4) else 33
    return default if p.request.image_crf is None else p.request.image_crf


def reference_scale(loras: list[LoraFile], files: InputFiles) -> tuple[int, int]:
    """The factors for references in LoRAs' metadata: smaller, slower."""
    factors = [1, 1]
    for lora in loras:
        metadata = files.lora(lora.path).metadata
        for i, axis in enumerate(("downscale", "temporal_scale")):
            value = metadata.get(f"reference_{axis}_factor")
            if value is None:
                continue
            if not re.fullmatch("[1-9]", value) or factors[i] not in (1, int(value)):
                raise UserError(
                    f"LoRA {lora.path}: reference_{axis}_factor {value!r} is not "
                    "possible, or differs from another LoRA's"
                )
            factors[i] = max(factors[i], int(value))
    return tuple(factors)


def default_guidance(checkpoint: Checkpoint, mode: str = "one") -> dict[str, Guidance]:
    """The dev models' guidance by stream, the reference's constants; the STG block was
    chosen for 48 blocks."""
    if mode == "hq":
        video = Guidance(3.0, 0.0, (), 3.0, 0.45)
        return {"video": video, "audio": replace(video, cfg_scale=7, rescale_scale=1)}
    last = checkpoint.config["transformer"]["num_layers"] - 1
    block = min(28 if checkpoint.version >= (2, 3) else 29, last)
    video = Guidance(3.0, 1.0, (block,), 3.0, 0.7)
    return {"video": video, "audio": replace(video, cfg_scale=7.0)}


def guidance_by_stream(p: Planner) -> dict[str, Guidance]:
    """The model's guidance, changed by the request's, for the streams it applies to."""
    r = p.request
    if p.distilled or p.mode == "dfr":
        return {}
    guidance = default_guidance(p.checkpoint, p.mode)
    usual_blocks = default_guidance(p.checkpoint)["video"].stg_blocks
    last = p.checkpoint.config["transformer"]["num_layers"] - 1
    for name, defaults in guidance.items():
        settings = getattr(r, f"{name}_guidance")
        if isinstance(settings, Guidance):
            guidance[name] = settings
        elif settings:
            # Where STG is off by default, it still has a usual block.
            blocks = {} if defaults.stg_scale else {"stg_blocks": usual_blocks}
            guidance[name] = replace(defaults, **{**blocks, **settings})
        check(guidance[name], label=f"{name} ")
        for block in guidance[name].stg_blocks or ():
            check_range(f"{name} stg_blocks", block, 0, last)
    changed = [k for k in p.streams if not (k == "audio" and r.audio)]
    guidance = {k: guidance[k] for k in changed}
    if len(p.streams) == 1:  # there is no other stream to agree with
        guidance = {k: replace(g, modality_scale=1.0) for k, g in guidance.items()}
    return guidance


def negative_prompt(r: Request, guidance: Mapping[str, Guidance]) -> tuple[str, ...]:
    """The prompt of the unconditional pass, if there is one."""
    if any(g.cfg_scale != 1 for g in guidance.values()):
        return (NEGATIVE_PROMPT if r.negative_prompt is None else r.negative_prompt,)
    if r.negative_prompt is not None:
        raise UserError("negative_prompt needs cfg_scale above 1, and a dev model")
    return ()


def decoder(p: Planner) -> str:
    """The component that decodes: the lighter one if the model has both."""
    has_conv = "decoder_blocks" in p.checkpoint.config.get("vae", {})
    has = {
        "conv": has_conv,
        "diffusion": "diffusion_decoder" in p.checkpoint.components,
    }
    kind = p.request.video_decoder or ("conv" if has_conv else "diffusion")
    if not has[kind] and not p.request.audio_only:
        raise UserError(f"this model has no {kind} video decoder")
    return DECODERS[kind]


# Stages


def lay_out(p: Planner, guidance: Mapping[str, Guidance]) -> Iterator[Stage]:
    """The stages of a request, by the rows of its mode."""
    r = p.request
    frames, keyframes = r.num_frames, evenly_spaced(r.generated_keyframes, r.num_frames)
    if p.mode == "dfr":
        frames, keyframes = canvas(r.num_frames)
    sound = audio_tokens(frames, r.fps) if "audio" in p.streams else 0
    full = Size(r.width, r.height, frames, r.fps, sound)
    sizes = {"small": full.divided(p.scale), "full": full, "doubled": full.doubled()}
    for n, row in enumerate(p.rows, 1):
        size = sizes[row.size]
        first = n == 1
        sigmas = first_sigmas(p, size) if first else row.sigmas
        axis = {"spatial": p.upsampler, "temporal": "temporal_upsampler", None: None}
        yield Stage(
            f"stage{n}",
            size,
            sigmas,
            (first and r.sampler) or row.sampler or default_sampler(p),
            1.0 if first else sigmas[0],
            guidance if row.guided else {},
            r.guidance_interval if row.guided else (0.0, 1.0),
            r.step_cache if first else 0.0,
            stage_loras(p, n, row.distilled_lora),
            axis[row.upsampler],
            stage_conditions(p, n, size, keyframes if row.keyframes else ()),
            row.final,
        )
    if r.temporal_rounds:
        yield from lay_out_tiles(p, full, keyframes)


def lay_out_tiles(
    p: Planner, full: Size, keyframes: tuple[int, ...]
) -> Iterator[Stage]:
    """dfr's rounds: each doubles the frame rate and refines the canvas tile by tile."""
    number = len(p.rows)
    for n in range(1, p.request.temporal_rounds + 1):
        # The keyframes of the round before are every other one of this round's.
        segments, rate = len(keyframes) * 2 ** (n - 1), 2**n
        for tile in tiles(segments, 2 * keyframes[0], rate):
            number += 1
            fps = min(full.fps * rate, MAX_FPS)
            size = replace(full, num_frames=tile.num_frames, fps=fps, audio_tokens=0)
            images = stage_images(p, size, rate, tile.first)
            yield Stage(
                f"stage{number}",
                size,
                TILE_SIGMAS,
                TILE_SAMPLER,
                TILE_SIGMAS[0],
                loras=stage_loras(p, None, 1),
                upsampler=None if tile.lead else "temporal_upsampler",
                conditions={"video": (*images, TileKeyframes(tile))},
                final=("video",),
                part=tile,
            )


def first_sigmas(p: Planner, size: Size) -> tuple[float, ...]:
    """The first stage's schedule: the request's, the distilled one, or by steps."""
    r = p.request
    if r.sigmas is not None:
        s = tuple(float(v) for v in r.sigmas)
        falling = all(a > b for a, b in zip(s, s[1:]))
        if len(s) < 2 or not falling or not 0 <= s[-1] < s[0] <= 1:
            raise UserError(
                f"sigmas must fall from at most 1 to at least 0, e.g. 1,0.9,0.7,0.4,0; "
                f"got {','.join(f'{v:g}' for v in s)}"
            )
        return s
    if p.distilled or p.mode == "dfr":
        return DISTILLED_SIGMAS
    default = 15 if p.mode == "hq" else 30 if p.checkpoint.version >= (2, 3) else 40
    steps = default if r.steps is None else r.steps
    check_range("steps", steps, 2, 1000)
    # Only the reference's hq pipeline counts its tokens.
    return (
        shifted_sigmas(steps, size.tokens) if p.mode == "hq" else shifted_sigmas(steps)
    )


def default_sampler(p: Planner) -> str:
    """The reference's sampler for a first stage."""
    ancestral = p.distilled and p.checkpoint.version >= (2, 5)
    return "euler_ancestral" if ancestral else "euler"


def stage_loras(p: Planner, n: Optional[int], distilled: float) -> tuple[LoraFile, ...]:
    """The LoRAs of stage `n`: the user's, the distilled one by a factor of its strength,
    dfr's detailing one. A reference's LoRA is for the first stage."""
    r = p.request
    loras = tuple(lora for lora in r.loras if lora.stage in (None, n))
    if n == 2 and r.has_reference:
        loras = tuple(lora for lora in loras if lora.stage == 2)
    if r.distilled_lora and distilled:
        strength = r.distilled_lora.strength * distilled
        loras += (replace(r.distilled_lora, strength=strength),)
    return loras + ((r.detailing_lora,) if r.detailing_lora and n == 2 else ())


def stage_conditions(
    p: Planner, n: int, size: Size, keyframes: tuple[int, ...]
) -> dict[str, tuple[Condition, ...]]:
    """The conditions of stage `n` by stream, in the reference's order."""
    r, conditions = p.request, {stream: [] for stream in p.streams}
    add = lambda stream, *new: stream in conditions and conditions[stream].extend(new)
    add("video", *stage_images(p, size, round(size.fps / r.fps)))
    if r.audio:
        add("audio", HoldSound(r.audio, r.audio_start))
    for stream in ("video", "audio")[: 1 + p.clip_has_audio] if r.changes_clip else ():
        add(stream, clip_part(p, stream))
    if r.has_reference and n == 1:
        weights = r.reference_strength, r.reference_attention
        where = r.video, p.clip_frames
        add("video", ReferenceClip(*where, *weights, *p.reference_scale))
    if keyframes:
        add("video", NewKeyframes(keyframes))
    if r.detailing_lora and n == 2:
        factor = reference_scale([r.detailing_lora], p.files)[0]
        add("video", PreviousAsReference(max(factor, 2)))
    return {stream: tuple(items) for stream, items in conditions.items()}


def clip_part(p: Planner, stream: str) -> ClipPart:
    """What a stream keeps of the clip that is changed."""
    r = p.request
    part = r.video, stream, p.clip_frames
    if r.extend is not None:
        return HoldClip(*part, at_end=r.extend < 0)
    return RetakeClip(*part, r.retake if stream in r.retake_streams else None)


def stage_images(
    p: Planner, size: Size, rate: int = 1, first: int = 0
) -> Iterator[Condition]:
    """The images of a stage at `rate` times the frame rate, from frame `first` on."""
    for image in p.request.images:
        frame = image.frame * rate - first
        if 0 <= frame < size.num_frames:
            facts = image.path, image.strength, image_crf(p)
            shown = frame == 0 and not p.request.keyframes
            yield ShowImage(*facts) if shown else GuideImage(*facts, frame)
