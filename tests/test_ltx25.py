"""LTX-2.5: its split files, its text encoder, and whole runs."""

import gc
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from parity import cosine, relative_error
from test_pipeline import recorded_contexts

import generate
from ltx2 import media, pipeline, weights
from ltx2.base import UserError
from ltx2.conversion import Conversion, quantization
from ltx2.duration import whole_frames
from ltx2.inputs import InputFiles
from ltx2.request import Image, Request
from ltx2.snapshot import Snapshot
from ltx2.stages import plan as plan_stages
from ltx2.text import Gemma4Config, Gemma4TextEncoder

TRANSFORMER = "diffusion_models/ltx-2.5-transformer.safetensors"
ENCODER = "text_encoders/ltx-2.5-text-encoder.safetensors"
VIDEO = "vae/ltx-2.5-video-vae.safetensors"
DIFFUSION = "vae/ltx-2.5-video-vae-diffusion.safetensors"
AUDIO = "vae/ltx-2.5-audio-vae.safetensors"
HEAD = "model_patches/ltx-2.5-duration-head.safetensors"


@pytest.fixture(scope="module")
def source(checkpoint):
    return weights.open_model(str(checkpoint("ltx-2.5")), "distilled")


@pytest.fixture(scope="module")
def pipe(load):
    return load("ltx-2.5", upsamplers=["spatial-x2"])


@pytest.fixture
def pack(checkpoint, tmp_path):
    """A copy of the split files, which tests change."""
    return shutil.copytree(checkpoint("ltx-2.5"), tmp_path / "pack")


def rewrite(path, **metadata):
    arrays, old = mx.load(str(path), return_metadata=True)
    mx.save_safetensors(str(path), dict(arrays), old | metadata)


def plan(request, source):
    return plan_stages(request, source, InputFiles())


# Files


def test_a_folder_of_split_files_is_one_model(source):
    assert source.generation == "2.5" and source.text_encoder == "gemma"
    assert source.components == list(source.parts)
    assert set(source.parts) == {
        *("transformer", "connectors", "gemma", "vae", "diffusion_decoder"),
        *("audio_vae", "vocoder", "duration_head"),
    }
    for name in source.components:
        source.load(name)


def test_split_files_can_be_in_one_folder(pack, source):
    flat = pack.parent / "flat"
    flat.mkdir()
    for path in pack.rglob("*.safetensors"):
        path.rename(flat / path.name)
    assert weights.open_model(str(flat)).components == source.components


def test_two_transformers_are_refused_unless_one_is_named(pack):
    other = pack / "diffusion_models" / "ltx-2.5-distilled.safetensors"
    shutil.copy(pack / TRANSFORMER, other)
    with pytest.raises(UserError, match="both hold the transformer"):
        weights.open_model(str(pack))
    source = weights.open_model(str(other))
    assert source.kind == "distilled" and "gemma" in source.components


def test_only_the_files_that_a_run_needs_are_fetched(fake_hub, pack):
    shutil.rmtree(fake_hub.repo)
    (pack / "loras").mkdir()
    shutil.copy(pack / HEAD, pack / "loras" / "ltx-2.5-lora.safetensors")
    shutil.copytree(pack, fake_hub.repo)
    source = weights.open_model("Lightricks/LTX-2.5")
    assert set(fake_hub.fetched) == {
        TRANSFORMER,
        ENCODER,
        VIDEO,
        DIFFUSION,
        AUDIO,
        HEAD,
    }
    source.load("gemma")


def test_folders_of_other_tools_are_ignored(checkpoint, tmp_path):
    shutil.copy(checkpoint("ltx-2"), tmp_path / "ltx-2.safetensors")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_text("not ours")
    assert weights.open_model(str(tmp_path)).generation == "2.0"


@pytest.mark.parametrize(
    "missing, options",
    [
        (ENCODER, {}),
        (VIDEO, {"video_decoder": "conv"}),
        (DIFFUSION, {"video_decoder": "diffusion"}),
        (AUDIO, {}),
        (HEAD, {"auto_duration": (1, 2)}),
    ],
)
def test_a_missing_file_is_an_error_only_if_it_is_needed(pack, missing, options):
    name = {ENCODER: "gemma", AUDIO: "vocoder", HEAD: "duration_head"}.get(missing)
    (pack / missing).unlink()
    source = weights.open_model(str(pack))
    with pytest.raises(UserError, match=name or options["video_decoder"]):
        plan(Request("a fox", seed=10, **options), source)
    if missing != ENCODER:
        plan(Request("a fox", seed=10, no_audio=missing == AUDIO), source)


