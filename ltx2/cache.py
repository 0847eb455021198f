"""Contexts kept on the disk, by prompt, model and text encoder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Callable, Sequence

import mlx.core as mx

from .guidance import Contexts


class ContextCache:
    """A folder of contexts; `made_by` is what else they depend on than the prompt."""

    def __init__(self, folder: str | Path, made_by: Any):
        self.folder, self.made_by = Path(folder).expanduser(), made_by
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, prompt: str) -> Path:
        key = json.dumps([prompt.strip(), self.made_by], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def __call__(
        self,
        prompts: Sequence[str],
        encode: Callable[[Sequence[str]], dict[str, Contexts]],
    ) -> dict[str, Contexts]:
        """Contexts by prompt; those that are not there are made and kept."""
        missing = [prompt for prompt in prompts if not self.path(prompt).exists()]
        found = encode(missing) if missing else {}
        for prompt, contexts in found.items():
            path = self.path(prompt)
            part = path.with_suffix(".part.safetensors")
            arrays = dict(zip(("video", "audio"), contexts))
            mx.save_safetensors(str(part), arrays, {"prompt": prompt})
            part.replace(path)
        for prompt in set(prompts) - found.keys():
            arrays = mx.load(str(self.path(prompt)))
            found[prompt] = arrays["video"], arrays["audio"]
        return found
