"""Whole runs equal the reference as it is now (1.4.2), with its noise injected.

`golden/v14/model` holds the small checkpoints that the reference ran on; its audio VAE
and vocoder are left out and replaced by random ones, because only latents are compared.
"""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import component, save, vocoder
from conftest import save_clip
from parity import channels_last, relative_error
from safetensors import safe_open

from ltx2 import pipeline, windows
from ltx2.guidance import Guidance
from ltx2.inputs import Encoders
from ltx2.request import Image, LoraFile, Request

V14 = Path(__file__).parent / "golden" / "v14"
OTHERS = "layouts|hdr"
CASES = [p.stem for p in V14.glob("*.safetensors") if not re.search(OTHERS, p.stem)]


def golden(name):
    """Arrays and settings of a run of the reference."""
    path = str(V14 / f"{name}.safetensors")
    with safe_open(path, "mlx") as file:
        return dict(mx.load(path)), json.loads(file.metadata()["info"])


def layouts(name):
    """Tables of the reference by key."""
    return {k: x.tolist() for k, x in mx.load(str(V14 / f"{name}.safetensors")).items()}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`load("distilled")`: a pipeline of the reference's small LTX-2.5."""
    folder = tmp_path_factory.mktemp("reference") / "model"
    shutil.copytree(V14 / "model", folder, ignore=shutil.ignore_patterns("[sl]*"))
    shutil.copy(V14 / "model" / "text-encoder.safetensors", folder)
    config = (folder / "audio-vae.json").read_text()
    metadata = {"config": config, "format": "pt", "model_version": "2.5.1"}
    sections = json.loads(config)
    shapes = component("audio_vae", sections["audio_vae"], "audio_vae.")
    shapes |= vocoder(sections["vocoder"])
    save(folder / "audio-vae.safetensors", shapes, 0, metadata)
    upsamplers = [str(V14 / "model" / f"{axis}-x2.safetensors") for axis in AXES]
    pipes, kept = {}, {"cache_contexts": folder.parent / "contexts"}

    def get(kind):
        if kind not in pipes:
            files = folder, None, kind, "float32", upsamplers
            pipes[kind] = pipeline.load(*files, **kept)
        return pipes[kind]

    return get


AXES = ("spatial", "temporal")
LORA = LoraFile(str(V14 / "model" / "lora.safetensors"))


