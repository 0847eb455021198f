"""Is this machine in order? Kernels against the CPU in float64, rates, memory, disk.
This is `python -m ltx2.checks device`."""

import fcntl
import math
import os
import platform
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import save

from . import conv
from .layers import apply_rope
from .linear import quantize
from .memory import available

SECONDS = 0.25  # for measuring one rate
FILE_BYTES = 1 << 28  # size of the file that is read to measure the disk
BEYOND = 1 << 31  # elements, whose offsets need more than 32 bits
# The largest error, relative to the largest value. In float32 Winograd's convolutions have
# 4e-6, TF32 more than 1e-4. MLX's CPU backend adds quantized products in 16 bits.
LIMITS = {mx.float32: 2e-5, mx.float16: 1e-2, mx.bfloat16: 8e-2}
HEADS = (64, 128, 256)  # sizes of attention heads
WIDTH = 4096  # of the layer that is timed
RELEASED = 16.7e9  # bytes of the 19B at 4 bits
UPDATE = "update MLX and macOS; if that does not help, report this table"
TF32 = "float32 is rounded to 10 bits (TF32): MLX_ENABLE_TF32=0 must be set before MLX runs"
MODES = [("affine", bits, (32, 64, 128)) for bits in (2, 3, 4, 5, 6, 8)]
MODES += [("mxfp4", 4, (32,)), ("nvfp4", 4, (16,)), ("mxfp8", 8, (32,))]


class Row(NamedTuple):
    """A line of the table; state is ok, slow, wrong or "-" (not checked)."""

    check: str
    state: str
    found: str
    advice: str = ""


def judged(check: str, good: bool, found: str, advice: str, bad: str = "wrong") -> Row:
    return Row(check, "ok", found) if good else Row(check, bad, found, advice)


def name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


# Name, dtype, function, the function for the CPU (None: the same), inputs
Case = tuple


def on_cpu(compute: Callable, *inputs: Any) -> mx.array:
    """Compute with MLX's CPU backend in float64 (its convolutions: in float32)."""
    with mx.stream(mx.cpu):
        is_float = lambda x: isinstance(x, mx.array) and x.dtype in LIMITS
        y = compute(*(x.astype(mx.float64) if is_float(x) else x for x in inputs))
        mx.eval(y)
        return y


def relative_error(ours: mx.array, exact: mx.array) -> float:
    exact, ours = np.array(exact), np.array(ours.astype(mx.float32))
    error = np.abs(ours - exact).max() / np.abs(exact).max()
    return error if np.isfinite(error) else math.inf


def judge(check: str, cases: Iterable[Case]) -> list[Row]:
    """One row for all cases, or one for each that is wrong."""
    cases, rows, largest = [*cases], [], (0.0, "")
    for case, dtype, compute, reference, *inputs in cases:
        case, advice = f"{case}, {name(dtype)}", UPDATE
        try:
            exact = on_cpu(reference or compute, *inputs)
            error = relative_error(compute(*inputs), exact)
        except (RuntimeError, ValueError) as failed:
            found = f"{case}: {' '.join(str(failed).split())[:80]}"
            rows.append(Row(check, "wrong", found, advice))
            continue
        found = f"{error:.1e} ({case})"
        largest = max(largest, (error / LIMITS[dtype], found))
        if error > LIMITS[dtype]:
            if dtype == mx.float32 and 1e-4 < error < 2e-2:
                advice = TF32
            rows.append(Row(check, "wrong", f"error {found}", advice))
    return rows or [Row(check, "ok", f"{len(cases)} cases, largest error {largest[1]}")]


RANDOM = np.random.default_rng(0)


