"""The steps of a run: encode text and inputs, denoise, decode; and their events."""

import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Generator, Iterator, Optional, Sequence

import mlx.core as mx
import numpy as np

from . import color, formats, media
from .base import OutputError, Trace, note, traced, within
from .components import Components
from .conditions import Loaded, Stage
from .diffusion_decoder import Keyframes
from .duration import whole_frames
from .guards import FrameGuard, check_latents, check_waveform
from .guidance import Contexts, GuidedDenoiser, TextContexts
from .inputs import Encoders, frames_of, stereo
from .latents import LatentState, States, Streams, audio_from_tokens, latent_frames
from .recipes import makes_matte
from .record import changed, name_only, provenance
from .request import Request
from .sampling import SAMPLERS, Noise
from .snapshot import Snapshot
from .stages import Job, plan
from .tiles import TiledDenoiser
from .windows import Window, blended, carried_tokens, crossfaded


def seeded_noise(seed: int) -> Noise:
    """Normals that depend only on the seed and the name, on every machine."""

    def noise(name: str, shape: tuple[int, ...]) -> mx.array:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return mx.array(rng.standard_normal(shape, np.float32))

    return noise


@dataclass(kw_only=True)
class Event:
    """Something that happened; fields that this kind of event lacks are None."""

    phase: str = ""
    job: int = 0  # the number of the request
    step: Optional[int] = None
    steps: Optional[int] = None
    snapshot: Optional[Snapshot] = None
    denoised: Optional[Streams] = None  # x0 as latents, with batch axis
    frames: Optional[np.ndarray] = None  # (n, H, W, 3) uint8, or float32 if HDR


class Phase(Event):
    """A phase begins, at step 0 of `steps`. In "latents" a video is denoised."""


class Step(Event):
    """A denoising step is done: the snapshot, and the x0 that it predicted."""


class Frames(Event):
    """Frames are decoded: `step` of `steps`."""


Steps = Generator[Step, None, Snapshot]


@dataclass(kw_only=True)
class Result(Event):
    """A video with its sound; latents are normalized, as the model sees them, and have
    no batch axis. `generate` gives all frames (F, H, W, 3)."""

    request: Request
    fps: float
    video_latents: Optional[mx.array] = None  # (F, H, W, C)
    audio_latents: Optional[mx.array] = None  # (T, mel bins, C)
    waveform: Optional[np.ndarray] = None  # (samples, 2) float32
    sample_rate: Optional[int] = None
    sound_file: Optional[str] = None  # the file of which the waveform is all
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: media.PathLike, codec=None, metadata: bool = True) -> None:
        """Write the result as `save` does."""
        save(path, self.request, self.fps, [self], codec, metadata)


def save(path: str, r: Request, fps, events, codec=None, metadata=True) -> Result:
    """Write frames as they come, with their sound, or a .wav; a matte as alpha."""
    made = lambda result: changed(result.metadata, name_only) if metadata else None
    if r.audio_only:
        result = next(e for e in events if isinstance(e, Result))
        media.write_wav(path, result.waveform, result.sample_rate, made(result))
        return result
    picture = None
    if makes_matte(r):
        clip = frames_of(r.video, 0, round(r.num_frames * fps / r.fps), fps)
        fit = lambda x: np.rint(media.resize(x, r.height, r.width)).astype(np.uint8)
        picture = map(fit, clip)
    facts = {"codec": codec, "color_space": r.color_space or "srgb", "picture": picture}
    with formats.VideoWriter(path, fps, **facts) as video:
        for event in events:
            if event.frames is not None:
                video.write(event.frames)
            if isinstance(event, Result):
                if event.waveform is not None:
                    sound = event.waveform, event.sample_rate
                    video.sound = event.sound_file or sound
                video.metadata = made(event)
                return event


class NotFinite(Exception):
    """The first step predicted values that are not finite."""


