"""Low precision: quantized products, float16 without overflow."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from parity import cosine, relative_error
from streams import inputs, load
from test_dit import four_passes

from ltx2 import conversion, linear, pipeline, weights
from ltx2.linear import QuantizedLinear, dequantize_from, quantize
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
        monkeypatch.setattr(linear, "dequantize_from", lambda rows=rows: rows)
        ways.append(layer(x))
    assert relative_error(*ways) < 1e-5


@pytest.mark.parametrize(
    "device, chip, rows",
    [
        (mx.cpu, "x86_64", 6),
        (mx.gpu, "applegpu_g13s", 512),  # M1
        (mx.gpu, "applegpu_g14d", 512),  # M2
        (mx.gpu, "applegpu_g15s", float("inf")),  # M3
        (mx.gpu, "sm_90", float("inf")),
    ],
)
def test_dequantizing_depends_on_the_chip(monkeypatch, device, chip, rows):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device, 0))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": chip})
    assert dequantize_from.__wrapped__() == rows


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


def test_a_float16_run_is_close_to_a_float32_run(checkpoint):
    frames = []
    for dtype in (mx.float32, mx.float16):
        model, encoder = str(checkpoint("ltx-2.3")), str(checkpoint("gemma3"))
        pipe = pipeline.load(model, encoder, "dev", dtype)
        sizes = {"height": 64, "width": 64, "num_frames": 9, "steps": 2}
        events = pipe.stream(Request("a dog", **sizes, no_audio=True))
        frames.append(
            [e.frames for e in events if getattr(e, "frames", None) is not None]
        )
    a, b = (np.concatenate(f).astype(np.float32) for f in frames)
    assert np.abs(a - b).mean() < 3  # of 255