def draw(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(RANDOM.standard_normal(shape, np.float32)).astype(dtype)


def attention_cases(dim: int) -> Iterator[Case]:
    """All kinds of masks, many queries and one; heads share keys, as in Gemma."""
    attend = partial(mx.fast.scaled_dot_product_attention, scale=dim**-0.5)
    masked = lambda q, k, v, mask: attend(q, k, v, mask=mask)
    for dtype in LIMITS:
        q = 3 * draw(1, 2, 150, dim, dtype=dtype)
        k, v = (draw(1, 1, 150, dim, dtype=dtype) for _ in range(2))
        yield "no mask", dtype, masked, None, q[:, :, :100], k, v, None
        added = draw(1, 1, 100, 150, dtype=dtype)
        for kind, mask in ("added", added), ("boolean", added > 0):
            yield f"{kind} mask", dtype, masked, None, q[:, :, :100], k, v, mask
        yield "causal", dtype, masked, None, q, k, v, "causal"
        yield "one query", dtype, masked, None, q[:, :, :1], k, v, None


def winograd_cases() -> Iterator[Case]:
    """Wide convolutions, which Metal computes by Winograd's F(6, 3)."""
    convolve = partial(conv.conv3d, padding=0), mx.conv3d
    x, w = draw(1, 3, 66, 66, 128), draw(128, 3, 3, 3, 128)
    yield "3x3x3", mx.float32, *convolve, x, w
    yield "1x3x3", mx.float32, *convolve, x[:, :1], w[:, :1]
    yield "3x3", mx.float32, mx.conv2d, None, draw(1, 66, 130, 128), w[:, 0]


def convolution_cases() -> Iterator[Case]:
    """Narrow convolutions and the vocoder's; for the CPU without dilation and stride."""
    case = "3x3x3", mx.float32, partial(conv.conv3d, padding=0), mx.conv3d
    yield *case, draw(1, 6, 22, 26, 32), draw(48, 3, 3, 3, 32)
    dilated = lambda x, w: mx.conv1d(x, spread(w, 3))
    case = "7, dilated", mx.float32, partial(mx.conv1d, dilation=3), dilated
    yield *case, draw(1, 2000, 64), draw(64, 7, 64)
    case = "depthwise", mx.float32, partial(mx.conv1d, groups=32), None
    yield *case, draw(1, 500, 32), draw(32, 12, 1)
    transposed = lambda x, w: mx.conv1d(spread(x, 8), w[:, ::-1], padding=15)
    case = "transposed", mx.float32, partial(mx.conv_transpose1d, stride=8), transposed
    yield *case, draw(1, 200, 64), draw(32, 16, 64)


def spread(x: mx.array, step: int) -> mx.array:
    """Insert `step` - 1 zeros between the values along the second axis."""
    rows = [x[:, :, None], mx.zeros((*x.shape[:2], step - 1, x.shape[2]), x.dtype)]
    return mx.concatenate(rows, axis=2).flatten(1, 2)[:, : 1 - step]


def layer_cases() -> Iterator[Case]:
    """Products with many rows and one, norms, and compiled rotary embeddings."""
    for dtype in LIMITS:
        a, b, c = (draw(*n, dtype=dtype) for n in ((300, 512), (512, 200), (200,)))
        for rows in (300, 1):
            yield f"matmul, {rows} rows", dtype, mx.matmul, None, a[:rows], b
            yield f"addmm, {rows} rows", dtype, mx.addmm, None, c, a[:rows], b
        x, w = draw(3, 2560, dtype=dtype), draw(2560, dtype=dtype)
        yield "rms_norm", dtype, partial(mx.fast.rms_norm, eps=1e-6), None, x, w
        layer_norm = partial(mx.fast.layer_norm, weight=None, bias=None, eps=1e-6)
        yield "layer_norm", dtype, layer_norm, None, x
        x, cos, sin = (draw(1, 3, 40, n, dtype=dtype) for n in (64, 32, 32))
        yield "apply_rope", dtype, apply_rope, rotated, x, cos[0], sin[0]


def rotated(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """`apply_rope` without `mx.compile`, which needs a C++ compiler on the CPU."""
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def tf32() -> Row:
    """Whether float32 products are rounded to TF32, as on an M5 or an NVIDIA GPU."""
    inputs = draw(300, 512), draw(512, 300)
    error = relative_error(mx.matmul(*inputs), on_cpu(mx.matmul, *inputs))
    found = f"{'seen' if error > 1e-4 else 'not seen'}, error of float32 {error:.1e}"
    return judged("TF32", error <= 1e-4, found, TF32)


def quantized_cases(mode: str, bits: int, groups: tuple[int, ...]) -> Iterator[Case]:
    """Dequantized weights, and products with one row and with many."""
    for group in groups:
        how = {"group_size": group, "bits": bits, "mode": mode}
        for dtype in LIMITS:
            w, x = draw(96, 256, dtype=dtype), draw(40, 256, dtype=dtype)
            parts = mx.quantize(w, **how)
            case = f"groups of {group}"
            yield case, dtype, partial(weights, **how), None, w, *parts
            both = partial(mx.quantized_matmul, **how), partial(product, **how)
            for rows in (1, 40):
                yield f"{case}, {rows} rows", dtype, *both, x[:rows], *parts


def weights(w: mx.array, *parts: mx.array, **how: Any) -> mx.array:
    """Dequantize `w`'s parts; ValueError if they lost more than these bits usually do."""
    y = unpacked(w.dtype, *parts, **how)
    norm = lambda x: mx.linalg.norm(x.astype(mx.float32)).item()
    lost = norm(y - w) / norm(w)
    if lost > (0.04 if how["mode"] == "mxfp8" else 2.4 / 2 ** how["bits"]):
        raise ValueError(f"quantizing loses {lost:.2f}")
    return y


def product(x: mx.array, *parts: mx.array, **how: Any) -> mx.array:
    return x @ unpacked(x.dtype, *parts, **how).T


def unpacked(dtype: mx.Dtype, *parts: mx.array, **how: Any) -> mx.array:
    made = mx.float32 if dtype == mx.float64 else dtype  # for which MLX has no kernel
    return mx.dequantize(*parts, **how, dtype=made).astype(dtype)


# Large arrays, files, memory


def large_offsets() -> Row:
    """Read elements whose offset in memory needs more than 32 bits."""
    check, rows = "offsets beyond 2^31", BEYOND // 1024 + 8
    if available() < 4 * BEYOND:
        return Row(check, "-", f"needs {4 * BEYOND / 1e9:.1f} GB")
    down, across = np.arange(rows) % 251, np.arange(1024) % 5
    large = mx.array(down.astype(np.uint8))[:, None] + mx.array(across.astype(np.uint8))
    right, last = mx.contiguous(large[:, -3:].T), mx.take(large, rows - 1, axis=0)
    same = np.array_equal(right, across[-3:, None] + down)
    same = same and np.array_equal(last, down[-1] + across)
    return judged(check, same, f"{large.size} elements", UPDATE)


def disk(folder: Path) -> list[Row]:
    """Measure reading a file that is not cached; check that its tensors are complete
    when they are used at once and in another order."""
    size = min(FILE_BYTES, shutil.disk_usage(folder).free // 4)
    if size < FILE_BYTES // 16:
        return [Row("disk", "-", "the disk is full")]
    tensors = {str(i): draw(size // 32, 1) + i for i in range(8)}
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors") as file:
        if hasattr(fcntl, "F_NOCACHE"):  # macOS
            fcntl.fcntl(file, fcntl.F_NOCACHE, 1)
        file.write(save({k: np.array(x) for k, x in tensors.items()}))
        file.flush()
        os.fsync(file)
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        mx.eval(mx.load(file.name))
        rate = size / (time.perf_counter() - start)
        read = mx.load(file.name)
        same = [mx.array_equal(2 * read[k], 2 * tensors[k]) for k in "60732514"]
        same = mx.all(mx.stack(same)).item()
    found = f"{rate / 1e9:.2f} GB/s: {RELEASED / rate:.1f} s for the 19B at 4 bits"
    slow = "with --low-memory each step reads the model: put it on a faster disk"
    return [
        judged("disk", rate > 0.5e9, found, slow, "slow"),
        judged("order of loads", same, "8 tensors", UPDATE),
    ]


def memory() -> Row:
    """How much memory may be used, and Metal's own limits."""
    info, limit = mx.device_info(), available()
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{limit / 1e9:.1f} GB may be used, RAM {ram / 1e9:.1f}"
    found += f", MLX's limit {mx.get_memory_limit() / 1e9:.1f}"
    if "max_buffer_length" in info:
        found += f", an array {info['max_buffer_length'] / 1e9:.1f}"
    few = "the 19B at 4 bits is read in each step, a long video made in windows"
    return judged("memory", limit > 1.2 * RELEASED, found, few, "slow")


# Rates


def seconds(compute: Callable[[], mx.array]) -> float:
    """The shorter of two runs after a warm-up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matmul_rate(dtype: mx.Dtype) -> float:
    """FLOPs per second of a square product that takes about SECONDS."""
    size, rate = 128, 0.0
    while True:
        a = mx.random.normal((size, size)).astype(dtype)
        rate = 2 * size**3 / seconds(lambda a=a: mx.matmul(a, a))
        fits = int((rate * SECONDS / 2) ** (1 / 3))
        if size == 8192 or fits < 2 * size:
            return rate
        size = min(4 * size, 8192, fits // 128 * 128)


def rates() -> list[Row]:
    """Rates of products, and of attention and a quantized layer relative to them."""
    found = {name(d): matmul_rate(d) for d in LIMITS}
    best = max(found, key=found.get)
    dtype, rate = getattr(mx, best), found[best]
    text = ", ".join(f"{r / 1e12:.3g} {d}" for d, r in found.items())
    blas = "on Linux, put LD_PRELOAD=libopenblas.so.0 before the command"
    advice = blas if rate < 1e10 else "use --dtype float32"
    good = rate >= 1e10 and found["bfloat16"] > found["float32"] / 2
    rows = [judged("matmul, TFLOP/s", good, text, advice, "slow")]
    tokens = min(max(int((rate * SECONDS / 16384) ** 0.5), 128), 16384) // 64 * 64
    q = mx.random.normal((1, 32, tokens, 128)).astype(dtype)
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    layer.set_dtype(dtype)
    quantize(layer, bits=4)
    x = mx.random.normal((min(tokens, 2048), WIDTH)).astype(dtype)
    attend = lambda: mx.fast.scaled_dot_product_attention(q, q, q, scale=0.1)
    for check, flops, compute, advice in (
        ("attention", 4 * q.size * tokens, attend, UPDATE),
        ("layer of 4 bits", 2 * x.size * WIDTH, lambda: layer(x), "use 8 bits or none"),
    ):
        share = flops / seconds(compute) / rate
        text = f"{share * rate / 1e12:.3g} {best}, {share:.0%} of matmul"
        # On a CPU, attention is not fused.
        good = share > (0.1 if mx.default_device().type == mx.cpu else 0.3)
        rows.append(judged(f"{check}, TFLOP/s", good, text, advice, "slow"))
    return rows


def machine() -> str:
    """The machine and its versions in a line."""
    info = mx.device_info()
    kind = "CPU" if mx.default_device().type == mx.cpu else "GPU"
    chip = " ".join(str(info[k]) for k in ("device_name", "architecture") if k in info)
    versions = f"MLX {mx.__version__}, Python {platform.python_version()}"
    return f"{kind}: {chip}, {platform.platform()}, {versions}"


def checks(folder: Path) -> Iterator[Row]:
    """All rows; takes less than a minute."""
    yield memory()
    for dim in HEADS:
        yield from judge(f"attention, heads of {dim}", attention_cases(dim))
    yield from judge("Winograd's convolutions", winograd_cases())
    yield from judge("other convolutions", convolution_cases())
    yield from judge("other layers", layer_cases())
    yield tf32()
    for mode, bits, groups in MODES:
        yield from judge(f"{mode} at {bits} bits", quantized_cases(mode, bits, groups))
    yield large_offsets()
    yield from disk(folder)
    yield from rates()
