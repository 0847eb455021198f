"""HDR from SDR clips equals the reference; what an HDR result holds is read back."""

import struct
import sys
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import save_clip
from mlx.utils import tree_flatten
from parity import channels_last, relative_error
from test_formats import attributes, described
from test_pipeline import latents_of
from test_reference import LORA, golden, load, recorded_noise  # noqa: F401

import generate
from ltx2 import color, conditions, exr, formats, media, pipeline, stages
from ltx2.base import UserError
from ltx2.conditions import ClipKeyframes
from ltx2.diffusion_decoder import DiffusionDecoder
from ltx2.inputs import Encoders, InputFiles
from ltx2.latents import Size
from ltx2.record import read_config
from ltx2.request import Image, LoraFile, Request
from ltx2.run import Run
from ltx2.stages import MODES
from ltx2.tiles import LARGE, LIGHT, equal_spans, sized_spans
from ltx2.vae import VideoVAE

FRAMES = np.random.default_rng(0).integers(0, 255, (33, 64, 64, 3), np.uint8)
NAME = "ltx-2.5-22b-ic-lora-sdr-to-hdr-1.0.safetensors"


def drawn_frames(count, seed):
    """torch.rand(count, 3, 8, 8) of a seed, as pixels (count, 8, 8, 3) of 255."""
    raw = np.random.RandomState(seed).randint(0, 2**32, count * 3 * 64, np.uint32)
    values = (raw % 2**24 / np.float32(2**24)).astype(np.float32)
    return values.reshape(count, 3, 8, 8).transpose(0, 2, 3, 1) * np.float32(255)


def test_a_run_is_the_references(load, clip_of, monkeypatch):  # noqa: F811
    g, info = golden("hdr_ic_lora_keyframes")
    clip = drawn_frames(33, 82)  # not rounded to 8 bits, as a file's would be
    read = lambda path, start, count, fps: iter(clip[start : start + count])
    monkeypatch.setattr(media, "read_video", read)
    monkeypatch.setattr(conditions, "ANCHOR_STRENGTH", info["keyframe_strength"])
    options = {"loras": (LORA,), "stages": "one", "no_audio": True}
    options["sigmas"] = tuple(info["stages"][0]["sigmas"])
    options["video"] = clip_of(FRAMES, info["frame_rate"])
    request = Request(info["prompt"], color_space="acescct", **options)
    pipe, frames = load("distilled"), []
    for event in pipe.stream(request, noise=recorded_noise(g, info)):
        if event.phase == "latents":
            video = event.snapshot.latents["video"]
        if isinstance(event, pipeline.Frames):
            frames.append(event.frames)
    assert relative_error(video, channels_last(g["out.video_latent"])) < 1e-4
    shown = np.concatenate(frames)[::8, ::2, ::2]
    expected = np.array(g["out.video_sub_acescct"], np.float32)
    assert shown.dtype == np.float32
    assert np.abs(shown - expected).max() < 1e-3  # of float16


@pytest.fixture(scope="module")
def pipe(checkpoint):
    model = str(checkpoint("ltx-2.5"))
    return pipeline.load(model, None, "distilled", "bfloat16")


@pytest.fixture
def request_for(checkpoint, tmp_path, clip_of):
    """`request_for(NAME, frames, fps, ...)`: of a clip, a LoRA and embeddings."""

    def request_for(name=NAME, frames=FRAMES, fps=24, model="2.5", **options):
        lora, text = str(tmp_path / name), str(tmp_path / "emb.safetensors")
        factors = mx.load(str(checkpoint(f"ltx-{model}-lora2")))
        mx.save_safetensors(lora, factors, options.pop("metadata", {}))
        mx.save_safetensors(text, {"video_context": mx.ones((1, 8, 72))})
        options = {"prompt": "", "contexts_file": text} | options
        options = {"sigmas": (1.0, 0.0), "video": clip_of(frames, fps)} | options
        options.setdefault("seed", 10)
        return Request(loras=(LoraFile(lora),), **options)

    return request_for


