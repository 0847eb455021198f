"""Fast previews of unfinished latents by a linear map to RGB."""

import mlx.core as mx
import numpy as np

from .vae import VideoVAE


class Preview:
    """A least-squares map from a latent's channels to the mean color of its pixels, which
    the decoder makes of random latents, smoothed so that neighbors are similar."""

    def __init__(self, vae: VideoVAE, size: int = 16):
        channels = vae.config.latent_channels
        noise = np.random.default_rng(0).standard_normal((size + 2, size + 2, channels))
        smooth = sum(np.roll(noise, shift, (0, 1)) for shift in np.ndindex(3, 3)) / 3
        latents = mx.array(smooth[2:, 2:].astype(np.float32))[None, None]
        noise = mx.zeros(latents.shape) if vae.config.timestep_conditioning else None
        frames = vae.decode(latents, noise=noise)
        colors = frames[0, 0].reshape(size, 32, size, 32, 3).mean((1, 3))
        colors, x = np.array(colors).reshape(-1, 3), np.array(latents)[0, 0]
        x = np.pad(x.reshape(-1, channels), ((0, 0), (0, 1)), constant_values=1)
        ridge = 1e-3 * len(x) * np.eye(channels + 1)
        self.matrix = np.linalg.solve(x.T @ x + ridge, x.T @ colors)

    def __call__(self, latents: mx.array, scale: int = 8) -> np.ndarray:
        """Normalized latents (1, F, h, w, C) as a strip (F, scale h, scale w, 3) uint8."""
        x = np.array(latents[0].astype(mx.float32))
        rgb = np.clip(x @ self.matrix[:-1] + self.matrix[-1], 0, 1)
        return np.rint(rgb * 255).astype(np.uint8).repeat(scale, 1).repeat(scale, 2)
