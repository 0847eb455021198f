"""Plan a job: a request's stages by the table of modes, with their conditions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Iterator, NamedTuple, Optional

from . import conditions, windows
from .base import UserError
from .conditions import WHOLE_CLIP, Condition, Stage
from .defaults import MAX_FRAMES, PARTS, Resolver
from .guidance import Prompts
from .inputs import InputFiles
from .latents import SPACE_SCALE, TIME_SCALE, Size, audio_tokens
from .layers import Nag
from .memory import MemoryPlan
from .options import check_range, check_step, is_set
from .request import NOT_IN_HDR, LoraFile, Request
from .sampling import DISTILLED_SIGMAS, REFINE_SIGMAS
from .tiles import LARGE, LIGHT, LIGHT_PIXELS, Tiles, equal_spans
from .weights import Checkpoint
from .windows import WHOLE, Slice, Whole, Window

OWN = None  # the model's schedule: fixed if it is distilled, else by the steps


class Row(NamedTuple):
    """One stage of a mode."""

    size: str  # "small": divided by the upsampler's scale, "full", "doubled" in rate
    sigmas: Optional[tuple[float, ...]]
    sampler: str
    guided: bool
    distilled_lora: float  # its strength is multiplied by this; 0: without it
    upsampler: Optional[str]  # the axis that is enlarged first
    final: tuple[str, ...]  # streams that the result takes from it
    keyframes: bool = True  # also generates keyframes
    keeps_audio: bool = False  # freezes the audio of the stage before
    tiles: Tiles = ()  # on each axis: how many, and how they overlap


Rows, Places, Loras = tuple[Row, ...], tuple[int, ...], tuple[LoraFile, ...]
ANCESTRAL = "ancestral"  # before LTX-2.5: euler
VIDEO, AUDIO = ("video", "keyframes"), ("audio",)
ALL = VIDEO + AUDIO
# fmt: off
MODES = {
    "one": (Row("full", OWN, "euler", True, 0, None, ALL),),
    "two": (
        Row("small", OWN, ANCESTRAL, True, 0, None, ()),
        Row("full", REFINE_SIGMAS, ANCESTRAL, False, 1, "spatial", ALL)),
    "two with a reference": (
        Row("small", OWN, "euler", True, 0, None, ()),
        Row("full", REFINE_SIGMAS, "euler", False, 1, "spatial", ALL)),
    "two of light": (  # stage 2 in tiles, each a loop of its own
        Row("small", OWN, "euler", True, 0, None, ()),
        Row("full", (*REFINE_SIGMAS[:2], 0.0), "euler", False, 1, "spatial", VIDEO,
            tiles=((2, 8), (2, 6), (2, 6)))),
    "two of a dub": (  # the reference has sound; stage 2 sees it too
        Row("small", OWN, "euler", True, 0, None, ()),
        Row("full", REFINE_SIGMAS, "euler", False, 1, "spatial", ALL, True, True)),
    "two of a dev model": (  # stage 2 would not improve the sound
        Row("small", OWN, "euler", True, 0, None, AUDIO),
        Row("full", REFINE_SIGMAS, "euler", False, 1, "spatial", VIDEO, True, True)),
    "hq": (
        Row("small", OWN, "res_2s", True, 0.25, None, AUDIO),
        Row("full", REFINE_SIGMAS, "res_2s", False, 0.5, "spatial", VIDEO, False)),
    "dfr": (
        Row("small", DISTILLED_SIGMAS, ANCESTRAL, False, 1, None, AUDIO),
        Row("full", REFINE_SIGMAS, ANCESTRAL, False, 1, "spatial", VIDEO)),
}
DOUBLED = Row("doubled", REFINE_SIGMAS, "euler", False, 1, "temporal", VIDEO, False)
# fmt: on
HDR_FPS = 30.0  # the reference's highest frame rate of positions in HDR
DETAIL = 0.5  # the reference's factor for a detailing LoRA
SLICE_SIGMAS, SLICE_SAMPLER = DISTILLED_SIGMAS[4:], "euler_half_ancestral"


@dataclass(frozen=True)
class Job:
    """A planned request: everything that will be done, and the memory that it needs."""

    request: Request  # with size, length and rate filled in
    stages: tuple[Stage, ...]
    prompts: tuple[str, ...]  # the segments' and, if one is used, the negative one
    decoder: str  # the component that decodes the video
    notes: tuple[str, ...]  # what the user should know of the inputs and defaults
    extra: int = 0  # frames at the end that are generated and cut off
    codes: str = "srgb"  # what decoded frames are, of color.SPACES
    parts: tuple[Window, ...] = ()  # the windows, and the clip that they extend
    repeats: int = 1  # how many frames are generated for each one that is kept
    memory: Optional[MemoryPlan] = field(default=None, compare=False)

    @property
    def negative_prompt(self) -> Optional[str]:
        """The negative prompt; None if it is not used."""
        count = len(self.request.prompts)
        return self.prompts[count] if len(self.prompts) > count else None

    @property
    def texts(self) -> list[str]:
        """The prompts that the text encoder reads."""
        return [p for p in self.prompts if p != self.request.contexts_file]

    streams = property(lambda self: self.stages[0].streams)

    @property
    def size(self) -> Size:
        """The size of the result."""
        r = self.request
        rate = 2 ** (r.temporal_rounds + r.temporal_upsample)
        frames = (r.num_frames - 1) * rate + 1
        size = Size(r.width, r.height, frames, r.fps * rate)
        return replace(size, audio_tokens=self.stages[0].size.audio_tokens)

    @property
    def generated(self) -> int:
        """How many frames are generated for the result."""
        return (self.size.num_frames - 1) * self.repeats + 1

    @property
    def windows(self) -> list[Window]:
        """The windows that are generated."""
        return [window for window in self.parts if not window.given]

    @property
    def keyframes(self) -> dict[Window, tuple[int, ...]]:
        """By window, the frames of the result at which its last stage has keyframes."""
        last = {s.window: s.part.keyframes or s.slots for s in self.stages}
        inside = lambda frames: tuple(n for n in frames if n < self.generated)
        return {w: inside(w.start + n for n in places) for w, places in last.items()}

    def planes(self, window: Window) -> dict[Window, tuple[int, ...]]:
        """The keyframes that a window is decoded with, by the window that made them."""
        r, n = self.request, self.windows.index(window)
        used = r.decode_with_keyframes or r.stages == "dfr"
        used = used and self.decoder == "diffusion_decoder"
        near = self.windows[max(n - 1, 0) : n + 1] if used else ()
        found = {w: [f for f in self.keyframes[w] if f >= window.start] for w in near}
        return {w: tuple(frames) for w, frames in found.items() if frames}

    @property
    def frames_ahead(self) -> int:
        """How far a window's decoder computes ahead: up to its second keyframe."""
        frames = ((w, sum(self.planes(w).values(), ())) for w in self.windows)
        return max((f[:2][-1] - w.start for w, f in frames if f), default=0)

    @property
    def components(self) -> tuple[str, ...]:
        """The components that it needs, without the text encoder."""
        kinds = "all", *("text",) * bool(self.texts), *self.streams
        parts = [p for kind in kinds for p in PARTS[kind]]
        parts += [s.upsampler for s in self.stages if s.upsampler]
        return *parts, *((self.decoder,) if "video" in self.streams else ())

    @property
    def decodes_audio(self) -> bool:
        return "audio" in self.streams and self.request.audio is None

    @property
    def soundtrack(self) -> Optional[tuple[str, float]]:
        """The file whose sound the result gets, and the second to start at, if any."""
        r = self.request
        if r.audio or r.no_audio or "audio" in self.streams:
            return r.audio and (r.audio, r.audio_start)
        return r.video and (r.video, 0.0)

    @property
    def encoded(self) -> list[tuple[Condition, Size]]:
        """The conditions that need an encoder, each with its size; tiles share one."""
        whole = lambda c: replace(c, part=WHOLE) if hasattr(c, "part") else c
        pairs = ((c, s.whole) for s in self.stages for c in s.all_conditions)
        return [*dict.fromkeys((whole(c), size) for c, size in pairs if c.encoder)]


