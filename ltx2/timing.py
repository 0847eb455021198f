"""The time of a run: counted operations, divided by this machine's matmul rate,
measured on the spot, and by the share of it that is reached."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import mlx.core as mx

from .base import dtype_name, table
from .device import matmul_rate
from .work import operations

KINDS = {"inputs": 1, "video": 1, "audio": 2}  # phases; the others are of transformers
# The shares of transformers, of the video VAE and of the vocoder, by device and dtype.
# CPU: 0.60 (4 bits, few tokens) to 0.97 for a block of the 19B, 0.52 to 0.87 for the VAEs
# of the 19B and 2.3, 0.025 for the 19B's vocoder. Metal may compute less than is counted.
SHARES = {("cpu", "float32"): (0.8, 0.7, 0.025)}
LOW, HIGH = (0.4, 0.2, 0.1), (0.95, 1.5, 0.8)  # for all others


@dataclass(frozen=True)
class TimePlan:
    """Operations by phase, the matmul rate (per second), and the least and largest
    shares of it that are reached."""

    work: Mapping[str, float]
    rate: float
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    where: str

    def seconds(self, phase: str) -> tuple[float, float]:
        """The least and the largest time of a phase."""
        kind, best = KINDS.get(phase, 0), self.work[phase] / self.rate
        return best / self.high[kind], best / self.low[kind]

    def __str__(self) -> str:
        rows = [(k, n / 1e12, *self.seconds(k)) for k, n in self.work.items()]
        rows.append(("all", *map(sum, list(zip(*rows))[1:])))
        heads = ("phase", "TFLOP", "seconds")
        rate = f"{self.rate / 1e12:.3g} TFLOP/s"
        how = f"computed from a matmul rate of {rate}, measured now; without reading files"
        if self.low != self.high:
            heads = (*heads[:2], "seconds from", "to")
            how += f"; a range, because {self.where} was never timed"
        return f"{table(heads, [row[: len(heads)] for row in rows])}\n{how}"


def time_plan(pipe: Any, jobs: Sequence[Any]) -> TimePlan:
    """The time of jobs on this machine; takes less than a second."""
    total: dict[str, float] = {}
    for job in jobs:
        phases = {stage.name: stage.phase for stage in job.stages}
        for name, n in operations(job, pipe.checkpoint).items():
            phase = phases.get(name, name)
            total[phase] = total.get(phase, 0) + n
    cpu = mx.default_device().type == mx.cpu
    device = "cpu" if cpu else mx.device_info().get("architecture", "this GPU")
    dtype = dtype_name(pipe.dtype)
    shares = (SHARES.get((device, dtype), bound) for bound in (LOW, HIGH))
    return TimePlan(total, matmul_rate(pipe.dtype), *shares, f"{device} in {dtype}")


class Remaining:
    """The seconds that are left: by the steps so far, of later phases by operations."""

    def __init__(self, works: list[dict[str, float]]):
        order = {"text": 0, "inputs": 0, "audio": 2, "video": 2}  # stages are between
        parts = [(n, k, w) for n, work in enumerate(works) for k, w in work.items()]
        self.parts = sorted(parts, key=lambda part: order.get(part[1], 1))
        self.begun: set[tuple[int, str]] = set()  # of several videos in their own order
        self.times: list[float] = []  # of the stage's start and its steps

    def __call__(self, event: Any) -> Optional[float]:
        """After a step; None for other events."""
        if event.step == 0:
            self.times = [time.perf_counter()]
            self.begun.add((event.job, event.phase))
        if not event.step or event.denoised is None:
            return None
        self.times.append(time.perf_counter())
        # Without the first step, in which weights are read, once there is another.
        own = self.times[len(self.times) > 2 :]
        here = [part[:2] for part in self.parts].index((event.job, event.phase))
        later = sum(w for *k, w in self.parts[here + 1 :] if tuple(k) not in self.begun)
        later /= self.parts[here][2]
        left = event.steps - event.step + event.steps * later
        return left * (own[-1] - own[0]) / (len(own) - 1)
