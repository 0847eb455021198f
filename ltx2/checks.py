"""Diagnostics: trace a run, compare weights, decode known latents, test the machine."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict, namedtuple
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Optional

import mlx.core as mx

from .base import LOG, Parser, PathName, UserError, dtype_name, run, table
from .guards import LARGEST, USUAL_CONTRAST, USUAL_LEVEL, USUAL_STD
from .options import check_range

if TYPE_CHECKING:  # imported where they are used, so that --help answers at once
    from .pipeline import Pipeline
    from .snapshot import Snapshot
    from .vae import VideoVAE
    from .weights import Checkpoint, Weights

SIZE = {"height": 256, "width": 256, "num_frames": 9}  # of a traced run
SPREAD = {"waveform": USUAL_LEVEL, "frames": USUAL_CONTRAST}  # on scales of their own


Report = tuple[str, list[str]]  # a table of measurements, and one line for each fault
Check = tuple[Optional[float], Optional[str]]  # of a tensor: error, fault
Values = namedtuple("Values", "mean std min max")


# Stages of a run


class Tracer:
    """A `trace=` callback that collects statistics by stage, of chunks together."""

    def __init__(self) -> None:
        self.chunks: dict[str, list] = defaultdict(list)
        self.sheet: Any = None  # a picture of the result

    def __call__(self, name: str, x: mx.array) -> None:
        x = x.astype(mx.float32)
        values = mx.stack([x.mean(), x.var(), x.min(), x.max()])
        self.chunks[name].append([x.size, *values.tolist()])

    @property
    def stages(self) -> dict[str, Values]:
        return {name: merged(chunks) for name, chunks in self.chunks.items()}

    def flags(self) -> dict[str, list[str]]:
        """Anomalies by stage. A sign flip: from one stage of a stream to the next the mean
        changes sign and less than twofold in size, both above a tenth of the deviation.
        """
        flags, previous = {}, {}
        for name, now in self.stages.items():
            least = SPREAD.get(name.rpartition(".")[2])
            last, previous[series(name)] = previous.get(series(name), now), now
            clear = all(abs(v.mean) > 0.1 * v.std for v in (last, now)) and not least
            conditions = {
                "not finite": not math.isfinite(now.mean),
                "explosion": max(now.max, -now.min) > LARGEST,
                "collapse": now.std < (least or USUAL_STD[0]),
                "sign flip": clear and -2 <= now.mean / last.mean <= -0.5,
            }
            flags[name] = [flag for flag, met in conditions.items() if met]
        return flags

    def rows(self, other: Optional[Tracer] = None) -> tuple[list[str], list[list]]:
        """Heads, and a row for each stage; with another trace also the drift: the change
        of mean or deviation, divided by the other's deviation."""
        stages, flags, rows = self.stages, self.flags(), []
        theirs = other.stages if other else {}
        for name, values in stages.items():
            v = theirs.get(name, Values(*[math.nan] * 4))
            change = max(abs(a - b) for a, b in zip(values[:2], v))
            drift = [change / max(v.std, 1e-12)] if other else []
            rows.append([name, *values, *drift, ", ".join(flags[name])])
        return ["stage", *Values._fields, *["drift"][: bool(other)], ""], rows

    def summary(self) -> str:
        flags = self.flags()
        flagged = [name for name in flags if flags[name]]
        first = f", the first is {flagged[0]}" if flagged else ""
        return f"{len(flagged)} of {len(flags)} flagged{first}"

    def table(self, other: Optional[Tracer] = None) -> str:
        return f"{table(*self.rows(other))}\n{self.summary()}"

    def html(self, other: Optional[Tracer] = None) -> Iterator[str]:
        """The table as parts of a page, with charts of stages of the same kind."""
        from . import page

        heads, rows = self.rows(other)
        marked = [n for n, row in enumerate(rows) if row[-1]]
        groups, charts = defaultdict(list), []
        for row in rows:
            groups[series(row[0])].append(row)
        for name, group in groups.items():
            if len(group) > 1:
                _, mean, std, low, high, *drift, _ = [*zip(*group)]
                inner = [a - b for a, b in zip(mean, std)], [*map(sum, zip(mean, std))]
                marks = {i: f"{r[0]}: {r[-1]}" for i, r in enumerate(group) if r[-1]}
                text = f"{name}: {min(low):.3g} to {max(high):.3g}"
                charts.append(page.chart(text, [mean], [(low, high), inner], marks))
                for line in drift:
                    text = f"{name}: drift up to {max(line):.3g}"
                    charts.append(page.chart(text, [line], marks=marks))
        text = "Line: mean; inner area: one deviation; outer area: minimum to maximum."
        yield page.section("Stages that follow each other", text, charts)
        stages = page.table(heads, rows, marked)
        yield page.section("All stages", self.summary(), [stages])


