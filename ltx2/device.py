"""`python -m ltx2.checks device`: kernels against numpy, rates, memory and disk."""

import fcntl
import math
import os
import platform
import shutil
import tempfile
import timeit
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import save

from . import conv
from .base import dtype_name
from .layers import apply_rope
from .linear import quantize
from .memory import available

SECONDS = 0.25  # for measuring one rate
FILE_BYTES = 1 << 28  # size of the file that is read to measure the disk
BEYOND = 1 << 31  # elements, whose offsets need more than 32 bits
# Rows of quantized products: MLX before 0.32 lost the first ones from 32768 on.
ROWS = 40000
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
    """A line of the table; the state is ok, slow, wrong or "-" (not checked)."""

    check: str
    state: str
    found: str
    advice: str = ""


def judged(check: str, good: bool, found: str, advice: str, bad: str = "wrong") -> Row:
    return Row(check, "ok", found) if good else Row(check, bad, found, advice)


Pair = tuple[mx.array, np.ndarray]  # what MLX computes, and exact values
Case = tuple  # name, dtype, what computes a Pair, its arguments
draw = mx.random.normal


def relative_error(ours: mx.array, exact: np.ndarray) -> float:
    error = np.abs(exact64(ours) - exact).max() / np.abs(exact).max()
    return error if np.isfinite(error) else math.inf


def exact64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def judge(check: str, cases: Iterable[Case]) -> list[Row]:
    """One row for all cases, or one for each wrong case."""
    mx.random.seed(0)
    cases, rows, largest = [*cases], [], (0.0, "")
    for case, dtype, compute, *inputs in cases:
        case = f"{case}, {dtype_name(dtype)}"
        try:
            error = relative_error(*compute(*inputs))
        except (RuntimeError, ValueError) as failed:
            found = f"{case}: {' '.join(str(failed).split())[:80]}"
            rows.append(Row(check, "wrong", found, UPDATE))
            continue
        found = f"{error:.1e} ({case})"
        largest = max(largest, (error / LIMITS[dtype], found))
        if error > LIMITS[dtype]:
            advice = TF32 if dtype == mx.float32 and 1e-4 < error < 2e-2 else UPDATE
            rows.append(Row(check, "wrong", f"error {found}", advice))
    return rows or [Row(check, "ok", f"{len(cases)} cases, largest error {largest[1]}")]


def attention_cases(dim: int) -> Iterator[Case]:
    """All kinds of masks, many queries and one; heads share keys, as in Gemma."""
    hiding = lambda seen: np.where(seen, 0, -np.inf)
    causal = hiding(np.tri(100, 150, 50, dtype=bool))  # the last query sees all keys
    for dtype in LIMITS:
        q, added = 3 * draw((1, 2, 100, dim), dtype), draw((1, 1, 100, 150), dtype)
        k, v = draw((2, 1, 1, 150, dim), dtype)
        yield "no mask", dtype, attention, q, k, v, None, 0
        yield "added mask", dtype, attention, q, k, v, added, exact64(added)
        yield "boolean mask", dtype, attention, q, k, v, added > 0, hiding(added > 0)
        yield "causal", dtype, attention, q, k, v, "causal", causal
        yield "one query", dtype, attention, q[:, :, :1], k, v, None, 0


def attention(q: mx.array, k: mx.array, v: mx.array, mask: Any, added: Any) -> Pair:
    """Attention with a mask, which is the same as adding an array to the scores."""
    scale = 1 / math.sqrt(q.shape[-1])
    ours = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    q, k, v = (exact64(x) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) * scale + added
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return ours, weights / weights.sum(-1, keepdims=True) @ v


# Convolutions and products in float32


