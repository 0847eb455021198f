"""The audio VAE: waveform to log-mel to latents, and latents back to log-mel."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .base import Config, UserError
from .latents import HOP_LENGTH, MEL_BINS, SAMPLE_RATE
from .layers import Component, Statistics, rms_norm

N_FFT = 1024


@dataclass
class AudioVAEConfig(Config):
    """The `audio_vae` section of a checkpoint's configuration."""

    ch: int
    ch_mult: list[int]
    num_res_blocks: int
    z_channels: int

    FIXED = {
        "double_z": (True,),
        "in_channels": (2,),
        "out_ch": (2,),
        "attn_resolutions": ([],),
        "mid_block_add_attention": (False,),
        "norm_type": ("pixel",),
        "causality_axis": ("height",),
        # The log-mel front end
        "sampling_rate": (SAMPLE_RATE,),
        "stereo": (True,),
        "filter_length": (N_FFT,),
        "hop_length": (HOP_LENGTH,),
        "win_length": (N_FFT,),
        "causal": (True,),
        "mel_bins": (MEL_BINS,),
        "n_mel_channels": (MEL_BINS,),
        "mel_fmin": (0,),
        "mel_fmax": (SAMPLE_RATE // 2,),
    }
    UNUSED = frozenset(
        "resolution downsample_time dropout max_wav_value duration causal_padding".split()
    )

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> Config:
        """Read the section, whose keys are nested."""
        flat: dict[str, Any] = {}
        is_leaf = lambda value: not isinstance(value, dict)
        for path, value in tree_flatten(section, is_leaf=is_leaf):
            key = path.rpartition(".")[2]
            if flat.setdefault(key, value) != value:
                two = f"audio VAE: its config has two values of {key}"
                raise UserError(f"{two}, {flat[key]!r} and {value!r}")
        return super().from_dict(flat)

    @property
    def latent_bins(self) -> int:
        """Mel bins of a latent: every level except the last halves them."""
        return MEL_BINS // 2 ** (len(self.ch_mult) - 1)


def mel_filters() -> np.ndarray:
    """Triangular filters of equal area (N_FFT / 2 + 1, MEL_BINS) on Slaney's mel scale
    (1998): 15 mels of 200/3 Hz up to 1 kHz, then 27 for each factor of 6.4."""
    mels = np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), MEL_BINS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    hz = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    rising, falling = (hz - left) / (center - left), (right - hz) / (right - center)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)


def log_mel(waveform: mx.array) -> mx.array:
    """Log-mel spectrogram (B, samples // 160 + 1, 64, 2) of `waveform` (B, samples, 2),
    16 kHz, float32: natural logarithms floored at ln(1e-5)."""
    samples, edge = waveform.shape[1], N_FFT // 2
    if samples <= edge:
        least = f"at least {edge + 1} (32 ms) are needed"
        raise UserError(f"the audio is too short: {samples} samples at 16 kHz, {least}")
    # Reflected at both ends, so that frames are centered on multiples of the hop.
    index = np.pad(np.arange(samples), edge, "reflect")
    frames = np.arange(0, samples + 1, HOP_LENGTH)[:, None] + np.arange(N_FFT)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    x = waveform.swapaxes(1, 2)[..., mx.array(index[frames])]  # (B, 2, T, N_FFT)
    magnitude = mx.abs(mx.fft.rfft(x * mx.array(window, mx.float32)))
    mel = magnitude @ mx.array(mel_filters(), mx.float32)
    return mx.log(mx.maximum(mel, 1e-5)).transpose(0, 2, 3, 1)


class CausalConv2d(nn.Module):
    """A zero-padded convolution over (B, time, mel, C) that is causal in time."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int = 3, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel_size, stride)
        low, extra = divmod(kernel_size - stride, 2)
        self.pad = (0, 0), (kernel_size - 1, 0), (low, low + extra), (0, 0)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, self.pad))


class ResBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.conv1 = CausalConv2d(n_in, n_out)
        self.conv2 = CausalConv2d(n_out, n_out)
        if n_in != n_out:
            self.nin_shortcut = CausalConv2d(n_in, n_out, kernel_size=1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.silu(rms_norm(x)))
        h = self.conv2(nn.silu(rms_norm(h)))
        return h + (self.nin_shortcut(x) if "nin_shortcut" in self else x)


class Upsample(nn.Module):
    """Double rows and bins, convolve, drop the first row: T to 2 T - 1 rows."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv2d(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))[:, 1:]


class Level(nn.Module):
    """Residual blocks at one resolution, then down- or upsampling, if any."""

    def __init__(self, n_in: int, n_out: int, num_blocks: int):
        super().__init__()
        widths = [n_in] + [n_out] * num_blocks
        self.block = [ResBlock(*pair) for pair in zip(widths, widths[1:])]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.block:
            x = block(x)
        resample = self.get("downsample") or self.get("upsample")
        return resample(x) if resample else x


class Encoder(nn.Module):
    """Log-mel (B, T, 64, 2) to means and log-variances (B, ceil(T / 4), 16, 2 C)."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        widths = [config.ch] + [config.ch * m for m in config.ch_mult]
        self.conv_in = CausalConv2d(2, widths[0])
        pairs, blocks = zip(widths, widths[1:]), config.num_res_blocks
        self.down = [Level(*pair, blocks) for pair in pairs]
        for level, n_out in zip(self.down[:-1], widths[1:]):
            level.downsample = CausalConv2d(n_out, n_out, stride=2)
        self.mid = {f"block_{i}": ResBlock(widths[-1], widths[-1]) for i in (1, 2)}
        self.conv_out = CausalConv2d(widths[-1], 2 * config.z_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for layer in (*self.down, *self.mid.values()):
            x = layer(x)
        return self.conv_out(nn.silu(rms_norm(x)))


class Decoder(nn.Module):
    """Latents (B, t, 16, C) to log-mel (B, 4 t - 3, 64, 2)."""

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = CausalConv2d(config.z_channels, widths[-1])
        self.mid = {f"block_{i}": ResBlock(widths[-1], widths[-1]) for i in (1, 2)}
        pairs, blocks = zip(widths[1:] + widths[-1:], widths), config.num_res_blocks + 1
        self.up = [Level(*pair, blocks) for pair in pairs]
        for level, n_out in zip(self.up[1:], widths[1:]):
            level.upsample = Upsample(n_out)
        self.conv_out = CausalConv2d(widths[0], 2)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for layer in (*self.mid.values(), *reversed(self.up)):
            x = layer(x)
        return self.conv_out(nn.silu(rms_norm(x)))


class AudioVAE(Component):
    """Log-mel to normalized latents and back; both directions are causal in time."""

    config_class = AudioVAEConfig

    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.per_channel_statistics = Statistics(config.z_channels, config.latent_bins)

    def encode(self, mel: mx.array) -> mx.array:
        """Log-mel (B, T, 64, 2) to normalized latents (B, ceil(T / 4), 16, C)."""
        means = self.encoder(mel)[..., : self.config.z_channels]
        return self.per_channel_statistics.normalize(means)

    def decode(self, latents: mx.array) -> mx.array:
        """Normalized latents (B, t, 16, C) to log-mel (B, 4 t - 3, 64, 2)."""
        return self.decoder(self.per_channel_statistics.denormalize(latents))
