"""Several machines as one, on MLX's distributed engine: who does what.

All ranks run the same program on the same request. The first encodes the prompts and
decodes and writes; the steps between are shared in one of three WAYS.
"""

from __future__ import annotations

import pickle
from typing import Any, Optional, Sequence

import mlx.core as mx
import numpy as np

from .base import Trace, UserError
from .dit import DiT, Pass, Tokens

Group = mx.distributed.Group
WAYS = {
    "many": "each machine denoises other videos",
    "passes": "each machine makes other guidance passes of a step",
    "shards": "each machine has a part of every block of the transformer",
}


def choose(
    group: Group,
    wanted: Optional[str],
    videos: int,
    passes: int,
    fits: bool,
    heads: Sequence[tuple[int, int]],
    group_size: int,
) -> str:
    """The way to share: what is `wanted`, or the one that exchanges least if the whole
    transformer `fits` into each machine. `heads` are of each stream: how many, and
    the width they share. UserError for a way that shares nothing."""
    n = group.size()
    way = wanted or "shards"
    if mx.distributed.all_min(mx.array(fits), group=group) and wanted is None:
        way = "many" if videos >= n else "passes" if passes > 1 else "shards"
    if way == "many" and videos == 1:
        raise UserError("--parallel many: there is one video, ask for more or drop it")
    if way == "passes" and passes == 1:
        raise UserError("--parallel passes: without guidance a step has one, drop it")
    fine = all(h % n == 0 == width % (n * group_size) for h, width in heads)
    if way == "shards" and not fine:
        counts = " and ".join(str(h) for h, _ in heads)
        raise UserError(
            f"--parallel shards: layers of {counts} heads cannot be cut into {n} parts "
            "of whole heads and groups: take fewer machines, or --parallel passes"
        )
    return way


def told(group: Group, value: Any, root: int = 0) -> Any:
    """The root's value on every rank; those of the others are not looked at. Pickled:
    the ranks run the same program for the same user."""
    mine = group.rank() == root
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    size = mx.distributed.all_sum(mx.array(len(data) * mine), group=group).item()
    data = mx.array(data if mine else np.zeros(size, np.uint8))
    return pickle.loads(np.array(mx.distributed.all_sum(data, group=group)))


class PassParallel:
    """A transformer that makes every Nth pass and hears of the others'. PassParallel like that,
    a perturbed pass stays with the prompt's own one, with which it begins, on two."""

    def __init__(self, transformer: DiT, group: Group):
        self.transformer, self.group = transformer, group
        self.config, self.project_text = transformer.config, transformer.project_text
        self.video_rope, self.audio_rope = (
            transformer.video_rope,
            transformer.audio_rope,
        )

    def __call__(
        self,
        video: Optional[Tokens],
        audio: Optional[Tokens],
        texts: Sequence[tuple],
        passes: list[Pass],
        trace: Optional[Trace] = None,
    ) -> list[tuple[Optional[mx.array], Optional[mx.array]]]:
        """As the transformer's: velocities (video, audio) of each pass, float32."""
        mine = slice(self.group.rank(), None, self.group.size())
        own = passes[mine] and self.transformer(
            video, audio, texts, passes[mine], trace
        )
        widths, both = (self.config.out_channels, self.config.audio_out_channels), []
        for i, (tokens, width) in enumerate(zip((video, audio), widths)):
            if tokens is None:
                both.append([None] * len(passes))
                continue
            made = mx.zeros((len(passes), *tokens.latent.shape[:2], width))
            if own:
                made[mine] = mx.stack([v[i].astype(mx.float32) for v in own])
            both.append(list(mx.distributed.all_sum(made, group=self.group)))
        return list(zip(*both))
