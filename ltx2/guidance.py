"""Guidance: its settings, the model passes that it needs, the guided denoiser."""

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

import mlx.core as mx
import numpy as np

from .base import Checked, within
from .dit import ALL_BLOCKS, NO_BLOCKS, DiT, Pass, Tokens
from .latents import LatentState, States, Streams
from .layers import Nag, Rope, Steering
from .options import ask, many

Contexts = tuple[mx.array, mx.array]  # of video and audio, each (1, 1024, D)
TextContexts = dict[str, Contexts]  # by prompt
POSITIVE, NEGATIVE = 0, 1  # indices of a stage's contexts
SCALES = (-100, 100)


@dataclass(frozen=True)
class Guidance(Checked):
    """How one stream's prediction is moved away from three weaker ones.
    `cfg_scale`: from that of the negative prompt; `stg_scale`: from one without
    self-attention in `stg_blocks` (None: in all); `modality_scale`: from one without
    attention between the streams. `rescale_scale` restores the conditional prediction's
    standard deviation; with `skip_step` k the model runs in every (k+1)-th step only.
    """

    cfg_scale: float = ask(
        "classifier-free guidance, 1 is off (default: 3, audio 7)", 1.0, between=SCALES
    )
    stg_scale: float = ask(
        "spatio-temporal guidance, 0 is off (default: 1, hq 0)", 0.0, between=SCALES
    )
    stg_blocks: Optional[tuple[int, ...]] = ask(
        "blocks that STG perturbs (default: 29, 28 from LTX-2.3 on)", (), type=many(int)
    )
    modality_scale: float = ask(
        "agreement with the other stream, 1 is off (default: 3)", 1.0, between=SCALES
    )
    rescale_scale: float = ask(
        "restores the unguided contrast (default: 0.7)", 0.0, between=(0, 1)
    )
    skip_step: int = ask(
        "steps that reuse each guided prediction (default: 0)", 0, between=(0, 1000)
    )

    @property
    def strengths(self) -> tuple[float, float, float]:
        """How far it moves away from each weaker prediction; 0: not at all."""
        return self.cfg_scale - 1, self.stg_scale, self.modality_scale - 1

    active = property(lambda self: any(self.strengths))

    def skips(self, step: int) -> bool:
        """Whether a step reuses the last prediction."""
        return step % (self.skip_step + 1) != 0

    def __call__(self, cond, uncond=None, perturbed=None, isolated=None) -> mx.array:
        """Combine predictions of x0 (1, T, C); those that no scale uses are None."""
        x = cond
        for strength, weaker in zip(self.strengths, (uncond, perturbed, isolated)):
            if strength:
                x = x + strength * (cond - weaker)
        if self.rescale_scale:
            ratio = mx.std(cond, ddof=1) / mx.std(x, ddof=1)
            x = x * (self.rescale_scale * ratio + 1 - self.rescale_scale)
        return x


NO_GUIDANCE = Guidance()


def guidance_passes(guidance: Mapping[str, Guidance]) -> dict[str, Pass]:
    """The passes of a step, each for both streams, by the name of the prediction. In
    "uncond", a stream without guidance keeps the positive prompt."""
    video, audio = (guidance.get(k, NO_GUIDANCE) for k in ("video", "audio"))
    cfg, stg, modality = map(any, zip(video.strengths, audio.strengths))
    passes = {"cond": Pass(POSITIVE, POSITIVE)}
    if cfg:
        text = (NEGATIVE if k in guidance else POSITIVE for k in ("video", "audio"))
        passes["uncond"] = Pass(*text)
    if stg:
        blocks = lambda g: ALL_BLOCKS if g.stg_blocks is None else g.stg_blocks
        skipped = (blocks(g) if g.stg_scale else NO_BLOCKS for g in (video, audio))
        passes["perturbed"] = Pass(POSITIVE, POSITIVE, *skipped)
    if modality:
        all_blocks = {"skip_a2v": ALL_BLOCKS, "skip_v2a": ALL_BLOCKS}
        passes["isolated"] = Pass(POSITIVE, POSITIVE, **all_blocks)
    return passes