def merged(chunks: list) -> Values:
    """The statistics of all chunks (size, mean, variance, min, max) together."""
    sizes, means, variances, lows, highs = zip(*chunks)
    mean = sum(n * m for n, m in zip(sizes, means)) / sum(sizes)
    squares = (n * (v + (m - mean) ** 2) for n, m, v in zip(sizes, means, variances))
    return Values(mean, math.sqrt(sum(squares) / sum(sizes)), min(lows), max(highs))


def series(stage: str) -> str:
    """The chart that shows a stage: the blocks of a step, or the layers of a model."""
    stream = next((s for s in ("audio", "video") if s in stage), "")
    name = re.sub(r"\.block\d+\.\w+$|\.\w+$", "", stage)
    return name if stream in name else f"{name}, {stream}"


def trace(pipe: Pipeline, tracer: Tracer, start: Snapshot) -> None:
    """Trace a run from `start`: from any of its steps, or only its decode."""
    from .pipeline import Result
    from .sheet import Sheet

    for name, x in start.latents.items():
        tracer(f"{name}.latents", x)
    job = pipe.plan(start.request)
    sheet = Sheet(job.size.fps, job.request.color_space, count=4)
    for event in sheet.watch(pipe.stream(job, trace=tracer, resume=start)):
        if isinstance(event, Result):
            tracer.sheet = sheet.draw(event.waveform, event.sample_rate)
        if event.frames is not None:
            tracer("video.frames", mx.array(event.frames) / 255)
        elif event.step == 0 and not event.snapshot:
            LOG.info(f"{event.phase} ...")


def starting_point(pipe: Pipeline, args: argparse.Namespace) -> Snapshot:
    """The first step of a run, saved latents, or synthetic latents before decoding."""
    from .request import Request
    from .run import seeded_noise
    from .snapshot import Snapshot

    own = {k: v for k, v in pipe.checkpoint.defaults.items() if k in SIZE}
    names = *SIZE, "seed", "steps"
    passed = {k: v for k in names if (v := getattr(args, k)) is not None}
    options = {**SIZE, "seed": 10, **own, **passed}
    if args.prompt is not None:
        return pipe.initial_snapshot(pipe.plan(Request(args.prompt, **options)))
    synthetic = args.latents in ("zeros", "random")
    if args.steps or passed and not synthetic:
        option = f"--{[*passed][-1].replace('_', '-')}"
        raise UserError(f"{option} cannot be combined with --latents {args.latents}")
    if not synthetic:
        return Snapshot.read(args.latents)
    job = pipe.plan(Request("only decoded", stages="one", **options))
    draw, scale = seeded_noise(job.request.seed), float(args.latents == "random")
    video, audio = pipe.vae.config, pipe.audio_vae.config
    shapes = {
        "video": (1, *job.stages[0].size.latent, video.latent_channels),
        "audio": (1, job.size.audio_tokens, audio.latent_bins, audio.z_channels),
    }
    latents = {name: scale * draw(name, shape) for name, shape in shapes.items()}
    return replace(pipe.initial_snapshot(job), stage=len(job.stages), latents=latents)


