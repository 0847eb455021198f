"""The architecture in PyTorch, for training only, with official tensor names and layouts."""

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


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rope(positions: torch.Tensor, max_pos: list[int], width: int, heads: int):
    """Cosine and sine (heads, T, width / heads / 2) for positions (axes, T)."""
    count = width // (2 * len(max_pos))
    device = positions.device
    bands = torch.linspace(0, 1, count, dtype=torch.float64, device=device)
    frequencies = (10000.0**bands * math.pi / 2).float()
    scaled = (
        2 * positions.float() / torch.tensor(max_pos, device=device).float()[:, None]
        - 1
    )
    angles = scaled[:, :, None] * frequencies
    angles = angles.permute(1, 2, 0).flatten(1)
    angles = F.pad(angles, (width // 2 - angles.shape[1], 0))
    angles = angles.unflatten(1, (heads, -1)).transpose(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, table) -> torch.Tensor:
    cos, sin = table
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Attention(nn.Module):
    """Multi-head attention with normed queries and keys and a gate for each head."""

    def __init__(self, width: int, context_width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.q_norm, self.k_norm = Norm(inner), Norm(inner)
        self.to_gate_logits = nn.Linear(width, heads)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x, context=None, rope_q=None, rope_k=None, bias=None):
        context = x if context is None else context
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (
                self.q_norm(self.to_q(x).float()),
                self.k_norm(self.to_k(context).float()),
                self.to_v(context),
            )
        )
        if rope_q is not None:
            q, k = rotate(q, rope_q), rotate(k, rope_q if rope_k is None else rope_k)
        if k.shape[2] > 256:
            bias = None if bias is None else bias[None, None, None]
            q, k, v = q.float(), k.float(), v.float()
            out = F.scaled_dot_product_attention(q, k, v, bias)
        else:  # on CPUs the gradient of the fused attention takes twice as long
            logits = (q @ k.mT).float() * q.shape[-1] ** -0.5
            logits = logits if bias is None else logits + bias
            out = logits.softmax(-1).to(v.dtype) @ v
        gate = 2 * torch.sigmoid(self.to_gate_logits(x))
        out = out.transpose(1, 2) * gate[..., None]
        return self.to_out[0](out.flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, 4 * width)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class ConnectorBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn1 = Attention(width, width, width, heads)
        self.ff = FeedForward(width)

    def forward(self, x, table, bias):
        x = x + self.attn1(rms_norm(x), rope_q=table, bias=bias)
        return x + self.ff(rms_norm(x))


class Connector(nn.Module):
    """Text features to the rows of a context at `positions`.

    Rows of tokens come first, then registers by position. Training may use a sample of the
    far positions with a `bias` for their number.
    """

    def __init__(
        self, width: int, heads: int, layers: int, registers: int, max_pos: int
    ):
        super().__init__()
        self.width, self.heads, self.max_pos = width, heads, max_pos
        # Nearly equal, so that attention separates words from registers early.
        alike, own = torch.rand(2, registers, width) * 2 - 1
        self.learnable_registers = nn.Parameter(alike[:1] + 0.1 * own)
        self.transformer_1d_blocks = nn.ModuleList(
            ConnectorBlock(width, heads) for _ in range(layers)
        )

    def forward(self, features, lengths, positions, bias=None):
        rows = self.learnable_registers[positions % len(self.learnable_registers)]
        n = features.shape[1]
        real = torch.arange(n, device=rows.device)[None] < lengths[:, None]
        front = torch.where(real[..., None], features.float(), rows[:n])
        x = torch.cat([front, rows[n:].expand(len(front), -1, -1)], 1)
        table = rope(positions[None], [self.max_pos], self.width, self.heads)
        for block in self.transformer_1d_blocks:
            x = block(x, table, bias)
        return rms_norm(x)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        frequencies = 10000 ** (-torch.arange(128, device=t.device) / 128)
        angles = t[..., None].float() * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], -1)
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class AdaLayerNormSingle(nn.Module):
    def __init__(self, width: int, rows: int):
        super().__init__()
        self.rows = rows
        self.emb = nn.Module()
        self.emb.timestep_embedder = TimestepEmbedder(width)
        self.linear = nn.Linear(width, rows * width)

    def forward(self, timestep: torch.Tensor):
        """Timesteps (B, T), already times 1000, to rows (B, T, rows, C) and (B, T, C)."""
        e = self.emb.timestep_embedder(timestep)
        return self.linear(F.silu(e)).unflatten(-1, (self.rows, -1)).float(), e.float()


