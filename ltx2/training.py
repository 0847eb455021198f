"""Train a LoRA on clips: options, the memory plan, steps, held-out loss, samples, files."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Iterator, Mapping, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import __version__, dataset, gradients, latents, media, memory
from .adapters import ADAPTERS, CONFIG, STATE, official, save_losses
from .base import Checked, UserError, checked, note, parse_json
from .chips import this_chip
from .dit import Block, DiT, StreamedBlocks
from .gradients import SCHEDULES, TARGETS, Parameters
from .hub import read_arrays
from .latents import LatentState, Size
from .lora import Lora, attach, linear_shape
from .options import ask, check, comma_separated
from .pipeline import Pipeline, Result
from .request import Request
from .sampling import DISTILLED_SIGMAS
from .text import MAX_TOKENS
from .weights import save_arrays

# The reference's, unless a model's config.json has others.
DEFAULTS: dict[str, Any] = {"iters": 2000, "batch_size": 1, "learning_rate": 1e-4}
DEFAULTS |= {"lr_schedule": "linear", "rank": 32, "preserve": ()}
MEAN_OF = 100  # steps in the running mean of the loss
HELD_OUT = 1 << 40  # where the random draws of the held-out loss begin
# Copies that a block keeps for its backward pass, of the states of all tokens, of those of
# the text and of the scores of its attentions (which are not fused while they are
# differentiated), and of the scores while it is differentiated: measured on the CPU.
KEPT, DURING = (38, 5, 1.2), 1.3
FACTORS = 6  # float32 copies of the factors: gradients, moments, what a step makes


REPEATED = {"default": (), "type": str, "repeat": True}


@dataclass(frozen=True)
class Options:
    """How to train. None means the model's default."""

    iters: Optional[int] = ask("number of steps (default: 2000)", between=(1, 10**7))
    batch_size: Optional[int] = ask("clips per batch (default: 1)", between=(1, 1024))
    grad_accumulation_steps: int = ask("batches per step", 1, between=(1, 1024))
    learning_rate: Optional[float] = ask("(default: 1e-4)", between=(0, 1))
    lr_schedule: Optional[str] = ask("(default: linear)", choices=tuple(SCHEDULES))
    max_grad_norm: float = ask("of gradients; 0 is off", 1.0, between=(0, 1e9))
    rank: Optional[int] = ask("rank of the LoRA (default: 32)", between=(1, 1024))
    streams: str = ask("streams to train", "both", choices=tuple(TARGETS))
    target_modules: tuple[str, ...] = ask(
        "ends of layers' names (default: attention)", (), type=comma_separated
    )
    first_frame_prob: float = ask("of image-to-video", 0.1, between=(0, 1))
    resolution: tuple[str, ...] = ask(
        "WxHxF, a size to fit clips to; repeatable (default: the model's)", **REPEATED
    )
    reference_data: Optional[str] = ask("folder of reference clips, for an IC-LoRA")
    reference_downscale: int = ask("how much smaller it is", 1, between=(1, 9))
    trigger: str = ask("word to put before each caption", "")
    preserve: Optional[tuple[str, ...]] = ask(
        "prompt whose videos must not change; repeatable (default: the model's)",
        type=str,
        repeat=True,
    )
    val_clips: Optional[int] = ask("clips held out (default: a tenth, up to 8)")
    grad_checkpoint: bool = ask("recompute blocks, which saves memory", False)
    steps_per_report: int = ask("steps between reports", 10, between=(1, 10**7))
    steps_per_eval: int = ask("steps between held-out losses", 200, between=(1, 10**7))
    save_every: int = ask("steps between saved adapters", 250, between=(1, 10**7))
    sample_prompt: tuple[str, ...] = ask("of a sample clip; repeatable", **REPEATED)
    sample_every: int = ask("steps between samples; 0: off", 250, between=(0, 10**7))
    seed: int = ask("seed of factors, noise and order", 0, between=(0, 2**31))

    def resolved(self, defaults: Mapping[str, float]) -> Options:
        """With the model's defaults. Raises UserError for values that are not possible."""
        known = DEFAULTS | {k: v for k, v in defaults.items() if k in DEFAULTS}
        known["preserve"] = checked(tuple[str, ...], known["preserve"], "preserve")
        missing = {k: v for k, v in known.items() if getattr(self, k) is None}
        found = replace(self, **missing)
        check(found)
        return found


