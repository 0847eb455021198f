"""Small checkpoints with random weights in the layout of the official files.

    python tests/checkpoints.py ltx-2 gemma3 models

A model's configuration is the official one (`data/configs.json`) with smaller sizes;
names and shapes of the tensors follow from it. Weights depend on the name of the
checkpoint, the key and the seed only, are stored as bfloat16 and are scaled so that
activations stay near one.
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
import numpy as np

DATA = Path(__file__).parent / "data"
CONFIGS = json.loads((DATA / "configs.json").read_text())
GEMMA = json.loads((DATA / "gemma3" / "config.json").read_text())


def widths(heads: int, video: int, audio: int) -> dict[str, int]:
    """A transformer's sizes; both streams have as many heads."""
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
    """Transformer and VAE with fewer channels: layers and multipliers by digits."""
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
    """Configurations one on top of the other, section by section."""
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
            # Released models have 1000 and 20 twice over, which hides mix-ups.
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

Shapes = dict[str, Any]  # a module: name -> module or shape


def linear(n_in: int, n_out: int, bias: bool = True) -> Shapes:
    return {"weight": (n_out, n_in)} | ({"bias": (n_out,)} if bias else {})


def conv(n_in: int, n_out: int, *kernel: int, bias: bool = True) -> Shapes:
    return {"weight": (n_out, n_in, *kernel)} | ({"bias": (n_out,)} if bias else {})


def numbered(modules) -> Shapes:
    return {str(i): module for i, module in enumerate(modules)}


def attention(query: int, context: int, inner: int, gates: int) -> Shapes:
    return {
        "q_norm": {"weight": (inner,)},
        "k_norm": {"weight": (inner,)},
        "to_q": linear(query, inner),
        "to_k": linear(context, inner),
        "to_v": linear(context, inner),
        "to_out": {"0": linear(inner, query)},
    } | ({"to_gate_logits": linear(query, gates)} if gates else {})


def feed_forward(dim: int, bias: bool = True) -> Shapes:
    return {
        "net": {
            "0": {"proj": linear(dim, 4 * dim, bias)},
            "2": linear(4 * dim, dim, bias),
        }
    }


def time_embedder(dim: int) -> Shapes:
    return {
        "timestep_embedder": {
            "linear_1": linear(256, dim),
            "linear_2": linear(dim, dim),
        }
    }


def adaln(dim: int, rows: int) -> Shapes:
    return {"emb": time_embedder(dim), "linear": linear(dim, rows * dim)}


def connector(dim: int, layers: int, gates: int, registers: int) -> Shapes:
    block = {"attn1": attention(dim, dim, dim, gates), "ff": feed_forward(dim)}
    return {
        "learnable_registers": (registers, dim),
        "transformer_1d_blocks": numbered([block] * layers),
    }


def transformer(c: dict) -> Shapes:
    video = c["num_attention_heads"] * c["attention_head_dim"]
    audio = c["audio_num_attention_heads"] * c["audio_attention_head_dim"]
    gated, prompt = c.get("apply_gated_attention"), c.get("cross_attention_adaln")
    heads = c["num_attention_heads"] if gated else 0
    audio_heads = c["audio_num_attention_heads"] if gated else 0
    rows = 9 if prompt else 6
    block = {
        "attn1": attention(video, video, video, heads),
        "attn2": attention(video, c["cross_attention_dim"], video, heads),
        "audio_attn1": attention(audio, audio, audio, audio_heads),
        "audio_attn2": attention(
            audio, c["audio_cross_attention_dim"], audio, audio_heads
        ),
        "audio_to_video_attn": attention(video, audio, audio, audio_heads),
        "video_to_audio_attn": attention(audio, video, audio, audio_heads),
        "ff": feed_forward(video, c.get("ff_bias", True)),
        "audio_ff": feed_forward(audio),
        "scale_shift_table": (rows, video),
        "audio_scale_shift_table": (rows, audio),
        "scale_shift_table_a2v_ca_video": (5, video),
        "scale_shift_table_a2v_ca_audio": (5, audio),
    }
    if prompt:
        block["prompt_scale_shift_table"] = (2, video)
        block["audio_prompt_scale_shift_table"] = (2, audio)
    model: Shapes = {
        "patchify_proj": linear(c["in_channels"], video),
        "audio_patchify_proj": linear(c.get("audio_in_channels", 128), audio),
        "adaln_single": adaln(video, rows),
        "audio_adaln_single": adaln(audio, rows),
        "av_ca_video_scale_shift_adaln_single": adaln(video, 4),
        "av_ca_audio_scale_shift_adaln_single": adaln(audio, 4),
        "av_ca_a2v_gate_adaln_single": adaln(video, 1),
        "av_ca_v2a_gate_adaln_single": adaln(audio, 1),
        "scale_shift_table": (2, video),
        "audio_scale_shift_table": (2, audio),
        "proj_out": linear(video, c["out_channels"]),
        "audio_proj_out": linear(audio, c["audio_out_channels"]),
        "transformer_blocks": numbered([block] * c["num_layers"]),
    }
    if prompt:
        model["prompt_adaln_single"] = adaln(video, 2)
        model["audio_prompt_adaln_single"] = adaln(audio, 2)
    if c.get("use_keyframes_abs_pos_embedding"):
        model["keyframes_abs_pos_embedding"] = (1, video)
    if not c.get("caption_proj_before_connector"):
        text = c["caption_channels"]
        for name, width in (("", video), ("audio_", audio)):
            model[f"{name}caption_projection"] = {
                "linear_1": linear(text, width),
                "linear_2": linear(width, width),
            }
    return model


