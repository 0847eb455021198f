"""Looking inside when a picture is wrong: what every stage of a run does, weights beside
their source, known inputs to the decoder. `python -m ltx2.checks --help`."""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections import defaultdict, namedtuple
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Iterator, NamedTuple, Optional

import mlx.core as mx

from .base import Parser, UserError, run

if TYPE_CHECKING:  # imported where they are used, so that --help answers at once
    from .pipeline import Pipeline
    from .snapshot import Snapshot
    from .vae import VideoVAE
    from .weights import Checkpoint, Weights

EXPLOSION, COLLAPSE = 100, 0.1  # of a value, of a deviation
SILENCE = 1e-3  # of a waveform, whose deviation is its level: 0.01 to 0.3 if healthy
SIZE = {"height": 256, "width": 256, "num_frames": 9}  # of what is traced


class Report(NamedTuple):
    """What was measured, as lines to print, and what is wrong, a line each."""

    lines: list[str]
    faults: list[str]


def table(heads: list[str], rows: dict[str, list]) -> list[str]:
    """Aligned lines: a name, then numbers, then perhaps a word."""
    wide = max(map(len, [heads[0], *rows]))
    lines = [f"{heads[0]:<{wide}}" + "".join(f"{head:>11}" for head in heads[1:])]
    for name, row in rows.items():
        cells = [f"  {x}" if isinstance(x, str) else f"{x:>11.4g}" for x in row]
        lines.append("".join([f"{name:<{wide}}", *cells]).rstrip())
    return lines


# Stages of a run


Values = namedtuple("Values", "mean std low high")


class Tracer:
    """A `trace=` callback that keeps the values of every stage; chunks add up."""

    def __init__(self) -> None:
        self.chunks: dict[str, list] = defaultdict(list)

    def __call__(self, name: str, x: mx.array) -> None:
        x = x.astype(mx.float32)
        values = mx.stack([x.mean(), x.var(), x.min(), x.max()])
        self.chunks[name].append([x.size, *values.tolist()])

    @property
    def stages(self) -> dict[str, Values]:
        stages = {}
        for name, chunks in self.chunks.items():
            sizes, means, variances, lows, highs = zip(*chunks)
            mean = sum(n * m for n, m in zip(sizes, means)) / sum(sizes)
            away = ((m - mean) ** 2 for m in means)
            square = sum(n * (v + a) for n, v, a in zip(sizes, variances, away))
            std = math.sqrt(square / sum(sizes))
            stages[name] = Values(mean, std, min(lows), max(highs))
        return stages

    def marks(self) -> dict[str, list[str]]:
        """What is suspicious, by stage. A sign flip is a mean of the other sign, but of
        half to twice the size, than that of the same stream's stage before, both of
        them well away from zero beside their deviations."""
        marks, before = {}, {}
        for name, now in self.stages.items():
            sound = name.endswith("waveform")
            stream = "audio" if "audio" in name else "video"
            last, before[stream] = before.get(stream, now), now
            clear = all(abs(v.mean) > 0.1 * v.std for v in (last, now)) and not sound
            signs = {
                "not finite": not math.isfinite(now.mean),
                "explosion": max(now.high, -now.low) > EXPLOSION,
                "collapse": now.std < (SILENCE if sound else COLLAPSE),
                "sign flip": clear and -2 <= now.mean / last.mean <= -0.5,
            }
            marks[name] = [sign for sign, seen in signs.items() if seen]
        return marks

    def table(self, beside: Optional[Tracer] = None) -> str:
        """A line a stage; with another trace `beside`, how far mean or deviation has
        drifted from it, in parts of its deviation."""
        stages, marks = self.stages, self.marks()
        rows = {name: [*values] for name, values in stages.items()}
        for name, v in (beside.stages if beside else {}).items():
            if name in rows:
                away = max(abs(a - b) for a, b in zip(stages[name][:2], v))
                rows[name].append(away / max(v.std, 1e-12))
        for name in rows:
            rows[name].append(", ".join(marks[name]))
        heads = ["stage", "mean", "std", "min", "max", *(["drift"] if beside else [])]
        marked = [name for name in marks if marks[name]]
        first = f", the first is {marked[0]}" if marked else ""
        end = f"{len(marked)} of {len(marks)} marked{first}"
        return "\n".join([*table(heads, rows), end])


def trace(pipe: Pipeline, tracer: Tracer, start: Snapshot) -> None:
    """Trace a run from `start` on: its beginning, its decode, or anywhere between."""
    for name, x in start.latents.items():
        tracer(f"{name}.latents", x)
    for event in pipe.stream(start.request, trace=tracer, resume=start):
        if event.frames is not None:
            tracer("video.frames", mx.array(event.frames) / 255)
        elif event.step == 0 and not event.snapshot:
            print(f"{event.phase} ...", flush=True)


