"""The vocoders: HiFi-GAN (2.0), BigVGAN with bandwidth extension to 48 kHz (from 2.3).

Both compute in float32 whatever the weights' dtype: in bfloat16 the errors of about a
hundred convolutions in a row add up to 40 to 90 % of the spectra (the reference).
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .base import Config, UserError, hann_sinc
from .latents import HOP_LENGTH, MEL_BINS, SAMPLE_RATE
from .layers import Component, Section, Weights

MEL_RATE = SAMPLE_RATE // HOP_LENGTH  # frames of the audio VAE's mel per second
Activation = Callable[[int], nn.Module]  # built for a number of channels


@dataclass(kw_only=True)
class GeneratorConfig(Config):
    """The `vocoder` section of 2.0's configuration; from 2.3 on its `vocoder` part."""

    resblock: str
    upsample_initial_channel: int
    upsample_rates: list[int]
    upsample_kernel_sizes: list[int]
    resblock_kernel_sizes: list[int]
    resblock_dilation_sizes: list[list[int]]
    use_tanh_at_final: bool = True
    use_bias_at_final: bool = True
    apply_final_activation: bool = True

    FIXED = {"resblock": ("1", "AMP1"), "activation": ("snakebeta",), "stereo": (True,)}


@dataclass(kw_only=True)
class BWEConfig(GeneratorConfig):
    """The `bwe` part of the `vocoder` section from 2.3 on."""

    apply_final_activation: bool = False
    input_sampling_rate: int
    output_sampling_rate: int
    hop_length: int
    n_fft: int

    FIXED = GeneratorConfig.FIXED | {"num_mels": (MEL_BINS,)}
    UNUSED = frozenset({"win_size"})


def fir(x: mx.array, taps: mx.array) -> mx.array:
    """Correlate every channel of `x` (B, T, C) with the same `taps` (1, K, 1), without
    stride or padding: for this case Metal has a depthwise kernel."""
    channels = x.shape[-1]
    taps = mx.broadcast_to(taps, (channels, taps.size, 1))
    return mx.conv1d(x, taps, groups=channels)


def edge_pad(x: mx.array, before: int, after: int) -> mx.array:
    return mx.pad(x, [(0, 0), (before, after), (0, 0)], mode="edge")


def upsample(x: mx.array, taps: mx.array, ratio: int) -> mx.array:
    """Resample `x` (B, T, C) to (B, ratio T, C): zeros between samples, low-pass."""
    batch, length, channels = x.shape
    reach = taps.size // (2 * ratio)
    x = edge_pad(x, reach, reach)[:, :, None]
    x = mx.pad(x, [(0, 0), (0, 0), (0, ratio - 1), (0, 0)])
    x = fir(x.reshape(batch, -1, channels), ratio * taps[:, ::-1])
    return x[:, : ratio * length]


