"""Runs beyond the reference: repeatable, resumable, with metadata and exact timing."""

import dataclasses
import functools
import json
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_clip
from test_pipeline import (
    events_to_latents,
    latents_of,
    recorded_contexts,
)

import generate
from ltx2 import base, formats, media, memory, pipeline, timing, weights
from ltx2.base import OutputError, UserError, read_text
from ltx2.guidance import GuidedDenoiser
from ltx2.request import Image, LoraFile, Request
from ltx2.run import Run
from ltx2.snapshot import Snapshot, digest
from ltx2.text import enhance
from ltx2.windows import extended

SIZE = {"height": 64, "width": 96, "num_frames": 17}
SHORT = SIZE | {"sigmas": (1.0, 0.5, 0.0)}
QUICK = "--prompt", "a cat", "--sigmas", "1,0.5,0"


@pytest.fixture(scope="module")
def pipe(load):
    return load("ltx-2-notc")


@pytest.fixture(scope="module")
def contexts(golden):
    """Contexts of two prompts."""
    return dict(zip(("a cat", "a dog"), recorded_contexts(golden, "ltx-2").values()))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """17 frames with a mono tone."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    y, x = np.mgrid[:64, :96]
    frames = [np.stack([x + 5 * t, y, x + y], -1) % 256 for t in range(17)]
    tone = np.sin(np.arange(12000) / 20)[:, None].astype(np.float32) / 2
    with formats.VideoWriter(path, 24, (tone, 16000)) as video:
        video.write(np.array(frames, np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder that keeps encoded prompts."""
    return str(tmp_path_factory.mktemp("encoded"))


@pytest.fixture
def command(checkpoint, encoded, quick_vocoder, monkeypatch, tmp_path, capsys):
    """`command("--seed", "3")`: runs generate.py in an empty folder, returns its output."""
    monkeypatch.chdir(tmp_path)
    # Measuring takes half a second
    monkeypatch.setattr(timing, "matmul_rate", lambda dtype: 1e10)

    def call(*flags, small=True):
        argv = ["generate.py", "--cache-contexts", encoded]
        if small:
            argv += ["--model", str(checkpoint("ltx-2-notc")), "--kind", "distilled"]
            argv += ["--text-encoder", str(checkpoint("gemma3")), "--dtype", "float32"]
            argv += ["--height", "64", "--width", "96", "--num-frames", "9"]
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        generate.main()
        seen = capsys.readouterr()
        call.err = seen.err
        return seen.out

    return call


# Repeatable and resumable


def test_results_depend_on_the_seed_only(pipe, contexts):
    run = lambda seed: latents_of(
        pipe, Request("a cat", seed=seed, **SHORT), contexts=contexts
    )
    first, again, other = run(1), run(1), run(2)
    assert mx.array_equal(first["video"], again["video"])
    assert mx.array_equal(first["audio"], again["audio"])
    assert not mx.allclose(first["video"], other["video"], atol=0.1)


def test_a_request_without_a_seed_gets_one_of_its_own(pipe, contexts, quick_vocoder):
    request = Request("a cat", **SHORT)
    assert request.seed is None
    events = [*pipe.stream(request, request, contexts=contexts)]
    one, other = (e.request for e in events if isinstance(e, pipeline.Result))
    assert one.seed != other.seed and 0 <= one.seed < 2**32
    snapshot = next(e.snapshot for e in events if e.phase == "latents")
    again = latents_of(pipe, one, contexts=contexts)["video"]
    assert mx.array_equal(again, snapshot.latents["video"])
    # A run that is resumed keeps its seed.
    resumed = latents_of(pipe, request, contexts=contexts, resume=snapshot)
    assert mx.array_equal(resumed["video"], again)


def test_noise_depends_on_name_and_seed():
    noise = pipeline.seeded_noise(3)
    assert mx.array_equal(noise("a", (4,)), noise("a", (4,)))
    assert not mx.array_equal(noise("a", (4,)), noise("b", (4,)))
    assert not mx.array_equal(noise("a", (4,)), pipeline.seeded_noise(4)("a", (4,)))
    many = noise("many", (100_000,))
    assert abs(many.mean().item()) < 0.02 and abs(many.var().item() - 1) < 0.02


def test_noise_and_sigmas_can_be_numpy_arrays(pipe, contexts, quick_vocoder, tmp_path):
    normals = pipeline.seeded_noise(10)
    noise = lambda name, shape: np.array(normals(name, shape), np.float64)
    sigmas = np.array([1, 0.7, 0.3, 0])
    result = pipe.generate(
        "a cat", contexts=contexts, noise=noise, sigmas=sigmas, **SIZE
    )
    request = Request("a cat", seed=10, sigmas=(1, 0.7, 0.3, 0), **SIZE)
    same = latents_of(pipe, request, contexts=contexts)
    assert mx.array_equal(result.video_latents, same["video"][0])
    result.save(tmp_path / "out.mp4")
    recorded = media.read_metadata(tmp_path / "out.mp4")["request"]
    assert recorded["sigmas"] == [1, 0.7, 0.3, 0]


def test_several_videos_encode_each_prompt_once(
    pipe, contexts, quick_vocoder, monkeypatch
):
    encoded = []
    encode = lambda prompts, *_: encoded.append(list(prompts)) or contexts
    monkeypatch.setattr(pipe, "encode_prompts", encode)
    requests = [
        Request(prompt, seed=seed, **SHORT)
        for prompt in ("a cat", "a dog")
        for seed in (1, 2)
    ]
    results = [e for e in pipe.stream(*requests) if isinstance(e, pipeline.Result)]
    assert encoded == [["a cat", "a dog"]]
    made = [(r.request.prompt, r.request.seed) for r in results]
    assert made == [(r.prompt, r.seed) for r in requests]
    latents = [r.video_latents for r in results]
    assert not any(mx.array_equal(latents[0], x) for x in latents[1:])


def test_an_interrupted_run_resumes_to_the_same_result(pipe, contexts, tmp_path):
    events = list(events_to_latents(pipe, Request("a cat", **SIZE), contexts=contexts))
    complete = events[-1].snapshot.latents
    stopped = next(e for e in events if e.snapshot and e.step == 5)
    stopped.snapshot.save(tmp_path / "saved.safetensors")
    snapshot = Snapshot.read(tmp_path / "saved.safetensors")
    assert (snapshot.stage, snapshot.step) == (0, 5)
    resumed = latents_of(pipe, snapshot.request, contexts=contexts, resume=snapshot)
    assert mx.array_equal(resumed["video"], complete["video"])
    assert mx.array_equal(resumed["audio"], complete["audio"])


