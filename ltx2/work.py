"""Count the floating-point operations of a run's phases, from configs and headers."""

import math
import re
from typing import Any, Iterator, Mapping, NamedTuple

from .conditions import Stage
from .dit import DiTConfig, Pass, common_start
from .guidance import NO_GUIDANCE, guidance_passes
from .latents import Size
from .text import MAX_TOKENS
from .vae import LATENTS_PER_CHUNK, Conv3d, ResBlocks, VideoVAE, frames_at_once
from .weights import Checkpoint, Weights

# How often a weight of the audio VAE or vocoder is used for a token, on average: 46 times
# in 2.0, 35 from 2.3 on.
SOUND_PLACES = 40


class Conv(NamedTuple):
    """A 3x3x3 convolution of the video VAE: (frames, rows, columns) of a call, channels
    in and out, channels of the residual that waits for it, frames of all calls."""

    size: tuple[int, int, int]
    dim_in: int
    dim: int
    residual: int
    total: int

    @property
    def flops(self) -> float:
        return 54 * self.dim_in * self.dim * math.prod(self.size[1:]) * self.total


def video_convs(vae: VideoVAE, size: Size, half: str, frames: int) -> Iterator[Conv]:
    """The convolutions of half a video VAE; `frames` are encoded."""
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


# Floating-point operations: 2 for each use of a weight


def counted(weights: Weights, places: Mapping[str, float]) -> float:
    """Operations of weights, each used as often as its first matching pattern says."""
    total = 0.0
    for key, w in weights.items():
        if w.ndim > 1 and key.endswith("weight"):
            found = (n for part, n in places.items() if re.search(part, key))
            total += 2 * w.size * next(found, 0)
    return total


def forward(c: DiTConfig, video: float, audio: float, keys: int, cross: bool) -> float:
    """Operations of a block for these tokens of each stream and keys of the text."""
    total = 0.0
    for tokens, dim in ((video, c.video_dim), (audio, c.audio_dim)):
        # q, k, v, out; q, out of the text's attention; the feed-forward's two
        total += tokens * dim * (2 * 14 * dim + 4 * (tokens + keys))
    if cross:  # q and out of one direction, k and v of the other
        widths = video * c.video_dim + audio * c.audio_dim
        total += c.audio_dim * (8 * widths + 8 * video * audio)
    return total


def step(c: DiTConfig, stage: Stage, passes: list[Pass]) -> float:
    """Operations of a step with these passes, over all tiles."""
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
    """Operations of a stage's steps, as if none were cached."""
    passes, total = guidance_passes(stage.guidance), 0.0
    guided, plain = (step(c, stage, [*p]) for p in (passes.values(), [passes["cond"]]))
    low, high = stage.guidance_interval
    guides = [stage.guidance.get(k, NO_GUIDANCE) for k in stage.streams]
    twice = stage.sampler == "res_2s"  # the second time is never skipped
    for i, sigma in enumerate(stage.sigmas[:-1]):
        calls = twice + (i == 0 or not all(g.skips(i) for g in guides))
        total += calls * (guided if low <= sigma <= high else plain)
    return total + twice * (guided if low == 0 else plain)


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


def operations(job: Any, checkpoint: Checkpoint) -> dict[str, float]:
    """A job's operations by phase and stage, without upsamplers and audio encoders
    (below 2 % of a stage) and the text encoder, which waits for the disk."""
    config, shapes = checkpoint.config, checkpoint.shapes
    dit = DiTConfig.from_dict(config["transformer"])
    sizes = {stage.window: stage.whole for stage in job.stages}.values()
    vae = "vae" in checkpoint.parts and checkpoint.sketch("vae")
    flops = lambda *what: sum(conv.flops for conv in video_convs(vae, *what))
    encoded = [(size, c.num_encoded) for c, size in job.encoded if c.encoder == "vae"]
    found = {"text": counted(shapes("connectors"), {"": len(job.texts) * MAX_TOKENS})}
    found["inputs"] = sum(flops(size, "encoder", n) for size, n in encoded)
    for stage in job.stages:
        found[stage.name] = found.get(stage.name, 0) + denoising(dit, stage)
    if job.decodes_audio:
        places = SOUND_PLACES * sum(size.audio_tokens for size in sizes)
        found["audio"] = counted(shapes("vocoder"), {"": places})
        found["audio"] += counted(shapes("audio_vae"), {"^decoder": places})
    if "video" in job.streams and job.decoder == "vae":
        found["video"] = sum(flops(size, "decoder", 1) for size in sizes)
    elif "video" in job.streams:
        facts = config[job.decoder], shapes(job.decoder)
        found["video"] = sum(diffusing(*facts, size) for size in sizes)
    return {phase: work for phase, work in found.items() if work}
