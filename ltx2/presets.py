"""Sizes by name, seconds for frames, and presets: what they put into a request."""

from dataclasses import replace
from typing import Any, Iterable, Mapping, NamedTuple

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


class Preset(NamedTuple):
    """Options of a preset, for a model of each kind; those that are passed win."""

    height: int
    width: int
    distilled: Mapping[str, Any]
    dev: Mapping[str, Any]
    decoder: str = "conv"  # "diffusion" where the model has it

    OPTIONS = ("height", "width", "stages", "steps", "video_decoder")

    def options(self, kind: str, has_diffusion: bool) -> dict[str, Any]:
        found = {"height": self.height, "width": self.width}
        found |= self.distilled if kind == "distilled" else self.dev
        if self.decoder == "diffusion" and has_diffusion:
            found["video_decoder"] = "diffusion"
        return found


PRESETS = {
    "draft": Preset(512, 768, {}, {"stages": "one", "steps": 20}),
    "fast": Preset(576, 1024, {}, {"stages": "one", "steps": 20}),
    "standard": Preset(704, 1280, {}, {}),
    "quality": Preset(1024, 1536, {}, {"stages": "hq"}, "diffusion"),
}


def fill(
    r: Any, kind: str, parts: Iterable[str], defaults: Mapping[str, Any], fps: float
) -> tuple[Any, list[str]]:
    """A request with numbers for a preset, a size by name and a duration, which it then
    has no more, and notes. The model has `parts`, and perhaps a size of its own among its
    `defaults`, which a preset keeps; `fps` is the rate if the request names none."""
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
        notes.append(
            f"{r.duration:g} s at {rate:g} fps: {frames} frames, {frames / rate:.2f} s"
        )
    if r.preset:
        named = {k for k in vars(r) if getattr(r, k) is not None} | found.keys()
        named |= {"steps"} if r.sigmas else set()
        sides = {"height", "width"}
        named |= sides if r.video or "height" in defaults or sides & named else set()
        options = PRESETS[r.preset].options(kind, "diffusion_decoder" in parts)
        refines = r.distilled_lora and any("spatial" in name for name in parts)
        if options.get("stages") == "hq" and not refines and "stages" not in named:
            options["stages"] = "one"
            notes.append(
                f"--preset {r.preset}: one stage, as hq needs --distilled-lora and an upsampler"
            )
        found |= {k: value for k, value in options.items() if k not in named}
    return replace(r, **found), notes
