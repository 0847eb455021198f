"""What can be asked for, the defaults by model, and the tables of stages."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, Mapping, Optional, Union

from . import media
from .base import UserError
from .dfr import MAX_FPS, Tile, canvas, tiles
from .duration import whole_frames
from .latents import (
    SPACE_SCALE,
    TIME_SCALE,
    audio_tokens,
    evenly_spaced,
    latent_frames,
)
from .limits import (
    MAX_FRAMES,
    MAX_SIDE,
    check_combinations,
    check_frames,
    check_guidance,
    check_parts,
    check_range,
    check_sigmas,
    check_size,
)
from .lora import Lora
from .sampling import (
    DISTILLED_SIGMAS,
    REFINE_SIGMAS,
    SAMPLERS,
    Guidance,
    shifted_sigmas,
)

NEGATIVE_PROMPT = (
    "low quality, blurry, distorted, flickering, watermark, text on screen, "
    "muffled sound, noise, clipping, silence"
)
STAGES = ("one", "two", "hq", "dfr")
FPS = 24.0
AUTO_DURATION = (1.0, 20.0)  # the reference's
VIDEO_DECODERS = {"conv": "vae", "diffusion": "diffusion_decoder"}


@dataclass(frozen=True)
class Image:
    """A picture that the video shows at a frame: an index, -1 the last, "1.5s" a time."""

    path: str
    frame: Union[int, str] = 0
    strength: float = 1.0


@dataclass(frozen=True)
class LoraFile:
    """A LoRA with its strength, in all stages or in one (1, 2)."""

    path: str
    strength: float = 1.0
    stage: Optional[int] = None


@dataclass(frozen=True)
class Request:
    """One video to make. None: the model's default, or what the input clip says."""

    prompt: str
    negative_prompt: Optional[str] = None
    height: Optional[int] = None
    width: Optional[int] = None
    num_frames: Optional[int] = None
    auto_duration: Optional[tuple[float, float]] = None  # seconds: the prompt tells
    fps: Optional[float] = None
    seed: int = 10
    # Sampling; of guidance, what is given replaces the model's default.
    stages: Optional[str] = None  # STAGES
    steps: Optional[int] = None
    sigmas: Optional[tuple[float, ...]] = None
    sampler: Optional[str] = None
    video_guidance: Union[Guidance, Mapping[str, Any], None] = None
    audio_guidance: Union[Guidance, Mapping[str, Any], None] = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # sigmas that are guided
    step_cache: float = 0.0  # part the tokens must move before the model is asked again
    loras: tuple[LoraFile, ...] = ()
    distilled_lora: Optional[LoraFile] = None  # what makes a dev model refine
    temporal_upsample: bool = False
    generated_keyframes: int = 0  # single frames made beside the video
    detailing_lora: Optional[LoraFile] = None  # dfr: the second stage's IC-LoRA
    temporal_rounds: int = 0  # dfr: how often the frame rate is doubled
    # Inputs
    images: tuple[Image, ...] = ()
    keyframes: bool = False  # guide at every image, frame 0 too, instead of showing it
    image_crf: Optional[int] = None
    audio: Optional[str] = None
    audio_start: float = 0.0
    video: Optional[str] = None
    retake: Optional[tuple[float, float]] = None  # seconds
    retake_streams: tuple[str, ...] = ("video", "audio")
    extend: Optional[float] = None  # seconds, negative: before the clip
    reference_strength: float = 1.0  # of the reference's own tokens
    reference_attention: float = 1.0  # how much the video sees of it
    # Outputs
    no_audio: bool = False
    audio_only: bool = False
    video_decoder: Optional[str] = None  # VIDEO_DECODERS

    @property
    def changes_clip(self) -> bool:
        """Whether the video is changed, not only referred to."""
        return self.retake is not None or self.extend is not None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """A request that was written as JSON; keys of another version are refused."""
        values = dict(values)
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(f"the recorded request has unknown settings {unknown}")
        for key, kind in (("images", Image), ("loras", LoraFile)):
            values[key] = tuple(kind(**item) for item in values.get(key, ()))
        for key in ("distilled_lora", "detailing_lora"):
            if values.get(key):
                values[key] = LoraFile(**values[key])
        for key in ("video_guidance", "audio_guidance"):
            given = values.get(key)
            if given and given.keys() == {f.name for f in fields(Guidance)}:
                values[key] = Guidance(**given)
        pairs = ("auto_duration", "guidance_interval", "retake")
        for key in (*pairs, "sigmas", "retake_streams"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        return cls(**values)


@dataclass(frozen=True)
class Stage:
    """One denoising loop: size, schedule and everything that differs between stages."""

    name: str
    height: int
    width: int
    num_frames: int
    fps: float
    sigmas: tuple[float, ...]
    sampler: str = "euler"
    guidance: Mapping[str, Guidance] = field(default_factory=dict)  # by stream
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    step_cache: float = 0.0
    noise_scale: float = 1.0
    upsampler: Optional[str] = None  # what brings the last stage's latents to this size
    loras: tuple[LoraFile, ...] = ()
    references: bool = True  # reference clips take part
    keyframes: tuple[int, ...] = ()  # frames that are generated beside it
    keeps_audio: bool = True  # its sound is the result's
    details: int = 0  # by how much the last stage's video, as a reference, is smaller
    tile: Optional[Tile] = None  # the part of a canvas that it refines, without sound

    @property
    def latent_size(self) -> tuple[int, int, int]:
        return (
            latent_frames(self.num_frames),
            self.height // SPACE_SCALE,
            self.width // SPACE_SCALE,
        )


@dataclass(frozen=True)
class Job:
    """A request with every default filled in and every limit checked."""

    request: Request
    negative_prompt: Optional[str]  # None: no pass needs it
    stages: tuple[Stage, ...]
    streams: tuple[str, ...]
    audio_tokens: int
    images: tuple[Image, ...]  # with frames as indices
    image_crf: int
    clip: Optional[media.Media]  # of the input video
    clip_frames: int  # how many of its frames are read, at the first stage's rate
    reference_scale: tuple[int, int]  # by which a reference is smaller, and slower
    notes: tuple[str, ...]  # what was done to the inputs
    video_decoder: str  # the component that makes the pixels

    @property
    def rate(self) -> int:
        """Frames of the result for one of the first stage."""
        return 2 ** (self.request.temporal_rounds + self.request.temporal_upsample)

    @property
    def fps(self) -> float:
        return self.request.fps * self.rate

    @property
    def num_frames(self) -> int:
        return (self.request.num_frames - 1) * self.rate + 1


def default_guidance(source: Any, stages: str = "one") -> dict[str, Guidance]:
    """The dev models' guidance by stream, the reference's constants; the STG block was
    chosen for 48 blocks."""
    if stages == "hq":
        video = Guidance(3.0, 0.0, (), 3.0, 0.45)
        return {"video": video, "audio": replace(video, cfg_scale=7, rescale_scale=1)}
    last = source.config["transformer"]["num_layers"] - 1
    video = Guidance(3.0, 1.0, (min(28 if source.version >= (2, 3) else 29, last),))
    video = replace(video, modality_scale=3.0, rescale_scale=0.7)
    return {"video": video, "audio": replace(video, cfg_scale=7.0)}


def plan(r: Request, source: Any) -> Job:
    """Check a request against a model (`weights.Checkpoint`), fill in defaults and lay out
    the stages; raises UserError for whatever cannot be done, reads no weights."""
    distilled = source.kind == "distilled"
    if r.stages not in (None, *STAGES):
        raise UserError(f"stages is {r.stages!r}: choose of {', '.join(STAGES)}")
    if r.sigmas is not None:  # any sequence of numbers
        r = replace(r, sigmas=tuple(float(s) for s in r.sigmas))
    upsamplers = [n for n in source.components if n.startswith("spatial_upsampler")]
    single = r.changes_clip or r.audio_only
    kind = r.stages or ("two" if distilled and upsamplers and not single else "one")
    check_combinations(r, kind, distilled, upsamplers, source)
    check_range("seed", r.seed, 0, 2**63 - 1)

    streams = (
        ("audio",) if r.audio_only else ("video", "audio")[: 1 if r.no_audio else 2]
    )
    check_parts(streams, source)
    upsampler = None if kind == "one" else upsamplers[0]
    scale = Fraction(1) if kind == "one" else spatial_scale(source, upsampler)
    refers = r.video is not None and not single
    smaller, slower = reference_scale(r.loras) if refers else (1, 1)
    multiple = SPACE_SCALE * scale.numerator * smaller
    r, clip, clip_frames, notes = fit_clip(fit_duration(r, source), multiple, source)
    check_size("height", r.height, multiple, source)
    check_size("width", r.width, multiple, source)
    check_frames(r.num_frames)
    most = max(r.num_frames - 2, 0)
    check_range("generated_keyframes", r.generated_keyframes, 0, most)
    check_range("fps", r.fps, 1, 120)
    images = tuple(place_image(image, r) for image in r.images)

    guidance = guidance_by_stream(r, source, kind, streams)
    negative = negative_prompt(r, guidance, distilled or kind == "dfr")

    sampler = r.sampler or default_sampler(source, kind)
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is {sampler!r}: choose of {', '.join(SAMPLERS)}")
    loras = lambda n: tuple(l for l in r.loras if l.stage in (None, n))
    height, width = round(r.height / scale), round(r.width / scale)
    first = Stage(
        "stage1",
        height,
        width,
        r.num_frames,
        r.fps,
        first_sigmas(r, source, kind, height, width),
        sampler,
        guidance,
        r.guidance_interval,
        r.step_cache,
        loras=loras(1),
        keyframes=evenly_spaced(r.generated_keyframes, r.num_frames),
    )
    stages = [first]
    if kind == "dfr":
        stages = dfr_stages(r, first, upsampler, scale)
        if stages[0].num_frames != r.num_frames and r.auto_duration is None:
            notes.append(
                f"{stages[0].num_frames} frames are made, in whole segments between "
                f"keyframes, and cut to {r.num_frames}"
            )
    elif kind != "one":
        # A reference's LoRA has done its work in the first stage.
        second = tuple(l for l in loras(2) if l.stage == 2 or not refers)
        if kind == "hq" or not distilled:
            weak, strong = (0.25, 0.5) if kind == "hq" else (None, 1.0)
            lora = r.distilled_lora
            if weak is not None:
                weaker = replace(lora, strength=lora.strength * weak)
                stages[0] = replace(stages[0], loras=(*stages[0].loras, weaker))
            second += (replace(lora, strength=lora.strength * strong),)
        stages.append(
            Stage(
                "stage2",
                r.height,
                r.width,
                r.num_frames,
                r.fps,
                REFINE_SIGMAS,
                "res_2s" if kind == "hq" else "euler",
                noise_scale=REFINE_SIGMAS[0],
                upsampler=upsampler,
                loras=second,
                references=False,
                keeps_audio=distilled or r.keyframes,
            )
        )
    if r.temporal_upsample:
        last = stages[-1]
        stages.append(
            replace(
                last,
                name=f"stage{len(stages) + 1}",
                num_frames=2 * last.num_frames - 1,
                fps=2 * last.fps,
                sigmas=REFINE_SIGMAS,
                sampler="euler",
                guidance={},
                noise_scale=REFINE_SIGMAS[0],
                upsampler="temporal_upsampler",
                references=False,
                keyframes=(),
                keeps_audio=False,
            )
        )
    tokens = audio_tokens(stages[0].num_frames, r.fps)
    if "audio" in streams and not tokens:
        raise UserError(
            f"num_frames is {r.num_frames} at {r.fps:g} fps, too short for a sound: "
            "make it longer, or give no_audio"
        )
    return Job(
        r,
        negative,
        tuple(stages),
        streams,
        tokens,
        images,
        crf(r, source),
        clip,
        clip_frames,
        (smaller, slower),
        tuple(notes),
        video_decoder(r, source),
    )


def dfr_stages(
    r: Request, first: Stage, upsampler: str, scale: Fraction
) -> list[Stage]:
    """A canvas with keyframes at half size, at full size with the details of the first,
    then tile by tile at twice the rate, in each round."""
    if r.num_frames == 1 or scale != 2:
        raise UserError(
            "stages=dfr makes 9 frames or more with an x2 upsampler, but num_frames is "
            f"{r.num_frames} and the upsampler's factor {float(scale):g}"
        )
    total, keyframes = canvas(r.num_frames)
    own, detailing = (
        (lora,) if lora else () for lora in (r.distilled_lora, r.detailing_lora)
    )
    loras = lambda n: tuple(l for l in r.loras if l.stage in (None, n)) + own
    first = replace(first, num_frames=total, keyframes=keyframes, loras=loras(1))
    refine = replace(
        first,
        name="stage2",
        height=r.height,
        width=r.width,
        sigmas=REFINE_SIGMAS,
        sampler="euler",
        step_cache=0.0,
        noise_scale=REFINE_SIGMAS[0],
        upsampler=upsampler,
        loras=loras(2) + detailing,
        keeps_audio=False,
        details=max(reference_scale(detailing)[0], 2) if detailing else 0,
    )
    stages, sigmas = [first, refine], DISTILLED_SIGMAS[4:]
    for n in range(1, r.temporal_rounds + 1):
        # The keyframes of the round before are every other one of its own.
        segments = len(keyframes) * 2 ** (n - 1)
        stages += [
            replace(
                refine,
                name=f"stage{len(stages) + k}",
                num_frames=tile.num_frames,
                fps=min(r.fps * tile.rate, MAX_FPS),
                sigmas=sigmas,
                sampler="euler_half_ancestral",
                noise_scale=sigmas[0],
                upsampler=None if tile.lead else "temporal_upsampler",
                loras=loras(None),
                keyframes=tile.slots,
                details=0,
                tile=tile,
            )
            for k, tile in enumerate(tiles(segments, 2 * keyframes[0], 2**n), 1)
        ]
    return stages


def guidance_by_stream(
    r: Request, source: Any, stages: str, streams: tuple[str, ...]
) -> dict[str, Guidance]:
    """The model's guidance with what was asked for, of the streams that are made."""
    if source.kind == "distilled" or stages == "dfr":
        return {}
    guidance = default_guidance(source, stages)
    blocks = source.config["transformer"]["num_layers"]
    usual = default_guidance(source)["video"].stg_blocks
    for name in guidance:
        asked = getattr(r, f"{name}_guidance")
        if isinstance(asked, Guidance):
            guidance[name] = asked
        elif asked:
            # Where STG is off by default, its block is the usual one.
            blocks_of = {} if guidance[name].stg_scale else {"stg_blocks": usual}
            guidance[name] = replace(guidance[name], **{**blocks_of, **asked})
        check_guidance(name, guidance[name], blocks)
    given = ("audio",) if r.audio else ()  # not to be changed
    guidance = {k: g for k, g in guidance.items() if k in streams and k not in given}
    if len(streams) == 1:  # nothing to be isolated from
        guidance = {k: replace(g, modality_scale=1.0) for k, g in guidance.items()}
    return guidance


def negative_prompt(
    r: Request, guidance: Mapping[str, Guidance], distilled: bool
) -> Optional[str]:
    """What the unconditional pass reads, None if there is no such pass."""
    if any(g.cfg_scale != 1 for g in guidance.values()):
        return NEGATIVE_PROMPT if r.negative_prompt is None else r.negative_prompt
    if r.negative_prompt is not None:
        raise UserError(
            "a negative prompt was given, but nothing reads it without guidance: "
            "drop it" + ("" if distilled else ", or set a CFG scale other than 1")
        )
    return None


def video_decoder(r: Request, source: Any) -> str:
    """The component that decodes: the lighter one if the model has both."""
    lacks = {"conv": "decoder_blocks" not in source.config.get("vae", {})}
    lacks["diffusion"] = "diffusion_decoder" not in source.components
    kind = r.video_decoder or ("diffusion" if lacks["conv"] else "conv")
    if kind not in VIDEO_DECODERS:
        choices = ", ".join(VIDEO_DECODERS)
        raise UserError(f"video_decoder is {kind!r}: choose of {choices}")
    if lacks[kind] and not r.audio_only:
        raise UserError(f"video_decoder is {kind}, which this model's files have not")
    return VIDEO_DECODERS[kind]


def fit_duration(r: Request, source: Any) -> Request:
    """The request with the most frames that its prompt may come to, if that is what
    tells how long it is to be: by default where the model can."""
    given = r.video or r.audio
    if r.auto_duration is None:
        if (
            given
            or r.num_frames is not None
            or "duration_head" not in source.components
        ):
            return r
    elif given:
        raise UserError("auto_duration was given, but the clip or sound tells: drop it")
    source.require("duration_head")
    fps = FPS if r.fps is None else r.fps
    low, high = r.auto_duration or AUTO_DURATION
    check_range("auto_duration", low, 0, MAX_FRAMES / fps)
    check_range("auto_duration", high, low, MAX_FRAMES / fps)
    most = whole_frames(high, fps, low, high)
    frames = most if r.num_frames is None else min(r.num_frames, most)
    return replace(r, auto_duration=(low, high), num_frames=frames)


def reference_scale(loras: tuple[LoraFile, ...]) -> tuple[int, int]:
    """The factors that IC-LoRAs' metadata give for their reference: space and time."""
    factors = [1, 1]
    for lora in loras:
        metadata = Lora.read(lora.path).metadata if lora.stage in (None, 1) else {}
        for i, axis in enumerate(("downscale", "temporal_scale")):
            said = metadata.get(f"reference_{axis}_factor")
            if said is None:
                continue
            if not re.fullmatch("[1-9]", said) or factors[i] not in (1, int(said)):
                raise UserError(
                    f"LoRA {lora.path}: a reference_{axis}_factor of {said!r} is "
                    "not possible, or not with the other LoRAs"
                )
            factors[i] = max(factors[i], int(said))
    return tuple(factors)


def default_sampler(source: Any, stages: str) -> str:
    """The reference's choice for the first stage."""
    if stages == "hq":
        return "res_2s"
    if stages == "dfr" or source.kind == "dev" or source.version < (2, 5):
        return "euler"
    return "euler_ancestral"


def first_sigmas(
    r: Request, source: Any, stages: str, height: int, width: int
) -> tuple[float, ...]:
    """The first stage's schedule: given, distilled, or shifted."""
    if r.sigmas is not None:
        if r.steps is not None:
            raise UserError("steps and sigmas were both given: drop one")
        return check_sigmas(r.sigmas)
    if source.kind == "distilled" or stages == "dfr":
        own = len(DISTILLED_SIGMAS) - 1
        if r.steps not in (None, own):
            raise UserError(
                f"steps is {r.steps}, but a distilled model has its own {own} steps: "
                "drop it, or give sigmas"
            )
        return DISTILLED_SIGMAS
    steps = r.steps
    if steps is None:
        steps = 15 if stages == "hq" else 30 if source.version >= (2, 3) else 40
    check_range("steps", steps, 2, 1000)
    if stages != "hq":
        return shifted_sigmas(steps)
    # The only pipeline of the reference that counts its tokens.
    tokens = latent_frames(r.num_frames) * height * width // SPACE_SCALE**2
    return shifted_sigmas(steps, tokens)


def crf(r: Request, source: Any) -> int:
    """How strongly images are compressed first: as the model's training frames were."""
    if r.image_crf is None:
        return 18 if source.version >= (2, 4) else 33
    check_range("image_crf", r.image_crf, 0, 51)
    return r.image_crf


def spatial_scale(source: Any, upsampler: str) -> Fraction:
    scale = source.config[upsampler]["spatial_scale"]
    return Fraction(scale).limit_denominator(4)


def place_image(image: Image, r: Request) -> Image:
    """An image with its frame as an index."""
    frame = image.frame
    if isinstance(frame, str):
        try:
            frame = round(float(frame.removesuffix("s")) * r.fps)
        except ValueError:
            raise UserError(
                f"image {image.path}: {image.frame!r} is no frame: "
                "try an index as 24, -1 for the last, or a time as 1.5s"
            ) from None
    if frame < 0:
        frame += r.num_frames
    if not 0 <= frame < r.num_frames:
        raise UserError(
            f"image {image.path} is for frame {image.frame}, "
            f"but the video has frames 0 to {r.num_frames - 1}"
        )
    check_range(f"image {image.path}: strength", image.strength, 0.01, 1)
    media.load_image(image.path)
    return replace(image, frame=frame)


def fit_clip(
    r: Request, multiple: int, source: Any
) -> tuple[Request, Optional[media.Media], int, list[str]]:
    """The request with size, length and rate, the clip, how much of it is read, and what
    was done to it. A clip's own size and rate are kept as far as the model can."""
    if r.video is None:
        usual = {"height": 512, "width": 768, "num_frames": 121, "fps": FPS}
        usual |= {k: v for k, v in source.defaults.items() if k in usual}
        missing = {k: v for k, v in usual.items() if getattr(r, k) is None}
        return replace(r, **missing), None, 0, []
    clip = media.probe(r.video)
    if not clip.has_video:
        raise UserError(f"{r.video} has no picture: sound alone goes with audio")
    notes = []
    fps = float(clip.fps if r.fps is None else r.fps)
    check_range("fps", fps, 1, 120)
    same = media.frame_rate(fps) == clip.fps
    there = clip.num_frames if same else math.floor(clip.duration * fps + 0.01)
    frames = (min(max(there, 1), MAX_FRAMES) - 1) // TIME_SCALE * TIME_SCALE + 1
    fewest = -(-2 * SPACE_SCALE // multiple) * multiple
    legal = lambda side: max(min(side, MAX_SIDE) // multiple * multiple, fewest)
    height = legal(clip.height) if r.height is None else r.height
    width = legal(clip.width) if r.width is None else r.width
    if (height, width) != (clip.height, clip.width):
        notes.append(
            f"{r.video}: {clip.width}x{clip.height} resized and cropped "
            f"to {width}x{height}"
        )
    if not same:
        notes.append(
            f"{r.video}: {float(clip.fps):g} brought to {fps:g} frames a second"
        )
    total = frames if r.num_frames is None else r.num_frames
    if r.extend is not None:
        check_range("extend", abs(r.extend), 1 / fps, MAX_FRAMES / fps)
        total = frames + max(round(abs(r.extend) * fps / TIME_SCALE), 1) * TIME_SCALE
    if r.retake is not None and total > frames:
        raise UserError(
            f"num_frames is {total}, but a retake of this clip has {frames} at most"
        )
    frames = min(frames, total)
    if frames != there:
        notes.append(f"{r.video}: {frames} of {there} frames are read (8k+1)")
    if r.retake:
        start, end = r.retake
        seconds = frames / fps
        if not 0 <= start < end or start >= seconds:
            raise UserError(
                f"retake is {start:g}-{end:g}, but the clip lasts from 0 to "
                f"{seconds:.2f} s: give a start before an end inside it"
            )
    r = replace(r, height=height, width=width, num_frames=total, fps=fps)
    return r, clip, frames, notes