def test_of_two_text_encoders_the_readable_one_is_used(pack, caplog):
    tensors, metadata = mx.load(str(pack / ENCODER), return_metadata=True)
    unread = {k: w.astype(mx.int8) for k, w in tensors.items()}
    mx.save_safetensors(str(pack / "text_encoders/a.safetensors"), unread, metadata)
    weights.open_model(str(pack))
    unread = "text_encoders/a.safetensors: unsupported dtype I8"
    assert f"using {ENCODER}, not {unread}" in caplog.text


def test_a_missing_text_encoder_is_named(pack):
    (pack / ENCODER).unlink()
    pipe = pipeline.load(str(pack), kind="distilled")
    with pytest.raises(UserError, match="missing model parts: gemma"):
        pipe.check_text_encoder()


def test_a_diffusion_vae_also_encodes(pack, source):
    (pack / VIDEO).unlink()
    alone = weights.open_model(str(pack))
    assert plan(Request("a fox"), alone).decoder == "diffusion_decoder"
    vae = alone.load("vae", mx.float32)
    frames = mx.random.uniform(-1, 1, (1, 9, 64, 64, 3))
    assert vae.encode(frames).shape == (1, 2, 2, 2, 20)


def test_files_of_two_generations_are_refused(pack):
    rewrite(pack / VIDEO, model_version="2.3.0")
    (pack / DIFFUSION).unlink()
    source = weights.open_model(str(pack))
    with pytest.raises(
        UserError, match=f"vae .*{VIDEO} is for LTX-2 2.3.0, not for 2.5"
    ):
        source.require("vae")


def test_an_earlier_upsampler_is_noted(pack, checkpoint, tmp_path, caplog):
    """The reference's own runs of LTX-2.5 took that of 2.3; only its name says so."""
    caplog.set_level("INFO", "ltx2")
    name = "ltx-2.3-spatial-upscaler-x2-1.0.safetensors"
    chosen = shutil.copy(checkpoint("spatial-x2", in_channels=20), tmp_path / name)
    source = weights.open_model(str(pack), upsamplers=[str(chosen)])
    source.require("spatial_upsampler")
    assert f"{name} is for LTX-2 2.3, not for 2.5" in caplog.text


@pytest.mark.parametrize("version", [None, "ltx-other-1"])
def test_another_gemma_4_is_refused(pack, version):
    _, metadata = mx.load(str(pack / ENCODER), return_metadata=True)
    config = json.loads(metadata["gemma_config"])
    config |= {"gemma_version": version} if version else {}
    if not version:
        del config["gemma_version"]
    rewrite(pack / ENCODER, gemma_config=json.dumps(config))
    says = f"{version or 'as Google released it'}.*was trained with ltx-small-1"
    with pytest.raises(UserError, match=says):
        weights.open_model(str(pack)).require("gemma")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"sliding_window": 512}, "a window of 512 tokens"),
        ({"rope_parameters": {}}, "lacks rope_parameters"),
        ({"hidden_activation": "silu"}, "only 'gelu_pytorch_tanh' is implemented"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
    ],
)
def test_a_gemma_4_of_another_architecture_is_refused(source, change, says):
    section = source.config["gemma"]
    section = section | {"text_config": section["text_config"] | change}
    with pytest.raises(UserError, match=says):
        Gemma4Config.from_dict(section | {"tokenizer_bytes": 1})


def test_another_text_encoder_is_refused(source):
    for use in (pipeline.Pipeline, lambda s, e: Conversion(s, text_encoder=e)):
        with pytest.raises(UserError, match="cannot use google/gemma-4-12b"):
            use(source, "google/gemma-4-12b")


def test_a_converted_folder_equals_its_source(source, tmp_path):
    Conversion(source).write(tmp_path / "model")
    converted = weights.open_model(str(tmp_path / "model"))
    assert converted.components == source.components
    assert converted.config == source.config and converted.text_encoder == "gemma"
    for name in source.components:
        old, new = source.weights(name), converted.weights(name)
        assert old.keys() == new.keys()
        assert all(mx.array_equal(old[key], new[key]) for key in old)
        converted.load(name)


def test_the_text_encoder_is_quantized_too(source, tmp_path, golden):
    how = quantization("affine", 8, 32)
    Conversion(source, how).write(tmp_path / "model")
    gemma = weights.open_model(str(tmp_path / "model")).load("gemma", mx.float32)
    g = golden("ltx-2.5/gemma4_hidden")
    [states] = Gemma4TextEncoder(gemma)(g["info"]["prompts"][:1])
    assert "scales" in gemma.model.layers[0].mlp.down_proj
    last = mx.array(g["out.hidden0"][..., -1])
    assert 0.99 < cosine(states[-1][0], last) < 0.99999