# Weights and their source


def compare(converted: Checkpoint, source: Checkpoint) -> Report:
    """Compare a converted model's tensors and quantization with its source."""
    if converted.provenance is None or source.quantization:
        raise UserError("compare needs a converted folder, then its unquantized source")
    rows, faults, errors = [], [], defaultdict(list)
    for name in {**source.parts, **converted.parts}:
        ours = converted.weights(name) if name in converted.parts else {}
        theirs = source.weights(name) if name in source.parts else {}
        dtypes = {dtype_name(w.dtype) for w in ours.values()}
        found = list(differences(ours, theirs, converted.quantization))
        layers = [(error, key) for key, error, _ in found if error is not None]
        wrong = [f"{name}: {key} {fault}" for key, _, fault in found if fault]
        for error, key in layers:
            errors[re.sub(r".*blocks\.\d+\.|\.weight$", "", key)].append((error, key))
        counts = len(found), len(layers), len(wrong)
        rows.append([name, *counts, ", ".join(sorted(dtypes))])
        faults += wrong
    for section in sorted(converted.config.keys() | source.config.keys()):
        if converted.config.get(section) != source.config.get(section):
            faults.append(f"config.json: {section} differs from the source")
    text = table(["component", "tensors", "quantized", "faults", "dtypes"], rows)
    rows = []
    for kind in sorted(errors, key=lambda kind: max(errors[kind]), reverse=True):
        values, _ = zip(*errors[kind])
        rows.append([kind, len(values), sum(values) / len(values), *max(errors[kind])])
    heads = ["quantized", "layers", "mean error", "worst", "layer"]
    return f"{text}\n\n{table(heads, rows)}" if rows else text, faults


def differences(
    ours: Weights, theirs: Weights, quantization: Optional[dict[str, Any]]
) -> Iterator[tuple[str, Optional[float], Optional[str]]]:
    """Name, quantization error and fault of each tensor; one is in memory at a time."""
    from .linear import layer_format

    for key in sorted(theirs):
        path = key.removesuffix("weight")
        stored = [k for k in (key, f"{path}scales", f"{path}biases") if k in ours]
        w, stored = theirs.pop(key), [ours.pop(k) for k in stored]
        mx.eval(w)  # before others are read: laid out for MLX, it is in memory twice
        how = quantization and layer_format(quantization, path.removesuffix("."))
        yield key, *check_tensor(stored, w, how)
        del w, stored
        mx.clear_cache()
    yield from ((key, None, "is not in the source") for key in ours)


def check_tensor(stored: list[mx.array], w: mx.array, how: Optional[dict]) -> Check:
    """Error and fault of the tensor, or the parts of a quantized one, that store `w`."""
    if not stored:
        return None, "is missing"
    if mx.issubdtype(stored[-1].dtype, mx.floating):
        w = w.astype(stored[-1].dtype)
    if len(stored) == 1:
        if stored[0].shape != w.shape:
            return None, f"is {stored[0].shape}, not {w.shape}"
        same = mx.array_equal(stored[0], w).item()
        return None, None if same else difference(stored[0], w)[1]
    try:
        error, text = difference(mx.dequantize(*stored, **how), w)
        least, _ = difference(mx.dequantize(*mx.quantize(w, **how), **how), w)
    except (TypeError, ValueError):
        return None, f"is not {w.shape} quantized with {how}"
    good = error <= 1.01 * least + 1e-6
    return error, None if good else f"{text}; quantizing gives {least:.3g}"


def difference(ours: mx.array, theirs: mx.array) -> tuple[float, str]:
    """The relative error (Frobenius norm), and a description of the difference."""
    a, b = (x.flatten().astype(mx.float32) for x in (ours, theirs))
    norms = mx.stack([mx.linalg.norm(x) for x in (a - b, a, b)]).tolist()
    error, size = (norm / max(norms[2], 1e-12) for norm in norms[:2])
    cosine = mx.inner(a, b).item() / max(norms[1] * norms[2], 1e-24)
    values = f"relative error {error:.3g}, cosine {cosine:.3f}, norm {size:.3g} times"
    return error, f"differs: {values} the source's"


