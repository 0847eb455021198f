"""A checkpoint of a run: resume the run, or only decode."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import mlx.core as mx

from .base import UserError, checked, parse_json
from .hub import read_arrays
from .latents import Streams
from .record import Load, recorded
from .request import Request
from .stages import Job
from .weights import save_arrays

HISTORY = "gradient_estimation"  # a sampler that keeps state between steps


@dataclass(frozen=True)
class Snapshot:
    """The state of a run, and what is needed to resume it. Arrays have a batch axis."""

    request: Request
    stages: list[dict[str, Any]]  # as planned, see `as_json`
    load: Load
    files: dict[str, str]  # the model's, with their fingerprints
    stage: int = 0  # the current stage
    step: int = 0  # how many of its steps are done
    tokens: Streams = field(default_factory=dict)  # (1, T, C) of the current stage
    guided: Streams = field(default_factory=dict)  # its last prediction, for skip_step
    latents: Streams = field(default_factory=dict)  # normalized, of the stage before
    kept: Streams = field(default_factory=dict)  # the result's, of earlier stages

    ARRAYS = ("tokens", "guided", "latents", "kept")

    def check_request(self, request: Request) -> None:
        """UserError if a planned request differs, except for a predicted length."""
        mine = vars(self.request)
        length = ("num_frames", "auto_duration") if request.auto_duration else ()
        changed = [k for k in mine if mine[k] != vars(request)[k] and k not in length]
        if changed:
            made = f"the saved latents were made with another {' and '.join(changed)}"
            raise UserError(f"{made}: resume with the same request, or with none")

    def check(self, job: Job, files: dict[str, str]) -> None:
        """UserError if the model or the plan differ, or the state is incomplete."""
        # res_2s ends with one more call
        steps = [s.steps + (s.sampler == "res_2s") for s in job.stages] + [0]
        place = 0 <= self.stage < len(steps) and 0 <= self.step <= steps[self.stage]
        if self.files != files or self.stages != as_json(job) or not place:
            raise UserError("the latents were made with a different model or settings")
        stage = job.stages[self.stage] if self.step else None
        if stage and (stage.step_cache or stage.sampler == HISTORY):
            keep = f"{HISTORY} and step_cache keep state that is not saved"
            raise UserError(f"{keep}: resume only between stages")

    def save(self, path: Union[str, Path]) -> None:
        """Write a safetensors file; it gets its name when it is complete."""
        state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays = {}
        for part in self.ARRAYS:
            arrays |= {f"{part}.{k}": x for k, x in state.pop(part).items()}
        state |= {k: dataclasses.asdict(state[k]) for k in ("request", "load")}
        text = json.dumps(state)
        save_arrays(path, arrays, {"ltx2": text, "sha256": digest(text, arrays)})

    @classmethod
    def read(cls, path: Union[str, Path]) -> Snapshot:
        """Read what `save` wrote; UserError for any other file."""
        arrays, metadata = read_arrays(path)
        text = metadata.get("ltx2", "{}")
        state = parse_json(text, f"{path}: ")
        shapes = {k: [*x.shape] for k, x in arrays.items()}
        same = state.pop("shapes", None) == shapes != {}  # as older versions saved
        if not same and metadata.get("sha256") != digest(text, arrays):
            raise UserError(f"{path} does not contain saved latents, or was changed")
        streams: dict[str, Streams] = {part: {} for part in cls.ARRAYS}
        for key, x in arrays.items():
            part, _, name = key.partition(".")
            streams.get(part, {})[name] = x
        found = checked(cls, state | streams, f"{path}: ")
        return dataclasses.replace(found, request=recorded(found.request))


def digest(text: str, arrays: Streams) -> str:
    """The sha256 of saved latents and their settings, by which a change is seen."""
    found = hashlib.sha256(text.encode())
    for name, x in sorted(arrays.items()):
        found.update(f"{name} {x.shape} {x.dtype}".encode())
        found.update(x.flatten().view(mx.uint8))
    return found.hexdigest()


def as_json(job: Job) -> list[dict[str, Any]]:
    """A job's stages as JSON, to save and compare."""
    return json.loads(json.dumps([dataclasses.asdict(stage) for stage in job.stages]))
