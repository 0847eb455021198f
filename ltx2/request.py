"""Requests: what a user can ask for. Each field declares its flag, help and rules."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, fields
from typing import Any, Mapping, Optional, Union

from .base import UserError
from .guidance import Guidance
from .options import ask, comma_separated, match_groups, numbers, span
from .sampling import SAMPLERS

MAX_FRAMES = 2049
STAGES = ("one", "two", "hq", "dfr")
OTHER_STAGES = "one two hq"  # but not dfr, which has rules of its own


@dataclass(frozen=True)
class Image:
    """A picture at a frame of the video: an index, -1 for the last, or a time "1.5s"."""

    path: str
    frame: Union[int, str] = 0
    strength: float = 1.0

    FORM = "PATH[@FRAME][:STRENGTH]"

    @classmethod
    def parse(cls, text: str) -> Image:
        """The value of --image."""
        pattern = r"(.+?)(?:@(-?\d+|[\d.]+s))?(?::(\d*\.?\d+))?"
        path, frame, strength = match_groups(cls.FORM, pattern, text)
        index = frame if frame and frame.endswith("s") else int(frame or 0)
        return cls(path, index, float(strength or 1))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA with its strength, in all stages (None) or in one (1, 2)."""

    path: str
    strength: float = 1.0
    stage: Optional[int] = None

    FORM = "PATH[:STRENGTH][@STAGE]"

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """The value of --lora."""
        pattern = r"(.+?)(?::(-?\d*\.?\d+))?(?:@(\d+))?"
        path, strength, stage = match_groups(cls.FORM, pattern, text)
        return cls(path, float(strength or 1), int(stage) if stage else None)


def sound(text: str) -> tuple[str, float]:
    """The value of --audio: a file, and the second at which to start."""
    path, start = match_groups("FILE[@START]", r"(.+?)(?:@([\d.]+)s?)?", text)
    return path, float(start or 0)


def _output(help: str, default: Any = None, **rules: Any) -> Any:
    return ask(help, default, group="output", **rules)


def _input(help: str, default: Any = None, **rules: Any) -> Any:
    return ask(help, default, group="inputs", **rules)


def _sampling(help: str, default: Any = None, **rules: Any) -> Any:
    return ask(help, default, group="sampling", **rules)


