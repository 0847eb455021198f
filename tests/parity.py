"""Helpers of tests that compare with the reference's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

# Tolerances are those of the CPU. A GPU adds in other orders, and Metal convolves with
# Winograd's F(6, 3), whose error is about ten times that of a direct convolution.
GPU_LOOSER = 30
LOOSER = 1  # GPU_LOOSER with pytest --gpu


def channels_last(x: np.ndarray) -> mx.array:
    """A golden in torch's layout (B, C, ...) as (B, ..., C)."""
    return mx.array(np.moveaxis(x, 1, -1))


def relative_error(ours: mx.array, reference: mx.array) -> float:
    """The largest difference divided by the largest value of the reference, and by
    LOOSER."""
    assert ours.shape == reference.shape
    error = mx.abs(ours - reference).max() / mx.abs(reference).max()
    return error.item() / LOOSER


def cosine(ours: mx.array, reference: mx.array) -> float:
    """Cosine similarity in float64, for precisions that a maximum error would not suit."""
    a, b = (
        np.array(x.astype(mx.float32), np.float64).ravel() for x in (ours, reference)
    )
    return a @ b / np.sqrt((a @ a) * (b @ b))


def read(path: Path, section: str = "") -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Configuration and stored tensors of a checkpoint, or of one component."""
    weights, metadata = mx.load(str(path), return_metadata=True)
    config = json.loads(metadata["config"])
    prefix = section and f"{section}."
    return config[section] if section else config, {
        key.removeprefix(prefix): w
        for key, w in weights.items()
        if key.startswith(prefix)
    }
