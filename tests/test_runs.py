"""What runs promise beyond the reference: repeatable, resumable, described, exact in time."""

import dataclasses
import json
import sys

import mlx.core as mx
import numpy as np
import pytest

import generate
from ltx2 import media, pipeline
from ltx2.base import OutputError, UserError
from ltx2.request import Image, LoraFile, Request
from ltx2.snapshot import Snapshot
from ltx2.text import enhance

SIZE = {"height": 64, "width": 96, "num_frames": 17}


@pytest.fixture(scope="module")
def pipe(checkpoint):
    model, encoder = checkpoint("ltx-2-notc"), str(checkpoint("gemma3"))
    return pipeline.load(model, encoder, "distilled", "float32")


@pytest.fixture(scope="module")
def contexts(pipe):
    return pipe.encode_prompts(["a cat", "a dog"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """17 frames with a mono tone."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    y, x = np.mgrid[:64, :96]
    frames = [np.stack([x + 5 * t, y, x + y], -1) % 256 for t in range(17)]
    tone = np.sin(np.arange(12000) / 20)[:, None].astype(np.float32) / 2
    with media.VideoWriter(path, 24, (tone, 16000)) as video:
        video.write(np.array(frames, np.uint8))
    return str(path)


@pytest.fixture
def command(pipe, checkpoint, monkeypatch, tmp_path, capsys):
    """`command("--seed", "3")`: generate.py in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, small=True):
        argv = ["generate.py"]
        if small:
            argv += ["--model", str(checkpoint("ltx-2-notc")), "--kind", "distilled"]
            argv += ["--text-encoder", str(checkpoint("gemma3")), "--dtype", "float32"]
            argv += ["--height", "64", "--width", "96", "--num-frames", "9"]
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        generate.main()
        return capsys.readouterr().out

    return call


# The same, and not the same


def test_the_seed_and_nothing_else_makes_the_difference(pipe, contexts):
    run = lambda seed: pipe.generate("a cat", contexts=contexts, seed=seed, **SIZE)
    first, again, other = run(1), run(1), run(2)
    assert mx.array_equal(first.video_latents, again.video_latents)
    assert mx.array_equal(first.audio_latents, again.audio_latents)
    assert not mx.allclose(first.video_latents, other.video_latents, atol=0.1)


def test_noise_depends_on_name_and_seed():
    noise = pipeline.seeded_noise(3)
    assert mx.array_equal(noise("a", (4,)), noise("a", (4,)))
    assert not mx.array_equal(noise("a", (4,)), noise("b", (4,)))
    assert not mx.array_equal(noise("a", (4,)), pipeline.seeded_noise(4)("a", (4,)))
    many = noise("many", (100_000,))
    assert abs(many.mean().item()) < 0.02 and abs(many.var().item() - 1) < 0.02


def test_noise_and_sigmas_may_be_numpys(pipe, contexts, tmp_path):
    normals = pipeline.seeded_noise(10)
    noise = lambda name, shape: np.array(normals(name, shape), np.float64)
    sigmas = np.array([1, 0.7, 0.3, 0])
    given = pipe.generate(
        "a cat", contexts=contexts, noise=noise, sigmas=sigmas, **SIZE
    )
    same = pipe.generate("a cat", contexts=contexts, sigmas=(1, 0.7, 0.3, 0), **SIZE)
    assert mx.array_equal(given.video_latents, same.video_latents)
    given.save(tmp_path / "out.mp4")
    recorded = media.read_metadata(tmp_path / "out.mp4")["request"]
    assert recorded["sigmas"] == [1, 0.7, 0.3, 0]


def test_many_videos_encode_each_prompt_once(pipe, monkeypatch):
    asked = []
    encode = pipe.encode_prompts
    monkeypatch.setattr(
        pipe, "encode_prompts", lambda p, *a: asked.append(list(p)) or encode(p, *a)
    )
    requests = [Request(p, seed=s, **SIZE) for p in ("a cat", "a dog") for s in (1, 2)]
    results = [e for e in pipe.stream(*requests) if isinstance(e, pipeline.Result)]
    assert asked == [["a cat", "a dog"]]
    made = [(r.request.prompt, r.request.seed) for r in results]
    assert made == [(r.prompt, r.seed) for r in requests]
    latents = [r.video_latents for r in results]
    assert not any(mx.array_equal(latents[0], x) for x in latents[1:])


def test_an_interrupted_run_goes_on_to_the_same_end(pipe, contexts, tmp_path):
    request = Request("a cat", **SIZE)
    whole = pipe.generate("a cat", contexts=contexts, **SIZE)
    events = pipe.stream(request, contexts=contexts)
    stopped = next(e for e in events if e.snapshot and e.step == 5)
    stopped.snapshot.save(tmp_path / "kept.safetensors")
    snapshot = Snapshot.read(tmp_path / "kept.safetensors")
    assert (snapshot.stage, snapshot.step) == (0, 5)
    *_, resumed = pipe.stream(snapshot.request, contexts=contexts, resume=snapshot)
    assert mx.array_equal(resumed.video_latents, whole.video_latents)
    assert mx.array_equal(resumed.audio_latents, whole.audio_latents)


def test_latents_of_another_model_are_refused(pipe, contexts, checkpoint):
    request = Request("a cat", **SIZE)
    event = next(e for e in pipe.stream(request, contexts=contexts) if e.snapshot)
    other = pipeline.load(checkpoint("ltx-2.3"), str(checkpoint("gemma3")), "distilled")
    with pytest.raises(UserError, match="with a different model or settings"):
        next(other.stream(contexts=contexts, resume=event.snapshot))
    with pytest.raises(UserError, match="with a different model or settings"):
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
def test_every_sampler_goes_on_where_it_was(pipe, contexts, checkpoint, options):
    if "steps" in options:
        model, encoder = checkpoint("ltx-2-notc"), str(checkpoint("gemma3"))
        pipe = pipeline.load(model, encoder, "dev", "float32")
        contexts = {p: contexts["a cat"] for p in ("a cat", "bad")}
        options = {**options, "negative_prompt": "bad"}
    request = Request("a cat", no_audio=True, **options, **SIZE)
    events = list(pipe.stream(request, contexts=contexts))
    snapshots = [e.snapshot for e in events if getattr(e, "snapshot", None)]
    for snapshot in snapshots[4], snapshots[-2], snapshots[-1]:
        *_, resumed = pipe.stream(contexts=contexts, resume=snapshot)
        assert mx.array_equal(resumed.video_latents, events[-1].video_latents)


def test_what_looks_back_is_not_resumed_in_the_middle(pipe, contexts):
    request = Request("a cat", sampler="gradient_estimation", **SIZE)
    event = next(e for e in pipe.stream(request, contexts=contexts) if e.snapshot)
    with pytest.raises(UserError, match="resume only between stages"):
        next(pipe.stream(contexts=contexts, resume=event.snapshot))


def test_a_second_stage_goes_on_with_the_first_ones_sound(checkpoint, contexts):
    files = (checkpoint("gemma3"), checkpoint("spatial-x2-rational"))
    encoder, upsampler = map(str, files)
    model = checkpoint("ltx-2-notc")
    pipe = pipeline.load(model, encoder, "dev", "float32", [upsampler])
    lora = LoraFile(str(checkpoint("ltx-2-distilled-lora")))
    texts = {p: contexts["a cat"] for p in ("a cat", "bad")}
    request = Request(
        "a cat", "bad", 128, 128, 9, stages="two", steps=2, distilled_lora=lora
    )
    *events, whole = pipe.stream(request, contexts=texts)
    snapshot = next(e.snapshot for e in events if e.phase == "stage2" and e.step == 1)
    *_, resumed = pipe.stream(contexts=texts, resume=snapshot)
    assert mx.array_equal(resumed.video_latents, whole.video_latents)
    assert mx.array_equal(resumed.audio_latents, whole.audio_latents)


# Time


@pytest.mark.parametrize("frames, fps", [(9, 24), (17, 23.976), (25, 30), (1, 24)])
def test_sound_and_picture_end_together(pipe, contexts, tmp_path, frames, fps):
    size = {**SIZE, "num_frames": frames, "fps": fps}
    result = pipe.generate("a cat", contexts=contexts, **size)
    assert len(result.frames) == frames
    result.save(tmp_path / "out.mp4")
    made = media.probe(tmp_path / "out.mp4")
    assert made.num_frames == frames
    sound, rate = media.read_audio(tmp_path / "out.mp4")
    assert abs(len(sound) - round(frames / made.fps * rate)) <= 1


def test_a_retake_keeps_what_is_outside(pipe, contexts, clip):
    whole = pipe.generate(
        "a cat", contexts=contexts, video=clip, retake=(0, 9), retake_streams=("audio",)
    )
    again = pipe.generate("a cat", contexts=contexts, video=clip, retake=(0.4, 0.5))
    # Latent frames last [0, 1), [1, 9), [9, 17) frames; 0.4 to 0.5 s touch the last.
    assert mx.array_equal(again.video_latents[:2], whole.video_latents[:2])
    assert not mx.allclose(again.video_latents[2], whole.video_latents[2], atol=0.1)
    start = pipe.generate(
        "a cat", contexts=contexts, video=clip, retake=(0, 9), retake_streams=("video",)
    )
    # Audio tokens last 40 ms, the first 10: 0.4 s is in the eleventh.
    kept = [i for i in range(18) if 4 * i + 1 <= 40 or 4 * i - 3 >= 50]
    assert mx.array_equal(again.audio_latents[kept], start.audio_latents[kept])
    assert not mx.allclose(again.audio_latents, start.audio_latents, atol=0.1)


@pytest.mark.parametrize("seconds", [0.34, -0.34])
def test_an_extension_keeps_the_clip(pipe, contexts, clip, seconds):
    kept = pipe.generate(
        "a cat", contexts=contexts, video=clip, retake=(0, 9), retake_streams=("audio",)
    ).video_latents
    longer = pipe.generate("a cat", contexts=contexts, video=clip, extend=seconds)
    assert len(longer.frames) == 25
    if seconds > 0:
        assert mx.array_equal(longer.video_latents[:3], kept)
    else:  # its first latent, a single frame, is made anew as eight
        assert mx.array_equal(longer.video_latents[2:], kept[1:])


def test_a_clip_of_any_size_and_rate_is_brought_to_what_is_possible(pipe, tmp_path):
    frames = np.zeros((20, 74, 150, 3), np.uint8)
    with media.VideoWriter(tmp_path / "odd.mp4", 30) as video:
        video.write(frames)
    request = Request("a", video=str(tmp_path / "odd.mp4"), retake=(0, 1), fps=24)
    job = pipe.plan(request)
    assert (job.request.width, job.request.height) == (128, 64)
    assert job.request.num_frames == 9
    assert len(job.notes) == 3 and "resized and cropped to 128x64" in job.notes[0]


def test_a_rounded_rate_is_the_clips_own(pipe, tmp_path):
    with media.VideoWriter(tmp_path / "film.mp4", 23.976) as video:
        video.write(np.zeros((9, 64, 64, 3), np.uint8))
    for fps in (None, 23.976):
        video = str(tmp_path / "film.mp4")
        job = pipe.plan(Request("a", video=video, retake=(0, 1), fps=fps))
        assert (job.request.num_frames, job.notes) == (9, ())


def test_images_keep_their_time_when_the_rate_doubles(checkpoint, tmp_path):
    upsampler, encoder = str(checkpoint("temporal-x2")), str(checkpoint("gemma3"))
    model = checkpoint("ltx-2-notc")
    pipe = pipeline.load(model, encoder, "distilled", "float32", [upsampler])
    media.save_png(tmp_path / "i.png", np.zeros((64, 96, 3), np.uint8))
    images = (Image(str(tmp_path / "i.png"), -1),)
    job = pipe.plan(Request("a", images=images, temporal_upsample=True, **SIZE))
    assert [s.conditions["video"][0].frame for s in job.stages] == [16, 32]
    assert (job.stages[1].size.num_frames, job.stages[1].size.fps) == (33, 48)


def test_a_clip_fits_all_stages(checkpoint, tmp_path):
    upsampler, encoder = str(checkpoint("spatial-x2-rational")), str(
        checkpoint("gemma3")
    )
    pipe = pipeline.load(checkpoint("ltx-2"), encoder, "distilled", None, [upsampler])
    with media.VideoWriter(tmp_path / "clip.mp4", 24) as video:
        video.write(np.zeros((9, 200, 300, 3), np.uint8))
    lora = LoraFile(str(checkpoint("ltx-2-lora2")))  # reads its reference half as big
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


def test_a_given_sound_goes_into_the_result_as_it_is(pipe, contexts, tmp_path):
    short = np.random.default_rng(0).uniform(-0.3, 0.3, (3000, 1)).astype(np.float32)
    media.write_wav(tmp_path / "short.wav", short, 8000)  # mono, and too short
    given = media.read_audio(tmp_path / "short.wav")[0]
    path = str(tmp_path / "short.wav")
    result = pipe.generate("a cat", contexts=contexts, audio=path, **SIZE)
    assert result.sample_rate == 8000 and np.array_equal(result.waveform, given)
    result.save(tmp_path / "out.mp4")
    assert media.probe(tmp_path / "out.mp4").audio_duration == pytest.approx(
        17 / 24, 0.01
    )


def test_an_image_stays_the_first_frame(pipe, contexts, tmp_path):
    media.save_png(tmp_path / "i.png", np.full((64, 96, 3), (200, 40, 90), np.uint8))
    images = (Image(str(tmp_path / "i.png")),)
    options = {"contexts": contexts, "images": images, **SIZE}
    one, other = (pipe.generate("a cat", seed=s, **options) for s in (1, 2))
    assert mx.array_equal(one.video_latents[0], other.video_latents[0])
    assert not mx.array_equal(one.video_latents[1], other.video_latents[1])


def test_the_prompt_is_enhanced_the_same_by_seed(checkpoint):
    longer = lambda seed: enhance(checkpoint("gemma3"), "a cat", seed, max_tokens=12)
    assert longer(1) == longer(1) != longer(2)


# On the command line


def test_an_mp4_is_made_again_from_itself(command, tmp_path):
    command("--prompt", "a cat", "--seed", "5", "--save-latents", "--save-json")
    recorded = media.read_metadata(tmp_path / "output.mp4")
    assert recorded == json.loads((tmp_path / "output.json").read_text())
    assert recorded["request"]["prompt"] == "a cat" and recorded["load"]["dtype"]
    assert all(v.split(":")[1] for v in recorded["model"]["files"].values())
    flags = ("--output", "again.mp4", "--save-latents")
    command("--from", "output.mp4", *flags, small=False)
    latents = lambda stem: mx.load(str(tmp_path / f"{stem}.latents.safetensors"))
    one, two = latents("output"), latents("again")
    assert one.keys() == two.keys() and all(mx.array_equal(one[k], two[k]) for k in one)
    command("--from", "output.mp4", "--seed", "6", *flags, small=False)
    assert not mx.array_equal(latents("again")["latents.video"], one["latents.video"])


def test_previews_show_the_colours_of_the_end(pipe, contexts):
    preview = pipe.preview()
    result = pipe.generate("a cat", contexts=contexts, **SIZE)
    strip = preview(result.video_latents[None])
    assert strip.shape == (3, 16, 24, 3) and strip.dtype == np.uint8
    seen = result.frames[[0, 5, 13]].reshape(3, 2, 32, 3, 32, 3).mean((2, 4))
    quick = strip[:, ::8, ::8].astype(float)
    assert np.corrcoef(seen.ravel(), quick.ravel())[0, 1] > 0.5


def test_ctrl_c_keeps_the_latents(command, monkeypatch, tmp_path):
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
    flags = ("--resume", "output.latents.safetensors", "--output", "b.mp4")
    assert "wrote b.mp4" in command(*flags, small=False)


def test_a_bad_picture_is_not_written(command, monkeypatch, tmp_path):
    (tmp_path / "output.mp4").write_text("earlier")
    flat = lambda self, x, **_: iter([mx.zeros((1, 9, 64, 96, 3))])
    monkeypatch.setattr("ltx2.vae.VideoVAE.decode_stream", flat)
    with pytest.raises(OutputError, match="flat image.*expected"):
        command("--prompt", "a cat")
    assert (tmp_path / "output.mp4").read_text() == "earlier"
    assert (tmp_path / "output.latents.safetensors").exists()


# Fewer operations, if asked for


@pytest.fixture(scope="module")
def guided(checkpoint, contexts):
    """Latents of a guided run with these options, and how often the model was asked."""
    encoder = str(checkpoint("gemma3"))
    pipe = pipeline.load(checkpoint("ltx-2-notc"), encoder, "dev", "float32")
    texts = {"a cat": contexts["a cat"], "bad": contexts["a dog"]}

    def run(**options):
        asked = []
        ask = type(pipe.transformer).__call__
        with pytest.MonkeyPatch.context() as patch:
            count = lambda self, v, a, texts, passes, t: (
                asked.append(len(passes)) or ask(self, v, a, texts, passes, t)
            )
            patch.setattr(type(pipe.transformer), "__call__", count)
            request = Request(
                "a cat", "bad", steps=12, no_audio=True, **SIZE, **options
            )
            *_, result = pipe.stream(request, contexts=texts)
        return result.video_latents, asked

    return run


def test_a_guidance_interval_saves_the_passes_outside(guided):
    whole, asked = guided()
    assert asked == [3] * 12
    same, _ = guided(guidance_interval=(0.0, 1.0))
    assert mx.array_equal(same, whole)
    part, asked = guided(guidance_interval=(0.5, 1.0))
    assert asked == [3] * 10 + [1] * 2
    error = (mx.linalg.norm(part - whole) / mx.linalg.norm(whole)).item()
    print(f"guidance_interval: {error:.3f}")
    assert 0 < error < 0.2


def test_a_step_cache_asks_less_and_stays_near(guided):
    whole, _ = guided()
    near, asked = guided(step_cache=0.05)
    further, less = guided(step_cache=0.2)
    assert len(less) < len(asked) < 12
    error, more = (
        (mx.linalg.norm(x - whole) / mx.linalg.norm(whole)).item()
        for x in (near, further)
    )
    print(f"step_cache: {len(asked)} of 12 asked, {error:.3f}; {len(less)}, {more:.3f}")
    assert 0 < error < 0.2 and error < more