@dataclass(frozen=True)
class Request:
    """One video to make. None means the model's default, or the input clip's value."""

    prompt: str = _output("what to show and what is heard", dataclasses.MISSING)
    negative_prompt: Optional[str] = _sampling(
        "what to avoid, with guidance (default: common faults)", metavar="TEXT"
    )
    height: Optional[int] = _output("in pixels (default: 512, or the clip's)", type=int)
    width: Optional[int] = _output("in pixels (default: 768, or the clip's)", type=int)
    num_frames: Optional[int] = _output(
        "8k+1 (default: 121, the clip's, or predicted by LTX-2.5)", type=int
    )
    auto_duration: Optional[tuple[float, float]] = _output(
        "LTX-2.5 predicts the duration from the prompt, between these seconds "
        "(default: 1 20)",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        excludes="video audio",
    )
    fps: Optional[float] = _output("(default: 24, or the clip's)", type=float)
    seed: int = _sampling(
        "of the noise; --num-videos counts up", 10, type=int, between=(0, 2**63 - 1)
    )
    # Sampling. A mapping of guidance settings changes the model's defaults.
    stages: Optional[str] = _sampling(
        "one: full size; two: half size, then refined; hq: two with more work per "
        "step; dfr: keyframes, then tiles (default: two for distilled models with an "
        "upsampler, else one)",
        choices=STAGES,
    )
    steps: Optional[int] = _sampling(
        "of a dev model (default: 40, 30 from LTX-2.3 on, 15 with hq)",
        type=int,
        excludes="sigmas",
        modes=OTHER_STAGES,
    )
    sigmas: Optional[tuple[float, ...]] = _sampling(
        "schedule of the first stage (default: the model's)",
        type=numbers,
        metavar="1,...,0",
    )
    sampler: Optional[str] = _sampling(
        "of the first stage (default: the model's)", choices=tuple(SAMPLERS)
    )
    video_guidance: Union[Guidance, Mapping[str, Any], None] = dataclasses.field(
        default=None, metadata={"modes": OTHER_STAGES}
    )
    audio_guidance: Union[Guidance, Mapping[str, Any], None] = dataclasses.field(
        default=None, metadata={"modes": OTHER_STAGES, "excludes": "no_audio audio"}
    )
    guidance_interval: tuple[float, float] = _sampling(
        "sigmas at which guidance is used",
        (0.0, 1.0),
        type=span,
        metavar="FROM-TO",
        between=(0, 1),
        modes=OTHER_STAGES,
        model="dev",
    )
    step_cache: float = _sampling(
        "reuse the prediction until latents change by this fraction, 0 is off",
        0.0,
        type=float,
        metavar="FRACTION",
        between=(0, 1),
    )
    loras: tuple[LoraFile, ...] = _input(
        "LoRA, in all stages or one; repeatable",
        (),
        flag="lora",
        type=LoraFile.parse,
        repeat=True,
        metavar=LoraFile.FORM,
    )
    distilled_lora: Optional[LoraFile] = _input(
        "distilled LoRA, which a dev model needs for two stages",
        type=LoraFile.parse,
        metavar="PATH[:STRENGTH]",
    )
    temporal_upsample: bool = _sampling(
        "double the frame rate with the temporal upsampler",
        False,
        excludes="audio_only retake extend",
        modes=OTHER_STAGES,
    )
    generated_keyframes: int = _sampling(
        "generate this many single frames with the video, which keep it sharp "
        "(LTX-2.5)",
        0,
        type=int,
        metavar="N",
        excludes="audio_only retake extend",
        modes=OTHER_STAGES,
        model="2.5",
    )
    detailing_lora: Optional[LoraFile] = _input(
        "IC-LoRA that adds detail in stage 2 of dfr",
        type=LoraFile.parse,
        metavar="PATH[:STRENGTH]",
        modes="dfr",
    )
    temporal_rounds: int = _sampling(
        "dfr: double the frame rate this many times",
        0,
        type=int,
        metavar="N",
        choices=(0, 1, 2),
        modes="dfr",
    )
    # Inputs
    images: tuple[Image, ...] = _input(
        "image to show at a frame: an index, -1 for the last, or a time as 1.5s; "
        "repeatable",
        (),
        flag="image",
        type=Image.parse,
        repeat=True,
        metavar=Image.FORM,
        excludes="audio_only",
    )
    keyframes: bool = _input(
        "use images as guides instead of fixed frames",
        False,
        needs="images",
        modes=OTHER_STAGES,
    )
    image_crf: Optional[int] = _input(
        "H.264 quality that images are compressed to first, 0 is off (default: 33, "
        "18 from LTX-2.4 on)",
        type=int,
        needs="images",
        between=(0, 51),
    )
    audio: Optional[str] = _input(
        "audio to condition on, kept as the soundtrack",
        type=sound,
        metavar="FILE[@START]",
        excludes="video no_audio audio_only",
        modes=OTHER_STAGES,
    )
    audio_start: float = dataclasses.field(
        default=0.0, metadata={"between": (0, 86400), "needs": "audio"}
    )
    video: Optional[str] = _input(
        "clip to change, or the reference of an IC-LoRA",
        metavar="FILE",
        excludes="audio_only",
        modes=OTHER_STAGES,
    )
    retake: Optional[tuple[float, float]] = _input(
        "regenerate these seconds of the video",
        type=span,
        metavar="FROM-TO",
        needs="video",
        excludes="images extend",
        modes="one",
    )
    retake_streams: tuple[str, ...] = _input(
        "what to regenerate",
        ("video", "audio"),
        type=comma_separated,
        metavar="video,audio",
        needs="retake",
    )
    extend: Optional[float] = _input(
        "continue the video by these seconds; negative: before it",
        type=float,
        metavar="SECONDS",
        needs="video",
        excludes="images num_frames",
        modes="one",
    )
    reference_strength: float = _input(
        "0 to 1, how closely the reference's tokens are kept",
        1.0,
        type=float,
        needs="video",
        excludes="retake extend",
        between=(0, 1),
    )
    reference_attention: float = _input(
        "0 to 1, how much the video attends to the reference",
        1.0,
        type=float,
        needs="video",
        excludes="retake extend",
        between=(0, 1),
    )
    # Outputs
    no_audio: bool = _output("video only", False, excludes="audio_only")
    audio_only: bool = _output(
        "audio only, written as .wav", False, excludes="video_guidance", modes="one"
    )
    video_decoder: Optional[str] = _output(
        "(default: conv, if the model has it)", choices=("conv", "diffusion")
    )
    decode_bias: float = _output(
        "added to the brightness of the decoded video; released weights need none, a "
        "dark result comes from weights that another tool converted",
        0.0,
        type=float,
        between=(-1, 1),
        excludes="audio_only",
    )

    @property
    def changes_clip(self) -> bool:
        """Whether the video is changed, not a reference."""
        return self.retake is not None or self.extend is not None

    @property
    def has_reference(self) -> bool:
        """Whether the video is an IC-LoRA's reference."""
        return self.video is not None and not self.changes_clip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """A request from JSON that `dataclasses.asdict` made; UserError for settings
        that this version does not know."""
        values = dict(values)
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise UserError(f"the recorded request has unknown settings: {names}")
        record = lambda kind, x: kind(**x) if isinstance(x, Mapping) else x
        for key, kind in (("images", Image), ("loras", LoraFile)):
            values[key] = tuple(record(kind, item) for item in values.get(key) or ())
        for key in ("distilled_lora", "detailing_lora"):
            values[key] = record(LoraFile, values.get(key))
        for key in ("video_guidance", "audio_guidance"):
            settings = values.get(key)
            if settings and settings.keys() == {f.name for f in fields(Guidance)}:
                values[key] = Guidance(**settings)
        pairs = ("auto_duration", "guidance_interval", "retake")
        for key in (*pairs, "sigmas", "retake_streams"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        return cls(**values)


def frame_index(frame: Union[int, str], num_frames: int, fps: float) -> int:
    """An image's frame as an index from 0; UserError if the video does not have it."""
    index = frame
    if isinstance(frame, str):
        if not re.fullmatch(r"\d*\.?\d+s", frame):
            raise UserError(
                f"invalid frame {frame!r}: use an index (24), -1 for the last, or "
                "seconds (1.5s)"
            )
        index = round(float(frame[:-1]) * fps)
    if index < 0:
        index += num_frames
    if not 0 <= index < num_frames:
        raise UserError(
            f"frame {frame} is outside of the video, which has frames 0 to "
            f"{num_frames - 1}"
        )
    return index
