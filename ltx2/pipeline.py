"""The one generator: encode the prompt, denoise stage by stage, decode."""

from __future__ import annotations

import dataclasses
import platform
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence, TypeVar, Union

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import __version__, hub, inputs, media, memory, parallel, weights
from .audio_vae import AudioVAEConfig
from .base import Trace, UserError, traced, within
from .cache import ContextCache
from .denoiser import Contexts, Denoiser, pass_kinds
from .dit import Block, DiT, DiTConfig, StreamedBlocks, build_blocks
from .duration import whole_frames
from .guards import FrameGuard, check_latents, check_waveform
from .latents import (
    LatentState,
    audio_bounds,
    audio_from_tokens,
    audio_to_tokens,
    condition,
    latent_frames,
    video_bounds,
    video_tokens,
)
from .lora import Lora, attach
from .preview import Preview
from .request import Job, LoraFile, Request, Stage, plan
from .sampling import SAMPLERS, Noise, Streams
from .snapshot import Snapshot, stages_of
from .text import MAX_TOKENS, Gemma4TextEncoder, TextEncoder, enhance

T = TypeVar("T")


def seeded_noise(seed: int) -> Noise:
    """Normals that depend on the seed and the name only, the same on every machine."""

    def noise(name: str, shape: tuple[int, ...]) -> mx.array:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return mx.array(rng.standard_normal(shape, np.float32))

    return noise


@dataclass(frozen=True)
class Event:
    """What happens: a phase begins (step 0), a step is done, frames are there."""

    phase: str
    step: int = 0
    steps: int = 0
    job: int = 0
    snapshot: Optional[Snapshot] = None  # after a denoising step
    denoised: Optional[Streams] = None  # its estimate of the end, as latents
    frames: Optional[np.ndarray] = None  # (n, H, W, 3) uint8, as they are decoded


@dataclass
class Result:
    """A finished video with its sound; latents are normalised, as the model sees them."""

    request: Request
    fps: float
    video_latents: Optional[mx.array] = None  # (F, H, W, C)
    audio_latents: Optional[mx.array] = None  # (T, mel bins, C)
    frames: Optional[np.ndarray] = None  # (F, H, W, 3) uint8, by `generate`
    waveform: Optional[np.ndarray] = None  # (samples, 2) float32
    sample_rate: Optional[int] = None
    sound_file: Optional[str] = None  # what the waveform was read from, whole
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def sound(self) -> Union[str, tuple[np.ndarray, int], None]:
        """What `media.VideoWriter` takes."""
        if self.waveform is None:
            return None
        return self.sound_file or (self.waveform, self.sample_rate)

    def save(self, path: Union[str, Path]) -> None:
        """Write an mp4, with the sound exactly as long as the video, or a wav."""
        if self.frames is None:
            media.write_wav(path, self.waveform, self.sample_rate, self.metadata)
            return
        with media.VideoWriter(path, self.fps, self.sound, self.metadata) as video:
            video.write(self.frames)


