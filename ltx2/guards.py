"""Sanity checks on results; a result that fails them is not written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import mlx.core as mx

from .base import OutputError

if TYPE_CHECKING:
    import numpy as np

# Rejected here; `checks` flags what is outside the wider, usual range below each.
LATENT_STD = (0.02, 50)
USUAL_STD = (0.1, math.inf)  # of any stage, the latents' is 0.5 to 1.5
SILENT = 1e-5  # root mean square of a waveform
USUAL_LEVEL = 1e-3  # healthy sound has 0.01 to 0.3
FLAT = 0.002  # standard deviation of the pixels
USUAL_CONTRAST = 0.02  # healthy video has 0.1 to 0.3
LARGEST = 10_000.0  # of any value; float16 ends at 65504


def check_latents(stage: str, latents: mx.array) -> None:
    """Reject denoised latents that are not finite, hardly vary, or exploded."""
    std = mx.std(latents.astype(mx.float32)).item()
    if not LATENT_STD[0] < std < LATENT_STD[1]:  # or NaN
        raise OutputError(f"{stage}: latents have std {std:.3g} (expected: 0.5 to 1.5)")


def check_waveform(waveform: np.ndarray) -> None:
    """Reject audio (samples, channels) that is not finite, or digital silence."""
    level = float((waveform.astype("float64") ** 2).mean()) ** 0.5
    reject(not math.isfinite(level), "audio is not finite")
    volume = f"{20 * math.log10(level + 1e-12):.0f} dB, expected -40 to -10 dB"
    reject(level < SILENT, f"silent audio ({volume})")


def reject(wrong: bool, reason: str) -> None:
    if wrong:
        raise OutputError(f"output rejected: {reason}")


class FrameGuard:
    """Follows frames (F, H, W, 3) in [0, 1] as they are decoded, and checks them at the end."""

    def __init__(self) -> None:
        self.frames, self.count, self.total, self.square = 0, 0, 0.0, 0.0
        self.last, self.change = None, 0.0

    def update(self, frames: mx.array) -> None:
        finite = mx.isfinite(frames).all().item()
        reject(not finite, "frames are not finite (expected 0 to 1)")
        self.frames += len(frames)
        self.count += frames.size
        self.total += frames.sum().item()
        self.square += mx.square(frames).sum().item()
        pair = frames if self.last is None else mx.concatenate([self.last, frames])
        if len(pair) > 1:
            self.change = max(self.change, mx.abs(pair[1:] - pair[:-1]).max().item())
        self.last = mx.contiguous(frames[-1:])
        mx.eval(self.last)

    def check(self) -> None:
        mean = self.total / self.count
        std = max(0.0, self.square / self.count - mean**2) ** 0.5
        values = f"brightness {mean:.2f}, std {std:.4f}, expected 0.1 to 0.3"
        reject(std < FLAT, f"flat image ({values})")
        reject(self.frames > 1 and self.change == 0, "all frames are the same")