def test_the_adapter_makes_one_stage_of_light_without_sound(pipe, request_for):
    job = pipe.plan(request_for(sigmas=None))
    (stage,) = job.stages
    assert (stage.steps, stage.sampler, stage.streams) == (8, "euler", ("video",))
    assert (job.codes, job.request.color_space) == ("acescct", "srgb_linear")
    kinds = [type(c).__name__ for c in stage.conditions["video"]]
    assert kinds == ["ReferenceClip", "ClipKeyframes", "NewKeyframes"]
    _, given, slots = stage.conditions["video"]
    assert given.frames == slots.frames == (32,)  # 33 frames end with dfr's segment
    assert conditions.ANCHOR_STRENGTH == 0.95


@pytest.mark.parametrize(
    "count, places", [(17, ()), (25, (24,)), (57, (32,)), (73, (24, 48, 72))]
)
def test_keyframes_are_at_dfrs_places_within_the_clip(pipe, request_for, count, places):
    frames = np.zeros((count, 64, 64, 3), np.uint8)
    found = pipe.plan(request_for(frames=frames)).stages[0].all_conditions
    assert [c.frames for c in found if hasattr(c, "frames")] == [places] * 2 * bool(
        places
    )
    off = pipe.plan(request_for(frames=frames, hdr_keyframes=False))
    assert len(list(off.stages[0].all_conditions)) == 1


@pytest.mark.parametrize("fps, rate", [(24, 24), (30, 30), (50, 30), (60, 30)])
def test_fast_clips_are_conditioned_as_30_frames_per_second(
    pipe, request_for, fps, rate
):
    job = pipe.plan(request_for(fps=fps))
    assert (job.size.fps, job.stages[0].size.rate) == (fps, rate)
    assert (
        pipe.plan(request_for(fps=fps, conditioned_fps=20.0)).stages[0].size.rate == 20
    )


