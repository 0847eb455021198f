"""What this machine does with the 19B, in a minute: a forward, the longest command,
memory against the plan, TF32. With --long also the components and ratios.

    python benchmarks/benchmark.py

Weights are random: small checkpoints, built at each start, and one block of the released
width. Each figure is the median of several runs after a warm-up; functions that are compared
are run alternately, so that other load on the machine affects all of them.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402

from ltx2 import device, latents, parallel, pipeline, vae, weights  # noqa: E402
from ltx2.base import table  # noqa: E402
from ltx2.conversion import quant_predicate, quantization  # noqa: E402
from ltx2.defaults import default_guidance  # noqa: E402
from ltx2.dit import DiT, DiTConfig, Tokens  # noqa: E402
from ltx2.guidance import guidance_passes  # noqa: E402
from ltx2.layers import MAX_FLOPS  # noqa: E402
from ltx2.linear import quantize  # noqa: E402
from ltx2.request import Request  # noqa: E402

NARROW = checkpoints.widths(heads=4, video=64, audio=32)
NARROW |= {"connector_attention_head_dim": 64, "audio_connector_attention_head_dim": 32}
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
        model.rope("video", latents.video_bounds(*shape, 24)),
        model.rope("audio", latents.audio_bounds(sound)),
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
    is made shorter and smaller until a block takes about `target_seconds`, then scaled by
    FLOPs."""
    model = DiT(dit_config(name, num_layers=1))
    count = lambda size: count_flops(step(model, size))
    _, rate = with_matmul(dtype, 1)
    less = size
    while min(less[:2]) > 64 and count(less) / rate > target_seconds:
        width, height, frames = less
        if frames > 9:
            less = width, height, (frames - 1) // 16 * 8 + 1
        else:
            less = width // 64 * 32, height // 64 * 32, frames
    whole, part = count(size), count(less)
    if bits:
        picked = lambda path, _: quant_predicate(path)
        quantize(model, **quantization(bits=bits), class_predicate=picked)
    model.set_dtype(dtype)
    weights.evaluate(w for _, w in tree_flatten(model.parameters()))
    block = step(model, less)
    found, rate = with_matmul(dtype, runs, block=block)
    seconds, peak = found["block"]
    layers = CONFIGS[name]["transformer"]["num_layers"]
    return {
        "seconds": layers * seconds * whole / part,
        "measured": "x".join(map(str, less)),
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


def longest_attention(dtype, target_seconds, tokens=67320, heads=32, dim=128):
    """Attention over the tokens of 1920x1088x257: seconds of a layer, and of its longest
    command (`layers.MAX_FLOPS`); of fewer queries if that would take too long."""
    k, v = (mx.random.normal((1, heads, tokens, dim)).astype(dtype) for _ in range(2))
    attend = mx.fast.scaled_dot_product_attention
    rows, seconds, least = 8, 0.0, MAX_FLOPS // (4 * k.size)
    while seconds < target_seconds / 8 and rows < least:
        rows = min(4 * rows, least)
        q = mx.random.normal((1, heads, rows, dim)).astype(dtype)
        mx.eval(k, v, q)
        [(seconds, _)] = measure(2, a=lambda q=q: attend(q, k, v, scale=0.1)).values()
    rate = 4 * k.size * rows / seconds
    return {
        "layer": 4 * k.size * tokens / rate,
        "longest_command": min(MAX_FLOPS, 4 * k.size * tokens) / rate,
        "measured_queries": rows,
        "flops": rate,
    }


def against_plan(path, encoder, upsampler, dtype, size):
    """Measured divided by planned peak of each phase of a run in two stages."""
    pipe = pipeline.load(path, encoder, "distilled", dtype, [upsampler])
    width, height, frames = size
    sides = {"height": height, "width": width, "num_frames": frames}
    job = pipe.plan(Request("a dog", **sides, sigmas=(1.0, 0.5, 0.0), no_audio=True))
    before, plan = mx.get_active_memory(), pipe.memory(job)
    found = [e for e in pipe.stream(job) if isinstance(e, pipeline.Result)][0].phases
    needs = {k: need.total(plan.streamed) for k, need in plan.phases.items()}
    return {k: (found[k][1] - before) / need for k, need in needs.items()}


def decode_known(width, side, path=None):
    """Frames of fixed latents, by a video decoder of the released depth and random
    weights; written to `path`."""
    mx.random.seed(0)
    section = CONFIGS["ltx-2-19b-dev"]["vae"] | {"decoder_base_channels": width}
    model = vae.VideoVAE(vae.VideoVAEConfig.from_dict(section))
    model.apply(lambda w: mx.random.normal(w.shape) / max(w[0].size, 1) ** 0.5)
    x = mx.random.normal((1, 2, side, side, model.config.latent_channels))
    np.save(path, np.array(model.decode(x)))


def tf32_decibels(width, side):
    """PSNR of a decode with TF32 against one without, in processes of their own."""
    frames = []
    with tempfile.TemporaryDirectory() as folder:
        for on in "01":
            path = f"{folder}/{on}.npy"
            decode = ["--decode", path, str(width), str(side)]
            env = os.environ | {"MLX_ENABLE_TF32": on}
            subprocess.run([sys.executable, __file__, *decode], check=True, env=env)
            frames.append(np.load(path))
    error = np.square(frames[0] - frames[1], dtype=np.float64).mean()
    return 10 * math.log10(1 / error) if error else math.inf


LINE = "machine", "MLX", "forward, s", "of matmul", "67,320 tokens, s"
LINE += "longest command, s", "peak / plan", "TF32, dB"


def short(args, size, build):
    """The four measurements that a Mac must answer; the last line is for the README."""
    blocks, found = {}, {}
    for name in args.dtype:
        dtype = getattr(mx, name)
        model = "ltx-2-19b-dev", size, dtype, args.bits, args.runs
        blocks[name] = released_block(*model, args.target_seconds)
        block = blocks[name]
        print(
            f"LTX-2 19B at {args.bits or dtype.size * 8} bits, {name}, {args.size}: "
            f"{block['seconds']:.3g} s a forward, {block['utilization']:.0%} of the matmul "
            f"rate (48 times one block, measured at {block['measured']})"
        )
        found[name] = longest_attention(dtype, args.target_seconds)
        print(
            f"attention of 67320 tokens, {name}: {found[name]['layer']:.3g} s a layer, "
            f"{found[name]['flops'] / 1e12:.3g} TFLOP/s; longest command "
            f"{found[name]['longest_command']:.2g} s (macOS ends one of about 5 s; measured "
            f"with {found[name]['measured_queries']} queries, keep the display on)"
        )
    changes = {"transformer": {"num_layers": 6, **NARROW}}
    changes["vae"] = {"decoder_base_channels": 16}
    path = str(build("ltx-2.3", **changes))
    planned = size if args.long else (256, 256, 25)
    shares = against_plan(
        path, str(build("gemma3")), str(build("spatial-x2")), args.dtype[0], planned
    )
    print("measured / planned peak:", *(f"{k} {x:.2f}" for k, x in shares.items()))
    decibels = tf32_decibels(*((128, 8) if args.long else (32, 6)))
    print(f"TF32 changes a decode by {decibels:.0f} dB (inf: not at all)")
    each = lambda form, of: " / ".join(form.format(of[k]) for k in args.dtype)
    cells = (
        str(mx.device_info().get("device_name", mx.default_device())),
        mx.__version__,
        f"{args.size}, {args.bits} bits, {' / '.join(args.dtype)}: "
        + each("{[seconds]:.3g}", blocks),
        each("{[utilization]:.0%}", blocks),
        each("{[layer]:.3g}", found),
        each("{[longest_command]:.2g}", found),
        f"{min(shares.values()):.2f} to {max(shares.values()):.2f}",
        f"{decibels:.0f}",
    )
    for line in (LINE, ["---"] * len(LINE), cells):
        print("| " + " | ".join(line) + " |")
    return {"blocks": blocks, "attention": found, "plan": shares, "tf32": decibels}


def long(args, size, build):
    """Components, ratios, and what machines exchange."""
    dtype = getattr(mx, args.dtype[0])
    # As deep as the released models, but narrow.
    transformer = {"num_layers": 48, **NARROW}
    path, encoder = str(build("ltx-2.3", transformer=transformer)), str(build("gemma3"))
    source = weights.open_model(path)
    found, used = steps(source, dtype, (256, 256, 49), args.runs)
    found |= components(source, dtype, args.runs)
    found |= denoising_runs(path, encoder, args.dtype[0], max(args.runs // 2, 1))
    rows = [(k, seconds, peak / 1e6) for k, (seconds, peak) in found.items()]
    print(table(("small model", "seconds", "peak MB"), rows))
    print(
        f"share of the matmul rate: {used['plain']:.0%} and {used['four_passes']:.0%}"
    )
    ratio = lambda i, a, b: found[a][i] / found[b][i]
    ratios = {
        "time of a step of four passes / plain forward": ratio(
            0, "four_passes", "plain"
        ),
        f"FLOPs of the same, LTX-2 19B at {args.size}": guided_ratio(
            "ltx-2-19b-dev", size
        ),
        "FLOPs of the same, LTX-2.3 22B": guided_ratio("ltx-2.3-22b", size),
        "peak memory of decoding 24 / 8 latent frames": ratio(
            1, "vae_decode_24", "vae_decode_8"
        ),
        "time of decoding 24 as a stream / at once": ratio(
            0, "vae_decode_24", "vae_decode_24_at_once"
        ),
        "peak memory of the same": ratio(1, "vae_decode_24", "vae_decode_24_at_once"),
        "time of a run with / without --low-memory": ratio(0, "run_low_memory", "run"),
        "peak memory of the same run": ratio(1, "run_low_memory", "run"),
    }
    print(table(("ratio", ""), ratios.items()))
    sent = {n: exchanged("ltx-2-19b-dev", size, n) for n in (2, 4)}
    rows = [
        (f"{way}, {n} machines", b / 1e9) for n in sent for way, b in sent[n].items()
    ]
    print(table(("--parallel", "GB a step from each"), rows))
    return {
        "ratios": ratios,
        "utilization": used,
        "small_model": found,
        "exchanged": sent,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = mx.default_device().type != mx.cpu
    dtypes = ["bfloat16", "float16"] if gpu else ["float32"]
    add = parser.add_argument
    add("--long", action="store_true", help="larger sizes; components and ratios")
    add("--dtype", nargs="+", default=dtypes)
    add("--runs", type=int, default=2)
    add("--bits", type=int, default=4, help="of the released block (0: not quantized)")
    add("--size", default="768x512x121", help="WIDTHxHEIGHTxFRAMES of the estimate")
    shorter = "shorten the clip until a released block takes this long"
    add("--target-seconds", type=float, default=2, help=shorter)
    add("--json", type=Path, help="write all figures to this file")
    add("--decode", nargs=3, help=argparse.SUPPRESS)  # of another process
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.decode:
        path, *sizes = args.decode
        return decode_known(*map(int, sizes), path)
    size = tuple(map(int, args.size.split("x")))
    print(device.machine())
    with tempfile.TemporaryDirectory() as folder:
        build = partial(checkpoints.build, folder=folder)
        results = {"machine": device.machine()}
        if args.long:
            results |= long(args, size, build)
        results |= short(args, size, build)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
