"""Count what the phases of a run compute."""

from __future__ import annotations

import math
from typing import Iterator, NamedTuple

from .latents import Size
from .vae import LATENTS_PER_CHUNK, UP, VideoVAEConfig, frames_at_once


class Conv(NamedTuple):
    """A 3x3x3 convolution of the video VAE: (frames, rows, columns) at a time, channels
    in and out, channels of the residual that waits for it, frames of the whole clip."""

    size: tuple[int, int, int]
    dim_in: int
    dim: int
    residual: int
    total: int

    @property
    def flops(self) -> float:
        return 54 * self.dim_in * self.dim * math.prod(self.size[1:]) * self.total


def video_convs(
    c: VideoVAEConfig, size: Size, strides: dict, frames: int
) -> Iterator[Conv]:
    """The convolutions of the video VAE's decoder (`UP`), or of its encoder (`DOWN`) for
    a clip, or an image, of so many frames."""
    up, patch = strides is UP, 3 * c.patch_size**2
    if up:
        blocks, dim = c.decoder_blocks[::-1], c.decoder_base_channels
        dim *= math.prod(o.get("multiplier", 1) for _, o in blocks)
        total, rows, columns = size.latent
        at_once, start, end = LATENTS_PER_CHUNK, c.latent_channels, patch
    else:
        blocks, dim = c.encoder_blocks, c.encoder_base_channels
        total, at_once, end = frames, min(frames, 8), c.latent_channels + 1
        start, rows, columns = patch, *(
            s // c.patch_size for s in (size.height, size.width)
        )

    def conv(dim_in: int, dim: int, residual: int = 0) -> Conv:
        return Conv((min(at_once, total), rows, columns), dim_in, dim, residual, total)

    yield conv(start, dim)
    for name, options in blocks:
        if name == "res_x":
            for _ in range(options["num_layers"]):
                yield from (conv(dim, dim), conv(dim, dim, dim))
            continue
        time, *space = strides[name]
        factor, volume = options.get("multiplier", 1), time * math.prod(space)
        inner = dim // factor * volume if up else dim * factor // volume
        yield conv(dim, inner, dim)
        if up:
            dim, total = dim // factor, total * time - time + 1
            rows, columns = rows * space[0], columns * space[1]
            at_once = frames_at_once(rows * columns)
        else:
            dim, total = dim * factor, math.ceil(total / time)
            rows, columns = rows // space[0], columns // space[1]
            at_once = math.ceil(at_once / time)
    yield conv(dim, end)
