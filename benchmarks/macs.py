"""Which model runs on which Mac, and how long a clip takes, for the README: computed.

    python benchmarks/macs.py

Memory is the planner's, for Metal, of models whose files are headers only: the released
names and shapes, converted as convert.py does it. Times are counted operations by published
rates of matrix products and by the shares of them in ltx2/timing.py. Nothing here was
measured on a Mac. With --write the tables of the README are replaced.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import mlx.core as mx
from convert_memory import ROOT, TESTS
from full_width import checkpoints, encoder_config, encoder_tensors

sys.path[:0] = [str(ROOT), str(TESTS)]

import released as layouts  # noqa: E402

from ltx2 import chips, conversion, hub, memory, quantization, weights  # noqa: E402
from ltx2.pipeline import Pipeline  # noqa: E402
from ltx2.request import Request  # noqa: E402
from ltx2.stages import Job  # noqa: E402
from ltx2.timing import HIGH, LOW, TimePlan  # noqa: E402
from ltx2.work import operations  # noqa: E402

README = ROOT / "README.md"
BEGIN, END = (
    "<!-- macs: python benchmarks/macs.py --write -->\n\n",
    "<!-- end of macs -->",
)
MODELS = {  # configuration and upsampler in tests/layouts
    "LTX-2 19B": ("ltx-2-19b-distilled", "ltx-2-spatial-upscaler-x2-1.0"),
    "LTX-2.3 22B": ("ltx-2.3-22b", "ltx-2.3-spatial-upscaler-x2-1.0"),
    "LTX-2.5 22B": ("ltx-2.5-22b", None),
}
SIZES = {"1536x1024": (1536, 1024), "768x512": (768, 512)}
# GB of memory: what Metal recommends to use at most, as published logs of llama.cpp have
# it: 10922 MiB of 16 GB, 21845 of 32, 49152 of 64.
MEMORY = {
    n: n * 2**30 * (2 / 3 if n <= 32 else 3 / 4) for n in (8, 16, 24, 32, 64, 128)
}
Phases = dict[str, memory.Footprint]
RATES = {  # TFLOP/s of a product with 16 bits
    "M4": 2.8,  # dev.to/tinyalg, "2.78 TFLOPS on a fanless MacBook Air", MLX
    "M1 Max": 7.9,  # mlx pull request 4216: 17.2 ms for 512x6656x19968, 4 bits, float16
    "M4 Max": 12.3,  # zzc0721/torch-performance-test-data, issue 65: bfloat16, 8192
    "M3 Ultra": 20.5,  # mlx issue 4246: 4 bits
}

HEADS = (
    "model bits download disk text steps streamed decoding".split()
    + [f"{n} GB" for n in MEMORY],
    ["model", "clip", "PFLOP", *RATES],
)


def header(name: str, tensors: Mapping[str, mx.array]) -> hub.File:
    """A file of such tensors that is only its header."""
    names = {dtype: kind for kind, dtype in hub.DTYPES.items() if kind != "F8_E4M3"}
    f = hub.File(name, sum(w.nbytes for w in tensors.values()), sha256="0" * 64)
    header = {key: (names[w.dtype], w.shape) for key, w in tensors.items()}
    f._headers = header, {"format": "mlx"}
    return f


@cache
def released(name: str) -> weights.Checkpoint:
    """A released model by its layouts."""
    config, upsampler = MODELS[name]
    files = [layouts.released(upsampler, upsampler)] if upsampler else []
    source = layouts.model(config, *files)
    source.kind = "distilled"
    for f in source.files:
        shapes = (shape for _, shape in f.header.values())
        f.size, f.sha256 = 2 * sum(map(math.prod, shapes)), "0" * 64
    return source


@cache
def converted(name: str, bits: int) -> weights.Checkpoint:
    """As convert.py makes it, with 16 bits unchanged."""
    source, how = released(name), None
    if bits < 16:
        how = quantization.choose(None, None, bits, None)
    if bits == 4:
        how = quantization.recipe(None, how, source.shapes("transformer"))
    recipe, files = conversion.Conversion(source, how), []
    for name in source.components:
        files += [header(*item) for item in recipe.files(name).items()]
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(recipe.config()))
        return weights.converted([hub.File(path.name, 0, path), *files], {})


@cache
def encoder() -> hub.File:
    """Gemma 3 12B in 4 bits."""
    return header(
        "model.safetensors", encoder_tensors(encoder_config(checkpoints.GEMMA))
    )


@contextmanager
def metal() -> Iterator[None]:
    """Plans are those of a Mac, wherever this runs; of an M1, which needs most."""
    chip = chips.chip_named("applegpu_g13")
    mac = {"this_chip": lambda: chip, "available": lambda: 10**12}
    device = mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu))
    with device, mock.patch.multiple(memory, **mac):
        yield


@cache
def planned(name: str, bits: int, size: str) -> tuple[Pipeline, Job, Phases]:
    """A model, its job, and memory by phase. What reads 2.5's text is not published."""
    pipe = Pipeline(converted(name, bits), dtype=mx.bfloat16)
    (width, height), has_text = SIZES[size], pipe.checkpoint.version < weights.GEMMA_4
    options = {"prompt": "", "width": width, "height": height, "num_frames": 121}
    encoders = (
        [encoder()] if has_text else []
    )  # imports mlx_lm, which asks for a device
    with metal(), TemporaryDirectory() as folder:
        if has_text:
            options["prompt"] = "a cat " * 40
        else:
            options["contexts_file"] = f"{folder}/contexts.safetensors"
            widths = {"video_context": 4096, "audio_context": 2048}
            contexts = {k: mx.zeros((1, 1, n)) for k, n in widths.items()}
            mx.save_safetensors(options["contexts_file"], contexts)
        job = pipe.plan(Request(**options))
        phases = dict(job.memory.phases)
        if has_text:
            phases["text"] = pipe._estimator.text(1, encoders)
    return pipe, job, phases


