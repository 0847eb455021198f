"""Sizes by name, durations in seconds, presets, and requests from a file."""

import json

import pytest

import generate
from ltx2 import pipeline, record
from ltx2.base import UserError
from ltx2.options import is_set
from ltx2.request import PRESETS, SIZES, Request


@pytest.fixture
def planned(checkpoint, request):
    """`planned(kind, ...)`: the job of a request."""

    def plan(kind: str = "distilled", **options):
        pipe = pipeline.load(str(checkpoint("ltx-2.3")), kind=kind)
        return pipe.plan(Request("a cat", **options))

    return plan


def test_sizes_are_for_two_stages_and_near_their_shape():
    for name, (height, width) in SIZES.items():
        assert height % 64 == width % 64 == 0
        assert (height > width) == name.endswith("-portrait")
    assert SIZES["720p"] == (704, 1280) and SIZES["720p-portrait"] == (1280, 704)
    assert SIZES["full"] == (1024, 1536) and SIZES["square"] == (1024, 1024)


def test_a_size_by_name(planned):
    job = planned(size="480p-portrait", num_frames=9)
    r = job.request
    assert (r.height, r.width, r.size) == (896, 512, None)


@pytest.mark.parametrize(
    "seconds, fps, frames",
    [(5, None, 121), (5, 25.0, 129), (5, 30.0, 153), (0.3, None, 9), (0.01, None, 1)],
)
def test_a_duration_is_the_nearest_length(planned, seconds, fps, frames):
    job = planned(duration=seconds, fps=fps, no_audio=True)
    assert (job.request.num_frames, job.request.duration) == (frames, None)
    assert any(f"{frames} frames" in note for note in job.notes)


def test_presets_fill_in_what_is_not_passed(planned):
    draft = planned(preset="draft", num_frames=9)
    assert (draft.request.height, draft.request.width) == (512, 768)
    assert draft.request.preset is None
    dev = planned("dev", preset="draft", num_frames=9)
    assert len(dev.stages) == 1 and dev.stages[0].steps == 20
    assert planned("dev", preset="draft", steps=3, num_frames=9).stages[0].steps == 3
    fewer = planned("dev", preset="draft", sigmas=(1.0, 0.5, 0.0), num_frames=9)
    assert fewer.stages[0].steps == 2
    small = planned(preset="quality", height=64, width=64, num_frames=9).request
    assert (small.height, small.width) == (64, 64)
    named = planned(preset="quality", size="480p", num_frames=9).request
    assert (named.height, named.width) == SIZES["480p"]


def test_each_preset_can_be_planned(planned):
    for name, (preset, _) in PRESETS.items():
        r = planned(preset=name, num_frames=9).request
        assert (r.height, r.width) == (preset["height"], preset["width"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": "720p", "width": 64}, "size cannot be combined with width"),
        ({"size": "720"}, "unknown size '720': choose from 480p"),
        ({"duration": 2, "num_frames": 9}, "duration cannot be combined with num_fr"),
        ({"duration": -1}, "duration must be between"),
        ({"preset": "best"}, "unknown preset 'best': choose from draft"),
    ],
)
def test_what_does_not_go_together_is_refused(planned, options, message):
    with pytest.raises(UserError, match=message):
        planned(**options)


def requests(tmp_path, found: dict, *flags: str):
    """The requests and the loading that a file and flags give."""
    path = tmp_path / "made.json"
    path.write_text(json.dumps(found))
    args = generate.parser().parse_args(["--config", str(path), *flags])
    passed = generate.passed_options(args)
    load, request, resume, made = generate.from_recording(args, passed)
    assert resume is made is None
    return load, generate.build_requests(args, request, passed)


def test_a_config_gives_values_and_flags_win(tmp_path):
    found = {"request": {"prompt": "a cat", "num_frames": 17, "width": 64, "seed": 3}}
    load, [r] = requests(tmp_path, found, "--duration", "1", "--seed", "4")
    assert (r.prompt, r.num_frames, r.duration, r.width) == ("a cat", None, 1.0, 64)
    assert load == {} and r.seed == 4
    assert requests(tmp_path, found)[1][0].seed == 3
    assert requests(tmp_path, found, "--size", "720p")[1][0].width is None
    load, [r] = requests(tmp_path, {"load": {"model": "m"}}, "--prompt", "a dog")
    assert load == {"model": "m"} and r.prompt == "a dog"


def test_what_save_json_writes_is_a_config(tmp_path, planned):
    job = planned(num_frames=9, height=64, width=64, seed=7)
    load = record.Load("m", kind="distilled")
    made = {"request": vars(job.request), "load": vars(load), "model": {}}
    made["request"] = {
        k: v for k, v in made["request"].items() if is_set(job.request, k)
    }
    load, [r] = requests(tmp_path, made)
    assert r == job.request and load["kind"] == "distilled"


@pytest.mark.parametrize(
    "found, message",
    [
        ({}, 'has no "request"'),
        ({"request": {"prompt": 1}}, "request.prompt"),
        ({"request": {"colour": 1}}, "request.colour is unknown"),
        ({"load": {"dtype": "banana"}}, "load.dtype"),
        ({"request": []}, "request"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, found, message):
    with pytest.raises(UserError, match=message):
        requests(tmp_path, found)


def test_flags_replace_what_a_config_names_otherwise(tmp_path):
    made = {"request": {"prompt": "a cat", "height": 64, "width": 64, "steps": 5}}
    r = requests(tmp_path, made, "--preset", "draft")[1][0]
    assert (r.preset, r.height, r.width, r.steps) == ("draft", None, None, None)
    short = {"request": {"prompt": "a cat", "size": "720p", "duration": 1}}
    r = requests(tmp_path, short, "--num-frames", "9", "--height", "64")[1][0]
    assert (r.duration, r.num_frames, r.size, r.height) == (None, 9, None, 64)


def test_hq_of_a_preset_needs_its_files(planned):
    job = planned("dev", preset="quality", num_frames=9)
    assert len(job.stages) == 1 and "hq needs --distilled-lora" in job.notes[0]


def test_a_named_size_suits_the_upsampler(load):
    pipe = load("ltx-2.3", upsamplers=["spatial-x1.5"])
    r = pipe.plan(Request("a cat", size="720p", num_frames=9, stages="two")).request
    assert (r.width, r.height) == (1248, 672)  # multiples of 96