@dataclass
class Report:
    """Where a training is: after some steps, losses, speed and memory."""

    step: int
    loss: Optional[float] = None
    mean: Optional[float] = None
    held_out: Optional[float] = None
    learning_rate: float = 0.0
    per_second: float = 0.0
    peak: int = 0


@dataclass(frozen=True)
class Place(Checked):
    """Where an interrupted training is: its step, and step, loss, held-out loss of all."""

    step: int
    history: list[tuple[int, Optional[float], Optional[float]]]

    @classmethod
    def read(cls, metadata: Mapping[str, str], path: str) -> Place:
        """From a state file's metadata, each value of which is JSON."""
        text = ", ".join(f"{json.dumps(k)}: {v}" for k, v in metadata.items())
        return checked(cls, parse_json(f"{{{text}}}", path), path)


# The run


def draw_example(
    model,
    sample: dataset.Sample,
    options: Options,
    rng,
    at: Optional[float] = None,
    steps: Sequence[float] = (),
) -> gradients.Example:
    """A sample with the noise and sigmas of one step; `at` is the quantile of a fixed
    sigma. With `steps`, the sigma of all streams is one of these half of the time."""
    states, noise, sigmas = {}, {}, {}
    size, probability = sample.item.size, options.first_frame_prob
    for name, x in sample.latents.items():
        tokens = latents.to_tokens(x)
        state = LatentState.initial(size.bounds(name), tokens.shape[-1], tokens)
        draws = rng.standard_normal(1), rng.uniform(size=1), rng.uniform(size=1)
        if at is not None:
            draws = np.array([NormalDist().inv_cdf(at)]), draws[1], np.ones(1)
        sigmas[name] = gradients.sample_sigmas(tokens.shape[1], *draws).item()
        noise[name] = mx.array(rng.standard_normal(tokens.shape, np.float32))
        if name == "video":
            # A picture would have nothing left to generate.
            if rng.uniform() < probability and x.shape[1] > 1:
                state = state.hold(x[:, :1])
            if sample.reference is not None:
                scale = 1.0, options.reference_downscale
                state = state.show(sample.reference, size.fps, *scale)
        states[name] = state
    if steps and rng.uniform() < 0.5:
        sigmas = dict.fromkeys(sigmas, float(rng.choice(steps)))
    pairs = zip(("video", "audio"), sample.contexts)
    contexts = tuple(c if k in states else None for k, c in pairs)
    return gradients.make_example(model, states, noise, sigmas, contexts)


