"""Complete runs: with the reference's noise, every mode gives the reference's results."""

from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
from conftest import QuickVocoder, save_clip
from parity import channels_last, relative_error

from ltx2 import media, pipeline
from ltx2.guidance import Guidance
from ltx2.request import Image, LoraFile, Request

GENERATIONS = {"ltx-2": "spatial-x2-rational", "ltx-2.3": "spatial-x2"}
CASES = (
    "prompt distilled guided cfg_video skip image_soft images keyframes "
    "two_stage_distilled hq audio_to_video text_to_audio retake retake_audio "
    "retake_guided ic_lora"
).split()


def request_of(case, golden, checkpoint, folder):
    """The request and the kind of model of the reference's run."""
    info, stages = golden["info"], golden["info"]["stages"]
    options = {
        "prompt": info["prompt"],
        "height": stages[-1]["height"],
        "width": stages[-1]["width"],
        "num_frames": stages[-1]["frames"],
        "fps": stages[-1]["fps"],
        "sigmas": tuple(golden["in.stage1.sigmas"].tolist()),
        "stages": "hq" if case == "hq" else "two" if len(stages) > 1 else "one",
        "image_crf": 0 if "images" in info else None,
        "keyframes": case == "keyframes",
        "audio_only": case == "text_to_audio",
    }
    guided = info.get("video_guidance", info.get("audio_guidance", {}))
    if guided.get("cfg_scale", 1) != 1:
        options["negative_prompt"] = info["negative_prompt"]
        for stream in ("video", "audio"):
            if f"{stream}_guidance" in info:
                values = info[f"{stream}_guidance"]
                values = values | {"stg_blocks": tuple(values["stg_blocks"])}
                options[f"{stream}_guidance"] = Guidance(**values)
    for n, frame, strength in info.get("images", ()):
        path = str(folder / f"{n}.png")
        media.save_png(path, golden[f"in.image{n}"])
        options["images"] = (*options.get("images", ()), Image(path, frame, strength))
    for name, strength in stages[0]["loras"] + stages[-1]["loras"]:
        file = LoraFile(str(checkpoint(name)), strength)
        if "distilled" in name:
            options["distilled_lora"] = LoraFile(file.path)
        else:
            options["loras"] = (file,)
    if "in.waveform" in golden:
        options["audio"] = str(folder / "sound.mkv")
        still = np.zeros((1, 64, 64, 3), np.uint8)
        save_clip(folder / "sound.mkv", still, 24, golden["in.waveform"], 16000)
    for kind in ("source", "reference"):
        if f"in.{kind}_frames" in golden:
            options["video"] = str(folder / "clip.mkv")
            sound = golden.get(f"in.{kind}_waveform"), info.get("sampling_rate")
            frames = golden[f"in.{kind}_frames"]
            save_clip(folder / "clip.mkv", frames, options["fps"], *sound)
    if "start_time" in info:
        options["retake"] = (info["start_time"], info["end_time"])
    if not info.get("regenerate_video", True):
        options["retake_streams"] = ("audio",)
    if "reference_strength" in info:
        options["reference_strength"] = info["reference_strength"]
        options["reference_attention"] = info["attention_strength"]
    return Request(**options), "dev" if "negative_prompt" in options else "distilled"


def recorded_noise(golden):
    """A noise callback that returns the reference's noise."""

    def noise(name, shape):
        if name == "vae":
            return channels_last(golden["in.decode_noise"])
        stage, stream, *step = name.split(".")
        x = mx.array(golden[".".join(["in", stage, *step, f"{stream}_noise"])])
        assert x.shape == tuple(shape), name
        return x.astype(mx.float32)

    return noise


def in_float32(path, copy):
    """A copy with float32 weights: the reference cast its weights before adding LoRAs,
    and sums are rounded to the dtype of the file."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    arrays = {k: x.astype(mx.float32) for k, x in arrays.items()}
    mx.save_safetensors(str(copy), arrays, metadata)
    return copy


def recorded_contexts(golden, model):
    """The reference's contexts by prompt."""
    c = golden(f"{model}/contexts")
    texts = ("prompt", "positive"), ("negative_prompt", "negative")
    return {
        c["info"][prompt]: tuple(
            mx.array(c[f"out.{which}.{stream}"]) for stream in ("video", "audio")
        )
        for prompt, which in texts
        if prompt in c["info"]
    }


def events_to_latents(pipe, *requests, **options):
    """The events of one video's run up to its final latents, which are not decoded."""
    for event in pipe.stream(*requests, **options):
        yield event
        if event.phase == "latents":
            return


def latents_of(pipe, *requests, **options):
    """The final latents of one video by stream, with batch axis; they are not decoded."""
    *_, last = events_to_latents(pipe, *requests, **options)
    return last.snapshot.latents


@pytest.fixture(scope="module")
def load(checkpoint, tmp_path_factory):
    """`load("ltx-2.3", "dev", loras=False)`: a pipeline with its upsampler, opened once."""
    folder = tmp_path_factory.mktemp("float32")

    @lru_cache
    def load(model, kind, loras):
        path = checkpoint(model)
        if loras:
            path = in_float32(path, folder / f"{model}.safetensors")
        files = checkpoint("gemma3"), checkpoint(GENERATIONS[model])
        encoder, upsampler = map(str, files)
        return pipeline.load(path, encoder, kind, "float32", [upsampler])

    return load


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", GENERATIONS)
def test_a_run_equals_the_reference(
    model, case, load, checkpoint, golden, monkeypatch, tmp_path
):
    g = golden(f"{model}/pipeline_{case}")
    request, kind = request_of(case, g, checkpoint, tmp_path)
    loras = bool(request.loras or request.distilled_lora)
    pipe = load(model, kind, loras)
    texts = None if case == "prompt" else recorded_contexts(golden, model)
    if "out.waveform" not in g:
        monkeypatch.setattr(pipeline.Pipeline, "vocoder", QuickVocoder())
    options = {"noise": recorded_noise(g), "contexts": texts}
    *events, result = pipe.stream(request, frozen_from_noise=True, **options)

    last = f"out.stage{len(g['info']['stages'])}"
    tolerance = 1e-3 if case == "hq" else 1e-4
    if "video" in pipe.plan(request).streams:
        ours = result.video_latents[None]
        assert relative_error(ours, channels_last(g[f"{last}.video"])) < tolerance
        frames = np.concatenate([e.frames for e in events if e.frames is not None])
        for key, shown in (("out.frames", frames), ("out.last_frame", frames[-1])):
            if key in g:
                ours = shown[..., ::3, ::3, :].astype(np.float32)
                assert np.abs(ours - np.rint(g[key] * 255)).max() <= 1
    # Hq keeps the audio of the first stage.
    final = "out.stage1" if case == "hq" else last
    ours = result.audio_latents[None]
    assert relative_error(ours, channels_last(g[f"{final}.audio"])) < tolerance
    if "out.waveform" in g:
        assert np.abs(result.waveform - g["out.waveform"].T).max() < 1e-3
    if case == "audio_to_video":
        assert np.array_equal(
            result.waveform, g["in.waveform"].T[: len(result.waveform)]
        )