def verdict(full: memory.MemoryPlan, draft: memory.MemoryPlan) -> str:
    """How a model runs in the memory of the plans."""
    streamed = replace(full, streamed=True)
    if full.fits:
        return "yes"
    if streamed.fits:
        return "streamed"
    return "draft" if replace(draft, streamed=True).fits else "no"


def memory_row(name: str, bits: int) -> list[str]:
    found = [planned(name, bits, size) for size in SIZES]
    (pipe, _, full), (*_, draft) = found
    text_side = encoder().size * ("text" in full)
    models = released(name), pipe.checkpoint
    sizes = [text_side + sum(f.size for f in model.files) for model in models]
    text = [full["text"].total()] if "text" in full else []
    steps = [need for phase, need in full.items() if phase.startswith("stage")]
    peaks = [max(n.total(streamed) for n in steps) for streamed in (False, True)]
    decoding = max(full["video"].total(), full["audio"].total())
    row = [f"{n / 1e9:.1f}" for n in (*sizes, *text, *peaks, decoding)]
    row[2:2] = [] if text else ["?"]
    for limit in map(int, MEMORY.values()):
        known = text or limit > 10**10  # whether the text may matter
        plans = [memory.MemoryPlan(phases, limit) for phases in (full, draft)]
        row.append(verdict(*plans) if known else "?")
    return [name, str(bits), *row]


def time_row(name: str, size: str, bits: int = 4) -> list[str]:
    """Minutes from and to. The work does not depend on the bits."""
    pipe, job, _ = planned(name, bits, size)
    work = operations(job, pipe.checkpoint)
    phases = {stage.name: stage.phase for stage in job.stages}
    work = {phases.get(k, k): n for k, n in work.items()}
    row = [name, size, f"{sum(work.values()) / 1e15:.2f}"]
    for rate in RATES.values():
        plan = TimePlan(work, rate * 1e12, LOW, HIGH, "")
        ends = map(sum, zip(*map(plan.seconds, work)))
        row.append(" to ".join(minutes(n) for n in ends))
    return row


def minutes(seconds: float) -> str:
    """With two digits."""
    return f"{float(f'{seconds / 60:.2g}'):g}"


def tables() -> str:
    """Both, in Markdown."""
    text = ""
    memory_rows = [memory_row(name, bits) for name in MODELS for bits in (4, 8, 16)]
    time_rows = [time_row(name, size) for name in MODELS for size in SIZES]
    titles = "Memory", "Minutes"
    for title, heads, rows in zip(titles, HEADS, (memory_rows, time_rows)):
        lines = [heads, ["---"] * len(heads), *rows]
        text += f"{title}, *computed*:\n\n"
        text += "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    write, found = parser.parse_args().write, tables()
    if write:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(before + BEGIN + found + END + rest.split(END)[1])
    else:
        print(found, end="")


if __name__ == "__main__":
    sys.exit(main())