def test_latents_of_another_model_are_refused(pipe, contexts, load):
    request = Request("a cat", **SIZE)
    event = next(e for e in pipe.stream(request, contexts=contexts) if e.snapshot)
    other = load("ltx-2.3")
    with pytest.raises(UserError, match="with a different model or settings"):
        next(other.stream(contexts=contexts, resume=event.snapshot))
    with pytest.raises(UserError, match="made with another height and width"):
        next(pipe.stream(Request("a cat"), contexts=contexts, resume=event.snapshot))


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "euler_ancestral"},
        {"sampler": "res_2s"},
        {"video_guidance": {"skip_step": 2}, "steps": 6},
    ],
    ids=lambda o: next(iter(o)),
)
def test_every_sampler_resumes_in_the_middle(pipe, contexts, load, options):
    if "steps" in options:
        pipe = load("ltx-2-notc", "dev")
        contexts = {p: contexts["a cat"] for p in ("a cat", "bad")}
        options = {**options, "negative_prompt": "bad"}
    request = Request("a cat", no_audio=True, **options, **SIZE)
    events = list(events_to_latents(pipe, request, contexts=contexts))
    snapshots = [e.snapshot for e in events if e.snapshot]
    complete = snapshots[-1].latents["video"]
    for snapshot in snapshots[4], snapshots[-2], snapshots[-1]:
        resumed = latents_of(pipe, contexts=contexts, resume=snapshot)
        assert mx.array_equal(resumed["video"], complete)


def test_a_sampler_with_memory_is_not_resumed_in_the_middle(pipe, contexts):
    request = Request("a cat", sampler="gradient_estimation", **SIZE)
    event = next(e for e in pipe.stream(request, contexts=contexts) if e.snapshot)
    with pytest.raises(UserError, match="resume only between stages"):
        next(pipe.stream(contexts=contexts, resume=event.snapshot))


def test_a_resumed_second_stage_has_the_audio_of_the_first(load, checkpoint, contexts):
    pipe = load("ltx-2-notc", "dev", ["spatial-x2-rational"])
    lora = LoraFile(str(checkpoint("ltx-2-distilled-lora")))
    texts = {p: contexts["a cat"] for p in ("a cat", "bad")}
    request = Request(
        "a cat", "bad", 128, 128, 9, stages="two", steps=2, distilled_lora=lora
    )
    events = list(events_to_latents(pipe, request, contexts=texts))
    complete = events[-1].snapshot.latents
    snapshot = next(e.snapshot for e in events if e.phase == "stage2" and e.step == 1)
    resumed = latents_of(pipe, contexts=texts, resume=snapshot)
    assert mx.array_equal(resumed["video"], complete["video"])
    assert mx.array_equal(resumed["audio"], complete["audio"])


# Timing


@pytest.mark.parametrize("frames, fps", [(9, 24), (17, 23.976), (25, 30), (1, 24)])
def test_audio_and_video_end_together(pipe, contexts, tmp_path, frames, fps):
    size = {**SHORT, "num_frames": frames, "fps": fps}
    result = pipe.generate("a cat", contexts=contexts, **size)
    assert len(result.frames) == frames
    result.save(tmp_path / "out.mp4")
    made = media.probe(tmp_path / "out.mp4")
    assert made.num_frames == frames
    sound, rate = media.read_audio(tmp_path / "out.mp4")
    assert abs(len(sound) - round(frames / made.fps * rate)) <= 1


def test_a_retake_changes_only_its_seconds(pipe, contexts, clip):
    options = {"video": clip, "sigmas": SHORT["sigmas"]}
    run = lambda *span, **more: latents_of(
        pipe, Request("a cat", retake=span, **options, **more), contexts=contexts
    )
    clip_video = run(0, 9, retake_streams=("audio",))["video"]
    again = run(0.4, 0.5)
    # Latent frames last [0, 1), [1, 9), [9, 17) frames; 0.4 to 0.5 s touch the last.
    assert mx.array_equal(again["video"][:, :2], clip_video[:, :2])
    assert not mx.allclose(again["video"][:, 2], clip_video[:, 2], atol=0.1)
    clip_audio = run(0, 9, retake_streams=("video",))["audio"]
    # Audio tokens last 40 ms, the first 10: 0.4 s is in the eleventh.
    outside = mx.array([i for i in range(18) if 4 * i + 1 <= 40 or 4 * i - 3 >= 50])
    assert mx.array_equal(again["audio"][:, outside], clip_audio[:, outside])
    assert not mx.allclose(again["audio"], clip_audio, atol=0.1)


@pytest.mark.parametrize("seconds", [0.34, -0.34])
def test_an_extension_does_not_change_the_clip(pipe, contexts, clip, seconds):
    options = {"video": clip, "sigmas": SHORT["sigmas"]}
    run = lambda **more: latents_of(
        pipe, Request("a cat", **options, **more), contexts=contexts
    )["video"][0]
    clip_video = run(retake=(0, 9), retake_streams=("audio",))
    longer = run(extend=seconds)
    assert 8 * len(longer) - 7 == 25  # frames
    if seconds > 0:
        assert mx.array_equal(longer[:3], clip_video)
    else:  # the clip's first latent, a single frame, becomes one of eight frames
        assert mx.array_equal(longer[2:], clip_video[1:])


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """41 frames without loss, with a tone at the vocoder's rate, and its waveform."""
    folder = tmp_path_factory.mktemp("long")
    frames = np.random.default_rng(0).integers(0, 255, (41, 64, 96, 3), np.uint8)
    tone = np.sin(np.arange(41 / 24 * 16000) / 20).astype(np.float32)[None] / 2
    save_clip(folder / "clip.mkv", frames, 24, tone.repeat(2, axis=0), 16000)
    return str(folder / "clip.mkv"), frames, tone[0]


WINDOWS = {"chunk_frames": 33, "carry_frames": 17, "blend_frames": 8}


