"""Small checkpoints with random weights in the layout of the official files.

    python tests/checkpoints.py ltx-2 gemma3 models

A model's configuration is the official one (`data/configs.json`) with smaller sizes;
names and shapes of the tensors are those of the modules that it configures
(`test_layout.py` compares modules with the released files), with official prefixes and
channels first. Weights depend only on the name of the checkpoint, the key and the seed,
are stored as bfloat16 and are scaled so that activations stay near one.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is a command

from ltx2.weights import COMPONENTS  # noqa: E402

DATA = Path(__file__).parent / "data"
CONFIGS = json.loads((DATA / "configs.json").read_text())
GEMMA = json.loads((DATA / "gemma3" / "config.json").read_text())


def widths(heads: int, video: int, audio: int) -> dict[str, int]:
    """A transformer's sizes, with the same number of heads in both streams."""
    return {
        "num_attention_heads": heads,
        "attention_head_dim": video,
        "cross_attention_dim": heads * video,
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": audio,
        "audio_cross_attention_dim": heads * audio,
    }


def video_channels(
    official: str, latent: int, encoder: tuple[str, str], decoder: tuple[str, str]
) -> dict[str, dict]:
    """Sections with fewer channels; each digit is the layers or multiplier of a block."""
    vae: dict[str, Any] = {
        "latent_channels": latent,
        "encoder_base_channels": latent,
        "decoder_base_channels": 8,
    }
    for name, digits in (("encoder_blocks", encoder), ("decoder_blocks", decoder)):
        layers, multipliers = (map(int, d) for d in digits)
        vae[name] = [
            (
                [kind, p | {"num_layers": next(layers)}]
                if kind == "res_x"
                else [kind, p | {"multiplier": next(multipliers)}]
            )
            for kind, p in CONFIGS[official]["vae"][name]
        ]
    return {"transformer": {"in_channels": latent, "out_channels": latent}, "vae": vae}


def merge(*configs: dict) -> dict:
    """Merge configurations section by section; later ones override earlier ones."""
    merged: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if nested else value
    return merged


AUDIO_VAE = {"audio_vae": {"model": {"params": {"ddconfig": {"ch": 8}}}}}
LTX_2 = merge(
    video_channels("ltx-2-19b-dev", 24, ("12111", "1211"), ("1212", "222")),
    AUDIO_VAE,
    {
        "transformer": {
            "num_layers": 2,
            "caption_channels": 48,
            "connector_num_attention_heads": 3,
            "connector_attention_head_dim": 16,
            **widths(heads=4, video=16, audio=8),
        },
        "vocoder": {"upsample_initial_channel": 64},
    },
)
LTX_2_3 = merge(
    video_channels("ltx-2.3-22b", 32, ("12111", "1121"), ("12112", "2212")),
    AUDIO_VAE,
    {
        "transformer": {
            "num_layers": 3,
            "caption_channels": 48,
            "connector_num_layers": 2,
            "connector_num_attention_heads": 4,
            "connector_attention_head_dim": 32,
            "audio_connector_num_attention_heads": 4,
            "audio_connector_attention_head_dim": 16,
            **widths(heads=4, video=32, audio=16),
            # Released models have 1000 and 20 for both, which would hide mix-ups.
            "av_ca_timestep_scale_multiplier": 800.0,
            "audio_positional_embedding_max_pos": [30],
        },
        "vocoder": {
            "vocoder": {"upsample_initial_channel": 64},
            "bwe": {"upsample_initial_channel": 64},
        },
    },
)

# name -> (official configuration, model_version, smaller sizes)
MODELS = {
    "ltx-2": ("ltx-2-19b-distilled", "2.0.0", LTX_2),
    "ltx-2-notc": ("ltx-2-19b-dev", "2.0.0", LTX_2),
    "ltx-2.3": ("ltx-2.3-22b", "2.3.0", LTX_2_3),
}

# name -> (official configuration, smaller sizes); the x1.5 and the plain x2 fit
# "ltx-2.3", the others "ltx-2"
UPSAMPLERS = {
    "spatial-x2": ("ltx-2.3-spatial-upscaler-x2-1.0", (32, 64, 1)),
    "spatial-x1.5": ("ltx-2.3-spatial-upscaler-x1.5-1.0", (32, 64, 1)),
    "spatial-x2-rational": ("ltx-2-spatial-upscaler-x2-1.0", (24, 32, 2)),
    "temporal-x2": ("ltx-2-temporal-upscaler-x2-1.0", (24, 64, 1)),
}
UPSAMPLER_SIZES = ("in_channels", "mid_channels", "num_blocks_per_stage")