class Pipeline:
    """A model that loads each part when it is needed and frees it when it is done."""

    def __init__(
        self,
        source: weights.Checkpoint,
        text_encoder: Optional[str] = None,
        dtype: mx.Dtype = mx.bfloat16,
        origin: Optional[dict[str, Any]] = None,
        low_memory: Optional[bool] = None,
        cache_contexts: Union[str, Path, None] = None,
        group: Optional[parallel.Group] = None,
        share: Optional[str] = None,
    ):
        self.source, self.dtype, self.origin = source, dtype, origin or {}
        self.group, self.share, self._shared = group, share, ""
        self.rank, self.ranks = (group.rank(), group.size()) if group else (0, 1)
        self.low_memory, self._streamed = low_memory, bool(low_memory)
        self.cache_contexts = cache_contexts
        self.text_encoder = source.encoder(text_encoder)
        self._loaded: dict[str, nn.Module] = {}
        self._attached: tuple[LoraFile, ...] = ()  # LoRAs beside the transformer

    def component(self, name: str) -> nn.Module:
        """A part of the model, loaded once."""
        if name not in self._loaded:
            hub.fetch_all(self.source.files)
            if name == "transformer" and self._rereads:
                model = self._with_loras()
                if self._streamed:
                    model.transformer_blocks = StreamedBlocks(self._blocks)
            else:
                model = self.source.load(
                    name, self._text_dtype if name == "connectors" else self.dtype
                )
            self._loaded[name] = model
        return self._loaded[name]

    @property
    def _text_dtype(self) -> mx.Dtype:
        """Gemma's states do not fit into float16."""
        return mx.bfloat16 if self.dtype == mx.float16 else self.dtype

    @property
    def _rereads(self) -> bool:
        """Whether other LoRAs are for another transformer, instead of beside this one."""
        return self._streamed or self._shared == "shards"

    def _blocks(self) -> Iterator[Block]:
        """The transformer's blocks one by one, with the stage's LoRAs."""
        config = DiTConfig.from_dict(self.source.config["transformer"])
        tensors = self.source.weights("transformer", self.dtype)
        loras = [(Lora.read(f.path), f.strength) for f in self._attached]
        blocks = build_blocks(config, tensors, self.source.quantization)
        for i, block in enumerate(blocks):
            attach(block, loras, prefix=f"transformer_blocks.{i}.")
            if self._shared == "shards":
                block.shard(self.group)
            yield block

    def _with_loras(self) -> DiT:
        """The transformer with the stage's LoRAs, or this machine's part of it, of which
        nothing is read yet."""
        model = self.source.load("transformer", self.dtype, lazy=True)
        attach(model, [(Lora.read(f.path), f.strength) for f in self._attached])
        if self._shared == "shards":
            model.shard(self.group)
        return model

    def free(self, *names: str) -> None:
        """Give back the memory of these parts."""
        for name in names:
            self._loaded.pop(name, None)
            if name == "transformer":
                self._attached = ()
        mx.clear_cache()

    transformer = property(lambda self: self.component("transformer"))
    connectors = property(lambda self: self.component("connectors"))
    vae = property(lambda self: self.component("vae"))
    audio_vae = property(lambda self: self.component("audio_vae"))
    vocoder = property(lambda self: self.component("vocoder"))

    def plan(self, request: Request) -> Job:
        """What a request comes to with this model, its files included; UserError if it
        cannot be done. No weights are read."""
        job = plan(request, self.source)
        files = {lora.path for stage in job.stages for lora in stage.loras}
        if files:
            model = self.source.load("transformer", self.dtype, lazy=True)
            for path in files:
                Lora.read(path).check(model)
        return job

    def beginning(self, job: Job) -> Snapshot:
        """A job before its first step."""
        load = self.origin | {"text_encoder": self.text_encoder}
        return Snapshot(job.request, stages_of(job), load, self.files())

    def files(self) -> dict[str, str]:
        """The weights' files with their fingerprints."""
        return {f.name: f.fingerprint for f in self.source.files if f.role and f.path}

    def _encoder_files(self) -> list[hub.File]:
        """The text encoder's weights, if they are not among the model's own."""
        packed = self.source.version >= weights.GEMMA_4
        files = [] if packed else weights.text_encoder_files(self.text_encoder)
        return [f for f in files if f.name.endswith(".safetensors")]

    def memory(self, *jobs: Job, text: bool = True) -> memory.Plan:
        """What jobs that are done together will hold, by phase, and whether that fits;
        without `text`, contexts are at hand."""
        encoder = self._encoder_files() if text and self.rank == 0 else []
        predictor = memory.Predictor(self.source, self.dtype, encoder)
        found, shared = predictor.plan(jobs, self.low_memory), ""
        if self.ranks > 1:
            shared = self._share(jobs, found.fits and not found.streamed)
        if shared == "shards":
            predictor = memory.Predictor(self.source, self.dtype, encoder, self.ranks)
            found = predictor.plan(jobs, self.low_memory)
        found = dataclasses.replace(found, shared=shared)
        if not found.fits:
            instead = predictor.what_fits(jobs[0], self.plan, self.low_memory)
            found = dataclasses.replace(found, instead=instead)
        return found

    def _share(self, jobs: Sequence[Job], fits: bool) -> str:
        """How the machines share these jobs; UserError if they cannot."""
        stages = (stage for job in jobs for stage in job.stages)
        passes = max(len(pass_kinds(stage.guidance)) for stage in stages)
        c = DiTConfig.from_dict(self.source.config["transformer"])
        heads = [
            (c.num_attention_heads, c.video_dim),
            (c.audio_num_attention_heads, c.audio_dim),
        ]
        unit = (self.source.quantization or {}).get("group_size", 1)
        work = len(jobs), passes, fits
        return parallel.choose(self.group, self.share, *work, heads, unit)

    def describe(self, job: Job) -> str:
        """The model, the size and the stages of a job, for people."""
        source = self.source
        assumed = ", assumed: no name tells" if source.kind_assumed else ""
        lines = [
            f"LTX-2 {source.model_version} ({source.kind}{assumed}), "
            f"seed {job.request.seed}"
        ]
        most = "up to " if job.request.auto_duration else ""
        for stage in job.stages:
            guided = "guided" if stage.guidance else "not guided"
            lines.append(
                f"{stage.name}: {stage.width}x{stage.height}, "
                f"{most}{stage.num_frames} frames at {stage.fps:g}, "
                f"{len(stage.sigmas) - 1} steps of {stage.sampler}, {guided}"
            )
        return "\n".join(lines)

    def _contexts(
        self, prompts: Sequence[str], trace: Optional[Trace]
    ) -> dict[str, Contexts]:
        """Contexts by prompt, from the folder that keeps them, if there is one."""
        encode = lambda prompts: self.encode_prompts(prompts, trace)
        if self.cache_contexts is None or trace is not None:
            return encode(prompts)
        encoder = {f.name: f.fingerprint for f in self._encoder_files()}
        made_by = [self.files(), encoder, str(self.dtype)]
        return ContextCache(self.cache_contexts, made_by)(prompts, encode)

    def encode_prompts(
        self, prompts: Sequence[str], trace: Optional[Trace] = None
    ) -> dict[str, Contexts]:
        """Contexts (video, audio), each (1, 1024, D), by prompt; frees all it loaded."""
        if self.source.version >= weights.GEMMA_4:
            gemma = self.source.load("gemma", self._text_dtype, lazy=True)
            encoder = Gemma4TextEncoder(gemma, low_memory=True)
            del gemma
        else:
            folder = weights.fetch_text_encoder(self.text_encoder)
            encoder = TextEncoder(folder, self._text_dtype, low_memory=True)
            reads = self.source.load("connectors", lazy=True).config
            if encoder.width != reads.caption_channels * reads.encoder_states:
                raise UserError(
                    f"text encoder {self.text_encoder} has another size than this model "
                    "was trained with: LTX-2 reads Gemma 3 12B"
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

    def enhance(self, prompt: str, seed: int) -> str:
        """The prompt rewritten at more length by the text encoder's own Gemma."""
        if self.source.version >= weights.GEMMA_4:
            raise UserError("the text encoder of LTX-2.5 cannot write: drop enhance")
        folder = self.text_encoder
        longer = self._first(
            lambda: enhance(weights.fetch_text_encoder(folder), prompt, seed)
        )
        mx.clear_cache()
        if not longer:
            raise UserError(f"the text encoder made nothing of {prompt!r}")
        return longer

    def preview(self) -> Preview:
        """A quick map from this model's latents to pictures."""
        if "decoder" not in self.vae:
            raise UserError("previews are fitted on the conv video decoder, not here")
        preview = Preview(self.vae)
        self.free("vae")
        return preview

    def encode_prompt(self, prompt: str) -> Contexts:
        """Contexts (video, audio) of one prompt, each (1, 1024, D)."""
        return self.encode_prompts([prompt])[prompt]

    def generate(
        self,
        prompt: str,
        *,
        noise: Optional[Noise] = None,
        trace: Optional[Trace] = None,
        contexts: Optional[dict[str, Contexts]] = None,
        **options: Any,
    ) -> Result:
        """Make one video; `options` are `Request`'s fields, the rest is `stream`'s."""
        frames = []
        request = Request(prompt, **options)
        for event in self.stream(request, noise=noise, trace=trace, contexts=contexts):
            if isinstance(event, Result):
                event.frames = np.concatenate(frames) if frames else None
                return event
            if event.frames is not None:
                frames.append(event.frames)

    def stream(
        self,
        *requests: Request,
        noise: Optional[Noise] = None,
        trace: Optional[Trace] = None,
        contexts: Optional[dict[str, Contexts]] = None,
        resume: Optional[Snapshot] = None,
        frozen_from_noise: bool = False,
    ) -> Iterator[Union[Event, Result]]:
        """Make videos: an Event after each phase and step, a Result after each video.

        All prompts are encoded, then all inputs, then all videos denoised, then decoded,
        so that no two big models are held together. `noise(name, shape)` is the only
        randomness, by default seeded normals; it is asked, in this order, for
        "stage1.video", "stage1.audio" (tokens (1, T, C), appended ones included), a
        sampler's own "<stage>.<stream>.step<i>" and ".substep<i>", the next stage's, and
        "vae" ((1, F, H, W, C), timestep-conditioned decoders only) or "vae.frame<i>"
        ((1, 1, H, W, 3), the diffusion decoder). `contexts` by prompt replace the text
        encoder; `resume` goes on where a run was left, with no or the same request.
        `frozen_from_noise` starts the kept stream of a retake from noise, as the
        reference does. Raises UserError before any weights are read.
        """
        requests = requests or (resume.request,)
        jobs = [self.plan(request) for request in requests]
        if resume is not None and resume.stage == len(jobs[0].stages):
            contexts = {}  # only to be decoded
        needed = self.memory(*jobs, text=contexts is None)
        needed.check()
        hub.fetch_all(self.source.files)
        if resume is not None:
            resume.check(jobs[0], self.files())
        memory.set_limits(needed)
        self._streamed, self._shared = needed.streamed, needed.shared
        given = noise and (lambda *asked: mx.array(noise(*asked)).astype(mx.float32))
        draws = [given or seeded_noise(job.request.seed) for job in jobs]
        meter = Meter()
        if contexts is None:
            asked = [
                p for job in jobs for p in (job.request.prompt, job.negative_prompt)
            ]
            yield Event("text")
            with meter.phase("text"):
                prompts = [p for p in dict.fromkeys(asked) if p is not None]
                contexts = self._first(lambda: self._contexts(prompts, trace))
        jobs = [self._fit_duration(job, contexts) for job in jobs]
        starts, mine = {}, range(len(jobs))
        if self._shared == "many":
            mine = mine[self.rank :: self.ranks]
        for n, job in ((n, jobs[n]) for n in mine):
            if inputs.wanted(job):
                yield Event("inputs", job=n)
            with meter.phase("inputs"):
                behind = 0 if resume is None else resume.stage
                of_stages = [
                    inputs.encode(job, stage, self.component) if i >= behind else {}
                    for i, stage in enumerate(job.stages)
                ]
                mx.eval([start.arrays for s in of_stages for start in s.values()])
            starts[n] = of_stages
        self.free("vae", "audio_vae")
        finished = {}
        for n, job in ((n, jobs[n]) for n in mine):
            run = self._denoise(
                job,
                starts[n],
                contexts,
                draws[n],
                trace,
                meter,
                resume,
                frozen_from_noise,
            )
            for event in run:
                yield dataclasses.replace(event, job=n)
                last = event.snapshot
            finished[n] = last
        self.free(*(n for n in self._loaded if n == "transformer" or "upsampler" in n))
        if self._shared == "many":
            for n in range(len(jobs)):
                root = n % self.ranks
                finished[n] = parallel.told(self.group, finished.get(n), root)
        for n, job in enumerate(jobs if self.rank == 0 else ()):
            yield from self._decode(n, job, finished[n], draws[n], trace, meter)
        self.free("vae", "diffusion_decoder", "audio_vae", "vocoder")

    def _first(self, make: Callable[[], T]) -> T:
        """What the first machine makes, on all of them."""
        made = make() if self.rank == 0 else None
        return parallel.told(self.group, made) if self.ranks > 1 else made

    def _fit_duration(self, job: Job, contexts: dict[str, Contexts]) -> Job:
        """The job as long as its prompt asks for, if that is left to it."""
        r = job.request
        if r.auto_duration is None:
            return job
        head = self.source.load("duration_head", mx.float32)
        seconds = self._first(lambda: head(*contexts[r.prompt]).item())
        frames = min(whole_frames(seconds, r.fps, *r.auto_duration), r.num_frames)
        warnings.warn(
            f"{frames} frames, {frames / r.fps:.1f} s: the prompt asks for "
            f"{seconds:.1f} s (--num-frames or --auto-duration set it)"
        )
        return self.plan(dataclasses.replace(r, num_frames=frames, auto_duration=None))

    def _denoise(
        self, job: Job, starts, contexts, noise, trace, meter, resume, frozen_from_noise
    ) -> Iterator[Event]:
        """The stages of one video; the last event's snapshot holds the latents."""
        r, negative = job.request, job.negative_prompt
        at = resume or self.beginning(job)
        latents, kept = at.latents, at.kept
        for n, stage in enumerate(job.stages[at.stage :], at.stage):
            total, first = len(stage.sigmas) - 1, at.step if n == at.stage else 0
            skips = any(g.skip_step for g in stage.guidance.values())
            yield Event(stage.name, 0, total)
            mark = within(trace, stage.name)
            with meter.phase(stage.name):
                self._attach(stage.loras)
                given = self._upsampled(stage, latents)
                states = self._states(job, stage, starts[n], given)
                draw = lambda k, shape: noise(f"{stage.name}.{k}", shape)
                x = (
                    dict(at.tokens)
                    if first
                    else {
                        k: s.noised(draw(k, s.latent.shape), stage.noise_scale)
                        for k, s in states.items()
                    }
                )
                if frozen_from_noise and r.retake is not None:
                    x |= {k: draw(k, x[k].shape) for k, s in states.items() if s.frozen}
                transformer = self.transformer
                if self._shared == "passes":
                    transformer = parallel.PassParallel(transformer, self.group)
                denoise = Denoiser(
                    transformer,
                    states,
                    contexts[r.prompt],
                    None if negative is None else contexts[negative],
                    stage.guidance,
                    mark,
                    stage.guidance_interval,
                    stage.step_cache,
                )
                if first:
                    denoise.last = dict(at.guided)
                blend = lambda k, v: states[k].blend(v)
                sample = SAMPLERS[stage.sampler]
                steps = sample(denoise, x, stage.sigmas, blend, draw, first)
                for i, (x, x0) in enumerate(steps, first + 1):
                    mx.eval(x, x0)
                    now = dataclasses.replace(
                        at,
                        stage=n,
                        step=i,
                        tokens=x,
                        guided=denoise.last if skips else {},
                        latents=latents,
                        kept=kept,
                    )
                    seen = self._latents(stage, states, x0)
                    yield Event(stage.name, min(i, total), total, 0, now, seen)
            for k, v in x.items():
                traced(mark, k, v)
                check_latents(f"{stage.name}, {k}", v)
            latents = self._latents(stage, states, x)
            if stage.tile:
                latents = stage.tile.stitch(given, latents)
            if stage.keeps_audio and "audio" in latents:
                kept = {"audio": latents["audio"]}
        latents = {k: x for k, x in (latents | kept).items() if k in job.streams}
        if "video" in latents:
            latents["video"] = latents["video"][:, : latent_frames(job.num_frames)]
        done = dataclasses.replace(
            at,
            stage=len(job.stages),
            step=0,
            tokens={},
            guided={},
            latents=latents,
        )
        yield Event("latents", snapshot=done)

    def _upsampled(self, stage: Stage, latents: Streams) -> Streams:
        """The last stage's latents at the size of this one."""
        if stage.upsampler is None:
            return latents
        # Keyframes are single frames, which no round doubles.
        stills = stage.keyframes and not stage.tile
        names = ("video", "keyframes")[: 2 if stills else 1]
        grown = {k: self._upsample(stage.upsampler, latents[k]) for k in names}
        smaller = {"smaller": latents["video"]} if stage.details else {}
        return latents | grown | smaller

    def _states(self, job, stage, starts, latents: Streams) -> dict[str, LatentState]:
        """The streams at a stage's start: empty, given, or the last stage's."""
        config, states = self.transformer.config, {}
        for name, start in starts.items():
            initial, items = latents.get(name, start.initial), start.items
            if name == "video":
                initial = stage.tile.cut(initial) if stage.tile else initial
                items = items + inputs.carried(stage, latents)
                bounds = video_bounds(*stage.latent_size, stage.fps)
                channels, flat = config.in_channels, video_tokens
            else:
                bounds = audio_bounds(job.audio_tokens)
                channels, flat = config.audio_in_channels, audio_to_tokens
            initial = None if initial is None else flat(initial)
            state = LatentState.start(bounds, channels, initial)
            states[name] = condition(state, items)
        return states

    def _latents(self, stage: Stage, states, tokens: Streams) -> Streams:
        """Tokens as latents, without those that only guide."""
        shaped = {k: v[:, : states[k].size] for k, v in tokens.items()}
        if "video" in shaped:
            shaped["video"] = shaped["video"].reshape(1, *stage.latent_size, -1)
        if stage.keyframes:
            size, channels = states["video"].size, tokens["video"].shape[-1]
            slots = np.flatnonzero(states["video"].keyframes[size:]) + size
            made = tokens["video"][:, mx.array(slots)]
            shaped["keyframes"] = made.reshape(1, -1, *stage.latent_size[1:], channels)
        if "audio" in shaped:
            config = AudioVAEConfig.from_dict(self.source.config["audio_vae"])
            shaped["audio"] = audio_from_tokens(shaped["audio"], config.z_channels)
        return shaped

    def _upsample(self, name: str, latents: mx.array) -> mx.array:
        """Bigger normalised latents, by a latent upsampler."""
        vae = self.source.load("vae", mx.float32, lazy=True)  # for its statistics
        latents = vae.normalize(self.component(name)(vae.denormalize(latents)))
        mx.eval(latents)
        return latents

    def _attach(self, files: tuple[LoraFile, ...]) -> None:
        """Put a stage's LoRAs beside the transformer, instead of the last stage's."""
        if files != self._attached and self._rereads:
            self.free("transformer")
        elif files != self._attached:
            tensors = self.source.weights("transformer", self.dtype)
            read = lambda keys: {k: mx.contiguous(tensors[k]) for k in keys}
            loras = [(Lora.read(f.path), f.strength) for f in files]
            attach(self.transformer, loras, read)
        self._attached = files
        weights.evaluate(w for _, w in tree_flatten(self.transformer.parameters()))

    def _decode(self, n, job: Job, snapshot, noise, trace, meter):
        """Sound, then frames as they come, then the result."""
        r, latents = job.request, snapshot.latents
        result = Result(r, job.fps, phases=meter.phases)
        if "audio" in latents:
            result.audio_latents = latents["audio"][0]
            yield Event("audio", job=n)
            with meter.phase("audio"):
                if r.audio:  # as it was given
                    seconds = job.num_frames / job.fps
                    sound = media.read_audio(r.audio, r.audio_start, seconds)
                    result.waveform, result.sample_rate = sound
                    result.sound_file = None if r.audio_start else r.audio
                else:
                    mel = self.audio_vae.decode(latents["audio"])
                    traced(trace, "audio.mel", mel)
                    waveform = traced(trace, "audio.waveform", self.vocoder(mel))
                    result.waveform = np.array(waveform[0])
                    result.sample_rate = self.vocoder.sample_rate
                    check_waveform(result.waveform)
        if "video" in latents:
            result.video_latents = latents["video"][0]
            yield Event("video", 0, job.num_frames, n)
            guard = FrameGuard()
            with meter.phase("video"):
                mark = within(trace, "video")
                decode = (
                    self._diffuse if "diff" in job.video_decoder else self._convolve
                )
                for frames in decode(latents["video"], noise, mark):
                    guard.see(frames[0])
                    pixels = np.array(mx.round(frames[0] * 255).astype(mx.uint8))
                    yield Event("video", guard.frames, job.num_frames, n, frames=pixels)
            guard.judge()
        result.metadata = self._provenance(job, meter)
        yield result

    def _convolve(self, latents: mx.array, noise: Noise, trace) -> Iterator[mx.array]:
        conditioned = self.vae.config.timestep_conditioning
        drawn = noise("vae", latents.shape) if conditioned else None
        return self.vae.decode_stream(latents, noise=drawn, trace=trace)

    def _diffuse(self, latents: mx.array, noise: Noise, trace) -> Iterator[mx.array]:
        draw = lambda i, shape: noise(f"vae.frame{i}", shape)
        return self.component("diffusion_decoder").decode_stream(latents, draw, trace)

    def _provenance(self, job: Job, meter: Meter) -> dict[str, Any]:
        """How a result was made: enough to make it again."""
        source = self.source
        return {
            "request": dataclasses.asdict(job.request),
            "negative_prompt": job.negative_prompt,
            "model": {
                "version": source.model_version,
                "kind": source.kind,
                "quantization": source.quantization,
                "files": self.files(),
            },
            "load": self.origin | {"text_encoder": self.text_encoder},
            "versions": {
                "ltx2": __version__,
                "mlx": mx.__version__,
                "platform": platform.platform(),
            },
            "seconds": {k: round(s, 2) for k, (s, _) in meter.phases.items()},
        }


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
        self.phases[name] = (
            seconds + time.perf_counter() - start,
            max(peak, mx.get_peak_memory()),
        )


def load(
    model: str,
    text_encoder: Optional[str] = None,
    kind: Optional[str] = None,
    dtype: Union[mx.Dtype, str, None] = None,
    upsamplers: Sequence[str] = (),
    low_memory: Optional[bool] = None,
    cache_contexts: Union[str, Path, None] = None,
    group: Optional[parallel.Group] = None,
    share: Optional[str] = None,
) -> Pipeline:
    """A pipeline from an official file, a folder, a converted folder or a Hub repo.

    `kind` ("dev" or "distilled") overrides what the file name says, `upsamplers` those
    beside the model, `dtype` (bfloat16) is of the text side and the transformer. Weights
    are read when a phase needs them; with `low_memory` (None: if there is too little for
    all of them) the transformer's block by block in every step, which changes no bit of
    the result. `cache_contexts` is a folder where contexts are kept for the next time.
    A `group` of machines, all of which run this, share the work in one of parallel.WAYS.
    Raises UserError when files do not fit together.
    """
    name = str(dtype or "bfloat16").removeprefix("mlx.core.")
    source = weights.open_model(model, kind, upsamplers=upsamplers, fetch=False)
    origin = {"model": str(model), "kind": source.kind, "dtype": name}
    origin["upsamplers"] = [str(path) for path in upsamplers]
    dtype = getattr(mx, name)
    how = low_memory, cache_contexts, group, share
    return Pipeline(source, text_encoder, dtype, origin, *how)