def convolution(size: tuple, out: int, taps: tuple, step=1, groups=1) -> Pair:
    """A convolution of (1, *size), and exact values at some places of its output."""
    x, w = draw((1, *size)), draw((out, *taps, size[-1] // groups))
    how = {"padding": 0} if len(taps) == 3 else {"dilation": step, "groups": groups}
    y = (mx.conv1d, mx.conv2d, conv.conv3d)[len(taps) - 1](x, w, **how)
    if groups > 1:  # each output has one input
        w = mx.where(mx.eye(out)[:, None] == 1, w, 0)
    places = np.random.default_rng(0).integers(0, y.shape[1:-1], (64, y.ndim - 2))
    offsets = np.indices(w.shape[1:-1]).reshape(places.shape[1], -1)
    seen = exact64(x)[0][tuple(np.moveaxis(places[:, :, None] + step * offsets, 1, 0))]
    exact = np.einsum("ptc,otc->po", seen, exact64(w).reshape(out, -1, size[-1]))
    return y[0][tuple(map(mx.array, places.T))], exact


def winograd_cases() -> Iterator[Case]:
    """Wide convolutions, which Metal computes by Winograd's F(6, 3)."""
    yield "3x3x3", mx.float32, convolution, (3, 66, 66, 128), 128, (3, 3, 3)
    yield "1x3x3", mx.float32, convolution, (1, 66, 66, 128), 128, (1, 3, 3)
    yield "3x3", mx.float32, convolution, (66, 130, 128), 128, (3, 3)


def convolution_cases() -> Iterator[Case]:
    """Narrow convolutions, and those of the vocoder."""
    yield "3x3x3", mx.float32, convolution, (6, 22, 26, 32), 48, (3, 3, 3)
    yield "7, dilated", mx.float32, convolution, (2000, 64), 64, (7,), 3
    yield "depthwise", mx.float32, convolution, (500, 32), 32, (12,), 1, 32
    yield "transposed", mx.float32, transposed, draw((1, 200, 64)), draw((32, 16, 64))


def transposed(x: mx.array, w: mx.array) -> Pair:
    y = mx.conv_transpose1d(x, w, stride=8)[0]
    exact = np.zeros(y.shape)
    for tap in range(w.shape[1]):
        exact[tap::8][: x.shape[1]] += (exact64(x) @ exact64(w)[:, tap].T)[0]
    return y, exact


def layer_cases() -> Iterator[Case]:
    """Products with many rows and one, norms, and compiled rotary embeddings."""
    matmul = lambda a, b: (mx.matmul(a, b), exact64(a) @ exact64(b))
    addmm = lambda a, b, c: (mx.addmm(c, a, b), exact64(a) @ exact64(b) + exact64(c))
    for dtype in LIMITS:
        normal = partial(draw, dtype=dtype)
        b, bias = normal((512, 200)), normal((200,))
        for rows in (300, 1):
            a = normal((rows, 512))
            yield f"matmul, {rows} rows", dtype, matmul, a, b
            yield f"addmm, {rows} rows", dtype, addmm, a, b, bias
        yield "rms_norm", dtype, norm, normal((3, 2560)), normal((2560,))
        yield "layer_norm", dtype, norm, normal((3, 2560))
        yield "apply_rope", dtype, rope, normal((3, 40, 64)), *normal((2, 3, 40, 32))


def norm(x: mx.array, w: Optional[mx.array] = None) -> Pair:
    """The RMS norm with weights, or the layer norm."""
    y = exact64(x) - exact64(x).mean(1, keepdims=True) * (w is None)
    y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-6)
    if w is None:
        return mx.fast.layer_norm(x, None, None, 1e-6), y
    return mx.fast.rms_norm(x, w, 1e-6), y * exact64(w)


def rope(x: mx.array, cos: mx.array, sin: mx.array) -> Pair:
    (a, b), c, s = np.split(exact64(x), 2, axis=-1), exact64(cos), exact64(sin)
    exact = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    return apply_rope(x[None], cos, sin)[0], exact


def tf32() -> Row:
    """Whether float32 products are rounded to TF32, as on an M5 or an NVIDIA GPU."""
    a, b = draw((300, 512)), draw((512, 300))
    error = relative_error(mx.matmul(a, b), exact64(a) @ exact64(b))
    found = f"{'seen' if error > 1e-4 else 'not seen'}, error of float32 {error:.1e}"
    return judged("TF32", error <= 1e-4, found, TF32)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp8(codes: np.ndarray) -> np.ndarray:
    """E4M3: a sign, four bits of exponent, three of mantissa."""
    codes = codes.astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.ldexp(mantissa + 8 * (exponent > 0), np.maximum(exponent, 1) - 10)
    return np.where(codes & 128, -size, size)


def decoded(parts: list[mx.array], group_size: int, bits: int, mode: str) -> np.ndarray:
    """The weights (N, K) of a quantized matrix, in numpy."""
    packed = np.array(parts[0])
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(packed), -1, bits) @ (1 << np.arange(bits))
    spread = lambda x: np.repeat(x, group_size, axis=1)
    if mode == "affine":
        return codes * spread(exact64(parts[1])) + spread(exact64(parts[2]))
    scales = np.array(parts[1])
    scales = fp8(scales) if mode == "nvfp4" else 2.0 ** (scales.astype(float) - 127)
    if bits == 8:
        return fp8(codes) * spread(scales)
    return np.where(codes & 8, -FP4[codes & 7], FP4[codes & 7]) * spread(scales)


