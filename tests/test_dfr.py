"""DFR: its canvas and slices, complete runs against the reference, and refused requests."""

import dataclasses
import gc
import sys

import mlx.core as mx
import numpy as np
import pytest
from test_ltx25 import plan
from test_pipeline import (
    events_to_latents,
    latents_of,
    recorded_contexts,
)

import generate
from ltx2 import media, weights
from ltx2.base import UserError
from ltx2.conditions import GuideImage, ShowImage, SliceKeyframes, SliceSound
from ltx2.latents import LatentState, Size
from ltx2.request import Image, LoraFile, Request
from ltx2.snapshot import Snapshot
from ltx2.tiles import TiledDenoiser, equal_spans
from ltx2.windows import EnlargedSlice, canvas, conditioned_rate, slices

SIZE = {"height": 128, "width": 128, "stages": "dfr"}
QUICK = SIZE | {"num_frames": 41, "temporal_rounds": 1, "sigmas": (1.0, 0.5, 0.0)}


@pytest.fixture(scope="module")
def load(load):
    """`load("dev")`: the small 2.5 with both upsamplers, or with those of `ups`."""
    both = "spatial-x2", "temporal-x2"
    return lambda kind="distilled", ups=both: load("ltx-2.5", kind, ups)


# Layout


@pytest.mark.parametrize(
    "frames, total, keyframes",
    [
        (9, 25, (24,)),
        (25, 25, (24,)),
        (33, 33, (32,)),
        (41, 49, (24, 48)),
        (97, 97, (32, 64, 96)),  # 24 would do as well
        (121, 121, (24, 48, 72, 96, 120)),
    ],
)
def test_a_canvas_has_complete_segments(frames, total, keyframes):
    assert canvas(frames) == (total, keyframes)


@pytest.mark.parametrize(
    "segments, rate, parts",
    [
        (1, 2, [(0, 1)]),
        (2, 2, [(0, 1), (1, 2)]),
        (5, 2, [(0, 3), (3, 5)]),
        (3, 4, [(0, 1), (1, 2), (2, 3)]),
        (6, 4, [(0, 2), (2, 4), (4, 5), (5, 6)]),
    ],
)
def test_slices_divide_the_segments(segments, rate, parts):
    ours = slices(segments, 48, rate)
    assert [(part.start, part.stop) for part in ours] == parts