def test_frames_hold_the_color_space_that_is_asked_for(pipe, request_for):
    request = request_for(frames=FRAMES[:9, :50, :62])  # padded to 64x64, and cut back
    spaces, found = ("acescct", "srgb", "srgb_linear", "acescg"), {}
    for space in spaces:
        result = pipe.generate(**vars(replace(request, color_space=space)))
        assert result.frames.shape == (9, 50, 62, 3)
        assert result.frames.dtype == np.float32 and result.waveform is None
        found[space] = result.frames
        expected = color.convert(found["acescct"], "acescct", space)
        np.testing.assert_allclose(result.frames, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("no_audio", [False, True])
def test_the_clips_sound_is_kept_unless_it_is_not_wanted(
    pipe, request_for, tmp_path, no_audio
):
    clip = tmp_path / "clip.mkv"
    request = request_for(video=str(clip), no_audio=no_audio)
    tone = np.sin(np.arange(48000) / 20)[None].repeat(2, 0).astype(np.float32)
    save_clip(clip, FRAMES[:9], 24, tone, 48000)
    result = pipe.generate(**vars(request))
    assert result.audio_latents is None
    result.save(tmp_path / "hdr.mp4")
    found = media.probe(tmp_path / "hdr.mp4")
    assert found.num_frames == 9 and found.has_audio != no_audio
    if not no_audio:
        np.testing.assert_allclose(result.waveform, tone.T[:18000], atol=1e-6)


def test_light_is_encoded_and_decoded_in_float32(pipe, request_for, monkeypatch):
    found, seen, encode = [], set(), VideoVAE.encode_stream

    def encoded(model, *frames):
        seen.update(w.dtype for _, w in tree_flatten(model.encoder.parameters()))
        return encode(model, *frames)

    def decode(model, latents, *_, **__):
        weights = tree_flatten(model.parameters())
        found.append({w.dtype for _, w in weights})
        yield mx.random.uniform(shape=(1, 9, 64, 64, 3))

    monkeypatch.setattr(DiffusionDecoder, "decode_stream", decode)
    monkeypatch.setattr(VideoVAE, "encode_stream", encoded)
    request = request_for(frames=FRAMES[:9], video_decoder="diffusion")
    pipe.generate(**vars(request))
    assert seen == {mx.float32}
    size = {"height": 64, "width": 64, "num_frames": 9, "sigmas": (1.0, 0.0)}
    text = {"contexts_file": request.contexts_file, "video_decoder": "diffusion"}
    pipe.generate("", no_audio=True, **text, **size)
    assert found == [{mx.float32}, {mx.bfloat16}]
    sdr = replace(request, loras=(), video=None, no_audio=True, **size)
    plans = (pipe.plan(r).memory.phases["video"] for r in (request, sdr))
    exact, half = (need.weights for need in plans)
    assert exact == 2 * half


def test_an_mp4_is_hlg_with_its_exr_frames_beside_it(
    checkpoint, request_for, tmp_path, monkeypatch
):
    r = request_for(frames=FRAMES[:9])
    argv = ["generate.py", "--model", str(checkpoint("ltx-2.5")), "--sigmas", "1,0"]
    argv += ["--video", r.video, "--lora", r.loras[0].path, "--kind", "distilled"]
    argv += ["--contexts", r.contexts_file, "--color-space", "acescg"]
    argv += ["--save-sheet"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", argv)
    generate.main()
    assert "arib-std-b67" in described("output.mp4")
    frames = sorted(Path("output_acescg_exr").glob("*.exr"))
    assert len(frames) == media.probe("output.mp4").num_frames == 9
    assert attributes(frames[0])["colorSpace"][1] == b"ACEScg"
    recorded = media.read_metadata("output.mp4")["request"]
    assert recorded["color_space"] == "acescg"
    assert media.load_image("output-sheet.png").std() > 10
    monkeypatch.setattr(sys, "argv", [*argv, "--codec", "h264"])
    with pytest.raises(UserError, match="h264 cannot hold acescg"):
        generate.main()


@pytest.fixture(scope="module")
def pipe_2_3(checkpoint, tmp_path_factory):
    files = (str(checkpoint(n)) for n in ("ltx-2.3", "gemma3", "spatial-x2"))
    model, encoder, upsampler = files
    kept = {"cache_contexts": tmp_path_factory.mktemp("contexts")}
    return pipeline.load(model, encoder, "distilled", "float32", [upsampler], **kept)


NAME_2_3 = "ltx-2.3-22b-ic-lora-hdr-0.9.safetensors"
OF_2_3 = {
    "model": "2.3",
    "frames": FRAMES[:9],
    "prompt": "a cat",
    "contexts_file": None,
}


def test_the_adapter_of_2_3_gives_logc3_of_an_sdr_clip_in_two_stages(
    pipe_2_3, request_for
):
    job = pipe_2_3.plan(request_for(NAME_2_3, **OF_2_3))
    assert (job.codes, job.streams) == ("logc3", ("video",))
    assert all(stage.loras for stage in job.stages)
    # 64x64 with 9 frames are 2 latents on each axis: stage 2 has 8 tiles
    assert [s.name for s in job.stages] == [f"stage{n}" for n in range(1, 10)]
    assert {s.sigmas for s in job.stages[1:]} == {(0.909375, 0.725, 0.0)}
    assert [s.size.latent for s in job.stages[1:]] == [(1, 1, 1)] * 8
    metadata = {"hdr_transform": "true"}
    request = request_for("mine.safetensors", metadata=metadata, **OF_2_3)
    assert pipe_2_3.plan(request).streams == ("video",)  # no sound, as any HDR adapter
    metadata = {"use_hdr_transform": "1"}
    other = request_for("mine.safetensors", metadata=metadata, **OF_2_3)
    assert pipe_2_3.plan(other).codes == "logc3"
    result = pipe_2_3.generate(**vars(request))
    assert result.request.color_space == "srgb_linear"
    assert result.frames.dtype == np.float32


@pytest.mark.parametrize("name, twice", [("hdr_tiles", 0), ("hdr_double_frames", 1)])
def test_a_run_of_2_3_is_the_references(
    load, tmp_path, monkeypatch, name, twice  # noqa: F811
):
    g, info = golden(name)
    if twice:
        assert info["vae_tiles"] == [4, 2, 4, 2]
        monkeypatch.setattr(stages, "LIGHT", ((4, 2),) * 3)
        monkeypatch.setattr(stages, "LIGHT_PIXELS", 0)
    frames = 17 if twice else 33
    cells = np.random.default_rng(3).integers(0, 256, (frames, 24, 24, 3), np.uint8)
    clip, lora = tmp_path / "clip.mkv", str(tmp_path / NAME_2_3)
    save_clip(clip, cells.repeat(8, 1).repeat(8, 2), 24)
    mx.save_safetensors(lora, mx.load(LORA.path), {"hdr_transform": "logc3"})
    request = Request("a", loras=(LoraFile(lora),), video=str(clip), seed=info["seed"])
    request = replace(request, hdr_double_frames=bool(twice))
    context = np.random.default_rng(4).standard_normal((2, 1, 8, 32), np.float32)[0]
    contexts, made = {"a": (mx.array(context), mx.zeros((1, 8, 16)))}, []
    for event in load("distilled").stream(request, contexts=contexts):
        if event.phase == "latents":
            video = event.snapshot.latents["video"]
        if isinstance(event, pipeline.Frames):
            made.append(event.frames)
    assert relative_error(video, channels_last(g["out.video_latent"])) < 1e-4
    light = np.concatenate(made)
    assert len(light) == frames
    light = light[::4, ::8, ::8]
    assert relative_error(mx.array(light), g["out.light_sub"]) < 1e-3
    assert event.video_latents.shape[0] == 5


def test_tiles_are_laid_out_as_in_the_reference():
    g, _ = golden("hdr_tiles")
    row = next(row for row in MODES["two of light"] if row.tiles)
    for key in (key for key in g if "tiles" in key):
        sides = map(int, key.rpartition(".")[2].split("_"))
        axes = (equal_spans(n, *how) for n, how in zip(sides, row.tiles))
        rows = [[[s.start, s.stop] for s in tile] for tile in product(*axes)]
        assert rows == g[key].tolist(), key


def test_clips_are_encoded_in_the_references_tiles():
    g, _ = golden("hdr_double_frames")
    tiles = {"large": LARGE, "light": LIGHT}
    for key in (key for key in g if key.split(".")[1] in tiles):
        _, kind, sides = key.split(".")
        sides = map(int, sides.split("_"))
        axes = (sized_spans(n, *how) for n, how in zip(sides, tiles[kind]))
        rows = []
        for time, *places in product(*axes):
            first = max(time.start - 1, 0)  # its latent has no weight
            inside = [[first, time.stop], *([s.start, s.stop] for s in places)]
            rows.append([*inside, [8 * first, 8 * time.stop - 7]])
        assert rows == g[key].tolist(), key


class MeanEncoder:
    """Latents that are the mean of each 32x32 pixels of a group's last frame."""

    config = SimpleNamespace(latent_channels=3)

    def encode_stream(self, frames):
        frames, size = iter(frames), 1
        while group := [*islice(frames, size)]:
            assert len(group) == size
            x = np.array(group[-1])
            x = x.reshape(1, 1, x.shape[2] // 32, 32, x.shape[3] // 32, 32, 3)
            yield mx.array(x.mean((3, 5)))
            size = 8


@pytest.mark.parametrize(
    "tiles", [(), ((3, 1), (2, 1), (3, 1)), ((4, 2), (4, 2), (2, 0))]
)
def test_tiles_of_a_clip_add_up(clip_of, tiles):
    frames = np.random.default_rng(2).integers(0, 255, (49, 128, 160, 3), np.uint8)
    encoders = Encoders(InputFiles(), lambda name: MeanEncoder())
    size = Size(160, 128, 41, 24.0)
    found = encoders.clip(clip_of(frames), 5, 41, size, tiles=tiles)
    last = frames[5:46:8] / 127.5 - 1
    expected = last.reshape(6, 4, 32, 5, 32, 3).mean((2, 4))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "options, tiles",
    [
        ({}, ()),
        ({"tile_size": (64, 64), "stages": "one"}, LARGE),
        ({"retake": (0.0, 0.1), "loras": ()}, LARGE),
    ],
)
def test_only_some_clips_are_encoded_in_tiles(
    pipe_2_3, request_for, monkeypatch, options, tiles
):
    seen, clip = [], Encoders.clip

    def encoded(self, path, start, count, size, slow=1, tiles=(), *more, **how):
        seen.append(tiles)
        return clip(self, path, start, count, size, slow, tiles)

    monkeypatch.setattr(Encoders, "clip", encoded)
    request = replace(request_for("mine.safetensors", **OF_2_3), **options)
    job = pipe_2_3.plan(request)
    Run(pipe_2_3, [None], None, False, False).load_conditions(job, None)
    assert {*seen} == {tiles}


@pytest.mark.parametrize(
    "options, name",
    [
        ({"images": (Image("a.png"),)}, "images"),
        ({"chunk_frames": 97}, "chunk_frames"),
        ({"tile_size": (64, 64)}, "tile_size"),
    ],
)
def test_stage_2_of_2_3_is_whole_where_its_tiles_do_not_apply(
    pipe_2_3, request_for, tmp_path, monkeypatch, options, name
):
    monkeypatch.chdir(tmp_path)
    media.save_png("a.png", FRAMES[0])
    job = pipe_2_3.plan(request_for(NAME_2_3, **OF_2_3, **options))
    assert len(job.stages) == 2
    assert any(
        f"not in the reference's tiles, because of {name}" in n for n in job.notes
    )


def test_a_run_in_tiles_goes_on_at_the_tile_where_it_stopped(pipe_2_3, request_for):
    request = request_for(NAME_2_3, **OF_2_3)
    whole = latents_of(pipe_2_3, pipe_2_3.plan(request))
    for event in pipe_2_3.stream(request):
        if event.snapshot is not None and event.snapshot.stage == 4:
            break
    saved = event.snapshot
    for event in pipe_2_3.stream(resume=saved):
        if event.phase == "latents":
            again = event.snapshot.latents
    assert mx.array_equal(whole["video"], again["video"])


def test_a_clip_is_encoded_once_for_all_tiles(pipe_2_3, request_for, monkeypatch):
    counts, encode = [], VideoVAE.encode_stream
    counted = lambda *args: counts.append(1) or encode(*args)
    monkeypatch.setattr(VideoVAE, "encode_stream", counted)
    request = request_for(NAME_2_3, **OF_2_3)
    pipe_2_3.generate(**vars(request))
    assert len(counts) == len(pipe_2_3.plan(request).encoded) == 2  # at both sizes


def test_each_frame_of_an_hdr_clip_can_be_generated_twice(pipe, request_for):
    frames = FRAMES[:25]
    request = request_for(frames=frames, hdr_double_frames=True)
    job = pipe.plan(request)
    (stage,) = job.stages
    assert (job.size.num_frames, stage.size.num_frames) == (25, 49)
    reference, given, slots = stage.conditions["video"]
    assert reference.num_frames == 49
    assert given.frames == slots.frames == (48,) and given.shown == (24,)
    result = pipe.generate(**vars(request))
    assert result.frames.shape == (25, 64, 64, 3)
    assert result.video_latents.shape[0] == 7


def test_frames_are_doubled_before_the_autoencoder_sees_them(clip_of):
    seen = []

    class Encoder:
        config = SimpleNamespace(latent_channels=1)

        def encode_stream(self, frames):
            seen.extend(np.array(x)[0, 0] for x in frames)
            return iter([mx.zeros((1, 1, 2, 2, 1))] * 3)

    encoders = Encoders(InputFiles(), lambda name: Encoder())
    size = Size(64, 64, 17, 24.0)
    encoders.clip(clip_of(FRAMES[:9]), 0, 17, size, repeats=2)
    expected = FRAMES[:9].repeat(2, axis=0)[:17] / 127.5 - 1
    np.testing.assert_allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize(
    "options, reason",
    [
        (
            {"chunk_frames": 25},
            "hdr_double_frames cannot be combined with chunk_frames",
        ),
        ({"name": "mine.safetensors"}, "needs an HDR adapter and an SDR clip"),
    ],
)
def test_frames_are_doubled_only_for_hdr(pipe, request_for, options, reason):
    request = request_for(**{"frames": FRAMES[:9], "hdr_double_frames": True} | options)
    with pytest.raises(UserError, match=reason):
        pipe.plan(replace(request, prompt="a cat", contexts_file=None))


def test_the_autoencoder_sees_codes_of_light():
    white = np.ones((1, 4, 4, 3), np.float32)
    seen = lambda codes: float(
        Encoders(InputFiles(), None, False, codes).encoder_input(white)[0, 0, 0, 0, 0]
    )
    assert seen("srgb") == 1
    assert seen("acescct") == pytest.approx(2 * 0.5547945 - 1, abs=1e-6)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"contexts_file": None}, "needs its text embeddings: add --contexts"),
        ({"video": None}, "changes a clip: add --video"),
        ({"generated_keyframes": 2}, "needs hdr_keyframes turned off"),
        ({"color_space": "rec2100"}, "unknown color_space 'rec2100'"),
        ({"retake": (0.0, 0.1)}, "changes a clip"),
        ({"metadata": {"hdr_transform": "logc4"}}, "hdr_transform of"),
    ],
)
def test_what_cannot_be_light_is_refused(pipe, request_for, options, reason):
    with pytest.raises(UserError, match=reason):
        pipe.plan(request_for(frames=FRAMES[:9], **options))


