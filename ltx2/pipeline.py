"""The one generator: encode the prompt, denoise stage by stage, decode."""

from __future__ import annotations

import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence, Union

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import media, weights
from .audio_vae import AudioVAEConfig, log_mel
from .base import Trace, UserError, traced
from .dit import EVERYWHERE, NOWHERE, DiT, Pass, Tokens
from .guards import FrameGuard, check_latents, check_waveform
from .latents import (
    AUDIO_TOKENS_PER_SECOND,
    MEL_FRAMES_PER_TOKEN,
    MEL_HOP,
    MEL_RATE,
    TIME_SCALE,
    Conditioning,
    Freeze,
    Keyframe,
    LatentState,
    Reference,
    Regenerate,
    Replace,
    audio_bounds,
    audio_from_tokens,
    audio_to_tokens,
    condition,
    latent_frames,
    video_bounds,
    video_tokens,
)
from .lora import Lora, attach
from .request import Job, LoraFile, Request, Stage, frozen_streams, plan
from .sampling import SAMPLERS, Guidance, Noise, Streams
from .text import MAX_TOKENS, TextEncoder

Contexts = tuple[mx.array, mx.array]  # of video and audio, each (1, 1024, D)


def seeded_noise(seed: int) -> Noise:
    """Normals that depend on the seed and the name only, the same on every machine."""

    def noise(name: str, shape: tuple[int, ...]) -> mx.array:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return mx.array(rng.standard_normal(shape, np.float32))

    return noise


@dataclass(frozen=True)
class Event:
    """What happens: a phase begins, a step is done, sound or frames are there."""

    phase: str
    step: int = 0
    steps: int = 0
    job: int = 0
    latents: Optional[Streams] = None  # tokens after a denoising step
    denoised: Optional[Streams] = None  # its estimate of the end
    waveform: Optional[np.ndarray] = None
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


@dataclass
class Start:
    """Where a stream starts: initial latents, if there are any, and conditionings."""

    initial: Optional[mx.array] = None
    items: list[Conditioning] = field(default_factory=list)

    @property
    def arrays(self) -> list[mx.array]:
        items = [vars(item) for item in self.items]
        return [self.initial, *(v for i in items for v in i.values())]


class Denoiser:
    """x0 of both streams at a sigma: the model's passes, guidance, and what is held."""

    def __init__(
        self,
        transformer: DiT,
        states: dict[str, LatentState],
        contexts: Contexts,
        negative: Optional[Contexts],
        guidance: Mapping[str, Guidance],
        trace: Optional[Trace] = None,
    ):
        self.transformer, self.states, self.trace = transformer, states, trace
        self.guidance = {k: guidance.get(k, Guidance()) for k in states}
        ropes = {"video": transformer.video_rope, "audio": transformer.audio_rope}
        self.ropes = {k: ropes[k](s.bounds) for k, s in states.items()}
        self.passes = self._passes(contexts, negative)
        self.last: Streams = {}  # guided x0, for skipped steps

    def _passes(self, contexts: Contexts, negative: Optional[Contexts]) -> dict:
        video, audio = (self.guidance.get(k, Guidance()) for k in ("video", "audio"))
        every = (video, audio)
        passes = {"cond": Pass(*contexts)}
        if any(g.cfg_scale != 1 for g in every):
            pick = zip(every, contexts, negative)
            passes["uncond"] = Pass(*(n if g.cfg_scale != 1 else c for g, c, n in pick))
        if any(g.stg_scale != 0 for g in every):
            cuts = (
                (
                    (EVERYWHERE if g.stg_blocks is None else frozenset(g.stg_blocks))
                    if g.stg_scale != 0
                    else NOWHERE
                )
                for g in every
            )
            passes["perturbed"] = Pass(*contexts, *cuts)
        if any(g.modality_scale != 1 for g in every):
            passes["isolated"] = Pass(*contexts, cut_a2v=EVERYWHERE, cut_v2a=EVERYWHERE)
        return passes

    def _tokens(self, name: str, x: mx.array, sigma: float, skipped: bool) -> Tokens:
        state = self.states[name]
        levels, level_of = state.levels
        rope, cross_rope = self.ropes[name]
        return Tokens(
            x,
            mx.array(levels * np.float32(sigma)),
            mx.array([0.0 if state.frozen else sigma]),
            rope,
            cross_rope,
            level_of,
            None if state.attention is None else mx.array(state.attention),
            mx.array(state.keyframes),
            enabled=not skipped,
        )

    def __call__(self, x: Streams, sigma: float, step: int) -> Streams:
        skipped = {k: g.skips(step) for k, g in self.guidance.items()}
        if not all(skipped.values()):
            tokens = {k: self._tokens(k, x[k], sigma, skipped[k]) for k in x}
            trace = self.trace and (lambda k, v: self.trace(f"step{step}.{k}", v))
            velocities = self.transformer(
                tokens.get("video"),
                tokens.get("audio"),
                list(self.passes.values()),
                trace,
            )
            for i, name in enumerate(("video", "audio")):
                if name not in x or skipped[name]:
                    continue
                reach = self.states[name].mask_tokens * sigma
                x0 = {
                    kind: x[name] - v[i].astype(mx.float32) * reach
                    for kind, v in zip(self.passes, velocities)
                }
                self.last[name] = self.guidance[name](**x0)
        return {k: self.states[k].blend(self.last[k]) for k in x}


