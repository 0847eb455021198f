"""From noisy tokens to an estimate of the end: the model's passes and their guidance."""

from __future__ import annotations

from typing import Mapping, Optional, Union

import mlx.core as mx
import numpy as np

from .base import Trace, within
from .dit import ALL_BLOCKS, NO_BLOCKS, DiT, Pass, Tokens
from .latents import LatentState
from .parallel import PassParallel, told
from .sampling import Guidance, Streams

Contexts = tuple[mx.array, mx.array]  # of video and audio, each (1, 1024, D)


def guidance_passes(guidance: Mapping[str, Guidance]) -> dict[str, Pass]:
    """The passes of a step by what they give. A pass that one stream wants is made for
    both; a stream without guidance of its own keeps its prompt in all of them."""
    streams = ("video", "audio")
    both = [guidance.get(k, Guidance()) for k in streams]
    passes = {"cond": Pass()}
    if any(g.cfg_scale != 1 for g in both):
        passes["uncond"] = Pass(*(int(k in guidance) for k in streams))
    if any(g.stg_scale != 0 for g in both):
        cut = lambda g: ALL_BLOCKS if g.stg_blocks is None else g.stg_blocks
        cuts = (cut(g) if g.stg_scale != 0 else NO_BLOCKS for g in both)
        passes["perturbed"] = Pass(0, 0, *cuts)
    if any(g.modality_scale != 1 for g in both):
        passes["isolated"] = Pass(skip_a2v=ALL_BLOCKS, skip_v2a=ALL_BLOCKS)
    return passes


def pass_kinds(guidance: Mapping[str, Guidance]) -> list[str]:
    """What the passes of a step give, without making any."""
    return list(guidance_passes(guidance))


class Denoiser:
    """x0 of the streams at a sigma, guided, and blended with what is held clean."""

    def __init__(
        self,
        transformer: Union[DiT, PassParallel],
        states: dict[str, LatentState],
        contexts: Contexts,
        negative: Optional[Contexts],
        guidance: Mapping[str, Guidance],
        trace: Optional[Trace] = None,
        interval: tuple[float, float] = (0.0, 1.0),
        cache: float = 0.0,
    ):
        self.transformer, self.states, self.trace = transformer, states, trace
        self.guidance = {k: guidance.get(k, Guidance()) for k in states}
        self.passes = guidance_passes(guidance)
        self.texts = transformer.project_text(
            [contexts] if negative is None else [contexts, negative]
        )
        ropes = {"video": transformer.video_rope, "audio": transformer.audio_rope}
        self.ropes = {k: ropes[k](s.bounds) for k, s in states.items()}
        self.interval, self.cache = interval, cache
        self.last: Streams = {}  # guided x0, for the steps that are skipped
        self.seen: Streams = {}  # the tokens it was computed from

    def __call__(self, x: Streams, sigma: float, step: int) -> Streams:
        """x0 (1, T, C) by stream, from tokens `x` at `sigma`.

        Outside of the interval of sigmas only the prompt's own pass is made. With a
        `cache` above 0 the last x0 stands while the tokens have moved less than that
        part of their length.
        """
        low, high = self.interval
        guided = low <= sigma <= high
        passes = self.passes if guided else {"cond": self.passes["cond"]}
        still = self.cache and self.seen and self._moved(x) < self.cache
        skipped = {
            k: k in self.last and bool(still or g.skips(step))
            for k, g in self.guidance.items()
        }
        if not all(skipped.values()):
            self.seen = x
            tokens = {k: self._tokens(k, x[k], sigma, skipped[k]) for k in x}
            trace = within(self.trace, f"step{step}")
            velocities = self.transformer(
                tokens.get("video"),
                tokens.get("audio"),
                self.texts,
                list(passes.values()),
                trace,
            )
            for i, name in enumerate(("video", "audio")):
                if name in x and not skipped[name]:
                    reach = self.states[name].mask_tokens * sigma
                    x0 = {
                        kind: x[name] - v[i].astype(mx.float32) * reach
                        for kind, v in zip(passes, velocities)
                    }
                    guide = self.guidance[name] if guided else Guidance()
                    self.last[name] = guide(**x0)
        return {k: self.states[k].blend(self.last[k]) for k in x}

    def _moved(self, x: Streams) -> float:
        """How far the tokens are from where they were last looked at, relatively; on all
        machines that make this step, what the first one finds."""
        far = (
            mx.linalg.norm(x[k] - v) / mx.linalg.norm(v) for k, v in self.seen.items()
        )
        furthest, group = max(d.item() for d in far), self.transformer.group
        return furthest if group is None else told(group, furthest)

    def _tokens(self, name: str, x: mx.array, sigma: float, skipped: bool) -> Tokens:
        state = self.states[name]
        levels, level_index = state.levels
        return Tokens(
            x,
            mx.array(levels * np.float32(sigma)),
            mx.array([0.0 if state.frozen else sigma]),
            *self.ropes[name],
            level_index,
            None if state.attention is None else mx.array(state.attention),
            mx.array(state.keyframes),
            enabled=not skipped,
        )
