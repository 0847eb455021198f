"""Official adapters are used as their cards ask, and masks weigh a reference by place."""

import dataclasses
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_clip
from parity import relative_error
from test_formats import described
from test_pipeline import events_to_latents

from ltx2 import media, pipeline, recipes
from ltx2.base import UserError
from ltx2.conditions import KeepAudio, ReferenceClip, ReferenceSound
from ltx2.inputs import Encoders, InputFiles, filling, frames_of
from ltx2.latents import LatentState, Size, audio_bounds
from ltx2.recipes import RECIPES
from ltx2.request import LoraFile, Request
from ltx2.tiles import Span, equal_spans, spans
from ltx2.windows import Window

FRAMES = np.random.default_rng(0).integers(0, 255, (17, 64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def pipe(load):
    return load("ltx-2.5", upsamplers=["spatial-x2"])


@pytest.fixture
def clip(clip_of):
    return clip_of(FRAMES)


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """`adapter("deblur-0.9")`: a small LoRA of the official one's name."""

    def adapter(name):
        path = tmp_path / f"ltx-2.5-22b-ic-lora-{name}.safetensors"
        smaller = {"reference_downscale_factor": "2"} if "upscaler" in name else {}
        factors = mx.load(str(checkpoint("ltx-2.5-lora2")))
        mx.save_safetensors(str(path), factors, smaller)
        return LoraFile(str(path))

    return adapter


@pytest.mark.parametrize(
    "name, prompt, stages, size",
    [
        ("deblur-0.9", "DEBLUR a cat", 1, (96, 64)),
        ("colorization-0.9", "COLORIZE a cat", 1, (96, 64)),
        ("clean-plate-1.0", "a cat", 1, (96, 64)),
        ("pixel-spatial-upscaler-x2-1.0", "a cat", 1, (192, 128)),
        ("layout-to-render-1.0", "a cat", 2, (96, 64)),
        ("something-new-1.0", "a cat", 2, (64, 64)),
    ],
)
def test_an_adapter_decides_what_the_request_does_not(
    pipe, adapter, clip, name, prompt, stages, size
):
    job = pipe.plan(Request("a cat", seed=10, video=clip, loras=(adapter(name),)))
    assert job.request.prompt == job.prompts[0] == prompt
    assert len(job.stages) == stages
    assert (job.size.width, job.size.height) == size
    assert any(name in note for note in job.notes)


def test_what_the_user_asks_for_goes_before_the_card(pipe, adapter, clip):
    options = {"stages": "two", "height": 64, "width": 64}
    request = Request(
        "Deblur it", seed=10, video=clip, loras=(adapter("deblur-0.9"),), **options
    )
    job = pipe.plan(request)
    assert (job.request.prompt, len(job.stages)) == ("Deblur it", 2)


def test_an_unknown_adapter_in_one_stage_needs_no_advice(pipe, adapter, clip):
    lora = adapter("something-new-1.0")
    request = Request("a cat", seed=10, video=clip, loras=(lora,))
    notes = lambda r: [note for note in pipe.plan(r).notes if "is unknown" in note]
    assert notes(request) and not notes(dataclasses.replace(request, stages="one"))


PLAIN_LORAS = ("cinemagraph", "slow-motion-control")


ALPHA = "-vf alphaextract,format=gray -f rawvideo pipe:1"
TWO = {"layout-to-render", "lipdub", "dubit", "hdr"}  # adapters of two stages


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_official_adapter_makes_a_clip(
    pipe, adapter, quick_text, clip_of, tmp_path, name
):
    """The clip's sides do not suit the model: they are padded, and cut back."""
    options = {"loras": (adapter(f"{name}-1.0"),), "sigmas": (1.0, 0.5, 0.0)}
    options |= {"no_audio": True, "video": clip_of(FRAMES[:9, :52, :74])}
    if name in PLAIN_LORAS:
        media.save_png(tmp_path / "first.png", FRAMES[0])
        options |= {"video": None, "images": (str(tmp_path / "first.png"),)}
        options |= {"height": 64, "width": 64, "num_frames": 9}
    request = Request("a cat", seed=10, **options)
    job, events = pipe.plan(request), list(pipe.stream(request))
    frames = np.concatenate([e.frames for e in events if e.frames is not None])
    scale = 2 if "upscaler" in name else 1
    sides = (64, 64) if name in PLAIN_LORAS else (52 * scale, 74 * scale)
    assert frames.shape == (9, *sides, 3) == (9, job.size.height, job.size.width, 3)
    tiles = 8 if name == "hdr" else 1  # of stage 2, each a stage
    assert len(job.stages) == 1 + tiles * (name in {*PLAIN_LORAS, *TWO})
    size = job.stages[-1].part.whole(job.stages[-1].size)
    whole = [64 * -(-side // 64) for side in sides] if scale == 2 else [64, 96]
    whole = [64, 128] if name in TWO else whole
    whole = [64, 64] if name in PLAIN_LORAS else whole
    assert [size.height, size.width] == whole
    assert size.num_frames == (17 if name == "refine-details" else 9)
    assert events[-1].video_latents.shape[0] == 2


def test_a_clip_is_padded_not_stretched():
    frame = FRAMES[0, :52, :74]
    padded = filling(frame, Size(96, 64, 1, 24.0, shown=(52, 74)))
    np.testing.assert_allclose(padded[:52, :74], frame / 127.5 - 1, atol=1e-6)
    assert np.array_equal(padded[52], padded[50])  # it reflects
    assert np.array_equal(padded[:, 74], padded[:, 72])
    smaller = Size(128, 128, 1, 24.0, shown=(52, 74)).divided(2)
    assert (smaller.height, smaller.shown) == (64, (26, 37))
    assert filling(frame[:8], Size(96, 64, 1, 24.0, shown=(8, 74))).shape[0] == 64


def test_the_size_of_a_result_may_be_asked_for(pipe, adapter, clip):
    loras = (adapter("refine-details-1.0"),)
    options = {"height": 90, "width": 160, "video": clip, "loras": loras}
    job = pipe.plan(Request("a", seed=10, **options))
    assert (job.size.width, job.size.height) == (160, 90)
    assert (job.stages[0].size.width, job.stages[0].size.height) == (160, 96)
    assert any("160x90 is padded to 160x96" in note for note in job.notes)
    assert any("8 more frames" in note for note in job.notes)
    assert pipe.plan(job.request).stages == job.stages
    with pytest.raises(UserError, match="height must be a multiple of 2"):
        pipe.plan(Request("a", seed=10, **options | {"height": 91}))


def test_frames_after_the_end_of_a_reference_repeat_its_last(pipe, adapter, clip):
    job = pipe.plan(
        Request("a", seed=10, video=clip, loras=(adapter("refine-details-1.0"),))
    )
    (reference,) = job.stages[0].conditions["video"]
    assert reference.num_frames == 25
    frames = list(frames_of(clip, 8, 17, 24.0))
    assert len(frames) == 17
    assert all(np.array_equal(frame, FRAMES[16]) for frame in frames[8:])


def test_what_is_cut_off_is_not_heard(pipe, adapter, clip, quick_text, quick_vocoder):
    loras = (adapter("refine-details-1.0"),)
    request = Request("a", seed=10, video=clip, loras=loras, sigmas=(1.0, 0.0))
    *_, result = pipe.stream(request)
    assert len(result.waveform) == round(17 / 24 * result.sample_rate)


def test_notes_say_what_an_adapter_was_not_made_for(pipe, adapter, tmp_path):
    save_clip(tmp_path / "long.mkv", np.zeros((129, 64, 64, 3), np.uint8), 24)
    video = str(tmp_path / "long.mkv")
    job = pipe.plan(
        Request("a cat", seed=10, video=video, loras=(adapter("deblur-0.9"),))
    )
    assert "129 frames: the adapter was made for at most 121" in job.notes
    notes = pipe.plan(
        Request("", seed=10, video=video, loras=(adapter("alpha-gen-0.9"),))
    ).notes
    assert any("was made for a dev model" in note for note in notes)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("dev", "add --kind distilled"),
        ("distilled", "is for dev models, but this one is distilled"),
    ],
)
def test_a_distilled_lora_among_the_others_is_noted(kind, said):
    """A model would be distilled twice, or take the steps of a dev model."""
    file = LoraFile("models/ltx-2-19b-distilled-lora-384.safetensors")
    [noted] = recipes.follow(Request("a", loras=(file,)), kind)[2]
    assert (
        noted.startswith("ltx-2-19b-distilled-lora-384.safetensors") and said in noted
    )
    assert recipes.follow(Request("a", distilled_lora=file), kind)[2] == []


@pytest.mark.parametrize("sides", [(64, 96), (96, 64)])
def test_tiles_are_turned_with_the_clip(pipe, adapter, tmp_path, sides):
    save_clip(tmp_path / "clip.mkv", np.zeros((9, *sides, 3), np.uint8), 24)
    request = Request("a", seed=10, video=str(tmp_path / "clip.mkv"))
    request = dataclasses.replace(request, loras=(adapter("restore-1.0"),))
    job = pipe.plan(request)
    tile = (17, 30) if sides[0] < sides[1] else (30, 17)
    assert [stage.tile for stage in job.stages] == [tile]


def test_alpha_gen_uses_a_dev_model_without_guidance(load, adapter, clip):
    dev = load("ltx-2.5", "dev")
    job = dev.plan(Request("", seed=10, video=clip, loras=(adapter("alpha-gen-0.9"),)))
    guidance = job.stages[0].guidance["video"]
    assert (guidance.cfg_scale, guidance.stg_scale, guidance.rescale_scale) == (
        1,
        0,
        0.7,
    )
    assert guidance.modality_scale == 1 and job.streams == ("video",)
    guided = Request(**vars(job.request) | {"audio_guidance": {"cfg_scale": 2.0}})
    with pytest.raises(UserError, match="audio_guidance needs generated sound"):
        dev.plan(guided)


def test_a_mov_of_a_matte_has_the_clip_as_color(load, adapter, quick_text, tmp_path):
    save_clip(tmp_path / "odd.mkv", FRAMES[:9, :52, :74] // 2, 24)
    dev = load("ltx-2.5", "dev")
    options = {"video": str(tmp_path / "odd.mkv"), "sigmas": (1.0, 0.0)}
    result = dev.generate("", loras=(adapter("alpha-gen-0.9"),), **options)
    result.save(tmp_path / "a.mov")
    assert "yuva444p12le" in described(tmp_path / "a.mov")
    colors = np.stack(list(media.read_video(tmp_path / "a.mov"))).astype(int)
    assert np.abs(colors - FRAMES[:9, :52, :74] // 2).mean() < 6  # it is noise
    with media.ffmpeg("", media.input_option(tmp_path / "a.mov"), ALPHA) as process:
        alpha = np.frombuffer(process.stdout.read(), np.uint8).reshape(9, 52, 74)
    matte = result.frames.mean(-1)
    assert np.abs(alpha - matte).max() <= 2
    result.save(tmp_path / "a.mkv")  # has no alpha
    shown = np.stack(list(media.read_video(tmp_path / "a.mkv")))
    assert np.array_equal(shown, result.frames)


def test_only_an_adapter_for_no_prompt_takes_an_empty_one(pipe, adapter, clip):
    with pytest.raises(UserError, match="the prompt is empty"):
        pipe.plan(
            Request(" ", seed=10, video=clip, loras=(adapter("clean-plate-1.0"),))
        )


def test_slow_motion_is_said_unless_it_is_asked_for(pipe, adapter):
    options = {"loras": (adapter("slow-motion-control-1.0"),), "num_frames": 9}
    said = lambda job: [n for n in job.notes if "--conditioned-fps" in n]
    [note] = said(pipe.plan(Request("a fountain", seed=10, **options)))
    assert "fps / speed (1 to 0.025)" in note
    slow = pipe.plan(
        Request("a fountain", seed=10, conditioned_fps=24 / 0.025, **options)
    )
    assert not said(slow) and slow.stages[0].size.rate == 960
    assert slow.stages[0].size.fps == 24


@pytest.mark.parametrize("fps, said", [(24, 0), (23.976, 0), (59.94, 0), (12, 1)])
def test_a_rate_that_the_models_do_not_know_is_said(pipe, fps, said):
    size = {"height": 64, "width": 64, "num_frames": 9, "fps": fps}
    notes = pipe.plan(Request("a cat", seed=10, **size)).notes
    assert sum("24, 25, 30, 50, 60" in note for note in notes) == said
    assert not pipe.plan(Request("a cat", seed=10, conditioned_fps=24.0, **size)).notes


def test_a_trigger_is_a_word_of_its_own(pipe, adapter, clip):
    lora = adapter("colorization-0.9")
    job = pipe.plan(Request("a colorized photo", seed=10, video=clip, loras=(lora,)))
    assert job.request.prompt == "COLORIZE a colorized photo"


def test_a_recipe_gives_way_where_it_cannot_be_followed(pipe, adapter, clip):
    options = {"video": clip, "loras": (adapter("restore-1.0"),)}
    assert pipe.plan(Request("a", seed=10, retake=(0.1, 0.3), **options)).stages
    job = pipe.plan(Request("a", seed=10, stages="two", height=64, width=64, **options))
    assert [stage.tile for stage in job.stages] == [None, None]
    again = pipe.plan(job.request)
    assert again.stages == job.stages


# Windows


@pytest.mark.parametrize(
    "name, frames", [("chunk_frames", 33), ("carry_frames", 25), ("blend_frames", 8)]
)
def test_all_options_of_windows_have_the_same_limits(pipe, name, frames):
    size = {"height": 64, "width": 64, "num_frames": 121, name: frames}
    assert len(pipe.plan(Request("a", seed=10, **size)).windows) > 1
    for option in ({"audio_only": True}, {"stages": "dfr"}):
        with pytest.raises(UserError, match=f"{name} (cannot|needs)"):
            pipe.plan(Request("a", seed=10, **size, **option))


def test_windows_after_the_end_of_a_reference_have_none(pipe, adapter, clip):
    size = {"num_frames": 65, "chunk_frames": 25, "carry_frames": 17, "stages": "one"}
    request = Request("a", seed=10, video=clip, loras=(adapter("deblur-0.9"),), **size)
    shown = [
        any(isinstance(c, ReferenceClip) for c in stage.all_conditions)
        for stage in pipe.plan(request).stages
    ]
    assert shown[0] and not any(shown[1:])


def test_keyframes_of_a_window_are_in_order():
    window = Window(0, 25, carried_out=17)
    assert window.keyframes((23, 2, 23)) == (2, 23)
    assert window.handed_on((2, 23)) == (15,)


# Tiles


@pytest.mark.parametrize(
    "side, size, rows",
    [
        (30, 32, [(0, 30, 0, 0)]),
        (4, 2, [(0, 2, 0, 1), (1, 3, 1, 1), (2, 4, 1, 0)]),
        (33, 32, [(0, 32, 0, 31), (1, 33, 31, 0)]),
        (67, 32, [(0, 32, 0, 14), (18, 50, 14, 15), (35, 67, 15, 0)]),
        (
            120,
            48,
            [(0, 48, 0, 24), (24, 72, 24, 24), (48, 96, 24, 24), (72, 120, 24, 0)],
        ),
    ],
)
def test_a_side_is_divided_as_in_the_reference(side, size, rows):
    assert spans(side, size) == rows
    np.testing.assert_allclose(total_weights(side, rows), 1, rtol=1e-6)


def total_weights(side, rows):
    total = np.zeros(side)
    for span in map(Span._make, rows):
        total[span.start : span.stop] += span.weights
    return total


@pytest.mark.parametrize(
    "side, count, rows",
    [
        (3, 4, [(0, 3, 0, 0)]),
        (4, 2, [(0, 3, 0, 2), (1, 4, 2, 0)]),
        (4, 4, [(0, 1, 0, 0), (1, 2, 0, 0), (2, 3, 0, 0), (3, 4, 0, 0)]),
        (5, 4, [(0, 2, 0, 1), (1, 3, 1, 1), (2, 4, 1, 1), (3, 5, 1, 0)]),
        (
            68,
            4,
            [(0, 25, 0, 10), (15, 40, 10, 10), (30, 54, 10, 10), (44, 68, 10, 0)],
        ),
        (120, 2, [(0, 65, 0, 10), (55, 120, 10, 0)]),
    ],
)
def test_a_side_is_divided_for_dfr_as_in_the_reference(side, count, rows):
    assert equal_spans(side, count) == rows
    np.testing.assert_allclose(total_weights(side, rows), 1, rtol=1e-6)


@pytest.mark.parametrize("tile", [(64,), (64, 50), (32, 64)])
def test_the_sides_of_a_tile_are_checked(pipe, adapter, clip, tile):
    options = {"video": clip, "loras": (adapter("deblur-0.9"),)}
    with pytest.raises(
        UserError, match="must be (a multiple of 32 from 64|a list of 2)"
    ):
        pipe.plan(Request("a", seed=10, **options, tile_size=tile))


# Masks


def test_a_mask_is_averaged_over_each_latent(tmp_path):
    frames = np.zeros((17, 64, 64, 3), np.uint8)
    frames[0] = 255  # the first latent is the first frame
    frames[1:5, :, :32] = 255  # half of the second's, at the left
    frames[9:, :16, 32:] = 255  # half of the height of the third's, at the top right
    save_clip(tmp_path / "mask.mkv", frames, 24)
    path, size = str(tmp_path / "mask.mkv"), Size(64, 64, 17, 24.0)
    source = Encoders(InputFiles(), None)
    weights = source.weights(path, 0, 17, size, size, 1, path)
    expected = [np.ones((2, 2)), [[0.5, 0], [0.5, 0]], [[0, 0.5], [0, 0]]]
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    # All 16 frames count, not 8
    slow = source.weights(path, 0, 17, size, size, 2, path)
    np.testing.assert_allclose(slow[1], [[0.25, 0.25], [0.25, 0]], atol=1e-6)
    assert len(source.weights(path, 0, 1, size, size, 2, path)) == 1
    media.save_png(tmp_path / "mask.png", frames[1])
    weights = source.weights(str(tmp_path / "mask.png"), 0, 17, size, size, 1, path)
    slow = source.weights(str(tmp_path / "mask.png"), 0, 25, size, size, 2, path)
    assert len(slow) == 2  # of 13 frames, the last 4 are left out as in the encoder
    np.testing.assert_allclose(weights, [[[1, 0], [1, 0]]] * 3, atol=1e-6)


def test_a_mask_must_be_as_long_as_its_reference(
    pipe, adapter, clip, clip_of, tmp_path
):
    options = {"video": clip, "attention_mask": clip_of(FRAMES[:9])}
    with pytest.raises(UserError, match="9 frames at 24 fps, fewer than the 17"):
        pipe.plan(Request("a", seed=10, loras=(adapter("deblur-0.9"),), **options))
    options["attention_mask"] = str(tmp_path / "none.mkv")
    with pytest.raises(UserError, match="none.mkv"):
        pipe.plan(Request("a", seed=10, loras=(adapter("deblur-0.9"),), **options))


# Dub-It


@pytest.fixture(scope="module")
def dub(load):
    """A pipeline of LTX-2.3 with its upsampler."""
    return load("ltx-2.3", upsamplers=["spatial-x2"])


@pytest.fixture
def dubbed(checkpoint, tmp_path):
    """`dubbed(sound=True)`: options of a request for a clip of 17 frames."""

    def dubbed(sound=True):
        path = tmp_path / "ltx-2.3-22b-ic-lora-dubit-0.9.safetensors"
        shutil.copy(checkpoint("ltx-2.3-lora"), path)
        tone = np.sin(np.arange(32000) / 20)[None].repeat(2, axis=0) / 2
        wave = (tone, 16000) if sound else ()
        save_clip(tmp_path / "clip.mkv", FRAMES[:, :, :64], 24, *wave)
        return {"video": str(tmp_path / "clip.mkv"), "loras": (LoraFile(str(path)),)}

    return dubbed


def test_dub_it_sees_and_hears_the_clip_in_both_stages(dub, dubbed):
    job = dub.plan(Request("she speaks", seed=10, sigmas=(1.0, 0.5, 0.0), **dubbed()))
    for stage, sound in zip(job.stages, (ReferenceSound, KeepAudio), strict=True):
        assert [type(c) for c in stage.conditions["video"]] == [ReferenceClip]
        assert [type(c) for c in stage.conditions["audio"]] == [sound]
        assert len(stage.loras) == 1 and stage.sampler == "euler"
    shapes = {}

    def noise(name, shape):
        shapes[name] = shape
        return pipeline.seeded_noise(1)(name, shape)

    contexts = {"she speaks": (mx.zeros((1, 1024, 128)), mx.zeros((1, 1024, 64)))}
    for event in events_to_latents(dub, job, noise=noise, contexts=contexts):
        if event.snapshot and event.snapshot.step == 0:
            made = event.snapshot.latents
        if event.phase == "stage1" and event.denoised:
            first = event.denoised["audio"]
    # As long a sound is appended; the second stage keeps the first one's.
    assert shapes["stage1.audio"] == shapes["stage2.audio"] == (1, 2 * 18, 128)
    assert relative_error(made["audio"], first) < 1e-5


def test_the_sound_that_is_heard_ends_before_the_video_begins():
    state = LatentState.initial(audio_bounds(18), 8)
    state = state.show_sound(mx.ones((1, 12, 2, 4)))
    assert state.num_target_tokens == 18 and state.denoise_mask.sum() == 18
    np.testing.assert_allclose(state.bounds[0, 18], (-0.49, -0.48), atol=1e-6)
    np.testing.assert_allclose(state.bounds[0, -1], (-0.08, -0.04), atol=1e-6)


def test_a_silent_clip_is_not_heard(dub, dubbed):
    job = dub.plan(Request("she speaks", seed=10, **dubbed(sound=False)))
    heard = [c.tokens(job.size) for s in job.stages for c in s.conditions["audio"]]
    assert not any(heard) and "so none is given to the adapter" in job.notes[-1]


def test_a_card_gives_way_to_the_stages_that_are_asked_for(dub, dubbed):
    job = dub.plan(Request("she speaks", seed=10, stages="one", **dubbed()))
    assert [len(stage.conditions["audio"]) for stage in job.stages] == [1]
