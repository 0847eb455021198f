"""What a request may not be, each mistake in one line with what would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping

from . import media
from .base import UserError
from .latents import SPACE_SCALE, TIME_SCALE
from .sampling import Guidance

if TYPE_CHECKING:
    from .request import Request

MAX_FRAMES, MAX_SIDE = 2049, 4096


def check_combinations(
    r: Request, stages: str, distilled: bool, upsamplers: list[str], source: Any
) -> None:
    """Refuse what does not go together, with the reason."""

    def refuse(condition: Any, reason: str) -> None:
        if condition:
            raise UserError(reason)

    guided = [g for g in (r.video_guidance, r.audio_guidance) if g]
    refuse(
        distilled and any(not isinstance(g, Guidance) or g.active for g in guided),
        "guidance was given, but this is a distilled model, which was trained "
        "without: drop the guidance settings, or use a dev model",
    )
    refuse(r.no_audio and r.audio_only, "no_audio and audio_only were both given")
    refuse(r.no_audio and r.audio, "audio was given together with no_audio: drop one")
    refuse(
        r.no_audio and r.audio_guidance,
        "audio guidance was given together with no_audio: drop one",
    )
    refuse(
        r.audio and r.audio_guidance,
        "audio guidance was given, but the sound is given too and is not changed",
    )
    refuse(
        r.audio_only and (r.images or r.video or r.audio or r.video_guidance),
        "audio_only makes sound from text alone: drop images, video, audio "
        "and video guidance",
    )
    refuse(
        r.audio_only and stages != "one",
        f"audio_only has no picture to refine: drop stages={stages}",
    )
    refuse(
        r.video and r.audio,
        "both a video and an audio file were given: the video's own sound is used",
    )
    refuse(
        r.changes_clip and not r.video,
        "retake and extend change a clip: give it with video",
    )
    refuse(
        r.retake is not None and r.extend is not None,
        "retake and extend were both given: do one first",
    )
    refuse(
        r.changes_clip and stages != "one",
        f"retake and extend work in one stage, at the clip's size: drop stages={stages}",
    )
    refuse(
        r.changes_clip and r.images,
        "images were given, but retake and extend take their picture from the clip",
    )
    refuse(
        r.retake and r.no_audio and "video" not in r.retake_streams,
        "this retake would change nothing: the sound is off and the picture kept",
    )
    refuse(
        r.video and not r.changes_clip and not r.loras,
        "a video without retake or extend is a reference, which only an IC-LoRA "
        "understands: give one with lora",
    )
    refuse(
        not r.retake_streams or set(r.retake_streams) - {"video", "audio"},
        f"retake_streams is {r.retake_streams}: choose of video, audio",
    )
    refuse(
        (r.keyframes or r.image_crf is not None) and not r.images,
        "keyframes or image_crf was given, but there are no images",
    )
    refuse(
        r.retake is None and r.retake_streams != ("video", "audio"),
        "retake_streams was given, but there is no retake",
    )
    refuse(
        r.extend is not None and r.num_frames is not None,
        "num_frames was given, but an extension is as long as the clip and extend say",
    )
    refuse(
        (r.reference_strength, r.reference_attention) != (1, 1)
        and (r.changes_clip or not r.video),
        "reference_strength or reference_attention was given, but there is no reference",
    )
    refuse(
        (r.no_audio or r.audio_only)
        and any("modality_scale" in g for g in guided if isinstance(g, Mapping)),
        "modality_scale was given, but one stream alone has nothing to agree with",
    )
    c = source.config["transformer"]
    refuse(
        r.generated_keyframes and not c.get("use_keyframes_abs_pos_embedding"),
        f"generated_keyframes are for LTX-2.5 on, and this is {source.model_version}",
    )
    refuse(
        r.generated_keyframes and (r.changes_clip or r.audio_only),
        "generated_keyframes are for new videos, not for sound, retake or extend",
    )
    dfr = stages == "dfr"
    refuse(
        not dfr and (r.detailing_lora or r.temporal_rounds),
        "detailing_lora and temporal_rounds are of stages=dfr: ask for it",
    )
    refuse(
        dfr and not c.get("use_keyframes_abs_pos_embedding"),
        f"stages=dfr is for LTX-2.5 on, and this is {source.model_version}",
    )
    others = "video audio keyframes generated_keyframes temporal_upsample steps"
    others = [name for name in others.split() if getattr(r, name)]
    others += ["guidance"] if guided or r.guidance_interval != (0, 1) else []
    refuse(
        dfr and others,
        "stages=dfr makes a new video with a schedule, keyframes and frame rates of its "
        f"own: drop {', '.join(others)}",
    )
    refuse(
        r.temporal_rounds not in (0, 1, 2),
        f"temporal_rounds is {r.temporal_rounds}: choose of 0, 1, 2",
    )
    low, high = r.guidance_interval
    check_range("guidance_interval's end", high, 0, 1)
    check_range("guidance_interval's start", low, 0, high)
    refuse(
        distilled and r.guidance_interval != (0, 1),
        "guidance_interval was given, but a distilled model is not guided",
    )
    check_range("step_cache", r.step_cache, 0, 1)
    check_range("reference_strength", r.reference_strength, 0, 1)
    check_range("reference_attention", r.reference_attention, 0, 1)
    check_range("audio_start", r.audio_start, 0, 86400)
    refuse(
        stages != "one" and not upsamplers,
        f"stages={stages} needs a latent upsampler and this model has none: "
        "give its file with upsampler",
    )
    refuse(
        stages == "hq" and distilled,
        "stages=hq is for dev models: a distilled model uses stages=two",
    )
    needs_lora = stages != "one" and not distilled
    refuse(
        needs_lora and r.distilled_lora is None,
        f"stages={stages} of a dev model refines with the distilled LoRA: "
        "give its file with distilled_lora",
    )
    refuse(
        r.distilled_lora is not None and not needs_lora,
        "distilled_lora was given, but only the two stages of a dev model use it",
    )
    refuse(
        needs_lora and (r.distilled_lora.stage or not r.distilled_lora.strength),
        "distilled_lora has its own stages, and no effect at strength 0: drop them",
    )
    refuse(
        r.detailing_lora and (r.detailing_lora.stage or not r.detailing_lora.strength),
        "detailing_lora has its own stage, and no effect at strength 0: drop them",
    )
    refuse(
        (r.temporal_upsample or r.temporal_rounds)
        and "temporal_upsampler" not in source.components,
        f"temporal_{'rounds' if r.temporal_rounds else 'upsample'} needs a temporal latent "
        "upsampler and this model has none: give its file with upsampler",
    )
    refuse(
        r.temporal_upsample and (r.audio_only or r.changes_clip),
        "temporal_upsample works on a new video, not on sound, retake or extend",
    )
    refuse(
        r.temporal_upsample and not distilled and r.distilled_lora is None,
        "temporal_upsample refines with few steps, which a dev model cannot: "
        "use two stages with its distilled LoRA, or a distilled model",
    )
    count = 1 if stages == "one" else 2
    for lora in r.loras:
        refuse(
            lora.stage is not None and not 1 <= lora.stage <= count,
            f"LoRA {lora.path} is for stage {lora.stage}, but there are {count}",
        )
        refuse(
            lora.strength == 0,
            f"LoRA {lora.path} has strength 0, which has no effect: drop it",
        )
        check_range(f"LoRA {lora.path}: strength", lora.strength, -10, 10)
    if r.audio:
        seconds = media.probe(r.audio).audio_duration
        refuse(not seconds, f"{r.audio} has no sound")
        refuse(
            r.audio_start >= seconds,
            f"{r.audio}: there is no sound at {r.audio_start:g} s, "
            f"it lasts {seconds:.2f} s",
        )


def check_parts(streams: tuple[str, ...], source: Any) -> None:
    """Refuse what needs a part of the model that is not there."""
    needed = {"transformer", "connectors"}
    needed |= {"vae"} if "video" in streams else set()
    needed |= {"audio_vae", "vocoder"} if "audio" in streams else set()
    needed |= {"gemma"} if source.text_encoder == "gemma" else set()
    source.require(*sorted(needed))


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise UserError(f"{name} is {value}, allowed are {low:g} to {high:g}")


def check_size(name: str, value: int, multiple: int, source: Any) -> None:
    """A side must be whole latents in every stage; reflected borders need two."""
    reflect = (
        source.config.get("vae", {}).get("spatial_padding_mode", "reflect") == "reflect"
    )
    low = max(multiple, 2 * SPACE_SCALE) if reflect else multiple
    high = MAX_SIDE // multiple * multiple
    if not isinstance(value, int) or value % multiple or not low <= value <= high:
        nearest = min(max(round(value / multiple) * multiple, low), high)
        two = ", in all stages and references" if multiple > SPACE_SCALE else ""
        raise UserError(
            f"{name} is {value}, but it must be a multiple of {multiple} "
            f"from {low} to {high}{two}: try {nearest}"
        )


def check_frames(value: int) -> None:
    good = isinstance(value, int) and value % TIME_SCALE == 1
    if not good or not 1 <= value <= MAX_FRAMES:
        nearest = max(round((value - 1) / TIME_SCALE), 0) * TIME_SCALE + 1
        raise UserError(
            f"num_frames is {value}, but it must be 8k+1 from 1 to {MAX_FRAMES}: "
            f"try {min(nearest, MAX_FRAMES)}"
        )


def check_guidance(stream: str, g: Guidance, blocks: int) -> None:
    for name in ("cfg_scale", "stg_scale", "modality_scale"):
        check_range(f"{stream} {name}", getattr(g, name), -100, 100)
    check_range(f"{stream} rescale_scale", g.rescale_scale, 0, 1)
    check_range(f"{stream} skip_step", g.skip_step, 0, 1000)
    wrong = [b for b in g.stg_blocks or () if not 0 <= b < blocks]
    if wrong:
        raise UserError(
            f"{stream} stg_blocks has {wrong[0]}, "
            f"but the model's blocks are 0 to {blocks - 1}"
        )


def check_sigmas(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    s = tuple(float(v) for v in sigmas)
    falling = all(a > b for a, b in zip(s, s[1:]))
    if len(s) < 2 or not falling or not 0 <= s[-1] < s[0] <= 1:
        raise UserError(
            f"sigmas are {s}, but they must fall from at most 1 to at least 0, "
            "as in 1,0.9,0.7,0.4,0"
        )
    return s
