"""The plan of memory: true, acted upon, and told before anything is read."""

import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import widths

import generate
from ltx2 import media, memory, pipeline, text, weights
from ltx2.base import UserError
from ltx2.request import Image, LoraFile, Request

MID = {  # some 20 times the small models' weights
    "transformer": {
        "num_layers": 6,
        "connector_attention_head_dim": 64,
        "audio_connector_attention_head_dim": 32,
        **widths(heads=4, video=64, audio=32),
    },
    "vae": {"decoder_base_channels": 16},
}
SMALL = {"height": 64, "width": 96, "num_frames": 17}


@pytest.fixture
def load(checkpoint):
    def load(name, kind="distilled", low_memory=None, upsamplers=(), **changes):
        model, encoder = str(checkpoint(name, **changes)), str(checkpoint("gemma3"))
        files = [str(checkpoint(u)) for u in upsamplers]
        return pipeline.load(model, encoder, kind, mx.float32, files, low_memory)

    return load


@pytest.fixture
def request_(tmp_path, checkpoint):
    """`request_("image")`: a short run, with what is named."""
    media.save_png(tmp_path / "image.png", np.zeros((64, 64, 3), np.uint8))

    def make(*extras, **options):
        options = SMALL | {"sigmas": (1.0, 0.5, 0.0)} | options
        if "image" in extras:
            options["images"] = (Image(str(tmp_path / "image.png")),)
        if "lora" in extras:
            file = LoraFile(str(checkpoint("ltx-2.3-distilled-lora")))
            options["loras"] = (file,)
        return Request("a dog", **options)

    return make


def assert_true(pipe, request):
    """Every phase's peak is within 15 % of what was predicted."""
    job = pipe.plan(request)
    plan = pipe.memory(job)
    *_, result = pipe.stream(request)
    measured = {k: peak for k, (_, peak) in result.phases.items() if peak}
    assert plan.phases.keys() == measured.keys()
    told = {k: need.total(plan.streamed) for k, need in plan.phases.items()}
    off = {k: round(told[k] / peak, 2) for k, peak in measured.items()}
    assert all(0.85 < ratio < 1.15 for ratio in off.values()), off
    assert plan.peak[0] == pytest.approx(max(measured.values()), rel=0.15)


def test_small_models_need_what_is_told(load, request_):
    assert_true(load("ltx-2", "dev"), request_())
    assert_true(load("ltx-2.3"), request_("image", height=128, width=128))


def test_guidance_and_loras_are_counted(load, request_):
    assert_true(load("ltx-2.3", "dev"), request_("lora", height=128, width=192))


def test_a_second_stage_is_counted(load, request_):
    pipe = load("ltx-2.3", upsamplers=["spatial-x2"])
    assert_true(pipe, request_(height=128, width=128))


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_larger_model_needs_what_is_told(load, request_, low_memory):
    pipe = load("ltx-2.3", low_memory=low_memory, **MID)
    assert_true(pipe, request_(height=128, width=192))


def test_blocks_are_streamed_where_they_do_not_fit(load, request_, monkeypatch):
    pipe, request = load("ltx-2.3", transformer={"num_layers": 40}), request_()
    plan = pipe.memory(pipe.plan(request))
    assert not plan.streamed and plan.peak[1] == "stage1"
    *_, resident = pipe.stream(request)
    monkeypatch.setattr(memory, "available", lambda: int(plan.peak[0] * 0.99))
    *_, streamed = pipe.stream(request)
    peaks = [r.phases["stage1"][1] for r in (resident, streamed)]
    assert peaks[1] < peaks[0] / 2
    assert mx.array_equal(resident.video_latents, streamed.video_latents)


def test_what_does_not_fit_is_refused_with_what_would(load, request_, monkeypatch):
    pipe = load("ltx-2.3", low_memory=True)
    request = request_(height=512, width=768, num_frames=121)
    needed = pipe.memory(pipe.plan(request)).peak[0]
    monkeypatch.setattr(memory, "available", lambda: int(needed / 2))
    monkeypatch.setattr(weights, "evaluate", None)
    with pytest.raises(UserError, match=r"video with|with \d+ frames would fit") as no:
        next(pipe.stream(request))
    size, _, frames = str(no.value).split("; ")[1].split()[:3]
    width, height = map(int, size.split("x"))
    less = replace(request, width=width, height=height, num_frames=int(frames))
    assert pipe.memory(pipe.plan(less)).fits
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(UserError, match="try a lower-bit model"):
        next(pipe.stream(request))


def test_the_command_line_stops_after_its_plan(
    checkpoint, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "evaluate", None)
    monkeypatch.setattr(text.TextEncoder, "__call__", None)
    argv = ["generate.py", "--plan", "--prompt", "a dog", "--height", "64"]
    argv += ["--model", str(checkpoint("ltx-2")), "--kind", "distilled"]
    argv += ["--text-encoder", str(checkpoint("gemma3")), "--width", "64"]
    monkeypatch.setattr(sys, "argv", argv)
    generate.main()
    out = capsys.readouterr().out
    for phase in ("text", "stage1", "audio", "video"):
        assert f"\n{phase} " in out
    assert "the transformer is held in memory" in out
    assert not list(tmp_path.iterdir())


def test_metal_is_told_the_limits(monkeypatch):
    said = {}
    monkeypatch.setattr(mx, "set_wired_limit", lambda n: said.update(wired=n))
    monkeypatch.setattr(mx, "set_cache_limit", lambda n: said.update(cache=n))
    plan = memory.MemoryPlan(
        {"stage1": memory.Footprint(10 * 10**9, 10**9)}, 16 * 10**9
    )
    memory.set_limits(plan)
    assert bool(said) == mx.metal.is_available()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    memory.set_limits(plan)
    assert said == {"wired": 11 * 10**9, "cache": 5 * 10**9}
