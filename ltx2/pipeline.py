"""The generator: encode the prompt, denoise stage by stage, decode."""

from __future__ import annotations

import platform
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Iterator, Optional, Sequence, Union

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import __version__, hub, media, memory, weights
from .audio_vae import AudioVAEConfig
from .base import Trace, UserError, traced, within
from .cache import ContextCache
from .conditions import Condition, Encoders, InputFiles, Stage
from .dit import Block, DiT, DiTConfig, StreamedBlocks, build_blocks
from .duration import whole_frames
from .guards import FrameGuard, check_latents, check_waveform
from .guidance import Contexts, GuidedDenoiser, guidance_passes
from .latents import Conditioning, Streams, audio_from_tokens
from .lora import Lora, attach
from .parallel import Group, Machines, Ranks
from .preview import Preview
from .request import LoraFile, Request
from .sampling import SAMPLERS, Noise
from .snapshot import Snapshot, as_json
from .stages import Job, plan
from .text import MAX_TOKENS, Gemma4TextEncoder, TextEncoder, enhance


def seeded_noise(seed: int) -> Noise:
    """Normals that depend on the seed and the name only, the same on every machine."""

    def noise(name: str, shape: tuple[int, ...]) -> mx.array:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return mx.array(rng.standard_normal(shape, np.float32))

    return noise


# Events


@dataclass(kw_only=True)
class Event:
    """Something that happened; what a kind of event does not have is None."""

    phase: str = ""
    job: int = 0  # the number of the request
    step: Optional[int] = None
    steps: Optional[int] = None
    snapshot: Optional[Snapshot] = None
    denoised: Optional[Streams] = None  # latents that a step estimates, with batch axis
    frames: Optional[np.ndarray] = None  # (n, H, W, 3) uint8


class Phase(Event):
    """A phase begins: step 0 of its steps. In "latents" a video is denoised."""


class Step(Event):
    """A denoising step is done: a snapshot, and what it estimates as the end."""


class Frames(Event):
    """Frames are decoded; `step` of `steps` frames are."""


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
    sound_file: Optional[str] = None  # that the waveform is all of
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> Union[str, tuple[np.ndarray, int], None]:
        """What `media.VideoWriter` takes."""
        if self.waveform is None:
            return None
        return self.sound_file or (self.waveform, self.sample_rate)

    def save(self, path: Union[str, Path]) -> None:
        """Write an mp4 with the sound exactly as long as the video, or a wav."""
        if self.frames is None:
            media.write_wav(path, self.waveform, self.sample_rate, self.metadata)
            return
        with media.VideoWriter(path, self.fps, self.sound, self.metadata) as video:
            video.write(self.frames)