def quantized_cases(mode: str, bits: int, groups: tuple[int, ...]) -> Iterator[Case]:
    """Dequantized weights, and products with one row and with many."""
    for group in groups:
        how = {"group_size": group, "bits": bits, "mode": mode}
        for dtype in LIMITS:
            w, x = draw((96, 256), dtype), draw((40, 256), dtype)
            yield f"groups of {group}", dtype, weights, w, how
            for rows in (1, 40):
                case = f"groups of {group}, {rows} rows"
                yield case, dtype, product, x[:rows], w, how
    x, w = draw((ROWS, 128)), draw((32, 128))
    yield f"groups of {group}, {ROWS} rows", mx.float32, product, x, w, how


def weights(w: mx.array, how: dict[str, Any]) -> Pair:
    parts = mx.quantize(w, **how)
    exact = decoded(parts, **how)
    lost = np.linalg.norm(exact - exact64(w)) / np.linalg.norm(exact)
    if lost > (0.04 if how["mode"] == "mxfp8" else 2.4 / 2 ** how["bits"]):
        raise ValueError(f"quantizing loses {lost:.2f}")
    return mx.dequantize(*parts, **how, dtype=w.dtype), exact


def product(x: mx.array, w: mx.array, how: dict[str, Any]) -> Pair:
    parts = mx.quantize(w, **how)
    return mx.quantized_matmul(x, *parts, **how), exact64(x) @ decoded(parts, **how).T


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
    """Measure reading an uncached file; check tensors that are used out of order."""
    size = min(FILE_BYTES, shutil.disk_usage(folder).free // 4)
    if size < FILE_BYTES // 16:
        return [Row("disk", "-", "the disk is full")]
    tensors = {str(i): draw((size // 32, 1)) + i for i in range(8)}
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors") as file:
        if hasattr(fcntl, "F_NOCACHE"):  # macOS
            fcntl.fcntl(file, fcntl.F_NOCACHE, 1)
        file.write(save({k: np.array(x) for k, x in tensors.items()}))
        file.flush()
        os.fsync(file)
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        rate = size / timeit.timeit(lambda: mx.eval(mx.load(file.name)), number=1)
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


def seconds(compute: Callable[[], mx.array]) -> float:
    """The shorter time of two runs, after a warm-up."""
    return min(timeit.repeat(lambda: mx.eval(compute()), number=1, repeat=3)[1:])


def matmul_rate(dtype: mx.Dtype) -> float:
    """FLOPs per second of a square product that takes about SECONDS."""
    size = 128
    while True:
        a = mx.random.normal((size, size)).astype(dtype)
        rate = 2 * size**3 / seconds(lambda a=a: mx.matmul(a, a))
        fits = int((rate * SECONDS / 2) ** (1 / 3))
        if size == 8192 or fits < 2 * size:
            return rate
        size = min(4 * size, 8192, fits // 128 * 128)


def rates() -> list[Row]:
    """Rates of products, and of attention and a quantized layer relative to them."""
    found = {d: matmul_rate(d) for d in LIMITS}
    dtype, rate = max(found.items(), key=lambda pair: pair[1])
    text = ", ".join(f"{r / 1e12:.3g} {dtype_name(d)}" for d, r in found.items())
    blas = "on Linux, put LD_PRELOAD=libopenblas.so.0 before the command"
    advice = blas if rate < 1e10 else "use --dtype float32"
    good = rate >= 1e10 and found[mx.bfloat16] > found[mx.float32] / 2
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
        text = f"{share * rate / 1e12:.3g} {dtype_name(dtype)}, {share:.0%} of matmul"
        # On a CPU, attention is not fused.
        good = share > (0.1 if mx.default_device().type == mx.cpu else 0.3)
        rows.append(judged(f"{check}, TFLOP/s", good, text, advice, "slow"))
    return rows


def machine() -> str:
    """The machine and its versions, in one line."""
    info = mx.device_info()
    kind = "CPU" if mx.default_device().type == mx.cpu else "GPU"
    chip = " ".join(str(info[k]) for k in ("device_name", "architecture") if k in info)
    versions = f"MLX {mx.__version__}, Python {platform.python_version()}"
    return f"{kind}: {chip}, {platform.platform()}, {versions}"


def checks(folder: Path) -> Iterator[Row]:
    """All rows; they take less than a minute."""
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