@pytest.mark.parametrize("seconds", [1, -1])
def test_an_extension_costs_what_is_new(
    pipe, contexts, long_clip, quick_vocoder, seconds
):
    """Of the clip the model sees what is carried; the result has its frames and sound."""
    path, frames, tone = long_clip
    request = Request("a cat", video=path, extend=seconds, **WINDOWS)
    request = dataclasses.replace(request, sigmas=SHORT["sigmas"])
    job, shown = pipe.plan(request), []
    lengths = [33, 25] if seconds > 0 else [41]  # 24 frames are new
    assert [stage.size.num_frames for stage in job.stages] == lengths
    extended, seen = job.notes
    assert "extended by 1.00 s" in extended  # 24 frames
    assert f"only its {'last' if seconds > 0 else 'first'} 17 frames" in seen
    for event in pipe.stream(job, contexts=contexts):
        shown += [] if event.frames is None else [*event.frames]
    assert len(shown) == 65
    kept, sound, second = 41 - 8, event.waveform[:, 0], 16000
    if seconds > 0:
        assert np.array_equal(shown[:kept], frames[:kept])
        assert np.allclose(sound[: 4 * second // 3], tone[: 4 * second // 3], atol=1e-4)
        # What is made ends 30 ms before the video, to a token of 40 ms.
        assert abs(len(sound) - 65 / 24 * second + 480) < 640
    else:
        assert np.array_equal(shown[-24:], frames[-24:])
        same = slice(2 * second, len(sound))  # the clip begins after one second
        assert np.allclose(sound[same], tone[second : len(sound) - second], atol=1e-4)
        assert len(sound) == round(65 / 24 * second)
    mixed = shown[kept] if seconds > 0 else shown[-24 - 4]
    assert not any(np.array_equal(mixed, frame) for frame in frames)


def test_an_extension_begins_with_the_clips_last_latents(pipe, contexts, long_clip):
    path, frames, _ = long_clip
    options = {"video": path, "sigmas": SHORT["sigmas"]} | WINDOWS
    run = lambda seconds: latents_of(
        pipe, Request("a cat", extend=seconds, **options), contexts=contexts
    )
    after, before = run(1), run(-1)
    encode = lambda x: pipe.vae.encode(mx.array(x / 127.5 - 1, mx.float32)[None])
    end, start = encode(frames[-17:]), encode(frames[:17])
    assert mx.allclose(after["chunk0.video"][:, :3], end, atol=1e-4)
    assert mx.array_equal(after["chunk1.video"][:, :3], after["chunk0.video"][:, -3:])
    assert mx.allclose(before["video"][:, -2:], start[:, 1:], atol=1e-4)


def test_windows_of_an_extension(pipe, long_clip):
    rows = lambda *facts: [
        (w.start, w.num_frames, w.carried_in, w.carried_out)
        for w in extended(*facts)
        if not w.given
    ]
    assert rows(41, 97, False, 97, 25, 25) == [(0, 97, 0, 0)]  # fits in one
    assert rows(41, 105, False, 97, 25, 25) == [(16, 89, 25, 0)]
    assert rows(401, 505, False, 97, 25, 25) == [(376, 97, 25, 25), (448, 57, 25, 0)]
    assert rows(17, 105, False, 97, 25, 25) == [(0, 97, 0, 25), (72, 33, 25, 0)]
    assert rows(401, 505, True, 97, 25, 25) == [(0, 129, 0, 25)]
    assert rows(17, 217, True, 97, 25, 25) == [(0, 217, 0, 0)]
    job = pipe.plan(Request("a cat", video=long_clip[0], extend=4, **WINDOWS))
    assert [w.given for w in job.parts] == [True, *[False] * len(job.windows)]


def test_a_clip_without_sound_is_extended(pipe, contexts, tmp_path, quick_vocoder):
    save_clip(tmp_path / "clip.mkv", np.zeros((41, 64, 96, 3), np.uint8), 24)
    options = {"video": str(tmp_path / "clip.mkv"), "extend": 0.4, **WINDOWS}
    options["sigmas"] = SHORT["sigmas"]
    *_, result = pipe.stream(Request("a cat", **options), contexts=contexts)
    assert not result.waveform[: 32 * 667].any() and result.waveform[-500:].any()


def test_a_clip_is_fitted_to_a_possible_size_length_and_rate(pipe, tmp_path):
    frames = np.zeros((20, 74, 150, 3), np.uint8)
    with formats.VideoWriter(tmp_path / "odd.mp4", 30) as video:
        video.write(frames)
    request = Request("a", video=str(tmp_path / "odd.mp4"), retake=(0, 1), fps=24)
    job = pipe.plan(request)
    assert (job.request.width, job.request.height) == (128, 64)
    assert job.request.num_frames == 9
    assert len(job.notes) == 3 and "resized and cropped to 128x64" in job.notes[0]


def test_a_pipeline_of_a_checkpoint_alone_says_how_it_was_made(checkpoint):
    model = weights.open_model(str(checkpoint("ltx-2-notc")), "distilled")
    encoder = str(checkpoint("gemma3"))
    made = pipeline.Pipeline(model, encoder, mx.float32).origin
    assert (made.kind, made.dtype, made.text_encoder) == (
        "distilled",
        "float32",
        encoder,
    )
    assert made.model == str(checkpoint("ltx-2-notc"))


@pytest.mark.parametrize(
    "option, value",
    [("parts", "vae"), ("cache_contexts", 3), ("low_memory", "no"), ("parallel", [1])],
)
def test_arguments_of_load_have_their_types(checkpoint, option, value):
    with pytest.raises(UserError, match=option):
        pipeline.load(str(checkpoint("ltx-2-notc")), **{option: value})


def test_notes_say_what_of_a_picture_and_a_sound_is_not_used(pipe, tmp_path):
    media.save_png(tmp_path / "tall.png", np.zeros((96, 64, 3), np.uint8))
    media.write_wav(tmp_path / "a.wav", np.ones((48000, 2), np.float32) / 9, 16000)
    inputs = {"images": [tmp_path / "tall.png"], "audio": tmp_path / "a.wav"}
    notes = " ".join(pipe.plan(Request("a", **SIZE, **inputs)).notes)
    assert "64x96 cropped to 96x64, 56% of it is cut off" in notes
    assert "3.0 s of sound for 0.7 s of video" in notes


def test_a_sound_too_short_for_the_encoder_is_refused_in_the_plan(pipe, tmp_path):
    media.write_wav(tmp_path / "a.wav", np.ones((160, 2), np.float32) / 9, 16000)
    with pytest.raises(UserError, match="has no sound at 0 s: it has 0.01 s"):
        pipe.plan(Request("a", **SIZE, audio=tmp_path / "a.wav"))


def test_a_rate_out_of_range_names_the_clip_and_the_flag(pipe, tmp_path):
    with formats.VideoWriter(tmp_path / "slow.mp4", 240) as video:
        video.write(np.zeros((20, 64, 64, 3), np.uint8))
    clip = {"video": str(tmp_path / "slow.mp4"), "retake": (0, 0.1)}
    with pytest.raises(UserError, match="slow.mp4: fps, which --fps changes"):
        pipe.plan(Request("a", **clip))


def test_a_plan_leaves_no_folder(tmp_path):
    formats.check_output(tmp_path / "new/folder/a.mp4")
    assert not (tmp_path / "new").exists()


def test_a_rounded_frame_rate_counts_as_the_clips(pipe, tmp_path):
    with formats.VideoWriter(tmp_path / "film.mp4", 23.976) as video:
        video.write(np.zeros((9, 64, 64, 3), np.uint8))
    for fps in (None, 23.976):
        video = str(tmp_path / "film.mp4")
        job = pipe.plan(Request("a", video=video, retake=(0, 1), fps=fps))
        assert (job.request.num_frames, job.notes) == (9, ())


def test_images_keep_their_time_when_the_frame_rate_doubles(load, tmp_path):
    pipe = load("ltx-2-notc", upsamplers=["temporal-x2"])
    media.save_png(tmp_path / "i.png", np.zeros((64, 96, 3), np.uint8))
    images = (Image(str(tmp_path / "i.png"), -1),)
    job = pipe.plan(Request("a", images=images, temporal_upsample=True, **SIZE))
    assert [s.conditions["video"][0].frame for s in job.stages] == [16, 32]
    assert (job.stages[1].size.num_frames, job.stages[1].size.fps) == (33, 48)


def test_a_reference_clip_fits_all_stages(load, checkpoint, tmp_path):
    pipe = load("ltx-2", upsamplers=["spatial-x2-rational"])
    with formats.VideoWriter(tmp_path / "clip.mp4", 24) as video:
        video.write(np.zeros((9, 200, 300, 3), np.uint8))
    lora = LoraFile(str(checkpoint("ltx-2-lora2")))  # its reference has half the size
    request = Request("a", video=str(tmp_path / "clip.mp4"), loras=(lora,))
    job = pipe.plan(request)
    assert [(s.size.width, s.size.height) for s in job.stages] == [
        (128, 64),
        (256, 128),
    ]
    style = LoraFile(str(checkpoint("ltx-2-lora")), 0.5, 2)
    job = pipe.plan(dataclasses.replace(request, loras=(lora, style)))
    assert [s.loras for s in job.stages] == [(lora,), (style,)]


# Inputs


def test_an_audio_file_becomes_the_soundtrack_unchanged(pipe, contexts, tmp_path):
    short = np.random.default_rng(0).uniform(-0.3, 0.3, (3000, 1)).astype(np.float32)
    path = str(tmp_path / "short.wav")
    media.write_wav(path, short, 8000)  # mono, and too short
    sound = media.read_audio(path)[0]
    result = pipe.generate("a cat", contexts=contexts, audio=path, **SHORT)
    assert result.sample_rate == 8000 and np.array_equal(result.waveform, sound)
    result.save(tmp_path / "out.mp4")
    made = media.probe(tmp_path / "out.mp4")
    assert made.audio_duration == pytest.approx(17 / 24, 0.01)


def test_an_image_stays_the_first_frame(pipe, contexts, tmp_path):
    media.save_png(tmp_path / "i.png", np.full((64, 96, 3), (200, 40, 90), np.uint8))
    options = SHORT | {"images": (Image(str(tmp_path / "i.png")),)}
    one, other = (
        latents_of(pipe, Request("a cat", seed=seed, **options), contexts=contexts)
        for seed in (1, 2)
    )
    assert mx.array_equal(one["video"][:, 0], other["video"][:, 0])
    assert not mx.array_equal(one["video"][:, 1], other["video"][:, 1])


def test_an_enhanced_prompt_depends_on_the_seed(checkpoint):
    longer = lambda seed: enhance(checkpoint("gemma3"), "a cat", seed, max_tokens=12)
    assert longer(1) == longer(1) != longer(2)


# The command line


def test_an_mp4_is_regenerated_from_its_metadata(command, tmp_path):
    command(*QUICK, "--seed", "5", "--save-latents", "--save-json")
    recorded = media.read_metadata(tmp_path / "output.mp4")
    assert recorded["request"]["prompt"] == "a cat" and recorded["load"]["dtype"]
    assert all(v.split(":")[1] for v in recorded["model"]["files"].values())
    flags = ("--output", "again.mp4", "--save-latents", "--overwrite")
    command("--from", "output.json", "--trust", *flags, small=False)
    latents = lambda stem: mx.load(str(tmp_path / f"{stem}.latents.safetensors"))
    one, two = latents("output"), latents("again")
    assert one.keys() == two.keys() and all(mx.array_equal(one[k], two[k]) for k in one)
    command("--from", "output.mp4", "--seed", "6", *flags)
    assert not mx.array_equal(latents("again")["latents.video"], one["latents.video"])


@pytest.mark.parametrize(
    "names, flags, height",
    [
        (["cat-1.mp4", "cat-2.mp4"], ("--output", "cat.mp4", "--num-videos", "2"), 342),
        (["frames"], ("--output", "frames", "--no-audio"), 188),
        (["cat.wav"], ("--output", "cat.wav", "--audio-only"), 162),
    ],
)
def test_a_contact_sheet_is_next_to_each_output(command, names, flags, height):
    said = command(*QUICK, "--save-sheet", *flags)
    for name in names:
        sheet = f"{name.split('.')[0]}-sheet.png"
        assert f"wrote {sheet}" in said
        assert media.load_image(sheet).shape[0] == height


def test_earlier_files_stay_and_all_new_ones_are_said(command, tmp_path):
    flags = *QUICK, "--save-json", "--output"
    first = command(*flags, "new/a.mp4", "--seed", "3", "--preview-every", "1")
    assert "wrote new/a.mp4 (seed 3)" in first
    for name in ("a.json", "a.preview.png"):
        assert f"wrote new/{name}" in first
    before = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    second = command(*flags, "new/a.mp4", "--num-videos", "2")
    seed = json.loads(read_text("new/a-1.json"))["request"]["seed"]
    assert f"wrote new/a-2.mp4 (seed {seed + 1})" in second
    third = command(
        "--from", "new/a.json", "--trust", "--output", "new/a.mp4", small=False
    )
    assert "note: earlier files stay: writing new/a-3.mp4" in third
    assert "wrote new/a-3.mp4 (seed 3)" in third
    there = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    assert before.items() <= there.items()
    command(*flags, "new/a.mp4", "--overwrite", "--seed", "4")
    assert json.loads(read_text("new/a.json"))["request"]["seed"] == 4


def test_progress_is_on_stderr(command, tmp_path):
    flags = *QUICK, "--preview-every", "1"
    flags += "--cache-contexts", str(tmp_path / "none")  # so that the text is encoded
    shown = []
    base.run(lambda: shown.append(command(*flags, "--open")))
    out, err = shown[0], command.err
    for bar in ("text", "preview", "stage1", "video"):
        assert re.search(rf"{bar}: +100%", err), bar
    assert "%|" not in out and "text ..." not in out
    assert "wrote output.mp4" in out


def test_a_recording_of_an_earlier_reference_is_said(command, tmp_path):
    command(*QUICK)
    path = tmp_path / "output.mp4"
    again = "--from", "output.mp4", "--output", "again.mp4", "--plan"
    assert "earlier reference" not in command(*again)
    metadata = media.read_metadata(path)
    del metadata["versions"]["reference"]
    with formats.VideoWriter(path, 24, metadata=metadata) as video:
        video.write(np.zeros((9, 64, 96, 3), np.uint8))
    assert "rules of an earlier reference" in command(*again)


PATHS = [("load", "model"), ("load", "text_encoder"), ("request", "images", 0, "path")]


def test_a_video_names_files_without_their_paths(command, tmp_path):
    image = tmp_path / "private" / "cat.png"
    image.parent.mkdir()
    media.save_png(image, np.random.default_rng(0).integers(0, 255, (64, 96, 3), "u1"))
    flags = (*QUICK, "--image", str(image))
    command(*flags, "--save-json")
    recorded = media.read_metadata("output.mp4"), json.loads(read_text("output.json"))
    at = lambda x, path: functools.reduce(lambda x, k: x[k], path, x)
    names, paths = ([at(x, path) for path in PATHS] for x in recorded)
    assert names == ["ltx-2-notc.safetensors", "gemma3", "cat.png"]
    assert all(Path(p).is_absolute() for p in paths) and paths[2] == str(image)
    assert str(tmp_path.parent) not in json.dumps(recorded[0])
    message = "output.mp4 was made with cat.png, which is not in its folder"
    with pytest.raises(UserError, match=message):
        command("--from", "output.mp4", "--plan")
    shutil.copy(image, tmp_path)
    assert "9 frames" in command("--from", "output.mp4", "--output", "b.mp4", "--plan")
    command(*flags, "--no-metadata")
    with pytest.raises(UserError, match="does not say how it was made"):
        media.read_metadata("output-2.mp4")


def write_record(path, request=(), **load):
    record = {"request": {"prompt": "a cat", **dict(request)}, "load": load}
    path.write_text(json.dumps(record | {"model": {"files": {}}}))


@pytest.mark.parametrize(
    "record",
    [
        {"model": "/etc/hosts"},
        {"model": "../model.safetensors"},
        {"model": "someone/a-model"},
        {"model": "here.safetensors", "text_encoder": "someone/gemma"},
        {"model": "here.safetensors", "upsamplers": ["/up.safetensors"]},
        {"model": "here.safetensors", "parts": {"vae": "../vae.safetensors"}},
        {"model": "here.safetensors", "request": {"audio": "/dev/zero"}},
        {"model": "here.safetensors", "request": {"images": [{"path": "../x.png"}]}},
        {"model": "here.safetensors", "request": {"distilled_lora": {"path": "/x"}}},
    ],
)
def test_a_strangers_record_names_files_in_its_folder_only(command, tmp_path, record):
    folder = tmp_path / "download"
    folder.mkdir()
    for place in (tmp_path / "x.png", folder / "here.safetensors"):
        place.write_text("x")
    write_record(folder / "made.json", **record)
    with pytest.raises(UserError, match="which is not in its folder: .*--trust"):
        command("--from", "download/made.json", small=False)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"model": 3}, "load.model must be text, got 3"),
        ({"model": "x", "dtype": "__class__"}, "load.dtype must be one of bfloat16"),
        ({"model": "x", "group": 3}, "load.group is unknown"),
        ({"model": "x", "upsamplers": "x"}, "load.upsamplers must be a list"),
        ({"model": "x", "request": {"height": "64"}}, "request.height must be an int"),
        (
            {"model": "x", "request": {"loras": [{}]}},
            r"request.loras\[0\].path is miss",
        ),
    ],
)
def test_a_record_is_checked(command, tmp_path, record, message):
    write_record(tmp_path / "made.json", **record)
    with pytest.raises(UserError, match=f"made.json: {message}"):
        command("--from", "made.json", small=False)
    (tmp_path / "made.json").write_text("[1]")
    with pytest.raises(UserError, match="made.json must be an object, got"):
        command("--from", "made.json", small=False)