def starting_point(pipe: Pipeline, args: argparse.Namespace) -> Snapshot:
    """A run's beginning, a saved one, or one just before it decodes made-up latents."""
    from .pipeline import seeded_noise
    from .request import Request
    from .snapshot import Snapshot

    asked = {k: getattr(args, k) for k in (*SIZE, "seed", "steps")}
    asked = {k: v for k, v in asked.items() if v is not None}
    if args.prompt:
        return pipe.initial_snapshot(
            pipe.plan(Request(args.prompt, **{**SIZE, **asked}))
        )
    made_up = args.latents in ("zeros", "random")
    if args.steps or asked and not made_up:
        raise UserError(f"--latents {args.latents} leaves no choice of {[*asked][-1]}")
    if not made_up:
        return Snapshot.read(args.latents)
    job = pipe.plan(Request("", stages="one", **{**SIZE, **asked}))
    draw, scale = seeded_noise(job.request.seed), float(args.latents == "random")
    video, audio = pipe.vae.config, pipe.audio_vae.config
    shapes = {
        "video": (1, *job.stages[0].size.latent, video.latent_channels),
        "audio": (1, job.size.audio_tokens, audio.latent_bins, audio.z_channels),
    }
    latents = {name: scale * draw(name, shape) for name, shape in shapes.items()}
    return replace(pipe.initial_snapshot(job), stage=len(job.stages), latents=latents)


# Weights beside their source


def compare(converted: Checkpoint, source: Checkpoint) -> Report:
    """A converted model beside what it was made of. A fault is what is missing, too much
    or unequal, and a quantised layer that would be better if it were quantised anew."""
    if converted.provenance is None or source.quantization:
        raise UserError("compare takes a converted folder, then its unquantised source")
    rows, faults, errors = {}, [], {}
    for name in {**source.parts, **converted.parts}:
        ours, theirs = (
            s.weights(name) if name in s.parts else {} for s in (converted, source)
        )
        dtypes = {str(w.dtype).removeprefix("mlx.core.") for w in ours.values()}
        found = list(differences(ours, theirs, converted.quantization))
        layers = {key: error for key, error, _ in found if error is not None}
        wrong = [f"{name}: {key} {fault}" for key, _, fault in found if fault]
        rows[name] = [len(found), len(layers), len(wrong), ", ".join(sorted(dtypes))]
        faults += wrong
        errors |= layers
    for section in sorted(converted.config.keys() | source.config.keys()):
        if converted.config.get(section) != source.config.get(section):
            faults.append(f"config.json: {section} is not as in the source")
    lines = table(["component", "tensors", "quantised", "faults"], rows)
    return Report(lines + error_table(errors), faults)


def error_table(errors: dict[str, float]) -> list[str]:
    """Quantisation errors by kind of layer, the worst kind first, with its worst layer."""
    kinds = defaultdict(list)
    for key in sorted(errors, key=errors.get, reverse=True):
        kinds[re.sub(r".*blocks\.\d+\.|\.weight$", "", key)].append(key)
    rows = {}
    for kind, keys in kinds.items():
        mean = sum(errors[key] for key in keys) / len(keys)
        rows[kind] = [len(keys), mean, errors[keys[0]], keys[0]]
    heads = ["quantised", "layers", "mean error", "worst"]
    return ["", *table(heads, rows)] if rows else []


def differences(
    ours: Weights, theirs: Weights, how: Optional[dict[str, Any]]
) -> Iterator[tuple[str, Optional[float], Optional[str]]]:
    """Name, quantisation error and fault of each tensor, read and dropped one by one."""
    for key in sorted(theirs):
        path = key.removesuffix("weight")
        stored = [k for k in (key, f"{path}scales", f"{path}biases") if k in ours]
        yield key, *judge([ours.pop(k) for k in stored], theirs.pop(key), how)
        mx.clear_cache()
    yield from ((key, None, "is not in the source") for key in ours)


def judge(
    stored: list[mx.array], w: mx.array, how: Optional[dict[str, Any]]
) -> tuple[Optional[float], Optional[str]]:
    """Quantisation error and fault of what `w` is stored as: itself, perhaps in another
    dtype, or a quantised weight, its scales and biases."""
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
        error, seen = difference(mx.dequantize(*stored, **how), w)
        least, _ = difference(mx.dequantize(*mx.quantize(w, **how), **how), w)
    except (TypeError, ValueError):
        return None, f"is not {w.shape} quantised as {how}"
    good = error <= 1.01 * least + 1e-6
    return error, None if good else f"{seen}; quantising makes {least:.3g}"


def difference(ours: mx.array, theirs: mx.array) -> tuple[float, str]:
    """Frobenius norm of the difference beside that of the source, and in words."""
    a, b = (x.flatten().astype(mx.float32) for x in (ours, theirs))
    norms = mx.stack([mx.linalg.norm(x) for x in (a - b, a, b)]).tolist()
    error, size = (norm / max(norms[2], 1e-12) for norm in norms[:2])
    cosine = mx.inner(a, b).item() / max(norms[1] * norms[2], 1e-24)
    words = f"relative error {error:.3g}, cosine {cosine:.3f}, norm {size:.3g} times"
    return error, f"differs: {words} the source's"