def connectors(c: dict) -> Shapes:
    heads, size = c["connector_num_attention_heads"], c["connector_attention_head_dim"]
    audio_heads = c.get("audio_connector_num_attention_heads", heads)
    audio_size = c.get("audio_connector_attention_head_dim", size)
    layers, registers = (
        c["connector_num_layers"],
        c["connector_num_learnable_registers"],
    )
    gated = c.get("connector_apply_gated_attention", False)
    return {
        "video_embeddings_connector": connector(
            heads * size, layers, heads * gated, registers
        ),
        "audio_embeddings_connector": connector(
            audio_heads * audio_size, layers, audio_heads * gated, registers
        ),
    }


def text_projection(c: dict, gemma: dict) -> Shapes:
    states = gemma["hidden_size"] * (gemma["num_hidden_layers"] + 1)
    if not c.get("caption_proj_before_connector"):
        return {"aggregate_embed": linear(states, gemma["hidden_size"], bias=False)}
    return {
        "video_aggregate_embed": linear(states, c["cross_attention_dim"]),
        "audio_aggregate_embed": linear(states, c["audio_cross_attention_dim"]),
    }


STRIDES = {"space": 4, "time": 2, "all": 8}


def conv3d(n_in: int, n_out: int) -> Shapes:
    return {"conv": conv(n_in, n_out, 3, 3, 3)}


def res_blocks(channels: int, layers: int, timestep: bool) -> Shapes:
    block: Shapes = {
        "conv1": conv3d(channels, channels),
        "conv2": conv3d(channels, channels),
    }
    if timestep:
        block["scale_shift_table"] = (4, channels)
    return {"res_blocks": numbered([block] * layers)} | (
        {"time_embedder": time_embedder(4 * channels)} if timestep else {}
    )