# Known latents


def probe_decoder(vae: VideoVAE) -> Report:
    """Decode synthetic latents, 9 frames of 192x128; anomalies are faults."""
    from .run import seeded_noise

    shape, draw = (1, 2, 4, 6, vae.config.latent_channels), seeded_noise(10)
    latents, other = draw("latents", shape), draw("other", shape)
    noise = {"noise": draw("noise", shape)} if vae.config.timestep_conditioning else {}
    inputs = {  # and by how much the picture has to change
        "random latent": (latents, noise, 0),
        "another latent": (other, noise, 0.02),
        "zero latent": (mx.zeros(shape), noise, 0.02),
    }
    if noise:
        inputs["another timestep"] = (latents, {**noise, "timestep": 0.0}, 5e-4)
        inputs["another noise"] = (latents, {"noise": other}, 5e-4)
    rows, faults, first = [], [], None
    for name, (x, options, least) in inputs.items():
        video = vae.decode(x, **options)
        first = video if first is None else first
        values = statistics(video, first)
        rows.append([name, *values.values()])
        faults += [f"{name}: {a}" for a in anomalies(values, least, not x.any())]
    return table(["input", *values], rows), faults


def statistics(video: mx.array, first: mx.array) -> dict[str, float]:
    """Statistics of a video (1, F, H, W, 3) in [0, 1]; its difference from the first."""
    values = {"brightness": video.mean(), "contrast": mx.std(video)}
    values |= zip(("red", "green", "blue"), video.mean((0, 1, 2, 3)))
    values["clipped"] = mx.logical_or(video == 0, video == 1).mean()
    values["motion"] = mx.abs(video[:, 1:] - video[:, :-1]).mean()
    values["difference"] = mx.abs(video - first).mean()
    return {name: value.item() for name, value in values.items()}


def anomalies(values: dict[str, float], least: float, plain: bool) -> list[str]:
    """Anomalies of a decoded video; a `plain` latent's may be flat and static."""
    colors = [values[name] for name in ("red", "green", "blue")]
    conditions = {
        "not finite": not math.isfinite(values["contrast"]),
        "dark": values["brightness"] < 0.15,
        "bright": values["brightness"] > 0.85,
        "flat": values["contrast"] < USUAL_CONTRAST and not plain,
        "tinted": max(colors) - min(colors) > 0.3,
        "clipped": values["clipped"] > 0.5,
        "all frames are the same": values["motion"] < 1e-3 and not plain,
        "same result as for the random latent": values["difference"] < least,
    }
    return [name for name, met in conditions.items() if met]


