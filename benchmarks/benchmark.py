"""Time and memory of each component and of runs; estimates for 19B on this machine.

    python benchmarks/benchmark.py --json results.json

Weights are random: small checkpoints, built at each start, and one block of the released
width. Each figure is the median of several runs after a warm-up; functions that are compared
are run alternately, so that other load on the machine affects all of them.
"""

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402

from ltx2 import latents, parallel, pipeline, vae, weights  # noqa: E402
from ltx2.conversion import quant_predicate, quantization  # noqa: E402
from ltx2.defaults import default_guidance  # noqa: E402
from ltx2.dit import DiT, DiTConfig, Tokens  # noqa: E402
from ltx2.guidance import guidance_passes  # noqa: E402
from ltx2.linear import quantize  # noqa: E402
from ltx2.request import Request  # noqa: E402

CONFIGS = json.loads((ROOT / "tests" / "data" / "configs.json").read_text())


def measure(runs, **functions):
    """Median seconds and peak bytes above those already in use, of each function."""
    seconds, peaks = ({name: [] for name in functions} for _ in range(2))
    for run in range(runs + 1):
        order = list(functions) if run % 2 else list(functions)[::-1]
        for name in order:
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(functions[name]())
            mx.synchronize()
            if run:
                seconds[name].append(time.perf_counter() - start)
                peaks[name].append(mx.get_peak_memory() - before)
            mx.clear_cache()
    median = statistics.median
    return {k: (median(seconds[k]), median(peaks[k])) for k in functions}


@contextlib.contextmanager
def flops():
    """Count the floating-point operations of matmuls and attention without computing
    them."""
    count = []

    def linear(layer, x):
        outputs = layer.weight.shape[0]
        count.append(2 * x.size * outputs)
        return mx.zeros((*x.shape[:-1], outputs), x.dtype)

    def attend(q, k, v, **options):
        count.append(4 * q.size * k.shape[2])
        return mx.zeros(q.shape, q.dtype)

    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (nn.Linear, "__call__", linear),
            (nn.QuantizedLinear, "__call__", linear),
            (mx.fast, "scaled_dot_product_attention", attend),
            (mx, "async_eval", lambda *arrays: None),
        ):
            stack.enter_context(mock.patch.object(target, name, new))
        yield count


def dit_config(name, **changes):
    section = CONFIGS[name]["transformer"] | changes
    return DiTConfig.from_dict({"audio_in_channels": 128} | section)