def test_recordings_of_earlier_versions_may_have_keyframes_of_hdr(tmp_path):
    path = tmp_path / "made.json"
    path.write_text('{"request": {"prompt": "a cat", "hdr_keyframes": true}}')
    assert read_config(str(path))[1] == Request("a cat")


@pytest.mark.parametrize("on", [True, False])
def test_keyframes_of_hdr_need_its_adapter_and_clip(pipe, request_for, on):
    with pytest.raises(UserError, match="hdr_keyframes needs video"):
        pipe.plan(Request("a cat", seed=10, hdr_keyframes=on))
    other = request_for(
        "other.safetensors", FRAMES[:9], no_audio=True, hdr_keyframes=on
    )
    with pytest.raises(UserError, match="hdr_keyframes needs an HDR adapter"):
        pipe.plan(other)


def test_windows_hold_the_keyframes_that_they_own(pipe, request_for):
    frames = np.zeros((73, 64, 64, 3), np.uint8)
    windows = {"chunk_frames": 49, "carry_frames": 17}
    job = pipe.plan(request_for(frames=frames, **windows))
    found = (c for stage in job.stages for c in stage.all_conditions)
    given = [(c.frames, c.shown) for c in found if isinstance(c, ClipKeyframes)]
    assert given == [((24, 48), (24, 48)), ((40,), (72,))]
    assert all(mx.isfinite(x).all() for x in latents_of(pipe, job).values())


