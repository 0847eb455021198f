"""Train a LoRA on clips: options, memory plan, steps, held-out loss, samples, files."""

import itertools
import json
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist, fmean, mode
from typing import Any, Callable, Iterator, Mapping, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import __version__, base, dataset, gradients, latents, media, memory
from .adapters import ADAPTERS, CONFIG, STATE, official, read_state, save_losses
from .base import Checked, OutputError, PathName, UserError, note, user_path
from .dataset import Clip, of_streams
from .dit import Both, DiT, StreamedBlocks
from .gradients import SCHEDULES, STREAMS, TARGETS, Example, Parameters
from .hub import check_space, fetch_all, make_folder
from .latents import LatentState, Size
from .lora import attach
from .options import ask, check, located, many
from .pipeline import Pipeline
from .record import name_only
from .request import Request
from .stages import Job
from .text import MAX_TOKENS
from .weights import save_arrays

MEAN_OF = 100  # steps in the running mean of the loss
# Clips with which a prompt is preserved: all above a sigma, where noise hides them; below,
# a share, and in place of a share of them the video that the base makes of the prompt.
# WEIGHT is that of its loss; a clip's is 1.
PRESERVED_ABOVE, WITH_CLIP, WITH_OWN, WEIGHT = 0.8, 0.2, 0.5, 1.5
MOST_SKIPPED = 10  # steps in a row
HELD_OUT = 1 << 40  # where the random draws of the held-out loss begin
REPEATED = {"default": (), "type": str, "repeat": True}


@dataclass(frozen=True)
class Options(Checked):
    """How to train; the defaults are the reference's."""

    iters: int = ask("number of steps", 2000, between=(1, 10**7))
    batch_size: int = ask("clips per batch", 1, between=(1, 1024))
    grad_accumulation_steps: int = ask("batches per step", 1, between=(1, 1024))
    learning_rate: float = ask("first learning rate", 1e-4, between=(1e-9, 1))
    lr_schedule: str = ask("how the learning rate falls", "linear", choices=SCHEDULES)
    weight_decay: float = ask("weight decay of the factors", 0.01, between=(0, 100))
    max_grad_norm: float = ask("largest gradient norm; 0 is off", 1.0, between=(0, 1e9))
    rank: int = ask("rank of the LoRA", 32, between=(1, 1024))
    streams: str = ask("streams to train", "both", choices=TARGETS)
    target_modules: tuple[str, ...] = ask(
        "layers to train, by the ends of their names (default: attention)",
        (),
        type=many(str),
    )
    first_frame_prob: float = ask(
        "share of the clips whose first frame is given", 0.1, between=(0, 1)
    )
    resolution: tuple[str, ...] = ask(
        "WxHxF, a size to fit clips to; repeatable (default: the model's)", **REPEATED
    )
    reference_data: Optional[PathName] = ask(
        "folder of reference clips, for an IC-LoRA", metavar="PATH"
    )
    reference_downscale: int = ask(
        "how many times smaller those are", 1, between=(1, 9), needs="reference_data"
    )
    trigger: str = ask("word to put before each caption (default: none)", "")
    preserve: tuple[str, ...] = ask(
        "prompt whose videos must not change; repeatable (default: the model's)",
        **REPEATED,
    )
    text_jitter: float = ask(
        "how far texts are moved at random", 0.0, between=(0, 10), needs="preserve"
    )
    text_rows: Optional[int] = ask(
        "fewest rows of a text in a step (default: all)", between=(1, MAX_TOKENS)
    )
    val_clips: Optional[int] = ask("clips held out (default: a tenth, up to 8)")
    grad_checkpoint: bool = ask("save memory: recompute blocks", False)
    steps_per_report: int = ask("steps between reports", 10, between=(1, 10**7))
    steps_per_eval: int = ask("steps between held-out losses", 200, between=(1, 10**7))
    save_every: int = ask("steps between saved adapters", 250, between=(1, 10**7))
    sample_prompt: tuple[str, ...] = ask("prompt of a sample; repeatable", **REPEATED)
    sample_every: int = ask("steps between samples; 0 is off", 250, between=(0, 10**7))
    seed: int = ask("seed of factors, noise and order", 0, between=(0, 2**31))

    @classmethod
    def of(cls, model: Mapping[str, Any], passed: Mapping[str, Any]) -> "Options":
        """Those that are passed (not None), else the model's defaults, checked."""
        given = {**model, **{k: v for k, v in passed.items() if v is not None}}
        found = cls(**{k: v for k, v in given.items() if k in cls.__dataclass_fields__})
        check(found)
        return found


