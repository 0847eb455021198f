"""Saved latents: enough to go on with a run, or only to decode."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import mlx.core as mx

from .base import UserError
from .request import Job, Request
from .sampling import Streams


def stages_of(job: Job) -> list[dict[str, Any]]:
    """A job's stages as JSON gives them back, to be compared."""
    return json.loads(json.dumps([dataclasses.asdict(stage) for stage in job.stages]))


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands, and what it takes to go on exactly there."""

    request: Request
    stages: list[dict[str, Any]]  # as planned, see `stages_of`
    load: dict[str, Any]  # what `pipeline.load` takes
    files: dict[str, str]  # the model's, with their fingerprints
    stage: int = 0  # the one under way
    step: int = 0  # how many of its steps are done
    tokens: Streams = field(default_factory=dict)  # (1, T, C) of the stage under way
    guided: Streams = field(default_factory=dict)  # its last prediction, for skip_step
    latents: Streams = field(default_factory=dict)  # normalised, of the stage before
    kept: Streams = field(default_factory=dict)  # the sound, if an earlier stage's is

    ARRAYS = ("tokens", "guided", "latents", "kept")

    def check(self, job: Job, files: dict[str, str]) -> None:
        """Refuse to go on with another model, or with what was planned otherwise."""
        if self.files != files or self.stages != stages_of(job):
            raise UserError("the saved latents are of another model or other settings")
        stage = job.stages[self.stage] if self.step else None
        if stage and (stage.step_cache or stage.sampler == "gradient_estimation"):
            raise UserError(
                "gradient_estimation and step_cache look back at steps that are not "
                "saved: a run with them can only be resumed between stages"
            )

    def save(self, path: Union[str, Path]) -> None:
        """Write a safetensors file; it takes its name when it is complete."""
        state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = {
            f"{part}.{name}": x
            for part in self.ARRAYS
            for name, x in state.pop(part).items()
        }
        state["request"] = dataclasses.asdict(self.request)
        part = Path(path).with_suffix(".part.safetensors")
        mx.save_safetensors(str(part), arrays, {"ltx2": json.dumps(state)})
        part.replace(path)

    @classmethod
    def read(cls, path: Union[str, Path]) -> Snapshot:
        """Read what `save` wrote; UserError if it is something else."""
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        try:
            arrays, metadata = mx.load(str(path), "safetensors", return_metadata=True)
            state = json.loads(metadata["ltx2"])
            state["request"] = Request.from_json(state["request"])
            state |= {part: {} for part in cls.ARRAYS}
            for key, x in arrays.items():
                part, name = key.split(".")
                state[part][name] = x
            return cls(**state)
        except (RuntimeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path} holds no saved latents") from None
