"""The latent upsamplers: 2 times the frames, or 2 or 1.5 times the height and width."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .base import Config, UserError
from .conv import conv3d
from .layers import Component, depth_to_space


@dataclass
class UpsamplerConfig(Config):
    """The configuration in an upsampler's file."""

    in_channels: int
    mid_channels: int
    num_blocks_per_stage: int
    spatial_upsample: bool
    temporal_upsample: bool
    spatial_scale: float
    rational_resampler: bool  # ignored by temporal upsamplers

    FIXED = {
        "_class_name": ("LatentUpsampler",),
        "dims": (3,),
        "spatial_scale": (1.0, 1.5, 2.0),
    }

    def __post_init__(self):
        if self.spatial_upsample == self.temporal_upsample:
            both = f"are both {self.spatial_upsample}, only one of them is implemented"
            raise UserError(f"upsampler: spatial_upsample and temporal_upsample {both}")


class Conv3d(nn.Conv3d):
    """3x3x3, zero-padded."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, 3)

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)])
        return conv3d(x, self.weight, padding=1) + self.bias


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, pytorch_compatible=True)


class ResBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = Conv3d(channels, channels)
        self.norm1 = group_norm(channels)
        self.conv2 = Conv3d(channels, channels)
        self.norm2 = group_norm(channels)

    def __call__(self, x: mx.array) -> mx.array:
        h = nn.silu(self.norm1(self.conv1(x)))
        return nn.silu(x + self.norm2(self.conv2(h)))


class LatentUpsampler(Component):
    """Latents, not normalized, (B, F, H, W, C) to (B, F, sH, sW, C), s the spatial scale,
    or to (B, 2F - 1, H, W, C). Clips cannot be cut: group norms are over all frames."""

    config_class = UpsamplerConfig

    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        channels, blocks = config.mid_channels, range(config.num_blocks_per_stage)
        self.initial_conv = Conv3d(config.in_channels, channels)
        self.initial_norm = group_norm(channels)
        self.res_blocks = [ResBlock(channels) for _ in blocks]
        self.up, self.down = config.spatial_scale.as_integer_ratio()
        conv = nn.Conv2d(channels, self.up**2 * channels, 3, padding=1)
        if config.temporal_upsample:
            self.upsampler = [Conv3d(channels, 2 * channels)]
        elif config.rational_resampler:
            blur = {"kernel": mx.zeros((1, 5, 5, 1))}
            self.upsampler = {"conv": conv, "blur_down": blur}
        else:
            self.upsampler = [conv]
        self.post_upsample_res_blocks = [ResBlock(channels) for _ in blocks]
        self.final_conv = Conv3d(channels, config.in_channels)

    def resample(self, x: mx.array) -> mx.array:
        if self.config.temporal_upsample:
            # The first latent frame is one video frame, not eight: it is not doubled.
            return depth_to_space(self.upsampler[0](x), (2, 1, 1))[:, 1:]
        conv = self.upsampler["conv" if self.config.rational_resampler else 0]
        # (O, 3, 3, C) to (O, 1, 3, 3, C): each frame is convolved separately.
        x = conv3d(x, conv.weight[:, None], padding=1) + conv.bias
        x = depth_to_space(x, (1, self.up, self.up))
        if self.down == 1:  # the rational x2 file also stores an unused kernel
            return x
        # Low-pass, of which every `down`-th row and column is kept.
        frames, channels = x.flatten(0, 1), x.shape[-1]
        kernel = self.upsampler["blur_down"]["kernel"]
        kernel = mx.broadcast_to(kernel, (channels, 5, 5, 1))
        frames = mx.conv2d(frames, kernel, self.down, padding=2, groups=channels)
        return mx.unflatten(frames, 0, x.shape[:2])

    def __call__(self, latents: mx.array) -> mx.array:
        x = nn.silu(self.initial_norm(self.initial_conv(latents)))
        for layer in (*self.res_blocks, self.resample, *self.post_upsample_res_blocks):
            x = layer(x)
            mx.eval(x)  # else the workspaces of several blocks are held
        return self.final_conv(x)