class Pipeline:
    """A model that loads each part when it is needed and frees it when it is done."""

    def __init__(
        self,
        source: weights.Source,
        text_encoder: Optional[str] = None,
        dtype: mx.Dtype = mx.bfloat16,
    ):
        self.source, self.dtype = source, dtype
        self.text_encoder = text_encoder or source.text_encoder
        self._loaded: dict[str, nn.Module] = {}
        self._attached: tuple[LoraFile, ...] = ()  # LoRAs beside the transformer

    def plan(self, request: Request) -> Job:
        """What a request comes to with this model; raises UserError if it cannot."""
        return plan(request, self.source)

    def describe(self, job: Job) -> str:
        """The model, the size and the stages of a job, for people."""
        source, r = self.source, job.request
        assumed = ", assumed: no name tells" if source.kind_assumed else ""
        lines = [
            f"LTX-2 {source.model_version} ({source.kind}{assumed}), seed {r.seed}"
        ]
        for stage in job.stages:
            lines.append(
                f"{stage.name}: {stage.width}x{stage.height}, {stage.num_frames} frames "
                f"at {stage.fps:g}, {len(stage.sigmas) - 1} steps of {stage.sampler}, "
                f"{'guided' if stage.guidance else 'not guided'}"
            )
        return "\n".join(lines)

    def component(self, name: str) -> nn.Module:
        """A part of the model, loaded once."""
        if name not in self._loaded:
            self._loaded[name] = self.source.load(name, dtype=self.dtype)
        return self._loaded[name]

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

    def encode_prompts(
        self, prompts: list[str], trace: Optional[Trace] = None
    ) -> dict[str, Contexts]:
        """Contexts (video, audio), each (1, 1024, D), by prompt; frees all it loaded."""
        folder = weights.fetch_text_encoder(self.text_encoder)
        encoder = TextEncoder(folder, self.dtype)
        states = encoder(prompts, trace)
        mx.eval(states)
        del encoder
        self.free()
        contexts = {
            prompt: self.connectors(s, MAX_TOKENS, trace)
            for prompt, s in zip(prompts, states)
        }
        mx.eval(contexts)
        self.free("connectors")
        return contexts

    def encode_prompt(self, prompt: str) -> Contexts:
        """Contexts (video, audio) of one prompt, each (1, 1024, D)."""
        return self.encode_prompts([prompt])[prompt]

    def stream(
        self,
        *requests: Request,
        noise: Optional[Noise] = None,
        trace: Optional[Trace] = None,
        contexts: Optional[dict[str, Contexts]] = None,
    ) -> Iterator[Union[Event, Result]]:
        """Make videos: an Event after each phase and step, a Result after each video.

        All prompts are encoded, then all inputs, then all videos denoised, then decoded,
        so that no two big models are held together. `noise(name, shape)` is the only
        randomness, by default seeded normals; it is asked, in this order, for
        "stage1.video", "stage1.audio" (tokens (1, T, C), appended ones included), a
        sampler's own "<stage>.<stream>.step<i>" and ".substep<i>", the next stage's, and
        "vae" ((1, F, H, W, C), timestep-conditioned decoders only). `contexts` by prompt
        replace the text encoder. Raises UserError before any weights are read.
        """
        jobs = [plan(request, self.source) for request in requests]
        for job in jobs:
            self._check_loras(job)
        draws = [noise or seeded_noise(job.request.seed) for job in jobs]
        prompts = [p for job in jobs for p in (job.request.prompt, job.negative_prompt)]
        prompts = [p for p in dict.fromkeys(prompts) if p is not None]
        meter = Meter()
        if contexts is None:
            yield Event("text")
            with meter.phase("text"):
                contexts = self.encode_prompts(prompts, trace)
        inputs = []
        for n, job in enumerate(jobs):
            yield Event("inputs", job=n)
            with meter.phase("inputs"):
                inputs.append([self._inputs(job, stage) for stage in job.stages])
                mx.eval(
                    [start.arrays for starts in inputs[-1] for start in starts.values()]
                )
        self.free("vae", "audio_vae")
        finished = []
        for n, (job, starts, draw) in enumerate(zip(jobs, inputs, draws)):
            run = self._denoise(n, job, starts, contexts, draw, trace, meter)
            finished.append((yield from run))
        self.free(
            "transformer", *(name for name in self._loaded if "upsampler" in name)
        )
        for n, (job, latents, draw) in enumerate(zip(jobs, finished, draws)):
            yield from self._decode(n, job, latents, draw, trace, meter)
        self.free("vae", "audio_vae", "vocoder")

    # Inputs: what a stage starts from and is conditioned on

    def _inputs(self, job: Job, stage: Stage) -> dict[str, Start]:
        """Where each stream of a stage starts: initial latents and conditionings."""
        r = job.request
        starts = {name: Start() for name in job.streams}
        video, audio = starts.get("video"), starts.get("audio")
        for image in job.images:
            pixels = media.recompress(media.load_image(image.path), job.image_crf)
            pixels = media.resize_and_crop(pixels[None], stage.height, stage.width)
            latents = self.vae.encode(mx.array(pixels)[None])
            video.items.append(
                Keyframe(latents, image.frame, stage.fps, image.strength)
                if image.frame or r.keyframes
                else Replace(latents, 0, image.strength)
            )
        if r.audio:
            seconds = job.audio_tokens / AUDIO_TOKENS_PER_SECOND + 1
            audio.initial = self._encode_audio(
                r.audio, r.audio_start, seconds, job.audio_tokens
            )
            audio.items.append(Freeze())
        if job.clip is None:
            return starts
        if not (r.retake or r.extend):
            if stage.references and video:
                video.items.append(self._reference(job, stage))
            return starts
        clip = self._encode_clip(job, stage.height, stage.width)
        held = latent_frames(job.clip_frames)
        if audio and job.clip.has_audio:
            seconds = job.clip_frames / stage.fps
            tokens = min(round(seconds * AUDIO_TOKENS_PER_SECOND), job.audio_tokens)
            sound = self._encode_audio(r.video, 0.0, seconds, tokens)
        if r.extend:
            # Before the clip its first latent, one frame long, would be eight: drop it.
            before = stage.latent_size[0] - held if r.extend < 0 else 0
            skip = 1 if before else 0
            video.items.append(Replace(clip[:, skip:], before + skip))
            if audio and job.clip.has_audio:
                at = job.audio_tokens - tokens if before else 0
                audio.items.append(Replace(sound[:, skip:], at + skip))
            return starts
        for name, start, latents in (
            ("video", video, clip),
            ("audio", audio, sound if audio and job.clip.has_audio else None),
        ):
            if start and latents is not None:
                again = name in r.retake_streams
                start.initial = latents
                start.items.append(Regenerate(*r.retake) if again else Freeze())
        return starts

    def _encode_clip(
        self, job: Job, height: int, width: int, frames: Optional[int] = None
    ) -> mx.array:
        """The input video as latents (1, f, h, w, C), streamed through the encoder."""
        count, fps = frames or job.clip_frames, job.stages[0].fps
        pixels = media.read_video(job.request.video, 0, count, fps)
        chunks = (
            mx.array(media.resize_and_crop(frame[None], height, width))[None]
            for frame in pixels
        )
        return mx.concatenate(list(self.vae.encode_stream(chunks)), axis=1)

    def _reference(self, job: Job, stage: Stage) -> Reference:
        """The input video as an IC-LoRA's reference, scaled as the LoRA's metadata say."""
        said = {}
        for lora in stage.loras:
            said |= Lora.read(lora.path).metadata
        down = int(said.get("reference_downscale_factor", 1))
        slow = int(said.get("reference_temporal_scale_factor", 1))
        latents = self._encode_clip(job, stage.height // down, stage.width // down)
        strength = job.request.reference_strength
        return Reference(latents, stage.fps, 1.0, down, slow, strength)

    def _encode_audio(
        self, path: str, start: float, seconds: float, tokens: int
    ) -> mx.array:
        """A window of sound as latents (1, tokens, mel, C): mono is doubled, and what is
        missing at the end is silence."""
        sound, rate = media.read_audio(path, start, seconds)
        sound = media.resample(sound[:, :2], rate, MEL_RATE)
        if sound.shape[1] == 1:
            sound = np.repeat(sound, 2, axis=1)
        if len(sound) // MEL_HOP < (tokens - 1) * MEL_FRAMES_PER_TOKEN:
            whole = tokens * MEL_FRAMES_PER_TOKEN * MEL_HOP
            sound = np.pad(sound, ((0, whole - len(sound)), (0, 0)))
        return self.audio_vae.encode(log_mel(mx.array(sound)[None]))[:, :tokens]

    # Denoising

    def _denoise(self, n, job: Job, starts, contexts, noise, trace, meter):
        """Latents by stream, after all stages."""
        negative = job.negative_prompt
        latents: Streams = {}
        kept: Streams = {}
        for stage, start in zip(job.stages, starts):
            total = len(stage.sigmas) - 1
            yield Event(stage.name, 0, total, n)
            mark = trace and (lambda k, v: trace(f"{stage.name}.{k}", v))
            with meter.phase(stage.name):
                self._attach(stage.loras)
                states = self._states(job, stage, start, latents)
                draw = lambda k, shape: noise(f"{stage.name}.{k}", shape)
                x = {
                    k: s.noised(draw(k, s.latent.shape), stage.noise_scale)
                    for k, s in states.items()
                }
                denoise = Denoiser(
                    self.transformer,
                    states,
                    contexts[job.request.prompt],
                    None if negative is None else contexts[negative],
                    stage.guidance,
                    mark,
                )
                blend = lambda k, v: states[k].blend(v)
                sample = SAMPLERS[stage.sampler](denoise, x, stage.sigmas, blend, draw)
                for i, (x, x0) in enumerate(sample, 1):
                    mx.eval(x, x0)
                    yield Event(stage.name, min(i, total), total, n, x, x0)
            for k, v in x.items():
                traced(mark, k, v)
                check_latents(f"{stage.name}, {k}", v)
                v = v[:, : states[k].size]
                latents[k] = (
                    v.reshape(1, *stage.latent_size, -1)
                    if k == "video"
                    else audio_from_tokens(v, self._audio_channels())
                )
            if stage.keeps_audio and "audio" in latents:
                kept["audio"] = latents["audio"]
        return latents | kept

    def _audio_channels(self) -> int:
        return AudioVAEConfig.from_dict(self.source.config["audio_vae"]).z_channels

    def _states(self, job, stage, starts, latents: Streams) -> dict[str, LatentState]:
        """The streams at a stage's start: empty, given, or the last stage's."""
        config = self.transformer.config
        states = {}
        for name, start in starts.items():
            initial = latents.get(name, start.initial)
            if name == "video":
                if stage.upsampler:
                    initial = self._upsample(stage.upsampler, initial)
                bounds = video_bounds(*stage.latent_size, stage.fps)
                channels, flat = config.in_channels, video_tokens
            else:
                bounds = audio_bounds(job.audio_tokens)
                channels, flat = config.audio_in_channels, audio_to_tokens
            initial = None if initial is None else flat(initial)
            state = LatentState.start(bounds, channels, initial)
            states[name] = condition(state, start.items)
        return states

    def _upsample(self, name: str, latents: mx.array) -> mx.array:
        """Bigger normalised latents, by a latent upsampler."""
        up = self.component(name)
        vae = self.source.load("vae", mx.float32, lazy=True)  # for its statistics
        latents = vae.normalize(up(vae.denormalize(latents)))
        mx.eval(latents)
        return latents

    def _check_loras(self, job: Job) -> None:
        files = {lora.path for stage in job.stages for lora in stage.loras}
        if files:
            model = self.source.load("transformer", self.dtype, lazy=True)
            for path in files:
                Lora.read(path).check(model)

    def _attach(self, files: tuple[LoraFile, ...]) -> None:
        """Put a stage's LoRAs beside the transformer, instead of the last stage's."""
        if files != self._attached:
            attach(self.transformer, [(Lora.read(f.path), f.strength) for f in files])
            self._attached = files

    # Decoding

    def _decode(self, n, job: Job, latents: Streams, noise, trace, meter):
        """Sound, then frames as they come, then the result."""
        r, last = job.request, job.stages[-1]
        result = Result(r, last.fps, phases=meter.phases)
        if "audio" in latents:
            result.audio_latents = latents["audio"][0]
            yield Event("audio", job=n)
            with meter.phase("audio"):
                if r.audio:  # as it was given
                    seconds = last.num_frames / last.fps
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
            yield Event("video", 0, last.num_frames, n)
            guard = FrameGuard()
            with meter.phase("video"):
                shape = latents["video"].shape
                drawn = (
                    noise("vae", shape)
                    if self.vae.config.timestep_conditioning
                    else None
                )
                mark = trace and (lambda k, v: trace(f"video.{k}", v))
                for frames in self.vae.decode_stream(
                    latents["video"], noise=drawn, trace=mark
                ):
                    guard.see(frames[0])
                    pixels = np.array(mx.round(frames[0] * 255).astype(mx.uint8))
                    yield Event(
                        "video", guard.frames, last.num_frames, n, frames=pixels
                    )
            guard.judge()
        yield result

    def generate(self, prompt: str, **options: Any) -> Result:
        """Make one video: `Request`'s fields, and `stream`'s noise, trace, contexts."""
        known = {f.name for f in fields(Request)}
        request = Request(prompt, **{k: v for k, v in options.items() if k in known})
        rest = {k: v for k, v in options.items() if k not in known}
        frames = []
        for event in self.stream(request, **rest):
            if isinstance(event, Result):
                event.frames = np.concatenate(frames) if frames else None
                return event
            if event.frames is not None:
                frames.append(event.frames)


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
) -> Pipeline:
    """A pipeline from an official file, a folder, a converted folder or a Hub repo.

    `kind` ("dev" or "distilled") overrides what the file name says, `upsamplers` those
    beside the model, `dtype` (bfloat16) is of the text side and the transformer. Weights
    are read when a phase needs them. Raises UserError when files do not fit together.
    """
    dtype = getattr(mx, dtype) if isinstance(dtype, str) else dtype
    source = weights.open_model(model, kind, upsamplers=upsamplers)
    return Pipeline(source, text_encoder, dtype or mx.bfloat16)