# EXR files


def light(*shape: int) -> np.ndarray:
    """Light from black to ten times diffuse white."""
    return np.random.default_rng(1).uniform(0, 10, (*shape, 3)).astype(np.float16)


def write_exr(path, frames: np.ndarray, space: str) -> None:
    with formats.VideoWriter(path, 24, color_space=space) as video:
        video.write(frames.astype(np.float32))


@pytest.mark.parametrize("planes, names", [(3, "gbrp"), (4, "gbrap"), (1, "gray")])
def test_an_exr_picture_is_read_without_a_limit_and_without_alpha(
    tmp_path, planes, names
):
    pixels = light(6, 8).astype("<f4")
    data = [pixels[..., n] for n in (1, 2, 0)] + [np.full((6, 8), 0.5, "<f4")]
    data = np.stack(data if planes > 1 else [pixels[..., 0]])[:planes]
    raw = f"-f rawvideo -pix_fmt {names}f32le -s 8x6 -i pipe:0 one.exr"
    media.run_ffmpeg("ffmpeg fails", raw, data=data.tobytes(), folder=str(tmp_path))
    expected = pixels if planes > 1 else pixels[..., :1].repeat(3, axis=-1)
    expected = expected / 2 if planes == 4 else expected  # a file holds color x alpha
    np.testing.assert_array_equal(exr.still(tmp_path / "one.exr"), expected)
    found = exr.probe(tmp_path / "one.exr")
    assert (found.width, found.height, found.num_frames) == (8, 6, 1)