def modulate(x, scale, shift):
    return x * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        v, a = c["width"], c["audio_width"]
        vh, ah = c["num_attention_heads"], c["audio_num_attention_heads"]
        self.attn1, self.attn2 = Attention(v, v, v, vh), Attention(v, v, v, vh)
        self.audio_attn1, self.audio_attn2 = Attention(a, a, a, ah), Attention(
            a, a, a, ah
        )
        self.audio_to_video_attn = Attention(v, a, a, ah)
        self.video_to_audio_attn = Attention(a, v, a, ah)
        self.ff, self.audio_ff = FeedForward(v), FeedForward(a)
        for name, rows, width in (
            ("scale_shift_table", 9, v),
            ("audio_scale_shift_table", 9, a),
            ("prompt_scale_shift_table", 2, v),
            ("audio_prompt_scale_shift_table", 2, a),
            ("scale_shift_table_a2v_ca_video", 5, v),
            ("scale_shift_table_a2v_ca_audio", 5, a),
        ):
            setattr(self, name, nn.Parameter(torch.randn(rows, width) * 0.02))

    def own(self, s, prefix, self_attention, text_attention):
        """Self-attention and text cross-attention of one stream."""
        rows = (getattr(self, prefix + "scale_shift_table") + s["rows"]).unbind(2)
        h = modulate(rms_norm(s["x"]), rows[1], rows[0])
        x = s["x"] + self_attention(h, rope_q=s["rope"]) * rows[2]
        q = modulate(rms_norm(x), rows[7], rows[6])
        table = getattr(self, prefix + "prompt_scale_shift_table") + s["prompt_rows"]
        context = modulate(s["context"], table[:, :, 1], table[:, :, 0])
        return x + text_attention(q, context, bias=s["bias"]) * rows[8], rows[3:6]

    def forward(self, video: dict, audio: dict, crossed: bool):
        vx, v_ff = self.own(video, "", self.attn1, self.attn2)
        ax, a_ff = self.own(audio, "audio_", self.audio_attn1, self.audio_attn2)
        if crossed:
            v = (self.scale_shift_table_a2v_ca_video[:4] + video["cross_rows"]).unbind(
                2
            )
            a = (self.scale_shift_table_a2v_ca_audio[:4] + audio["cross_rows"]).unbind(
                2
            )
            v_gate = self.scale_shift_table_a2v_ca_video[4] + video["cross_gate"]
            a_gate = self.scale_shift_table_a2v_ca_audio[4] + audio["cross_gate"]
            vn, an = rms_norm(vx), rms_norm(ax)
            to_video = self.audio_to_video_attn(
                modulate(vn, v[0], v[1]),
                modulate(an, a[0], a[1]),
                video["cross_rope"],
                audio["cross_rope"],
            )
            to_audio = self.video_to_audio_attn(
                modulate(an, a[2], a[3]),
                modulate(vn, v[2], v[3]),
                audio["cross_rope"],
                video["cross_rope"],
            )
            vx, ax = vx + to_video * v_gate, ax + to_audio * a_gate
        vx = vx + self.ff(modulate(rms_norm(vx), v_ff[1], v_ff[0])) * v_ff[2]
        ax = ax + self.audio_ff(modulate(rms_norm(ax), a_ff[1], a_ff[0])) * a_ff[2]
        return vx, ax


