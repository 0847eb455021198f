"""The video VAE: a causal encoder and a non-causal decoder, both exact on a stream.

A layer turns an iterator of chunks (B, F, H, W, C), consecutive in time, into another
one. Its state between two chunks is in local variables of the call, and the clip ends
where the iterator ends. The frames do not depend on how a clip is cut into chunks.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, starmap
from typing import Callable, Iterator, Optional, Union

import mlx.core as mx
import mlx.nn as nn

from . import layers
from .base import Config, Trace, UserError, note, traced
from .conv import conv3d
from .layers import Component, Section, Shapes, Statistics, Stride, TimestepEmbedding

Chunks = Iterator[mx.array]
Pairs = Iterator[tuple[mx.array, mx.array]]
Layer = Callable[[Chunks], Chunks]

DEFAULT_TIMESTEP = "as trained"
LATENTS_PER_CHUNK = 2  # of the decoder: its widest weights are read half as often


@dataclass
class VideoVAEConfig(Config):
    """The `vae` section of a checkpoint's configuration: 2.0, 2.3, convolutional 2.5."""

    encoder_blocks: list[tuple[str, dict]]
    # Empty if there is only the encoder
    decoder_blocks: list[tuple[str, dict]] = field(default_factory=list)
    latent_channels: int = 128
    patch_size: int = 4
    encoder_base_channels: int = 128
    decoder_base_channels: int = 128
    timestep_conditioning: bool = True
    spatial_padding_mode: str = "reflect"  # of the decoder; the encoder pads zeros

    FIXED = {
        "_class_name": ("CausalVideoAutoencoder",),
        "dims": (3,),
        "in_channels": (3,),
        "out_channels": (3,),
        "scaling_factor": (1.0,),
        "norm_layer": ("pixel_norm",),
        "latent_log_var": ("uniform",),
        "spatial_padding_mode": ("reflect", "zeros"),
        "encoder_spatial_padding_mode": ("zeros",),
    }
    FIXED |= dict.fromkeys(
        ("use_quant_conv", "causal_decoder", "normalize_latent_channels"), (False,)
    )


# Stream helpers. `map` is used because, unlike a loop, it has no variable that would
# keep a frame while the next one is computed.


computing: deque[mx.array] = deque()


def materialize(x: mx.array) -> mx.array:
    """A copy that is being evaluated: a slice keeps its parent's buffer, a lazy array
    its graph. A GPU computes one while the next is prepared: each needs workspace."""
    x = mx.contiguous(x)
    mx.async_eval(x)
    computing.append(x)
    while len(computing) > (mx.default_device().type != mx.cpu):
        mx.eval(computing.popleft())
    return x


def split(x: mx.array) -> list[mx.array]:
    return mx.split(x, x.shape[1], axis=1)


def single_frames(chunks: Chunks) -> Chunks:
    return map(mx.contiguous, chain.from_iterable(map(split, chunks)))


def frames_at_once(pixels: int) -> int:
    """Single frames, or on a GPU up to 4 of fewer than 4096 pixels together: Metal
    convolves larger chunks faster (Winograd)."""
    gpu = mx.default_device().type != mx.cpu
    return min(math.ceil(4096 / pixels), 4) if gpu else 1


def few_frames(frames: Chunks) -> Chunks:
    """As many frames together as is fastest."""
    first = next(frames)
    size = frames_at_once(math.prod(first.shape[2:4]))
    frames = chain(iter([first]), frames)
    del first
    groups = iter(lambda: [*islice(frames, size)], [])
    yield from map(partial(mx.concatenate, axis=1), groups)


def residual_pairs(chunks: Chunks, branch: Layer) -> Pairs:
    """The branch's input and output, frame by frame; the output may lag behind."""
    waiting = deque()

    def enter(x: mx.array) -> mx.array:
        waiting.extend(split(x))
        return x

    def leave(y: mx.array) -> tuple[mx.array, mx.array]:
        x = [waiting.popleft() for _ in range(y.shape[1])]
        return mx.concatenate(x, axis=1), y

    return map(leave, branch(map(enter, chunks)))


# Layers