class Trainer:
    """Trains one adapter in a folder."""

    def __init__(
        self,
        pipe: Pipeline,
        options: Options,
        folder: str | Path,
        cache: Optional[str] = None,
        low_memory: Optional[bool] = None,
    ):
        self.pipe, self.folder = pipe, Path(folder)
        self.options = options.resolved(pipe.checkpoint.defaults)
        self.low_memory, self.group = low_memory, mx.distributed.init()
        scale = self.options.reference_downscale
        self.data = dataset.Dataset(cache or self.folder / "cache", pipe, scale)
        self.step, self.stopping = 0, False
        self.history: list[tuple] = []  # step, loss, held-out loss
        self.sigmas: Sequence[float] = ()
        if pipe.checkpoint.kind == "distilled":
            self.sigmas = DISTILLED_SIGMAS[:-1]  # all that it is used at
            note("the base is distilled; LoRAs are better trained on the dev model")

    # Before any weights are read

    def fit(self, clips: Sequence[dataset.Clip]) -> None:
        """Choose each clip's bucket, and the clips to hold out."""
        o = self.options
        buckets = [dataset.parse_bucket(text) for text in o.resolution]
        buckets = buckets or dataset.default_buckets(self.pipe.checkpoint.defaults)
        self.data.fit(clips, buckets, o.streams, o.trigger)
        there = len(self.data.items)
        count = min(there // 10, 8) if o.val_clips is None else o.val_clips
        if not 0 <= count < there:
            raise UserError(f"val_clips is {count}, but there are {there} clips")
        self.data.hold_out(count)

    def plan(self) -> memory.MemoryPlan:
        """The memory of each phase. Blocks are recomputed, or read from the disk, where
        it would not do otherwise."""
        estimator = memory.Estimator(self.pipe.checkpoint, self.pipe.dtype)
        bits = (self.pipe.checkpoint.quantization or {}).get("bits", 0)
        layers = gradients.target_layers(self._transformer(lazy=True), self.endings)
        if not layers:
            raise UserError(f"no layer's name ends in {', '.join(self.endings)}")
        numbers = self.options.rank * sum(sum(map(linear_shape, layers.values()), ()))
        sizes = [item.size for item in self.data.items + self.data.held_out]
        encoded = dataset.PROMPTS_AT_ONCE, self.pipe.encoder_files
        text = {"text": estimator.text(*encoded)}
        samples = [self.pipe.plan(r).memory.phases for r in self.requests()[:1]]

        def planned(sizes: list[Size], by_block: bool, low: Optional[bool]):
            phases = footprints(estimator, sizes, 4 * numbers, by_block, bits)
            for needs in samples:
                sample = [n for k, n in needs.items() if k in ("audio", "video")]
                more, train = max(n.weights for n in sample), phases["train"]
                total = train.weights - 3 * 4 * numbers + more  # without gradients
                buffers = max(n.buffers for n in needs.values())
                phases["sample"] = memory.Footprint(total, buffers, train.streamable)
            return memory.planned(text | phases, memory.available(), low)

        self.by_block = self.options.grad_checkpoint
        plan = planned(sizes, self.by_block, self.low_memory)
        if plan.streamed or not plan.fits:
            self.by_block = True
            plan = planned(sizes, self.by_block, self.low_memory)
        tried = ((s, f) for s in (576, 448, 320, 256, 128, 64) for f in (49, 25, 9, 1))
        advice = "try a lower-bit model (convert.py --quantize)"
        for side, frames in tried if not plan.fits else ():
            small = Size(side, side, frames, 24.0, latents.audio_tokens(frames, 24))
            if planned([small], True, True).fits:
                advice = f"--resolution {side}x{side}x{frames} would fit"
                break
        self.memory = replace(plan, suggestion=advice)
        return self.memory

    @property
    def endings(self) -> tuple[str, ...]:
        return self.options.target_modules or TARGETS[self.options.streams]

    def _transformer(self, lazy: bool) -> DiT:
        return self.pipe.checkpoint.load("transformer", self.pipe.dtype, lazy)

    # Before the first step

    def prepare(self, resume: Optional[str] = None) -> None:
        """Encode clips and prompts, load the transformer and attach the factors."""
        for rank in range(self.group.size()):  # others find what is on a common disk
            if rank == self.group.rank():
                self.data.encode()
                jobs = map(self.pipe.plan, self.requests())
                self.data.encode_captions([p for job in jobs for p in job.prompts])
                self.data.encode_captions(self.options.preserve)
            mx.eval(mx.distributed.all_sum(mx.zeros(1)))
        self.folder.mkdir(parents=True, exist_ok=True)
        o, model = self.options, self._transformer(lazy=self.memory.streamed)
        layers = gradients.target_layers(model, self.endings)
        self.lora = gradients.new_factors(layers, o.rank, o.seed)
        parameters = gradients.factor_parameters(self.lora)
        self.opt = gradients.optimizer(o.learning_rate)
        self.opt.init(parameters)
        if resume is not None:
            parameters = self._resumed(Path(resume), parameters)
        attach(model, [(self.lora, 1.0)], apart=True)
        self.trainee = gradients.Trainee(model, {}, self.by_block)
        if self.memory.streamed:
            self.trainee.read = self._read
            blocks = lambda: (block for _, block in self.trainee.blocks())
            model.transformer_blocks = StreamedBlocks(blocks)
        self.trainee.update(parameters)

    def _read(self) -> list[Block]:
        """The blocks with factors; their weights are not read yet."""
        return list(self.pipe.blocks([(self.lora, 1.0)], apart=True))

    def _resumed(self, path: Path, new: Parameters) -> Parameters:
        """The factors of an earlier training, and its step and moments if they are
        there."""
        state = (path if path.is_dir() else path.parent) / STATE
        at = None
        if state.is_file():
            arrays, metadata = read_arrays(state)
            found = {k[2:]: w for k, w in arrays.items() if k.startswith("p.")}
            at = Place.read(metadata, f"{state}: ")
        else:
            note(f"there is no {state}: training begins at step 0")
            found = gradients.factor_parameters(Lora.read(path))
        shapes = [{k: w.shape for k, w in p.items()} for p in (found, new)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path} has other layers or another rank: pass the flags it was made with"
            )
        if at is not None:
            expected = {f"{k}.{key}": w.shape for key, w in found.items() for k in "mv"}
            there = {k: w.shape for k, w in arrays.items()}
            if not (expected | {"step": ()}).items() <= there.items():
                raise UserError(f"{state} is not complete: start from its adapter")
            for key in found:
                self.opt.state[key] = {k: arrays[f"{k}.{key}"] for k in "mv"}
            self.opt.state["step"] = arrays["step"]
            self.step = at.step
            self.history = [
                [n, math.nan if loss is None else loss, x] for n, loss, x in at.history
            ]
        return found

    # Training

    def train(self) -> Iterator[Report]:
        """A report after steps that are to be reported. Randomness depends on the seed
        and the step only, so that a resumed training is the same bit for bit."""
        o = self.options
        losses, since, seconds = [], self.step, 0.0
        mx.reset_peak_memory()
        while self.step < o.iters and not self._stopped():
            begun = time.perf_counter()
            part = SCHEDULES[o.lr_schedule](self.step / o.iters)
            self.opt.learning_rate = o.learning_rate * part
            loss, grads = self._batch()
            old, limit = self.trainee.parameters, o.max_grad_norm
            new, norm = gradients.step(self.opt, old, grads, limit)
            self.trainee.update(new)
            self.step += 1
            seconds += time.perf_counter() - begun
            if not math.isfinite(norm):
                note(f"step {self.step} is skipped: its gradients are not finite")
            losses.append(loss)
            self.history.append([self.step, loss, None])
            last = self.step == o.iters
            report = Report(self.step)
            if self.data.held_out and (self.step % o.steps_per_eval == 0 or last):
                report.held_out = self.history[-1][2] = self.held_out_loss()
            if self.step % o.steps_per_report == 0 or last:
                report.loss, losses = sum(losses) / len(losses), []
                recent = [row[1] for row in self.history[-MEAN_OF:]]
                report.mean = sum(recent) / len(recent)
                report.per_second = (self.step - since) / seconds
                report.learning_rate = o.learning_rate * part
                report.peak, since, seconds = mx.get_peak_memory(), self.step, 0.0
            if report.loss is not None or report.held_out is not None:
                yield report
            if self.step % o.save_every == 0:
                self.save(f"{self.step:07d}_{ADAPTERS}")
            if o.sample_every and self.step % o.sample_every == 0 and not last:
                self.sample()
        self.save()
        if not self.stopping:
            self.sample()

    def _stopped(self) -> bool:
        """Whether one of the machines is to stop."""
        stopping = mx.array(self.stopping)
        self.stopping = mx.distributed.all_max(stopping, group=self.group).item()
        return self.stopping

    def _batch(self) -> tuple[float, Parameters]:
        """The loss and gradients of a step: the means over its clips, of which each
        machine takes its part."""
        o, total, sums = self.options, 0.0, {}
        ranks = self.group.size()
        count = o.batch_size * o.grad_accumulation_steps
        for i in range(count):
            index = (self.step * count + i) * ranks + self.group.rank()
            rng = np.random.default_rng([o.seed, index])
            sample, model = self._sample(index), self.trainee.model
            example = draw_example(model, sample, o, rng, steps=self.sigmas)
            (loss, _), grads = self.trainee.gradients(example)
            if o.preserve:
                prompt = o.preserve[rng.integers(len(o.preserve))]
                kept = self.trainee.preserved(example, self.data.context(prompt))
                _, more = self.trainee.gradients(kept)
                grads = {k: g + more[k] for k, g in grads.items()}
            sums = {k: g / count + sums.get(k, 0) for k, g in grads.items()}
            mx.eval(loss, sums)
            total += loss.item() / count
        if ranks > 1:
            sums = dict(tree_flatten(nn.average_gradients(sums)))
            total = mx.distributed.all_sum(mx.array(total)).item() / ranks
        return total, sums

    def _sample(self, index: int) -> dataset.Sample:
        """The clip of a number that counts through all epochs, each in another order."""
        items = self.data.items
        epoch, place = divmod(index, len(items))
        order = np.random.default_rng([self.options.seed, 0, epoch])
        return self.data.load(items[order.permutation(len(items))[place]])

    def held_out_loss(self) -> float:
        """The mean loss of the held-out clips, always with the same noise and sigmas."""
        items, o, total = self.data.held_out, self.options, 0.0
        count = max(len(items), 8)
        for n in range(count):
            rng = np.random.default_rng([o.seed, HELD_OUT + n])
            sample, at = self.data.load(items[n % len(items)]), (n + 0.5) / count
            example = draw_example(self.trainee.model, sample, o, rng, at)
            total += self.trainee.loss(example)[0].item() / count
        return total

    # Samples

    def requests(self) -> list[Request]:
        """Sample clips of the most common size, with fixed seeds."""
        o, items = self.options, self.data.items
        # A sample has no reference clip.
        if items[0].clip.reference or not o.sample_every:
            return []
        sizes = [item.size for item in items]
        size = max(sizes, key=sizes.count)
        prompts = o.sample_prompt or (items[0].clip.caption,)
        first = Request(
            prompts[0],
            num_frames=size.num_frames,
            fps=size.fps,
            width=size.width,
            height=size.height,
            audio_only=o.streams == "audio",
            no_audio=o.streams == "video",
        )
        seeds = range(o.seed, o.seed + len(prompts))
        return [replace(first, prompt=p, seed=n) for p, n in zip(prompts, seeds)]

    def sample(self) -> None:
        """Sample clips, to the right of those of the untrained model."""
        folder = self.folder / "samples"
        for n, request in enumerate(() if self.group.rank() else self.requests(), 1):
            folder.mkdir(exist_ok=True)
            base = folder / f"{0:07d}-{n}.mp4"
            if not base.exists() and not request.audio_only:
                with self.trainee.untrained():
                    self._generate(request).save(base)
            result = self._generate(request)
            if result.frames is not None:
                frames = np.stack([*media.read_video(base)])
                result.frames = np.concatenate([frames, result.frames], axis=2)
            suffix = ".wav" if request.audio_only else ".mp4"
            result.save(folder / f"{self.step:07d}-{n}{suffix}")

    def _generate(self, request: Request) -> Result:
        self.pipe.adopt(self.trainee.model)
        job = self.pipe.plan(request)
        contexts = {prompt: self.data.context(prompt) for prompt in job.prompts}
        return self.pipe.generate(**vars(request), contexts=contexts)

    # Files

    def save(self, copy: str = "") -> None:
        """The adapter as an official LoRA, its settings, all that resuming needs, and
        the losses so far."""
        if self.group.rank() > 0:
            return
        parameters = self.trainee.parameters
        factors = official(parameters, self.pipe.dtype)
        save_arrays(self.folder / ADAPTERS, factors, self.metadata())
        if copy:
            shutil.copyfile(self.folder / ADAPTERS, self.folder / copy)
        arrays = {f"p.{k}": w for k, w in parameters.items()}
        for part in "mv":
            arrays |= {f"{part}.{k}": self.opt.state[k][part] for k in parameters}
        arrays["step"] = self.opt.state["step"]
        rows = [[n, x if math.isfinite(x) else None, y] for n, x, y in self.history]
        facts = {"step": str(self.step), "history": json.dumps(rows)}
        save_arrays(self.folder / STATE, arrays, facts)
        config = json.dumps(self.config(), indent=1)
        (self.folder / CONFIG).write_text(config + "\n")
        save_losses(self.folder, self.history)

    def metadata(self) -> dict[str, str]:
        """What the adapter's file says about itself; alpha is the rank: a scale of 1."""
        o, checkpoint = self.options, self.pipe.checkpoint
        found = {"format": "pt", "rank": str(o.rank), "alpha": str(o.rank)}
        found["base_model"] = f"LTX-2 {checkpoint.model_version} {checkpoint.kind}"
        found |= {"model_version": checkpoint.model_version} | {"steps": str(self.step)}
        found |= {"trigger_words": o.trigger} if o.trigger else {}
        if any(item.clip.reference for item in self.data.items):
            found["reference_downscale_factor"] = str(o.reference_downscale)
        return found

    def config(self) -> dict[str, Any]:
        o = self.options
        layers = {"rank": o.rank, "scale": 1.0, "dropout": 0.0, "keys": self.endings}
        return {
            "fine_tune_type": "lora",
            "lora_parameters": layers,
            "base_model": self.metadata()["base_model"],
            "load": asdict(self.pipe.origin),
            "base_files": self.pipe.files(),
            "clips": len(self.data.items),
            "steps": self.step,
            "options": asdict(o),
            "versions": {"ltx2": __version__, "mlx": mx.__version__},
        }


