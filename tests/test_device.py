"""`checks device`: a machine in order passes, planted faults are found."""

import re
import sys
import time
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from ltx2 import base, checks, device
from ltx2.device import Row, judge


def small(monkeypatch) -> None:
    """Sizes for a second."""
    sizes = {"SECONDS": 1e-3, "FILE_BYTES": 1 << 20, "BEYOND": 1 << 20, "WIDTH": 256}
    sizes |= {"HEADS": (64,), "MODES": device.MODES[2:3], "ROWS": 1 << 10}
    for name, size in sizes.items():
        monkeypatch.setattr(device, name, size)


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """`check()`: exit code and rows of `checks device`."""
    small(monkeypatch)

    def call() -> tuple[int, list[list[str]]]:
        monkeypatch.setattr(sys, "argv", ["", "device", "--folder", str(tmp_path)])
        with pytest.raises(SystemExit) as end:
            base.run(checks.main)
        assert not list(tmp_path.iterdir())
        lines = capsys.readouterr().out.splitlines()
        assert f"MLX {mx.__version__}" in lines[0] and lines[-1].endswith(" slow")
        return end.value.code, [re.split("  +", line) for line in lines[1:-1]]

    return call


def test_every_check_is_in_the_table(check):
    code, rows = check()
    assert code == 0
    found = " ".join(row[0] for row in rows)
    for name in ("memory", "heads of 64", "Winograd", "TF32", "2^31"):
        assert name in found
    for name in ("affine at 4 bits", "disk", "order of loads", "matmul", "attention,"):
        assert name in found
    assert not any("wrong" in row for row in rows)


def states(rows: list[Row]) -> set[str]:
    return {row.state for row in rows}


@pytest.mark.parametrize("dim", device.HEADS)
def test_attention_equals_numpys(dim):
    [row] = judge("", device.attention_cases(dim))
    assert row.state == "ok" and "15 cases" in row.found


@pytest.mark.parametrize("mode", device.MODES, ids=lambda m: f"{m[0]}-{m[1]}")
def test_quantized_products_equal_numpys(mode):
    [row] = judge("", device.quantized_cases(*mode))
    assert row.state == "ok", row


def rounded(x: mx.array) -> mx.array:
    """To the 10 bits of TF32."""
    bits = (x.view(mx.uint32) + 0x1000) & 0xFFFFE000
    return bits.view(mx.float32)


def test_a_convolution_in_tf32_is_found(monkeypatch):
    convolve = mx.conv3d
    fault = lambda x, w, **how: convolve(rounded(x), rounded(w), **how)
    monkeypatch.setattr(mx, "conv3d", fault)
    rows = judge("", device.winograd_cases())
    assert len(rows) == 2 and states(rows) == {"wrong"}  # not the 2-D one
    assert all("TF32" in row.advice for row in rows)


def test_tf32_products_are_found(monkeypatch):
    multiply = mx.matmul
    assert device.tf32().state == "ok"
    monkeypatch.setattr(mx, "matmul", lambda a, b: multiply(rounded(a), rounded(b)))
    assert device.tf32().state == "wrong" and "not" not in device.tf32().found


def test_a_wrong_kernel_is_named_and_counts_as_a_fault(check, monkeypatch):
    attend = mx.fast.scaled_dot_product_attention

    def fault(q, k, v, mask=None, **options):  # forgets the mask
        mask = None if isinstance(mask, mx.array) and mask.dtype == mx.bool_ else mask
        return attend(q, k, v, mask=mask, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fault)
    code, rows = check()
    wrong = [row for row in rows if "wrong" in row]
    assert code == 1 and len(wrong) == 3  # three dtypes
    assert all("boolean mask" in " ".join(row) for row in wrong)


@pytest.mark.parametrize("fault", [lambda y: 1.001 * y, lambda y: mx.nan * y])
def test_a_slightly_wrong_or_infinite_product_is_found(monkeypatch, fault):
    multiply = mx.quantized_matmul
    broken = lambda *parts, **how: fault(multiply(*parts, **how))
    monkeypatch.setattr(mx, "quantized_matmul", broken)
    assert states(judge("", device.quantized_cases("affine", 4, (64,)))) == {"wrong"}


def test_a_product_that_is_wrong_only_for_the_tokens_of_a_clip_is_found(monkeypatch):
    """As MLX's was before 0.32: the first rows of more than 32768."""
    multiply = mx.quantized_matmul

    def fault(x, *parts, **how):
        lost = mx.arange(len(x))[:, None] < len(x) - 32768
        return mx.where(lost, 0, multiply(x, *parts, **how))

    monkeypatch.setattr(mx, "quantized_matmul", fault)
    rows = judge("", device.quantized_cases("affine", 4, (64,)))
    assert [(r.state, "40000 rows" in r.found) for r in rows] == [("wrong", True)]


def test_a_kernel_that_does_not_exist_is_a_row(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("[conv] not\nimplemented")

    monkeypatch.setattr(mx, "conv2d", missing)
    [row] = judge("convolutions", device.winograd_cases())
    assert row.state == "wrong" and row.found == "3x3, float32: [conv] not implemented"


def test_wrong_large_offsets_are_found(monkeypatch):
    monkeypatch.setattr(device, "BEYOND", 1 << 14)
    assert device.large_offsets().state == "ok"
    monkeypatch.setattr(mx, "take", lambda x, i, axis: x[i % 8])
    assert device.large_offsets().state == "wrong"
    monkeypatch.setattr(device, "available", lambda: 1 << 15)
    assert device.large_offsets().state == "-"


def test_a_slow_disk_and_loads_in_a_wrong_order_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "FILE_BYTES", 1 << 16)
    load = mx.load

    def slow(path):
        time.sleep(1e-3)  # for 65 kB
        return load(path)

    def shuffled(path):
        tensors = load(path)
        return dict(zip(tensors, [*tensors.values()][::-1]))

    monkeypatch.setattr(mx, "load", slow)
    disk, order = device.disk(tmp_path)
    assert disk.state == "slow" and "faster disk" in disk.advice
    assert order.state == "ok"
    monkeypatch.setattr(mx, "load", shuffled)
    assert device.disk(tmp_path)[1].state == "wrong"


def test_a_full_disk_is_not_measured(monkeypatch, tmp_path):
    usage = lambda _: SimpleNamespace(free=1000)
    monkeypatch.setattr(device.shutil, "disk_usage", usage)
    assert device.disk(tmp_path) == [Row("disk", "-", "the disk is full")]


def test_a_missing_folder_is_found_first(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "device", "--folder", "nowhere"])
    with pytest.raises(SystemExit) as end:
        base.run(checks.main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --folder nowhere: no such folder\n"


def test_slow_attention_is_found(monkeypatch):
    small(monkeypatch)
    attend = mx.fast.scaled_dot_product_attention

    def slow(*arrays, **options):
        time.sleep(0.5)
        return attend(*arrays, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", slow)
    states = {row.check: row.state for row in device.rates()}
    assert states["attention, TFLOP/s"] == "slow"


def test_little_memory_is_said(monkeypatch):
    monkeypatch.setattr(device, "available", lambda: 12 * 10**9)
    row = device.memory()
    assert row.state == "slow" and row.found.startswith("12.0 GB")


def test_fp8_is_e4m3():
    codes = np.array([0x00, 0x01, 0x38, 0x7E, 0xB8])
    assert device.fp8(codes).tolist() == [0, 2**-9, 1, 448, -1]
    theirs = mx.from_fp8(mx.array(codes.astype(np.uint8)), mx.float32)
    assert np.array_equal(theirs, device.fp8(codes))
