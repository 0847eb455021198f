"""Low precision: quantized products, float16 without overflow."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from parity import cosine, relative_error
from streams import inputs, load
from test_dit import four_passes
from test_pipeline import events_to_latents

import generate
from ltx2 import chips, conversion, linear, pipeline, weights
from ltx2.base import OutputError
from ltx2.chips import Chip
from ltx2.dit import DiT
from ltx2.layers import FeedForward
from ltx2.linear import QuantizedLinear, quantize
from ltx2.request import Request

MODES = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_dequantizing_first_gives_the_same_product(monkeypatch, mode, bias):
    bits, group = MODES[mode]
    model = nn.Sequential(nn.Linear(128, 96, bias))
    quantize(model, bits=bits, group_size=group, mode=mode)
    [layer] = model.layers
    assert type(layer) is QuantizedLinear
    x = mx.random.normal((1, 7, 128))
    ways = []
    for rows in (8, 7):  # without and with dequantizing
        chip = Chip(dequantize_from=rows)
        monkeypatch.setattr(linear, "this_chip", lambda chip=chip: chip)
        ways.append(layer(x))
    assert relative_error(*ways) < 1e-5


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
@pytest.mark.parametrize("bits", [3, 5, 6])
def test_a_wide_layer_is_dequantized_in_parts(monkeypatch, bits):
    model = nn.Sequential(nn.Linear(1024, 1024))
    quantize(model, bits=bits)
    [layer], x = model.layers, mx.random.normal((1, 8, 1024))
    whole = 4 * 1024 * 1024
    change = lambda rows: mx.ones((1024, 1024))[rows]
    expected = x @ (layer.dequantized(mx.float32) + 1).T
    mx.eval(x, layer.parameters(), expected)
    monkeypatch.setattr(linear, "this_chip", lambda: Chip("", 6, 40 * 1024))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(layer(x))
    assert mx.get_peak_memory() - before < 2 * whole  # at once: 4, 6 and 7 times
    assert relative_error(layer(x, change), expected + layer.bias) < 1e-5


@pytest.mark.parametrize(
    "device, name, expected",
    [
        (mx.cpu, "x86_64", Chip("bfloat16", 6, 1 << 20)),
        (mx.cpu, "applegpu_g13s", Chip("bfloat16", 6, 1 << 20)),  # a Mac on its CPU
        (mx.gpu, "applegpu_g13s", Chip("float16", 512)),  # M1 Max
        (
            mx.gpu,
            "applegpu_g13d",
            Chip("float16", 512, inputs_at_a_time=2048),
        ),  # M1 Ultra
        (mx.gpu, "applegpu_g14d", Chip("float16", 512)),  # M2 Ultra
        (mx.gpu, "applegpu_g15s", Chip()),  # M3 Max
        (mx.gpu, "sm_90", Chip("bfloat16")),
    ],
)
def test_what_pays_depends_on_the_chip(monkeypatch, device, name, expected):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device, 0))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": name})
    assert chips.this_chip.__wrapped__() == expected


@pytest.mark.parametrize("bias", [False, True])
def test_a_feed_forward_is_the_same_with_its_inputs_in_parts(monkeypatch, bias):
    layer, products = FeedForward(16, bias), []
    x, rows = mx.random.normal((1, 12, 16)), mx.random.normal((1, 9, 16))
    whole, few = layer(x), layer(rows)
    monkeypatch.setattr(linear, "MANY_ROWS", 10)
    monkeypatch.setattr(linear, "this_chip", lambda: Chip(inputs_at_a_time=24))
    monkeypatch.setattr(nn.Linear, "__call__", counted(products, nn.Linear.__call__))
    assert relative_error(layer(x), whole) < 1e-6  # 24, 24 and 16 of 64
    assert len(products) == 1  # the other product was in parts
    assert mx.array_equal(layer(rows), few)
    assert len(products) == 3


def counted(calls: list, function):
    return lambda *args: calls.append(args) or function(*args)


def test_a_loaded_model_has_our_quantized_layers(checkpoint, tmp_path, monkeypatch):
    source = weights.open_model(str(checkpoint("ltx-2")))
    how = conversion.quantization(group_size=32)
    conversion.Conversion(source, how).write(tmp_path / "model")
    model = weights.open_model(str(tmp_path / "model")).load("transformer")
    found = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear)]
    assert found and all(type(m) is QuantizedLinear for m in found)


@pytest.mark.parametrize("name", ["ltx-2", "ltx-2.3"])
def test_float16_runs_keep_states_beyond_the_range_of_float16(checkpoint, golden, name):
    outputs = []
    for dtype in (mx.float32, mx.float16):
        model = load(checkpoint(name), dtype)
        for block in model.transformer_blocks:  # gates near the largest float16
            for prefix in ("", "audio_"):
                table = block[prefix + "scale_shift_table"]
                table[mx.array([2, 5])] = 60000
        video, audio, texts = inputs(model, golden(f"{name}/transformer_basic"))
        largest = []
        trace = lambda key, x, largest=largest: largest.append(mx.abs(x).max().item())
        outputs.append(model(video, audio, texts, four_passes(), trace))
        assert mx.finfo(mx.float16).max < max(largest) < float("inf")
    for exact, half in zip(*outputs):
        for a, b in zip(half, exact):
            assert a.dtype == mx.float16
            assert cosine(a, b) > 0.999


def test_a_float16_run_is_close_to_a_float32_run(checkpoint, short_contexts):
    frames = []
    for dtype in (mx.float32, mx.float16):
        model, encoder = str(checkpoint("ltx-2.3")), str(checkpoint("gemma3"))
        pipe = pipeline.load(model, encoder, "dev", dtype)
        sizes = {"height": 64, "width": 64, "num_frames": 9, "steps": 2}
        events = pipe.stream(Request("a dog", seed=10, **sizes, no_audio=True))
        frames.append(
            [e.frames for e in events if getattr(e, "frames", None) is not None]
        )
    a, b = (np.concatenate(f).astype(np.float32) for f in frames)
    assert np.abs(a - b).mean() < 3  # of 255


# --dtype auto


def test_auto_is_resolved_printed_and_recorded(checkpoint, monkeypatch):
    model, encoder = str(checkpoint("ltx-2.3")), str(checkpoint("gemma3"))
    for chip, dtype in (("applegpu_g14s", "float16"), ("applegpu_g16s", "bfloat16")):
        monkeypatch.setattr(pipeline, "this_chip", lambda c=chip: chips.chip_named(c))
        for option in (None, "auto"):
            pipe = pipeline.load(model, encoder, dtype=option)
            job = pipe.plan(Request("a dog"))
            assert pipe.dtype == getattr(mx, dtype)
            assert f", {dtype}, seed" in generate.describe(pipe, job)
            assert pipe.initial_snapshot(job).load.dtype == dtype
        assert pipeline.load(model, encoder, dtype="float32").dtype == mx.float32


@pytest.fixture
def overflowing(checkpoint, monkeypatch):
    """`overflowing(dtype)`: the events of a run whose model overflows in float16."""
    monkeypatch.setattr(pipeline, "this_chip", lambda: Chip("float16"))
    call = DiT.__call__

    def overflow(model, *args):
        factor = mx.inf if model.dtype == mx.float16 else 1
        return [tuple(v * factor for v in pair) for pair in call(model, *args)]

    monkeypatch.setattr(DiT, "__call__", overflow)

    def run(dtype):
        model, encoder = str(checkpoint("ltx-2.3")), str(checkpoint("gemma3"))
        pipe = pipeline.load(model, encoder, "distilled", dtype)
        size = {"height": 64, "width": 64, "num_frames": 9, "sigmas": (1.0, 0.5, 0.0)}
        job = pipe.plan(Request("a dog", seed=10, **size))
        contexts = {"a dog": (mx.ones((1, 1024, 128)), mx.ones((1, 1024, 64)))}
        return list(events_to_latents(pipe, job, contexts=contexts))

    return run


def test_a_first_step_that_is_not_finite_is_repeated_in_bfloat16(overflowing, caplog):
    *events, last = overflowing("auto")
    assert "the first step of stage1 is not finite: repeated in bfloat16" in caplog.text
    assert [e.step for e in events if e.phase == "stage1"] == [0, 1, 2]
    assert {e.snapshot.load.dtype for e in events if e.snapshot} == {"bfloat16"}
    expected = overflowing("bfloat16")[-1].snapshot.latents
    for name, x in last.snapshot.latents.items():
        assert mx.array_equal(x, expected[name])


def test_a_chosen_float16_is_not_replaced(overflowing):
    with pytest.raises(
        OutputError, match="stage1: step 1 predicted values that are not finite"
    ):
        overflowing("float16")