def test_a_folder_is_read_by_one_process_for_frames_that_are_alike(
    tmp_path, monkeypatch
):
    started, popen = [], media.Popen
    counted = lambda *args, **how: started.append(1) or popen(*args, **how)
    monkeypatch.setattr(media, "Popen", counted)
    small, large = light(4, 6, 8), light(2, 8, 10)
    write_exr(tmp_path / "a", small, "acescg")
    write_exr(tmp_path / "b", large, "acescg")
    for n in (0, 1):
        file = tmp_path / "b" / f"frame_{n:05d}.exr"
        file.rename(tmp_path / "a" / f"frame_00001_{n}.exr")  # among the others
    started.clear()
    read = [*exr.read(tmp_path / "a")]
    assert len(started) == 3
    expected = [*small[:2], *large, *small[2:]]
    for frame, other in zip(read, expected, strict=True):
        np.testing.assert_array_equal(frame, other.astype(np.float32))


@pytest.mark.parametrize("size", [0, 200, 400, 700, -1])
def test_a_file_that_is_cut_off_is_one_line(tmp_path, size):
    write_exr(tmp_path / "a", light(3, 40, 60), "acescg")
    file = tmp_path / "a" / "frame_00001.exr"
    file.write_bytes(file.read_bytes()[:size])
    for read in (lambda path: [*exr.read(path)], exr.probe):
        with pytest.raises(UserError, match="00001.exr: the file ends too early"):
            read(tmp_path / "a")


