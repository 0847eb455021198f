"""Requests: what a user can ask for. Each field declares its flag, help and rules."""

import dataclasses
from dataclasses import dataclass, fields
from typing import Any, Mapping, Optional, Union

from .base import Checked, PathName, UserError, checked
from .guidance import Guidance
from .options import ask, many, match_groups, parse, span
from .sampling import SAMPLERS

STAGES = ("one", "two", "hq", "dfr")
NOT_DFR = "one two hq"  # dfr has a schedule, keyframes and rates of its own
# Height and width, multiples of 64, which two stages need; upright with -portrait.
LANDSCAPE = {
    "480p": (512, 896),
    "720p": (704, 1280),
    "1080p": (1088, 1920),
    "4k": (2176, 3840),
    "full": (1024, 1536),  # what the models were made for
    "square": (1024, 1024),
}
SIZES = LANDSCAPE | {
    f"{name}-portrait": (w, h) for name, (h, w) in LANDSCAPE.items() if h != w
}
PRESETS = {  # options for all models, and more of dev models; those that are passed win
    "draft": ({"height": 512, "width": 768}, {"stages": "one", "steps": 20}),
    "fast": ({"height": 576, "width": 1024}, {"stages": "one", "steps": 20}),
    "standard": ({"height": 704, "width": 1280}, {}),
    "quality": (
        {"height": 1024, "width": 1536, "video_decoder": "diffusion"},
        {"stages": "hq"},
    ),
}
FILLED = {k for both in PRESETS.values() for options in both for k in options}
# Rules that several options share.
WINDOWED = {"modes": "one two", "excludes": "retake audio_only temporal_upsample"}
OF_REFERENCE = {"needs": "video", "excludes": "retake extend"}
NOT_IN_HDR = (  # what the reference's stages of HDR do not have
    "images segments chunk_frames carry_frames blend_frames generated_keyframes "
    "temporal_upsample tile_size"
)
WEIGHT = OF_REFERENCE | {"between": (0, 1)}
Settings = Union[Guidance, Mapping[str, Any], None]
MORE_FRAMES = {"modes": NOT_DFR, "excludes": "audio_only retake extend"}
CHANGES_CLIP = {"needs": "video", "modes": "one"}
OF_HDR = {"needs": "video", "modes": "one two"}
RANGE = {"type": span, "metavar": "FROM-TO"}


@dataclass(frozen=True)
class Image(Checked):
    """A picture at a frame of the video: an index, -1 for the last, or a time "1.5s"."""

    path: PathName
    frame: Union[int, str] = 0
    strength: float = 1.0

    FORM, BARE = "PATH[@FRAME][:STRENGTH]", "path"
    PATTERN = r"(?P<path>.+?)(@(?P<frame>-?\d+|[\d.]+s))?(:(?P<strength>\d*\.?\d+))?"
    parse = classmethod(parse)

    def index(self, num_frames: int, fps: float) -> int:
        """The frame as an index from 0; UserError if the video does not have it."""
        index = self.frame
        if isinstance(index, str):
            form = f"INDEX, or SECONDSs as 1.5s (image {self.path})"
            (seconds,) = match_groups(form, r"(\d*\.?\d+)s", index)
            index = round(float(seconds) * fps)
        index += num_frames if index < 0 else 0
        if not 0 <= index < num_frames:
            video = f"the video, which has frames 0 to {num_frames - 1} at {fps:g} fps"
            outside = f"frame {self.frame} is outside of {video}"
            raise UserError(f"image {self.path}: {outside}")
        return index


@dataclass(frozen=True)
class LoraFile(Checked):
    """A LoRA with its strength, for all stages (None) or for one (1, 2)."""

    path: PathName
    strength: float = 1.0
    stage: Optional[int] = None

    FORM, BARE = "PATH[:STRENGTH][@STAGE]", "path"
    PATTERN = r"(?P<path>.+?)(:(?P<strength>-?\d*\.?\d+))?(@(?P<stage>\d+))?"
    parse = classmethod(parse)


