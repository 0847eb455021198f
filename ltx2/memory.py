"""What a job will hold in memory, phase by phase, told before any weights are read.

A phase holds weights, whose sizes are in the files' headers, and buffers, counted in
its widest tensors. How many of them are alive together was measured on MLX's CPU
backend, which also writes out attention scores and unfolds what it convolves. A GPU does
neither: there the multiples, the second of each pair, are estimates.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Callable, Iterable, Mapping, Optional

import mlx.core as mx

from . import parallel
from .base import UserError
from .denoiser import pass_kinds
from .diffusion_decoder import tile
from .dit import DiTConfig
from .hub import DTYPES, File
from .inputs import wanted
from .latents import MEL_FRAMES_PER_TOKEN, latent_frames
from .lora import Lora
from .request import Job, Request, Stage
from .text import MAX_TOKENS
from .upsampler import UpsamplerConfig
from .vae import DOWN, UP, VideoVAEConfig
from .weights import FLOAT32, Checkpoint

FLOAT = 4  # bytes: encoders and decoders compute in float32
# Alive together, on the CPU and elsewhere: copies of the widest tensor.
UNFOLDED = (34, 6)  # of a 3x3x3 convolution
UPSAMPLED = (102, 6)  # of an upsampler, whose convolutions see all frames at once
SPECTRAL = (90, 12)  # of the audio VAE and of HiFi-GAN
SNAKES = (215, 30)  # of BigVGAN


@dataclass(frozen=True)
class Need:
    """Bytes of weights and of buffers. `spared` are the transformer's blocks that need
    not be there while blocks are streamed."""

    weights: int
    buffers: float
    spared: int = 0

    def total(self, streamed: bool) -> float:
        return self.weights + self.buffers - self.spared * streamed


@dataclass(frozen=True)
class Plan:
    """What the phases need, what there is, and whether blocks are to be streamed."""

    needs: Mapping[str, Need]
    limit: int
    streamed: bool = False
    instead: str = ""  # what would fit, if this does not
    shared: str = ""  # how several machines share the work

    @property
    def peak(self) -> tuple[float, str]:
        """The most that is needed, and the phase."""
        return max((n.total(self.streamed), phase) for phase, n in self.needs.items())

    @property
    def fits(self) -> bool:
        return self.peak[0] <= self.limit

    def check(self) -> None:
        """UserError if there is not enough memory."""
        if not self.fits:
            need, phase = self.peak
            raise UserError(
                f"{phase} needs {need / 1e9:.2f} GB of memory, of which there are "
                f"{self.limit / 1e9:.2f}: {self.instead}"
            )

    def __str__(self) -> str:
        rows = [f"{'phase':<10}{'weights':>10}{'buffers':>10}{'peak GB':>10}"]
        for phase, need in self.needs.items():
            total = need.total(self.streamed)
            parts = (total - need.buffers, need.buffers, total)
            rows.append(f"{phase:<10}" + "".join(f"{p / 1e9:>10.2f}" for p in parts))
        how = "read block by block" if self.streamed else "held in memory"
        rows.append(f"of {self.limit / 1e9:.2f} GB; the transformer is {how}")
        if self.shared:
            rows.append(f"--parallel {self.shared}: {parallel.WAYS[self.shared]}")
        return "\n".join(rows)


def available() -> int:
    """Bytes to be used at most: what Metal recommends, a GPU's memory, or the RAM."""
    device = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory"):
        if key in device:
            return device[key]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def set_limits(plan: Plan) -> None:
    """Keep what is needed from being paged out, and cached buffers within what is left.
    Only Metal has such limits."""
    if mx.metal.is_available():
        peak = int(plan.peak[0])
        mx.set_wired_limit(min(peak, plan.limit))
        mx.set_cache_limit(max(plan.limit - peak, 1 << 28))