def step(model, size, names=("cond",)):
    """A forward of video and audio with the dev model's guidance passes of these names."""
    width, height, frames = size
    shape = (latents.latent_frames(frames), height // 32, width // 32)
    c, sound = model.config, latents.audio_tokens(frames, 24)
    ropes = (
        model.video_rope(latents.video_bounds(*shape, 24)),
        model.audio_rope(latents.audio_bounds(sound)),
    )
    channels = c.in_channels, c.audio_in_channels
    level = mx.array([0.5])
    streams = []
    for rope, n in zip(ropes, channels):
        count = rope[0][0].shape[1]
        x = mx.random.normal((1, count, n))
        streams.append(Tokens(x, level, level, *rope, keyframes=mx.zeros(count)))
    text_dims = [c.caption_channels] * 2
    if c.caption_proj_before_connector:
        text_dims = c.cross_attention_dim, c.audio_cross_attention_dim
    contexts, negative = (
        tuple(mx.random.normal((1, 1024, n)) for n in text_dims) for _ in range(2)
    )
    source = argparse.Namespace(
        config={"transformer": {"num_layers": c.num_layers}}, version=(2, 3)
    )
    passes = guidance_passes(default_guidance(source))
    texts = model.project_text([contexts, negative])
    mx.eval(contexts, negative, [s.latent for s in streams], ropes)  # not texts: slow
    return lambda: model(*streams, texts, [passes[name] for name in names])


PASSES = ("cond", "uncond", "perturbed", "isolated")


def count_flops(function):
    with flops() as count:
        function()
    return sum(count)


def guided_ratio(name, size):
    """FLOPs of a step with four passes divided by those of a plain forward, full size."""
    model = DiT(dit_config(name))
    plain, guided = (count_flops(step(model, size, n)) for n in (("cond",), PASSES))
    return guided / plain


def exchanged(name, size, machines):
    """Bytes that each machine sends in a step of four passes, by --parallel mode."""
    group, sums = mock.Mock(size=lambda: machines, rank=lambda: 0), []
    ring = 2 * (machines - 1) / machines  # times the bytes to sum
    with mock.patch.object(mx.distributed, "all_sum") as all_sum:
        all_sum.side_effect = lambda x, group: sums.append(x.nbytes) or x
        sent = {}
        for way in ("passes", "shards"):
            sums.clear()
            model = DiT(dit_config(name))
            model.set_dtype(mx.bfloat16)
            if way == "shards":
                model.shard(group)
            else:
                model = parallel.PassParallel(model, group)
            count_flops(step(model, size, PASSES))
            sent[way] = ring * sum(sums)
    return sent


def with_matmul(dtype, runs, **functions):
    """`measure`, and the FLOPs a second of a square matmul run alternately with them."""
    size = 2048 if mx.default_device().type == mx.cpu else 8192
    a, b = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    mx.eval(a, b)
    found = measure(runs, **functions, matmul=lambda: a @ b)
    return found, 2 * size**3 / found.pop("matmul")[0]


def released_block(name, size, dtype, bits, runs, target_seconds):
    """Seconds of a forward of the released transformer, estimated from one block; the clip
    is shortened until a block takes about `target_seconds`, then scaled by FLOPs."""
    width, height, frames = size
    model = DiT(dit_config(name, num_layers=1))
    count = lambda frames: count_flops(step(model, (width, height, frames)))
    _, rate = with_matmul(dtype, 1)
    short = frames
    while short > 9 and count(short) / rate > target_seconds:
        short = (short - 1) // 16 * 8 + 1
    whole, part = count(frames), count(short)
    if bits:
        picked = lambda path, _: quant_predicate(path)
        quantize(model, **quantization(bits=bits), class_predicate=picked)
    model.set_dtype(dtype)
    weights.evaluate(w for _, w in tree_flatten(model.parameters()))
    block = step(model, (width, height, short))
    found, rate = with_matmul(dtype, runs, block=block)
    seconds, peak = found["block"]
    layers = CONFIGS[name]["transformer"]["num_layers"]
    return {
        "seconds": layers * seconds * whole / part,
        "measured_frames": short,
        "utilization": part / seconds / rate,
        "buffers": peak,
    }


def decoding(model, side, frames, at_once=vae.LATENTS_PER_CHUNK):
    """A decode of random latents that drops each frame after it is decoded."""
    x = mx.random.normal((1, frames, side, side, model.config.latent_channels))
    noise = x if model.config.timestep_conditioning else None

    def decode():
        with mock.patch.object(vae, "LATENTS_PER_CHUNK", at_once):
            for _ in model.decode_stream(x, noise=noise):
                pass
        return []

    mx.eval(x)
    return decode


def components(source, dtype, runs):
    """Each component of a small model; decodes of several lengths for comparison."""
    load = partial(source.load, dtype=dtype)
    video_vae, audio_vae, vocoder = map(load, ("vae", "audio_vae", "vocoder"))
    connectors = load("connectors")
    states = [
        mx.random.normal((1, 60, connectors.config.caption_channels)).astype(dtype)
        for _ in range(connectors.config.encoder_states)
    ]
    sound = mx.random.normal((1, 50, 16, 8))
    mel = audio_vae.decode(sound)
    frames = mx.random.uniform(-1, 1, (1, 17, 128, 128, 3))
    mx.eval(states, sound, mel, frames)
    results = measure(
        runs,
        connectors=lambda: connectors(states),
        vae_encode=lambda: video_vae.encode(frames),
        audio_vae_decode=lambda: audio_vae.decode(sound),
        vocoder=lambda: vocoder(mel),
        load_transformer=lambda: source.load("transformer", dtype).parameters(),
    )
    return results | measure(
        runs,
        vae_decode_8=decoding(video_vae, 4, 8),
        vae_decode_24=decoding(video_vae, 4, 24),
        vae_decode_24_at_once=decoding(video_vae, 4, 24, at_once=24),
    )


def steps(source, dtype, size, runs):
    """A plain forward and a guided step, and their shares of the matmul rate."""
    model = source.load("transformer", dtype)
    functions = {"plain": step(model, size), "four_passes": step(model, size, PASSES)}
    found, rate = with_matmul(dtype, runs, **functions)
    used = {k: count_flops(f) / found[k][0] / rate for k, f in functions.items()}
    return found, used


def denoising_runs(path, encoder, dtype, runs):
    """A short video up to its latents, with blocks in memory and with --low-memory."""
    contexts = pipeline.load(path, encoder, "distilled", dtype).encode_prompts(
        ["a dog"]
    )

    def run(low_memory):
        pipe = pipeline.load(path, encoder, "distilled", dtype, low_memory=low_memory)
        size = {
            "height": 256,
            "width": 256,
            "num_frames": 49,
            "sigmas": (1.0, 0.5, 0.0),
        }
        events = pipe.stream(Request("a dog", **size), contexts=contexts)
        latents = next(e for e in events if e.phase == "latents").snapshot.latents
        events.close()
        return latents

    return measure(runs, run=partial(run, False), run_low_memory=partial(run, True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = mx.default_device().type != mx.cpu
    add = parser.add_argument
    add("--dtype", default="bfloat16" if gpu else "float32")
    add("--runs", type=int, default=5)
    add("--bits", type=int, default=4, help="of the released block (0: not quantized)")
    add("--size", default="768x512x121", help="WIDTHxHEIGHTxFRAMES of the estimate")
    add(
        "--target-seconds",
        type=float,
        default=10,
        help="shorten the clip until a released block takes this long",
    )
    add("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    dtype, size = getattr(mx, args.dtype), tuple(map(int, args.size.split("x")))

    machine = {
        "device": str(mx.default_device()),
        **{k: str(v) for k, v in mx.device_info().items()},
        "platform": platform.platform(),
        "mlx": mx.__version__,
        "dtype": args.dtype,
    }
    print(*(f"{k}: {v}" for k, v in machine.items()), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        build = partial(checkpoints.build, folder=folder)
        # As deep as the released models, but narrow.
        sizes = checkpoints.widths(heads=4, video=64, audio=32)
        sizes["connector_attention_head_dim"] = 64
        sizes["audio_connector_attention_head_dim"] = 32
        path = str(build("ltx-2.3", transformer={"num_layers": 48, **sizes}))
        encoder = str(build("gemma3"))
        source = weights.open_model(path)
        found, used = steps(source, dtype, (256, 256, 49), args.runs)
        found |= components(source, dtype, args.runs)
        found |= denoising_runs(path, encoder, args.dtype, max(args.runs // 2, 1))
    print(f"{'small model':<22}{'seconds':>10}{'peak MB':>10}")
    for name, (seconds, peak) in found.items():
        print(f"{name:<22}{seconds:>10.3f}{peak / 1e6:>10.1f}")

    print(
        f"share of the matmul rate: {used['plain']:.0%} and {used['four_passes']:.0%}"
    )

    second = lambda name: found[name][0]
    ratios = {
        "time of a step of four passes / plain forward": second("four_passes")
        / second("plain"),
        "FLOPs of the same, LTX-2 19B at "
        + args.size: guided_ratio("ltx-2-19b-dev", size),
        "FLOPs of the same, LTX-2.3 22B": guided_ratio("ltx-2.3-22b", size),
        "peak memory of decoding 24 / 8 latent frames": found["vae_decode_24"][1]
        / found["vae_decode_8"][1],
        "time of decoding 24 as a stream / at once": second("vae_decode_24")
        / second("vae_decode_24_at_once"),
        "peak memory of the same": found["vae_decode_24"][1]
        / found["vae_decode_24_at_once"][1],
        "time of a run with / without --low-memory": second("run_low_memory")
        / second("run"),
        "peak memory of the same run": found["run_low_memory"][1] / found["run"][1],
    }
    print()
    for name, ratio in ratios.items():
        print(f"{name:<52}{ratio:>6.2f}")

    block = released_block(
        "ltx-2-19b-dev", size, dtype, args.bits, args.runs, args.target_seconds
    )
    print(
        f"\nLTX-2 19B at {args.bits or dtype.size * 8} bits, {args.size}: about "
        f"{block['seconds']:.1f} s a forward, {block['utilization']:.0%} of the matmul "
        f"rate.\nThis is 48 times one block with random weights, measured at "
        f"{block['measured_frames']} frames and scaled by FLOPs."
    )
    sent = {n: exchanged("ltx-2-19b-dev", size, n) for n in (2, 4)}
    for n, ways in sent.items():
        for way, count in ways.items():
            print(
                f"--parallel {way}, {n} machines: each sends {count / 1e9:.3f} GB a step"
            )
    if args.json:
        results = {"machine": machine, "ratios": ratios, "utilization": used}
        results |= {"small_model": found, "released_block": block}
        results["exchanged"] = sent
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
