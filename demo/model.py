"""The autoencoders and the vocoder in PyTorch, for training only, with official tensor names
and layouts. (The transformer is trained as the product has it: transformer.py.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def pixel_norm(x: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Divide each position by the root mean square of its channels (axis 1)."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)


class Conv3d(nn.Module):
    """3x3x3; repeats the first frame (twice if causal, else once, and the last frame once)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, padding=(0, 1, 1))

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        before, after = (2, 0) if causal else (1, 1)
        parts = [x[:, :, :1]] * before + [x] + [x[:, :, -1:]] * after
        return self.conv(torch.cat(parts, 2))


class ResBlock3d(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = Conv3d(width, width)
        self.conv2 = Conv3d(width, width)

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        h = self.conv1(F.silu(pixel_norm(x)), causal)
        return x + self.conv2(F.silu(pixel_norm(h)), causal)


class ResStack3d(nn.Module):
    def __init__(self, width: int, num_layers: int):
        super().__init__()
        self.res_blocks = nn.ModuleList(ResBlock3d(width) for _ in range(num_layers))

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        for block in self.res_blocks:
            x = block(x, causal)
        return x


STRIDES = {"space": (1, 2, 2), "time": (2, 1, 1), "all": (2, 2, 2)}


def space_to_depth(x: torch.Tensor, stride: tuple[int, int, int]) -> torch.Tensor:
    """b c (d p) (h q) (w r) -> b (c p q r) d h w."""
    b, c, d, h, w = x.shape
    p, q, r = stride
    x = x.reshape(b, c, d // p, p, h // q, q, w // r, r)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, c * p * q * r, d // p, h // q, w // r)


def depth_to_space(x: torch.Tensor, stride: tuple[int, int, int]) -> torch.Tensor:
    """b (c p q r) d h w -> b c (d p) (h q) (w r), without the first frame if p is 2."""
    b, c, d, h, w = x.shape
    p, q, r = stride
    x = x.reshape(b, c // (p * q * r), p, q, r, d, h, w)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // (p * q * r), d * p, h * q, w * r)[:, :, p - 1 :]


class Downsample3d(nn.Module):
    def __init__(self, width: int, stride: tuple[int, int, int], multiplier: int):
        super().__init__()
        self.stride = stride
        self.width = width * multiplier
        self.conv = Conv3d(width, self.width // (stride[0] * stride[1] * stride[2]))

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        if self.stride[0] == 2:
            x = torch.cat([x[:, :, :1], x], 2)
        skip = space_to_depth(x, self.stride)
        skip = skip.unflatten(1, (self.width, -1)).mean(2)
        return space_to_depth(self.conv(x, causal), self.stride) + skip


class Upsample3d(nn.Module):
    def __init__(self, width: int, stride: tuple[int, int, int], multiplier: int):
        super().__init__()
        self.stride = stride
        volume = stride[0] * stride[1] * stride[2]
        self.repeats = volume // multiplier
        self.conv = Conv3d(width, width * volume // multiplier)

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        skip = depth_to_space(x, self.stride).repeat(1, self.repeats, 1, 1, 1)
        return depth_to_space(self.conv(x, causal), self.stride) + skip


class VideoEncoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width = config["encoder_base_channels"]
        self.conv_in = Conv3d(48, width)
        self.down_blocks = nn.ModuleList()
        for kind, options in config["encoder_blocks"]:
            if kind == "res_x":
                self.down_blocks.append(ResStack3d(width, options["num_layers"]))
            else:
                stride = STRIDES[kind.split("_")[1]]
                block = Downsample3d(width, stride, options["multiplier"])
                self.down_blocks.append(block)
                width = block.width
        self.conv_out = Conv3d(width, config["latent_channels"] + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, f, h, w = x.shape
        x = x.reshape(b, c, f, h // 4, 4, w // 4, 4).permute(0, 1, 6, 4, 2, 3, 5)
        x = self.conv_in(x.reshape(b, 48, f, h // 4, w // 4), True)
        for block in self.down_blocks:
            x = block(x, True)
        return self.conv_out(F.silu(pixel_norm(x)), True)[:, :-1]


class VideoDecoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width = config["decoder_base_channels"]
        for _, options in config["decoder_blocks"]:
            width *= options.get("multiplier", 1)
        self.conv_in = Conv3d(config["latent_channels"], width)
        self.up_blocks = nn.ModuleList()
        for kind, options in reversed(config["decoder_blocks"]):
            if kind == "res_x":
                self.up_blocks.append(ResStack3d(width, options["num_layers"]))
            else:
                stride = STRIDES[kind.split("_")[1]]
                self.up_blocks.append(Upsample3d(width, stride, options["multiplier"]))
                width //= options["multiplier"]
        self.conv_out = Conv3d(width, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x, False)
        for block in self.up_blocks:
            x = block(x, False)
        x = self.conv_out(F.silu(pixel_norm(x)), False)
        b, _, f, h, w = x.shape
        x = x.reshape(b, 3, 4, 4, f, h, w).permute(0, 1, 4, 5, 3, 6, 2)
        return x.reshape(b, 3, f, h * 4, w * 4)


class Statistics(nn.Module):
    """Mean and standard deviation of each latent channel."""

    def __init__(self, channels: int, axis: int):
        super().__init__()
        self.axis = axis
        self.register_buffer("mean-of-means", torch.zeros(channels))
        self.register_buffer("std-of-means", torch.ones(channels))

    def measure(self, x: torch.Tensor):
        """Compute the statistics of latents."""
        channels = x.movedim(self.axis, 0).flatten(1)
        self.get_buffer("mean-of-means").copy_(channels.mean(1))
        self.get_buffer("std-of-means").copy_(channels.std(1))

    def shaped(self, x: torch.Tensor) -> list[torch.Tensor]:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return [self.get_buffer(f"{n}-of-means").view(shape) for n in ("mean", "std")]

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = self.shaped(x)
        return (x - mean) / std

    def denormalize(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = self.shaped(x)
        return x * std + mean


class VideoVAE(nn.Module):
    """Frames (B, 3, F, H, W) in [-1, 1] to and from latents (B, C, f, h, w)."""

    def __init__(self, config: dict):
        super().__init__()
        self.encoder = VideoEncoder(config)
        self.decoder = VideoDecoder(config)
        self.per_channel_statistics = Statistics(config["latent_channels"], 1)


class Conv2d(nn.Module):
    """Causal in time (axis 2), centered over mel bins (axis 3)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3):
        super().__init__()
        self.pad = (kernel // 2, kernel // 2, kernel - 1, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, self.pad))


class ResBlock2d(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = Conv2d(inputs, outputs)
        self.conv2 = Conv2d(outputs, outputs)
        self.nin_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(pixel_norm(x, 1e-6)))
        h = self.conv2(F.silu(pixel_norm(h, 1e-6)))
        return (self.nin_shortcut(x) if self.nin_shortcut is not None else x) + h


class Downsample2d(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 2, 0)))


class Upsample2d(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv2d(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))[:, :, 1:]


class AudioMiddle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1 = ResBlock2d(width, width)
        self.block_2 = ResBlock2d(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.block_1(x))


class AudioLevel(nn.Module):
    def __init__(self, inputs: int, outputs: int, num_blocks: int, **resample):
        super().__init__()
        widths = [inputs] + [outputs] * num_blocks
        self.block = nn.ModuleList(
            ResBlock2d(*pair) for pair in zip(widths, widths[1:])
        )
        for name, module in resample.items():
            setattr(self, name, module)
        self.last = next(iter(resample), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.last)(x) if self.last else x


class AudioEncoder(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        widths = [c["ch"] * m for m in c["ch_mult"]]
        self.conv_in = Conv2d(c["in_channels"], c["ch"])
        self.down = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip([c["ch"]] + widths, widths)):
            more = {"downsample": Downsample2d(outputs)} if i < len(widths) - 1 else {}
            self.down.append(AudioLevel(inputs, outputs, c["num_res_blocks"], **more))
        self.mid = AudioMiddle(widths[-1])
        self.conv_out = Conv2d(widths[-1], 2 * c["z_channels"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.conv_out(F.silu(pixel_norm(self.mid(x), 1e-6)))
        return x[:, : x.shape[1] // 2]


class AudioDecoder(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        widths = [c["ch"] * m for m in c["ch_mult"]]
        self.conv_in = Conv2d(c["z_channels"], widths[-1])
        self.mid = AudioMiddle(widths[-1])
        self.up = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            more = {"upsample": Upsample2d(outputs)} if i > 0 else {}
            self.up.append(AudioLevel(inputs, outputs, c["num_res_blocks"] + 1, **more))
        self.conv_out = Conv2d(widths[0], c["out_ch"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(pixel_norm(x, 1e-6)))


class AudioVAE(nn.Module):
    """Log-mels (B, 2, T, 64) to and from latents (B, C, t, 16)."""

    def __init__(self, config: dict):
        super().__init__()
        section = config["model"]["params"]["ddconfig"]
        self.encoder = AudioEncoder(section)
        self.decoder = AudioDecoder(section)
        self.per_channel_statistics = Statistics(section["z_channels"] * 16, 2)

    def tokens(self, mel: torch.Tensor) -> torch.Tensor:
        """Latents as tokens (B, t, C * 16), not normalized."""
        return self.encoder(mel).transpose(1, 2).flatten(2)

    def mel(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens, not normalized, to log-mels."""
        return self.decoder(tokens.unflatten(2, (-1, 16)).transpose(1, 2))


def mel_filters(rate=16000, n_fft=1024, bins=64, top=8000.0) -> torch.Tensor:
    """Slaney-scale, slaney-normalized triangles (n_fft / 2 + 1, bins)."""
    step, knee = 200 / 3, 1000.0
    log_step = math.log(6.4) / 27

    def to_hertz(mel):
        above = knee * torch.exp(log_step * (mel - knee / step))
        return torch.where(mel < knee / step, mel * step, above)

    highest = knee / step + math.log(top / knee) / log_step
    edges = to_hertz(torch.linspace(0, highest, bins + 2, dtype=torch.float64))
    frequency = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)[
        :, None
    ]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (edges[2:] - edges[:-2])).float()


def log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """(B, channels, samples) at 16 kHz to (B, channels, T, 64)."""
    b, c, n = waveform.shape
    spectrum = torch.stft(
        waveform.reshape(b * c, n),
        1024,
        hop_length=160,
        window=torch.hann_window(1024, device=waveform.device),
        return_complex=True,
    ).abs()
    mel = spectrum.transpose(1, 2) @ mel_filters().to(waveform.device)
    return mel.clamp(min=1e-5).log().unflatten(0, (b, c))


class VocoderBlock(nn.Module):
    def __init__(self, width: int, kernel: int, dilations: list[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel // 2))
            for d in dilations
        )
        self.convs2 = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in dilations
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2):
            x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Vocoder(nn.Module):
    """HiFi-GAN: log-mels (B, 2, T, 64) to a waveform (B, 2, T * prod(rates)).

    Left and right are computed separately with the same weights, because a network that
    mixes them learns panning slowly.
    """

    def __init__(self, c: dict):
        super().__init__()
        width = c["upsample_initial_channel"] // 2
        self.conv_pre = nn.Conv1d(64, width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(c["upsample_rates"], c["upsample_kernel_sizes"]):
            padding = (kernel - rate) // 2
            self.ups.append(
                nn.ConvTranspose1d(width, width // 2, kernel, rate, padding)
            )
            width //= 2
            for k, d in zip(c["resblock_kernel_sizes"], c["resblock_dilation_sizes"]):
                self.resblocks.append(VocoderBlock(width, k, d))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def both_ears(self) -> dict[str, torch.Tensor]:
        """The official stereo tensors: these weights for each channel, zeros between channels."""
        tensors = {}
        for name, x in self.state_dict().items():
            pair = torch.zeros(2, x.shape[0], 2, *x.shape[1:])
            pair[0, :, 0] = pair[1, :, 1] = x
            tensors[name] = (
                x.repeat(2) if x.ndim == 1 else pair.flatten(2, 3).flatten(0, 1)
            )
        return tensors

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = self.conv_pre(mel.transpose(2, 3).flatten(0, 1))
        kinds = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            blocks = self.resblocks[i * kinds : (i + 1) * kinds]
            x = sum(block(x) for block in blocks) / kinds
        x = torch.tanh(self.conv_post(F.leaky_relu(x, 0.01)))
        return x.unflatten(0, (-1, 2)).squeeze(2)