def request_of(g, info, folder):
    """The request that the reference's run answered."""
    first = info["stages"][0]
    windowed = [
        s for s in info["stages"] if s["name"].split(".")[0] in ("c0", "s1", "s2")
    ]
    options = {
        "height": info["height"],
        "width": info["width"],
        "num_frames": info["num_frames"],
        "fps": info["frame_rate"],
        "sigmas": tuple(first["sigmas"]),
        "stages": "two" if len(windowed) > 1 else "one",
        "images": tuple(
            Image(str(V14 / n), *at) for n, *at, _ in info.get("images", ())
        ),
        "generated_keyframes": info.get("generated_keyframes", 0),
    }
    if options["images"]:
        options["image_crf"] = 0
    if info.get("conditioning_fps", info["frame_rate"]) != info["frame_rate"]:
        options["conditioned_fps"] = info["conditioning_fps"]
    if chunk := info.get("chunk"):
        options["chunk_frames"], options["carry_frames"] = (
            chunk["window"],
            chunk["carry"],
        )
        options["blend_frames"] = chunk["blend"]
    if info.get("alpha"):  # a dev model with an IC-LoRA
        options |= {"stages": "one", "no_audio": True}
        guider = info["video_guider"] | {"stg_blocks": ()}
        options["video_guidance"] = Guidance(**guider)
        if guider["cfg_scale"] > 1:
            options["negative_prompt"] = info["negative_prompt"]
    elif info["kind"] == "dev":
        options["stages"] = "hq" if info.get("hq") else "two"
        options["negative_prompt"] = info["negative_prompt"]
        options["distilled_lora"] = LORA
        for stream in ("video", "audio"):
            settings = info[f"{stream}_guider"]
            settings["stg_blocks"] = tuple(settings["stg_blocks"])
            options[f"{stream}_guidance"] = Guidance(**settings)
    if "in.reference_u8" in g:
        cells = np.array(g["in.reference_u8"])
        frames = cells.repeat(info["height"] // 8, 1).repeat(info["width"] // 8, 2)
        save_clip(folder / "reference.mkv", frames, info["frame_rate"])
        lora, metadata = folder / "lora.safetensors", {}
        for axis in ("downscale", "temporal_scale"):
            key = f"reference_{axis}_factor"
            metadata[key] = str(info.get(key, 1))
        mx.save_safetensors(str(lora), mx.load(LORA.path), metadata)
        options["video"] = str(folder / "reference.mkv")
        options["loras"] = (LoraFile(str(lora)),)
        options["reference_attention"] = info.get(
            "conditioning_attention_strength", 1.0
        )
        stages = info.get("stage_layout", [{"divisor": 1}])
        if len(stages) == 1 and stages[0]["divisor"] == 2:
            options["height"] //= 2  # without the second stage
            options["width"] //= 2
        if info.get("mask"):  # its weights come from the golden, not from this file
            options["attention_mask"] = options["video"]
            options["stages"] = "one"
        if "tile" in info:
            options["tile_size"] = tuple(info["tile"])
        if len(stages) == 2 and stages[1]["divisor"] == 1:
            options["reference_in_stage_2"] = stages[1]["lora_and_reference"]
    if info.get("dfr"):
        options |= {"stages": "dfr", "detailing_lora": LORA}
        options["temporal_rounds"] = info["rounds"]
        options["spatial_rounds"] = info["spatial_upscalings"] - 1
    return Request(info["prompt"], **options)


def recorded_noise(g, info):
    """The reference's noise by this project's names."""
    names, stages = info["noise_names"], info["stages"]
    order = {s["name"]: f"stage{n + 1}" for n, s in enumerate(stages)}
    found = {}
    for n, name in enumerate(names):
        window, stage, kind = re.fullmatch(
            r"(?:c(\d+)\.)?(.+?)(?:\.(?:video|audio))?\.(init|step)\d*", name
        ).groups()
        stage = re.sub(r"^s(\d)$", r"stage\1", stage if window else order[stage])
        prefix = f"chunk{window}." if window and info.get("chunk") else ""
        found.setdefault((prefix + stage, kind), []).append(n)
    # Each draws video, then audio; hq first for the midpoint, then for the end.
    per_step = 4 if info.get("hq") else 2

    def noise(name, shape):
        stage, stream, kind, step = re.fullmatch(
            r"(.*stage\d+)\.(video|audio)(?:\.(step|substep)(\d+))?", name
        ).groups()
        place = ("video", "audio").index(stream) + per_step * int(step or 0)
        place += 2 * (kind == "step" and per_step == 4)
        number = found[stage, "step" if kind else "init"][place]
        x = g[f"in.noise{number}"].astype(mx.float32)
        assert x.shape == tuple(shape), name
        return x

    return noise


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_run_is_the_references(load, case, quick_vocoder, tmp_path, monkeypatch):
    g, info = golden(case)
    if "in.attention_mask_latent" in g:
        weights = np.array(g["in.attention_mask_latent"]).reshape(3, 2, 3)
        monkeypatch.setattr(Encoders, "weights", lambda *_: weights)
    request, pipe = request_of(g, info, tmp_path), load(info["kind"])
    noise, frames = recorded_noise(g, info), []
    for event in pipe.stream(request, noise=noise):
        if event.phase == "latents":
            made = event.snapshot.latents
        if isinstance(event, pipeline.Frames):
            frames.append(event.frames)
    tolerance = 1e-3 if info.get("hq") else 1e-4
    for n, window in enumerate(pipe.plan(request).windows):
        key = f"out.c{n}." if window.prefix else "out."
        for stream in pipe.plan(request).streams:
            reference = channels_last(g[f"{key}{stream}_latent"])
            assert relative_error(made[window.prefix + stream], reference) < tolerance
        if f"{key}keyframes" in g:  # the epilogue's have been rounded to 8 bits
            reference = channels_last(g[f"{key}keyframes"])
            assert relative_error(made[f"{window.prefix}keyframes"], reference) < 1e-3
    if "out.video_sub_fhwc" in g:
        shown = np.concatenate(frames)[:, :: info.get("sub", 2), :: info.get("sub", 2)]
        reference = np.array(g["out.video_sub_fhwc"]).astype(int)
        assert np.abs(shown.astype(int) - reference).max() <= 1


def test_windows_are_laid_out_as_in_the_reference():
    for key, expected in layouts("chunk_layouts").items():
        numbers = re.findall(r"[a-z]+(\d+|all)", key)
        keyframes = numbers.pop(0) if "keyframes" in key else None
        total, chunk, carry, blend = numbers
        sizes = int(total), int(chunk), int(carry)
        found = windows.divide(*sizes, int(carry if blend == "all" else blend))
        if keyframes is None:
            rows = [[w.num_frames, w.start, w.carried_in] for w in found]
            rows = [r + [w.carried_out, w.blended_out] for r, w in zip(rows, found)]
        else:
            rows = [n + w.start for w in found for n in w.keyframes(int(keyframes))]
        assert rows == expected, key


def test_frames_stay_in_order_where_windows_have_more_blended_than_new_ones():
    found = windows.divide(49, 25, 17, 17)
    numbers = lambda w: mx.arange(w.start, w.start + w.num_frames, dtype=mx.float32)
    decode = lambda w: iter([numbers(w).reshape(1, -1, 1, 1, 1)])
    joined = mx.concatenate([*windows.blended(found, decode)], axis=1).flatten()
    assert len(found) == 4 and mx.allclose(joined, mx.arange(49), atol=1e-4)


def test_sounds_fade_for_40_ms_though_more_waits_than_is_new():
    found = windows.divide(65, 33, 17, 17)  # 16 new frames, 17 that wait
    pieces = [np.full((3300, 2), n) for n in (0.0, 1.0, 3.0)]
    joined = windows.crossfaded(pieces, found, 30.0, 3000)
    assert len(joined) == 6500
    mixed = np.abs(joined[:, :1] - [0, 1, 3]).min(axis=1) > 1e-6
    assert mixed.sum() == 2 * 118  # of 120 samples, the first and the last are pure


def test_dfr_is_laid_out_as_in_the_reference():
    for key, expected in layouts("dfr_layouts").items():
        frames, round_, tile, what = re.fullmatch(
            r"out\.canvas(\d+)(?:\.round(\d))?(?:\.tile(\d+)\.(\w+))?", key
        ).groups()
        total, keyframes = windows.canvas(int(frames))
        if round_ is None:
            assert [total, keyframes[0], *keyframes] == expected
            continue
        segments = len(keyframes) * 2 ** (int(round_) - 1)
        slices = windows.slices(segments, 2 * keyframes[0], 2 ** int(round_))
        if tile is None:
            seams = [
                (t.seam // 8 + 1, t.seam + 1) if t.start else (0, 0) for t in slices
            ]
            rows = [
                [cell, t.stop * t.length // 8 + 1, t.first, t.held, pixel]
                for t, (cell, pixel) in zip(slices, seams)
            ]
        elif what == "slots":
            rows = [
                frame + slices[int(tile)].first for frame in slices[int(tile)].slots
            ]
        else:
            t = slices[int(tile)]
            rows = [frame + t.first for frame, _ in t.anchor_places]
        assert rows == expected, key