class Trainer:
    """Trains one adapter in a folder."""

    def __init__(self, pipe: Pipeline, options: Mapping, folder: str, cache=None):
        """`options` are of `Options`; `cache` is a folder, if not one in `folder`."""
        self.pipe, self.folder = pipe, user_path(folder)
        c = pipe.checkpoint
        self.base = f"LTX-2 {c.model_version} {c.kind}"
        self.options = o = Options.of(c.defaults, options)
        self.group = mx.distributed.init()
        self.streams = STREAMS if o.streams == "both" else (o.streams,)
        self.endings = o.target_modules or TARGETS[o.streams]
        encoders = (dataset.ENCODERS[s] for s in self.streams)
        c.check("transformer", "connectors", *encoders)
        pipe.check_text_encoder()
        self.data = dataset.Dataset(user_path(cache or self.folder / "cache"), pipe, o)
        self.stopping = 0  # the number of a signal
        self.skipped = 0  # steps, the last ones
        self.history: list[list] = []  # step, loss, held-out loss
        self.start: Parameters = {}  # factors and moments of an earlier training
        if c.kind == "distilled":
            note("the base is distilled; LoRAs are better trained on the dev model")

    step = property(lambda self: len(self.history))

    # Before any weights are read

    def plan(self) -> memory.MemoryPlan:
        """The memory by phase; blocks are recomputed or streamed if they must be."""
        pipe, factors = self.pipe, self.nbytes
        estimator = memory.Estimator(pipe.checkpoint, pipe.dtype)
        text = estimator.text(dataset.PROMPTS_AT_ONCE, pipe.encoder_files)
        samples = [job.memory.phases for job in self.jobs[:1]]
        o, low = self.options, pipe.low_memory
        batch = 1 if self.data.has_references else o.batch_size * (1 + bool(o.preserve))

        def planned(sizes: list[Size], by_block: bool, low: Optional[bool], n=batch):
            phases = estimator.training(sizes, factors, by_block, samples, n)
            return memory.planned({"text": text} | phases, memory.available(), low)

        def fits(side: int, frames: int) -> bool:
            size = Size(side, side, frames, 24, latents.audio_tokens(frames, 24))
            return planned([of_streams(size, self.streams)], True, True).fits

        sizes = [of_streams(c.size, c.streams) for c in self.data.clips]
        self.by_block = o.grad_checkpoint
        plan = planned(sizes, self.by_block, low)
        if plan.streamed or not plan.fits:
            self.by_block, plan = True, planned(sizes, True, low)
        advice = "try a lower-bit model (convert.py --quantize)"
        if not plan.fits and o.batch_size > 1 and planned(sizes, True, low, 2).fits:
            advice = "--batch-size 1 with more --grad-accumulation-steps would fit"
        elif not plan.fits:
            tried = itertools.product((576, 448, 320, 256, 128, 64), (49, 25, 9, 1))
            found = (f"{s}x{s}x{n} would fit" for s, n in tried if fits(s, n))
            advice = f"--resolution {small}" if (small := next(found, "")) else advice
        self.memory = replace(plan, suggestion=advice)
        return self.memory

    @cached_property
    def layers(self) -> gradients.Layers:
        """The layers to train."""
        model = self.pipe.checkpoint.sketch("transformer")
        found = gradients.target_layers(model, self.endings)
        if not found:
            ends, names = (", ".join(x) for x in (self.endings, TARGETS["both"]))
            raise UserError(f"no linear layer's name ends in {ends}: try {names}")
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the factors in float32."""
        return 4 * self.options.rank * sum(map(sum, self.layers.values()))

    def resume(self, name: str) -> None:
        """Continue an earlier training, or from a LoRA's factors; only headers are read."""
        found = read_state(name, self.base, self.layers, self.options.rank)
        self.history, self.start = found

    # Before the first step

    def prepare(self) -> None:
        """Encode clips and prompts, load the transformer and attach the factors."""
        make_folder(self.folder / ("samples" if self.samples else ""))
        copies = 3 + (self.options.iters // self.options.save_every + 1) / 2
        check_space({self.folder: int(copies * self.nbytes)})
        fetch_all(self.pipe.checkpoint.files)
        prompts = [prompt for job in self.jobs for prompt in job.prompts]
        self._in_turn(lambda: self.data.encode(prompts))
        self._in_turn(self._make_own)
        o, streamed = self.options, self.memory.streamed
        model = self.pipe.checkpoint.load("transformer", self.pipe.dtype, streamed)
        lora = gradients.new_factors(self.layers, o.rank, o.seed)
        attach(model, [(lora, 1.0)], apart=True)
        parameters = gradients.factor_parameters(lora)
        self.opt = gradients.optimizer(o.learning_rate, o.weight_decay)
        self.opt.init(parameters)
        if self.start:
            parameters = {k: self.start[f"p.{k}"] for k in parameters}
        if self.history:
            moments = lambda k: {part: self.start[f"{part}.{k}"] for part in "mv"}
            self.opt.state |= {k: moments(k) for k in parameters}
            self.opt.state["step"] = self.start["step"]
        read = lambda: self.pipe.blocks([(lora, 1.0)], apart=True)
        reads = read if streamed else None
        self.trainee = gradients.Trainee(model, parameters, self.by_block, reads)
        if streamed:
            blocks = lambda: (block for _, block in self.trainee.blocks())
            model.transformer_blocks = StreamedBlocks(blocks)

    def _in_turn(self, work: Callable[[], None]) -> None:
        """Work on one machine after another, which finds what is on a common disk."""
        for rank in range(self.group.size()):
            if rank == self.group.rank():
                work()
            mx.eval(mx.distributed.all_sum(mx.zeros(1)))

    @cached_property
    def own(self) -> list[Clip]:
        """The base's videos of prompts to preserve; their keys need the model's files."""
        found, contexts = [], self.data.contexts
        for job in self.preserving:
            prompt, size = job.request.prompt, of_streams(job.size, self.streams)
            key = contexts.path(f"{self.base}: {job.request}").stem
            found.append(Clip(Path(prompt), prompt, None, size, self.streams, key))
        return found

    def _make_own(self) -> None:
        """Make those videos, up to their latents, that are not in the cache."""
        made = zip(self.own, self.preserving)
        missing = [pair for pair in made if not self.data.has(pair[0])]
        for clip, job in base.counted(missing, "preserved prompts"):
            model = self.pipe.transformer_with((), self.memory.streamed)
            with closing(self._generate(job, model, Pipeline.stream)) as events:
                done = next(e for e in events if e.phase == "latents").snapshot
            save_arrays(self.data.path(clip), done.latents, {"prompt": clip.caption})
        self.pipe.free("transformer")

    # Training

    def train(self) -> Iterator[str]:
        """Train, and yield what is to be reported, a line each. Randomness depends on the
        seed and the step only, so that a resumed training is the same bit for bit. The
        steps before an error are saved."""
        o, first, times = self.options, self.step, []
        mx.reset_peak_memory()
        try:
            while self.step < o.iters and not self._stopped():
                begun = time.perf_counter()
                self._step()
                times.append(time.perf_counter() - begun)
                yield from self._losses(times)
                if self.step % o.save_every == 0:
                    self.save(f"{self.step:07d}_{ADAPTERS}")
                due = o.sample_every and self.step % o.sample_every == 0
                if due and self.step < o.iters:
                    self.sample()
        finally:
            if self.step > first:
                self.save()
        if not self.stopping:
            self.sample()

    def _step(self) -> None:
        rate = SCHEDULES[self.options.lr_schedule](self.step / self.options.iters)
        self.opt.learning_rate = self.options.learning_rate * rate
        loss, grads = self._batch()
        old, limit = self.trainee.parameters, self.options.max_grad_norm
        new, norm = gradients.step(self.opt, old, grads, limit)
        self.trainee.update(new)
        self.history.append([self.step + 1, loss, None])
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped:
            note(f"step {self.step} is skipped: its gradients are not finite")
        if self.skipped == MOST_SKIPPED:
            what = f"{MOST_SKIPPED} steps in a row had no finite gradients"
            how = "python -m ltx2.checks, or pass a lower --learning-rate"
            raise OutputError(f"{what}: test the model with {how}")

    def _losses(self, times: list[float]) -> Iterator[str]:
        """The losses that are due; `times` are seconds of the steps since the last."""
        o, left = self.options, self.options.iters - self.step
        if self.data.held_out and (self.step % o.steps_per_eval == 0 or not left):
            self.history[-1][2] = loss = self.held_out_loss()
            yield f"Iter {self.step}: held-out loss {loss:.4f}"
        if self.step % o.steps_per_report == 0 or not left:
            losses = [loss for _, loss, _ in self.history[-max(MEAN_OF, len(times)) :]]
            loss, mean = fmean(losses[-len(times) :]), fmean(losses[-MEAN_OF:])
            rate, speed = self.opt.learning_rate.item(), len(times) / sum(times)
            times.clear()
            yield (
                f"Iter {self.step}: loss {loss:.4f}, mean {mean:.4f}, "
                f"learning rate {rate:.3g}, {speed:.3g} it/s, "
                f"{left / speed / 60:.1f} min left, peak {mx.get_peak_memory() / 1e9:.2f} GB"
            )

    def _stopped(self) -> int:
        """The signal by which one of the machines must stop, or 0."""
        number = mx.array(self.stopping)
        self.stopping = mx.distributed.all_max(number, group=self.group).item()
        return self.stopping

    def _examples(self, index: int) -> list[Example]:
        """The clips of the batch with this number, and prompts to preserve with the base's
        velocities, joined. All read the same rows of a text."""
        o, own, kept, rows = self.options, [], [], slice(None)
        if o.text_rows:
            rng = np.random.default_rng([o.seed, 1, index])
            rows = gradients.some_rows(MAX_TOKENS, o.text_rows, rng)
        for n in range(index * o.batch_size, (index + 1) * o.batch_size):
            rng = np.random.default_rng([o.seed, n])
            own.append(self._example(self._clip(n), rng, rows))
            kept += self._kept(own[-1], rng, rows)
        kept = map(self.trainee.preserved, gradients.batches(kept))
        return gradients.batches([*own, *kept])

    def _example(self, clip, rng, rows=slice(None), at=None, given=None) -> Example:
        """A clip with a step's noise and sigmas; `at` is the quantile of fixed ones. Half of
        the time, a distilled base's streams all have the sigma of one of its steps. With
        sigmas `given`, the text is as it is."""
        o, size, found = self.options, clip.size, self.data.load(clip)
        reference = found.pop("reference", None)
        states, noise, sigmas = {}, {}, {}
        for name, x in found.items():
            tokens = latents.to_tokens(x)
            state = LatentState.initial(size.bounds(name), tokens.shape[-1], tokens)
            draws = rng.standard_normal(), rng.uniform(), rng.uniform()
            draws = draws if at is None else (NormalDist().inv_cdf(at), 0.0, 1.0)
            sigmas[name] = float(gradients.sample_sigmas(tokens.shape[1], *draws))
            noise[name] = mx.array(rng.standard_normal(tokens.shape, np.float32))
            if name == "video":
                # A picture would have nothing left to generate.
                if rng.uniform() < o.first_frame_prob and x.shape[1] > 1:
                    state = state.hold(x[:, :1])
                if reference is not None:
                    state = state.show(reference, size.fps, 1.0, o.reference_downscale)
            states[name] = state
        model, contexts = self.trainee.model, self._contexts(clip.caption, rows)
        if at is None and given is None:
            if self.pipe.checkpoint.kind == "distilled" and rng.uniform() < 0.5:
                sigmas = dict.fromkeys(sigmas, gradients.sigma_of_step(rng.uniform()))
            if o.text_jitter:
                contexts = self._moved(contexts, rng, rows)
        sigmas |= given or {}
        return gradients.make_example(model, states, noise, sigmas, contexts)

    def _contexts(self, caption: str, rows: Any) -> Both:
        """These rows of a caption's contexts."""
        return tuple(x[:, rows] for x in self.data.context(caption))

    def _moved(self, contexts: Both, rng, rows) -> Both:
        """Contexts moved by a random share of the difference of two preserved prompts'."""
        pair = (self.own[rng.integers(len(self.own))].caption for _ in range(2))
        first, second = (self._contexts(caption, rows) for caption in pair)
        share = self.options.text_jitter * rng.uniform()
        return tuple(x + share * (a - b) for x, a, b in zip(contexts, first, second))

    def _kept(self, example: Example, rng, rows) -> list[Example]:
        """A prompt to preserve at the example's sigmas, if it has one."""
        sigmas = {k: t.sigma.item() for k, t in zip(STREAMS, example.tokens) if t}
        hidden, draw = min(sigmas.values()) > PRESERVED_ABOVE, rng.uniform()
        if not self.own or not hidden and draw > WITH_CLIP + WITH_OWN:
            return []
        own = self.own[rng.integers(len(self.own))]
        if not hidden and draw > WITH_CLIP:
            return [self._example(own, rng, rows, given=sigmas)]
        return [replace(example, contexts=self._contexts(own.caption, rows))]

    def _batch(self) -> tuple[float, Parameters]:
        """The mean loss and gradients of a step's clips, divided among machines."""
        o, total, sums = self.options, 0.0, {}
        ranks, times = self.group.size(), o.grad_accumulation_steps
        for i in range(times):
            index = (self.step * times + i) * ranks + self.group.rank()
            for batch in self._examples(index):
                new = batch.clips - batch.preserved
                weights = [1.0] * new + [WEIGHT] * batch.preserved
                weights = mx.array(weights) / (o.batch_size * times)
                (_, both), grads = self.trainee.gradients(batch, weights)
                sums = {k: g + sums[k] for k, g in grads.items()} if sums else grads
                each = sum(x for x in both if x is not None)  # of a clip
                mx.eval(each, sums)
                total += each[:new].sum().item() / (o.batch_size * times)
        if ranks > 1:
            sums = dict(tree_flatten(nn.average_gradients(sums)))
            total = mx.distributed.all_sum(mx.array(total)).item() / ranks
        return total, sums

    def _clip(self, index: int) -> Clip:
        """The clip of a number that counts through epochs, each in another order."""
        clips = self.data.items
        epoch, place = divmod(index, len(clips))
        order = np.random.default_rng([self.options.seed, 0, epoch])
        return clips[order.permutation(len(clips))[place]]

    def held_out_loss(self) -> float:
        """The mean loss of the held-out clips, with fixed noise and sigmas."""
        clips, seed, losses = self.data.held_out, self.options.seed, []
        count = max(len(clips), 8)
        for n in range(count):
            rng = np.random.default_rng([seed, HELD_OUT + n])
            example = self._example(clips[n % len(clips)], rng, at=(n + 0.5) / count)
            losses.append(self.trainee.loss(example)[0].item())
        return fmean(losses)

    # Samples

    @cached_property
    def samples(self) -> list[Job]:
        """Clips with fixed seeds; none with references."""
        o, clips = self.options, self.data.items
        if clips[0].reference or not o.sample_every:
            return []
        prompts = enumerate(o.sample_prompt or (clips[0].caption,), o.seed)
        return [self._job(prompt, seed) for seed, prompt in prompts]

    @cached_property
    def preserving(self) -> list[Job]:
        """How the base makes a video of each prompt to preserve."""
        return [self._job(prompt, n) for n, prompt in enumerate(self.options.preserve)]

    jobs = property(lambda self: [*self.samples, *self.preserving])

    def _job(self, prompt: str, seed: int) -> Job:
        """A video of the most common size, and how it is made."""
        kind, size = self.options.streams, mode(clip.size for clip in self.data.items)
        how = {k: getattr(size, k) for k in ("width", "height", "num_frames", "fps")}
        how |= {"audio_only": kind == "audio", "no_audio": kind == "video"}
        return self.pipe.plan(Request(prompt, seed=seed, **how))

    def sample(self) -> None:
        """Sample clips, to the right of those of the untrained model."""
        folder, model = self.folder / "samples", self.trainee.model
        for n, job in enumerate(() if self.group.rank() else self.samples, 1):
            if job.request.audio_only:
                self._generate(job, model).save(folder / f"{self.step:07d}-{n}.wav")
                continue
            first = folder / f"{0:07d}-{n}.mp4"
            if not first.exists():
                with self.trainee.untrained():
                    self._generate(job, model).save(first)
            result = self._generate(job, model)
            before = np.stack([*media.read_video(first)])
            result.frames = np.concatenate([before, result.frames], axis=2)
            result.save(folder / f"{self.step:07d}-{n}.mp4")

    def _generate(self, job: Job, model: DiT, make=Pipeline.generate) -> Any:
        """Make a video with a transformer, by a method of the pipeline."""
        self.pipe.adopt(model)
        contexts = {prompt: self.data.context(prompt) for prompt in job.prompts}
        return make(self.pipe, job, contexts=contexts)

    # Files

    def save(self, copy: str = "") -> None:
        """Save the adapter as an official LoRA, its settings, losses and state."""
        if self.group.rank() > 0:
            return
        parameters, state = self.trainee.parameters, self.opt.state
        factors = official(parameters, self.pipe.dtype)
        for name in filter(None, (ADAPTERS, copy)):
            save_arrays(self.folder / name, factors, self.metadata())
        arrays = {f"p.{k}": w for k, w in parameters.items()} | {"step": state["step"]}
        arrays |= {f"{m}.{k}": state[k][m] for m in "mv" for k in parameters}
        rows = [[n, x if math.isfinite(x) else None, y] for n, x, y in self.history]
        facts = {"base_model": self.base, "history": json.dumps(rows)}
        save_arrays(self.folder / STATE, arrays, facts)
        config = json.dumps(self.config(), indent=1)
        (self.folder / CONFIG).write_text(config + "\n", "utf-8")
        save_losses(self.folder, self.history)

    def metadata(self) -> dict[str, str]:
        """What the adapter's file says about itself; alpha is the rank: scale 1."""
        o, version = self.options, self.pipe.checkpoint.model_version
        found = {"base_model": self.base, "rank": str(o.rank), "alpha": str(o.rank)}
        found |= {"format": "pt", "model_version": version, "steps": str(self.step)}
        found |= {"trigger_words": o.trigger} if o.trigger else {}
        if self.data.has_references:
            found["reference_downscale_factor"] = str(o.reference_downscale)
        return found

    def config(self) -> dict[str, Any]:
        """How the adapter was made; an upload has no paths of files."""
        o = self.options
        layers = {"rank": o.rank, "scale": 1.0, "dropout": 0.0, "keys": self.endings}
        return {
            "fine_tune_type": "lora",
            "lora_parameters": layers,
            "base_model": self.base,
            "load": asdict(located(self.pipe.origin, name_only)),
            "base_files": self.pipe.files(),
            "clips": len(self.data.items),
            "steps": self.step,
            "options": asdict(located(o, name_only)),
            "versions": {"ltx2": __version__, "mlx": mx.__version__},
        }