@dataclass(frozen=True)
class Segment:
    """What is seen and heard between two times, in seconds."""

    start: float
    end: float
    prompt: str

    FORM = "FROM-TO:PROMPT"
    PATTERN = r"(?P<start>\d*\.?\d+)-(?P<end>\d*\.?\d+):(?P<prompt>.+)"
    parse = classmethod(parse)


def sound(text: str) -> tuple[str, float]:
    """The value of --audio: a file, and the second at which it starts."""
    path, start = match_groups("FILE[@START]", r"(.+?)(?:@([\d.]+)s?)?", text)
    return path, float(start or 0)


def places(text: str) -> Union[int, tuple[int, ...]]:
    """The value of --generated-keyframes: a count, or frames."""
    return many(int)(text) if "," in text else int(text)


@dataclass(frozen=True)
class Request(Checked):
    """One video to make. None means the model's default, or the input clip's value.
    Numbers may be numpy's, sequences arrays, and images and LoRAs paths."""

    BARE = "prompt"

    prompt: str = ask("what the video shows and what is heard", dataclasses.MISSING)
    negative_prompt: Optional[str] = ask(
        "what to avoid, with guidance or NAG (default: common faults)"
    )
    height: Optional[int] = ask("height in pixels (default: 512, or the clip's)")
    width: Optional[int] = ask("width in pixels (default: 768, or the clip's)")
    num_frames: Optional[int] = ask(
        "number of frames, 8k+1 (default: 121, the clip's, or predicted by LTX-2.5)"
    )
    auto_duration: Optional[tuple[float, float]] = ask(
        "LTX-2.5: predict the duration in seconds from the prompt (default: 1 20)",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        excludes="video audio",
    )
    fps: Optional[float] = ask("frame rate (default: 24, or the clip's)")
    chunk_frames: Optional[int] = ask(
        "make a long video in windows of this many frames (default: 97 with "
        "--carry-frames or --blend-frames, else one window)",
        **WINDOWED,
    )
    carry_frames: Optional[int] = ask(
        "last frames of a window that the next one continues (default: 25)", **WINDOWED
    )
    blend_frames: Optional[int] = ask(
        "how many of these are blended; 0 is a hard cut (default: all)", **WINDOWED
    )
    conditioned_fps: Optional[float] = ask(
        "frame rate of motion: twice --fps is slow motion at half speed (default: --fps)",
        between=(1, 4800),
        modes=NOT_DFR,
        excludes="retake",
    )
    segments: tuple[Segment, ...] = ask(
        "prompt of a part, by its seconds, appended to --prompt; repeatable, in order",
        (),
        excludes="auto_duration contexts_file",
    )
    seed: Optional[int] = ask(
        "seed of the noise (default: random, printed and saved)", between=(0, 2**63 - 1)
    )
    # Sampling. A mapping of guidance settings changes the model's defaults.
    stages: Optional[str] = ask(
        "one: full size; two: half size, then refined; hq: two, with more work per step; "
        "dfr: keyframes, then slices (default: two for distilled models with an "
        "upsampler, else one)",
        choices=STAGES,
    )
    steps: Optional[int] = ask(
        "number of steps of a dev model (default: 40, from LTX-2.3 on 30, hq 15)",
        excludes="sigmas",
        modes=NOT_DFR,
    )
    sigmas: Optional[tuple[float, ...]] = ask(
        "sigmas of stage 1 (default: the model's)", type=many(float), metavar="1,...,0"
    )
    sampler: Optional[str] = ask(
        "sampler of stage 1 (default: the model's)", choices=tuple(SAMPLERS)
    )
    video_guidance: Settings = ask("", modes=NOT_DFR)
    audio_guidance: Settings = ask("", modes=NOT_DFR, excludes="no_audio audio")
    guidance_interval: tuple[float, float] = ask(
        "sigmas at which guidance is used",
        (0.0, 1.0),
        **RANGE,
        between=(0, 1),
        modes=NOT_DFR,
        model="dev",
    )
    step_cache: float = ask(
        "reuse the prediction until latents change by this fraction, 0 is off",
        0.0,
        between=(0, 1),
    )
    nag_scale: float = ask(
        "NAG, normalized attention guidance: avoids the negative prompt without a second "
        "pass, also with distilled models; 1 is off, other tools use 11",
        1.0,
        between=(1, 100),
    )
    nag_tau: float = ask(
        "NAG: how much attention may grow", 2.5, between=(0.01, 10), needs="nag_scale"
    )
    nag_alpha: float = ask(
        "NAG: share of it in the result", 0.25, between=(0, 1), needs="nag_scale"
    )
    loras: tuple[LoraFile, ...] = ask("LoRA for all stages or for one; repeatable", ())
    distilled_lora: Optional[LoraFile] = ask(
        "the distilled LoRA, which a dev model needs for two stages",
        metavar="PATH[:STRENGTH]",
        model="dev",
        modes="two hq dfr",
    )
    temporal_upsample: bool = ask(
        "double the frame rate with the temporal upsampler", False, **MORE_FRAMES
    )
    generated_keyframes: Union[int, tuple[int, ...]] = ask(
        "LTX-2.5: number of single frames to generate too, which keep the video sharp, or "
        "their places (24,48 or 24,)",
        0,
        type=places,
        **MORE_FRAMES,
        model="2.5",
    )
    detailing_lora: Optional[LoraFile] = ask(
        "IC-LoRA that adds detail in stage 2", metavar="PATH[:STRENGTH]", modes="dfr"
    )
    temporal_rounds: int = ask(
        "how many times to double the frame rate", 0, choices=(0, 1, 2), modes="dfr"
    )
    spatial_rounds: int = ask(
        "1: half size, then doubled in tiles, for 4K", 0, choices=(0, 1), modes="dfr"
    )
    # Inputs
    images: tuple[Image, ...] = ask(
        "image at a frame: an index, -1 (last) or 1.5s (default: the first); repeatable",
        (),
        excludes="audio_only",
    )
    keyframes: bool = ask(
        "images are guides, not fixed frames", False, needs="images", modes=NOT_DFR
    )
    image_crf: Optional[int] = ask(
        "H.264 CRF applied to images first, 0 is off (default: 33, from LTX-2.4 on 18)",
        needs="images",
        between=(0, 51),
    )
    audio: Optional[PathName] = ask(
        "audio to condition on, kept as the soundtrack",
        type=sound,
        metavar="FILE[@START]",
        excludes="video no_audio audio_only",
        modes=NOT_DFR,
    )
    audio_start: float = ask("", 0.0, between=(0, 86400), needs="audio")
    video: Optional[PathName] = ask(
        "clip to change, or the reference of an IC-LoRA",
        excludes="audio_only",
        modes=NOT_DFR,
    )
    retake: Optional[tuple[float, float]] = ask(
        "seconds of the video to regenerate",
        **RANGE,
        **CHANGES_CLIP,
        excludes="images extend",
    )
    retake_streams: tuple[str, ...] = ask(
        "what to regenerate",
        ("video", "audio"),
        type=many(str),
        metavar="video,audio",
        choices=("video", "audio"),
        needs="retake",
    )
    extend: Optional[float] = ask(
        "continue the video by these seconds; if negative, add them before it",
        metavar="SECONDS",
        **CHANGES_CLIP,
        excludes="images num_frames",
    )
    reference_strength: float = ask(
        "how closely to keep the reference, 0 to 1", 1.0, **WEIGHT
    )
    reference_attention: float = ask(
        "how much the video attends to the reference, 0 to 1", 1.0, **WEIGHT
    )
    attention_mask: Optional[PathName] = ask(
        "clip or picture of where the reference counts: black (nowhere) to white (fully)",
        **OF_REFERENCE,
    )
    reference_in_stage_2: bool = ask(
        "use the reference and LoRA in stage 2 too", False, **OF_REFERENCE, modes="two"
    )
    tile_size: Optional[tuple[int, int]] = ask(
        "size in pixels of overlapping tiles, into which a large video is split",
        type=many(int),
        metavar="HEIGHT,WIDTH",
        needs="video",
        excludes="retake extend audio_only step_cache",
    )
    contexts_file: Optional[PathName] = ask(
        "file of text embeddings instead of a prompt; some adapters ship one",
        flag="contexts",
        excludes="auto_duration segments",
    )
    color_space: Optional[str] = ask(
        "HDR: color space of EXR inputs and results (default with HDR adapters: srgb_linear)",
        choices=("srgb", "srgb_linear", "acescg", "acescct"),
        excludes="audio_only",
        modes=NOT_DFR,
    )
    hdr_keyframes: Optional[bool] = ask(
        "HDR adapters: also generate single frames, for sharpness (default: on)",
        **OF_HDR,
        model="2.5",
    )
    hdr_double_frames: bool = ask(
        "HDR adapters: generate each frame twice, keep one: smoother, twice the time",
        False,
        **OF_HDR,
        excludes=f"{NOT_IN_HDR} decode_with_keyframes attention_mask",
    )
    # Outputs
    no_audio: bool = ask("video only", False, excludes="audio_only")
    audio_only: bool = ask(
        "audio only, written as .wav", False, excludes="video_guidance", modes="one"
    )
    video_decoder: Optional[str] = ask(
        "decoder (default: conv, if the model has it)", choices=("conv", "diffusion")
    )
    decode_with_keyframes: bool = ask(
        "diffusion decoder: also read the generated keyframes, as dfr always does",
        False,
        excludes="temporal_upsample",
        model="2.5",
    )
    decode_bias: float = ask(
        "value to add to the brightness, if weights converted by another tool decode too dark",
        0.0,
        between=(-1, 1),
        excludes="audio_only",
    )
    # Names and other units for what is above
    preset: Optional[str] = ask(
        "size, stages, steps and decoder, if not set by flags", choices=tuple(PRESETS)
    )
    size: Optional[str] = ask(
        f"height and width by name: {', '.join(LANDSCAPE)}, or upright like 720p-portrait",
        metavar="NAME",
        choices=tuple(SIZES),
        instead_of="height width",
    )
    duration: Optional[float] = ask(
        "length in seconds; the nearest 8k+1 frames are made",
        metavar="SECONDS",
        between=(0.01, 3600),
        instead_of="num_frames",
        excludes="auto_duration extend",
    )

    GROUPS = {
        "output": "prompt contexts_file preset height width size num_frames duration "
        "auto_duration fps conditioned_fps color_space chunk_frames carry_frames "
        "blend_frames segments no_audio audio_only video_decoder decode_with_keyframes decode_bias",
        "inputs": "images keyframes image_crf audio video retake retake_streams extend "
        "reference_strength reference_attention attention_mask reference_in_stage_2 "
        "tile_size hdr_keyframes hdr_double_frames loras distilled_lora detailing_lora",
    }  # all others are "sampling"

    def __post_init__(self) -> None:
        """Check the types of all values; partial guidance settings stay partial."""
        super().__post_init__()
        for name in ("video_guidance", "audio_guidance"):
            settings = getattr(self, name)
            if isinstance(settings, Mapping):
                made = checked(Guidance, settings, name)
                part = {key: getattr(made, key) for key in settings}
                complete = len(part) == len(fields(Guidance))
                object.__setattr__(self, name, made if complete else part)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is encoded: a file, the prompt, or the segments' prompts after it."""
        begin = lambda s: "" if s.startswith(self.prompt) else self.prompt + " "
        texts = tuple(begin(s.prompt) + s.prompt for s in self.segments)
        return texts or (self.contexts_file or self.prompt,)

    @property
    def changes_clip(self) -> bool:
        """Whether the video is changed, not used as a reference."""
        return self.retake is not None or self.extend is not None

    @property
    def has_reference(self) -> bool:
        """Whether the video is an IC-LoRA's reference."""
        return self.video is not None and not self.changes_clip