def plan(request: Request, checkpoint: Checkpoint, files: InputFiles) -> Job:
    """Check a request against a model, fill in its defaults and lay out its stages.

    Raises UserError for what cannot be done; reads headers and input files, no weights.
    """
    p = Planner(request, checkpoint, files)
    p.check()
    p.fit_duration()
    p.fit_size()
    r, stages = p.r, tuple(p.stages())
    frames, sound = stages[0].size.num_frames, stages[0].size.audio_tokens
    if "audio" in p.streams and not sound:
        short = f"{r.num_frames} frames at {r.fps:g} fps are too short for audio"
        raise UserError(f"{short}: increase num_frames or set no_audio")
    if p.mode == "dfr" and frames != r.num_frames and r.auto_duration is None:
        whole = f"{frames} frames are generated, in whole segments between keyframes"
        p.notes.append(f"{whole}, and cut to {r.num_frames}")
    prompts, decoder = (*r.prompts, *p.negative_prompt()), p.decoder()
    if r.decode_with_keyframes and decoder == "vae":
        p.notes.append("decode_with_keyframes is ignored: it is for diffusion decoders")
    more = tuple(p.notes), p.recipe.extra, p.codes, tuple(p.parts), p.repeats
    return Job(r, stages, prompts, decoder, *more)


