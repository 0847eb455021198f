"""How linear layers are quantized: bits by layer, rounding by least squares."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Optional

import mlx.core as mx

from .base import UserError, checked, parse_json
from .linear import Quantization, layer_formats

MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
LAYER = re.compile(r"(?:transformer_blocks|model\.layers)\.(\d+)\.(.+)")  # and its kind
MIXED = re.compile(r"mixed_([2-6])_([2-68])")  # mlx-lm's names
# Squared error of a layer by its bits, as `quantize` rounds Student-t weights, relative
# to 4 bits; the differences between groups of 32, 64 and 128 are as large for all.
ERROR = {2: 15.5, 3: 4.03, 4: 1.0, 5: 0.244, 6: 0.0623, 8: 0.0121}
MEAN_BITS = 5.0  # at most, of all weights in the blocks, with the recipe for 4 bits
# The recipe for 4 bits: shares of the squared error of x0 that kinds of layers cause, and
# quarters of the depth, measured with the demo model (the video's, in 4 bits each; what
# causes less than 0.02 counts as 0.02). As four blocks say little about 48, each quarter
# is moved half of the way to the mean. With SOUND both streams gain as much.
KINDS = {"attn1.to_out": 0.175, "attn1.to_v": 0.16, "attn2.to_out": 0.055}
KINDS |= {"ff.net.0": 0.28, "ff.net.2": 0.27, "": 0.02}  # any other
QUARTERS = (0.14, 0.18, 0.26, 0.42)
SOUND = 0.5  # of the layers that write the audio stream

Weights = Mapping[str, mx.array]
Parts = tuple[mx.array, ...]  # of a quantized weight: codes, scales, biases
Shares = Callable[[str, int], float]  # of a kind of layer in a quarter of the depth

# Bits by layer


def quantization(
    mode: str = "affine", bits: Optional[int] = None, group_size: Optional[int] = None
) -> dict[str, Any]:
    """The arguments of `mx.quantize`; only affine has a choice of bits and groups."""
    default = MODES[mode]
    chosen = group_size or default[0], bits or default[1]
    if mode != "affine" and chosen != default:
        raise UserError(f"{mode} needs {default[1]} bits in groups of {default[0]}")
    return {"group_size": chosen[0], "bits": chosen[1], "mode": mode}


def quant_predicate(path: str) -> bool:
    """Attention and feed-forward of all blocks, also Gemma's: most of the weights."""
    layer = r"transformer_blocks\.\d+\.\w+\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)"
    gemma = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    return re.fullmatch(f"{layer}|{gemma}", path) is not None


def layers(weights: Weights, group_size: int) -> dict[str, mx.array]:
    """The weights that can be quantized, by path."""
    named = {k.removesuffix(".weight"): w for k, w in weights.items()}
    found = {path: w for path, w in named.items() if quant_predicate(path)}
    return {path: w for path, w in found.items() if w.shape[1] % group_size == 0}


def choose(
    name: str | None, mode: str | None, bits: int | None, group_size: int | None
) -> dict[str, Any]:
    """The common format for a recipe by `name` (see `recipe`) and the other options."""
    mixed = MIXED.fullmatch(name or "")
    if name and (mode or "affine") != "affine":
        raise UserError(f"--quant-predicate chooses bits, which {mode} does not have")
    if name not in (None, "auto") and (bits or not mixed and group_size):
        option = "--q-bits" if bits else "--q-group-size"
        raise UserError(f"--quant-predicate {name} sets the bits: remove {option}")
    if name and not mixed and name != "auto" and not Path(name).is_file():
        names = "mixed_4_6, mixed_4_8, auto or a JSON file"
        raise UserError(f"unknown --quant-predicate {name}: choose {names}")
    return quantization(mode or "affine", int(mixed[1]) if mixed else bits, group_size)


