"""What a healthy result looks like; a result that does not is not written."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .base import OutputError


def check_latents(stage: str, latents: mx.array) -> None:
    """Refuse denoised latents that are not finite, hardly vary, or exploded."""
    spread = mx.std(latents.astype(mx.float32)).item()
    if not np.isfinite(spread):
        raise OutputError(f"{stage}: latents are not finite (usual spread: 0.5 to 1.5)")
    if not 0.02 < spread < 50:
        raise OutputError(
            f"{stage}: latents have a spread of {spread:.3g} (usual: 0.5 to 1.5)"
        )


def check_waveform(waveform: np.ndarray) -> None:
    """Refuse sound (samples, channels) that is not finite, or silent to the last bit."""
    level = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    if not np.isfinite(level):
        raise OutputError("sound: not finite (usual level: -40 to -10 dB)")
    if level < 1e-5:
        raise OutputError(
            f"sound: silent, {20 * np.log10(level + 1e-12):.0f} dB "
            "(usual: -40 to -10 dB)"
        )


class FrameGuard:
    """Watches frames (F, H, W, 3) in [0, 1] as they are decoded, judges at the end."""

    def __init__(self) -> None:
        self.frames, self.count, self.total, self.square = 0, 0, 0.0, 0.0
        self.last, self.change = None, 0.0

    def see(self, frames: mx.array) -> None:
        if not mx.isfinite(frames).all().item():
            raise OutputError("picture: not finite (usual: 0 to 1)")
        self.frames += len(frames)
        self.count += frames.size
        self.total += frames.sum().item()
        self.square += mx.square(frames).sum().item()
        seen = frames if self.last is None else mx.concatenate([self.last, frames])
        if len(seen) > 1:
            change = mx.abs(seen[1:] - seen[:-1]).max().item()
            self.change = max(self.change, change)
        self.last = mx.contiguous(frames[-1:])
        mx.eval(self.last)

    def judge(self) -> None:
        mean = self.total / self.count
        spread = max(0.0, self.square / self.count - mean**2) ** 0.5
        if spread < 0.002:
            raise OutputError(
                f"picture: one flat colour, brightness {mean:.2f}, spread {spread:.4f} "
                "(usual spread: 0.1 to 0.3)"
            )
        if self.frames > 1 and self.change == 0:
            raise OutputError("picture: all frames are the same (usual: they differ)")
