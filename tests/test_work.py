"""Counted operations are those that a run computes."""

import math
import re
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import CONFIGS
from pytest import approx

from ltx2 import timing
from ltx2.conditions import Stage
from ltx2.dit import DiTConfig, Pass
from ltx2.latents import Size
from ltx2.request import Request
from ltx2.work import operations, step

SIZE = {"height": 64, "width": 96, "num_frames": 17}
CONVS = "conv1d conv2d conv3d conv_transpose1d conv_general".split()


@pytest.fixture
def computed(monkeypatch):
    """`computed(events)`: operations by phase of products, attention and convolutions."""
    found, phase = {}, ["text"]

    def count(n):
        found[phase[0]] = found.get(phase[0], 0) + n

    def linear(call):
        def counted(layer, x):
            y = call(layer, x)
            count(2 * x.size * y.shape[-1])
            return y

        return counted

    def conv(name, call):
        def counted(x, weight, *args, **options):
            y = call(x, weight, *args, **options)
            transposed = "transpose" in name
            places = math.prod((x if transposed else y).shape[:-1])
            upsampler = phase[0].startswith("stage")
            if options.get("groups", 1) == 1 and not upsampler:  # else a filter
                count(2 * weight.size * places)
            return y

        return counted

    def attend(call):
        def counted(q, k, v, **options):
            count(4 * q.size * k.shape[2])
            return call(q, k, v, **options)

        return counted

    def run(events):
        with ExitStack() as stack:
            patch = lambda *args: stack.enter_context(mock.patch.object(*args))
            patch(nn.Linear, "__call__", linear(nn.Linear.__call__))
            sdpa = mx.fast.scaled_dot_product_attention
            patch(mx.fast, "scaled_dot_product_attention", attend(sdpa))
            for name in CONVS:
                patch(mx, name, conv(name, getattr(mx, name)))
            for event in events:
                if event.step == 0 and not event.snapshot:
                    phase[0] = event.phase
        return found

    return run


@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("ltx-2", "dev", {"steps": 2}),
        ("ltx-2.3", "dev", {"steps": 2, "sampler": "res_2s"}),
        ("ltx-2.3", "distilled", {}),
        ("ltx-2.5", "distilled", {"no_audio": True}),
    ],
)
def test_all_phases_are_counted(load, computed, name, kind, options):
    upsamplers = ["spatial-x2"] if name == "ltx-2.3" else []
    pipe = load(name, kind, upsamplers)
    size = SIZE | ({"height": 128, "width": 128} if upsamplers else {})
    size["fps"] = 50  # little sound, which is slow
    job = pipe.plan(Request("a dog and a cat", **size, **options))
    counted = operations(job, pipe.checkpoint)
    found = computed(pipe.stream(job))
    assert counted.keys() == found.keys()
    for phase in counted.keys() - {"text"}:  # whose encoder is not counted
        tolerance = 0.5 if phase == "audio" else 0.13  # estimated from its weights
        assert counted[phase] == approx(found[phase], rel=tolerance), phase


def test_a_forward_of_the_19b_is_counted():
    c = DiTConfig.from_dict(CONFIGS["ltx-2-19b-dev"]["transformer"])
    size = Size(1920, 1088, 257, 24.0, 268)
    stage = Stage("stage1", size, (1.0, 0.0), conditions={"video": (), "audio": ()})
    assert step(c, stage, [Pass()]) / 1e12 == approx(5360, rel=0.02)
    tiled = replace(stage, tile=(17, 30))
    assert step(c, tiled, [Pass()]) < step(c, stage, [Pass()])  # 9 tiles see less


# Time


@pytest.fixture
def planned(load, monkeypatch):
    """`planned(device, architecture)`: a run's time where a matmul has 1 GFLOP/s."""
    pipe = load("ltx-2.3")
    job = pipe.plan(Request("a dog", **SIZE))

    def plan(device, architecture):
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
        monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
        monkeypatch.setattr(timing, "matmul_rate", lambda dtype: 1e9)
        return timing.time_plan(pipe, [job, job])

    return plan


def test_seconds_are_operations_over_a_share_of_the_matmul_rate(planned, monkeypatch):
    monkeypatch.setattr(timing, "SHARES", {("cpu", "float32"): (0.5, 0.25, 0.1)})
    plan = planned(mx.cpu, "")
    assert list(plan.work) == ["text", "stage1", "audio", "video"]
    assert plan.seconds("stage1") == approx((plan.work["stage1"] / 0.5e9,) * 2)
    assert plan.seconds("video") == approx((plan.work["video"] / 0.25e9,) * 2)
    assert plan.seconds("audio") == approx((plan.work["audio"] / 0.1e9,) * 2)
    text = str(plan)
    assert re.search(r"phase +TFLOP +seconds\n", text) and "\nall " in text
    assert "range" not in text


def test_of_an_unmeasured_device_a_range_is_told(planned):
    plan = planned(mx.gpu, "applegpu_g99x")
    least, most = plan.seconds("stage1")
    assert 0 < least < most
    assert "a range, because applegpu_g99x in float32 was never timed" in str(plan)
    assert re.search(r"phase +TFLOP +seconds from +to\n", str(plan))


def test_the_remaining_time_is_the_measured_one(monkeypatch):
    work = {"text": 9, "stage1": 4, "stage2": 8, "audio": 1, "video": 1}
    left, now = timing.Remaining([work, work]), [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def at(seconds, step, phase="stage1", job=0, steps=4, denoised=True):
        now[0] = seconds
        facts = {"step": step, "steps": steps, "denoised": denoised or None}
        return left(Namespace(phase=phase, job=job, **facts))

    later = 8 + 4 + 8 + 2 + 2  # stage 2, the other video's stages, both decodes
    assert at(0, 0, denoised=False) is None
    assert at(10, 1) == 10 * (3 + later)  # a step is one of this work
    assert at(12, 2) == 2 * (2 + later)  # without reading the weights
    assert at(20, 0, "stage2", 1, denoised=False) is None
    assert at(24, 1, "stage2", 1) == 4 * (3 + 4 / 2)
    assert at(30, 3, "video", 1, steps=9, denoised=False) is None
    # The first video may be decoded before the second one begins.
    left.begun |= {(0, "audio"), (0, "video"), (1, "stage1")}
    assert at(40, 0, "stage2", 1, denoised=False) is None
    assert at(44, 1, "stage2", 1) == 4 * (3 + 2 / 2)
