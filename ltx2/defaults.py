"""Check a request against a model, and fill in the model's defaults."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import chain
from typing import Iterator, Mapping

from . import media
from .base import UserError
from .cache import STREAMS, check_contexts
from .duration import whole_frames
from .exr import frames_in
from .guidance import Guidance
from .inputs import InputFiles
from .latents import SPACE_SCALE, TIME_SCALE, Size
from .options import check, check_choice, check_range, check_step
from .recipes import follow, makes_matte
from .request import PRESETS, SIZES, Request
from .sampling import DISTILLED_SIGMAS, shifted_sigmas
from .weights import SIZE, Checkpoint

NEGATIVE_PROMPT = (  # starts with tags of the training captions
    "has_subtitles, has_blurbox, transition from black, transition to black, "
    "speech_ending_short, low quality, blurry, distorted, flickering, watermark, "
    "text on screen, muffled sound, noise, clipping, silence"
)
MAX_FRAMES, MAX_SIDE = 2049, 4096
USUAL_FPS = (24, 25, 30, 50, 60)
AUTO_DURATION = (1.0, 20.0)  # the reference's, in seconds
SHORTEST_SOUND = 0.033  # in seconds: a window of the spectrogram, see audio_vae.log_mel
# The encoding of decoded frames, by the metadata of HDR LoRAs.
TRANSFORMS = {"acescct": "acescct", "logc3": "logc3", "true": "logc3"}
PARTS = {  # components that a job needs: always, for prompts, for a stream
    "all": ("transformer",),
    "text": ("connectors",),
    "video": ("vae",),
    "audio": ("audio_vae", "vocoder"),
}


class Resolver:
    """Checks a request against a model and fills in its defaults, step by step: `r`."""

    def __init__(self, r: Request, checkpoint: Checkpoint, files: InputFiles):
        self.checkpoint, self.files = checkpoint, files
        self.r, self.notes, sides = r, [], (r.height, r.width)
        self.fill()
        self.by_name = sides != (self.r.height, self.r.width)
        self.r, self.recipe, notes = follow(self.r, checkpoint.kind)
        self.notes, r = notes + self.notes, self.r
        self.clip_frames, self.clip_streams = 0, ()  # what is read of the input video
        self.repeats = 1 + self.r.hdr_double_frames
        self.codes = (self.recipe.codes or "acescct") if r.color_space else "srgb"
        video_only = (self.recipe.codes or makes_matte(r)) and not r.audio
        self.streams = STREAMS[bool(r.audio_only) : 2 - bool(r.no_audio or video_only)]
        self.distilled = checkpoint.kind == "distilled"
        parts = checkpoint.components
        upsamplers = [name for name in parts if name.startswith("spatial_upsampler")]
        simple = r.changes_clip or r.audio_only or not self.distilled or not upsamplers
        self.mode = r.stages or ("one" if simple else "two")
        self.upsampler = upsamplers[0] if upsamplers else None
        self.scale = Fraction(1)  # the first stage's sides are divided by it
        if self.upsampler and self.mode != "one":
            scale = checkpoint.config[self.upsampler]["spatial_scale"]
            self.scale = Fraction(scale).limit_denominator(4)
        self.unmet = {}  # what options may need of a model, and this one lacks
        if self.distilled:
            self.unmet["dev"] = "a dev model (this one is distilled)"
        if not checkpoint.config["transformer"].get("use_keyframes_abs_pos_embedding"):
            self.unmet["2.5"] = f"LTX-2.5 (this model is {checkpoint.model_version})"

    @property
    def makes_light(self) -> bool:
        """Whether an adapter makes HDR (as ACEScct) of an SDR clip."""
        r = self.r
        return r.has_reference and not frames_in(r.video) and self.codes == "acescct"

    @property
    def tiled(self) -> bool:
        """Whether tiles can be used: all stages see the reference, none reuses x0."""
        shown = self.mode == "one" or self.r.reference_in_stage_2
        skips = any(g.skip_step for g in self.guidance.values())
        return shown and not self.r.step_cache and not skips

    def fill(self) -> None:
        """Replace a preset, a size by name and a duration by numbers."""
        r, model = self.r, self.checkpoint
        if r.size is r.preset is r.duration is None:
            return
        check(r)  # while the options that they exclude can be seen
        found = dict.fromkeys(("preset", "size", "duration"))
        if r.size:
            found["height"], found["width"] = SIZES[r.size]
        if r.duration is not None:
            usual = self.files.probe(r.video).fps if r.video else None
            rate = r.fps or float(usual or (SIZE | model.defaults)["fps"])
            latents = int(max(r.duration * rate - 1, 0) / TIME_SCALE + 0.5)
            frames = found["num_frames"] = latents * TIME_SCALE + 1
            length = f"{frames} frames, {frames / rate:.2f} s"
            self.notes.append(f"{r.duration:g} s at {rate:g} fps: {length}")
        if r.preset:
            named = {k for k in vars(r) if getattr(r, k) is not None} | found.keys()
            named |= {"steps"} if r.sigmas else set()
            sides, parts = {"height", "width"}, model.components
            given = r.video or "height" in model.defaults or sides & named
            named |= sides if given else set()
            named |= set() if "diffusion_decoder" in parts else {"video_decoder"}
            options, more = PRESETS[r.preset]
            options = options | (more if model.kind == "dev" else {})
            refines = r.distilled_lora and any("spatial" in name for name in parts)
            if options.get("stages") == "hq" and not refines and "stages" not in named:
                options["stages"] = "one"
                needs = "hq needs --distilled-lora and an upsampler"
                self.notes.append(f"--preset {r.preset}: one stage, because {needs}")
            found |= {k: value for k, value in options.items() if k not in named}
        self.r = replace(r, **found)

    # Checks

    def check(self) -> None:
        """UserError for options that cannot be combined or need a missing file."""
        r = self.r
        check(r, self.mode, self.unmet)
        faults = chain(self.faults(), self.light_faults(), self.stage_faults())
        if fault := next(faults, None):
            raise UserError(fault)
        negative = not self.distilled or r.nag_scale != 1
        text = ("text",) * (not r.contexts_file or negative)
        kinds = "all", *text, *self.streams
        self.checkpoint.require(*(part for kind in kinds for part in PARTS[kind]))
        if text and self.checkpoint.text_encoder == "gemma":
            self.checkpoint.require("gemma")
        if r.contexts_file:
            found, config = self.files.contexts(r.contexts_file), self.checkpoint.config
            check_contexts(r.contexts_file, found, config["transformer"], self.streams)
        for lora in r.loras:
            check_range(f"LoRA {lora.path}: strength", lora.strength, -10, 10)
        self.check_hdr()

    def check_hdr(self) -> None:
        """Find how decoded frames are encoded, also from a LoRA's metadata."""
        r = self.r
        for lora in r.loras if r.has_reference else ():
            found = self.files.lora(lora.path).metadata
            flag = "true" if found.get("use_hdr_transform") else ""
            if name := found.get("hdr_transform") or flag:
                check_choice(f"hdr_transform of {lora.path}", name, tuple(TRANSFORMS))
                self.codes = TRANSFORMS[name]
                self.streams = ("video",)  # HDR adapters make no sound
        if self.codes != "srgb" and r.has_reference:
            self.recipe = replace(self.recipe, pads=True)
            r = self.r = replace(r, color_space=r.color_space or "srgb_linear")
        if self.makes_light and r.hdr_keyframes is None:
            r = self.r = replace(r, hdr_keyframes="2.5" not in self.unmet)
        if r.hdr_double_frames and (self.codes == "srgb" or frames_in(r.video)):
            raise UserError("hdr_double_frames needs an HDR adapter and an SDR clip")
        if r.hdr_keyframes is not None and not self.makes_light:
            raise UserError("hdr_keyframes needs an HDR adapter and an SDR clip")
        if r.hdr_keyframes and r.generated_keyframes:
            raise UserError("generated_keyframes needs hdr_keyframes turned off")

    def faults(self) -> Iterator[str]:
        """Faults that no single field can declare."""
        r, count = self.r, len(DISTILLED_SIGMAS) - 1
        settings = [g for g in (r.video_guidance, r.audio_guidance) if g]
        partial = [g for g in settings if isinstance(g, Mapping)]
        alone, (low, high) = len(self.streams) == 1, r.guidance_interval
        if self.distilled and any(g in partial or g.active for g in settings):
            yield "guidance needs a dev model (this one is distilled): remove its settings"
        if r.audio_guidance and self.streams == ("video",):
            yield "audio_guidance needs generated sound, which this adapter does not make"
        if alone and any("modality_scale" in g for g in partial):
            yield "modality_scale needs both video and audio"
        if r.retake and not {*r.retake_streams} - ({"audio"} if r.no_audio else set()):
            yield "retake has nothing to regenerate: audio is off and video is kept"
        if r.has_reference and not r.loras:
            yield "a reference video needs an IC-LoRA: add --lora, --retake or --extend"
        if not (all(p.strip() for p in r.prompts) or self.recipe.no_prompt):
            yield "the prompt is empty: say what to show"
        if r.contexts_file and r.prompt:
            yield "contexts_file is used instead of the prompt: remove one of them"
        if r.tile_size and not self.tiled:
            two = "tile_size in two stages needs reference_in_stage_2"
            yield f"{two}; it cannot be combined with step_cache or skip_step"
        keyframes = r.generated_keyframes or self.mode == "dfr"
        if r.decode_with_keyframes and not keyframes:
            yield "decode_with_keyframes needs generated_keyframes"
        if low > high:
            yield "guidance_interval must be from a lower to a higher sigma"
        if self.distilled and r.steps not in (None, count):
            own = f"steps is {r.steps}, but a distilled model has {count} steps of its own"
            yield f"{own}: remove it, or pass sigmas"

    def light_faults(self) -> Iterator[str]:
        """Faults of color_space and EXR files."""
        r = self.r
        files = [x.path for x in r.images] + [r.video] * (r.video is not None)
        are_exr = [bool(frames_in(path)) for path in files]
        if len(set(are_exr)) == 2:
            yield "images and video must all be EXR files, or none of them"
        if any(are_exr) and not r.color_space:
            yield "EXR files need color_space, which says what they hold"
        if r.color_space and not r.has_reference and not all(are_exr):
            yield "color_space without an HDR adapter needs EXR files"
        if self.recipe.codes and any(are_exr):
            yield "an adapter that makes HDR needs an SDR clip"

    def stage_faults(self) -> Iterator[str]:
        """Faults of the stages and the files they need."""
        r, mode, stages, unmet = self.r, self.mode, f"--stages {self.mode}", self.unmet
        lacks = "which this model does not have: add its file with --upsampler"
        if mode == "dfr" and "2.5" in unmet:
            yield f"{stages} needs {unmet['2.5']}"
        if mode != "one" and not self.upsampler:
            yield f"{stages} needs a latent upsampler, {lacks}"
        if mode == "hq" and self.distilled:
            yield f"{stages} needs {unmet['dev']}"
        if mode == "dfr" and self.scale != 2:
            yield f"{stages} needs an x2 upsampler (this one is x{float(self.scale):g})"
        if mode == "dfr" and r.num_frames == 1:
            yield f"{stages} needs at least 9 frames"
        if mode != "one" and not self.distilled and not r.distilled_lora:
            yield f"{stages} of a dev model needs its distilled LoRA: add --distilled-lora"
        count = 1 if mode == "one" else 2
        for x in r.loras:
            if x.stage not in (None, 1, count):
                yield f"LoRA {x.path} is for stage {x.stage}, but there are {count}"
            if not x.strength:
                yield f"LoRA {x.path} has strength 0 and no effect: remove it"
        for name in ("distilled_lora", "detailing_lora"):
            if (lora := getattr(r, name)) and (lora.stage or not lora.strength):
                yield f"{name} takes no stage, and its strength must not be 0"
        temporal = "temporal_upsampler" in self.checkpoint.components
        if (r.temporal_upsample or r.temporal_rounds) and not temporal:
            yield f"doubling the frame rate needs a temporal latent upsampler, {lacks}"
        if r.temporal_upsample and not self.distilled and mode == "one":
            yield "temporal_upsample of a dev model needs --stages two and --distilled-lora"

    # Size, length and rate

    def fit_duration(self) -> None:
        """Set the longest duration to predict, if nothing else sets the length."""
        r, head = self.r, "duration_head"
        fps = SIZE["fps"] if r.fps is None else r.fps
        if r.segments and not r.video and r.num_frames is None:
            latents = round((r.segments[-1].end * fps - 1) / TIME_SCALE)
            r = self.r = replace(r, num_frames=latents * TIME_SCALE + 1)
        fixed = r.video or r.audio or r.contexts_file or r.num_frames is not None
        fixed = fixed or head not in self.checkpoint.components
        if r.auto_duration is None and fixed:
            return
        self.checkpoint.require(head)
        low, high = r.auto_duration or AUTO_DURATION
        check_range("auto_duration", low, 0, MAX_FRAMES / fps)
        check_range("auto_duration", high, low, MAX_FRAMES / fps)
        frames = whole_frames(high, fps, low, high)
        frames = frames if r.num_frames is None else min(r.num_frames, frames)
        self.r = replace(r, auto_duration=(low, high), num_frames=frames)

    def fit_size(self) -> None:
        """Fill in and check the size, length and rate."""
        note = self.notes.append
        multiple = SPACE_SCALE * self.scale.numerator * self.reference_scale()[0]
        multiple *= 2**self.r.spatial_rounds
        # A decoder that reflects its borders needs two latents.
        padding = self.checkpoint.config.get("vae", {}).get("spatial_padding_mode")
        reflects = padding in (None, "reflect")
        self.grid = multiple, max(multiple, 2 * SPACE_SCALE) if reflects else multiple
        self.sides = step, low = (2, 2) if self.recipe.pads else self.grid
        if self.by_name:
            fit = lambda side: max(round(side / multiple), 1) * multiple
            self.r = replace(self.r, height=fit(self.r.height), width=fit(self.r.width))
        if self.r.video is not None:
            self.fit_clip()
        defaults = SIZE | self.checkpoint.defaults
        missing = {k: defaults[k] for k in SIZE if getattr(self.r, k) is None}
        r = self.r = replace(self.r, **missing)
        high = MAX_SIDE // multiple * multiple
        check_step("height", r.height, step, low, high)
        check_step("width", r.width, step, low, high)
        sides = self.padded(r.width), self.padded(r.height)
        if sides != (r.width, r.height):
            padded = f"padded to {sides[0]}x{sides[1]}, and the result is cropped"
            note(f"{r.width}x{r.height} is {padded}")
        if self.recipe.extra:
            note(f"{self.recipe.extra} more frames are generated and cut off")
        check_step("num_frames", r.num_frames, TIME_SCALE, 1, MAX_FRAMES, plus=1)
        tile = self.recipe.tile if r.has_reference and self.tiled else None
        if tile and r.tile_size is None:
            tile = tile if r.width >= r.height else tile[::-1]
            r = self.r = replace(r, tile_size=tile)
        for side in r.tile_size or ():
            check_step("tile_size", side, SPACE_SCALE, 2 * SPACE_SCALE, MAX_SIDE)
        if r.num_frames > (most := self.recipe.frames):
            note(f"{r.num_frames} frames: the adapter was made for at most {most}")
        places, most = r.generated_keyframes, r.num_frames - 1
        if not isinstance(places, tuple):  # how many
            places, most = (places,), max(most - 1, 0)
        for value in places:
            check_range("generated_keyframes", value, 0, most)
        check_range("fps", r.fps, 1, 120)
        if not r.conditioned_fps and min(abs(r.fps - x) for x in USUAL_FPS) > 0.1:
            usual = ", ".join(map(str, USUAL_FPS))
            note(f"{r.fps:g} fps is unusual: models are made for {usual}")
        self.check_segments()
        for image in r.images:
            image.index(r.num_frames, r.fps)
            check_range(f"image {image.path}: strength", image.strength, 0.01, 1)
            height, width, _ = self.files.image(image.path).shape
            aspect = width * r.height / (height * r.width)
            if (cut := 1 - min(aspect, 1 / aspect)) > 0.1:
                cropped = f"cropped to {r.width}x{r.height}, {cut:.0%} of it is cut off"
                note(f"{image.path}: {width}x{height} {cropped}")
        if r.audio:
            self.check_sound()

    def check_sound(self) -> None:
        """UserError if a sound is too short to encode; a note if its length differs."""
        r = self.r
        seconds, length = self.files.probe(r.audio).audio_duration, r.num_frames / r.fps
        rest = seconds - r.audio_start
        if rest < SHORTEST_SOUND:
            short = f" at {r.audio_start:g} s: it has {seconds:.2f} s" * (seconds > 0)
            raise UserError(f"{r.audio} has no sound{short}")
        if abs(rest - length) > max(1, length / 2):
            end = "the rest is cut off" if rest > length else "the rest is silent"
            heard = f"{rest:.1f} s of sound for {length:.1f} s of video: {end}"
            self.notes.append(f"{r.audio}: {heard}")

    def check_segments(self) -> None:
        """UserError unless the segments follow each other through the video."""
        r, latent = self.r, TIME_SCALE / self.r.fps
        ends = [0.0, *(s.end for s in r.segments)]
        starts = [*(s.start for s in r.segments), r.num_frames / r.fps]
        near = all(abs(a - b) < latent + 1e-6 for a, b in zip(ends, starts))
        if r.segments and not (near and all(s.start < s.end for s in r.segments)):
            most = f"gaps and overlaps of at most {latent:.2g} s"
            rule = f"must follow each other from 0 to {starts[-1]:.2f} s, with {most}"
            got = ", ".join(f"{s.start:g}-{s.end:g}" for s in r.segments)
            raise UserError(f"segments {rule}, got {got}")

    def padded(self, side: int) -> int:
        """The next larger side that the model can have."""
        multiple, low = self.grid
        return max(-(-side // multiple) * multiple, low)

    def fit_clip(self) -> None:
        """Take the size, length and rate of the input video, if the model can."""
        r, clip = self.r, self.files.probe(self.r.video)
        if frames_in(r.video):
            if r.fps is None:
                raise UserError(f"{r.video}: EXR files have no frame rate: pass fps")
            clip = replace(clip, fps=media.frame_rate(r.fps))
        if not clip.has_video:
            raise UserError(f"{r.video} has no video: pass a sound with --audio")
        fps = float(clip.fps if r.fps is None else r.fps)
        name = f"{r.video}: fps, which --fps changes," if r.fps is None else "fps"
        check_range(name, fps, 1, 120)
        there = frames_at(clip, fps)
        frames = (min(max(there, 1), MAX_FRAMES) - 1) // TIME_SCALE * TIME_SCALE + 1
        (step, low), larger = self.sides, self.recipe.scale
        fit = lambda side: max(min(side, MAX_SIDE) // step * step, low)
        height = fit(clip.height * larger) if r.height is None else r.height
        width = fit(clip.width * larger) if r.width is None else r.width
        total = frames if r.num_frames is None else r.num_frames
        if r.extend is not None:
            check_range("extend", abs(r.extend), 1 / fps, MAX_FRAMES / fps)
            more = max(round(abs(r.extend) * fps / TIME_SCALE), 1)
            total = frames + more * TIME_SCALE
        if r.retake is not None:
            check_range("num_frames of a retake of this clip", total, 1, frames)
            start, end = r.retake
            if not 0 <= start < end or start >= total / fps:
                rule = "must start and end in the clip, which has"
                rule = f"{rule} {total / fps:.2f} s, and end after its start"
                raise UserError(f"retake {start:g}-{end:g} {rule}")
        frames, other_rate = min(frames, total), media.frame_rate(fps) != clip.fps
        new = (height, width) != (clip.height * larger, clip.width * larger)
        silent = self.recipe.uses_sound and not clip.has_audio
        cut = "padded" if r.has_reference and frames_in(r.video) else "cropped"
        changes = {
            f"{clip.width}x{clip.height} resized and {cut} to {width}x{height}": new,
            f"{float(clip.fps):g} fps changed to {fps:g}": other_rate,
            f"{frames} of {there} frames are read (8k+1)": frames != there,
            f"extended by {(total - frames) / fps:.2f} s (8k frames)": r.extend,
            "it has no sound, so none is given to the adapter": silent,
        }
        self.notes += [f"{r.video}: {text}" for text, true in changes.items() if true]
        self.clip_streams = STREAMS[: 1 + clip.has_audio]
        self.clip_frames = frames + self.recipe.extra * (frames == total)
        if r.attention_mask:
            self.check_mask(r.attention_mask, frames, fps)
        self.r = replace(r, height=height, width=width, num_frames=total, fps=fps)

    def check_mask(self, path: str, frames: int, fps: float) -> None:
        """UserError unless a mask is a picture, or a clip as long as its reference."""
        mask = self.files.probe(path)
        if not mask.has_video:
            raise UserError(f"{path} has no video: use a clip or picture")
        if mask.num_frames == 1:
            self.files.image(path)
        elif (there := frames_at(mask, fps)) < frames:
            short = f"{there} frames at {fps:g} fps, fewer than the {frames}"
            how = "use a longer clip, or a picture"
            raise UserError(f"{path} has {short} of the reference: {how}")

    def reference_scale(self) -> tuple[int, int]:
        """How many times smaller and slower the LoRAs need a reference clip."""
        loras = [lora for lora in self.r.loras if lora.stage in (None, 1)]
        return self.files.reference_factors(loras if self.r.has_reference else ())

    # Defaults by model

    @cached_property
    def guidance(self) -> dict[str, Guidance]:
        """The model's guidance with the request's changes, by stream."""
        r = self.r
        if self.distilled or self.mode == "dfr":
            return {}
        guidance = default_guidance(self.checkpoint, self.mode)
        last = self.checkpoint.config["transformer"]["num_layers"] - 1
        for name, defaults in guidance.items():
            settings = getattr(r, f"{name}_guidance") or {}
            complete = isinstance(settings, Guidance)
            guidance[name] = settings if complete else replace(defaults, **settings)
            check(guidance[name], label=f"{name} ")
            for block in guidance[name].stg_blocks or ():
                check_range(f"{name} stg_blocks", block, 0, last)
        if r.audio:  # its stream is not generated
            del guidance["audio"]
        if len(self.streams) == 1:  # it cannot agree with another stream
            alone = {"modality_scale": 1.0}
            guidance = {k: replace(guidance[k], **alone) for k in self.streams}
        return guidance

    def negative_prompt(self) -> tuple[str, ...]:
        """The prompt of the unconditional pass or of NAG, if there is either."""
        prompt, nag = self.r.negative_prompt, self.r.nag_scale != 1
        if nag or any(g.cfg_scale != 1 for g in self.guidance.values()):
            return (NEGATIVE_PROMPT if prompt is None else prompt,)
        if prompt is not None:
            raise UserError("negative_prompt needs cfg_scale or nag_scale above 1")
        return ()

    def decoder(self) -> str:
        """The component that decodes the video; by default the lighter one."""
        c, parts = self.checkpoint.config.get("vae", {}), self.checkpoint.components
        has = {"conv": "decoder_blocks" in c, "diffusion": "diffusion_decoder" in parts}
        kind = self.r.video_decoder or ("conv" if has["conv"] else "diffusion")
        if not has[kind] and "video" in self.streams:
            raise UserError(f"this model has no {kind} video decoder")
        return "vae" if kind == "conv" else "diffusion_decoder"

    def sigmas(self, size: Size) -> tuple[float, ...]:
        """The first stage's schedule: the request's, the distilled one, or by steps."""
        r = self.r
        if r.sigmas is not None:
            s, falling = r.sigmas, all(a > b for a, b in zip(r.sigmas, r.sigmas[1:]))
            if len(s) < 2 or not falling or not 0 <= s[-1] < s[0] <= 1:
                rule = "must fall from at most 1 to at least 0, e.g. 1,0.9,0.7,0.4,0"
                got = ",".join(f"{v:g}" for v in s)
                raise UserError(f"sigmas {rule}; got {got}")
            return s
        if self.distilled or self.mode == "dfr":
            return DISTILLED_SIGMAS
        default = 30 if self.checkpoint.version >= (2, 3) else 40
        default = 15 if self.mode == "hq" else default
        steps = default if r.steps is None else r.steps
        check_range("steps", steps, 2, 1000)
        # Only the reference's hq pipeline counts its tokens.
        counted = (size.tokens,) if self.mode == "hq" else ()
        return shifted_sigmas(steps, *counted)


def frames_at(clip: media.Media, fps: float) -> int:
    """How many frames a clip has at a rate."""
    if media.frame_rate(fps) == clip.fps:
        return clip.num_frames
    return math.floor(clip.duration * fps + 0.01)


def default_guidance(checkpoint: Checkpoint, mode: str = "one") -> dict[str, Guidance]:
    """The reference's guidance for dev models, by stream."""
    last = checkpoint.config["transformer"]["num_layers"] - 1
    blocks = (min(28 if checkpoint.version >= (2, 3) else 29, last),)
    if mode == "hq":  # STG is off, but has its usual block
        video = Guidance(3.0, 0.0, blocks, 3.0, 0.45)
        return {"video": video, "audio": replace(video, cfg_scale=7, rescale_scale=1)}
    video = Guidance(3.0, 1.0, blocks, 3.0, 0.7)
    return {"video": video, "audio": replace(video, cfg_scale=7.0)}