def test_a_header_may_be_long(tmp_path):
    """As that of a file with a Cryptomatte manifest."""
    write_exr(tmp_path / "a", light(1, 6, 8), "acescg")
    file = tmp_path / "a" / "frame_00000.exr"
    data, long = file.read_bytes(), b"x\0string\0" + struct.pack("<i", 2**21)
    start, table = exr._chunks(data)
    header = data[: start - 1] + long + bytes(2**21) + b"\0"
    table = table + len(header) - start
    file.write_bytes(header + table.tobytes() + data[start + table.nbytes :])
    assert exr.probe(file).width == 8
    assert exr.still(file).shape == (6, 8, 3)


def test_an_exr_reference_is_padded_not_cropped(tmp_path):
    ramp = np.tile(np.arange(80)[:, None] / 128, (1, 40, 1, 3))
    write_exr(tmp_path / "a", ramp, "acescct")
    pixels, config = [], SimpleNamespace(latent_channels=4)

    def encode_stream(frames):
        pixels.extend(frames)
        yield mx.zeros((1, 1, *(side // 32 for side in pixels[-1].shape[2:4]), 4))

    encoder = SimpleNamespace(config=config, encode_stream=encode_stream)
    source = Encoders(InputFiles(), lambda name: encoder, space="acescct")
    clip = conditions.ReferenceClip(str(tmp_path / "a"), 1, 1.0, 1.0, 1, 1)
    for side in (64, 96):
        clip.load(Size(side, side, 1, 24.0), source)
    smaller, larger = (np.array(x[0, 0] + 1) * 64 for x in pixels)
    expected = np.arange(64) * 1.25 + 0.125  # 32x64, and its last row
    np.testing.assert_allclose(smaller[..., 1], np.tile(expected, (64, 1)), atol=1e-4)
    expected = [*range(80), *[79] * 16]  # not scaled
    np.testing.assert_allclose(larger[..., 0], np.tile(expected, (96, 1)), atol=1e-4)
    # A mask of it, here of half its sides, is padded as it is
    mask = np.zeros((20, 40, 3), np.uint8)
    mask[:, :16] = 255
    media.save_png(tmp_path / "mask.png", mask)
    file, of = str(tmp_path / "mask.png"), str(tmp_path / "a")
    size = Size(96, 96, 1, 24.0)
    [weights] = source.weights(file, 0, 1, size, size, 1, of)
    np.testing.assert_allclose(weights, [[1, 0, 0]] * 3, atol=0.02)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    frames = light(5, 6, 8)
    write_exr(tmp_path / "a'b [c]", frames, "srgb_linear")
    read = [*exr.read(tmp_path / "a'b [c]", 1, 3)]
    np.testing.assert_array_equal(read, frames[1:4].astype(np.float32))
    assert exr.probe(tmp_path / "a'b [c]").num_frames == 5


@pytest.mark.parametrize("space", ["srgb_linear", "acescg", "acescct"])
def test_the_autoencoder_sees_exr_files_as_acescct(tmp_path, space):
    frames = color.convert(light(1, 64, 64).astype(np.float32), "srgb_linear", space)
    write_exr(tmp_path / "a", frames, space)
    encoders = Encoders(InputFiles(), None, space=space)
    stored = exr.still(tmp_path / "a")
    seen = np.array(encoders.encoder_input(stored[None], light=True))[0, 0]
    codes = color.convert(stored, space, "acescct")
    np.testing.assert_allclose(seen, 2 * codes - 1, atol=1e-6)
    assert 0.4 < codes.mean() < 0.8


def test_an_exr_image_starts_an_hdr_video_of_a_plain_model(
    pipe, quick_text, quick_vocoder, tmp_path
):
    write_exr(tmp_path / "a", light(1, 64, 64), "acescg")
    image = str(tmp_path / "a" / "frame_00000.exr")
    options = {"height": 64, "width": 64, "num_frames": 9, "stages": "one"}
    r = Request("a cat", seed=10, images=(image,), color_space="acescg", **options)
    job = pipe.plan(r)
    assert job.codes == "acescct" and job.streams == ("video", "audio")
    assert not any(stage.slots for stage in job.stages)
    result = pipe.generate(replace(r, sigmas=(1.0, 0.5, 0.0)))
    assert result.frames.dtype == np.float32 and result.frames.shape == (9, 64, 64, 3)
    assert result.waveform is not None


def test_a_folder_of_exr_frames_is_a_reference_or_is_changed(
    pipe, request_for, quick_text, quick_vocoder, tmp_path
):
    write_exr(tmp_path / "clip", light(9, 52, 74), "srgb_linear")
    clip = {"video": str(tmp_path / "clip"), "color_space": "srgb_linear"}
    shown = replace(request_for("mine.safetensors"), contexts_file=None, **clip)
    shown = replace(shown, prompt="a cat", fps=24.0)
    job = pipe.plan(shown)
    assert (job.size.num_frames, job.codes) == (9, "acescct")
    assert not any(stage.slots for stage in job.stages)  # only of a clip in SDR
    with pytest.raises(UserError, match="have no frame rate: pass fps"):
        pipe.plan(replace(shown, fps=None))
    retake = {"retake": (0.1, 0.3), "retake_streams": ("video",), "fps": 24.0}
    retake |= {"sigmas": (1.0, 0.5, 0.0), "stages": "one"}
    result = pipe.generate(Request("a cat", seed=10, **clip, **retake))
    assert result.frames.dtype == np.float32


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"images": ("light.exr",)}, "EXR files need color_space"),
        ({"color_space": "acescg", "images": ("a.png",)}, "needs EXR files"),
        ({"color_space": "acescg", "images": ("a.png", "light.exr@-1")}, "or none"),
        ({"color_space": "acescg", "audio_only": True}, "cannot be combined"),
    ],
)
def test_light_and_sdr_are_not_mixed(pipe, tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    write_exr("light", light(1, 64, 64), "acescg")
    Path("light/frame_00000.exr").rename("light.exr")
    media.save_png("a.png", np.zeros((64, 64, 3), np.uint8))
    images = tuple(map(Image.parse, options.pop("images", ())))
    with pytest.raises(UserError, match=reason):
        pipe.plan(Request("a cat", seed=10, images=images, **options))