class Meter:
    """Seconds and peak bytes by phase; a phase that comes again adds up."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(self, name: str):
        mx.reset_peak_memory()
        start = time.perf_counter()
        yield
        seconds, peak = self.phases.get(name, (0.0, 0.0))
        seconds += time.perf_counter() - start
        self.phases[name] = seconds, max(peak, mx.get_peak_memory())


class Pipeline:
    """A model that loads each component when it is needed and frees it afterwards."""

    def __init__(
        self,
        checkpoint: weights.Checkpoint,
        text_encoder: Optional[str] = None,
        dtype: mx.Dtype = mx.bfloat16,
        origin: Optional[dict[str, Any]] = None,
        low_memory: Optional[bool] = None,
        cache_contexts: Union[str, Path, None] = None,
        machines: Optional[Machines] = None,
    ):
        self.checkpoint, self.dtype, self.origin = checkpoint, dtype, origin or {}
        self.low_memory, self.cache_contexts = low_memory, cache_contexts
        self.machines = machines or Machines()
        self.text_encoder = checkpoint.encoder(text_encoder)
        self.inputs = InputFiles()
        self._loaded: dict[str, nn.Module] = {}
        self._loras: tuple[LoraFile, ...] = ()  # of the loaded transformer

    # Components

    def component(self, name: str) -> nn.Module:
        """A component of the model, loaded once."""
        if name not in self._loaded:
            hub.fetch_all(self.checkpoint.files)
            dtype = self._text_dtype if name == "connectors" else self.dtype
            self._loaded[name] = self.checkpoint.load(name, dtype)
        return self._loaded[name]

    transformer = property(lambda self: self.component("transformer"))
    connectors = property(lambda self: self.component("connectors"))
    vae = property(lambda self: self.component("vae"))
    audio_vae = property(lambda self: self.component("audio_vae"))
    vocoder = property(lambda self: self.component("vocoder"))

    @property
    def _text_dtype(self) -> mx.Dtype:
        """Gemma's states overflow float16."""
        return mx.bfloat16 if self.dtype == mx.float16 else self.dtype

    def free(self, *names: str) -> None:
        """Free the memory of these components."""
        for name in names:
            self._loaded.pop(name, None)
            if name == "transformer":
                self._loras = ()
        mx.clear_cache()

    def adopt(self, transformer: DiT) -> None:
        """Use this transformer, with what is attached to it, until it is freed."""
        self._loaded["transformer"], self._loras = transformer, ()

    def transformer_with(self, loras: tuple[LoraFile, ...], streamed: bool) -> DiT:
        """The transformer with a stage's LoRAs: in memory, or with blocks that are read
        in each step, or this machine's part of it."""
        rebuilt = streamed or self.machines.mode == "tensor"
        if loras != self._loras and rebuilt:
            self.free("transformer")
        elif loras != self._loras:
            attach(self.transformer, [self._lora(file) for file in loras])
        if rebuilt and "transformer" not in self._loaded:
            model = self.checkpoint.load("transformer", self.dtype, lazy=True)
            attach(model, [(Lora.read(f.path), f.strength) for f in loras])
            self.machines.shard(model)
            if streamed:
                blocks = lambda: self._blocks(loras)
                model.transformer_blocks = StreamedBlocks(blocks)
            self._loaded["transformer"] = model
        self._loras = loras
        weights.evaluate(w for _, w in tree_flatten(self.transformer.parameters()))
        return self.transformer

    def _blocks(self, loras: tuple[LoraFile, ...]) -> Iterator[Block]:
        """The transformer's blocks one by one, with LoRAs, of which nothing is read yet."""
        config = DiTConfig.from_dict(self.checkpoint.config["transformer"])
        tensors = self.checkpoint.weights("transformer", self.dtype)
        factors = [(Lora.read(file.path), file.strength) for file in loras]
        blocks = build_blocks(config, tensors, self.checkpoint.quantization)
        for i, block in enumerate(blocks):
            attach(block, factors, f"transformer_blocks.{i}.")
            self.machines.shard(block)
            yield block

    def _lora(self, file: LoraFile) -> tuple[Lora, float]:
        return self.inputs.lora(file.path), file.strength

    def files(self) -> dict[str, str]:
        """The weights' files with their fingerprints."""
        files = self.checkpoint.files
        return {f.name: f.fingerprint for f in files if f.role and f.path}

    # Plans

    def plan(self, request: Request) -> Job:
        """What a request means with this model and its input files, and the memory it
        takes; UserError if it cannot be done. No weights are read."""
        job = plan(request, self.checkpoint, self.inputs)
        files = {file.path for stage in job.stages for file in stage.loras}
        if files:
            model = self.checkpoint.load("transformer", self.dtype, lazy=True)
            for path in files:
                self.inputs.lora(path).check(model)
        return replace(job, memory=self._estimate(job))

    @cached_property
    def _estimator(self) -> memory.Estimator:
        return memory.Estimator(self.checkpoint, self.dtype)

    def _estimate(self, job: Job, shards: int = 1) -> memory.MemoryPlan:
        needs = self._estimator(
            job.stages,
            len(job.prompts),
            job.decoder,
            loras=lambda path: self.inputs.lora(path).nbytes,
            decodes_audio=job.request.audio is None,
            shards=shards,
        )
        return memory.planned(needs, memory.available(), self.low_memory)

    def memory(self, *jobs: Job, text: bool = True) -> memory.MemoryPlan:
        """The memory of jobs that are done together, without `text` if contexts are
        given; also decides how several machines split the work."""
        found = memory.joined([job.memory for job in jobs], self.low_memory)
        passes = max(len(guidance_passes(s.guidance)) for j in jobs for s in j.stages)
        config = DiTConfig.from_dict(self.checkpoint.config["transformer"])
        group_size = (self.checkpoint.quantization or {}).get("group_size", 1)
        fits = found.fits and not found.streamed
        self.machines.split(len(jobs), passes, fits, config, group_size)
        if self.machines.mode == "tensor":
            count = self.machines.count
            parts = [self._estimate(job, count) for job in jobs]
            found = memory.joined(parts, self.low_memory)
        if text and self.machines.rank == 0:
            prompts = {prompt for job in jobs for prompt in job.prompts}
            need = self._estimator.text(len(prompts), self._encoder_files())
            found = memory.joined([found], self.low_memory, {"text": need})
        if not found.fits:
            smaller = memory.suggest_smaller(jobs[0].request, self._fits)
            found = replace(found, suggestion=smaller)
        return found

    def _fits(self, request: Request) -> bool:
        """Whether a request can be done, and in the memory there is."""
        try:
            return self.plan(request).memory.fits
        except UserError:
            return False

    def initial_snapshot(self, job: Job) -> Snapshot:
        """A job before its first step."""
        load = self.origin | {"text_encoder": self.text_encoder}
        return Snapshot(job.request, as_json(job), load, self.files())

    # Text

    def _encoder_files(self) -> list[hub.File]:
        """The text encoder's weights, if they are not among the model's own."""
        packed = self.checkpoint.version >= weights.GEMMA_4
        files = [] if packed else weights.text_encoder_files(self.text_encoder)
        if not packed and "config.json" not in (f.name for f in files):
            raise UserError(f"text encoder {self.text_encoder} has no config.json")
        return [f for f in files if f.name.endswith(".safetensors")]

    def _contexts(
        self, prompts: Sequence[str], trace: Optional[Trace]
    ) -> dict[str, Contexts]:
        """Contexts by prompt, from the cache folder if there is one."""
        encode = lambda prompts: self.encode_prompts(prompts, trace)
        if self.cache_contexts is None or trace is not None:
            return encode(prompts)
        encoder = {f.name: f.fingerprint for f in self._encoder_files()}
        made_by = [self.files(), encoder, str(self.dtype)]
        return ContextCache(self.cache_contexts, made_by)(prompts, encode)

    def encode_prompts(
        self, prompts: Sequence[str], trace: Optional[Trace] = None
    ) -> dict[str, Contexts]:
        """Contexts (video, audio), each (1, 1024, D), by prompt; frees what it loads."""
        if self.checkpoint.version >= weights.GEMMA_4:
            gemma = self.checkpoint.load("gemma", self._text_dtype, lazy=True)
            encoder = Gemma4TextEncoder(gemma, low_memory=True)
            del gemma
        else:
            folder = weights.fetch_text_encoder(self.text_encoder)
            encoder = TextEncoder(folder, self._text_dtype, low_memory=True)
            config = self.checkpoint.load("connectors", lazy=True).config
            if encoder.width != config.caption_channels * config.encoder_states:
                raise UserError(
                    f"text encoder {self.text_encoder} has a different size from the "
                    "one this model was trained with: use Gemma 3 12B"
                )
        states = encoder(prompts, trace)
        mx.eval(states)
        del encoder
        mx.clear_cache()
        contexts = {}
        for prompt, s in zip(prompts, states):
            contexts[prompt] = self.connectors(s, MAX_TOKENS, trace)
            mx.eval(contexts[prompt])
        self.free("connectors")
        return contexts

    def encode_prompt(self, prompt: str) -> Contexts:
        """Contexts (video, audio) of one prompt, each (1, 1024, D)."""
        return self.encode_prompts([prompt])[prompt]

    def enhance(self, prompt: str, seed: int) -> str:
        """The prompt expanded by the text encoder's Gemma."""
        if self.checkpoint.version >= weights.GEMMA_4:
            raise UserError("prompt enhancement is not available with LTX-2.5")
        folder = weights.fetch_text_encoder(self.text_encoder)
        longer = self.machines.on_rank_0(lambda: enhance(folder, prompt, seed))
        mx.clear_cache()
        if not longer:
            raise UserError(f"prompt enhancement of {prompt!r} returned no text")
        return longer

    def preview(self) -> Preview:
        """A fast map from this model's latents to pixels."""
        if "decoder" not in self.vae:
            raise UserError("previews need the conv video decoder")
        preview = Preview(self.vae)
        self.free("vae")
        return preview

    # A run

    def generate(self, prompt: str, **options: Any) -> Result:
        """Make one video; `options` are fields of `Request`, and those of `stream`."""
        names = ("noise", "trace", "contexts", "resume", "frozen_from_noise")
        of_run = {name: options.pop(name) for name in names if name in options}
        frames = []
        for event in self.stream(Request(prompt, **options), **of_run):
            if isinstance(event, Frames):
                frames.append(event.frames)
        event.frames = np.concatenate(frames) if frames else None
        return event

    def stream(
        self,
        *requests: Union[Request, Job],
        noise: Optional[Noise] = None,
        trace: Optional[Trace] = None,
        contexts: Optional[dict[str, Contexts]] = None,
        resume: Optional[Snapshot] = None,
        frozen_from_noise: bool = False,
    ) -> Iterator[Event]:
        """Make videos: an Event after each phase and step, a Result after each video.

        All prompts are encoded, then all inputs, then all videos denoised, then decoded,
        so that no two large models are loaded together. `noise(name, shape)` is the only
        randomness, by default seeded normals. Its names are, in this order,
        "stage1.video", "stage1.audio" (tokens (1, T, C), appended ones included), a
        sampler's own "<stage>.<stream>.step<i>" and ".substep<i>", those of the next
        stages, and "vae" ((1, F, H, W, C), timestep-conditioned decoders only) or
        "vae.frame<i>" ((1, 1, H, W, 3), the diffusion decoder). `contexts` by prompt
        replace the text encoder. `resume` continues from a snapshot; pass the same
        request or none. `frozen_from_noise` starts the kept stream of a retake from
        noise, as the reference does. Raises UserError before any weights are read.
        """
        requests = requests or (resume.request,)
        jobs = [self.plan(r) if isinstance(r, Request) else r for r in requests]
        if resume is not None and resume.stage == len(jobs[0].stages):
            contexts = {}  # it is only decoded
        plan = self._prepare(jobs, contexts is None, resume)
        run = Run(self, noise, trace, frozen_from_noise, plan.streamed)
        if contexts is None:
            yield Phase(phase="text", step=0, steps=0)
            contexts = run.encode_text(jobs)
        jobs = [run.predict_duration(job, contexts) for job in jobs]
        conditions, done = {}, {}
        for n, job in self.machines.deal(jobs):
            if job.has_media_inputs:
                yield Phase(phase="inputs", job=n, step=0, steps=0)
            conditions[n] = run.load_conditions(job, resume)
        self.free("vae", "audio_vae")
        for n, job in self.machines.deal(jobs):
            at = resume or self.initial_snapshot(job)
            texts = [contexts[prompt] for prompt in job.prompts if contexts]
            for i, stage in enumerate(job.stages[at.stage :], at.stage):
                yield Phase(phase=stage.name, job=n, step=0, steps=stage.steps)
                draw = run.noise_of(job)
                at = yield from run.denoise(n, stage, at, conditions[n][i], texts, draw)
            done[n] = finished(job, at)
            yield Phase(phase="latents", job=n, step=0, steps=0, snapshot=done[n])
        self.free(*(k for k in self._loaded if k == "transformer" or "upsampler" in k))
        done = self.machines.gather(done, len(jobs))
        for n, job in enumerate(jobs if self.machines.rank == 0 else ()):
            yield from run.decode(n, job, done[n].latents)
        self.free("vae", "diffusion_decoder", "audio_vae", "vocoder")
        self.inputs.clear()

    def _prepare(
        self, jobs: list[Job], text: bool, resume: Optional[Snapshot]
    ) -> memory.MemoryPlan:
        """Check what can be checked before weights are read, and fetch them."""
        plan = self.memory(*jobs, text=text)
        plan.check()
        hub.fetch_all(self.checkpoint.files)
        if resume is not None:
            resume.check(jobs[0], self.files())
        memory.set_limits(plan)
        return plan