class Meter:
    """Seconds and peak bytes by phase, without the bytes `kept` for the next run."""

    def __init__(self) -> None:
        self.kept = 0
        self.phases: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(self, name: str):
        mx.reset_peak_memory()
        start = time.perf_counter()
        yield
        seconds, peak = self.phases.get(name, (0.0, 0.0))
        seconds += time.perf_counter() - start
        self.phases[name] = seconds, max(peak, mx.get_peak_memory() - self.kept)


def finished(job: Job, at: Snapshot) -> Snapshot:
    """The snapshot after the last stage, with only the result's streams, by window."""
    latents = {k: x for k, x in at.kept.items() if not k.startswith("carry.")}
    latents = latents or dict(at.latents)  # resumed after its last stage
    for window, places in job.keyframes.items():
        stills = latents.pop(key := window.prefix + "keyframes", None)
        if places:
            latents[key] = stills[:, : len(places)]
    if "video" in latents:
        cells = latent_frames(job.generated + job.extra)
        latents["video"] = latents["video"][:, :cells]
    return replace(at, stage=len(job.stages), latents=latents, kept={})


@dataclass
class Run:
    """The steps of a run; `Pipeline.stream` calls them in order."""

    model: Components
    noises: Sequence[Optional[Noise]]  # by the number of the job
    trace: Trace
    frozen_from_noise: bool
    streamed: bool
    meter: Meter = field(default_factory=Meter)

    def noise_of(self, n: int, job: Job) -> Noise:
        """The noise callback of a job; its results are checked and made float32."""
        if (made := self.noises[n]) is None:
            return seeded_noise(job.request.seed)

        def noise(name: str, shape: tuple[int, ...]) -> mx.array:
            x = mx.array(made(name, shape)).astype(mx.float32)
            if x.shape != tuple(shape):  # it would be broadcast
                raise ValueError(f"noise {name} has shape {x.shape}, not {shape}")
            return x

        return noise

    def encode_text(self, jobs: list[Job], contexts: Optional[TextContexts]):
        """Contexts by prompt: from a file, from `contexts`, or encoded."""
        files = {job.request.contexts_file for job in jobs} - {None}
        found = {path: self.model.inputs.contexts(path) for path in files}
        prompts = list(dict.fromkeys(p for job in jobs for p in job.texts))
        if contexts is None and prompts:
            with self.meter.phase("text"):
                encode = lambda: self.model.contexts(prompts, self.trace)
                contexts = self.model.machines.on_rank_0(encode)
        return (contexts or {}) | found

    def texts(self, job: Job, stage: Stage, contexts: TextContexts) -> list[Contexts]:
        """A stage's contexts: of its prompt or segments, then the negative prompt."""
        prompts = stage.prompts.segments or job.request.prompts
        parts = zip(*(contexts[prompt] for prompt in prompts))
        join = lambda x: None if x[0] is None else mx.concatenate(x, axis=1)
        negative = job.prompts[len(job.request.prompts) :]
        return [tuple(map(join, parts)), *(contexts[prompt] for prompt in negative)]

    def predict_duration(self, job: Job, contexts: TextContexts) -> Job:
        """The job, planned again if the model predicts its duration."""
        r, model = job.request, self.model
        if r.auto_duration is None or not contexts:
            return job
        head = model.checkpoint.load("duration_head", mx.float32)
        seconds = model.machines.on_rank_0(lambda: head(*contexts[r.prompt]).item())
        frames = min(whole_frames(seconds, r.fps, *r.auto_duration), r.num_frames)
        length = f"{frames} frames, {frames / r.fps:.1f} s"
        how = f"{seconds:.1f} s predicted from the prompt; --num-frames sets the length"
        note(f"{length} ({how})")
        shorter = replace(r, num_frames=frames, auto_duration=None)
        return plan(shorter, model.checkpoint, self.model.inputs)

    def encoders(self, job: Job) -> Encoders:
        """The encoders of a job's input files."""
        sees = "acescct" if job.codes == "acescct" else "srgb"
        spaces = sees, formats.exr_space(job.request.color_space or "srgb")
        component = partial(self.model.component, exact=job.codes != "srgb")
        return Encoders(self.model.inputs, component, self.frozen_from_noise, *spaces)

    def load_conditions(self, job: Job, resume: Optional[Snapshot]) -> list[Loaded]:
        """Encode input files: the conditionings of each stage not done yet."""
        encoders, loaded = self.encoders(job), [{}] * (resume.stage if resume else 0)
        encoders.clip = lru_cache(1)(encoders.clip)  # tiles see one after the other
        with self.meter.phase("inputs"):
            for stage in job.stages[len(loaded) :]:
                conditions = (c for c in stage.all_conditions if not c.carried)
                loaded.append({c: c.load(stage.size, encoders) for c in conditions})
        return loaded

    def denoise(self, job: int, stage: Stage, at: Snapshot, *inputs: Any) -> Steps:
        """One stage: a Step after each of its steps, and the snapshot at its end. Once, if
        its first step is not finite, it is repeated in the model's fallback dtype."""
        try:
            return (yield from self._denoise(job, stage, at, *inputs))
        except NotFinite:
            dtype = self.model.fall_back()
        note(f"the first step of {stage.name} is not finite: repeated in {dtype}")
        at = replace(at, load=replace(at.load, dtype=dtype))
        return (yield from self._denoise(job, stage, at, *inputs))

    def _denoise(self, job: int, stage: Stage, at: Snapshot, loaded, contexts, noise):
        """`denoise`, in the model's current dtype."""
        with self.meter.phase(stage.phase):
            trace = within(self.trace, stage.name)
            before = self.upsampled(stage, {} if stage.first else at.latents, noise)
            states = self.states(stage, at, before, loaded)
            draw = lambda k, shape: noise(f"{stage.name}.{k}", shape)
            blend = lambda k, x: states[k].blend(x)
            denoiser = self.denoiser(stage, states, contexts, trace)
            if at.step:
                x, denoiser.cached_x0 = at.tokens, at.guided
            else:
                scale, items = stage.noise_scale, states.items()
                x = {k: s.noised(draw(k, s.latent.shape), scale) for k, s in items}
            sample = SAMPLERS[stage.sampler]
            steps = sample(denoiser, x, stage.sigmas, blend, draw, at.step)
            for i, (x, x0) in enumerate(steps, at.step + 1):
                mx.eval(x, x0)
                if not all(mx.isfinite(v).all() for v in x0.values()):
                    if self.model.fallback and i == at.step + 1:
                        raise NotFinite
                    wrong = f"step {i} predicted values that are not finite"
                    how = "python -m ltx2.checks trace finds where they begin"
                    raise OutputError(f"{stage.name}: {wrong}; {how}")
                skips = any(g.skip_step for g in stage.guidance.values())
                guided = denoiser.cached_x0 if skips else {}
                now = replace(at, step=i, tokens=x, guided=guided)
                count = {"step": min(i, stage.steps), "steps": stage.steps}
                what = {"snapshot": now, "denoised": self.latents(stage, states, x0)}
                yield Step(phase=stage.name, job=job, **count, **what)
            for k, v in x.items():
                traced(trace, k, v)
                if not states[k].frozen:  # an input, which may be silent
                    check_latents(f"{stage.name}, {k}", v)
            latents = stage.part.merge(before, self.latents(stage, states, x))
            final = (k for k in stage.final if k in latents)
            kept = {stage.window.prefix + k: latents[k] for k in final}
            kept = at.kept | kept | stage.carry(latents)
            after = {"stage": at.stage + 1, "step": 0, "tokens": {}, "guided": {}}
            return replace(at, **after, latents=latents, kept=kept)

    def states(self, stage: Stage, at: Snapshot, before: Streams, loaded: Loaded):
        """A stage's first streams, from zeros or earlier latents, conditioned."""
        source = before | {k: x for k, x in at.kept.items() if "carry." in k}
        source.setdefault("smaller", at.latents.get("video"))
        source["final_audio"] = at.kept.get("audio")
        config, size, states = self.model.dit_config, stage.size, {}
        channels = {"video": config.in_channels, "audio": config.audio_in_channels}
        for stream, conditions in stage.conditions.items():
            state = LatentState.initial(size.bounds(stream), channels[stream])
            if stream in before:
                start = stage.part.cut(before) if stream == "video" else before[stream]
                state = state.start_from(start)
            for c in conditions:
                state = c.apply(state, size, source) if c.carried else loaded[c](state)
            states[stream] = state
        return states

    def denoiser(self, stage: Stage, states: States, contexts: list, trace: Trace):
        """The stage's transformer with its LoRAs and guidance, whole or in tiles."""
        machines, model = self.model.machines, self.model
        transformer = model.transformer_with(stage.loras, self.streamed)
        transformer = machines.transformer(transformer)
        facts = transformer.project_text(contexts), stage, machines.agree, trace
        make = lambda states: GuidedDenoiser(transformer, states, *facts)
        if stage.spans:
            return TiledDenoiser(make, states, stage.size, stage.spans)
        return make(states)

    def upsampled(self, stage: Stage, latents: Streams, noise: Noise) -> Streams:
        """The previous latents at the stage's size."""
        if stage.upsampler is None:
            return latents
        # Latents are normalized before and after; of the VAE only statistics are read.
        vae = self.model.checkpoint.load("vae", mx.float32, lazy=True)
        upsample = self.model.component(stage.upsampler)
        enlarged = lambda x: vae.normalize(upsample(vae.denormalize(x)))
        again = ("keyframes",) if stage.slots else ()  # are generated again
        larger = {k: enlarged(latents[k]) for k in ("video", *again)}
        mx.eval(larger)
        self.model.free(stage.upsampler)
        if stage.part.decoder:
            larger["smaller"] = latents["video"]
            stills = stage.part.stills(latents), stage.size.height, stage.size.width
            draw = lambda name, shape: noise(f"{stage.name}.{name}", shape)
            larger["keyframes"] = self.model.enlarged(stage.part.decoder, *stills, draw)
        return latents | larger

    def latents(self, stage: Stage, states: States, tokens: Streams) -> Streams:
        """Tokens as latents, without those that only guide; "keyframes" are generated
        single frames (1, K, H, W, C). A frozen stream keeps its input exactly."""
        given = {k: state.latent for k, state in states.items() if state.frozen}
        tokens = tokens | given
        latents = {k: x[:, : states[k].num_target_tokens] for k, x in tokens.items()}
        if "video" in latents:
            size, state = stage.size, states["video"]
            target, channels = state.num_target_tokens, tokens["video"].shape[-1]
            latents["video"] = latents["video"].reshape(1, *size.latent, channels)
            slots = np.flatnonzero(state.keyframes[target:]) + target
            if len(slots):
                made = tokens["video"][:, mx.array(slots)]
                latents["keyframes"] = made.reshape(1, -1, *size.latent_sides, channels)
        if "audio" in latents:
            channels = self.model.checkpoint.sketch("audio_vae").config.z_channels
            latents["audio"] = audio_from_tokens(latents["audio"], channels)
        return latents

    def decode(self, n: int, job: Job, latents: Streams) -> Iterator[Event]:
        """Decode the audio, then the video frame by frame, then yield the result."""
        size, first = job.size, job.windows[0].prefix
        streams = [s for s in job.streams if first + s in latents]
        result = Result(request=job.request, fps=size.fps, job=n)
        result.phases = self.meter.phases
        own = lambda stream, skip: mx.concatenate(
            [latents[w.prefix + stream][0, skip(w) :] for w in job.windows]
        )
        if "audio" in streams:
            tokens = lambda window: carried_tokens(window.carried_in, size.fps)
            result.audio_latents = own("audio", tokens)
        if "audio" in streams or job.soundtrack:
            yield Phase(phase="audio", job=n, step=0, steps=0)
            with self.meter.phase("audio"):
                self.decode_audio(job, latents, result)
        if "video" in streams:
            cells = own("video", lambda w: latent_frames(w.carried_in))
            result.video_latents = cells[: latent_frames(job.generated)]
            yield Phase(phase="video", job=n, step=0, steps=size.num_frames)
            guard, decoded = FrameGuard(), 0
            decode = lambda window: self.decode_video(n, job, latents, window)
            with self.meter.phase("video"):
                for frames in blended(job.parts, decode):
                    if guard.frames == size.num_frames:  # the rest is cut off
                        break
                    kept = frames[0, -decoded % job.repeats :: job.repeats]
                    decoded += frames.shape[1]
                    kept = kept[: size.num_frames - guard.frames]
                    if not len(kept):
                        continue
                    frames = kept[:, : size.height, : size.width]
                    guard.update(frames)
                    if job.codes == "srgb":
                        pixels = np.array(mx.round(frames * 255).astype(mx.uint8))
                    else:
                        pixels = np.array(frames.astype(mx.float32))
                        spaces = job.codes, job.request.color_space
                        pixels = color.convert(pixels, *spaces)
                    count = {"step": guard.frames, "steps": size.num_frames}
                    yield Frames(phase="video", job=n, frames=pixels, **count)
            guard.check()
        seconds = {k: round(s, 2) for k, (s, _) in self.meter.phases.items()}
        result.metadata = provenance(self.model, job, seconds)
        yield result

    def decode_audio(self, job: Job, latents: Streams, result: Result) -> None:
        """Set the waveform: that of an input file, unchanged, or the decoded one."""
        r, model, size = job.request, self.model, job.size
        if job.soundtrack:
            path, start = job.soundtrack
            if model.inputs.probe(path).has_audio:
                sound = media.read_audio(path, start, size.num_frames / size.fps)
                result.waveform, result.sample_rate = sound
                result.sound_file = None if start else path
            return
        pieces, rate = [], model.vocoder.sample_rate
        for window in job.parts:
            if window.given:  # the clip that is extended, or silence
                seconds = window.num_frames / size.fps
                piece = np.zeros((round(seconds * rate), 2), np.float32)
                if model.inputs.probe(r.video).has_audio:
                    sound = stereo(r.video, 0.0, seconds, rate)[: len(piece)]
                    piece[: len(sound)] = sound
                pieces.append(piece)
                continue
            mel = model.audio_vae.decode(latents[window.prefix + "audio"])
            traced(self.trace, "audio.mel", mel)
            waveform = traced(self.trace, "audio.waveform", model.vocoder(mel))
            pieces.append(np.array(waveform[0]))
        result.sample_rate, result.waveform = rate, pieces[0]
        if len(pieces) > 1:
            result.waveform = crossfaded(pieces, job.parts, size.fps, rate)
        result.waveform = result.waveform[: round(size.num_frames / size.fps * rate)]
        check_waveform(result.waveform)

    def decode_video(self, n: int, job: Job, latents: Streams, window: Window):
        """Frames (1, n, H, W, 3) in [0, 1] of a window."""
        r = job.request
        if window.given:  # the clip that is extended
            clip = frames_of(r.video, 0, window.num_frames, r.fps)
            seen = self.encoders(job).seen(r.video, clip, job.size)
            return (x / 2 + 0.5 for x in seen)
        noise, video = self.noise_of(n, job), latents[window.prefix + "video"]
        draw = lambda name, shape: noise(window.prefix + name, shape)
        how = {"bias": r.decode_bias, "trace": within(self.trace, "video")}
        if places := job.planes(window):
            stills = [latents[w.prefix + "keyframes"] for w in places]
            stills = [x[:, -len(p) :] for x, p in zip(stills, places.values())]
            stills = mx.concatenate(stills, axis=1)
            how["keyframes"] = Keyframes(stills, sum(places.values(), ()), window.start)
        return self.model.decoded(job.decoder, video, draw, job.codes != "srgb", **how)
