"""Count what the phases of a run compute, from configurations and headers."""

import math
import re
from functools import cache
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from .conditions import Condition, Stage
from .dit import DiTConfig, Pass, common_start
from .guidance import NO_GUIDANCE, guidance_passes
from .hub import File
from .latents import MEL_BINS, MEL_FRAMES_PER_TOKEN, Size
from .text import MAX_TOKENS
from .vae import LATENTS_PER_CHUNK, Conv3d, ResBlocks, VideoVAE, frames_at_once
from .vocoder import generators
from .weights import Checkpoint, Weights


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


def video_convs(vae: VideoVAE, size: Size, half: str, frames: int) -> Iterator[Conv]:
    """The convolutions of the video VAE's "decoder", or of its "encoder" for a clip, or an
    image, of so many frames."""
    up, model, patch = half == "decoder", vae[half], vae.config.patch_size
    (total, rows, columns), at_once = size.latent, LATENTS_PER_CHUNK
    if not up:
        total, at_once = frames, min(frames, 8)
        rows, columns = size.height // patch, size.width // patch

    def conv(layer: Conv3d, residual: bool = False) -> Conv:
        dim, *_, dim_in = layer.conv.weight.shape
        where = min(at_once, total), rows, columns
        return Conv(where, dim_in, dim, dim_in * residual, total)

    yield conv(model.conv_in)
    for block in model["up_blocks" if up else "down_blocks"]:
        if isinstance(block, ResBlocks):
            for inner in block.res_blocks:
                yield from (conv(inner.conv1), conv(inner.conv2, True))
            continue
        yield conv(block.conv, True)
        time, *space = block.stride
        if up:
            total = total * time - time + 1
            rows, columns = rows * space[0], columns * space[1]
            at_once = frames_at_once(rows * columns)
        else:
            total, at_once = math.ceil(total / time), math.ceil(at_once / time)
            rows, columns = rows // space[0], columns // space[1]
    yield conv(model.conv_out)


# Floating-point operations: 2 for each weight at each place where it is used


def counted(weights: Weights, places: Mapping[str, float]) -> float:
    """Operations of the matrices and kernels among the weights: each is used at the
    number of places of the first pattern that its name contains, or nowhere."""
    total = 0.0
    for key, w in weights.items():
        if w.ndim > 1 and key.endswith("weight"):
            found = (n for part, n in places.items() if re.search(part, key))
            total += 2 * w.size * next(found, 0)
    return total


def forward(c: DiTConfig, video: float, audio: float, keys: int, cross: bool) -> float:
    """Operations of a block for so many tokens of each stream and keys of the text."""
    total = 0.0
    for tokens, dim in ((video, c.video_dim), (audio, c.audio_dim)):
        # q, k, v, out; q, out of the text's attention; the feed-forward's two
        total += tokens * dim * (2 * 14 * dim + 4 * (tokens + keys))
    if cross:  # q and out of one direction, k and v of the other
        widths = video * c.video_dim + audio * c.audio_dim
        total += c.audio_dim * (8 * widths + 8 * video * audio)
    return total


def step(c: DiTConfig, stage: Stage, passes: list[Pass]) -> float:
    """Operations of a call of the transformer with these passes, over all tiles."""
    (video, audio), total = stage.tokens, 0.0
    segments = stage.prompts.count + (stage.prompts.nag is not None)
    for n, p in enumerate(passes):
        crossed = video * audio > 0 and not all(p.skips(0)[2:])
        blocks = c.num_layers - common_start(passes, n, c.num_layers)[1]
        total += blocks * forward(c, video, audio, MAX_TOKENS * segments, crossed)
    texts = segments - 1 + len({p.video_text for p in passes})
    dims = [c.video_dim] * (video > 0) + [c.audio_dim] * (audio > 0)
    total += texts * c.num_layers * 4 * MAX_TOKENS * sum(dim**2 for dim in dims)
    return total * math.prod(map(len, stage.spans))


def denoising(c: DiTConfig, stage: Stage) -> float:
    """Operations of a stage's steps; none of them are counted as cached."""
    passes, total = guidance_passes(stage.guidance), 0.0
    guided, plain = (step(c, stage, [*p]) for p in (passes.values(), [passes["cond"]]))
    low, high = stage.guidance_interval
    guides = [stage.guidance.get(k, NO_GUIDANCE) for k in stage.streams]
    twice = stage.sampler == "res_2s"  # the second time is never skipped
    for i, sigma in enumerate(stage.sigmas[:-1]):
        calls = twice + (i == 0 or not all(g.skips(i) for g in guides))
        total += calls * (guided if low <= sigma <= high else plain)
    return total + twice * (guided if low == 0 else plain)


def upsampling(c: dict[str, Any], weights: Weights, after: int) -> float:
    """Operations of an upsampler that makes so many latents."""
    before = after / (2 if c["temporal_upsample"] else c["spatial_scale"] ** 2)
    return counted(weights, {"post_|final": after, "": before})


def vocoding(config: dict[str, Any], weights: Weights, frames: int) -> float:
    """Operations of a vocoder for so many mel frames."""
    total = 0.0
    for prefix, c, lengths in generators(config, frames):
        ends = {f"^{prefix}conv_pre": lengths[0], f"^{prefix}conv_post": lengths[-1]}
        places, kernels = {}, len(c["resblock_kernel_sizes"])
        for i, (before, after) in enumerate(zip(lengths, lengths[1:])):
            places[rf"^{prefix}ups\.{i}\."] = before
            for n in range(kernels * i, kernels * (i + 1)):
                places[rf"^{prefix}resblocks\.{n}\."] = after
        total += counted(weights, places | ends)
    return total