class Conv3d(nn.Module):
    """A 3x3x3 convolution. In front of the clip the causal one repeats the first frame
    twice; the other one repeats the first and the last frame once, and lags one frame
    behind its input. Of a `single` chunk nothing is kept for the next one."""

    def __init__(self, dim_in: int, dim: int, causal: bool, reflect: bool = False):
        super().__init__()
        self.causal, self.reflect = causal, reflect
        self.conv = nn.Conv3d(dim_in, dim, 3)

    def __call__(self, chunks: Chunks, single: bool = False) -> Chunks:
        tail = None  # the last two frames

        def window(x: mx.array) -> mx.array:
            nonlocal tail
            if tail is None:
                tail = mx.repeat(x[:, :1], 2 if self.causal else 1, axis=1)
            x = mx.concatenate([tail, x], axis=1)
            last = materialize(x if single else x[:, -2:])
            tail = None if single else last
            return x

        def last_window() -> Chunks:
            yield mx.concatenate([tail, tail[:, -1:]], axis=1)

        windows = filter(lambda x: x.shape[1] > 2, map(window, chunks))
        if not self.causal:
            windows = chain(windows, last_window())
        return map(self.convolve, windows)

    def convolve(self, x: mx.array) -> mx.array:
        if self.reflect:
            x = mx.concatenate([x[:, :, 1:2], x, x[:, :, -2:-1]], axis=2)
            x = mx.concatenate([x[..., 1:2, :], x, x[..., -2:-1, :]], axis=3)
        weight, bias = (self.conv[k].astype(x.dtype) for k in ("weight", "bias"))
        return conv3d(x, weight, padding=0 if self.reflect else 1) + bias


Conv = Callable[[int, int], Conv3d]


def norm_act(x: mx.array, shift_scale: Optional[mx.array] = None) -> mx.array:
    """PixelNorm, shift and scale (2, C) if any, SiLU."""
    x = layers.rms_norm(x, eps=1e-8)
    if shift_scale is not None:
        shift, scale = shift_scale.astype(x.dtype)
        x = x * (1 + scale) + shift
    return nn.silu(x)


class ResBlock(nn.Module):
    def __init__(self, dim: int, conv: Conv, conditioned: bool):
        super().__init__()
        self.conv1 = conv(dim, dim)
        self.conv2 = conv(dim, dim)
        if conditioned:
            self.scale_shift_table = mx.zeros((4, dim))

    def __call__(
        self, chunks: Chunks, embedding: Optional[mx.array], single: bool = False
    ) -> Chunks:
        shifts = None, None
        if embedding is not None:
            shifts = mx.split(self.scale_shift_table + embedding, 2)
        act1, act2 = (partial(norm_act, shift_scale=s) for s in shifts)

        def branch(chunks: Chunks) -> Chunks:
            chunks = self.conv1(map(act1, chunks), single)
            return self.conv2(map(act2, chunks), single)

        return starmap(mx.add, residual_pairs(chunks, branch))


class ResBlocks(nn.Module):
    """Residual blocks that share the timestep embedding, if any."""

    def __init__(self, dim: int, conv: Conv, num_layers: int, conditioned=False):
        super().__init__()
        self.res_blocks = [ResBlock(dim, conv, conditioned) for _ in range(num_layers)]
        if conditioned:
            self.time_embedder = TimestepEmbedding(4 * dim)

    def __call__(
        self, chunks: Chunks, time: Optional[mx.array] = None, single: bool = False
    ) -> Chunks:
        if time is not None:
            time = self.time_embedder.timestep_embedder(time).reshape(4, -1)
        for block in self.res_blocks:
            chunks = block(chunks, time, single)
        return chunks