def footprints(
    e: memory.Estimator, sizes: Sequence[Size], factors: int, by_block: bool, bits: int
) -> dict[str, memory.Footprint]:
    """What encoding and training hold, for clips of these sizes, so many bytes of factors
    and a transformer of these bits, or 0 if it is not quantized."""
    c, phases = e.dit, {}
    largest = max(sizes, key=lambda s: s.tokens + s.audio_tokens)
    tokens, sound = largest.tokens, largest.audio_tokens
    if tokens:
        weights = e.size["vae.encoder"] + e.size["audio_vae"]
        phases["encode"] = memory.Footprint(
            weights, e.convolutions(largest, "encoder", 8)
        )
    heads = max(c.num_attention_heads, c.audio_num_attention_heads)
    pairs = tokens * (tokens + MAX_TOKENS + 2 * sound) + sound * (sound + MAX_TOKENS)
    state, text = e.per_token(tokens, sound), e.per_token(MAX_TOKENS, MAX_TOKENS)
    scores = heads * pairs * e.item
    block = sum(n * size for n, size in zip(KEPT, (state, text, scores)))
    if bits and tokens > this_chip().dequantize_from:  # such weights are kept, too
        block += e.blocks / c.num_layers * 8 / bits * e.item
    held = block + (c.num_layers + 1) * state if by_block else c.num_layers * block
    weights = e.size["transformer"] + FACTORS * factors
    buffers = held + DURING * scores
    phases["train"] = memory.Footprint(weights, buffers, e.streamable["transformer"])
    return phases
