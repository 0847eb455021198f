"""Estimate the peak memory of each phase before weights are loaded.

A phase needs its weights, whose sizes are in the files' headers, and some copies of its
widest tensor. In pairs of copies the first was measured on MLX's CPU backend, which stores
attention scores and unfolds convolutions; the second is an estimate for GPUs.
"""

import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import mlx.core as mx

from .audio_vae import MEL_BINS
from .base import UserError, table
from .chips import this_chip
from .conditions import Stage
from .conv import held
from .diffusion_decoder import group_size
from .dit import DiTConfig
from .guidance import guidance_passes
from .hub import DTYPES, File
from .latents import MEL_FRAMES_PER_TOKEN, Size
from .request import Request
from .text import MAX_TOKENS, TextConfig
from .upsampler import UpsamplerConfig
from .vocoder import generators
from .weights import FLOAT32, Checkpoint
from .work import video_convs

FLOAT = 4  # bytes of float32, in which encoders and decoders compute
# How many copies of the widest tensor exist at once, on the CPU and on a GPU.
UPSAMPLER = (24, 6)  # more than its convolutions need; on the CPU of the padded clip
SPECTRAL = (90, 12)  # the audio VAE, and on a GPU HiFi-GAN
BIGVGAN = (215, 30)
TIGHT = 3 / 4  # memory is tight above this part of the limit
# Copies that a block of the transformer keeps for its backward pass, of the states of all
# tokens, of those of the text and of the scores of its attentions (which are not fused while
# they are differentiated), and of the scores while it is differentiated: on the CPU.
KEPT, DURING = (38, 5, 1.2), 1.3
# Float32 copies of the factors: with gradients and moments in a step, while sampling.
FACTORS = 6, 3
IN_FLIGHT = 16  # parts of weights that are dequantized at once, with their copies
AHEAD = 2  # copies of a frame that the diffusion decoder computes ahead


@dataclass(frozen=True)
class Footprint:
    """Bytes of weights and buffers; streaming saves the `streamable` ones."""

    weights: int
    buffers: float
    streamable: int = 0

    def total(self, streamed: bool = False) -> float:
        return self.weights + self.buffers - self.streamable * streamed


Phases = Mapping[str, Footprint]


@dataclass(frozen=True)
class MemoryPlan:
    """What each phase needs, what is available, and whether blocks are streamed."""

    phases: Phases
    limit: int
    streamed: bool = False
    suggestion: str = ""  # what to do if it does not fit

    @property
    def peak(self) -> tuple[float, str]:
        """The largest need, and its phase."""
        return max((n.total(self.streamed), phase) for phase, n in self.phases.items())

    @property
    def fits(self) -> bool:
        return self.peak[0] <= self.limit

    @property
    def keeps_transformer(self) -> bool:
        """Whether the transformer fits next to each of the other phases."""
        apart = {"text", "inputs", "audio", "video"}
        held = max(n.weights for k, n in self.phases.items() if k not in apart)
        rest = max((self.phases[k].total() for k in apart & {*self.phases}), default=0)
        return not self.streamed and held + rest <= self.limit

    def check(self) -> None:
        """UserError if there is not enough memory."""
        if not self.fits:
            need, phase = f"{self.peak[0] / 1e9:.2f} GB", self.peak[1]
            there = f"{self.limit / 1e9:.2f} GB are available"
            raise UserError(f"{phase} needs {need} but {there}; {self.suggestion}")

    def __str__(self) -> str:
        rows = []
        for phase, need in self.phases.items():
            total = need.total(self.streamed)
            parts = (total - need.buffers, need.buffers, total)
            rows.append((phase, *(part / 1e9 for part in parts)))
        how = "read block by block" if self.streamed else "held in memory"
        heads = "GB by phase", "weights", "buffers", "peak"
        limit = f"{self.limit / 1e9:.2f} GB available; the transformer is {how}"
        return f"{table(heads, rows)}\n{limit}"


