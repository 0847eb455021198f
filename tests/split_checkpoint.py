"""The split files of LTX-2.5 with small random weights, as `checkpoints` has the others.

python tests/split_checkpoint.py /tmp/models
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import (
    AUDIO_VAE,
    CONFIGS,
    DATA,
    LORAS,
    Shapes,
    audio_vae,
    connectors,
    flatten,
    gemma_layer,
    linear,
    lora,
    merge,
    numbered,
    random_weight,
    save,
    statistics,
    text_projection,
    transformer,
    video_channels,
    video_encoder,
    video_vae,
    vocoder,
    widths,
)

HERE = DATA / "gemma4"
VERSION = "2.5.1"

LTX_2_5 = merge(
    video_channels("ltx-2.5-22b", 20, ("11121", "1121"), ("21112", "2212")),
    AUDIO_VAE,
    {
        "transformer": {
            "num_layers": 3,
            "caption_channels": 48,
            "connector_num_layers": 2,
            "connector_num_attention_heads": 3,
            "connector_attention_head_dim": 24,
            "audio_connector_num_attention_heads": 3,
            "audio_connector_attention_head_dim": 16,
            **widths(heads=3, video=24, audio=16),
        },
        "vocoder": {
            "vocoder": {"upsample_initial_channel": 64},
            "bwe": {"upsample_initial_channel": 64},
        },
    },
)
DIFFUSION_VAE = {
    "vae": {
        "decoder": {
            "head_dim": 16,
            "stage_channels": [128, 64, 32, 32, 16],
            "stage_depths": [1, 2, 1, 1, 2],
            "stage_kernels": [[3, 3, 3], [3, 3, 3], [3, 5, 5], [3, 5, 5], [5, 5, 5]],
            "stage5_kernel": [5, 5, 5],
            "t_emb_dim": 24,
            "in_channels": 20,
        },
    }
}


def gemma4(c: dict) -> Shapes:
    t, v, a = c["text_config"], c["vision_config"], c["audio_config"]
    dim, hidden, last = (
        t["hidden_size"],
        t["intermediate_size"],
        t["num_hidden_layers"] - 1,
    )
    norm = {"weight": (dim,)}

    def layer(i: int) -> Shapes:
        everywhere = i % 6 == 5 or i == last
        size = t["global_head_dim"] if everywhere else t["head_dim"]
        keys = t["num_global_key_value_heads" if everywhere else "num_key_value_heads"]
        query = t["num_attention_heads"] * size
        attention = {
            "q_proj": linear(dim, query, bias=False),
            "k_proj": linear(dim, keys * size, bias=False),
            "o_proj": linear(query, dim, bias=False),
            "q_norm": {"weight": (size,)},
            "k_norm": {"weight": (size,)},
        }
        if not everywhere:
            attention["v_proj"] = linear(dim, keys * size, bias=False)
        return gemma_layer(attention, dim, hidden) | {"layer_scalar": (1,)}

    eye = v["mm_embed_dim"]
    patch = 3 * (v["patch_size"] * v["pooling_kernel_size"]) ** 2
    return {
        "model": {
            "embed_tokens": {"weight": (t["vocab_size"], dim)},
            "layers": numbered(layer(i) for i in range(last + 1)),
            "norm": norm,
        },
        "vision_model": {
            "patch_ln1": {"weight": (patch,), "bias": (patch,)},
            "patch_dense": linear(patch, eye),
            "patch_ln2": {"weight": (eye,), "bias": (eye,)},
            "pos_embedding": (v["mm_posemb_size"], 2, eye),
            "pos_norm": {"weight": (eye,), "bias": (eye,)},
        },
        "multi_modal_projector": {
            "embedding_projection": linear(v["output_proj_dims"], dim, bias=False)
        },
        "audio_projector": {
            "embedding_projection": linear(a["audio_embed_dim"], dim, bias=False)
        },
    }


def duration_head(c: dict, hidden: int, mlp: int) -> Shapes:
    return {
        "duration_head": {
            "video_input_proj": linear(c["cross_attention_dim"], hidden),
            "audio_input_proj": linear(c["audio_cross_attention_dim"], hidden),
            "video_modality_emb": (hidden,),
            "audio_modality_emb": (hidden,),
            "attention_pooler": {
                "query_tokens": (1, hidden),
                "cross_attn": {
                    "in_proj_weight": (3 * hidden, hidden),
                    "in_proj_bias": (3 * hidden,),
                    "out_proj": linear(hidden, hidden),
                },
            },
            "mlp_hidden": linear(hidden, mlp),
            "mlp_out": linear(mlp, 1),
        }
    }


def diffusion_decoder(c: dict) -> Shapes:
    size, widths_ = c["head_dim"], c["stage_channels"]

    def block(dim: int) -> Shapes:
        return {
            "norm1": {"weight": (dim,)},
            "attn": {
                "qkv": {"qkv": linear(dim, 3 * dim)},
                "q_norm": {"weight": (size,)},
                "k_norm": {"weight": (size,)},
                "proj": linear(dim, dim),
            },
            "norm2": {"weight": (dim,)},
            "mlp": {
                "w_gate": linear(dim, 4 * dim, bias=False),
                "w_up": linear(dim, 4 * dim, bias=False),
                "w_down": linear(4 * dim, dim, bias=False),
            },
        }

    *det, last = widths_
    pixels, t = c["out_channels"] * c["patch_size"] ** 2, c["t_emb_dim"]
    ups = [
        {"proj": linear(dim, dim * int(np.prod(stride)) // reduction)}
        for dim, (stride, reduction) in zip(det, c["upsamples"])
    ]
    diff = block(last) | {
        "context_proj": linear(last, last),
        "scale_shift_table": (7, last),
    }
    return {
        "conv_in": linear(c["in_channels"], det[0]),
        "det_stages": numbered(
            numbered([block(dim)] * depth) for dim, depth in zip(det, c["stage_depths"])
        ),
        "upsamples": numbered(ups),
        "conv_in_x_t": linear(pixels, last),
        "t_embedder": {"mlp": {"0": linear(256, t), "2": linear(t, t)}},
        "shared_adaln": {"proj": linear(t, 7 * last)},
        "diff_blocks": numbered([diff] * c["stage_depths"][-1]),
        "norm_out": {"weight": (last,)},
        "conv_out": linear(last, pixels),
    }


def build(folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write the pack into `folder`/ltx-2.5 and return its path."""
    root = Path(folder) / "ltx-2.5"
    gemma = merge(
        json.loads((HERE / "config.json").read_text()), changes.pop("gemma", {})
    )
    config = merge(CONFIGS["ltx-2.5-22b"], LTX_2_5, changes)
    t = config["transformer"]

    def write(path: str, shapes: Shapes, sections: dict, **metadata: str) -> None:
        meta = {
            "format": "pt",
            "model_version": VERSION,
            "config": json.dumps(sections),
        }
        save(root / f"{path}.safetensors", shapes, seed, meta | metadata)

    source = json.dumps({"gemma_version": gemma["gemma_version"]})
    write(
        "diffusion_models/ltx-2.5-transformer",
        {"model": {"diffusion_model": transformer(t) | connectors(t)}},
        {"transformer": t, "scheduler": config["scheduler"]},
        gemma_source_checkpoint=source,
    )
    write("vae/ltx-2.5-video-vae", video_vae(config["vae"]), {"vae": config["vae"]})
    sections = {k: config[k] for k in ("audio_vae", "vocoder")}
    write(
        "vae/ltx-2.5-audio-vae",
        {
            "audio_vae": audio_vae(config["audio_vae"]),
            "vocoder": vocoder(config["vocoder"]),
        },
        sections,
    )
    diffusion = merge(CONFIGS["ltx-2.5-diffusion-vae"], DIFFUSION_VAE)["vae"]
    diffusion = merge(
        diffusion,
        {
            "latent_channels": t["in_channels"],
            "encoder": {
                "out_channels": t["in_channels"],
                "blocks": config["vae"]["encoder_blocks"],
            },
            "decoder": {"in_channels": t["in_channels"]},
        },
    )
    write(
        "vae/ltx-2.5-video-vae-diffusion",
        {
            "encoder": video_encoder(config["vae"]),
            "decoder": diffusion_decoder(diffusion["decoder"]),
            "per_channel_statistics": statistics(t["in_channels"]),
        },
        {"vae": diffusion},
    )
    head = {"pooler_hidden_dim": 32, "mlp_hidden": 16}
    sizes = {k: t[k] for k in ("cross_attention_dim", "audio_cross_attention_dim")}
    write(
        "model_patches/ltx-2.5-duration-head",
        duration_head(t, *head.values()),
        {"transformer": sizes, "duration_head": head},
    )
    # the text encoder carries its tokenizer and settings as bytes
    shapes = gemma4(gemma) | {
        "text_embedding_projection": text_projection(t, gemma["text_config"])
    }
    path = root / "text_encoders" / "ltx-2.5-text-encoder.safetensors"
    weights = {}
    for key, shape in flatten(shapes).items():
        own = [seed, zlib.crc32(f"{path.stem}:{key}".encode())]
        w = (
            np.ones(1) * 0.8
            if "layer_scalar" in key
            else random_weight(key, shape, own, 1.0)
        )
        weights[key] = mx.array(w.astype(np.float32)).astype(mx.bfloat16)
    for asset in HERE.iterdir():
        key = (
            "tokenizer_json"
            if asset.name == "tokenizer.json"
            else f"hf_asset__{asset.name}"
        )
        if asset.name != "config.json":
            weights[key] = mx.array(np.frombuffer(asset.read_bytes(), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(path), weights, {"format": "pt", "gemma_config": json.dumps(gemma)}
    )
    return root


def build_lora(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Write a LoRA of `checkpoints.LORAS` for the pack and return its path."""
    rank, parts, metadata = LORAS[kind]
    shapes = lora(merge(CONFIGS["ltx-2.5-22b"], LTX_2_5)["transformer"], rank, parts)
    path = Path(folder) / f"ltx-2.5-{kind}.safetensors"
    return save(path, shapes, seed, {"model_version": VERSION} | metadata)


if __name__ == "__main__":
    print(build(sys.argv[1], int((sys.argv + ["0"])[2])))
