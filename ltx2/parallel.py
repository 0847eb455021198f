"""Several machines: all run the same program on the same request. Rank 0 encodes the
prompts, decodes and writes; the denoising steps are split in one of MODES."""

import pickle
import secrets
from typing import Any, Callable, Optional, Sequence, TypeVar, Union

import mlx.core as mx
import numpy as np

from .base import UserError
from .dit import Block, DiT, DiTConfig, Pass
from .options import check_choice

Group = mx.distributed.Group
T = TypeVar("T")
MODES = {
    "data": "each machine makes some of the videos",
    "passes": "each machine computes some guidance passes of a step",
    "tensor": "each machine holds a part of every transformer block",
}
EARLIER_NAMES = {"many": "data", "shards": "tensor"}


def broadcast(group: Optional[Group], value: Any, root: int = 0) -> Any:
    """The root's value on every rank, pickled: all ranks belong to the same user."""
    if group is None:
        return value
    is_root = group.rank() == root
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    size = mx.distributed.all_sum(mx.array(len(data) * is_root), group=group).item()
    data = mx.array(data if is_root else np.zeros(size, np.uint8))
    return pickle.loads(np.array(mx.distributed.all_sum(data, group=group)))


def random_seed(group: Optional[Group]) -> int:
    """A new seed, the same on every rank."""
    return broadcast(group, secrets.randbelow(2**32))


class PassParallel:
    """A transformer that computes every Nth pass and gathers the rest. On two machines,
    a perturbed pass is computed where the pass is with which it shares blocks."""

    def __init__(self, transformer: DiT, group: Group):
        self.model, self.group = transformer, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, video, audio, texts: list, passes: list[Pass], trace=None):
        """Velocities (video, audio) of each pass, float32."""
        local = slice(self.group.rank(), None, self.group.size())
        own = passes[local] and self.model(video, audio, texts, passes[local], trace)
        c, gathered = self.model.config, []
        both = (video, c.out_channels), (audio, c.audio_out_channels)
        for i, (tokens, width) in enumerate(both):
            if tokens is None:
                gathered.append([None] * len(passes))
                continue
            velocities = mx.zeros((len(passes), *tokens.latent.shape[:2], width))
            if own:
                velocities[local] = mx.stack([v[i].astype(mx.float32) for v in own])
            # Evaluated before and after: a GPU must not wait for another machine.
            mx.eval(velocities)
            velocities = mx.distributed.all_sum(velocities, group=self.group)
            mx.eval(velocities)
            gathered.append(list(velocities))
        return list(zip(*gathered))


class Machines:
    """The machines of a run, connected by an MLX group; without one, this machine."""

    def __init__(self, group: Optional[Group] = None, mode: Optional[str] = None):
        self.group, self.mode = group, ""  # of MODES, when work is split
        self.rank, self.count = (group.rank(), group.size()) if group else (0, 1)
        self.requested = EARLIER_NAMES.get(mode, mode)
        if mode is not None:
            check_choice("parallel", self.requested, tuple(MODES))

    def __str__(self) -> str:
        return MODES.get(self.mode, "one machine")

    def split(self, jobs: int, passes: int, fits: bool, c: DiTConfig, group_size: int):
        """Choose the requested mode, or the one that exchanges least if all `fits`."""
        if self.group is None:
            return
        n = self.count
        mode = self.requested or "tensor"
        fits = mx.distributed.all_min(mx.array(fits), group=self.group).item()
        if fits and self.requested is None:
            mode = "data" if jobs >= n else "passes" if passes > 1 else "tensor"
        if mode == "data" and jobs == 1:
            raise UserError("--parallel data needs more than one video")
        if mode == "passes" and passes == 1:
            raise UserError("--parallel passes needs guidance")
        heads = c.num_attention_heads, c.audio_num_attention_heads
        widths = c.video_dim, c.audio_dim
        divides = all(h % n == 0 for h in heads)
        divides &= all(width % (n * group_size) == 0 for width in widths)
        if mode == "tensor" and not divides:
            many = f"{heads[0]} and {heads[1]} heads among {n} machines"
            fewer = "use fewer machines or --parallel passes"
            raise UserError(f"--parallel tensor cannot divide {many}: {fewer}")
        self.mode = mode

    def deal(self, jobs: Sequence[T]) -> list[tuple[int, T]]:
        """The jobs that this machine denoises, with their numbers."""
        jobs = list(enumerate(jobs))
        return jobs[self.rank :: self.count] if self.mode == "data" else jobs

    def gather(self, done: dict[int, T], jobs: int) -> dict[int, T]:
        """What all machines have done, by the number of the job."""
        if self.mode != "data":
            return done
        roots = ((n, n % self.count) for n in range(jobs))
        return {n: broadcast(self.group, done.get(n), root) for n, root in roots}

    def on_rank_0(self, compute: Callable[[], T]) -> T:
        """Compute on rank 0 and broadcast."""
        return broadcast(self.group, compute() if self.rank == 0 else None)

    # Whether ranks compute the same step
    share_steps = property(lambda self: self.mode in ("passes", "tensor"))

    def agree(self, value: float) -> float:
        """Rank 0's value, if ranks compute the same step."""
        return broadcast(self.group, value) if self.share_steps else value

    def wait(self) -> None:
        """Wait for machines of the same step: no GPU waits while one reads weights."""
        if self.share_steps:
            mx.eval(mx.distributed.all_sum(mx.zeros(1), group=self.group))

    def transformer(self, model: DiT) -> Union[DiT, PassParallel]:
        """The transformer as the denoiser calls it."""
        return PassParallel(model, self.group) if self.mode == "passes" else model

    def shard(self, model: Union[DiT, Block]) -> None:
        """Keep this machine's part of the transformer or of a block."""
        if self.mode == "tensor":
            model.shard(self.group)