def test_a_later_slice_begins_with_the_keyframe_before_its_seam():
    first, second = slices(2, 48, 2)
    assert (first.first, first.num_frames, first.held) == (0, 49, 0)
    assert (second.first, second.num_frames, second.held) == (24, 73, 4)
    assert first.slots == (24,) and second.slots == (48,)
    stills = mx.array([[48, 96]])
    assert [(at, stills[0, n].item()) for at, n in first.anchor_places] == [(48, 48)]
    assert [(at, stills[0, n].item()) for at, n in second.anchor_places] == [(72, 96)]
    before = {"video": mx.arange(13)[None], "refined": 100 + mx.arange(7)[None]}
    before["slots"] = mx.array([[1000]])
    cut = second.cut(before)[0].tolist()
    assert cut == [1000, *range(4, 13)]
    assert second.held_latents(before)[0].tolist() == [1000, 104, 105, 106]
    assert second.seeds(before)[0].tolist() == [9]


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rate", [2, 4])
@pytest.mark.parametrize("length", [48, 64])
def test_slices_cover_the_canvas_and_the_earlier_one_wins(segments, rate, length):
    frames = segments * length // 8 + 1
    ends = mx.arange(1, segments + 1)[None] * length
    given = {"video": mx.arange(frames)[None], "keyframes": ends}
    parts = slices(segments, length, rate)
    for n, part in enumerate(parts):
        made = part.first // 8 + mx.arange(part.num_frames // 8 + 1)[None] + 1000 * n
        slots = mx.array([part.slots]) + part.first
        given = part.merge(given, {"video": made, "keyframes": slots})
    assert given.keys() == {"video", "keyframes"}
    video, by = given["video"][0] % 1000, given["video"][0] // 1000
    assert video.tolist() == list(range(frames))
    for n, part in enumerate(parts):  # each up to the latent of its last keyframe
        assert by[part.stop * length // 8].item() == n
    every = range(length // 2, segments * length + 1, length // 2)
    assert given["keyframes"][0].tolist() == list(every)


def test_above_30_frames_per_second_the_model_is_told_60():
    assert [conditioned_rate(fps) for fps in (24, 30, 48, 96)] == [24, 30, 60, 60]


# Runs


def test_a_temporal_round_doubles_the_frame_rate_not_the_duration(
    load, checkpoint, quick_text, quick_vocoder, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tqdm.tqdm.display", lambda *a, **k: None)
    argv = ["generate.py", "--model", str(checkpoint("ltx-2.5")), "--prompt", "a fox"]
    for up in ("spatial-x2", "temporal-x2"):
        argv += ["--upsampler", str(checkpoint(up, in_channels=20))]
    argv += "--kind distilled --dtype float32 --height 128 --width 128".split()
    argv += "--num-frames 9 --stages dfr --temporal-rounds 1 --sigmas 1,0.5,0".split()
    argv += ["--detailing-lora", str(checkpoint("ltx-2.5-lora2")) + ":0.5"]
    monkeypatch.setattr(sys, "argv", argv)
    generate.main()
    assert "note: 25 frames are generated" in capsys.readouterr().out
    made = media.probe("output.mp4")
    assert (made.num_frames, made.fps, made.has_audio) == (17, 48, True)
    assert made.audio_duration == pytest.approx(17 / 48, abs=0.03)
    again = Request(**media.read_metadata("output.mp4")["request"])
    assert (again.temporal_rounds, again.detailing_lora.strength) == (1, 0.5)


def test_a_run_resumes_between_slices_and_within_one(load, golden, tmp_path):
    pipe, contexts = load(), recorded_contexts(golden, "ltx-2.5")
    [prompt] = contexts
    request = Request(prompt, seed=10, no_audio=True, **QUICK)
    events = list(events_to_latents(pipe, request, contexts=contexts))
    complete = events[-1].snapshot.latents["video"]
    assert complete.shape == (1, 11, 4, 4, 20)
    for step in (2, 4):
        left = next(e for e in events if (e.phase, e.step) == ("stage4", step))
        names = {"video", "refined", "keyframes", "slots"}
        assert left.snapshot.latents.keys() == names
        left.snapshot.save(tmp_path / "left.safetensors")
        read = Snapshot.read(tmp_path / "left.safetensors")
        resumed = latents_of(pipe, contexts=contexts, resume=read)
        assert mx.array_equal(resumed["video"], complete)


def test_the_epilogue_has_a_coarse_and_a_fine_pass_of_each_of_the_last_slices(load):
    request = Request("a fox", seed=10, detailing_lora=None, spatial_rounds=1, **QUICK)
    job = load().plan(request)
    sizes = [(stage.size.height, stage.seen) for stage in job.stages]
    assert sizes[:4] == [(32, 1), (64, 1), (64, 1), (64, 1)]
    assert sizes[4:] == [(128, (3 / 4) ** 2), (128, 1 / 16)] * 2
    coarse, fine, later, last = job.stages[4:]
    assert coarse.sigmas + fine.sigmas[1:] == job.stages[1].sigmas
    assert (fine.noise_scale, fine.upsampler, later.upsampler) == (0, None, None)
    assert coarse.part.anchor_places == [(24, 0), (48, 1), (0, 4)]  # frame 0 too
    assert later.part.anchor_places == [(72 - 24, 2), (96 - 24, 3)]
    assert last.part.keyframes == (24, 48, 72, 96)
    assert job.keyframes[job.windows[0]] == (24, 48, 72)  # of 81 frames


def test_the_epilogue_holds_what_the_slice_before_has_made():
    first, second = (
        EnlargedSlice(**vars(part), grid=4, opens=1, decoder="vae")
        for part in slices(2, 48, 2)
    )
    before = {"video": mx.arange(13)[None], "coarse": mx.zeros((1, 7))}
    before["keyframes"] = mx.array([[1024, 1048, 1072, 1096, 1000]])
    before = first.merge(before, {"video": 100 + mx.arange(7)[None]})
    assert second.under(before["video"])[0].tolist() == [*range(3, 13)]
    assert second.held_latents(before)[0].tolist() == [1024, 104, 105, 106]
    coarse = dataclasses.replace(second, grid=2)
    assert coarse.cut(before)[0].tolist() == [1024, *range(4, 13)]
    made = {"video": 200 + mx.arange(10)[None]}
    assert coarse.merge(before, made)["coarse"] is made["video"]
    after = second.merge(before, made)
    assert after["video"][0].tolist() == [*range(100, 107), *range(204, 210)]
    assert after["keyframes"][0].tolist() == [1024, 1048, 1072, 1096]


def test_without_rounds_the_epilogue_is_one_slice_and_shows_its_images(load, tmp_path):
    media.save_png(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    images = (Image(str(tmp_path / "a.png")),)
    options = SIZE | {"num_frames": 41, "spatial_rounds": 1}
    *_, coarse, fine = (
        load().plan(Request("a fox", seed=10, images=images, **options)).stages
    )
    assert coarse.conditions == fine.conditions | {
        "video": (coarse.conditions["video"][0], SliceKeyframes(coarse.part)),
        "audio": (SliceSound(coarse.part),),
    }
    assert isinstance(coarse.conditions["video"][0], ShowImage)
    assert coarse.part.anchor_places == [(24, 0), (48, 1)]  # the image opens
    assert coarse.size.audio_tokens == 51


@pytest.mark.parametrize("decoder", ["conv", "diffusion"])
def test_an_epilogue_resumes_between_its_passes(load, golden, tmp_path, decoder):
    pipe, contexts = load(), recorded_contexts(golden, "ltx-2.5")
    [prompt] = contexts
    options = SIZE | {"num_frames": 9, "sigmas": (1.0, 0.0), "spatial_rounds": 1}
    request = Request(prompt, seed=10, no_audio=True, video_decoder=decoder, **options)
    *events, _, last = events_to_latents(pipe, request, contexts=contexts)
    complete = last.snapshot.latents["video"]
    assert complete.shape == (1, 2, 4, 4, 20)
    left = next(e for e in events if (e.phase, e.step) == ("stage4", 1))
    left.snapshot.save(tmp_path / "left.safetensors")
    resumed = latents_of(
        pipe, contexts=contexts, resume=Snapshot.read(tmp_path / "left.safetensors")
    )
    assert mx.array_equal(resumed["video"], complete)


def test_a_slice_has_the_images_of_its_frames(load, tmp_path):
    media.save_png(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    path = str(tmp_path / "a.png")
    images = tuple(Image(path, frame) for frame in (0, 60, -1))
    options = SIZE | {"num_frames": 73, "temporal_rounds": 1}
    pipe = load()
    job = pipe.plan(Request("a fox", seed=10, images=images, **options))
    *_, first, second = (stage.conditions["video"][:-1] for stage in job.stages)
    assert [type(condition) for condition in first] == [ShowImage]
    assert [type(condition) for condition in second] == [GuideImage] * 2
    assert [condition.frame for condition in second] == [120 - 72, 144 - 72]


@pytest.mark.cpu
def test_the_memory_of_every_stage_is_predicted(load, checkpoint):
    lora = LoraFile(str(checkpoint("ltx-2.5-lora2")))
    options = QUICK | {"height": 128, "width": 256, "no_audio": True}
    options |= {"spatial_rounds": 1, "num_frames": 25}
    request, pipe, peaks = (
        Request("a fox", seed=10, detailing_lora=lora, **options),
        load(),
        {},
    )
    gc.collect()
    others = mx.get_active_memory()  # of earlier tests
    for event in events_to_latents(pipe, request):
        peaks[event.phase] = mx.get_peak_memory() - others
    needs = pipe.memory(pipe.plan(request)).phases
    for stage in ("stage1", "stage2", "stage3", "stage4", "stage5"):
        assert 0.8 < needs[stage].total(False) / peaks[stage] < 1.2, stage


# Refused requests


@pytest.mark.parametrize(
    "options, says",
    [
        ({"stages": "two", "temporal_rounds": 1}, "temporal_rounds needs --stages dfr"),
        (
            {"stages": "one", "detailing_lora": LoraFile("a")},
            "detailing_lora needs --stages dfr",
        ),
        ({"temporal_rounds": 3}, "unknown temporal_rounds 3: choose from 0, 1, 2"),
        ({"detailing_lora": LoraFile("a", 0)}, "its strength must not be 0"),
        ({"detailing_lora": LoraFile("a", stage=1)}, "takes no stage"),
        ({"detailing_lora": LoraFile("a")}, "LoRA a: no such file"),
        ({"distilled_lora": LoraFile("a")}, "distilled_lora needs a dev model"),
        (
            {"generated_keyframes": 2},
            "generated_keyframes needs --stages one or two or hq",
        ),
        ({"temporal_upsample": True, "steps": 8}, "needs --stages one or two or hq"),
        ({"audio": "a.wav"}, "audio needs --stages one or two or hq"),
        (
            {"video": "a.mp4", "loras": (LoraFile("a"),)},
            "video needs --stages one or two or hq",
        ),
        ({"video": "a.mp4", "retake": (0, 1)}, "needs --stages one"),
        ({"video": "a.mp4", "extend": 1}, "needs --stages one"),
        ({"audio_only": True}, "needs --stages one"),
        (
            {"images": (Image("a"),), "keyframes": True},
            "keyframes needs --stages one or two or hq",
        ),
        ({"negative_prompt": "ugly"}, "negative_prompt needs cfg_scale"),
        ({"num_frames": 1}, "--stages dfr needs at least 9 frames"),
        ({"height": 96}, "multiple of 64"),
        ({"height": 192, "spatial_rounds": 1}, "multiple of 128"),
        ({"stages": "two", "spatial_rounds": 1}, "needs --stages dfr"),
    ],
    ids=str,
)
def test_options_that_dfr_refuses(load, options, says):
    with pytest.raises(UserError, match=says):
        load().plan(Request("a fox", seed=10, **(SIZE | {"num_frames": 25} | options)))


def test_missing_files_are_named(load, checkpoint):
    request = Request("a fox", seed=10, num_frames=25, temporal_rounds=1, **SIZE)
    with pytest.raises(UserError, match="needs a temporal latent upsampler"):
        load(ups=["spatial-x2"]).plan(request)
    with pytest.raises(UserError, match="--stages dfr needs a latent upsampler"):
        load(ups=[]).plan(request)
    with pytest.raises(UserError, match="needs an x2 upsampler .this one is x1.5"):
        load(ups=["spatial-x1.5", "temporal-x2"]).plan(
            dataclasses.replace(request, height=192, width=192)
        )
    with pytest.raises(UserError, match="needs its distilled LoRA"):
        load("dev").plan(request)
    lora = LoraFile(str(checkpoint("ltx-2.5-distilled-lora")))
    guided = {"distilled_lora": lora, "video_guidance": {"cfg_scale": 2.0}}
    with pytest.raises(
        UserError, match="video_guidance needs --stages one or two or hq"
    ):
        load("dev").plan(dataclasses.replace(request, **guided))
    older = weights.open_model(str(checkpoint("ltx-2.3")), "distilled")
    with pytest.raises(UserError, match="needs LTX-2.5 .this model is 2.3.0"):
        plan(request, older)


@pytest.mark.parametrize("strength", [1.0, 0.75])
def test_held_latents_stay_where_many_tiles_overlap(strength):
    size = Size(256, 64, 9, 24.0)
    state = LatentState.initial(size.bounds("video"), 3)
    state = state.hold(mx.full((1, 1, 2, 8, 3), 2.0), strength=strength)
    blend = lambda states, x: states["video"].blend(mx.full(x["video"].shape, 4.0))
    make = lambda states: lambda x, *_: {"video": blend(states, x)}
    sides = equal_spans(2, 4), equal_spans(8, 4)
    assert sum(s.stop - s.start for s in sides[1]) == 20  # some cells are in four tiles
    tiled = TiledDenoiser(make, {"video": state}, size, sides)
    held, free = tiled({"video": state.latent}, 1.0, 0)["video"].reshape(2, -1)
    assert free.max() > 4.5  # the weights of new latents may add up to more than 1
    assert mx.allclose(held, 2 * strength + (1 - strength) * free, atol=1e-5)
