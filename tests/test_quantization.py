"""Rounding by least squares, and bits by layer."""

import json

import mlx.core as mx
import numpy as np
import pytest

from ltx2.base import UserError
from ltx2.linear import layer_format, layer_formats
from ltx2.quantization import (
    allocate,
    choose,
    default_shares,
    layers,
    quant_predicate,
    quantization,
    quantize,
    recipe,
)

DTYPES = (mx.bfloat16, mx.float16, mx.float32)


def heavy_tailed(*shape: int, seed: int = 0, freedom: float = 5) -> np.ndarray:
    """Student-t numbers of the size of trained weights."""
    return 0.02 * np.random.default_rng(seed).standard_t(freedom, shape)


def error(parts, w: mx.array, group_size: int, bits: int) -> float:
    """Of what is read, relative to the weights."""
    x = mx.dequantize(*parts, group_size, bits, dtype=w.dtype).astype(mx.float32)
    w = w.astype(mx.float32)
    return (mx.linalg.norm(x - w) / mx.maximum(mx.linalg.norm(w), 1e-9)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64])
def test_four_bits_have_at_most_nine_tenths_of_the_error(dtype, group_size):
    w = mx.array(heavy_tailed(96, 512)).astype(dtype)
    plain = error(mx.quantize(w, group_size, 4), w, group_size, 4)
    assert error(quantize(w, group_size, 4), w, group_size, 4) < 0.9 * plain


ODD = {
    "constant": np.ones((8, 64)),
    "zero": np.zeros((8, 64)),
    "few values": np.random.default_rng(1).integers(0, 3, (8, 64)),
    "far from zero": 5 + np.random.default_rng(2).standard_normal((8, 64)) / 100,
    "outliers": np.where(np.arange(512) % 50 == 0, 100, 1).reshape(8, 64)
    * heavy_tailed(8, 64, freedom=3),
    "huge": heavy_tailed(8, 64) * 1e5,
    "tiny": heavy_tailed(8, 64) * 1e-5,
}


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_it_is_never_worse(name, dtype):
    w = mx.array(ODD[name]).astype(dtype)
    for bits in (2, 3, 4, 5, 6):
        plain = error(mx.quantize(w, 32, bits), w, 32, bits)
        assert error(quantize(w, 32, bits), w, 32, bits) <= plain * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_quantized_product_reads_it(bits):
    w = mx.array(heavy_tailed(32, 128)).astype(mx.float32)
    parts, plain = quantize(w, 32, bits), mx.quantize(w, 32, bits)
    assert [(p.shape, p.dtype) for p in parts] == [(p.shape, p.dtype) for p in plain]
    x = mx.random.normal((3, 128), key=mx.random.key(0))
    y = mx.quantized_matmul(x, *parts, True, 32, bits)
    assert mx.allclose(y, x @ mx.dequantize(*parts, 32, bits).T, atol=1e-5)


@pytest.mark.parametrize("mode, group, bits", [("affine", 64, 8), ("mxfp4", 32, 4)])
def test_eight_bits_and_other_modes_are_as_before(mode, group, bits):
    w = mx.array(heavy_tailed(16, 128)).astype(mx.bfloat16)
    ours, plain = quantize(w, group, bits, mode), mx.quantize(w, group, bits, mode)
    assert all(mx.array_equal(*pair) for pair in zip(ours, plain, strict=True))


def test_pieces_are_rounded_as_one(monkeypatch):
    w = mx.array(heavy_tailed(10, 128)).astype(mx.bfloat16)
    once = quantize(w, 64, 4)
    monkeypatch.setitem(quantize.__globals__["PIECE"], mx.cpu, 3 * 128)
    assert all(mx.array_equal(*pair) for pair in zip(once, quantize(w, 64, 4)))


# Bits by layer


def blocks(count: int, width: int = 64) -> dict[str, mx.array]:
    """Shapes of a transformer's blocks: attention, feed-forward, and a gate."""
    kinds = {f"attn1.{k}": (width, width) for k in ("to_q", "to_k", "to_v", "to_out.0")}
    kinds |= {"ff.net.0.proj": (4 * width, width), "ff.net.2": (width, 4 * width)}
    kinds |= {"attn1.to_gate_logits": (2, width)}
    return {
        f"transformer_blocks.{i}.{kind}.weight": mx.zeros(shape, mx.bfloat16)
        for i in range(count)
        for kind, shape in kinds.items()
    }


