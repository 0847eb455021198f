"""The memory plan: predictions against measured peaks, and what follows from them."""

import gc
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import CONFIGS, widths
from test_pipeline import events_to_latents

import generate
from ltx2 import media, memory, pipeline, text, weights
from ltx2.base import UserError
from ltx2.latents import Size
from ltx2.request import Image, LoraFile, Request, Segment
from ltx2.text import MAX_TOKENS
from ltx2.windows import WHOLE

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import convert_memory  # noqa: E402

pytestmark = pytest.mark.cpu  # where plans are measured
MID = {  # about 20 times the weights of the small models
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
def request_(tmp_path, checkpoint):
    """`request_("image", "lora")`: a short video with an image and a LoRA."""
    media.save_png(tmp_path / "image.png", np.zeros((64, 64, 3), np.uint8))

    def make(*extras, **options):
        options = SMALL | {"sigmas": (1.0, 0.5, 0.0), "seed": 1} | options
        if "image" in extras:
            options["images"] = (Image(str(tmp_path / "image.png")),)
        if "lora" in extras:
            file = LoraFile(str(checkpoint("ltx-2.3-distilled-lora")))
            options["loras"] = (file,)
        return Request("a dog", **options)

    return make


def assert_predicted(pipe, request, audio=True):
    """The measured peak of every phase is within 15 % of its prediction. Without `audio`
    the vocoder, which takes most of the time, is replaced by the caller."""
    plan = pipe.memory(pipe.plan(request))
    gc.collect()
    others = mx.get_active_memory()  # of earlier tests
    *_, result = pipe.stream(request)
    peaks = {k: peak - others for k, (_, peak) in result.phases.items() if peak}
    assert plan.phases.keys() == peaks.keys()
    compared = {k: peak for k, peak in peaks.items() if audio or k != "audio"}
    assert_close(plan, compared)
    if audio:
        assert plan.peak[0] == pytest.approx(max(peaks.values()), rel=0.15)


def assert_stages_predicted(pipe, request):
    """The same for the stages; nothing is encoded or decoded."""
    job = pipe.plan(request)
    plan, peaks = pipe.memory(job), {}
    gc.collect()
    others = mx.get_active_memory()
    for event in events_to_latents(pipe, job, contexts=random_contexts(pipe, job)):
        peaks[event.phase] = mx.get_peak_memory() - others
    assert_close(plan, {stage.name: peaks[stage.name] for stage in job.stages})


def assert_close(plan, peaks):
    ratios = {
        phase: round(plan.phases[phase].total(plan.streamed) / peak, 2)
        for phase, peak in peaks.items()
    }
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios


def random_contexts(pipe, job):
    """Contexts of the full length, without the text encoder."""
    video, audio = (heads * dim for heads, dim in pipe._estimator.connectors)
    draw = lambda width: mx.random.normal((1, MAX_TOKENS, width))
    return {prompt: (draw(video), draw(audio)) for prompt in job.prompts}


def test_all_phases_of_small_models_are_predicted(load, request_):
    assert_predicted(load("ltx-2", "dev"), request_(fps=50))
    size = {"height": 128, "width": 128, "fps": 50}  # little sound, which is slow
    assert_predicted(load("ltx-2.3"), request_("image", **size))


def test_guidance_and_loras_are_predicted(load, request_):
    request = request_("lora", height=128, width=192)
    assert_stages_predicted(load("ltx-2.3", "dev"), request)


def test_nag_and_segments_are_predicted(load, request_):
    size = {"height": 128, "width": 192}
    request = request_(nag_scale=5.0, **size)
    assert_stages_predicted(load("ltx-2.3"), request)
    segments = [Segment(0, 0.35, "a"), Segment(0.35, 0.7, "b")]
    assert_stages_predicted(load("ltx-2.3"), replace(request, segments=segments))


def test_weights_of_attention_are_predicted(load, request_, tmp_path):
    media.save_png(tmp_path / "clip.png", np.zeros((64, 64, 3), np.uint8))
    reference = {"video": str(tmp_path / "clip.png"), "reference_attention": 0.5}
    size = {"height": 512, "width": 512, "num_frames": 9, "no_audio": True}
    pipe = load("ltx-2.3")
    assert_stages_predicted(pipe, request_("lora", **size, **reference))


def test_a_second_stage_is_predicted(load, request_):
    pipe = load("ltx-2.3", upsamplers=["spatial-x2"])
    assert_stages_predicted(pipe, request_(height=128, width=128))


def test_no_streamed_block_is_held_while_latents_are_enlarged(load, request_):
    pipe = load("ltx-2.3", upsamplers=["spatial-x2"])
    stage = pipe.plan(request_(height=128, width=128)).stages[1]
    e = pipe._estimator
    e.size[stage.upsampler] = 10**9  # as in the released files, more than a block
    need, enlarging = e.stage(stage, 0, 0, 1), 10**9 + e.upsampling(stage)
    assert need.total() == e.size["transformer"] + enlarging
    rest = e.size["transformer"] - e.blocks
    assert need.total(True) == pytest.approx(rest + enlarging)


def test_a_larger_model_is_predicted(load, request_, quick_vocoder):
    pipe, request = load("ltx-2.3", **MID), request_(height=128, width=192)
    assert_predicted(pipe, request, audio=False)
    pipe.low_memory = True
    assert_stages_predicted(pipe, request)


def test_all_phases_of_the_demo_are_predicted():
    pipe = pipeline.load(str(Path(__file__).parents[1] / "demo/model"), dtype="float32")
    assert_predicted(pipe, Request("a", seed=1, num_frames=9, sigmas=(1.0, 0.0)))


def test_memory_does_not_grow_with_the_number_of_windows(load):
    pipe = load("ltx-2.5")
    options = {"height": 64, "width": 96, "stages": "one", "no_audio": True}
    options |= {"chunk_frames": 49, "carry_frames": 25, "sigmas": (1.0, 0.0)}
    peaks = []
    for count in (2, 10):
        job = pipe.plan(
            Request("a", seed=10, num_frames=49 + 24 * (count - 1), **options)
        )
        assert len(job.windows) == count
        gc.collect()
        others = mx.get_active_memory()
        *_, result = pipe.stream(job, contexts=random_contexts(pipe, job))
        peaks.append({k: peak - others for k, (_, peak) in result.phases.items()})
        planned = job.memory.phases["video"].total(False)
        assert 0.85 < planned / peaks[-1]["video"] < 1.15
    two, ten = (max(found.values()) for found in peaks)
    assert ten < 1.05 * two


@pytest.mark.usefixtures("in_step")
def test_blocks_are_streamed_if_they_do_not_fit(load, request_, monkeypatch):
    pipe = load("ltx-2.3", transformer={"num_layers": 16})
    job = pipe.plan(request_(no_audio=True))
    plan = pipe.memory(job, text=False)
    assert not plan.streamed and plan.peak[1] == "stage1"
    contexts = random_contexts(pipe, job)
    gc.collect()
    others = mx.get_active_memory()

    def run():
        peaks = {}
        job = pipe.plan(request_(no_audio=True))
        for event in events_to_latents(pipe, job, contexts=contexts):
            peaks[event.phase] = mx.get_peak_memory() - others
        pipe.free("transformer")
        return peaks["stage1"], event.snapshot.latents["video"]

    resident, latents = run()
    monkeypatch.setattr(memory, "available", lambda: int(plan.peak[0] * 0.99))
    streamed, same = run()
    assert streamed < resident / 2
    assert mx.array_equal(latents, same)


def test_a_refused_picture_gets_a_smaller_size():
    request = Request("", height=1024, width=1024, num_frames=1)
    found = memory.suggest_smaller(request, lambda r: r.height <= 512)
    assert found == "512x512 with 1 frames would fit"


def test_a_refused_request_gets_a_size_that_fits(load, request_, monkeypatch):
    pipe = load("ltx-2.3", low_memory=True)
    request = request_(height=512, width=768, num_frames=121)
    needed = pipe.memory(pipe.plan(request)).peak[0]
    monkeypatch.setattr(memory, "available", lambda: int(needed / 2))
    monkeypatch.setattr(weights, "evaluate", None)
    with pytest.raises(UserError, match=r"; .*with \d+ frames would fit") as no:
        next(pipe.stream(request))
    found = re.search(r"(\d+)x(\d+) with (\d+) frames would fit", str(no.value))
    width, height, frames = map(int, found.groups())
    less = replace(request, width=width, height=height, num_frames=frames)
    assert pipe.memory(pipe.plan(less)).fits
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(UserError, match="try a lower-bit model"):
        next(pipe.stream(request))


def test_a_refused_long_request_is_offered_windows_that_fit(
    load, request_, monkeypatch
):
    pipe = load("ltx-2.3", low_memory=True)
    request = request_(height=512, width=768, num_frames=121)
    need = lambda r: pipe.memory(pipe.plan(r)).peak[0]
    shorter = replace(request, chunk_frames=65)
    limit = (need(shorter) + need(replace(request, chunk_frames=97))) / 2
    monkeypatch.setattr(memory, "available", lambda: int(limit))
    with pytest.raises(UserError, match="it fits in windows: --chunk-frames 65"):
        next(pipe.stream(request))
    assert pipe.memory(pipe.plan(shorter)).fits


def test_the_plan_flag_only_prints_the_plan(checkpoint, monkeypatch, capsys, tmp_path):
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


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The headers of the 19B."""
    path = tmp_path_factory.mktemp("released") / "ltx-2-19b-distilled.safetensors"
    convert_memory.synthesize(path, 48)
    source = weights.open_model(str(path))
    source.config["spatial_upsampler"] = CONFIGS["ltx-2-spatial-upscaler-x2-1.0"]
    return source


# GB of buffers: encoding a clip or an image, decoding, upsampling. Unbounded, a single
# convolution of the clip would take 1.9, 4.3 and 9.7 GB, of the upsampler 1.3, 2 and 6.
@pytest.mark.parametrize(
    "size, expected",
    [
        ((768, 512, 121), (2.55, 1.10, 1.89, 1.28)),
        ((1280, 704, 121), (4.77, 2.00, 3.41, 1.73)),
        ((1920, 1088, 257), (11.05, 1.94, 6.07, 4.16)),
    ],
)
def test_what_convolutions_hold_on_metal(released, monkeypatch, size, expected):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    estimator = memory.Estimator(released, mx.bfloat16)
    stage = Namespace(size=Size(*size, 24.0), upsampler="spatial_upsampler", part=WHOLE)
    convolve = estimator.convolutions
    found = [convolve(stage.size, "encoder", frames) for frames in (8, 1)]
    found += [convolve(stage.size, "decoder"), estimator.upsampling(stage)]
    assert [n / 1e9 for n in found] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    "metal, weights, expected",
    [
        (True, 10, []),  # there is room
        (True, 13, [("wired", 14 * 10**9)]),
        (True, 20, [("wired", 16 * 10**9)]),  # not more than is recommended
        (False, 13, []),
    ],
)
def test_only_a_tight_plan_is_wired_and_limits_return(
    monkeypatch, metal, weights, expected
):
    calls, limits = [], {"wired": 5, "memory": 99}

    def setter(name):
        def set_limit(n):
            calls.append((name, n))
            before, limits[name] = limits[name], n
            return before

        return set_limit

    for name in limits:
        monkeypatch.setattr(mx, f"set_{name}_limit", setter(name))
    monkeypatch.setattr(mx, "set_cache_limit", None)  # it would churn
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    phases = {"stage1": memory.Footprint(weights * 10**9, 10**9)}
    with pytest.raises(KeyboardInterrupt):
        with memory.limits(memory.MemoryPlan(phases, 16 * 10**9)):
            assert calls == [("memory", 16 * 10**9), *expected]
            raise KeyboardInterrupt
    assert limits == {"wired": 5, "memory": 99}


def test_a_run_is_limited_until_it_ends_or_is_closed(load, request_, monkeypatch):
    pipe, limit = load("ltx-2.3"), 10**10
    monkeypatch.setattr(memory, "available", lambda: limit)
    now = lambda: mx.set_memory_limit(limit)
    job = pipe.plan(request_(no_audio=True))
    before = now()
    mx.set_memory_limit(before)
    events = pipe.stream(job, contexts=random_contexts(pipe, job))
    next(events)
    assert now() == limit
    events.close()
    assert mx.set_memory_limit(before) == before


@pytest.mark.parametrize(
    "limit, streamed, keeps", [(16, False, True), (15, False, False), (16, True, False)]
)
def test_a_transformer_is_kept_if_it_fits_next_to_other_phases(limit, streamed, keeps):
    need = memory.Footprint
    phases = {"text": need(3, 1), "stage1": need(10, 4), "video": need(2, 4)}
    assert memory.MemoryPlan(phases, limit, streamed).keeps_transformer == keeps