def finished(job: Job, at: Snapshot) -> Snapshot:
    """A run after its last stage: the streams of the result, cut to its length."""
    latents = {k: x for k, x in at.kept.items() if k in job.streams}
    if at.stage == len(job.stages) and not at.kept:  # resumed after its last stage
        latents = at.latents
    if "video" in latents:
        latents["video"] = latents["video"][:, : job.size.latent[0]]
    return replace(at, stage=len(job.stages), latents=latents, kept={})


@dataclass
class Run:
    """The steps of a run that `Pipeline.stream` puts in order."""

    pipe: Pipeline
    noise: Optional[Noise]
    trace: Optional[Trace]
    frozen_from_noise: bool
    streamed: bool
    meter: Meter = field(default_factory=Meter)

    def noise_of(self, job: Job) -> Noise:
        """Noise as float32 arrays, by name and shape."""
        if self.noise is None:
            return seeded_noise(job.request.seed)
        return lambda *request: mx.array(self.noise(*request)).astype(mx.float32)

    def encode_text(self, jobs: list[Job]) -> dict[str, Contexts]:
        """Contexts by prompt, each encoded once."""
        prompts = list(dict.fromkeys(p for job in jobs for p in job.prompts))
        with self.meter.phase("text"):
            encode = lambda: self.pipe._contexts(prompts, self.trace)
            return self.pipe.machines.on_rank_0(encode)

    def predict_duration(self, job: Job, contexts: dict[str, Contexts]) -> Job:
        """The job with the duration that its prompt needs, if the model predicts it."""
        r, pipe = job.request, self.pipe
        if r.auto_duration is None or not contexts:
            return job
        head = pipe.checkpoint.load("duration_head", mx.float32)
        predict = lambda: head(*contexts[r.prompt]).item()
        seconds = pipe.machines.on_rank_0(predict)
        frames = min(whole_frames(seconds, r.fps, *r.auto_duration), r.num_frames)
        warnings.warn(
            f"{frames} frames, {frames / r.fps:.1f} s: the prompt needs {seconds:.1f} s "
            "(--num-frames or --auto-duration set it)"
        )
        shorter = replace(r, num_frames=frames, auto_duration=None)
        return plan(shorter, pipe.checkpoint, pipe.inputs)

    def load_conditions(
        self, job: Job, resume: Optional[Snapshot]
    ) -> list[dict[Condition, Conditioning]]:
        """By stage, the conditionings from input files; none for finished stages."""
        component = self.pipe.component
        encoders = Encoders(self.pipe.inputs, component, self.frozen_from_noise)
        with self.meter.phase("inputs"):
            return [
                {
                    c: c.load(stage.size, encoders)
                    for c in stage.all_conditions
                    if not c.carried and i >= (resume.stage if resume else 0)
                }
                for i, stage in enumerate(job.stages)
            ]

    def denoise(
        self,
        job: int,
        stage: Stage,
        at: Snapshot,
        conditions: dict[Condition, Conditioning],
        contexts: list[Contexts],
        noise: Noise,
    ) -> Iterator[Step]:
        """One stage: a Step after each of its steps, and the snapshot at its end."""
        with self.meter.phase(stage.name):
            trace = within(self.trace, stage.name)
            transformer = self.pipe.transformer_with(stage.loras, self.streamed)
            before = self.upsampled(stage, at.latents)
            source = before | {"smaller": at.latents.get("video")}
            c = transformer.config
            channels = {"video": c.in_channels, "audio": c.audio_in_channels}
            states = stage.states(channels, source, conditions)
            draw = lambda k, shape: noise(f"{stage.name}.{k}", shape)
            blend = lambda k, x: states[k].blend(x)
            denoiser = GuidedDenoiser(
                self.pipe.machines.transformer(transformer),
                states,
                contexts,
                stage.guidance,
                trace,
                stage.guidance_interval,
                stage.step_cache,
                self.pipe.machines.agree,
            )
            if at.step:
                x, denoiser.cached_x0 = at.tokens, at.guided
            else:
                start = lambda k, s: s.noised(
                    draw(k, s.latent.shape), stage.noise_scale
                )
                x = {k: start(k, state) for k, state in states.items()}
            sample = SAMPLERS[stage.sampler]
            steps = sample(denoiser, x, stage.sigmas, blend, draw, at.step)
            for i, (x, x0) in enumerate(steps, at.step + 1):
                mx.eval(x, x0)
                guided = denoiser.cached_x0 if stage.skips_steps else {}
                now = replace(at, step=i, tokens=x, guided=guided)
                denoised = self.latents(stage, states, x0)
                count = {"step": min(i, stage.steps), "steps": stage.steps}
                what = {"snapshot": now, "denoised": denoised}
                yield Step(phase=stage.name, job=job, **count, **what)
            for k, v in x.items():
                traced(trace, k, v)
                check_latents(f"{stage.name}, {k}", v)
            latents = stage.part.merge(before, self.latents(stage, states, x))
            kept = at.kept | {k: latents[k] for k in stage.final if k in latents}
            after = {"stage": at.stage + 1, "step": 0, "tokens": {}, "guided": {}}
            return replace(at, **after, latents=latents, kept=kept)

    def upsampled(self, stage: Stage, latents: Streams) -> Streams:
        """The previous latents at the stage's size."""
        if stage.upsampler is None:
            return latents
        # Normalized latents in and out; only the statistics are read of the VAE.
        vae = self.pipe.checkpoint.load("vae", mx.float32, lazy=True)
        upsample = self.pipe.component(stage.upsampler)
        larger = {
            k: vae.normalize(upsample(vae.denormalize(latents[k])))
            for k in stage.upsampled
        }
        mx.eval(larger)
        return latents | larger

    def latents(self, stage: Stage, states, tokens: Streams) -> Streams:
        """Tokens as latents, without those that only guide; "keyframes" are generated
        single frames (1, K, H, W, C)."""
        latents = {k: x[:, : states[k].num_target_tokens] for k, x in tokens.items()}
        if "video" in latents:
            size, state = stage.size, states["video"]
            target, channels = state.num_target_tokens, tokens["video"].shape[-1]
            latents["video"] = latents["video"].reshape(1, *size.latent, channels)
            slots = np.flatnonzero(state.keyframes[target:]) + target
            if len(slots):
                made = tokens["video"][:, mx.array(slots)]
                shape = (1, -1, *size.latent_sides, channels)
                latents["keyframes"] = made.reshape(shape)
        if "audio" in latents:
            config = AudioVAEConfig.from_dict(self.pipe.checkpoint.config["audio_vae"])
            latents["audio"] = audio_from_tokens(latents["audio"], config.z_channels)
        return latents

    def decode(self, n: int, job: Job, latents: Streams) -> Iterator[Event]:
        """Audio, then frames as they are decoded, then the result."""
        r, pipe, size = job.request, self.pipe, job.size
        phases = self.meter.phases
        result = Result(request=r, fps=size.fps, job=n, phases=phases)
        if "audio" in latents:
            result.audio_latents = latents["audio"][0]
            yield Phase(phase="audio", job=n, step=0, steps=0)
            with self.meter.phase("audio"):
                if r.audio:  # returned unchanged
                    seconds = size.num_frames / size.fps
                    sound = media.read_audio(r.audio, r.audio_start, seconds)
                    result.waveform, result.sample_rate = sound
                    result.sound_file = None if r.audio_start else r.audio
                else:
                    mel = pipe.audio_vae.decode(latents["audio"])
                    traced(self.trace, "audio.mel", mel)
                    waveform = traced(self.trace, "audio.waveform", pipe.vocoder(mel))
                    result.waveform = np.array(waveform[0])
                    result.sample_rate = pipe.vocoder.sample_rate
                    check_waveform(result.waveform)
        if "video" in latents:
            result.video_latents = latents["video"][0]
            yield Phase(phase="video", job=n, step=0, steps=size.num_frames)
            guard = FrameGuard()
            with self.meter.phase("video"):
                for frames in self.decode_video(job, latents["video"]):
                    guard.update(frames[0])
                    pixels = np.array(mx.round(frames[0] * 255).astype(mx.uint8))
                    count = {"step": guard.frames, "steps": size.num_frames}
                    yield Frames(phase="video", job=n, frames=pixels, **count)
            guard.check()
        result.metadata = self.provenance(job)
        yield result

    def decode_video(self, job: Job, latents: mx.array) -> Iterator[mx.array]:
        """Frames (1, n, H, W, 3) in [0, 1]."""
        noise, trace = self.noise_of(job), within(self.trace, "video")
        bias = {"bias": job.request.decode_bias}
        model = self.pipe.component(job.decoder)
        if job.decoder == "diffusion_decoder":
            draw = lambda i, shape: noise(f"vae.frame{i}", shape)
            return model.decode_stream(latents, draw, trace=trace, **bias)
        conditioned = model.config.timestep_conditioning
        drawn = noise("vae", latents.shape) if conditioned else None
        return model.decode_stream(latents, noise=drawn, trace=trace, **bias)

    def provenance(self, job: Job) -> dict[str, Any]:
        """How a result was made: enough to make it again."""
        pipe, checkpoint = self.pipe, self.pipe.checkpoint
        return {
            "request": asdict(job.request),
            "negative_prompt": job.negative_prompt,
            "model": {
                "version": checkpoint.model_version,
                "kind": checkpoint.kind,
                "quantization": checkpoint.quantization,
                "files": pipe.files(),
            },
            "load": pipe.origin | {"text_encoder": pipe.text_encoder},
            "versions": {
                "ltx2": __version__,
                "mlx": mx.__version__,
                "platform": platform.platform(),
            },
            "seconds": {k: round(s, 2) for k, (s, _) in self.meter.phases.items()},
        }