# kind -> (rank, parts of the keys adapted, metadata); "ltx-2-lora" is kind "lora"
LORAS: dict[str, tuple[int, tuple[str, ...], dict[str, str]]] = {
    "lora": (4, ("attn", "ff."), {}),
    "lora2": (
        6,
        ("attn1.to_", "patchify_proj"),
        {"reference_downscale_factor": "2"},
    ),
    "distilled-lora": (8, ("",), {}),
}

Shapes = dict[str, tuple[int, ...]]  # of a file's tensors, by official name


def channels_first(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an official file has of a parameter, whose channels are last."""
    if len(shape) < 3:
        return shape
    out, *kernel, inputs = shape
    if ".ups." in f".{key}":  # a transposed convolution
        out, inputs = inputs, out
    return (out, inputs, *kernel)


def parameters(module: nn.Module, prefix: str = "") -> Shapes:
    """Official names and shapes of a module's parameters."""
    return {
        prefix + key: channels_first(key, w.shape)
        for key, w in tree_flatten(module.parameters())
    }


def component(name: str, section: dict, prefix: str = "") -> Shapes:
    """A component's tensors, which are its module's parameters."""
    return parameters(COMPONENTS[name][1].from_config(section), prefix)


def transformer(c: dict, gemma: dict) -> Shapes:
    """The transformer and, in the same file, the connectors and their projection."""
    states = gemma["num_hidden_layers"] + 1
    text = component("connectors", c | {"encoder_states": states})
    projection = "text_embedding_projection."
    return component("transformer", c, "model.diffusion_model.") | {
        key if key.startswith(projection) else f"model.diffusion_model.{key}": shape
        for key, shape in text.items()
    }


def vocoder(c: dict) -> Shapes:
    """The vocoder and the inverse of its Fourier transform, which nothing reads."""
    shapes = component("vocoder", c, "vocoder.")
    fourier = "vocoder.mel_stft.stft_fn"
    if "bwe" in c:
        shapes[f"{fourier}.inverse_basis"] = shapes[f"{fourier}.forward_basis"]
    return shapes


def model(c: dict, gemma: dict) -> Shapes:
    """Everything in a single official file."""
    return (
        transformer(c["transformer"], gemma)
        | component("vae", c["vae"], "vae.")
        | component("audio_vae", c["audio_vae"], "audio_vae.")
        | vocoder(c["vocoder"])
    )


def upsampler(c: dict) -> Shapes:
    """A latent upsampler; the rational x2 stores a filter that nothing reads."""
    shapes = component("spatial_upsampler", c)
    if c["rational_resampler"] and not c["temporal_upsample"]:
        shapes["upsampler.blur_down.kernel"] = (1, 1, 5, 5)
    return shapes


def layer(name: str, *weight: int) -> Shapes:
    """A layer with a bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def vision_tower(c: dict, dim: int) -> Shapes:
    """What a Gemma 3 folder holds for images, which nothing reads."""
    eye, inner, size = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    positions = (c["image_size"] // size) ** 2
    shapes = {
        "embeddings.position_embedding.weight": (positions, eye),
        **layer("embeddings.patch_embedding", eye, 3, size, size),
        **layer("post_layernorm", eye),
    }
    for i in range(c["num_hidden_layers"]):
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= layer(f"encoder.layers.{i}.{norm}", eye)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= layer(f"encoder.layers.{i}.self_attn.{name}", eye, eye)
        shapes |= layer(f"encoder.layers.{i}.mlp.fc1", inner, eye)
        shapes |= layer(f"encoder.layers.{i}.mlp.fc2", eye, inner)
    return {f"vision_tower.vision_model.{key}": s for key, s in shapes.items()} | {
        "multi_modal_projector.mm_input_projection_weight": (eye, dim),
        "multi_modal_projector.mm_soft_emb_norm.weight": (eye,),
    }


def gemma3(c: dict) -> Shapes:
    """A Gemma 3 folder's tensors; the text model is mlx-lm's."""
    from mlx_lm.models.gemma3_text import Gemma3Model, ModelArgs

    text = c["text_config"]
    language = Gemma3Model(ModelArgs.from_dict(text))
    vision = vision_tower(c["vision_config"], text["hidden_size"])
    return parameters(language, "language_model.model.") | vision


def lora(c: dict, rank: int, parts: tuple[str, ...]) -> Shapes:
    """Two factors for each matrix of the transformer that has one of `parts` in its name."""
    shapes: Shapes = {}
    for key, shape in component("transformer", c).items():
        if len(shape) == 2 and key.endswith(".weight") and any(p in key for p in parts):
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            shapes[f"{name}.lora_A.weight"] = (rank, shape[1])
            shapes[f"{name}.lora_B.weight"] = (shape[0], rank)
    return shapes


def random_weight(key: str, shape: tuple[int, ...], seed: list[int], norm: float):
    """Uniform noise, the same on every machine, at the scale of a trained weight."""
    name = key.rsplit(".", 1)[-1]
    if name == "timestep_scale_multiplier":
        return np.array(916.0)
    if name == "layer_scalar":
        return np.full(shape, 0.8)
    u = np.random.default_rng(seed).uniform(-1, 1, shape) * math.sqrt(3)
    if name in ("filter", "kernel"):  # not symmetric: a flip shows
        return (1 + u / 3) / u.size
    if name == "mel_basis":
        return np.abs(u) / 16
    if name == "std-of-means":
        return 1 + u / 4
    if name == "weight" and "norm" in key:
        return norm + u / 8
    if name == "bias":
        return u / 10
    if name in ("alpha", "beta", "mean-of-means") or "table" in name:
        return u * 0.3
    if name == "learnable_registers":
        return u
    if ".ups." in f".{key}":  # a transposed convolution overlaps about twice
        return u / math.sqrt(2 * shape[0])
    gain = 0.3 if "lora_B" in key or "convs2" in key else 1.0  # keeps sums in range
    return gain * u / math.sqrt(math.prod(shape[1:]))


def save(
    path: Path,
    shapes: Shapes,
    seed: int,
    metadata: dict[str, str],
    norm: float = 1.0,
    assets: dict[str, mx.array] | None = None,
) -> Path:
    """Write random tensors of these names and shapes, and `assets` as they are."""
    weights = dict(assets or {})
    for key, shape in shapes.items():
        own_seed = [seed, zlib.crc32(f"{path.stem}:{key}".encode())]
        weight = random_weight(key, shape, own_seed, norm).astype(np.float32)
        weights[key] = mx.array(weight).astype(mx.bfloat16)
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), weights, metadata)
    return path


def build(name: str, folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write the checkpoint `name` into `folder` and return its path.

    `changes` are merged into the configuration: sections for a model or its LoRAs
    (`transformer={"num_layers": 4}`; `gemma=` has the text encoder's sizes), plain
    values for an upsampler, `text_config=` for "gemma3".
    """
    path = Path(folder) / f"{name}.safetensors"
    if name == "gemma3":
        config = merge(GEMMA, changes)
        folder = Path(folder) / name
        shutil.copytree(DATA / name, folder, dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        save(folder / "model.safetensors", gemma3(config), seed, {"format": "pt"}, 0.0)
        return folder
    if name in UPSAMPLERS:
        official, sizes = UPSAMPLERS[name]
        small = dict(zip(UPSAMPLER_SIZES, sizes))
        config = merge(CONFIGS[official], small, changes)
        return save(path, upsampler(config), seed, {"config": json.dumps(config)})
    of_model = max((m for m in MODELS if name.startswith(m)), key=len)
    official, version, sizes = MODELS[of_model]
    gemma = merge(GEMMA["text_config"], changes.pop("gemma", {}))
    config = merge(CONFIGS[official], sizes, changes)
    metadata = {"model_version": version, "format": "pt"}
    if name != of_model:
        rank, parts, extra = LORAS[name.removeprefix(of_model + "-")]
        shapes = lora(config["transformer"], rank, parts)
        return save(path, shapes, seed, metadata | extra)
    metadata["config"] = json.dumps(config)
    return save(path, model(config, gemma), seed, metadata)


if __name__ == "__main__":
    *names, target = sys.argv[1:]
    for name in names:
        print(build(name, target))