def bits(how: dict, path: str) -> int:
    return layer_format(how, path)["bits"]


@pytest.mark.parametrize("count", [1, 4, 48])
@pytest.mark.parametrize("least", [3, 4])
def test_a_budget_is_spent_where_the_error_comes_from(count, least):
    tensors, how = blocks(count), quantization(bits=least)
    own = allocate(tensors, how, default_shares)
    size = sum(w.size for w in tensors.values())
    total = 0
    for key, w in tensors.items():
        path = key.removesuffix(".weight")
        stored = bits(how | own, path) + 2 * 16 / 64 if quant_predicate(path) else 16
        total += w.size * stored
    assert least + (0.7 if count == 1 else 0.9) < total / size <= least + 1
    chosen = lambda i, kind: bits(how | own, f"transformer_blocks.{i}.{kind}")
    for i in range(count):
        assert chosen(i, "attn1.to_out.0") > chosen(i, "attn1.to_q") >= least - 1
    assert chosen(0, "ff.net.2") <= chosen(count - 1, "ff.net.2")


def test_a_bit_less_than_8_is_6_as_there_are_no_7():
    tensors, how = blocks(4), quantization(bits=8)
    own = allocate(tensors, how, default_shares)
    assert {bits(how | own, path) for path in layers(tensors, 64)} <= {6, 8}


def test_layers_that_do_not_fit_take_no_bits_from_others():
    tensors = blocks(4) | {
        key.replace("attn1", "attn2"): mx.zeros((64, 2016), mx.bfloat16)
        for key in blocks(4)
    }
    own = allocate(tensors, quantization(), default_shares)
    found = [bits(quantization() | own, p) for p in layers(tensors, 64)]
    assert len(found) == 16 and sum(found) == 4 * 16


def test_mlx_lms_mixed_recipe_has_its_layers():
    how = recipe("mixed_4_8", quantization(), blocks(16))
    high = {path for path in how if isinstance(how[path], dict)}
    numbers = sorted({int(path.split(".")[1]) for path in high})
    assert numbers == [0, 1, 4, 7, 10, 13, 14, 15]
    assert {path.split(".", 2)[2] for path in high} == {"attn1.to_v", "ff.net.2"}
    assert {bits(how, path) for path in high} == {8}


def test_a_file_sets_the_bits_of_single_layers(tmp_path):
    layer = "transformer_blocks.1.attn1.to_v"
    saved = {"bits": 3, "group_size": 32, layer: {"bits": 6}}
    for text in (saved, {"model_type": "ltx2", "quantization": saved}):
        (tmp_path / "bits.json").write_text(json.dumps(text))
        how = recipe(str(tmp_path / "bits.json"), quantization(), blocks(2))
        assert layer_formats(how) == {
            "": {"bits": 3, "group_size": 32, "mode": "affine"},
            layer: {"bits": 6, "group_size": 32, "mode": "affine"},
        }


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"patchify_proj": {"bits": 8}}, "patchify_proj is not a layer"),
        ({"transformer_blocks.2.attn1.to_v": {"bits": 8}}, "is not a layer"),
        ({"bits": 7}, "bits must be one of"),
        ({"transformer_blocks.0.attn1.to_v": {"bit": 8}}, "bit is unknown"),
        ([4], "must be an object"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, saved, message):
    (tmp_path / "bits.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=message):
        recipe(str(tmp_path / "bits.json"), quantization(), blocks(2))


@pytest.mark.parametrize(
    "options, message",
    [
        (("mixed_4_6", "mxfp4", None, None), "mxfp4 does not have"),
        (("mixed_4_6", None, 4, None), "remove --q-bits"),
        (("mixed_9_6", None, None, None), "choose mixed_4_6"),
        ((__file__, None, None, 64), "remove --q-group-size"),
    ],
)
def test_options_that_contradict_a_recipe_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        choose(*options)