def mel_convs(weights: Weights, tokens: int, half: str) -> float:
    """Operations of the audio VAE's encoder or decoder for so many latents."""
    levels = max(int(k.split(".")[2]) for k in weights if ".up." in k)
    lowest, places = tokens * MEL_BINS >> levels, {}
    for i in range(levels + 1):
        area = lowest * 4 ** (levels - i)
        places[rf"^{half}\.up\.{i}\.upsample"] = 4 * area
        places[rf"^{half}\.down\.{i}\.downsample"] = area / 4
        places[rf"^{half}\.(up|down)\.{i}\."] = area
    top = "conv_out" if half == "decoder" else "conv_in"
    ends = {rf"^{half}\.{top}": lowest * 4**levels, f"^{half}": lowest}
    return counted(weights, places | ends)


def diffusing(c: dict[str, Any], weights: Weights, size: Size) -> float:
    """Operations of the diffusion decoder: its layers and their windows of attention."""
    frames, rows, columns = size.latent
    places, total = {"^conv_in.weight": frames * rows * columns}, 0.0
    strides = [stride for stride, _ in c["upsamples"]]
    stages = zip(c["stage_channels"], c["stage_depths"], c["stage_kernels"])
    for i, (dim, depth, kernel) in enumerate(stages):
        area = frames * rows * columns
        last = i == len(strides)
        own = r"diff_blocks|conv_in_x_t|conv_out" if last else rf"det_stages\.{i}\."
        places |= {f"^({own})": area, rf"^upsamples\.{i}\.": area}
        total += 4 * depth * area * dim * math.prod(kernel)
        if not last:
            time, *space = strides[i]
            frames = frames * time - time + 1
            rows, columns = rows * space[0], columns * space[1]
    return total + counted(weights, places)


class Counter:
    """Counts what the phases of a model's runs compute; only headers are read."""

    def __init__(self, checkpoint: Checkpoint):
        self.config, self.shapes = checkpoint.config, cache(checkpoint.shapes)
        self.dit = DiTConfig.from_dict(self.config["transformer"])
        if "vae" in checkpoint.parts:
            self.vae = checkpoint.build("vae", self.shapes("vae"))

    def __call__(self, job: Any, encoder: list[File]) -> dict[str, float]:
        """By phase, in the order of a run, whose stages have their own names. The text
        encoder is in its own files or the model's."""
        found = {"text": self.text(job.texts, encoder)}
        found["inputs"] = sum(self.encoding(*item) for item in job.encoded)
        for stage in job.stages:
            work = denoising(self.dit, stage)
            if name := stage.upsampler:
                after = stage.part.tokens(stage.size)
                work += upsampling(self.config[name], self.shapes(name), after)
            found[stage.name] = found.get(stage.name, 0) + work
        windows = {s.window: s.size for s in job.stages}.values()
        if job.decodes_audio:
            found["audio"] = sum(self.sound(size.audio_tokens) for size in windows)
        if "video" in job.streams:
            found["video"] = sum(self.video(size, job.decoder) for size in windows)
        return {phase: work for phase, work in found.items() if work}

    def text(self, prompts: Sequence[str], encoder: list[File]) -> float:
        """About 4 letters are a token. Weights of 32 bits are 8 of 4 bits."""
        if not prompts:
            return 0.0
        tokens = sum(min(len(prompt) // 4 + 2, MAX_TOKENS) for prompt in prompts)
        tensors = [f.header[k] for f in encoder for k in f.keys if ".layers." in k]
        if not encoder:
            shapes = self.shapes("gemma")
            tensors = [("", w.shape) for k, w in shapes.items() if ".layers." in k]
        packed = {"U32": 8}
        sizes = (math.prod(s) * packed.get(kind, 1) for kind, s in tensors)
        places, shapes = len(prompts) * MAX_TOKENS, self.shapes("connectors")
        connecting = counted(shapes, {"projection": tokens, "": places})
        dims = (w.shape[0] for k, w in shapes.items() if k.endswith("to_q.weight"))
        attending = 4 * places * MAX_TOKENS * sum(dims)
        return 2 * tokens * sum(sizes) + connecting + attending

    def encoding(self, condition: Condition, size: Size) -> float:
        if condition.encoder == "audio_vae":
            return mel_convs(self.shapes("audio_vae"), size.audio_tokens, "encoder")
        frames = getattr(condition, "num_frames", 1)
        return sum(c.flops for c in video_convs(self.vae, size, "encoder", frames))

    def sound(self, tokens: int) -> float:
        mel = mel_convs(self.shapes("audio_vae"), tokens, "decoder")
        frames = MEL_FRAMES_PER_TOKEN * tokens
        return mel + vocoding(self.config["vocoder"], self.shapes("vocoder"), frames)

    def video(self, size: Size, decoder: str) -> float:
        if decoder == "vae":
            return sum(c.flops for c in video_convs(self.vae, size, "decoder", 1))
        return diffusing(self.config[decoder], self.shapes(decoder), size)