# The command line


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m ltx2.checks", description=__doc__)
    model = Parser(add_help=False)
    model.add_argument("model", help="model as for generate.py --model")
    checks = p.add_subparsers(dest="check", required=True)

    size = Parser(add_help=False)
    for name, default in SIZE.items():
        flag = f"--{name.replace('_', '-')}"
        size.add_argument(flag, type=int, help=f"(default: {default}, or the model's)")
    size.add_argument("--seed", type=int, help="(default: 10)")
    size.add_argument("--steps", type=int, help="number of steps of a dev model")
    size.add_argument("--text-encoder", metavar="MODEL", help="Gemma 3 to use")
    dtypes = "bfloat16", "float32"
    size.add_argument("--dtype", default=dtypes[0], choices=dtypes)
    size.add_argument("--html", metavar="FILE", help="page to write, with charts")

    t = checks.add_parser("trace", parents=[model, size], help="statistics by stage")
    start = t.add_mutually_exclusive_group(required=True)
    start.add_argument("--prompt", help="trace a complete run")
    start.add_argument("--latents", help="trace a decode: zeros, random, or a file")
    t.add_argument("--against", choices=dtypes, help="dtype of a second run to compare")

    text = "errors of a converted folder against its source"
    c = checks.add_parser("compare", parents=[model], help=text)
    c.add_argument("source", help="what the model was converted from")
    c.add_argument("--upsampler", metavar="FILE", action="append", default=[])

    text = "what quantizing costs: errors of x0, picture and sound"
    q = checks.add_parser("quality", parents=[model, size], help=text)
    q.add_argument("--against", metavar="SOURCE", required=True, help="not quantized")
    text = "prompt to run; repeatable (default: two made-up contexts, without a text encoder)"
    q.add_argument("--prompt", action="append", help=text)
    text = "also measure each kind of layer, and save the bits by layer that follow"
    q.add_argument("--recipe", metavar="FILE", help=text)
    text = "steps of a clip that are compared (default: all; 4 for a kind of layer)"
    q.add_argument("--limit", type=int, help=text)

    text = "anomalies of decoded synthetic latents"
    checks.add_parser("probe", parents=[model], help=text, aliases=["known"])

    d = checks.add_parser("device", help="this machine: kernels, rates, memory, disk")
    text = "its disk is measured (default: .)"
    d.add_argument("--folder", type=PathName, default=".", help=text)
    return p


def print_device(folder: str) -> None:
    from . import device

    if not Path(folder).is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    print(device.machine(), flush=True)
    states = []
    for row in device.checks(Path(folder)):  # printed as they come: a minute is long
        states.append(row.state)
        advice = f"  ->  {row.advice}" if row.advice else ""
        print(f"{row.check:25}  {row.state:5}  {row.found}{advice}", flush=True)
    print(f"{states.count('wrong')} wrong, {states.count('slow')} slow")
    sys.exit(1 if "wrong" in states else 0)


def print_trace(args: argparse.Namespace) -> None:
    from . import pipeline

    tracers: list[Tracer] = []
    dtypes = [args.dtype, *filter(None, [args.against])]
    try:
        for dtype in dtypes:
            pipe = pipeline.load(args.model, args.text_encoder, dtype=dtype)
            tracers.append(Tracer())
            trace(pipe, tracers[-1], starting_point(pipe, args))
    finally:  # also when a result is rejected
        if tracers and tracers[0].chunks:
            print(tracers[0].table(*tracers[1:]))
            if args.html:
                write_trace(args, tracers, dtypes)


def write_trace(args: Any, tracers: list[Tracer], dtypes: list[str]) -> None:
    from . import page

    text = f"{args.prompt or f'latents: {args.latents}'} ({', '.join(dtypes)})"
    sheets = [(t.sheet, d) for t, d in zip(tracers, dtypes) if t.sheet is not None]
    pictures = [page.picture(*sheet) for sheet in sheets]
    parts = [page.section("Result", text, pictures), *tracers[0].html(*tracers[1:])]
    page.write(args.html, f"Trace of {args.model}", parts)
    print(f"wrote {args.html}")


def main() -> None:
    args = parser().parse_args()
    if outputs := [x for k in ("html", "recipe") if (x := getattr(args, k, None))]:
        from .media import check_output

        for path in outputs:
            check_output(path)
    if args.check == "quality":
        from . import pipeline, quality

        if args.limit is not None:
            check_range("--limit", args.limit, 1, 1000)
        how = {"text_encoder": args.text_encoder, "dtype": args.dtype}
        pipes = (pipeline.load(name, **how) for name in (args.model, args.against))
        return quality.report(*pipes, vars(args), SIZE)
    if args.check == "trace":
        return print_trace(args)
    if args.check == "device":
        return print_device(args.folder)
    from .weights import open_model

    model = open_model(args.model)
    if args.check == "compare":
        source = open_model(args.source, upsamplers=args.upsampler)
        text, faults = compare(model, source)
    else:
        text, faults = probe_decoder(model.load("vae", mx.float32))
    print(text, "", *faults[:20], f"{len(faults) or 'no'} faults", sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    run(main)