def test_previews_have_the_colors_of_the_frames(pipe, contexts, quick_vocoder):
    preview = pipe.preview()
    result = pipe.generate("a cat", contexts=contexts, **SIZE)
    strip = preview(result.video_latents[None])
    assert strip.shape == (3, 16, 24, 3) and strip.dtype == np.uint8
    seen = result.frames[[0, 5, 13]].reshape(3, 2, 32, 3, 32, 3).mean((2, 4))
    quick = strip[:, ::8, ::8].astype(float)
    assert np.corrcoef(seen.ravel(), quick.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("change", [{"seed": 3}, {"prompt": "a dog"}])
def test_latents_of_another_request_are_refused(pipe, contexts, change):
    request = Request("a cat", **SHORT)
    *_, last = events_to_latents(pipe, request, contexts=contexts)
    other = dataclasses.replace(request, **change)
    with pytest.raises(UserError, match=f"made with another {[*change][0]}"):
        next(pipe.stream(other, contexts=contexts, resume=last.snapshot))
    assert next(pipe.stream(request, contexts=contexts, resume=last.snapshot))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prompt": None}, "prompt must be text, got None"),
        ({"height": "64"}, "height must be an integer, got '64'"),
        ({"num_frames": float("nan")}, "num_frames must be a finite number"),
        ({"fps": True}, "fps must be a number, got True"),
        ({"no_audio": 1}, "no_audio must be true or false, got 1"),
        ({"images": "a.png"}, "images must be a list, got 'a.png'"),
        ({"images": [{"pth": "a.png"}]}, r"images\[0\].pth is unknown"),
        ({"video_guidance": {"cfg_scal": 3}}, "video_guidance.cfg_scal is unknown"),
        ({"audio_guidance": {"cfg_scale": "3"}}, "cfg_scale must be a number"),
        ({"contexts": {"a dog": ()}}, "contexts lack the prompt 'a cat'"),
        ({"noise": [None, None]}, "2 noise callbacks for 1 requests"),
        ({"prompt": "\ud800"}, "prompt must be valid text"),
    ],
)
def test_wrong_arguments_are_one_line(pipe, wrong, message):
    with pytest.raises(UserError, match=message):
        pipe.generate(**{"prompt": "a cat", **SIZE} | wrong)