def video_encoder(c: dict) -> Shapes:
    channels, blocks = c["encoder_base_channels"], []
    for kind, p in c["encoder_blocks"]:
        if kind == "res_x":
            blocks.append(res_blocks(channels, p["num_layers"], timestep=False))
        else:
            width, stride = channels * p["multiplier"], STRIDES[kind.split("_")[1]]
            blocks.append({"conv": conv3d(channels, width // stride)})
            channels = width
    return {
        "conv_in": conv3d(3 * c["patch_size"] ** 2, c["encoder_base_channels"]),
        "down_blocks": numbered(blocks),
        "conv_out": conv3d(channels, c["latent_channels"] + 1),
    }


def video_decoder(c: dict) -> Shapes:
    timestep = c["timestep_conditioning"]
    channels, blocks = c["decoder_base_channels"], []
    channels *= math.prod(p.get("multiplier", 1) for _, p in c["decoder_blocks"])
    conv_in = conv3d(c["latent_channels"], channels)
    for kind, p in reversed(c["decoder_blocks"]):
        if kind == "res_x":
            blocks.append(res_blocks(channels, p["num_layers"], timestep))
        else:
            width = channels // p["multiplier"]
            blocks.append(
                {"conv": conv3d(channels, width * STRIDES[kind.split("_")[1]])}
            )
            channels = width
    model = {
        "conv_in": conv_in,
        "up_blocks": numbered(blocks),
        "conv_out": conv3d(channels, 3 * c["patch_size"] ** 2),
    }
    if timestep:
        model["timestep_scale_multiplier"] = ()
        model["last_time_embedder"] = time_embedder(2 * channels)
        model["last_scale_shift_table"] = (2, channels)
    return model


def statistics(channels: int) -> Shapes:
    return {"mean-of-means": (channels,), "std-of-means": (channels,)}


def video_vae(c: dict) -> Shapes:
    return {
        "encoder": video_encoder(c),
        "decoder": video_decoder(c),
        "per_channel_statistics": statistics(c["latent_channels"]),
    }


def conv2d(n_in: int, n_out: int, size: int = 3) -> Shapes:
    return {"conv": conv(n_in, n_out, size, size)}


def audio_block(n_in: int, n_out: int) -> Shapes:
    return {"conv1": conv2d(n_in, n_out), "conv2": conv2d(n_out, n_out)} | (
        {"nin_shortcut": conv2d(n_in, n_out, 1)} if n_in != n_out else {}
    )


def audio_vae(config: dict) -> Shapes:
    c = config["model"]["params"]["ddconfig"]
    widths, layers = [c["ch"] * m for m in c["ch_mult"]], c["num_res_blocks"]
    last, z = widths[-1], c["z_channels"]
    mid = {"block_1": audio_block(last, last), "block_2": audio_block(last, last)}
    down, up = [], []
    for i, (n_in, n_out) in enumerate(zip([widths[0], *widths], widths)):
        blocks = [audio_block(n_in, n_out)] + [audio_block(n_out, n_out)] * (layers - 1)
        down.append({"block": numbered(blocks)})
        if n_out != last:
            down[i]["downsample"] = conv2d(n_out, n_out)
    for i, (n_in, n_out) in enumerate(zip([*widths[1:], last], widths)):
        blocks = [audio_block(n_in, n_out)] + [audio_block(n_out, n_out)] * layers
        up.append({"block": numbered(blocks)})
        if i > 0:
            up[i]["upsample"] = {"conv": conv2d(n_out, n_out)}
    return {
        "encoder": {
            "conv_in": conv2d(c["in_channels"], widths[0]),
            "down": numbered(down),
            "mid": mid,
            "conv_out": conv2d(last, 2 * z if c["double_z"] else z),
        },
        "decoder": {
            "conv_in": conv2d(z, last),
            "mid": mid,
            "up": numbered(up),
            "conv_out": conv2d(widths[0], c["out_ch"]),
        },
        "per_channel_statistics": statistics(
            z * c["mel_bins"] // 2 ** (len(widths) - 1)
        ),
    }


def activation(channels: int) -> Shapes:
    return {
        "act": {"alpha": (channels,), "beta": (channels,)},
        "upsample": {"filter": (1, 1, 12)},
        "downsample": {"lowpass": {"filter": (1, 1, 12)}},
    }


def generator(c: dict) -> Shapes:
    channels, amp = c["upsample_initial_channel"], c["resblock"] == "AMP1"
    model: Shapes = {"conv_pre": conv(128, channels, 7)}
    ups, blocks = [], []
    for size in c["upsample_kernel_sizes"]:
        ups.append(
            {"weight": (channels, channels // 2, size), "bias": (channels // 2,)}
        )
        channels //= 2
        for kernel, dilations in zip(
            c["resblock_kernel_sizes"], c["resblock_dilation_sizes"]
        ):
            convs = numbered([conv(channels, channels, kernel)] * len(dilations))
            blocks.append({"convs1": convs, "convs2": convs})
            if amp:
                acts = numbered([activation(channels)] * len(dilations))
                blocks[-1] |= {"acts1": acts, "acts2": acts}
    if amp:
        model["act_post"] = activation(channels)
    return model | {
        "ups": numbered(ups),
        "resblocks": numbered(blocks),
        "conv_post": conv(channels, 2, 7, bias=c.get("use_bias_at_final", True)),
    }


def vocoder(c: dict) -> Shapes:
    if "bwe" not in c:
        return generator(c)
    n_fft = c["bwe"]["n_fft"]
    basis = (n_fft + 2, 1, n_fft)
    return {
        "vocoder": generator(c["vocoder"]),
        "bwe_generator": generator(c["bwe"]),
        "mel_stft": {
            "mel_basis": (c["bwe"]["num_mels"], n_fft // 2 + 1),
            "stft_fn": {"forward_basis": basis, "inverse_basis": basis},
        },
    }


def model(c: dict, gemma: dict) -> Shapes:
    """Everything in a single official file."""
    return {
        "model": {
            "diffusion_model": transformer(c["transformer"])
            | connectors(c["transformer"])
        },
        "text_embedding_projection": text_projection(c["transformer"], gemma),
        "vae": video_vae(c["vae"]),
        "audio_vae": audio_vae(c["audio_vae"]),
        "vocoder": vocoder(c["vocoder"]),
    }


def upsampler(c: dict) -> Shapes:
    mid, latent = c["mid_channels"], c["in_channels"]
    norm = {"weight": (mid,), "bias": (mid,)}
    conv_mid = conv(mid, mid, 3, 3, 3)
    block = {"conv1": conv_mid, "norm1": norm, "conv2": conv_mid, "norm2": norm}
    blocks = numbered([block] * c["num_blocks_per_stage"])
    if c["temporal_upsample"]:
        up = {"0": conv(mid, 2 * mid, 3, 3, 3)}
    elif c["rational_resampler"]:
        shuffle = {1.5: 3, 2.0: 2}[c["spatial_scale"]]
        up = {
            "conv": conv(mid, shuffle**2 * mid, 3, 3),
            "blur_down": {"kernel": (1, 1, 5, 5)},
        }
    else:
        up = {"0": conv(mid, 4 * mid, 3, 3)}
    return {
        "initial_conv": conv(latent, mid, 3, 3, 3),
        "initial_norm": norm,
        "res_blocks": blocks,
        "upsampler": up,
        "post_upsample_res_blocks": blocks,
        "final_conv": conv(mid, latent, 3, 3, 3),
    }


def gemma_layer(attention: Shapes, dim: int, hidden: int) -> Shapes:
    """A layer of any Gemma around its attention."""
    norm = {"weight": (dim,)}
    return {
        "input_layernorm": norm,
        "self_attn": attention,
        "post_attention_layernorm": norm,
        "pre_feedforward_layernorm": norm,
        "mlp": {
            "gate_proj": linear(dim, hidden, bias=False),
            "up_proj": linear(dim, hidden, bias=False),
            "down_proj": linear(hidden, dim, bias=False),
        },
        "post_feedforward_layernorm": norm,
    }


def gemma3(c: dict) -> Shapes:
    text, vision = c["text_config"], c["vision_config"]
    dim, hidden = text["hidden_size"], text["intermediate_size"]
    query = text["num_attention_heads"] * text["head_dim"]
    key = text["num_key_value_heads"] * text["head_dim"]
    norm = {"weight": (dim,)}
    attention = {
        "q_proj": linear(dim, query, bias=False),
        "k_proj": linear(dim, key, bias=False),
        "v_proj": linear(dim, key, bias=False),
        "o_proj": linear(query, dim, bias=False),
        "q_norm": {"weight": (text["head_dim"],)},
        "k_norm": {"weight": (text["head_dim"],)},
    }
    layer = gemma_layer(attention, dim, hidden)
    eye, inner = vision["hidden_size"], vision["intermediate_size"]
    eye_norm, eye_linear = {"weight": (eye,), "bias": (eye,)}, linear(eye, eye)
    eye_layer = {
        "layer_norm1": eye_norm,
        "self_attn": {
            name: eye_linear for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        },
        "layer_norm2": eye_norm,
        "mlp": {"fc1": linear(eye, inner), "fc2": linear(inner, eye)},
    }
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return {
        "language_model": {
            "model": {
                "embed_tokens": {"weight": (text["vocab_size"], dim)},
                "layers": numbered([layer] * text["num_hidden_layers"]),
                "norm": norm,
            }
        },
        "vision_tower": {
            "vision_model": {
                "embeddings": {
                    "patch_embedding": conv(3, eye, *[vision["patch_size"]] * 2),
                    "position_embedding": {"weight": (patches, eye)},
                },
                "encoder": {
                    "layers": numbered([eye_layer] * vision["num_hidden_layers"])
                },
                "post_layernorm": eye_norm,
            }
        },
        "multi_modal_projector": {
            "mm_input_projection_weight": (eye, dim),
            "mm_soft_emb_norm": {"weight": (eye,)},
        },
    }


def lora(c: dict, rank: int, parts: tuple[str, ...]) -> Shapes:
    shapes: Shapes = {}
    for key, shape in flatten(transformer(c)).items():
        if len(shape) == 2 and key.endswith(".weight") and any(p in key for p in parts):
            layer = f"diffusion_model.{key.removesuffix('.weight')}"
            shapes[f"{layer}.lora_A.weight"] = (rank, shape[1])
            shapes[f"{layer}.lora_B.weight"] = (shape[0], rank)
    return shapes


def flatten(shapes: Shapes, prefix: str = "") -> dict[str, tuple[int, ...]]:
    flat = {}
    for name, value in shapes.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def random_weight(key: str, shape: tuple[int, ...], seed: list[int], norm: float):
    """Uniform noise, the same on every machine, at the scale of a trained weight."""
    name = key.rsplit(".", 1)[-1]
    if name == "timestep_scale_multiplier":
        return np.array(916.0)
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


def save(path: Path, shapes: Shapes, seed: int, metadata: dict, norm: float = 1.0):
    weights = {}
    for key, shape in flatten(shapes).items():
        own_seed = [seed, zlib.crc32(f"{path.stem}:{key}".encode())]
        weight = random_weight(key, shape, own_seed, norm).astype(np.float32)
        weights[key] = mx.array(weight).astype(mx.bfloat16)
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), weights, metadata)
    return path


def build(name: str, folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write the checkpoint `name` into `folder` and return its path.

    `changes` are merged into the configuration: sections for a model or its LoRAs
    (`transformer={"num_layers": 4}`; `gemma=` takes the text encoder's sizes), plain
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