@dataclass(frozen=True)
class Prompts:
    """How a stage reads its prompts: normalized attention guidance, and the prompts of
    its segments with, by stream, their start and end in seconds."""

    nag: Optional[Nag] = None
    segments: tuple[str, ...] = ()
    times: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    # How many prompts are read at once
    count = property(lambda self: max(len(self.segments), 1))

    def steering(self, name: str, state: LatentState) -> Steering:
        """A token reads the segment that its middle is in, or the nearest one."""
        if len(self.segments) < 2:
            return Steering(None, self.nag)
        starts, ends = np.array(self.times[name]).T
        starts[0], ends[-1] = -np.inf, np.inf
        ends[:-1] = np.maximum(ends[:-1], starts[1:])
        middle = state.bounds[0].mean(axis=1)[:, None]
        visible = (starts <= middle) & (middle < ends)
        return Steering(mx.array(visible)[None, None], self.nag)


def stream_tokens(
    state: LatentState, x: mx.array, sigma: float, ropes: tuple[Rope, Rope], *more: Any
) -> Tokens:
    """The transformer's input for tokens `x`; `more` are other fields of Tokens."""
    levels, index = state.levels
    sigmas = levels * np.float32(sigma), [0.0 if state.frozen else sigma]
    mask = None if state.attention is None else mx.array(state.attention)
    return Tokens(x, *map(mx.array, sigmas), *ropes, index, mask, *more)


class GuidedDenoiser:
    """Computes x0 of the streams: passes combined by guidance, held to clean tokens."""

    def __init__(self, transformer: DiT, states: States, texts, stage, agree, trace):
        """`texts` are the results of `DiT.project_text` for prompt and negative prompt. x0 is
        reused while the tokens have changed less than the stage's `step_cache`;
        `agree` makes several machines decide that alike."""
        self.transformer, self.states, self.trace = transformer, states, trace
        self.guidance = {k: stage.guidance.get(k, NO_GUIDANCE) for k in states}
        self.passes = guidance_passes(stage.guidance)
        self.texts = texts
        self.steering = {k: stage.prompts.steering(k, s) for k, s in states.items()}
        self.ropes = {k: transformer.rope(k, s.bounds) for k, s in states.items()}
        self.interval, self.cache = stage.guidance_interval, stage.step_cache
        self.agree = agree
        self.cached_x0: Streams = {}  # guided, for the steps that are skipped
        self.cached_input: Streams = {}  # the tokens it was computed from

    def __call__(self, x: Streams, sigma: float, step: int) -> Streams:
        """x0 (1, T, C) by stream from tokens `x` (1, T, C) at `sigma`."""
        old, norm, reuse = self.cached_input, mx.linalg.norm, False
        if self.cache and old:  # by the largest change since the model last ran
            changes = (norm(x[k] - old[k]) / norm(old[k]) for k in old)
            reuse = self.agree(max(c.item() for c in changes)) < self.cache
        skips = lambda k, g: k in self.cached_x0 and bool(reuse or g.skips(step))
        skipped = {k: skips(k, g) for k, g in self.guidance.items()}
        if not all(skipped.values()):
            self.cached_input = x
            self.cached_x0 = self.cached_x0 | self._predict(x, sigma, step, skipped)
        return {k: self.states[k].blend(self.cached_x0[k]) for k in x}

    def _predict(self, x: Streams, sigma: float, step: int, skipped) -> Streams:
        """x0 of the streams that are not skipped, guided inside the interval."""
        low, high = self.interval
        guided = low <= sigma <= high
        passes = self.passes if guided else {"cond": self.passes["cond"]}
        inputs = {}
        for k, state in self.states.items():
            facts = mx.array(state.keyframes), self.steering[k], not skipped[k]
            inputs[k] = stream_tokens(state, x[k], sigma, self.ropes[k], *facts)
        both = map(inputs.get, ("video", "audio"))
        trace = within(self.trace, f"step{step}")
        velocities = self.transformer(*both, self.texts, [*passes.values()], trace)
        predicted = {}
        for i, name in enumerate(("video", "audio")):
            if name in x and not skipped[name]:
                timesteps = self.states[name].denoise_mask_tokens * sigma
                moved = (v[i].astype(mx.float32) * timesteps for v in velocities)
                x0 = {kind: x[name] - move for kind, move in zip(passes, moved)}
                combine = self.guidance[name] if guided else NO_GUIDANCE
                predicted[name] = combine(**x0)
        return predicted