def test_arguments_may_be_numpys_or_paths():
    request = Request(
        "a cat",
        height=np.int64(64),
        fps=np.float32(24),
        sigmas=mx.array([1.0, 0.5, 0.0]),
        images=["a.png", Path("b.png"), Image("c.png", np.int32(8))],
        distilled_lora="lora.safetensors",
        video_guidance={"cfg_scale": np.float64(3), "stg_blocks": np.array([1])},
    )
    expected = Request(
        "a cat",
        height=64,
        fps=24.0,
        sigmas=(1.0, 0.5, 0.0),
        images=(Image("a.png"), Image("b.png"), Image("c.png", 8)),
        distilled_lora=LoraFile("lora.safetensors"),
        video_guidance={"cfg_scale": 3.0, "stg_blocks": (1,)},
    )
    assert request == expected and type(request.height) is int
    json.dumps(dataclasses.asdict(request))


def test_each_request_may_have_its_noise(pipe, contexts):
    requests = [Request("a cat", **SHORT), Request("a dog", **SHORT)]
    noises = [pipeline.seeded_noise(seed) for seed in (3, 4)]
    events = events_to_latents(pipe, *requests, contexts=contexts, noise=noises)
    both = [e.snapshot.latents["video"] for e in events if e.phase == "latents"]
    for r, noise, found in zip(requests, noises, both):
        alone = latents_of(pipe, r, contexts=contexts, noise=noise)
        assert mx.array_equal(alone["video"], found)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stage": -5}, "made with a different model or settings"),
        ({"step": 99}, "made with a different model or settings"),
        ({"stage": "one"}, "saved.safetensors: stage must be an integer"),
        ({"load": []}, "load must be an object"),
        ({"magic": 3}, "magic is unknown"),
    ],
)
def test_saved_latents_are_checked(pipe, contexts, tmp_path, change, message):
    path = tmp_path / "saved.safetensors"
    events = events_to_latents(pipe, Request("a cat", **SHORT), contexts=contexts)
    [e for e in events if e.step == 2][0].snapshot.save(path)
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    text = json.dumps(json.loads(metadata["ltx2"]) | change)
    made = {"ltx2": text, "sha256": digest(text, arrays)}
    mx.save_safetensors(str(path), arrays, made)
    with pytest.raises(UserError, match=message):
        next(pipe.stream(contexts=contexts, resume=Snapshot.read(path)))


