"""Sizes by name, seconds for frames, and presets: what they put into a request."""

from dataclasses import replace
from typing import Any, Iterable, Mapping

from .latents import TIME_SCALE
from .options import check

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


def fill(
    r: Any, kind: str, parts: Iterable[str], defaults: Mapping[str, Any], fps: float
) -> tuple[Any, list[str]]:
    """A request with a preset, size and duration replaced by numbers, and notes. A size
    among the model's `defaults` is kept; `fps` is the rate if the request has none."""
    if r.size is r.preset is r.duration is None:
        return r, []
    check(r)  # what excludes one of them would be replaced
    found, notes = {"preset": None, "size": None, "duration": None}, []
    if r.size:
        found["height"], found["width"] = SIZES[r.size]
    if r.duration is not None:
        rate = r.fps or fps
        frames = int(max(r.duration * rate - 1, 0) / TIME_SCALE + 0.5) * TIME_SCALE + 1
        found["num_frames"] = frames
        seconds = f"{frames / rate:.2f} s"
        notes.append(f"{r.duration:g} s at {rate:g} fps: {frames} frames, {seconds}")
    if r.preset:
        named = {k for k in vars(r) if getattr(r, k) is not None} | found.keys()
        named |= {"steps"} if r.sigmas else set()
        sides = {"height", "width"}
        named |= sides if r.video or "height" in defaults or sides & named else set()
        options, more = PRESETS[r.preset]
        options = options | (more if kind == "dev" else {})
        named |= set() if "diffusion_decoder" in parts else {"video_decoder"}
        refines = r.distilled_lora and any("spatial" in name for name in parts)
        if options.get("stages") == "hq" and not refines and "stages" not in named:
            options["stages"] = "one"
            notes.append(
                f"--preset {r.preset}: one stage, as hq needs --distilled-lora and an upsampler"
            )
        found |= {k: value for k, value in options.items() if k not in named}
    return replace(r, **found), notes