def recipe(name: str | None, how: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """`how` with the bits of single layers, as mlx-lm writes them: "mixed_4_6" and the
    like, a JSON file (a folder's config.json too), or None: by `KINDS` and `QUARTERS`.
    `weights` are those of the transformer and of Gemma; only their shapes are read."""
    mixed = MIXED.fullmatch(name or "mixed_4_6")
    if not mixed:
        return from_file(Path(name), how, layers(weights, 32))
    high = {"group_size": how["group_size"], "bits": int(mixed[2])}
    own = dict.fromkeys(mlx_lm_picks(layers(weights, how["group_size"])), high)
    if name is None:
        own = {path: v for path, v in own.items() if "transformer_" not in path}
        own |= allocate(weights, how, default_shares)
    return how | own


def default_shares(kind: str, quarter: int) -> float:
    share = next(share for part, share in KINDS.items() if part in kind)
    sound = re.match("audio_(attn|ff)|video_to_audio", kind)
    return share * QUARTERS[quarter] * (SOUND if sound else 1)


def mlx_lm_picks(paths: Iterable[str]) -> Iterator[str]:
    """The layers to which mlx-lm's mixed recipes give more bits: values and a feed-
    forward's last, in the first and last eighth of the blocks, and in every third."""
    for _, alike in itertools.groupby(sorted(paths), lambda path: path.split(".")[0]):
        places = {path: place(path) for path in alike}
        blocks = 1 + max(n for n, _ in places.values())
        for path, (n, kind) in places.items():
            first, last = blocks // 8, 7 * blocks // 8
            outer = not first <= n < last or (n - first) % 3 == 2
            if outer and kind.endswith(("to_v", "net.2", "v_proj", "down_proj")):
                yield path


def place(path: str) -> tuple[int, str]:
    """The number of a layer's block, and its kind: its path in the block."""
    number, kind = LAYER.fullmatch(path).groups()
    return int(number), kind


def groups(found: Weights) -> dict[tuple[str, int], list[str]]:
    """Paths of the transformer's layers, by kind and quarter of the depth."""
    alike, count = defaultdict(list), 1 + max((place(p)[0] for p in found), default=0)
    for path in found:
        n, kind = place(path)
        alike[kind, 4 * n // count].append(path)
    return alike


def from_file(path: Path, how: dict, found: Mapping[str, Any]) -> dict[str, Any]:
    """A saved recipe, or that of a folder's config.json."""
    saved = parse_json(path.read_bytes(), str(path))
    saved = how | checked(dict, saved.get("quantization", saved), str(path))
    for layer, options in layer_formats(saved).items():
        checked(Quantization, options, f"{path}{layer and ': '}{layer}")
        if layer and layer not in found:
            raise UserError(f"{path}: {layer} is not a layer that can be quantized")
    return saved


def allocate(weights: Weights, how: dict[str, Any], shares: Shares) -> dict[str, dict]:
    """Formats by path: the bits that lower the error most for their bytes, by `shares`
    of it, up to a bit more than `how` on average (`MEAN_BITS` for 4), or as many as
    `how` leads to; they start from a bit less."""
    blocks = {k: w for k, w in weights.items() if k.startswith("transformer_blocks.")}
    group, least = how["group_size"], max([2, *(b for b in ERROR if b < how["bits"])])
    found = layers(blocks, group)
    alike = groups(found)
    numbers = {key: sum(found[p].size for p in paths) for key, paths in alike.items()}
    bits, total = dict.fromkeys(alike, least), sum(numbers.values())
    size = lambda weights: 8 * sum(w.nbytes for w in weights.values())
    fixed = size(blocks) - size(found) + 2 * size(found) / group  # others, scales
    most = (MEAN_BITS + how["bits"] - 4) * sum(w.size for w in blocks.values()) - fixed
    room = max(most, how["bits"] * total) - least * total
    higher = {b: min((c for c in ERROR if c > b), default=math.inf) for b in ERROR}
    cost = lambda key: (higher[bits[key]] - bits[key]) * numbers[key]  # inf never fits
    error = lambda key: ERROR[bits[key]] - ERROR[higher[bits[key]]]
    gain = lambda key: shares(*key) * error(key) / cost(key)
    while fits := [key for key in alike if cost(key) <= room]:
        best = max(fits, key=gain)
        if not gain(best):
            break
        room -= cost(best)
        bits[best] = higher[bits[best]]
    changed = [key for key in alike if bits[key] != how["bits"]]
    form = lambda key: {"group_size": group, "bits": bits[key]}
    return {path: form(key) for key in changed for path in alike[key]}


# Rounding

PIECE = {mx.cpu: 1 << 18, mx.gpu: 1 << 22}  # weights; a CPU's cache holds them
# The search: scales relative to the whole range of a group and offsets of the grid in
# steps, then changes of the best scale and its offset; each followed by least squares.
# Chosen on Student-t weights: 300 random changes gain 0.002 of the error more.
STARTS = [(r / 100, f / 3) for r in (70, 76, 82, 88, 94, 100) for f in (-1, 0, 1)]
CHANGES = [(1.012, -0.25), (0.974, -0.01), (1.035, 0.24), (0.997, 0.48)]


def quantize(w: mx.array, group_size: int, bits: int, mode: str = "affine") -> Parts:
    """As `mx.quantize`, evaluated and nearer to `w`: each group's scale and bias minimize
    the squared error. 8 bits and other modes are those of `mx.quantize`."""
    if mode != "affine" or bits == 8:
        return tuple(mx.quantize(w, group_size, bits, mode))
    parts = []
    for rows in pieces(w):
        parts.append(_fit(w[rows], group_size, bits))
        mx.eval(parts[-1])
    return tuple(map(mx.concatenate, zip(*parts)))


def pieces(w: mx.array) -> Iterator[slice]:
    """The rows of a weight that are rounded together."""
    rows = max(PIECE[mx.default_device().type] // w.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, len(w), rows))


def squared_error(w: mx.array, parts: Parts, how: dict) -> tuple[float, float]:
    """The squared norms of the rounding errors and of the weights."""
    sums = mx.zeros(2)
    for rows in pieces(w):
        x = w[rows].astype(mx.float32)
        change = mx.dequantize(*(part[rows] for part in parts), **how) - x
        sums = sums + mx.stack([change.square().sum(), x.square().sum()])
        mx.eval(sums)
    return tuple(sums.tolist())


def _fit(w: mx.array, group_size: int, bits: int) -> list[mx.array]:
    """Quantized rows: codes, scales, biases. Groups that `mx.quantize` makes better, once
    they are rounded to the dtype that they are read in, stay as it makes them."""
    plain = mx.quantize(w, group_size, bits)
    n, dtype, shape = 2**bits - 1, plain[1].dtype, plain[1].shape
    g = w.astype(mx.float32).reshape(*shape, group_size)
    low, high = g.min(-1, keepdims=True), g.max(-1, keepdims=True)
    mean = g.mean(-1, keepdims=True)
    square = (g - mean).square().mean(-1, keepdims=True)
    zero = mx.zeros_like(mean)
    best = [zero + mx.inf, zero, zero]

    def search(s, middle, passes):
        nonlocal best
        b = middle - s * (n / 2)
        for _ in range(passes):
            found, s, b = _improved(g, mean, square, s, b, n, dtype)
            best = [mx.where(found[0] < best[0], *x) for x in zip(found, best)]
        mx.eval(best)  # bounds what a graph holds

    for ratio, offset in STARTS:
        s = (high - low) / n * ratio
        search(s, (high + low) / 2 - s * offset, 2)
    for ratio, offset in CHANGES:
        _, s, b = best
        search(s * ratio, b + s * (n / 2) - s * ratio * offset, 3)
    _, s, b = best
    q = _codes(g, s, b, n).astype(mx.uint32).reshape(len(w), -1)
    fitted = [_packed(q, bits), *(x.squeeze(-1).astype(dtype) for x in (s, b))]
    errors = []
    for parts in (fitted, plain):
        error = mx.dequantize(*parts, group_size, bits) - w
        errors.append(error.astype(mx.float32).reshape(g.shape).square().sum(-1))
    better = (errors[0] < errors[1])[..., None]
    choose = lambda *x: mx.where(better, *(y.reshape(*shape, -1) for y in x))
    return [choose(*x).reshape(x[0].shape) for x in zip(fitted, plain)]


def _codes(g: mx.array, s: mx.array, b: mx.array, n: int) -> mx.array:
    """The nearest codes; the scale of a constant group is 0."""
    return mx.clip(mx.round((g - b) * (1 / mx.where(s == 0, 1, s))), 0, n)


def _improved(g, mean, square, s, b, n, dtype):
    """The squared error with stored scale and bias, these, and least squares' next."""
    s, b = (x.astype(dtype).astype(mx.float32) for x in (s, b))
    q = _codes(g, s, b, n)
    q1, q2, qg = (x.mean(-1, keepdims=True) for x in (q, q * q, q * (g - mean)))
    variance, offset = q2 - q1 * q1, b + s * q1 - mean
    error = square - 2 * s * qg + s * s * variance + offset * offset
    slope = mx.where(variance > 1e-6, qg / mx.maximum(variance, 1e-6), s)
    return (error, s, b), slope, mean - slope * q1


def _packed(codes: mx.array, bits: int) -> mx.array:
    """Rows of codes as the words of `mx.quantize`: a stream of bits, lowest first."""
    stream = codes[..., None] >> mx.arange(bits, dtype=mx.uint32) & 1
    words = stream.reshape(len(codes), -1, 32) << mx.arange(32, dtype=mx.uint32)
    return words.sum(-1)