# The text side


def test_hidden_states_equal_the_reference(source, golden):
    encoder = Gemma4TextEncoder(source.load("gemma", mx.float32))
    g = golden("ltx-2.5/gemma4_hidden")
    for n, prompt in enumerate(g["info"]["prompts"]):
        assert encoder.tokenize(prompt) == g[f"in.ids{n}"].tolist()
        [states] = encoder([prompt])
        for i, state in enumerate(states):
            reference = mx.array(g[f"out.hidden{n}"][..., i])
            # Rounding grows from layer to layer; each one adds less than 1e-5.
            assert relative_error(state[0], reference) < 5e-5, i


def test_contexts_and_duration_equal_the_reference(source, golden):
    states = Gemma4TextEncoder(source.load("gemma", mx.float32))
    [states] = states(golden("ltx-2.5/gemma4_hidden")["info"]["prompts"][:1])
    contexts = source.load("connectors", mx.float32)(states, 256)
    g = golden("ltx-2.5/text_from_gemma")
    for ours, stream in zip(contexts, ("video", "audio")):
        # Sums of 8 layers and the connectors, in the order of the BLAS: 2.08e-5 was seen.
        assert relative_error(ours, mx.array(g[f"out.{stream}0"])) < 5e-5
    seconds = source.load("duration_head", mx.float32)(*contexts)
    reference = mx.array(golden("ltx-2.5/duration_head")["out.both"])
    assert relative_error(seconds, reference) < 1e-5


@pytest.mark.parametrize(
    "seconds, fps, frames",
    [(0.1, 24, 25), (1.04, 24, 25), (3.33, 24, 73), (33, 24, 473), (1.0, 30, 33)],
)
def test_a_duration_is_rounded_to_whole_latent_frames_within_limits(
    seconds, fps, frames
):
    assert whole_frames(seconds, fps, 1, 20) == frames


# Runs


def test_default_samplers_and_steps(source, pipe):
    job = pipe.plan(Request("a fox", seed=10, num_frames=9))
    assert [s.sampler for s in job.stages] == ["euler_ancestral"] * 2
    job = pipe.plan(Request("a fox", seed=10, num_frames=9, stages="one"))
    assert job.stages[0].sampler == "euler"
    dev = weights.open_model(str(source.files[0].path.parents[1]), "dev")
    assert (
        len(plan(Request("a fox", seed=10, num_frames=9), dev).stages[0].sigmas) == 31
    )


def test_the_duration_is_predicted_from_the_prompt(pipe, golden, quick_vocoder, caplog):
    [prompt] = contexts = recorded_contexts(golden, "ltx-2.5")
    request = Request(
        prompt, seed=10, height=64, width=64, stages="one", auto_duration=(0, 0.4)
    )
    assert "up to 9 frames" in generate.describe(pipe, pipe.plan(request))
    job = pipe.plan(Request(prompt))
    assert job.request.auto_duration == (1, 20) and job.stages[0].size.num_frames == 473
    *_, result = pipe.stream(request, contexts=contexts)
    assert result.request.num_frames == len(result.video_latents) * 8 - 7
    [note] = [m for m in caplog.messages if "predicted from" in m]
    assert note.startswith(f"{result.request.num_frames} frames, ")
    assert pipe.plan(job.request) == job
    with pytest.raises(UserError, match="auto_duration cannot be combined with video"):
        clip = Request(
            prompt, seed=10, video="a.mp4", retake=(0, 1), auto_duration=(1, 2)
        )
        pipe.plan(clip)