class Planner(Resolver):
    """Lays out the stages of a request whose defaults are filled in."""

    def stages(self) -> Iterator[Stage]:
        """The stages, by the rows of the mode."""
        r, rows = self.r, self.rows()
        if self.mode == "dfr":
            frames, keyframes = windows.canvas(r.num_frames)
            rate, self.parts = windows.conditioned_rate(r.fps), [WHOLE_CLIP]
            full = replace(self.full_size(frames), conditioned_fps=rate)
            half = full.divided(2**r.spatial_rounds)
            yield from self.window(rows, half, WHOLE_CLIP, keyframes)
            n, rounds = len(rows), r.temporal_rounds
            for round_ in range(1, rounds + 1):
                for part in windows.slices_of_round(round_, keyframes):
                    yield self.slice_stage(n := n + 1, part, half)
            for part in windows.slices_of_round(rounds, keyframes) * r.spatial_rounds:
                for grid in windows.GRIDS:
                    yield self.enlarged_stage(n := n + 1, part, full, grid)
            return
        handed: Places = ()
        self.parts = self.windows()
        for window in (w for w in self.parts if not w.given):
            keyframes = window.keyframes(self.seams() or r.generated_keyframes)
            full = self.full_size(window.num_frames)
            yield from self.window(rows, full, window, keyframes, handed)
            handed = window.handed_on(keyframes)

    def rows(self) -> Rows:
        """The rows of the mode."""
        r, mode = self.r, self.mode
        if mode == "two" and (r.has_reference or r.keyframes and not self.distilled):
            mode = "two of a dub" if self.recipe.uses_sound else "two with a reference"
            if self.codes == "logc3" and r.reference_in_stage_2:
                if whole := [k for k in NOT_IN_HDR.split() if is_set(r, k)]:
                    why = f"not in the reference's tiles, because of {', '.join(whole)}"
                    self.notes.append(f"stage 2 sees the whole video, {why}")
                else:
                    mode = "two of light"
        elif mode == "two" and not self.distilled:
            mode = "two of a dev model"
        return MODES[mode] + (DOUBLED,) * r.temporal_upsample

    def prompts(self, first: int, size: Size, pace: float) -> Prompts:
        """How a stage that starts at frame `first` reads the prompts. A second of the
        result is size.fps / size.rate of video positions, and `pace` of the sound's."""
        r, start, end = self.r, first / size.fps, (first + size.num_frames) / size.fps
        nag = Nag(r.nag_scale, r.nag_tau, r.nag_alpha) if r.nag_scale != 1 else None
        found = {
            (s.start - start, s.end - start): prompt
            for prompt, s in zip(r.prompts, r.segments)
            if s.start < end and (s.end > start or s == r.segments[-1])
        }
        paces = {"video": size.fps / size.rate, "audio": pace}
        times = {k: tuple((a * x, b * x) for a, b in found) for k, x in paces.items()}
        return Prompts(nag, tuple(found.values()), times)

    def seams(self) -> tuple[int, ...]:
        """The frames at which HDR of an SDR clip has keyframes: dfr's."""
        if not self.r.hdr_keyframes:
            return ()
        places = windows.canvas(self.r.num_frames)[1]
        return tuple(n * self.repeats for n in places if n < self.clip_frames)

    def full_size(self, frames: int) -> Size:
        """The size of a last stage with this many frames."""
        r = self.r
        sound = audio_tokens(frames, r.fps) * ("audio" in self.streams)
        shown = r.height, r.width
        height, width = map(self.padded, shown)
        shown = None if shown == (height, width) else shown
        rate = r.conditioned_fps
        if rate is None and self.makes_light and r.fps > HDR_FPS:
            rate = HDR_FPS
        return Size(width, height, frames, r.fps, sound, rate, shown)

    def windows(self) -> list[Window]:
        """The windows of a long video, one by default; of an extension with its clip."""
        r, frames = self.r, (self.r.num_frames - 1) * self.repeats + 1
        frames += self.recipe.extra
        names = ("chunk_frames", "carry_frames", "blend_frames")
        if r.extend is None and not any(is_set(r, name) for name in names):
            return [Window(0, frames)]
        chunk = 97 if r.chunk_frames is None else r.chunk_frames
        carry = 25 if r.carry_frames is None else r.carry_frames
        blend = carry if r.blend_frames is None else r.blend_frames
        check_step("chunk_frames", chunk, TIME_SCALE, 25, MAX_FRAMES, plus=1)
        check_step("carry_frames", carry, TIME_SCALE, 17, chunk - 8, plus=1)
        check_range("blend_frames", blend, 0, carry)
        if r.extend is None:
            return windows.divide(frames, chunk, carry, blend)
        lengths = self.clip_frames, frames
        found = windows.extended(*lengths, r.extend < 0, chunk, carry, blend)
        if any(window.given for window in found):
            seen = f"only its {'last' if r.extend > 0 else 'first'} {carry} frames are seen"
            self.notes.append(f"{r.video}: {seen}; its frames and sound are kept")
        return found

    def window(
        self, rows: Rows, full: Size, window: Window, own: Places, handed: Places = ()
    ) -> Iterator[Stage]:
        """A window's stages, with its `own` keyframes and those `handed` over to it."""
        r = self.r
        small, doubled = full.divided(self.scale), full.doubled()
        sizes = {"small": small, "full": full, "doubled": doubled}
        axis = {"spatial": self.upsampler, "temporal": "temporal_upsampler"}
        for n, row in enumerate(rows, 1):
            first, size = n == 1, sizes[row.size]
            sampler = self.ancestral if row.sampler == ANCESTRAL else row.sampler
            sigmas = self.sigmas(size) if first else row.sigmas
            stage = Stage(
                f"{window.prefix}stage{n}",
                size,
                sigmas,
                r.sampler if first and r.sampler else sampler,
                1.0 if first else sigmas[0],
                self.guidance if row.guided else {},
                r.guidance_interval if row.guided else (0.0, 1.0),
                r.step_cache if first else 0.0,
                self.loras(n, row.distilled_lora),
                axis.get(row.upsampler),
                self.conditions(n, size, row, window, own, handed),
                row.final,
                window=window,
                tile=r.tile_size and tuple(side // SPACE_SCALE for side in r.tile_size),
                prompts=self.prompts(window.start, size, 1.0),
            )
            yield from self.in_tiles(stage, row.tiles) if row.tiles else (stage,)

    def in_tiles(self, stage: Stage, tiles: Tiles) -> Iterator[Stage]:
        """A stage whose only condition is a reference, as one stage for each tile."""
        full = stage.size
        spans = (equal_spans(side, *how) for side, how in zip(full.latent, tiles))
        parts = [*product(*spans)]
        for n, own in enumerate(parts, 2):
            part = conditions.Tile(own, full, n > len(parts))
            shown = (replace(c, part=part) for c in stage.conditions["video"])
            yield replace(
                stage,
                name=f"stage{n}",
                size=part.size,
                upsampler=stage.upsampler if n == 2 else None,
                conditions={"video": tuple(shown)},
                final=stage.final if part.last else (),
                part=part,
            )

    def enlarged_stage(self, n: int, part: Slice, full: Size, grid: int) -> Stage:
        """A coarse or fine pass of a slice in dfr's epilogue."""
        r, fine = self.r, grid == windows.GRIDS[1]
        opens = int(all(image.index(r.num_frames, r.fps) for image in r.images))
        how = {"grid": grid, "opens": opens, "decoder": self.decoder()}
        part = windows.EnlargedSlice(**vars(part), **how)
        stage = self.slice_stage(n, part, full)
        owned = range(part.seam // part.rate + (part.start > 0), r.num_frames)
        images = self.images(stage.size, part.first, owned)
        video = *images, conditions.SliceKeyframes(part), *self.smaller(part)
        return replace(
            stage,
            sigmas=REFINE_SIGMAS[1:] if fine else REFINE_SIGMAS[:2],
            sampler=self.ancestral,
            noise_scale=0.0 if fine else REFINE_SIGMAS[0],
            loras=self.loras(None, 1, True),
            upsampler=None if part.start or fine else self.upsampler,
            conditions=stage.conditions | {"video": video},
        )

    @property
    def ancestral(self) -> str:
        """The ancestral sampler; euler before LTX-2.5."""
        return "euler_ancestral" if self.checkpoint.version >= (2, 5) else "euler"

    def smaller(self, part: Whole = conditions.WHOLE) -> Iterator[Condition]:
        """The previous stage's video as a reference, if there is a detailing LoRA."""
        if self.r.detailing_lora:
            factor, _ = self.files.reference_factors([self.r.detailing_lora])
            yield conditions.PreviousAsReference(max(factor, 2), part)

    def slice_stage(self, n: int, part: Slice, full: Size) -> Stage:
        """A slice of one of dfr's rounds, which double the frame rate."""
        fps = full.fps * part.rate
        rate = windows.conditioned_rate(fps)
        size = replace(full, num_frames=part.num_frames, fps=fps, conditioned_fps=rate)
        size = replace(size, audio_tokens=audio_tokens(part.num_frames, rate))
        images = self.images(size, part.first, range(self.r.num_frames))
        video = *images, conditions.SliceKeyframes(part)
        both = {"video": video, "audio": (conditions.SliceSound(part),)}
        return Stage(
            f"stage{n}",
            size,
            SLICE_SIGMAS,
            SLICE_SAMPLER,
            SLICE_SIGMAS[0],
            loras=self.loras(None, 1),
            upsampler=None if part.start else "temporal_upsampler",
            conditions={stream: both[stream] for stream in self.streams},
            final=VIDEO,
            part=part,
            prompts=self.prompts(part.first, size, fps / rate),
        )

    def loras(self, n: Optional[int], distilled: float, detail=False) -> Loras:
        """The LoRAs of stage `n`. Those of a reference are for stage 1, unless stage 2 also
        has the reference; `distilled` is the factor of the distilled one's strength."""
        r = self.r
        general = n != 2 or not r.has_reference or r.reference_in_stage_2
        loras = [x for x in r.loras if x.stage == n or general and x.stage is None]
        details = DETAIL * (n == 2 or detail)
        for lora, factor in (r.distilled_lora, distilled), (r.detailing_lora, details):
            if lora and factor:
                loras.append(replace(lora, strength=lora.strength * factor))
        return tuple(loras)

    def conditions(
        self, n: int, size: Size, row: Row, window: Window, own: Places, handed: Places
    ) -> dict[str, tuple[Condition, ...]]:
        """The conditions of stage `n` by stream, in the reference's order."""
        r, carried_in = self.r, window.carried_in
        owned = window.owned if carried_in else range(r.num_frames)
        first = window.start * round(size.fps / r.fps)
        video = list(self.images(size, first, owned))
        skip = audio_tokens(window.start, r.fps)
        uses_sound = self.recipe.uses_sound and "audio" in self.clip_streams
        audio = [conditions.KeepAudio(uses_sound)] if row.keeps_audio else []
        if r.audio:
            audio = [conditions.HoldSound(r.audio, r.audio_start, skip)]
        elif uses_sound and not audio:
            audio = [conditions.ReferenceSound(r.video, 0.0, skip)]
        both = {"video": video, "audio": audio}
        held = list(self.of_clip(window))
        for condition in held:
            both[condition.stream].append(condition)
        if carried_in and not held:
            audio.append(conditions.CarriedLatents("audio", f"stage{n}"))
        frames = (self.clip_frames - 1) * self.repeats + 1 - window.start
        frames = min(frames, size.num_frames)
        shown = r.has_reference and (n == 1 or r.reference_in_stage_2)
        if shown and frames > carried_in:  # else the reference ends before the window
            weights = r.reference_strength, r.reference_attention
            facts = r.video, frames, *weights, *self.reference_scale(), window
            if r.attention_mask:  # the reference reads it at the first stage's size
                sides = self.full_size(frames).divided(self.scale)
                facts += ((r.attention_mask, sides),)
            how = {"tiles": self.clip_tiles(size), "repeats": self.repeats}
            video.append(conditions.ReferenceClip(*facts, **how))
        if own and self.seams():
            stills = tuple((window.start + n) // self.repeats for n in own)
            video.append(conditions.ClipKeyframes(own, r.video, stills))
        generates = row.keyframes or r.decode_with_keyframes
        if own and generates:
            video.append(conditions.NewKeyframes(own))
        if handed and generates:
            video.append(conditions.CarriedKeyframes(handed, f"stage{n}"))
        if carried_in and not held:
            video.append(conditions.CarriedLatents("video", f"stage{n}"))
        if n == 2:
            video += self.smaller()
        return {stream: tuple(both[stream]) for stream in self.streams}

    def clip_tiles(self, size: Size) -> Tiles:
        """The tiles in which a stage's reference is encoded, as in the reference."""
        smaller = size.divided(self.reference_scale()[0])
        if self.codes == "logc3":
            return LIGHT * (smaller.height * smaller.width > LIGHT_PIXELS)
        return LARGE * bool(self.recipe.uses_sound or self.r.tile_size)

    def of_clip(self, window: Window) -> Iterator[conditions.ClipPart]:
        """The parts of a retaken or extended clip that a window holds, by stream."""
        r, start, frames = self.r, window.start, self.clip_frames - window.start
        if not r.changes_clip or frames < window.carried_in:
            return
        before = r.extend is not None and r.extend < 0
        if before and window.carried_out:
            frames = window.carried_out
        for stream in self.clip_streams:
            part = r.video, start, frames, stream
            span = r.retake if stream in r.retake_streams else None
            ends = self.files.probe(r.video).audio_duration * r.fps
            if r.retake is not None:
                yield conditions.RetakeClip(*part, span)
            elif stream == "video" or ends > start:
                yield conditions.HoldClip(*part, before)

    def images(self, size: Size, first: int, owned: range) -> Iterator[Condition]:
        """Images of a stage from its frame `first` on, at the frames in `owned`."""
        r, crf = self.r, 18 if self.checkpoint.version >= (2, 4) else 33
        crf = crf if r.image_crf is None else r.image_crf
        for image in r.images:
            index = image.index(r.num_frames, r.fps)
            frame = index * round(size.fps / r.fps) - first
            if index not in owned:
                continue
            source = image.path, image.strength, crf
            if frame == 0 and not r.keyframes:
                yield conditions.ShowImage(*source)
            elif 0 <= frame < size.num_frames:
                yield conditions.GuideImage(*source, frame)