def planned(phases: Phases, limit: int, low_memory: Optional[bool]) -> MemoryPlan:
    """A plan, streamed if `low_memory`, or if that is None and it does not fit."""
    must = low_memory is None and not MemoryPlan(phases, limit).fits
    return MemoryPlan(phases, limit, bool(low_memory) or must)


def joined(plans: Iterable[MemoryPlan], low_memory: Optional[bool]) -> MemoryPlan:
    """The plan of several jobs in one run."""
    phases: dict[str, Footprint] = {}
    for plan in plans:
        for phase, need in plan.phases.items():
            phases[phase] = max(phases.get(phase, need), need, key=Footprint.total)
    return planned(phases, plan.limit, low_memory)


def suggest_smaller(r: Request, fits: Callable[[Request], bool]) -> str:
    """Find what fits: windows, a shorter or a smaller video, or say what may help."""
    short = (n for n in (97, 65, 41) if n < r.num_frames)  # with 25 carried frames
    windows = next((n for n in short if fits(replace(r, chunk_frames=n))), None)
    found = [f"it fits in windows: --chunk-frames {windows}"] if windows else []
    lengths = [r.num_frames]
    while lengths[-1] > 1:
        lengths.append((lengths[-1] - 1) // 16 * 8 + 1)
    smaller = [*product((1, 2, 4), lengths)][1:]  # the first is the request
    for part, frames in smaller if r.video is None else ():
        height, width = (max(n // part // 64, 1) * 64 for n in (r.height, r.width))
        if fits(replace(r, height=height, width=width, num_frames=frames)):
            found.append(f"{width}x{height} with {frames} frames would fit")
            return ", or ".join(found)
    instead = "try a lower-bit model (convert.py --quantize) or a smaller video"
    return found[0] if found else instead


def available() -> int:
    """Bytes that may be used: what Metal recommends, a GPU's memory, or the RAM."""
    device = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory"):
        if key in device:
            return device[key]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def limits(plan: MemoryPlan) -> Iterator[None]:
    """Make MLX wait at the plan's limit. Wire memory only where it is tight: wiring and
    releasing much of it has crashed macOS (mlx issue 3186)."""
    peak, before = plan.peak[0], mx.set_memory_limit(plan.limit)
    tight = mx.metal.is_available() and peak > TIGHT * plan.limit
    wired = mx.set_wired_limit(int(min(peak, plan.limit))) if tight else 0
    try:
        yield
    finally:
        mx.set_memory_limit(before)
        if tight:
            mx.set_wired_limit(wired)


class Estimator:
    """Estimates what a model's phases need; headers are read once."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype, gpu=None):
        self.config, self.dtype = checkpoint.config, dtype
        self.gpu = mx.default_device().type != mx.cpu if gpu is None else gpu
        # With 16 bits the CPU computes some tensors in float32.
        self.item = dtype.size if self.gpu else max(dtype.size, 3)
        self.size, self.streamable = {}, {}
        for name in checkpoint.components:
            tensors = checkpoint.shapes(name, mx.float32 if name in FLOAT32 else dtype)
            layers = layer_sizes({k: w.nbytes for k, w in tensors.items()})
            self.size[name] = sum(layers.values())
            self.streamable[name] = streamable(layers, self.gpu)
            if name == "vae":  # one half is used at a time
                self.vae = checkpoint.sketch(name)
                for half, other in (("vae.encoder", "decoder."), ("vae", "encoder.")):
                    used = (w for k, w in tensors.items() if not k.startswith(other))
                    self.size[half] = sum(w.nbytes for w in used)
            if name == "transformer":
                self.blocks = self.size[name] - layers[""]
        # The connectors' tensors are cast one at a time: the largest exists twice.
        text = mx.float32 if dtype == mx.float32 else mx.bfloat16
        stored = (f.header[k] for f, k in checkpoint.parts["connectors"].values())
        sizes = (math.prod(s) * (DTYPES[k] != text) * DTYPES[k].size for k, s in stored)
        self.cast = max(sizes)
        self.bits = (checkpoint.quantization or {}).get("bits", 0)
        self.dit = DiTConfig.from_dict(self.config["transformer"])
        c = TextConfig.from_dict(self.config["transformer"])
        self.connectors = c.video, c.audio

    def __call__(self, job: Any, loras: Callable[[str], int], shards=1) -> Phases:
        """The phases of a job after the text; `loras` returns the bytes of a file."""
        stages, decoder = job.stages, job.decoder
        contexts, phases = self.contexts(len(job.prompts)), {}
        if encoded := [self.encoding(*item) for item in job.encoded]:
            weights = sum(self.size[name] for name in {name for name, _ in encoded})
            buffers = max(size for _, size in encoded)
            phases["inputs"] = Footprint(weights, contexts + buffers)
        for stage in stages:
            factors = sum(loras(file.path) for file in stage.loras)
            need, phase = self.stage(stage, factors, contexts, shards), stage.phase
            if stage.upsampler and stage.part.decoder:  # also enlarges keyframes
                encode = self.convolutions(stage.size, "encoder")
                decode = self.decoding(decoder, stage.size.divided(2))
                weights = need.weights + self.size["vae.encoder"] + self.size[decoder]
                buffers = contexts + max(encode, decode)
                more = Footprint(weights, buffers, need.streamable)
                need = max(need, more, key=Footprint.total)
            phases[phase] = max(need, phases.get(phase, need), key=Footprint.total)
        size, sound = stages[-1].whole, 0
        if job.decodes_audio:
            sound = self.size["audio_vae"] + self.size["vocoder"]
            buffers = self.sound(stages[0].size.audio_tokens)
            phases["audio"] = Footprint(sound, contexts + buffers)
        if "video" in job.streams:
            frame = FLOAT * 3 * size.height * size.width
            blended = max(window.blended_out for window in job.parts)
            buffers = contexts + self.decoding(decoder, size, job.frames_ahead)
            weights = sound + self.size[decoder]
            phases["video"] = Footprint(weights, buffers + (4 + blended) * frame)
        return phases

    def decoding(self, decoder: str, size: Size, ahead: int = 0) -> float:
        """Bytes of a video decoder's buffers."""
        if decoder == "vae":
            return self.convolutions(size, "decoder")
        return self.neighborhoods(size, ahead)

    def per_token(self, video: int, audio: int) -> int:
        """Bytes of a hidden state, for this many tokens of each stream."""
        return (video * self.dit.video_dim + audio * self.dit.audio_dim) * self.item

    def dequantized(self, rows: int) -> int:
        """Bytes of a block that is dequantized ahead, and of the quantized next one."""
        chip = this_chip()
        if not self.bits or rows < chip.dequantize_from:
            return 0
        ahead = 8 * (self.dit.video_dim**2 + self.dit.audio_dim**2)
        ahead = int(min(ahead, IN_FLIGHT * chip.weights_at_a_time)) * self.dtype.size
        return ahead + self.blocks // self.dit.num_layers

    def scores(self, heads: int, queries: int, keys: int) -> int:
        return 0 if self.gpu else heads * queries * keys * self.item

    def contexts(self, prompts: int) -> int:
        width = sum(heads * dim for heads, dim in self.connectors)
        return prompts * MAX_TOKENS * width * self.item

    def text(self, prompts: int, encoder: list[File]) -> Footprint:
        """The text phase: layers are streamed, prompts connected one by one."""
        if encoder:
            unused, sizes = "vision|multi_modal|lm_head", {}
            for f in encoder:
                for k, (kind, shape) in f.header.items():
                    size = self.dtype.size if "F" in kind else DTYPES[kind].size
                    sizes[k] = math.prod(shape) * size * (not re.search(unused, k))
            layers = layer_sizes(sizes)
            gemma = sum(layers.values()) - streamable(layers, self.gpu)
        else:
            gemma = self.size["gemma"] - self.streamable["gemma"]
        buffers = 18.5 * self.contexts(1) + self.contexts(prompts)
        heads = sum(heads for heads, _ in self.connectors)
        buffers += self.scores(heads, MAX_TOKENS, MAX_TOKENS)
        return Footprint(max(gemma, self.size["connectors"]), max(buffers, self.cast))

    def encoding(self, condition, size: Size) -> tuple[str, float]:
        """The encoder that a condition needs, and bytes of its buffers."""
        if condition.encoder == "vae":
            frames = condition.num_encoded
            return "vae.encoder", self.convolutions(size, "encoder", frames)
        return "audio_vae", self.spectra(size.audio_tokens)

    def stage(self, stage: Stage, loras: int, contexts: int, shards: int) -> Footprint:
        """A stage, with these bytes of LoRA factors and contexts."""
        (tokens, sound), passes = stage.tokens, guidance_passes(stage.guidance)
        segments, nag = stage.prompts.count, stage.prompts.nag is not None
        texts = 7.2 * segments - 0.7 + max(3 * ("uncond" in passes), 4.3 * nag)
        keys = max(tokens, MAX_TOKENS * (segments + nag))
        weighs = any(c.weighs for c in stage.all_conditions)
        buffers = (
            texts * self.per_token(MAX_TOKENS, MAX_TOKENS)
            + (8 + 2 * len(passes)) * self.per_token(tokens, sound)
            + self.scores(self.dit.num_attention_heads, tokens, keys)
            + contexts
            + self.dequantized(max(tokens, MAX_TOKENS)) // shards
            + weighs * tokens**2 * (FLOAT + self.dtype.size)
        )
        elsewhere = self.blocks - self.blocks // shards
        weights = self.size["transformer"] - elsewhere + loras
        in_blocks = loras * (1 - (1 + self.gpu) / self.dit.num_layers)
        spared = self.streamable["transformer"] // shards + in_blocks
        if stage.upsampler:  # freed before the first step, which reads blocks
            before = self.size[stage.upsampler] + self.upsampling(stage)
            block = self.blocks // shards + loras - spared
            spared += max(buffers, before) - max(buffers, before - block)
            buffers = max(buffers, before)
        return Footprint(weights, buffers, int(spared))

    def training(
        self,
        sizes: Sequence[Size],
        factors: int,
        by_block: bool,
        samples: Sequence[Phases] = (),
        batch: int = 1,
    ) -> dict[str, Footprint]:
        """The plan of a training on clips of these sizes, `batch` at a time, with so many
        bytes of factors: encoding, training, and samples with these phases."""
        largest = max(sizes, key=lambda s: s.tokens + s.audio_tokens)
        tokens, sound = largest.tokens, largest.audio_tokens
        encoders = {"vae.encoder": tokens and self.convolutions(largest, "encoder", 8)}
        encoders |= {"audio_vae": sound and self.spectra(sound)}
        weights = sum(self.size[name] for name, used in encoders.items() if used)
        phases, c = {"encode": Footprint(weights, max(encoders.values()))}, self.dit
        heads = max(c.num_attention_heads, c.audio_num_attention_heads)
        pairs = tokens * (tokens + MAX_TOKENS + 2 * sound)
        scores = heads * (pairs + sound * (sound + MAX_TOKENS)) * self.item
        state = self.per_token(tokens, sound)
        block = KEPT[0] * state + KEPT[1] * self.per_token(MAX_TOKENS, MAX_TOKENS)
        block += KEPT[2] * scores
        kept = block + (c.num_layers + 1) * state if by_block else c.num_layers * block
        buffers = batch * (kept + DURING * scores)
        if self.bits and batch * tokens > this_chip().dequantize_from:
            parts = c.num_layers if by_block else 1  # of the weights, dequantized
            buffers += self.blocks / parts * 8 / self.bits * self.item
        model, spared = self.size["transformer"], self.streamable["transformer"]
        phases["train"] = Footprint(model + FACTORS[0] * factors, buffers, spared)
        for needs in samples:
            decoders = (n.weights for k, n in needs.items() if k in ("audio", "video"))
            weights = model + FACTORS[1] * factors + max(decoders)
            buffers = max(n.buffers for n in needs.values())
            phases["sample"] = Footprint(weights, buffers, spared)
        return phases

    def upsampling(self, stage: Stage) -> float:
        """Bytes of a residual block of the upsampler at the stage's size."""
        c = UpsamplerConfig.from_dict(self.config[stage.upsampler])
        size, dim = stage.part.whole(stage.size), c.mid_channels
        padded = (size.latent[0] + 2 * (not self.gpu)) * size.frame_tokens * dim
        return held(size.latent, dim, dim, 2) + UPSAMPLER[self.gpu] * FLOAT * padded

    def neighborhoods(self, size: Size, ahead: int) -> float:
        """Bytes of the diffusion decoder's last blocks: of the frames that their windows
        span, the scores of a row of groups, and the frames computed `ahead`."""
        c = self.config["diffusion_decoder"]
        groups = [group_size(kernel) for kernel in c["stage5_kernel"]]
        spans = [a + b - 1 for a, b in zip(groups, c["stage5_kernel"])]
        spans[0] += ahead > 0
        channels, places = c["stage_channels"][-1], size.height * size.width // 16
        row = size.width // 4 * math.prod(groups[:2])
        scores = 2 * self.scores(channels // c["head_dim"], row, math.prod(spans))
        copies = 2 * c["stage_depths"][-1] + 14
        frames = copies * spans[0] + AHEAD * ahead
        return frames * places * channels * self.item + scores

    def convolutions(self, size: Size, half: str, frames: int = 1) -> float:
        """Bytes of the frames that the convolutions keep, and of the widest convolution."""
        convs, up = [*video_convs(self.vae, size, half, frames)], half == "decoder"
        ahead = 1 + self.gpu  # a GPU computes one while the next one is prepared
        kept = at_work = 0
        for c in convs:
            # The decoder lags, so its residuals wait for the next chunk, too.
            area, residual = FLOAT * math.prod(c.size[1:]), c.size[0] * c.residual
            kept += 2 * area * (c.dim_in + c.residual * up) * (up or frames > 1)
            work = held(c.size, c.dim_in, c.dim, ahead) + area * residual
            at_work = max(at_work, work)
        return kept + at_work

    def spectra(self, tokens: int) -> float:
        """Bytes of the audio VAE: its widest level has all mel bins."""
        c = self.config["audio_vae"]["model"]["params"]["ddconfig"]
        widest = c["ch"] * MEL_BINS * MEL_FRAMES_PER_TOKEN * tokens
        return SPECTRAL[self.gpu] * FLOAT * widest

    def sound(self, tokens: int) -> float:
        """Bytes of the audio VAE's decoder or, if it is wider, of the vocoder."""
        buffers, frames = [self.spectra(tokens)], MEL_FRAMES_PER_TOKEN * tokens
        for c, (_, *lengths) in generators(self.config["vocoder"], frames):
            channels = c["upsample_initial_channel"]
            widest = max(n * (channels >> i) for i, n in enumerate(lengths, 1))
            unfolded = 25 + 6 * max(c["resblock_kernel_sizes"])
            copies = BIGVGAN if c["resblock"] == "AMP1" else (unfolded, SPECTRAL[1])
            buffers.append(copies[self.gpu] * FLOAT * widest)
        return max(buffers)


def layer_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes by number of the layer; of tensors outside of layers under ""."""
    layers = {"": 0}
    for key, size in sizes.items():
        number = re.search(r"(?:^|\.)(?:layers|transformer_blocks)\.(\d+)\.", key)
        name = number[1] if number else ""
        layers[name] = layers.get(name, 0) + size
    return layers


def streamable(layers: Mapping[str, int], gpu: bool) -> int:
    """Bytes that streaming saves: all layers but one, on a GPU but two."""
    numbered = [size for name, size in layers.items() if name]
    return max(sum(numbered) - (1 + gpu) * max(numbered, default=0), 0)