# Known inputs


def known(vae: VideoVAE, seed: int = 10) -> Report:
    """What the decoder makes of latents, 9 frames of 192x128, that no model made; each
    picture is compared with the first."""
    from .pipeline import seeded_noise

    shape, draw = (1, 2, 4, 6, vae.config.latent_channels), seeded_noise(seed)
    latents, other = draw("latents", shape), draw("other", shape)
    own = {"noise": draw("noise", shape)} if vae.config.timestep_conditioning else {}
    inputs = {  # and how much they change the picture at least
        "random latent": (latents, own, 0),
        "another latent": (other, own, 0.02),
        "zero latent": (mx.zeros(shape), own, 0.02),
    }
    if own:
        inputs["another timestep"] = (latents, {**own, "timestep": 0.0}, 5e-4)
        inputs["another noise"] = (latents, {"noise": other}, 5e-4)
    rows, faults, first = {}, [], None
    for name, (x, options, least) in inputs.items():
        picture = vae.decode(x, **options)
        first = picture if first is None else first
        seen = measures(picture, first)
        rows[name] = [*seen.values()]
        faults += [f"{name}: {odd}" for odd in oddities(seen, least, not x.any())]
    return Report(table(["input", *seen], rows), faults)


def measures(picture: mx.array, first: mx.array) -> dict[str, float]:
    """Of a picture (1, F, H, W, 3) in [0, 1], and how far it is from the first one."""
    seen = {"brightness": picture.mean(), "spread": mx.std(picture)}
    seen |= zip(("red", "green", "blue"), picture.mean((0, 1, 2, 3)))
    seen["clipped"] = mx.logical_or(picture == 0, picture == 1).mean()
    seen["motion"] = mx.abs(picture[:, 1:] - picture[:, :-1]).mean()
    seen["difference"] = mx.abs(picture - first).mean()
    return {name: value.item() for name, value in seen.items()}


def oddities(seen: dict[str, float], least: float, plain: bool) -> list[str]:
    """What is odd about a picture, in words; that of a `plain` latent may be flat."""
    colours = [seen[name] for name in ("red", "green", "blue")]
    signs = {
        "not finite": not math.isfinite(seen["spread"]),
        "dark": seen["brightness"] < 0.15,
        "bright": seen["brightness"] > 0.85,
        "flat": seen["spread"] < 0.02 and not plain,
        "tinted": max(colours) - min(colours) > 0.3,
        "clipped": seen["clipped"] > 0.5,
        "the same in all frames": seen["motion"] < 1e-3 and not plain,
        "the same picture as of the random latent": seen["difference"] < least,
    }
    return [sign for sign, odd in signs.items() if odd]


# The command line


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m ltx2.checks", description=__doc__)
    model = Parser(add_help=False)
    model.add_argument("model", help="what generate.py takes as --model")
    checks = p.add_subparsers(dest="check", required=True)

    t = checks.add_parser("trace", parents=[model], help="values at every stage")
    start = t.add_mutually_exclusive_group(required=True)
    start.add_argument("--prompt", help="trace a whole run")
    start.add_argument("--latents", help="a decode: of zeros, random, or a saved file")
    for name, default in SIZE.items():
        t.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{default}")
    t.add_argument("--seed", type=int, help="10")
    t.add_argument("--steps", type=int, help="of a dev model's run")
    t.add_argument("--text-encoder", metavar="MODEL")
    dtypes = "bfloat16", "float32"
    t.add_argument("--dtype", default=dtypes[0], choices=dtypes)
    t.add_argument("--against", choices=dtypes, help="run in it too: what drifts?")

    c = checks.add_parser("compare", parents=[model], help="a folder and its source")
    c.add_argument("source", help="what the model was converted from")
    c.add_argument("--upsampler", metavar="FILE", action="append", default=[])

    checks.add_parser("known", parents=[model], help="decode known inputs")
    return p


def print_trace(args: argparse.Namespace) -> None:
    from . import pipeline

    tracers: list[Tracer] = []
    try:
        for dtype in filter(None, (args.dtype, args.against)):
            pipe = pipeline.load(args.model, args.text_encoder, dtype=dtype)
            start = starting_point(pipe, args)
            tracers.append(Tracer())
            trace(pipe, tracers[-1], start)
    finally:  # also of a run that a guard has stopped
        if tracers and tracers[0].chunks:
            print(tracers[0].table(*tracers[1:]))


def main() -> None:
    args = parser().parse_args()
    warnings.showwarning = lambda message, *_: print(f"note: {message}")
    if args.check == "trace":
        return print_trace(args)
    from .weights import open_model

    model = open_model(args.model)
    if args.check == "compare":
        report = compare(model, open_model(args.source, upsamplers=args.upsampler))
    else:
        report = known(model.load("vae", mx.float32))
    faults = [*report.faults[:20], f"{len(report.faults) or 'no'} faults"]
    print("\n".join([*report.lines, "", *faults]))
    sys.exit(1 if report.faults else 0)


if __name__ == "__main__":
    run(main)
