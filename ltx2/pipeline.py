"""The generator: encode the prompt, denoise stage by stage, decode."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence, Union

import mlx.core as mx
import numpy as np

from . import hub, memory, weights
from .base import Trace, UserError, checked, counted, dtype_name, expect
from .cache import given_contexts
from .chips import this_chip
from .components import Components
from .guidance import TextContexts, guidance_passes
from .linear import layer_formats
from .lora import check_once
from .options import check_choice
from .parallel import Group, Machines, random_seed
from .preview import Preview
from .record import Load
from .request import Request
from .run import Event, Frames, Phase, Result, Run, Step, finished, seeded_noise
from .sampling import Noise
from .snapshot import Snapshot, as_json
from .stages import Job, plan
from .text import enhance

__all__ = ["Event", "Frames", "Phase", "Result", "Step", "seeded_noise"]  # of run.py
__all__ += ["Pipeline", "load"]


Asked = Union[str, Request, Job]


class Pipeline(Components):
    """A model that makes videos: plan a request, then `generate` or `stream`."""

    def plan(self, request: Request) -> Job:
        """Plan a request with this model and its input files, and the memory it takes;
        UserError if it cannot be done. Without a seed, one is drawn."""
        request = checked(Request, request, "request")
        if request.seed is None:
            request = replace(request, seed=random_seed(self.machines.group))
        job = plan(request, self.checkpoint, self.inputs)
        self.checkpoint.check(*(set(job.components) - self._checked))
        self._checked |= set(job.components)
        files = {file.path for stage in job.stages for file in stage.loras}
        for stage in job.stages:
            check_once(self.inputs.lora_file(file.path) for file in stage.loras)
        if loras := [lora for lora in map(self.inputs.lora, files) if not lora.fits]:
            model = self.checkpoint.load("transformer", self.dtype, lazy=True)
            for lora in loras:
                lora.check(model)
        return replace(job, memory=self._estimate(job))

    @cached_property
    def _estimator(self) -> memory.Estimator:
        return memory.Estimator(self.checkpoint, self.dtype)

    def _estimate(self, job: Job, shards: int = 1) -> memory.MemoryPlan:
        inputs = job, lambda path: self.inputs.lora(path).nbytes, shards
        needs = self._estimator(*inputs)
        if job.codes != "srgb":  # encoded and decoded in float32
            exact = memory.Estimator(self.checkpoint, mx.float32)(*inputs)
            needs |= {k: exact[k] for k in ("inputs", "video") if k in exact}
        return memory.planned(needs, memory.available(), self.low_memory)

    def memory(self, *jobs: Job, text: bool = True) -> memory.MemoryPlan:
        """The memory of jobs that run together; decides how machines split the work."""
        found = memory.joined([job.memory for job in jobs], self.low_memory)
        passes = max(len(guidance_passes(s.guidance)) for j in jobs for s in j.stages)
        how = layer_formats(self.checkpoint.quantization).values()
        group_size = max((f["group_size"] for f in how), default=1)
        fits = found.fits and not found.streamed
        self.machines.split(len(jobs), passes, fits, self.dit_config, group_size)
        if self.machines.mode == "tensor":
            parts = [self._estimate(job, self.machines.count) for job in jobs]
            found = memory.joined(parts, self.low_memory)
        prompts = {prompt for job in jobs for prompt in job.texts}
        if text and prompts and self.machines.rank == 0:
            self.check_text_encoder()
            need = self._estimator.text(len(prompts), self.encoder_files)
            phases = {"text": need, **found.phases}
            found = memory.planned(phases, found.limit, self.low_memory)
        if not found.fits:
            smaller = memory.suggest_smaller(jobs[0].request, self._fits)
            found = replace(found, suggestion=smaller)
        return found

    def _fits(self, request: Request) -> bool:
        """Whether a request can be done in the memory that there is."""
        try:
            return self.plan(request).memory.fits
        except UserError:
            return False

    def initial_snapshot(self, job: Job) -> Snapshot:
        """The snapshot before a job's first step."""
        return Snapshot(job.request, as_json(job), self.origin, self.files())

    def enhance(self, prompt: str, seed: int) -> str:
        """The prompt, expanded by the text encoder's Gemma."""
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
        for step in counted((lambda: self.vae, lambda: Preview(self.vae)), "preview"):
            preview = step()
        self.free("vae")
        return preview

    # A run

    def generate(self, prompt: Optional[Asked] = None, **options: Any) -> Result:
        """Make one video; `options` are fields of `Request`, and those of `stream`."""
        names = ("noise", "trace", "contexts", "resume", "frozen_from_noise")
        of_run = {name: options.pop(name) for name in names if name in options}
        if isinstance(prompt, (Request, Job)):
            requests = [replace(prompt, **options)]
        else:
            again = of_run.get("resume") is not None and prompt is None and not options
            if prompt is None and options.keys() & {"segments", "contexts_file"}:
                prompt = ""
            requests = [] if again else [Request(prompt, **options)]
        frames = []
        for event in self.stream(*requests, **of_run):
            if isinstance(event, Frames):
                frames.append(event.frames)
        event.frames = np.concatenate(frames) if frames else None
        return event

    def stream(
        self,
        *requests: Asked,
        noise: Union[Noise, Sequence[Noise], None] = None,
        trace: Trace = None,
        contexts: Optional[TextContexts] = None,
        resume: Optional[Snapshot] = None,
        frozen_from_noise: bool = False,
    ) -> Iterator[Event]:
        """Make videos: an Event after each phase and step, a Result after each video.

        All prompts are encoded, then all inputs, then all videos denoised, then decoded,
        so that no two large models are loaded together; each of several videos is decoded
        at once if the transformer fits next to the decoders. `noise(name, shape)` is the
        only randomness, by default seeded normals; a sequence has one for each request.
        Its names are, in this order, "stage1.video", "stage1.audio" (tokens (1, T, C),
        appended ones included), a sampler's own "<stage>.<stream>.step<i>" and
        ".substep<i>", those of the next stages, and "vae" ((1, F, H, W, C),
        timestep-conditioned decoders only) or "vae.frame<i>" and "vae.keyframe<i>"
        ((1, 1, H, W, 3), the diffusion decoder), after "<stage>.plane<i>." for those of
        keyframes that dfr enlarges; all after "chunk<i>." if there are windows. No name
        comes twice in a run; several machines ask for the same ones, a resumed run for
        those of its remaining steps and the decoder's. `contexts` by prompt, of batch 1,
        replace the text encoder. `resume` continues from a snapshot; pass the same
        request or none. `frozen_from_noise` starts the kept stream of a retake from
        noise, as the reference does. Raises UserError before any weights are read.
        """
        jobs = self._jobs(requests, checked(Optional[Snapshot], resume, "resume"))
        expect(isinstance(contexts, Optional[dict]), "an object", contexts, "contexts")
        noises = noise if isinstance(noise, Sequence) else [noise] * len(jobs)
        if len(noises) != len(jobs):
            raise UserError(f"{len(noises)} noise callbacks for {len(jobs)} requests")
        if resume and resume.stage == len(jobs[0].stages):
            contexts = {}  # it is only decoded
        plan = self._prepare(jobs, contexts, resume)
        config = self.checkpoint.config["transformer"]
        for job in jobs if contexts else ():
            given = {p: contexts[p] for p in job.texts if p in contexts}
            contexts = contexts | given_contexts(given, config, job.streams)
        run = Run(self, noises, trace, frozen_from_noise, plan.streamed)
        fits = self.machines.group is None and plan.keeps_transformer
        self._keeps = self.keep and fits
        if not (self._keeps or self._adopted):  # that of an earlier run
            self.free("transformer")
        with memory.limits(plan):
            yield from self._events(run, jobs, contexts, resume, fits and len(jobs) > 1)

    def _events(self, run: Run, jobs, contexts, resume, at_once) -> Iterator[Event]:
        """What `stream` yields; each video is decoded `at_once`, or all at the end."""
        if contexts is None:
            yield Phase(phase="text", step=0, steps=0)
        if contexts != {}:  # else it is only decoded
            contexts = run.encode_text(jobs, contexts)
        jobs = [run.predict_duration(job, contexts) for job in jobs]
        conditions, done = {}, {}
        for n, job in self.machines.deal(jobs):
            if job.encoded:
                yield Phase(phase="inputs", job=n, step=0, steps=0)
            conditions[n] = run.load_conditions(job, resume)
        self.free("vae", "audio_vae")
        for n, job in self.machines.deal(jobs):
            at = resume or self.initial_snapshot(job)
            for i, stage in enumerate(job.stages[at.stage :], at.stage):
                yield Phase(phase=stage.name, job=n, step=0, steps=stage.steps)
                draw, texts = run.noise_of(n, job), run.texts(job, stage, contexts)
                at = yield from run.denoise(n, stage, at, conditions[n][i], texts, draw)
            done[n] = finished(job, at)
            yield Phase(phase="latents", job=n, step=0, steps=0, snapshot=done[n])
            if at_once:
                yield from self._decode(run, {n: job}, done)
        if not self._keeps:
            self.free("transformer")
        if not at_once:
            done = self.machines.gather(done, len(jobs))
            yield from self._decode(run, dict(enumerate(jobs)), done)
        self.inputs.clear()

    def _decode(self, run: Run, jobs: dict[int, Job], done) -> Iterator[Event]:
        """Decode jobs on the first machine."""
        run.meter.kept = self._bytes("transformer")
        for n, job in jobs.items() if self.machines.rank == 0 else ():
            yield from run.decode(n, job, done[n].latents)
        self.free("vae", "diffusion_decoder", "audio_vae", "vocoder")
        run.meter.kept = 0

    def _jobs(self, requests: Sequence, resume: Optional[Snapshot]) -> list[Job]:
        """The plans of requests, or of the resumed one."""
        requests = requests or [resume.request if resume else None]

        def planned(r: Any) -> Job:
            r = checked(Request, r, "request")
            if resume is not None and r.seed is None:
                r = replace(r, seed=resume.request.seed)
            return self.plan(r)

        jobs = [r if isinstance(r, Job) else planned(r) for r in requests]
        if resume is not None:
            if len(jobs) > 1:
                raise UserError("resume continues one video: pass one request")
            resume.check_request(jobs[0].request)
            if jobs[0].request != resume.request:  # only the predicted length is new
                jobs = [self.plan(resume.request)]
        return jobs

    def _prepare(self, jobs: list[Job], contexts, resume) -> memory.MemoryPlan:
        """Check what can be checked before weights are read, and download them."""
        lacks = {p for job in jobs for p in job.texts} - {*(contexts or ())}
        if lacks and (contexts or contexts == {} and resume is None):
            raise UserError(f"contexts lack the prompt {min(lacks)!r}")
        plan = self.memory(*jobs, text=contexts is None)
        plan.check()
        hub.fetch_all(self.checkpoint.files)
        if resume is not None:
            resume.check(jobs[0], self.files())
        return plan


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
    parts: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    keep: bool = False,
) -> Pipeline:
    """A pipeline from an official file, a folder, a converted folder or a Hub repo.

    `kind` ("dev" or "distilled") overrides what the file name says, `upsamplers` those
    next to the model, `parts` are files by component. `dtype` is of the text side and
    the transformer; "auto", the default, is the chip's (see `chips`). With `low_memory`
    (None: if not all fit) the transformer's blocks are read in each step, with the same
    result; with `keep` it stays for the next run, if it fits next to all other phases.
    `cache_contexts` is a folder that keeps encoded prompts. All machines of a `group`
    call this and split the work in one of parallel.MODES (`share` is the earlier name
    of `parallel`). Raises UserError when files do not fit together.
    """
    name = "auto" if dtype is None else dtype_name(dtype)
    check_choice("dtype", name, ("auto", "bfloat16", "float16", "float32"))
    is_auto, name = name == "auto", this_chip().dtype if name == "auto" else name
    files = checked(Union[dict[str, str], list[tuple[str, str]]], parts, "parts")
    folder = checked(Optional[str], cache_contexts, "cache_contexts")
    low_memory = checked(Optional[bool], low_memory, "low_memory")
    mode = checked(Optional[str], share if parallel is None else parallel, "parallel")
    if len(dict(files)) < len(files):
        raise UserError("parts: a component is named twice")
    o = Load(model, kind, name, upsamplers, dict(files), text_encoder)
    files = {"upsamplers": o.upsamplers, "parts": o.parts}
    checkpoint = weights.open_model(o.model, kind, **files, fetch=False)
    if folder is not None:
        hub.make_folder(folder)
    options = low_memory, folder, Machines(group, mode)
    pipe = Pipeline(checkpoint, o.text_encoder, getattr(mx, name), *options)
    pipe.keep = checked(bool, keep, "keep")
    pipe.fallback = mx.bfloat16 if is_auto and name == "float16" else None
    return pipe