def test_saved_latents_that_were_changed_are_refused(pipe, contexts, tmp_path):
    """Also if all that they say of themselves is changed alike."""
    path = tmp_path / "saved.safetensors"
    events = events_to_latents(pipe, Request("a cat", **SHORT), contexts=contexts)
    [e for e in events if e.step == 2][0].snapshot.save(path)
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    assert Snapshot.read(path).tokens["video"].shape == arrays["tokens.video"].shape
    old = json.loads(metadata["ltx2"]) | {
        "shapes": {k: x.shape for k, x in arrays.items()}
    }
    before_digests = str(tmp_path / "old.safetensors")
    mx.save_safetensors(before_digests, arrays, {"ltx2": json.dumps(old)})
    assert Snapshot.read(before_digests).step == 2
    mx.save_safetensors(str(path), {}, {"ltx2": json.dumps(old | {"shapes": {}})})
    with pytest.raises(UserError, match="does not contain saved latents"):
        Snapshot.read(path)
    for changed in (
        {k: x[:, 1:] for k, x in arrays.items()},
        {k: x * 2 for k, x in arrays.items()},
        {k: x for k, x in arrays.items() if "audio" not in k},
    ):
        mx.save_safetensors(str(path), changed, metadata)
        with pytest.raises(UserError, match="does not contain saved latents"):
            Snapshot.read(path)


def test_contexts_must_have_the_prompt_and_resuming_keeps_the_length(pipe, contexts):
    with pytest.raises(UserError, match="contexts lack the prompt 'a cow'"):
        pipe.generate("a cow", contexts={}, **SHORT)
    request = Request("a cat", seed=1, **SHORT)
    events = events_to_latents(pipe, request, contexts=contexts)
    snapshot = next(e.snapshot for e in events if e.step == 2)
    with pytest.raises(UserError, match="made with another num_frames"):
        snapshot.check_request(dataclasses.replace(snapshot.request, num_frames=33))
    assert pipe.plan("a cat").request.prompt == "a cat"


@pytest.mark.parametrize(
    "given, message",
    [
        (5, "contexts must be an object, got 5"),
        ({"a cat": None}, r"contexts\['a cat'\] must be a pair"),
        ({"a cat": mx.ones((1, 8, 72))}, "must be a pair"),
        (
            {"a cat": (mx.ones((8, 72)), None)},
            r"must be video embeddings \(1, tokens, width\)",
        ),
        ({"a cat": (mx.ones((1, 8, 7)), None)}, "its video embeddings have width 7"),
    ],
)
def test_contexts_that_do_not_fit_are_one_line(pipe, given, message):
    with pytest.raises(UserError, match=message):
        next(pipe.stream(Request("a cat", seed=1, **SHORT), contexts=given))


