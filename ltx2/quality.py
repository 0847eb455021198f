"""What quantizing costs: errors of x0, picture and sound, by step and kind of layer. Each
step starts from the source's state, so that errors do not add up."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import mlx.core as mx
import numpy as np

from . import page
from .base import LOG, UserError, table, user_path
from .guidance import Contexts, guidance_passes
from .latents import Streams
from .linear import layer_format, layer_formats
from .pipeline import Pipeline, Result, Step
from .quantization import ERROR, allocate, groups, layers, quantization
from .request import Request
from .run import seeded_noise
from .sheet import Sheet
from .snapshot import Snapshot
from .weights import Checkpoint, Weights

CLIPS, WORDS = 2, 32  # made-up contexts, and their tokens
OF_A_KIND = 4  # steps of a clip that are compared for each kind of layer
QUARTER = "quarter {} of the blocks"
PLAIN = 1.25  # squared error of `mx.quantize` relative to that of our rounding


@dataclass
class Clip:
    """A run: the state before each step, and the x0 that the step predicted."""

    request: Request
    contexts: dict[str, Contexts]
    steps: list[tuple[Snapshot, Streams]] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    result: Optional[Result] = None
    sound = property(lambda self: self.result.waveform)


def clips(pipe: Pipeline, requests: Sequence[Request], made_up: bool) -> list[Clip]:
    """The runs to make; made-up contexts come from random states of a text encoder."""
    prompts = sorted({p for r in requests for p in pipe.plan(r).prompts})
    if not made_up:
        pipe.check_text_encoder()
        contexts = pipe.contexts(prompts, None)
    else:
        c, draw = pipe.connectors.config, seeded_noise(0)
        shape, contexts = (1, WORDS, c.caption_channels), {}
        for p in prompts:
            states = [draw(f"{p}.{i}", shape) for i in range(c.encoder_states)]
            contexts[p] = pipe.connectors(states)
            mx.eval(contexts[p])
        pipe.free("connectors")
    return [Clip(request, contexts) for request in requests]


def run(pipe: Pipeline, clip: Clip, decode: bool = True) -> Clip:
    """A clip's request, from its first step to the decoded end (with `decode`)."""
    job, done = pipe.plan(clip.request), replace(clip, steps=[], frames=[])
    at = pipe.initial_snapshot(job)
    for event in pipe.stream(job, contexts=clip.contexts):
        if isinstance(event, Step):
            done.steps.append((at, event.denoised))
            at = event.snapshot
        elif isinstance(event, Result):
            done.result = event
        elif event.frames is not None:
            done.frames.append(event.frames)
        elif event.phase == "latents" and not decode:
            break
    return done


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` steps, evenly, with the last one."""
    limit = min(limit, count)
    return sorted(count - 1 - i * count // limit for i in range(limit))


def errors(pipe: Pipeline, clip: Clip, limit: int) -> dict[int, dict[str, float]]:
    """The relative error of x0 against the source's, by step and stream."""
    job, found = pipe.plan(clip.request), {}
    pipe.keep = True  # each step is a run
    relative = lambda a, b: (mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()
    for i in spread(len(clip.steps), limit):
        at, theirs = clip.steps[i]
        resume = replace(at, files=pipe.files())
        events = pipe.stream(job, contexts=clip.contexts, resume=resume)
        ours = next(e.denoised for e in events if isinstance(e, Step))
        events.close()
        found[i] = {k: relative(ours[k], x) for k, x in theirs.items()}
    return found


def mean_square(found: Iterable[dict[int, dict[str, float]]]) -> float:
    """The mean squared error of all clips, steps and streams."""
    return float(np.mean([e**2 for f in found for s in f.values() for e in s.values()]))


def decibels(ours: Clip, theirs: Clip) -> float:
    """Peak signal-to-noise ratio of the frames."""
    pairs = zip(ours.frames, theirs.frames, strict=True)
    square = np.mean([np.square(a.astype(np.float64) - b).mean() for a, b in pairs])
    return 10 * math.log10(255**2 / max(square, 1e-9))


def spectra(ours: np.ndarray, theirs: np.ndarray) -> float:
    """RMS difference of two sounds' spectra in dB, down to 80 dB below the loudest."""
    size = min(1024, len(ours))
    cut = np.lib.stride_tricks.sliding_window_view
    a, b = (cut(x.mean(1), size)[::256] * np.hanning(size) for x in (ours, theirs))
    a, b = (20 * np.log10(np.abs(np.fft.rfft(x)) + 1e-9) for x in (a, b))
    a, b = (np.maximum(x, b.max() - 80) for x in (a, b))
    return float(np.sqrt(np.square(a - b).mean()))


def compare(
    model: Pipeline, runs: list[Clip], limit: Optional[int]
) -> Iterator[tuple[str, str]]:
    """Errors of x0 by step, of pictures and sound: as text, and as parts of a page."""
    found, ends, pictures = [], [], []
    for clip in runs:
        found.append(errors(model, clip, limit or len(clip.steps)))
        ours, prompt = run(model, clip), clip.request.prompt[:40]
        ends.append([prompt, decibels(ours, clip), spectra(ours.sound, clip.sound)])
        pictures.append(side_by_side(ours, clip))
    streams = list(found[0][max(found[0])])
    mean = lambda i, k: float(np.mean([f[i][k] for f in found]))
    rows = [[str(i + 1), *(mean(i, k) for k in streams)] for i in sorted(found[0])]
    heads = ["step", *(f"error of x0, {k}" for k in streams)]
    text = f"overall error of x0: {math.sqrt(mean_square(found)):.4g}"
    worst = max(range(len(rows)), key=lambda n: max(rows[n][1:]))
    lines = page.chart(f"error of x0: {', dashed '.join(streams)}", [*zip(*rows)][1:])
    html = [lines, page.table(heads, rows, {worst})]
    yield f"{table(heads, rows)}\n{text}\n", page.section("Steps", text, html)
    heads = ["decoded", "PSNR, dB", "error of the sound's spectra, dB"]
    worst = min(range(len(ends)), key=lambda n: ends[n][1])
    html = page.section("Decoded", "", [page.table(heads, ends, {worst})])
    yield table(heads, ends), "\n".join([html, *pictures])


def side_by_side(ours: Clip, theirs: Clip) -> str:
    """A section with pictures of the source, the model and their difference."""
    sounds = {"source": theirs.sound, "model": ours.sound, "difference, times 8": None}
    sheets = [Sheet(theirs.result.fps, count=4) for _ in sounds]
    end, total = 0, sum(map(len, theirs.frames))
    for a, b in zip(ours.frames, theirs.frames):
        end += len(b)
        difference = np.minimum(8 * np.abs(a.astype(np.int16) - b), 255)
        for sheet, frames in zip(sheets, (b, a, difference.astype(np.uint8))):
            sheet.add(frames, end, total)
    rate, pairs = theirs.result.sample_rate, zip(sheets, sounds.items())
    pictures = [page.picture(s.draw(sound, rate), name) for s, (name, sound) in pairs]
    return page.section(theirs.request.prompt, "", pictures)


# Kinds of layers


def quantized(checkpoint: Checkpoint, formats: dict[str, dict[str, Any]]) -> Checkpoint:
    """A checkpoint with these layers rounded as by `mx.quantize`, lazily, by block."""
    model = copy(checkpoint)

    def weights(name: str, dtype: Optional[mx.Dtype] = None) -> Weights:
        tensors = checkpoint.weights(name, dtype)
        for path, how in formats.items() if name == "transformer" else ():
            w = tensors[f"{path}.weight"]
            rounded = mx.dequantize(*mx.quantize(w, **how), **how, dtype=w.dtype)
            tensors[f"{path}.weight"] = rounded
        return tensors

    model.weights = weights
    return model


@dataclass
class Kinds:
    """Mean squared errors of x0 with one part of the layers quantized at a time."""

    HEADS = "one part quantized", "layers", "% of weights", "% of error²", "x0 error"

    how: dict[str, Any]  # in this format
    shapes: Weights  # of the transformer
    squares: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find the layers, and their paths by kind and by quarter of the depth."""
        self.found = layers(self.shapes, self.how["group_size"])
        self.parts: dict[str, list[str]] = defaultdict(list)
        for (kind, quarter), paths in groups(self.found).items():
            self.parts[kind] += paths
            self.parts[QUARTER.format(quarter + 1)] += paths

    def measure(self, source: Pipeline, runs: list[Clip], limit: int) -> None:
        """Quantize one part after the other; compare `limit` steps of each run."""
        for part, paths in self.parts.items():
            checkpoint = quantized(source.checkpoint, dict.fromkeys(paths, self.how))
            pipe = Pipeline(checkpoint, None, source.dtype)
            self.squares[part] = mean_square(errors(pipe, c, limit) for c in runs)
            LOG.info(f"{part}: error of x0 {self.squares[part] ** 0.5:.3g}")

    def shares(self, kind: str, quarter: int) -> float:
        """The squared error that a kind of layer causes in a quarter of the blocks."""
        quarters = [self.squares.get(QUARTER.format(n + 1), 0.0) for n in range(4)]
        return self.squares[kind] * quarters[quarter] / max(sum(quarters), 1e-30)

    def recipe(self) -> tuple[dict[str, Any], float]:
        """The bits by layer (see `allocate`), and the error of x0 if layers add up."""
        recipe = self.how | allocate(self.shapes, self.how, self.shares)
        bits = lambda paths: layer_format(recipe, paths[0])["bits"]
        found = groups(self.found).items()
        square = sum(self.shares(*where) * ERROR[bits(paths)] for where, paths in found)
        return recipe, math.sqrt(square / ERROR[self.how["bits"]] / PLAIN)

    @property
    def table(self) -> tuple[tuple[str, ...], list[list]]:
        """Heads and rows, the largest error first."""
        size = lambda paths: sum(self.found[path].size for path in paths)
        total = max(sum(self.squares.values()) / 2, 1e-30)  # of kinds and of quarters
        rows = []
        for part, paths in self.parts.items():
            square, weights = self.squares[part], size(paths) / size(self.found)
            shares = 100 * weights, 100 * square / total
            rows.append([part, len(paths), *shares, square**0.5])
        return self.HEADS, sorted(rows, key=lambda row: -row[-1])


# The command line


def requests(pipe: Pipeline, options: dict[str, Any], size: dict) -> list[Request]:
    """Clips of a model's own or a small size, of each prompt or of made-up ones."""
    given = {k: v for k in (*size, "steps") if (v := options.get(k)) is not None}
    how = size | {k: v for k, v in pipe.checkpoint.defaults.items() if k in size}
    seed = 10 if options.get("seed") is None else options["seed"]
    prompts = options.get("prompt") or [f"made up {n + 1}" for n in range(CLIPS)]
    how |= given | {"stages": "one"}
    return [Request(p, seed=seed + n, **how) for n, p in enumerate(prompts)]


def calls(pipe: Pipeline, request: Request, limit: Optional[int], kinds: int) -> int:
    """How often a clip calls the transformer: two runs, compared steps, all kinds."""
    (stage,) = pipe.plan(request).stages
    each = len(spread(stage.steps, min(limit or OF_A_KIND, OF_A_KIND)))
    compared = len(spread(stage.steps, limit or stage.steps))
    passes = len(guidance_passes(stage.guidance))
    return passes * (2 * stage.steps + compared + kinds * each)


def report(model: Pipeline, source: Pipeline, options: dict, size: dict) -> None:
    """Print what quantizing costs and, with a recipe's file, by each kind of layer."""
    if source.checkpoint.quantization:
        raise UserError("--against needs the unquantized source")
    limit, file = options["limit"], options["recipe"]
    how = layer_formats(model.checkpoint.quantization).get("", quantization())
    how = how if how["mode"] == "affine" else quantization()
    kinds = Kinds(how, source.checkpoint.shapes("transformer"))
    wanted, measured = requests(source, options, size), len(kinds.parts) if file else 0
    count = sum(calls(source, r, limit, measured) for r in wanted)
    print(f"{len(wanted)} clips, {count} calls of the transformer", flush=True)
    runs = [run(source, c) for c in clips(source, wanted, not options["prompt"])]
    html = []
    for text, part in compare(model, runs, limit):
        print(text, flush=True)
        html.append(part)
    model.free("transformer")  # `errors` keeps it; no other plan counts it
    if file:
        kinds.measure(source, runs, min(limit or OF_A_KIND, OF_A_KIND))
        recipe, expected = kinds.recipe()
        user_path(file).write_text(json.dumps(recipe, indent=1), "utf-8")
        text = f"wrote {file}: an error of x0 of {expected:.3g} is expected"
        print(f"\n{table(*kinds.table)}\n{text}")
        html.append(page.section("Layers", text, [page.table(*kinds.table, {0})]))
    if options["html"]:
        title = f"{options['model']} against {options['against']}"
        page.write(options["html"], title, html)
        print(f"wrote {options['html']}")


def auto(checkpoint: Checkpoint, how: dict[str, Any], size: dict) -> tuple[dict, float]:
    """The bits by layer from errors on made-up contexts, and the error to expect."""
    source, kinds = Pipeline(checkpoint), Kinds(how, checkpoint.shapes("transformer"))
    wanted = requests(source, {}, size)
    count = sum(calls(source, r, None, len(kinds.parts)) for r in wanted)
    LOG.info(f"measuring each kind of layer: at most {count} calls of the transformer")
    runs = [run(source, clip, decode=False) for clip in clips(source, wanted, True)]
    kinds.measure(source, runs, OF_A_KIND)
    LOG.info(table(*kinds.table))
    return kinds.recipe()