class Predictor:
    """Tells what jobs of a model need; its headers are read once."""

    def __init__(
        self,
        source: Checkpoint,
        dtype: mx.Dtype,
        text_encoder: list[File],
        shards: int = 1,
    ):
        """`shards` machines have each a part of the transformer's blocks."""
        self.config = source.config
        self.gpu = mx.default_device().type != mx.cpu
        # The CPU computes in float32 some of what has 16 bits.
        self.item = dtype.size if self.gpu else max(dtype.size, 3)
        self.size = {}
        for name in source.components:
            tensors = source.weights(name, mx.float32 if name in FLOAT32 else dtype)
            sizes = {
                k: w.nbytes // (shards if k.startswith("transformer_blocks.") else 1)
                for k, w in tensors.items()
            }
            self.size[name] = sum(sizes.values())
            spare = spared(sizes, self.gpu)
            if name == "transformer":
                self.spared = spare
            elif name == "gemma":
                self.encoder = self.size[name] - spare
        if "gemma" not in source.components:
            read = {
                k: math.prod(shape) * (dtype.size if "F" in kind else DTYPES[kind].size)
                for f in text_encoder
                for k, (kind, shape) in ((k, f.header[k]) for k in f.keys)
                if not re.search("vision|multi_modal|lm_head", k)
            }
            self.encoder = sum(read.values()) - spared(read, self.gpu)
        self.dit = DiTConfig.from_dict(self.config["transformer"])
        self.vae = VideoVAEConfig.from_dict(self.config["vae"])
        c = self.config["transformer"]
        keys = "num_attention_heads", "attention_head_dim"
        video = [c[f"connector_{k}"] for k in keys]
        audio = [c.get(f"audio_connector_{k}", v) for k, v in zip(keys, video)]
        self.connectors = video, audio  # heads and the size of one

    def plan(self, jobs: Iterable[Job], streamed: Optional[bool] = None) -> Plan:
        """Of jobs that are done together; blocks are streamed if it is left open and all
        of them would not fit."""
        needs: dict[str, Need] = {}
        for phase, need in (item for job in jobs for item in self.needs(job).items()):
            before = needs.setdefault(phase, need)
            needs[phase] = max(need, before, key=lambda n: n.total(False))
        plan = Plan(needs, available(), bool(streamed))
        left_open = streamed is None
        return replace(plan, streamed=True) if left_open and not plan.fits else plan

    def what_fits(
        self, job: Job, lay_out: Callable[[Request], Job], streamed: Optional[bool]
    ) -> str:
        """A shorter or smaller video that there is memory for, or what else may help."""
        r = job.request
        sides = lambda part: (max(s // part // 64, 1) * 64 for s in (r.height, r.width))
        for part in (1, 2, 4):
            height, width = sides(part)
            frames = r.num_frames
            while job.clip is None and frames > 1:
                frames = (frames - 1) // 16 * 8 + 1
                less = replace(r, height=height, width=width, num_frames=frames)
                with suppress(UserError):  # of another reason
                    if self.plan([lay_out(less)], streamed).fits:
                        return f"{width}x{height} with {frames} frames would fit"
        return "fewer bits may help (convert.py --quantize), or a smaller video"

    def needs(self, job: Job) -> dict[str, Need]:
        """By phase, in the order of a run."""
        needs = {"text": self.text(job)}
        if wanted(job):
            needs["inputs"] = self.inputs(job)
        needs |= {stage.name: self.stage(job, stage) for stage in job.stages}
        contexts = self.contexts(job)
        speaks = "audio" in job.streams and not job.request.audio
        sound = self.size["audio_vae"] + self.size["vocoder"] if speaks else 0
        if speaks:
            needs["audio"] = Need(sound, contexts + self.sound(job.audio_tokens))
        if "video" in job.streams:
            frame = FLOAT * 3 * job.stages[-1].height * job.stages[-1].width
            convolves = job.video_decoder == "vae"
            decode = self.convolutions if convolves else self.neighbours
            buffers = decode(job.stages[-1], UP) + 4 * frame
            weights = sound + self.size[job.video_decoder]
            needs["video"] = Need(weights, contexts + buffers)
        return needs

    def per_token(self, video: int, audio: int) -> int:
        """Bytes of a state of so many tokens of each stream."""
        return (video * self.dit.video_dim + audio * self.dit.audio_dim) * self.item

    def scores(self, heads: int, queries: int, keys: int) -> int:
        return 0 if self.gpu else heads * queries * keys * self.item

    def neighbours(self, stage: Stage, _) -> float:
        """What the diffusion decoder's last blocks hold: the frames their windows span,
        as inputs, contexts and on the way, and the scores of a row of tiles."""
        c = self.config["diffusion_decoder"]
        tiles = [tile(kernel) for kernel in c["stage5_kernel"]]
        spans = [a + b - 1 for a, b in zip(tiles, c["stage5_kernel"])]
        channels, places = c["stage_channels"][-1], stage.height * stage.width // 16
        row = stage.width // 4 * math.prod(tiles[:2])
        scores = 2 * self.scores(channels // c["head_dim"], row, math.prod(spans))
        copies = 2 * c["stage_depths"][-1] + 14
        return copies * spans[0] * places * channels * self.item + scores

    def contexts(self, job: Job) -> int:
        """Of the prompt and, if it is read, the negative prompt."""
        count = 1 if job.negative_prompt is None else 2
        return count * MAX_TOKENS * sum(h * d for h, d in self.connectors) * self.item

    def text(self, job: Job) -> Need:
        """The encoder's layers are streamed; one prompt after the other is connected."""
        width = sum(heads * dim for heads, dim in self.connectors)
        buffers = 18.5 * MAX_TOKENS * width * self.item + self.contexts(job)
        heads = sum(heads for heads, _ in self.connectors)
        buffers += self.scores(heads, MAX_TOKENS, MAX_TOKENS)
        return Need(max(self.encoder, self.size["connectors"]), buffers)

    def inputs(self, job: Job) -> Need:
        frames = 8 if job.clip else 1
        stage = job.stages[-1]
        pictures = "video" in job.streams and (job.images or job.clip)
        buffers = self.convolutions(stage, DOWN, frames) if pictures else 0
        weights = self.size["vae"] if pictures else 0
        if job.request.audio or job.clip and job.clip.has_audio:
            weights += self.size["audio_vae"]
            buffers += self.spectra(job.audio_tokens)
        return Need(weights, self.contexts(job) + buffers)

    def stage(self, job: Job, stage: Stage) -> Need:
        frames, height, width = stage.latent_size
        tokens = frames * height * width * ("video" in job.streams)
        stills = len(stage.keyframes) * (2 if stage.tile else 1)  # its anchors
        tokens += height * width * (stills + sum(bool(i.frame) for i in job.images))
        if stage.details:
            tokens += frames * height * width // stage.details**2
        if job.clip and stage.references and not job.request.changes_clip:
            down = job.reference_scale[0] ** 2
            tokens += latent_frames(job.clip_frames) * height * width // down
        sound = job.audio_tokens if "audio" in job.streams and not stage.tile else 0
        passes = pass_kinds(stage.guidance)
        contexts = 2 if "uncond" in passes else 1
        keys = max(tokens, MAX_TOKENS)
        buffers = (
            (6.5 + 3 * (contexts - 1)) * self.per_token(MAX_TOKENS, MAX_TOKENS)
            + (8 + 2 * len(passes)) * self.per_token(tokens, sound)
            + self.scores(self.dit.num_attention_heads, tokens, keys)
            + self.contexts(job)
        )
        loras = sum(
            a.nbytes + b.nbytes
            for file in stage.loras
            for a, b in Lora.read(file.path).factors.values()
        )
        spare = self.spared + loras * (1 - (1 + self.gpu) / self.dit.num_layers)
        weights = self.size["transformer"] + loras
        so_far = job.stages[: job.stages.index(stage) + 1]
        weights += sum(self.size[u] for u in {s.upsampler for s in so_far} - {None})
        if stage.upsampler:
            c = UpsamplerConfig.from_dict(self.config[stage.upsampler])
            if stage.tile:  # the whole canvas is upsampled with the first
                whole = latent_frames(stage.tile.segments * stage.tile.length + 1)
                tokens = max(tokens, whole * height * width)
            wide = UPSAMPLED[self.gpu] * FLOAT * c.mid_channels * tokens
            buffers = max(buffers, wide)
        return Need(weights, buffers, int(spare))

    def convolutions(self, stage: Stage, strides: dict, frames: int = 1) -> float:
        """Of the video VAE's decoder (`UP`) or encoder (`DOWN`): the frames that each
        convolution keeps, and the widest one at work."""
        c, up = self.vae, strides is UP
        if up:
            blocks, dim = c.decoder_blocks[::-1], c.decoder_base_channels
            dim *= math.prod(o.get("multiplier", 1) for _, o in blocks)
            area = math.prod(stage.latent_size[1:])
        else:
            blocks, dim = c.encoder_blocks, c.encoder_base_channels
            area = stage.height * stage.width // c.patch_size**2
        kept = widest = 0.0
        for name, options in blocks:
            widest = max(widest, dim * area * frames)
            if name == "res_x":
                kept += 6 * dim * area * options["num_layers"]
            else:
                kept += 4 * dim * area
                time, *space = strides[name]
                factor, pixels = options.get("multiplier", 1), math.prod(space)
                dim = dim // factor if up else dim * factor
                area = area * pixels if up else area // pixels
                frames = frames if up else math.ceil(frames / time)
        widest = max(widest, dim * area * frames)
        return FLOAT * (kept + 2 * dim * area + UNFOLDED[self.gpu] * widest)

    def spectra(self, tokens: int) -> float:
        """Of the audio VAE: its widest level has all mel bins."""
        c = self.config["audio_vae"]["model"]["params"]["ddconfig"]
        widest = c["ch"] * c["mel_bins"] * MEL_FRAMES_PER_TOKEN * tokens
        return SPECTRAL[self.gpu] * FLOAT * widest

    def sound(self, tokens: int) -> float:
        """Of the audio VAE's decoder, or of the vocoder if that has wider tensors."""
        whole, buffers = self.config["vocoder"], [self.spectra(tokens)]
        frames = MEL_FRAMES_PER_TOKEN * tokens
        for c in [whole[k] for k in ("vocoder", "bwe") if k in whole] or [whole]:
            channels, length, widest = c["upsample_initial_channel"], frames, 0
            for rate in c["upsample_rates"]:
                channels, length = channels // 2, length * rate
                widest = max(widest, channels * length)
            copies = SNAKES if c["resblock"] == "AMP1" else SPECTRAL
            buffers.append(copies[self.gpu] * FLOAT * widest)
            hop = whole.get("bwe", {}).get("hop_length", 1)
            frames = length // hop
        return max(buffers)


def spared(sizes: Mapping[str, int], gpu: bool) -> int:
    """Bytes of tensors that are not there while layers are streamed: beside the layer at
    work, a GPU has the next one, which the CPU reads when that is done."""
    layers: dict[str, int] = {}
    for key, size in sizes.items():
        if number := re.search(r"(?:^|\.)(?:layers|transformer_blocks)\.(\d+)\.", key):
            layers[number[1]] = layers.get(number[1], 0) + size
    return max(sum(layers.values()) - (1 + gpu) * max(layers.values(), default=0), 0)