def test_contexts_of_a_video_without_audio_may_lack_it(pipe, contexts, quick_vocoder):
    silent = Request("a cat", seed=1, no_audio=True, **SHORT)
    given = contexts | {"a cat": (contexts["a cat"][0], None)}
    next(pipe.stream(Request("a dog", seed=1, **SHORT), silent, contexts=given))
    with pytest.raises(UserError, match="has no embeddings for audio"):
        next(pipe.stream(Request("a cat", seed=1, **SHORT), contexts=given))


class Whole(np.ndarray):
    """An array that is never read number by number, which takes minutes."""

    def tolist(self):
        raise AssertionError("read number by number")


def test_contexts_can_be_numpy_arrays(pipe, contexts, quick_vocoder):
    whole = lambda pair: tuple(np.array(x).view(Whole) for x in pair)
    arrays = {k: whole(pair) for k, pair in contexts.items()}
    make = lambda given: pipe.generate("a cat", seed=1, contexts=given, **SHORT)
    assert mx.array_equal(make(arrays).video_latents, make(contexts).video_latents)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": "x"}, "keep must be"),
        ({"parallel": "x"}, "unknown parallel 'x': choose from data, passes, tensor"),
        ({"parts": [("vae", "a"), ("vae", "b")]}, "a component is named twice"),
    ],
)
def test_wrong_options_of_load_are_one_line(checkpoint, options, message):
    with pytest.raises(UserError, match=message):
        pipeline.load(str(checkpoint("ltx-2")), str(checkpoint("gemma3")), **options)


def test_only_a_snapshot_can_be_resumed(pipe, contexts):
    with pytest.raises(UserError, match="resume must be"):
        pipe.generate("a cat", contexts=contexts, resume=5, **SHORT)


def test_noise_of_another_shape_is_an_error(pipe, contexts):
    noise = lambda name, shape: np.zeros((1, 1, shape[-1]))
    with pytest.raises(ValueError, match="noise stage1.video has shape .1, 1, "):
        latents_of(pipe, Request("a cat", **SHORT), contexts=contexts, noise=noise)


def test_a_part_of_another_file_is_used_and_recorded(command, checkpoint, tmp_path):
    vae = str(checkpoint("ltx-2", 1))
    command(*QUICK, "--part", f"vae={vae}", "--save-json")
    made = json.loads((tmp_path / "output.json").read_text())
    assert made["load"]["parts"] == {"vae": vae}
    command("--from", "output.json", "--trust", "--output", "again.mp4", small=False)
    frames = [[*media.read_video(tmp_path / f)] for f in ("output.mp4", "again.mp4")]
    assert np.array_equal(*frames)