def downsample(x: mx.array, taps: mx.array) -> mx.array:
    """Resample `x` (B, 2 T, C) to (B, T, C): low-pass, every second sample."""
    return fir(edge_pad(x, (taps.size - 1) // 2, taps.size // 2), taps)[:, ::2]


@mx.compile
def snake_beta(x: mx.array, log_alpha: mx.array, log_beta: mx.array) -> mx.array:
    alpha, beta = (mx.exp(p.astype(mx.float32)) for p in (log_alpha, log_beta))
    return x + mx.square(mx.sin(x * alpha)) / (beta + 1e-9)


class AntiAliasedSnake(nn.Module):
    """Snake-beta at twice the rate, which keeps its overtones from aliasing."""

    def __init__(self, channels: int):
        super().__init__()
        self.act = {"alpha": mx.zeros(channels), "beta": mx.zeros(channels)}
        self.upsample = {"filter": mx.zeros((1, 12, 1))}
        self.downsample = {"lowpass": {"filter": mx.zeros((1, 12, 1))}}

    def __call__(self, x: mx.array) -> mx.array:
        x = upsample(x, self.upsample["filter"], 2)
        x = snake_beta(x, self.act["alpha"], self.act["beta"])
        return downsample(x, self.downsample["lowpass"]["filter"])


class ResBlock(nn.Module):
    """For each dilation x + conv(act(dilated conv(act(x))))."""

    def __init__(self, channels: int, size: int, dilations: list, act: Activation):
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            pad = dilation * (size - 1) // 2
            return nn.Conv1d(channels, channels, size, 1, pad, dilation)

        self.acts1 = [act(channels) for _ in dilations]
        self.convs1 = [conv(dilation) for dilation in dilations]
        self.acts2 = [act(channels) for _ in dilations]
        self.convs2 = [conv(1) for _ in dilations]

    def __call__(self, x: mx.array) -> mx.array:
        steps = zip(self.acts1, self.convs1, self.acts2, self.convs2)
        for act1, conv1, act2, conv2 in steps:
            x = x + conv2(act2(conv1(act1(x))))
        return x


class Vocoder(Component):
    """Log-mel (B, T, 64, 2) to waveform (B, samples, 2), float32 at `sample_rate`."""

    sample_rate: int
    UNUSED = ("mel_stft.stft_fn.inverse_basis",)

    @classmethod
    def build(cls, section: Section) -> nn.Module:
        if "bwe" not in section:
            return Generator(GeneratorConfig.from_dict(section))
        base = GeneratorConfig.from_dict(section.get("vocoder", {}))
        return VocoderWithBWE(base, BWEConfig.from_dict(section["bwe"]))

    @classmethod
    def sanitize(cls, weights: Weights) -> Weights:
        """Official tensors, without the leading `vocoder.`."""
        # Convolutions are (O, I, K), transposed ones (I, O, K).
        turn = lambda k, w: w.swapaxes(0, 1) if "ups." in k and w.ndim > 2 else w
        return super().sanitize({k: turn(k, w) for k, w in weights.items()})


class Generator(Vocoder):
    """HiFi-GAN (resblock "1") or BigVGAN ("AMP1"): log-mel to waveform."""

    def __init__(self, config: GeneratorConfig, mel_rate: int = MEL_RATE):
        super().__init__()
        self.config = config
        self.sample_rate = mel_rate * math.prod(config.upsample_rates)
        snake = config.resblock == "AMP1"
        leaky_relu = lambda channels: nn.LeakyReLU(0.1)
        activation = AntiAliasedSnake if snake else leaky_relu
        channels = config.upsample_initial_channel
        self.conv_pre = nn.Conv1d(2 * MEL_BINS, channels, 7, padding=3)
        self.act_ups = nn.Identity() if snake else leaky_relu(channels)
        sizes, dilations = config.resblock_kernel_sizes, config.resblock_dilation_sizes
        kernels = list(zip(sizes, dilations))
        self.ups, self.resblocks = [], []
        for rate, size in zip(config.upsample_rates, config.upsample_kernel_sizes):
            pad = (size - rate) // 2
            up = nn.ConvTranspose1d(channels, channels // 2, size, rate, pad)
            self.ups.append(up)
            channels //= 2
            self.resblocks += [ResBlock(channels, *k, activation) for k in kernels]
        # HiFi-GAN's last slope is PyTorch's default instead of 0.1.
        self.act_post = AntiAliasedSnake(channels) if snake else nn.LeakyReLU(0.01)
        bias = config.use_bias_at_final
        self.conv_post = nn.Conv1d(channels, 2, 7, padding=3, bias=bias)

    def __call__(self, mel: mx.array) -> mx.array:
        """Log-mel (B, T, 64, 2) to waveform (B, T * prod(upsample_rates), 2), float32."""
        x = mel.astype(mx.float32).swapaxes(2, 3).flatten(2)  # (B, T, 2 * 64)
        x = self.conv_pre(x)
        n = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(self.act_ups(x))
            x = sum(block(x) for block in self.resblocks[n * i : n * (i + 1)]) / n
        x = self.conv_post(self.act_post(x))
        if not self.config.apply_final_activation:
            return x
        return mx.tanh(x) if self.config.use_tanh_at_final else mx.clip(x, -1, 1)


def generators(section: Section, frames: int) -> Iterator[tuple[Section, list[int]]]:
    """Of each generator in a `vocoder` section, for so many mel frames: its configuration
    and its length before and after each upsampling."""
    hop = section.get("bwe", {}).get("hop_length", 1)
    for c in (section["vocoder"], section["bwe"]) if "bwe" in section else (section,):
        lengths = [*accumulate(c["upsample_rates"], mul, initial=frames)]
        yield c, lengths
        frames = lengths[-1] // hop


class VocoderWithBWE(Vocoder):
    """BigVGAN at 16 kHz, resampled, plus the high band that a second one generates."""

    def __init__(self, config: GeneratorConfig, bwe: BWEConfig):
        super().__init__()
        self.vocoder = Generator(config)
        self.bwe_generator = Generator(bwe, bwe.input_sampling_rate // bwe.hop_length)
        rates = self.vocoder.sample_rate, self.bwe_generator.sample_rate
        expected = bwe.input_sampling_rate, bwe.output_sampling_rate
        if rates != expected:
            says = f"its config says {expected} Hz, its layers produce {rates} Hz"
            raise UserError(f"vocoder: {says}")
        self.sample_rate = rates[1]
        self.ratio = rates[1] // rates[0]
        self.hop_length = bwe.hop_length
        bins = bwe.n_fft // 2 + 1
        self.mel_stft = {
            "mel_basis": mx.zeros((MEL_BINS, bins)),
            "stft_fn": {"forward_basis": mx.zeros((2 * bins, bwe.n_fft, 1))},
        }

    def log_mel(self, waveform: mx.array) -> mx.array:
        """Causal log-mel of `waveform` (B, samples, 2): (B, samples / hop, 64, 2)."""
        batch, samples, channels = waveform.shape
        basis = self.mel_stft["stft_fn"]["forward_basis"]
        x = waveform.swapaxes(1, 2).reshape(batch * channels, samples, 1)
        # The basis is a DFT; zeros in front, n_fft - hop of them, make it causal.
        x = mx.pad(x, [(0, 0), (basis.shape[1] - self.hop_length, 0), (0, 0)])
        real, imag = mx.split(mx.conv1d(x, basis, self.hop_length), 2, axis=-1)
        magnitude = mx.sqrt(mx.square(real) + mx.square(imag))
        mel = mx.log(mx.maximum(magnitude @ self.mel_stft["mel_basis"].T, 1e-5))
        return mel.reshape(batch, channels, -1, MEL_BINS).transpose(0, 2, 3, 1)

    def __call__(self, mel: mx.array) -> mx.array:
        """Log-mel (B, T, 64, 2) to waveform (B, 480 T, 2), float32 in [-1, 1]."""
        waveform = self.vocoder(mel)
        residual = self.bwe_generator(self.log_mel(waveform))
        return mx.clip(self.resample(waveform) + residual, -1, 1)

    def resample(self, waveform: mx.array) -> mx.array:
        """To the output rate; the cutoff is torchaudio's, 0.99 of half the input rate."""
        time = np.arange(-7 * self.ratio, 7 * self.ratio + 1) / self.ratio * 0.99
        taps = mx.array(hann_sinc(time) * 0.99 / self.ratio, mx.float32)
        return upsample(waveform, taps[None, :, None], self.ratio)