def load(
    model: str,
    text_encoder: Optional[str] = None,
    kind: Optional[str] = None,
    dtype: Union[mx.Dtype, str, None] = None,
    upsamplers: Sequence[str] = (),
    low_memory: Optional[bool] = None,
    cache_contexts: Union[str, Path, None] = None,
    group: Optional[Group] = None,
    parallel: Optional[str] = None,
    share: Optional[str] = None,
) -> Pipeline:
    """A pipeline from an official file, a folder, a converted folder or a Hub repo.

    `kind` ("dev" or "distilled") overrides what the file name says, `upsamplers` those
    next to the model. `dtype` (bfloat16) is of the text side and the transformer.
    Weights are read when a phase needs them; with `low_memory` (None: if not all of
    them fit) the transformer's blocks are read in each step, with the same result.
    `cache_contexts` is a folder that keeps encoded prompts. A `group` of machines, all
    of which call this, splits the work in one of parallel.MODES (`share` is the earlier
    name of `parallel`). Raises UserError when files do not fit together.
    """
    name = str(dtype or "bfloat16").removeprefix("mlx.core.")
    checkpoint = weights.open_model(model, kind, upsamplers=upsamplers, fetch=False)
    origin = {"model": str(model), "kind": checkpoint.kind, "dtype": name}
    origin["upsamplers"] = [str(path) for path in upsamplers]
    machines = Machines() if group is None else Ranks(group, parallel or share)
    dtype = getattr(mx, name)
    options = low_memory, cache_contexts, machines
    return Pipeline(checkpoint, text_encoder, dtype, origin, *options)
