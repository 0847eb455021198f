"""The split files of LTX-2.5 with small random weights; `checkpoints` has the other models.

python tests/split_checkpoint.py /tmp/models
"""

from __future__ import annotations

import json
import sys
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
    component,
    layer,
    lora,
    merge,
    save,
    transformer,
    video_channels,
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
    """The text encoder, and its parts for images and sound, which nothing reads."""
    text, vision = component("gemma", c | {"tokenizer_bytes": 1}), c["vision_config"]
    del text["tokenizer_json"]  # not random
    eye, dim = vision["mm_embed_dim"], c["text_config"]["hidden_size"]
    patch = 3 * (vision["patch_size"] * vision["pooling_kernel_size"]) ** 2
    images, sound = vision["output_proj_dims"], c["audio_config"]["audio_embed_dim"]
    return {
        **text,
        **layer("vision_model.patch_ln1", patch),
        **layer("vision_model.patch_dense", eye, patch),
        **layer("vision_model.patch_ln2", eye),
        **layer("vision_model.pos_norm", eye),
        "vision_model.pos_embedding": (vision["mm_posemb_size"], 2, eye),
        "multi_modal_projector.embedding_projection.weight": (dim, images),
        "audio_projector.embedding_projection.weight": (dim, sound),
    }


def diffusion_vae(encoder: dict, decoder: dict) -> Shapes:
    """A diffusion decoder with its own copy of the VAE's encoder."""
    shapes = {
        k: shape
        for k, shape in component("vae", encoder).items()
        if not k.startswith("decoder.")
    }
    for k, shape in component("diffusion_decoder", decoder).items():
        if k not in shapes:  # statistics are common to both
            k = k.replace("attn.qkv.", "attn.qkv.qkv.")
            shapes[f"decoder.{k}"] = shape
    return shapes


def duration_head(c: dict, head: dict) -> Shapes:
    """The duration head; its configuration leaves sizes to the tensors."""
    sizes = {
        "video_dim": c["cross_attention_dim"],
        "audio_dim": c["audio_cross_attention_dim"],
        "dim": head["pooler_hidden_dim"],
        "hidden": head["mlp_hidden"],
    }
    return component("duration_head", sizes, "duration_head.")


def build(folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write the files into `folder`/ltx-2.5 and return its path."""
    root = Path(folder) / "ltx-2.5"
    gemma = json.loads((HERE / "config.json").read_text())
    gemma = merge(gemma, changes.pop("gemma", {}))
    config = merge(CONFIGS["ltx-2.5-22b"], LTX_2_5, changes)
    c = config["transformer"]

    def write(path: str, shapes: Shapes, sections: dict, **metadata: str) -> None:
        described = {"model_version": VERSION, "config": json.dumps(sections)}
        metadata |= {"format": "pt", **described}
        save(root / f"{path}.safetensors", shapes, seed, metadata)

    shapes = transformer(c, gemma["text_config"])
    projection = {k: s for k, s in shapes.items() if k.startswith("text_")}
    write(
        "diffusion_models/ltx-2.5-transformer",
        {k: s for k, s in shapes.items() if k not in projection},
        {"transformer": c, "scheduler": config["scheduler"]},
        gemma_source_checkpoint=json.dumps({"gemma_version": gemma["gemma_version"]}),
    )
    vae = config["vae"]
    write("vae/ltx-2.5-video-vae", component("vae", vae), {"vae": vae})
    write(
        "vae/ltx-2.5-audio-vae",
        component("audio_vae", config["audio_vae"], "audio_vae.")
        | vocoder(config["vocoder"]),
        {k: config[k] for k in ("audio_vae", "vocoder")},
    )
    channels = c["in_channels"]
    sizes = {
        "latent_channels": channels,
        "encoder": {"out_channels": channels, "blocks": vae["encoder_blocks"]},
        "decoder": {"in_channels": channels},
    }
    other = merge(CONFIGS["ltx-2.5-diffusion-vae"], DIFFUSION_VAE, {"vae": sizes})
    shapes = diffusion_vae(vae, other["vae"]["decoder"])
    write("vae/ltx-2.5-video-vae-diffusion", shapes, {"vae": other["vae"]})
    head = {"pooler_hidden_dim": 32, "mlp_hidden": 16}
    sizes = {k: c[k] for k in ("cross_attention_dim", "audio_cross_attention_dim")}
    write(
        "model_patches/ltx-2.5-duration-head",
        duration_head(c, head),
        {"transformer": sizes, "duration_head": head},
    )
    # The text encoder carries its tokenizer and settings as bytes.
    assets = {
        f"hf_asset__{f.name}": mx.array(np.frombuffer(f.read_bytes(), np.uint8))
        for f in HERE.iterdir()
        if f.name != "config.json"
    }
    assets["tokenizer_json"] = assets.pop("hf_asset__tokenizer.json")
    save(
        root / "text_encoders" / "ltx-2.5-text-encoder.safetensors",
        gemma4(gemma) | projection,
        seed,
        {"format": "pt", "gemma_config": json.dumps(gemma)},
        assets=assets,
    )
    return root


def build_lora(kind: str, folder: str | Path, seed: int = 0) -> Path:
    """Write a LoRA of `checkpoints.LORAS` for LTX-2.5 and return its path."""
    rank, parts, metadata = LORAS[kind]
    shapes = lora(merge(CONFIGS["ltx-2.5-22b"], LTX_2_5)["transformer"], rank, parts)
    path = Path(folder) / f"ltx-2.5-{kind}.safetensors"
    return save(path, shapes, seed, {"model_version": VERSION} | metadata)


if __name__ == "__main__":
    print(build(sys.argv[1], int((sys.argv + ["0"])[2])))