class Downsample(nn.Module):
    """Space-to-depth of a convolution, plus group means of the input's space-to-depth."""

    def __init__(self, dim: int, conv: Conv, stride: Stride, multiplier: int):
        super().__init__()
        self.stride = stride
        self.dim = dim * multiplier
        self.conv = conv(dim, self.dim // math.prod(stride))

    def __call__(self, chunks: Chunks, single: bool = False) -> Chunks:
        # The first of 8k + 1 frames is doubled; only its chunk has an odd length.
        odd = lambda x: x[:, : x.shape[1] % self.stride[0]]
        chunks = map(lambda x: mx.concatenate([odd(x), x], axis=1), chunks)
        conv = partial(self.conv, single=single)
        return starmap(self.downsample, residual_pairs(chunks, conv))

    def downsample(self, x: mx.array, y: mx.array) -> mx.array:
        # (B, F, H, W, C p q r) to (B, F, H, W, dim, C p q r / dim)
        groups = mx.unflatten(layers.space_to_depth(x, self.stride), -1, (self.dim, -1))
        return groups.mean(-1) + layers.space_to_depth(y, self.stride)


class Upsample(nn.Module):
    """Depth-to-space of a convolution, plus that of the input if residual. From here on
    frames are many and large, so few are passed on at a time."""

    def __init__(
        self, dim: int, conv: Conv, stride: Stride, multiplier=1, residual=False
    ):
        super().__init__()
        self.stride, self.residual = stride, residual
        self.dim = dim // multiplier
        self.conv = conv(dim, self.dim * math.prod(stride))

    def __call__(self, chunks: Chunks) -> Chunks:
        chunks = starmap(self.upsample, residual_pairs(chunks, self.conv))
        # Of a clip doubled in time, the first frame is surplus.
        return few_frames(islice(single_frames(chunks), self.stride[0] - 1, None))

    def upsample(self, x: mx.array, y: mx.array) -> mx.array:
        y = layers.depth_to_space(y, self.stride)
        if self.residual:
            x = layers.depth_to_space(x, self.stride)
            y = y + mx.tile(x, self.dim // x.shape[-1])
        return y


# Encoder and decoder

UP: dict[str, Stride] = {
    "compress_time": (2, 1, 1),
    "compress_space": (1, 2, 2),
    "compress_all": (2, 2, 2),
}
DOWN = {f"{name}_res": stride for name, stride in UP.items()}


def build(blocks: list, dim: int, strides: dict, resample: type, conv: Conv, **res):
    """The layers of a configuration's list of blocks, and their output width."""
    made = []
    for name, options in blocks:
        options = {key: value for key, value in options.items() if value}
        known = {"num_layers"} if name == "res_x" else {"multiplier", "residual"}
        if name not in ("res_x", *strides) or options.keys() - known:
            raise UserError(f"video VAE: block {name} {options} is not implemented")
        if name == "res_x":
            made.append(ResBlocks(dim, conv, **res, **options))
        else:
            made.append(resample(dim, conv, strides[name], **options))
            dim = made[-1].dim
    return made, dim


def run(steps: dict[str, Layer], chunks: Chunks, trace: Trace) -> Chunks:
    """Run a stream through the layers in order, and trace each by its name."""
    for name, layer in steps.items():
        chunks = map(partial(traced, trace, name), layer(chunks))
    return chunks


class Encoder(nn.Module):
    """Patches to latents. The first chunk has 8k + 1 frames, every other one 8k."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        conv = partial(Conv3d, causal=True)
        dim = config.encoder_base_channels
        self.conv_in = conv(3 * config.patch_size**2, dim)
        made = build(config.encoder_blocks, dim, DOWN, Downsample, conv)
        self.down_blocks, dim = made
        # The last channel is the log-variance of all others.
        self.conv_out = conv(dim, config.latent_channels + 1)

    def __call__(self, chunks: Chunks, trace: Trace, single: bool = False) -> Chunks:
        steps = {"conv_in": self.conv_in}
        steps |= {f"down{i}": block for i, block in enumerate(self.down_blocks)}
        steps = {k: partial(layer, single=single) for k, layer in steps.items()}
        steps["act"] = partial(map, norm_act)
        steps["conv_out"] = partial(self.conv_out, single=single)
        return map(lambda x: x[..., :-1], run(steps, chunks, trace))


class Decoder(nn.Module):
    """Latents to patches."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        reflect = config.spatial_padding_mode == "reflect"
        conv = partial(Conv3d, causal=False, reflect=reflect)
        conditioned = config.timestep_conditioning
        blocks = config.decoder_blocks[::-1]
        dim = config.decoder_base_channels
        dim *= math.prod(options.get("multiplier", 1) for _, options in blocks)
        self.conv_in = conv(config.latent_channels, dim)
        made = build(blocks, dim, UP, Upsample, conv, conditioned=conditioned)
        self.up_blocks, dim = made
        self.conv_out = conv(dim, 3 * config.patch_size**2)
        if conditioned:
            self.timestep_scale_multiplier = mx.ones(())  # 916 in the released file
            self.last_time_embedder = TimestepEmbedding(2 * dim)
            self.last_scale_shift_table = mx.zeros((2, dim))

    def __call__(self, chunks: Chunks, timestep: float | None, trace: Trace) -> Chunks:
        time = shift_scale = None
        if timestep is not None:
            scaled = mx.array([timestep]) * self.timestep_scale_multiplier
            time = layers.timestep_embedding(scaled)
            shift_scale = self.last_time_embedder.timestep_embedder(time).reshape(2, -1)
            shift_scale = shift_scale + self.last_scale_shift_table
        steps = {"conv_in": self.conv_in}
        for i, block in enumerate(self.up_blocks):
            is_res = isinstance(block, ResBlocks)
            steps[f"up{i}"] = partial(block, time=time) if is_res else block
        steps["act"] = partial(map, partial(norm_act, shift_scale=shift_scale))
        steps["conv_out"] = self.conv_out
        return run(steps, chunks, trace)


class VideoVAE(Component):
    """Video (B, 8k + 1, 32h, 32w, 3) to normalized latents (B, k + 1, h, w, C) and back,
    in the input's dtype, whatever the weights' is."""

    config_class = VideoVAEConfig
    UNUSED = "per_channel_statistics.channel", "per_channel_statistics.mean-of-stds"

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        if config.decoder_blocks:
            self.decoder = Decoder(config)
        self.per_channel_statistics = Statistics(config.latent_channels)
        self.normalize = self.per_channel_statistics.normalize
        self.denormalize = self.per_channel_statistics.denormalize

    def encode(self, frames: mx.array, trace: Trace = None) -> mx.array:
        """Frames (B, F, H, W, 3) in [-1, 1] to normalized latents; those beyond 8k + 1 are
        skipped with a note, sides that 32 does not divide are a UserError."""
        stream = self.encode_stream(iter([frames]), trace, frames.shape[1] < 9)
        return mx.concatenate([*stream], axis=1)

    def encode_stream(
        self, chunks: Chunks, trace: Trace = None, single: bool = False
    ) -> Chunks:
        """`encode` for a clip in chunks of any length: yields single latent frames. A
        `single` one is all there is, which takes less memory."""
        patches = partial(layers.patchify, size=self.config.patch_size)
        latents = self.encoder(map(patches, latent_groups(chunks)), trace, single)
        return map(materialize, map(self.normalize, latents))

    def decode(self, latents: mx.array, *args, **kwargs) -> mx.array:
        """All frames of `decode_stream` in one array (B, 8F - 7, 32h, 32w, 3)."""
        return mx.concatenate([*self.decode_stream(latents, *args, **kwargs)], axis=1)

    def decode_stream(
        self,
        latents: mx.array,
        timestep: Union[float, None, str] = DEFAULT_TIMESTEP,
        noise_scale: float = 0.025,
        noise: Optional[mx.array] = None,
        bias: float = 0.0,
        trace: Trace = None,
    ) -> Chunks:
        """Normalized latents (B, F, h, w, C) to frames (B, 1, 32h, 32w, 3), float32 in
        [0, 1], in memory that does not grow with F.

        The decoder of the first distilled upload is conditioned on a timestep:
        DEFAULT_TIMESTEP is the reference's 0.05 for it and None, no conditioning, for all
        others. A conditioned decode mixes `noise`, of the latents' shape, into them by
        `noise_scale`. `bias` is added before clipping; released weights need 0.
        """
        conditioned = self.config.timestep_conditioning
        if timestep is DEFAULT_TIMESTEP:
            timestep = 0.05 if conditioned else None
        if timestep is not None and not conditioned:
            remove = f"remove timestep={timestep}"
            raise UserError(f"this decoder is not timestep-conditioned: {remove}")
        reflects = self.config.spatial_padding_mode == "reflect"
        if reflects and min(latents.shape[2:4]) < 2:
            least = "this decoder reflects borders and needs at least 64x64 pixels"
            raise UserError(f"the video is too small: {least}")
        if timestep is not None and noise_scale > 0:
            if noise is None or noise.shape != latents.shape:
                give = f"pass noise of shape {latents.shape} or noise_scale=0"
                raise UserError(f"this decoder is timestep-conditioned: {give}")
            mixed = noise_scale * noise + (1 - noise_scale) * latents
            latents = mixed.astype(latents.dtype)

        def image(x: mx.array) -> mx.array:
            x = layers.unpatchify(x, self.config.patch_size).astype(mx.float32)
            return materialize(mx.clip((x + 1) / 2 + bias, 0, 1))

        starts = range(0, latents.shape[1], LATENTS_PER_CHUNK)
        chunks = (latents[:, i : i + LATENTS_PER_CHUNK] for i in starts)
        patches = self.decoder(map(self.denormalize, chunks), timestep, trace)
        return map(image, single_frames(patches))

    @classmethod
    def infer_sizes(cls, section: Section, shapes: Shapes) -> Section:
        """The `vae` section with the encoder's width, taken from its tensors. (The reference
        takes the number of latent channels, which is equal in released files only.)"""
        width = shapes.get("encoder.conv_in.conv.bias")
        return {**section, **({"encoder_base_channels": width[0]} if width else {})}


def latent_groups(chunks: Chunks) -> Chunks:
    """Regroup a clip into the frames of each latent frame: 1, then 8 each."""
    frames, size = single_frames(chunks), 1
    while group := [*islice(frames, size)]:
        height, width = group[0].shape[2:4]
        if height % 32 or width % 32:
            sides = "both sides must be divisible by 32"
            raise UserError(f"cannot encode frames of {width}x{height} pixels: {sides}")
        if len(group) < size:
            skipped = f"the last {len(group)} frames are skipped"
            note(f"{skipped}: only 8k + 1 can be encoded")
            return
        yield mx.concatenate(group, axis=1)
        size = 8


def encoder_alone(section: Section) -> Section:
    """The `vae` section of an encoder whose VAE has a diffusion decoder."""
    config = {k: v for k, v in section["encoder"].items() if k != "out_channels"}
    config["encoder_blocks"] = config.pop("blocks")
    channels = section["latent_channels"]
    return config | {"latent_channels": channels, "timestep_conditioning": False}