def test_ctrl_c_saves_the_latents(command, monkeypatch, tmp_path):
    step = generate.Progress.save_preview

    def interrupt(run, event):
        step(run, event)
        if event.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(generate.Progress, "save_preview", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command("--prompt", "a cat")
    assert [p.name for p in tmp_path.iterdir()] == ["output.latents.safetensors"]
    monkeypatch.setattr(generate.Progress, "save_preview", step)
    latents = "output.latents.safetensors"
    command(*QUICK)  # does not replace the latents
    assert (tmp_path / "output-2.mp4").exists()
    # The video takes the name of its latents, unless another one is passed.
    assert "wrote output.mp4" in command("--resume", latents, small=False)
    flags = ("--resume", latents, "--output", "b.mp4")
    assert "wrote b.mp4" in command(*flags, small=False)


def test_a_full_disk_keeps_the_latents(command, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.VideoWriter, "write", full)
    with pytest.raises(OSError):
        command(*QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["output.latents.safetensors"]


def test_latents_are_kept_when_the_gpu_fails(command, monkeypatch, tmp_path, capsys):
    calls, guided = [], GuidedDenoiser.__call__

    def step(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("[METAL] Caused GPU Timeout Error (00000002)")
        return guided(self, *arguments)

    monkeypatch.setattr(GuidedDenoiser, "__call__", step)
    with pytest.raises(SystemExit) as end:
        base.run(lambda: command("--prompt", "a cat"))
    seen = capsys.readouterr()
    assert end.value.code == 1 and seen.err.count("error: ") == 1
    assert "continue with --resume output.latents.safetensors" in seen.out
    command("--resume", "output.latents.safetensors", small=False)
    assert len(calls) == 4 + 5  # of 8 steps, three were done
    assert (tmp_path / "output.mp4").exists()


def test_latents_of_each_of_several_videos_are_on_the_disk_until_it_is_written(
    command, monkeypatch, tmp_path
):
    monkeypatch.setattr(memory.MemoryPlan, "keeps_transformer", False)
    files = lambda: sorted(p.name for p in tmp_path.glob("output*"))
    guided, decode, seen = GuidedDenoiser.__call__, Run.decode, []

    def step(self, *arguments):
        seen.append(files())
        return guided(self, *arguments)

    def decoded(self, n, *arguments):
        seen.append(files())
        yield from decode(self, n, *arguments)

    monkeypatch.setattr(GuidedDenoiser, "__call__", step)
    monkeypatch.setattr(Run, "decode", decoded)
    command("--prompt", "a cat", "--sigmas", "1,0", "--num-videos", "2")
    both = [f"output-{n}.latents.safetensors" for n in (1, 2)]
    assert seen == [[], both[:1], both, ["output-1.mp4", both[1]]]
    assert files() == ["output-1.mp4", "output-2.mp4"]


@pytest.mark.parametrize("fits", [True, False])
def test_videos_are_decoded_at_once_where_both_models_fit(
    pipe, contexts, quick_vocoder, monkeypatch, fits
):
    monkeypatch.setattr(memory.MemoryPlan, "keeps_transformer", fits)
    requests = [Request("a cat", seed=seed, **SHORT) for seed in (1, 2)]
    phases = [
        (event.phase, event.job)
        for event in pipe.stream(*requests, contexts=contexts)
        if event.step == 0 and event.phase in ("stage1", "video")
    ]
    order = [("stage1", 0), ("video", 0), ("stage1", 1), ("video", 1)]
    assert phases == (order if fits else order[::2] + order[1::2])
    assert not pipe._loaded.keys() & {"transformer", "vae", "vocoder"}


@pytest.mark.parametrize("flags, wanted", [([], True), (["--no-caffeinate"], False)])
def test_a_run_is_kept_awake_unless_it_only_plans(command, monkeypatch, flags, wanted):
    seen = []
    monkeypatch.setattr(generate, "make", lambda *_: seen.append("made"))
    monkeypatch.setattr(generate, "awake", lambda: seen.append("awake"))
    command("--prompt", "a cat", *flags)
    assert seen == ["awake"] * wanted + ["made"]
    command("--prompt", "a cat", "--plan")
    assert seen == ["awake"] * wanted + ["made"]


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_run_as_ctrl_c_does(command, monkeypatch, tmp_path, name, code):
    def stop(progress, event):
        if event.step == 3:
            signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(generate.Progress, "save_preview", stop)
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit) as end:
        base.run(lambda: command("--prompt", "a cat"))
    for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before):
        signal.signal(number, handler)
    assert end.value.code == code
    assert [p.name for p in tmp_path.iterdir()] == ["output.latents.safetensors"]


def test_an_invalid_video_is_not_written(command, monkeypatch, tmp_path):
    (tmp_path / "output.mp4").write_text("earlier")
    flat = lambda self, x, **_: iter([mx.zeros((1, 9, 64, 96, 3))])
    monkeypatch.setattr("ltx2.vae.VideoVAE.decode_stream", flat)
    with pytest.raises(OutputError, match="flat image.*expected"):
        command(*QUICK)
    assert (tmp_path / "output.mp4").read_text() == "earlier"
    assert (tmp_path / "output-2.latents.safetensors").exists()


# Speed-ups


@pytest.fixture(scope="module")
def guided(load, contexts):
    """`guided(**options)`: latents of a guided run, and the passes of each model call."""
    pipe = load("ltx-2-notc", "dev")
    texts = {"a cat": contexts["a cat"], "bad": contexts["a dog"]}

    def run(**options):
        calls, call = [], type(pipe.transformer).__call__

        def count(self, video, audio, texts, passes, trace):
            calls.append(len(passes))
            return call(self, video, audio, texts, passes, trace)

        request = Request(
            "a cat", "bad", steps=12, seed=10, no_audio=True, **SIZE, **options
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(pipe.transformer), "__call__", count)
            latents = latents_of(pipe, request, contexts=texts)
        return latents["video"], calls

    return run


def change(x, reference):
    """The norm of the difference, relative to the reference's."""
    return (mx.linalg.norm(x - reference) / mx.linalg.norm(reference)).item()


def test_a_guidance_interval_omits_passes_outside_of_it(guided):
    complete, calls = guided()
    assert calls == [3] * 12
    same, _ = guided(guidance_interval=(0.0, 1.0))
    assert mx.array_equal(same, complete)
    part, calls = guided(guidance_interval=(0.5, 1.0))
    assert calls == [3] * 10 + [1] * 2
    error = change(part, complete)
    print(f"guidance_interval: {error:.3f}")
    assert 0 < error < 0.2


def test_a_step_cache_saves_calls_with_a_small_error(guided):
    complete, _ = guided()
    near, calls = guided(step_cache=0.05)
    further, fewer = guided(step_cache=0.2)
    assert len(fewer) < len(calls) < 12
    error, larger = change(near, complete), change(further, complete)
    print(f"step_cache: {len(calls)} of 12, {error:.3f}; {len(fewer)}, {larger:.3f}")
    assert 0 < error < 0.2 and error < larger


# Nothing is done twice


def test_a_pipe_that_is_used_again_keeps_the_transformer(
    checkpoint, contexts, quick_vocoder, monkeypatch
):
    model, loads = str(checkpoint("ltx-2-notc")), []
    load = weights.Checkpoint.load

    def count(self, name, *arguments, **options):
        loads.append(name)
        return load(self, name, *arguments, **options)

    monkeypatch.setattr(weights.Checkpoint, "load", count)
    encoder = str(checkpoint("gemma3"))
    pipe = pipeline.load(model, encoder, "distilled", "float32", keep=True)
    lora = LoraFile(str(checkpoint("ltx-2-lora")), 0.5)
    run = lambda **more: pipe.generate(
        "a cat", seed=1, contexts=contexts, **SHORT, **more
    )
    first = run()
    run(loras=(lora,))
    assert mx.array_equal(run().video_latents, first.video_latents)
    assert loads.count("transformer") == 2  # once only for the LoRA's names
    # Not where it does not fit next to the other phases.
    monkeypatch.setattr(memory.MemoryPlan, "keeps_transformer", False)
    run()
    assert "transformer" not in pipe._loaded


@pytest.fixture
def counted(monkeypatch):
    """`counted(owner, name)`: a list to which each call of a function adds its first
    argument."""

    def count(owner, name):
        calls, function = [], getattr(owner, name)

        def call(*arguments, **options):
            calls.append(arguments[0])
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, call)
        return calls

    return count


def test_a_run_plans_once_and_reads_each_file_once(
    checkpoint, counted, command, tmp_path
):
    images = [str(tmp_path / f"{name}.png") for name in ("first", "last")]
    for image in images:
        media.save_png(image, np.full((128, 128, 3), (200, 40, 90), np.uint8))
    calls = {
        name: counted(owner, name)
        for owner, name in (
            (pipeline, "plan"),
            (memory.Estimator, "__call__"),
            (media, "load_image"),
            (mx, "load"),
        )
    }
    lora, upsampler = checkpoint("ltx-2-lora"), checkpoint("spatial-x2-rational")
    flags = ["--lora", str(lora), "--upsampler", str(upsampler), "--stages", "two"]
    for image, frame in zip(images, (0, -1)):
        flags += ["--image", f"{image}@{frame}"]
    size = ["--height", "128", "--width", "128", "--sigmas", "1,0.5,0"]
    command("--prompt", "a cat", *flags, *size)
    assert len(calls["plan"]) == len(calls["__call__"]) == 1
    assert calls["load_image"] == images
    reads = Counter(Path(path).stem for path in calls["load"])
    # A lazy read of a file's tensors; each component of the model has its own.
    most = {"ltx-2-notc": 18, "spatial-x2-rational": 3, "ltx-2-lora": 2, "model": 1}
    assert reads.keys() == most.keys()  # "model" is the text encoder
    assert all(reads[name] <= most[name] for name in most), reads