def test_an_image_must_be_within_the_predicted_duration(pipe, golden, tmp_path):
    [prompt] = contexts = recorded_contexts(golden, "ltx-2.5")
    media.save_png(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    options = {"height": 64, "width": 64, "stages": "one", "auto_duration": (0, 20)}

    def request(frame):
        return Request(
            prompt, seed=10, images=(Image(str(tmp_path / "a.png"), frame),), **options
        )

    with pytest.raises(UserError, match="frame 480 is outside of the video"):
        pipe.plan(request(480))
    events = pipe.stream(request(470), contexts=contexts)  # in one of 20 s
    with pytest.raises(UserError, match="frame 470 is outside of the video"):
        list(events)
    assert pipe.plan(request(-1)).stages


def test_generated_keyframes_need_ltx_2_5(checkpoint):
    source = weights.open_model(str(checkpoint("ltx-2.3")))
    with pytest.raises(UserError, match="needs LTX-2.5 .this model is 2.3.0"):
        plan(Request("a fox", seed=10, generated_keyframes=2), source)


@pytest.fixture
def others():
    """Bytes that earlier tests of this process hold."""
    gc.collect()
    return mx.get_active_memory()


def test_the_diffusion_decoder_decodes_the_same_latents(pipe, golden, others):
    [prompt] = contexts = recorded_contexts(golden, "ltx-2.5")
    drawn = []

    def noise(name, shape):
        drawn.append(name)
        return pipeline.seeded_noise(1)(name, shape)

    options = {"height": 64, "width": 64, "num_frames": 9, "stages": "one"}
    options |= {"sigmas": (1.0, 0.5, 0.0), "no_audio": True}
    conv, diffusion = (
        pipe.generate(
            prompt, contexts=contexts, noise=noise, video_decoder=decoder, **options
        )
        for decoder in ("conv", "diffusion")
    )
    assert conv.frames.shape == diffusion.frames.shape == (9, 64, 64, 3)
    assert mx.array_equal(conv.video_latents, diffusion.video_latents)
    assert not np.array_equal(conv.frames, diffusion.frames)
    job = pipe.plan(Request(prompt, seed=10, video_decoder="diffusion", **options))
    planned = pipe.memory(job).phases["video"].total(streamed=False)
    assert 0.5 < planned / (diffusion.phases["video"][1] - others) < 2
    assert drawn[-17:] == [f"vae.frame{i}" for i in range(17)]


def test_windows_are_decoded_with_the_keyframes_that_they_have(
    pipe, golden, tmp_path, others
):
    [prompt] = contexts = recorded_contexts(golden, "ltx-2.5")
    drawn = []

    def noise(name, shape):
        drawn.append(name)
        return pipeline.seeded_noise(1)(name, shape)

    options = {"height": 64, "width": 64, "num_frames": 33, "stages": "one"}
    options |= {"chunk_frames": 25, "carry_frames": 17, "sigmas": (1.0, 0.0)}
    options |= {"generated_keyframes": (4, 20, 31), "no_audio": True}
    how = {"video_decoder": "diffusion", "decode_with_keyframes": True}
    request = Request(prompt, seed=10, **options, **how)
    job = pipe.plan(request)
    first, second = job.windows
    assert job.planes(first) == {first: (4, 20)}
    assert job.planes(second) == {first: (20,), second: (31,)}
    events = list(pipe.stream(request, contexts=contexts, noise=noise))
    frames = [e.frames for e in events if isinstance(e, pipeline.Frames)]
    places = [f"{w}vae.keyframe{i}" for w in ("chunk0.", "chunk1.") for i in (0, 1)]
    assert [name for name in drawn if "keyframe" in name] == places
    left = next(e for e in events if e.phase == "latents").snapshot
    assert left.latents["chunk0.keyframes"].shape == (1, 2, 2, 2, 20)
    left.save(tmp_path / "left.safetensors")
    again = pipe.stream(
        resume=Snapshot.read(tmp_path / "left.safetensors"), noise=noise
    )
    again = [e.frames for e in again if isinstance(e, pipeline.Frames)]
    assert np.array_equal(frames, again)
    planned = job.memory.phases["video"].total(streamed=False)
    assert 0.5 < planned / (events[-1].phases["video"][1] - others) < 2


def test_keyframes_are_decoded_where_there_are_some_and_a_diffusion_decoder(pipe):
    source = pipe.checkpoint
    options = {"generated_keyframes": 2, "decode_with_keyframes": True}
    ignored = plan(Request("a fox", seed=10, **options), source)
    assert not any(ignored.planes(window) for window in ignored.windows)
    assert "decode_with_keyframes is ignored" in ignored.notes[-1]
    diffusion = {"video_decoder": "diffusion", "num_frames": 97}
    for mode in ("one", "two"):
        job = plan(
            Request("a fox", seed=10, stages=mode, **options, **diffusion), source
        )
        assert [*job.planes(job.windows[0]).values()] == [(32, 64)]
        assert job.frames_ahead == 64  # of the first frame
    dfr = plan(Request("a fox", seed=10, stages="dfr", **diffusion), source)
    assert [*dfr.planes(dfr.windows[0]).values()] == [(32, 64, 96)]
    shorter = plan(
        Request("a fox", seed=10, stages="dfr", **diffusion | {"num_frames": 121}),
        source,
    )
    assert [*shorter.planes(shorter.windows[0]).values()] == [(24, 48, 72, 96, 120)]
    with pytest.raises(
        UserError, match="decode_with_keyframes needs generated_keyframes"
    ):
        plan(Request("a fox", seed=10, decode_with_keyframes=True), source)
