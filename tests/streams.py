"""The transformer of a small checkpoint, and its inputs from a golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ltx2 import weights
from ltx2.conversion import quant_predicate
from ltx2.dit import DiT, Tokens


def load(path: Path, dtype: mx.Dtype = mx.float32) -> DiT:
    return weights.open_model(str(path)).load("transformer", dtype)


def quantized(model: DiT, bits: int) -> DiT:
    """Quantize the layers that conversion quantizes, in groups that fit small sizes."""
    picked = lambda path, _: quant_predicate(path)
    nn.quantize(model, group_size=32, bits=bits, class_predicate=picked)
    return model


def tokens(
    model: DiT, g: dict[str, Any], stream: str, sample: int = 0
) -> Optional[Tokens]:
    """One sample of a stream; None if the golden does not have the stream."""
    if f"in.{stream}.latent" not in g:
        return None
    get = lambda key: g[f"in.{stream}.{key}"][sample]
    levels, level_index = np.unique(get("timesteps"), return_inverse=True)
    mask = g.get(f"in.{stream}.attention_mask")
    return Tokens(
        mx.array(get("latent")[None]),
        mx.array(levels),
        mx.array(g[f"in.{stream}.sigma"][sample : sample + 1]),
        *model.rope(stream, get("positions")),
        level_index=mx.array(level_index.flatten()),
        mask=None if mask is None else mx.array(mask[sample]),
    )


def inputs(
    model: DiT, g: dict[str, Any], sample: int = 0
) -> tuple[Optional[Tokens], Optional[Tokens], list[tuple]]:
    """Both streams of a sample, and two texts: its contexts, and these negated."""
    positive, negative = ([], [])
    for key in ("in.video.context", "in.audio.context"):
        context = mx.array(g[key][sample : sample + 1]) if key in g else None
        positive.append(context)
        negative.append(None if context is None else -context)
    video, audio = (tokens(model, g, s, sample) for s in ("video", "audio"))
    return video, audio, model.project_text([positive, negative])