class Transformer(nn.Module):
    """Joint velocity of video tokens (B, T, C) and audio tokens (B, S, D), and the connectors.

    The velocity is noise minus data. `sigma` and `audio_sigma` are (B,), the timesteps
    (B, T) and (B, S) are sigma times the denoise mask, from 0 to 1.
    """

    def __init__(self, c: dict):
        super().__init__()
        self.c = c = dict(
            c,
            width=c["num_attention_heads"] * c["attention_head_dim"],
            audio_width=c["audio_num_attention_heads"] * c["audio_attention_head_dim"],
        )
        v, a = c["width"], c["audio_width"]
        for prefix, width, channels, heads in (
            ("", v, c["in_channels"], c["connector_num_attention_heads"]),
            (
                "audio_",
                a,
                c["audio_in_channels"],
                c["audio_connector_num_attention_heads"],
            ),
        ):
            for name, module in dict(
                patchify_proj=nn.Linear(channels, width),
                adaln_single=AdaLayerNormSingle(width, 9),
                prompt_adaln_single=AdaLayerNormSingle(width, 2),
                proj_out=nn.Linear(width, channels),
                scale_shift_table=nn.Parameter(torch.randn(2, width) * 0.02),
            ).items():
                setattr(self, prefix + name, module)
            connector = Connector(
                width,
                heads,
                c["connector_num_layers"],
                c["connector_num_learnable_registers"],
                c["connector_positional_embedding_max_pos"][0],
            )
            setattr(self, f"{prefix or 'video_'}embeddings_connector", connector)
        self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(v, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(a, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(v, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(a, 1)
        self.transformer_blocks = nn.ModuleList(
            Block(c) for _ in range(c["num_layers"])
        )
        for module in self.modules():
            if isinstance(module, AdaLayerNormSingle):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)
        # Gates start slightly open, so that blocks learn from the start.
        with torch.no_grad():
            for block in self.transformer_blocks:
                for prefix in ("", "audio_"):
                    getattr(block, prefix + "scale_shift_table")[[2, 5, 8]] += 0.5
                for name in ("video", "audio"):
                    getattr(block, f"scale_shift_table_a2v_ca_{name}")[4] += 0.5

    def stream(self, prefix, x, t, sigma, other_sigma, context, bias, positions):
        heads = self.c[prefix + "num_attention_heads"]
        width = self.c["audio_width" if prefix else "width"]
        max_pos = self.c[prefix + "positional_embedding_max_pos"]
        kind, gate = ("audio", "v2a") if prefix else ("video", "a2v")
        rows, embedded = getattr(self, prefix + "adaln_single")(1000 * t)
        cross = getattr(self, f"av_ca_{kind}_scale_shift_adaln_single")
        gate = getattr(self, f"av_ca_{gate}_gate_adaln_single")
        return dict(
            x=getattr(self, prefix + "patchify_proj")(x).float(),
            rows=rows,
            embedded=embedded,
            prompt_rows=getattr(self, prefix + "prompt_adaln_single")(
                1000 * sigma[:, None]
            )[0],
            cross_rows=cross(1000 * t)[0],
            cross_gate=gate(1000 * other_sigma[:, None])[0][:, :, 0],
            context=context,
            bias=bias,
            rope=rope(positions, max_pos, width, heads),
            cross_rope=rope(
                positions[:1],
                self.c["audio_positional_embedding_max_pos"],
                self.c["audio_width"],
                self.c["audio_num_attention_heads"],
            ),
        )

    def output(self, prefix, s):
        table = getattr(self, prefix + "scale_shift_table") + s["embedded"][:, :, None]
        h = F.layer_norm(s["x"], s["x"].shape[-1:], eps=1e-6)
        h = modulate(h, table[:, :, 1], table[:, :, 0])
        return getattr(self, prefix + "proj_out")(h).float()

    def forward(self, video: dict, audio: dict, crossed: bool = True):
        """Each stream is x, t, sigma, context, bias, positions (axes, tokens)."""
        v = self.stream("", other_sigma=audio["sigma"], **video)
        a = self.stream("audio_", other_sigma=video["sigma"], **audio)
        for block in self.transformer_blocks:
            v["x"], a["x"] = block(v, a, crossed)
        return self.output("", v), self.output("audio_", a)


class TextProjection(nn.Module):
    """All hidden states of a token, each RMS-normed, to the widths of the two streams."""

    def __init__(self, hidden: int, states: int, width: int, audio_width: int):
        super().__init__()
        self.hidden = hidden
        self.video_aggregate_embed = nn.Linear(hidden * states, width)
        self.audio_aggregate_embed = nn.Linear(hidden * states, audio_width)

    def forward(self, states: torch.Tensor):
        """States (B, T, D, layers) to features (B, T, width), (B, T, audio_width)."""
        x = states * torch.rsqrt(states.square().mean(2, keepdim=True) + 1e-6)
        x = x.flatten(2)
        return tuple(
            embed(x * (embed.out_features / self.hidden) ** 0.5)
            for embed in (self.video_aggregate_embed, self.audio_aggregate_embed)
        )


def video_positions(f: int, h: int, w: int, fps: float) -> torch.Tensor:
    """Middle time (s) and pixel of each latent's box, (3, f * h * w)."""
    start = (8 * torch.arange(f) - 7).clamp(min=0)
    end = 8 * torch.arange(f) + 1
    axes = (
        (start + end) / 2 / fps,
        32 * (torch.arange(h) + 0.5),
        32 * (torch.arange(w) + 0.5),
    )
    return torch.stack([g.flatten() for g in torch.meshgrid(*axes, indexing="ij")])


def audio_positions(tokens: int) -> torch.Tensor:
    """Middle time (s) of each token, (1, tokens)."""
    start = (4 * torch.arange(tokens) - 3).clamp(min=0)
    return ((start + 4 * torch.arange(tokens) + 1) / 2 * 0.01)[None]
