"""Several machines as one, on MLX's distributed engine: who does what.

All ranks run the same program on the same request. The first encodes the prompts and
decodes and writes; the steps between are shared in one of three WAYS.
"""

from __future__ import annotations

import json
from typing import Optional, Sequence

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


def agree(group: Group, value: float) -> float:
    """The first machine's value."""
    return total(mx.array(float(value)), group, group.rank() == 0).item()


def total(x: mx.array, group: Group, root: bool) -> mx.array:
    """The root's array: all others give zeros."""
    return mx.distributed.all_sum(x if root else mx.zeros_like(x), group=group)


def broadcast_text(group: Group, text: str, root: int = 0) -> str:
    """The root's text, on every rank."""
    mine, data = group.rank() == root, np.frombuffer(text.encode(), np.uint8)
    size = total(mx.array(len(data)), group, mine).item()
    data = mx.array(data if mine else np.zeros(size, np.uint8))
    return np.array(total(data, group, mine)).tobytes().decode()


def broadcast(group: Group, arrays: dict[str, mx.array], root: int = 0):
    """The root's arrays on every rank; those of the others are not looked at."""
    mine = group.rank() == root
    kinds = {k: (x.shape, str(x.dtype).split(".")[-1]) for k, x in arrays.items()}
    kinds = json.loads(broadcast_text(group, json.dumps(kinds), root))
    if not mine:
        arrays = {k: mx.zeros(s, getattr(mx, d)) for k, (s, d) in kinds.items()}
    sent = {k: total(arrays[k], group, mine) for k in kinds}
    mx.eval(sent)
    return sent


def deal(transformer: DiT, passes: Sequence[Pass], ranks: int) -> list[int]:
    """A rank for each pass, so that all are done soon. One that begins as an earlier one
    costs that one's rank only the rest; such are dealt last."""
    load, owners = [0.0] * ranks, {}
    begins = [transformer.shared(passes, n) for n in range(len(passes))]
    for n in sorted(range(len(passes)), key=lambda n: begins[n][1]):
        earlier, until = begins[n]
        spared = until / transformer.config.num_layers
        done = [load[r] + 1 - spared * (owners.get(earlier) == r) for r in range(ranks)]
        owners[n] = int(np.argmin(done))
        load[owners[n]] = min(done)
    return [owners[n] for n in range(len(passes))]


class Dealt:
    """A transformer that makes this rank's passes and hears of the others'."""

    def __init__(self, transformer: DiT, group: Group):
        self.transformer, self.group = transformer, group

    def __call__(
        self,
        video: Optional[Tokens],
        audio: Optional[Tokens],
        passes: list[Pass],
        trace: Optional[Trace] = None,
    ) -> list[tuple[Optional[mx.array], Optional[mx.array]]]:
        """As the transformer's: velocities (video, audio) of each pass, float32."""
        owners = deal(self.transformer, passes, self.group.size())
        mine = [p for p, r in zip(passes, owners) if r == self.group.rank()]
        made = iter(self.transformer(video, audio, mine, trace) if mine else ())
        own = [next(made) if r == self.group.rank() else None for r in owners]
        c, both = self.transformer.config, []
        for i, (tokens, channels) in enumerate(
            ((video, c.out_channels), (audio, c.audio_out_channels))
        ):
            if tokens is None:
                both.append([None] * len(passes))
                continue
            nothing = mx.zeros((*tokens.latent.shape[:2], channels))
            parts = [v[i].astype(mx.float32) if v else nothing for v in own]
            both.append(list(mx.distributed.all_sum(mx.stack(parts), group=self.group)))
        return list(zip(*both))
