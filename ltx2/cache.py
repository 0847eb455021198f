"""Contexts on disk: a cache by prompt, model and text encoder, or a user's file."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import mlx.core as mx

from . import hub
from .base import UserError, expect
from .guidance import Contexts, TextContexts
from .weights import save_arrays

STREAMS = "video", "audio"
NAMES = "{}_context", "{}_prompt_embeds", "{}"  # adapters', diffusers', a cache's


def read_contexts(path: str | Path) -> tuple[Optional[mx.array], ...]:
    """Contexts (1, N, D) of video and audio, None for a missing one, in a file."""
    arrays, _ = hub.read_arrays(path)
    found = []
    for stream in STREAMS:
        names = [name.format(stream) for name in NAMES]
        x = next((arrays[name] for name in names if name in arrays), None)
        found.append(x[None] if x is not None and x.ndim == 2 else x)
    if found[0] is None:
        raise UserError(f"{path} has no text embeddings (no tensor video_context)")
    return tuple(found)


def check_contexts(path: str, contexts: Contexts, config: dict, streams: Sequence):
    """UserError unless a file has contexts of all streams that fit the transformer."""
    for stream, x in zip(STREAMS, contexts):
        width = "caption_channels"  # that is projected to the transformer's
        if config.get("caption_proj_before_connector"):
            width = "audio_" * (stream == "audio") + "cross_attention_dim"
        if x is None:
            if stream in streams:
                raise UserError(f"{path} has no embeddings for audio: set no_audio")
            continue
        one = f"{stream} embeddings (1, tokens, width)"
        expect(x.ndim == 3 and len(x) == 1, one, x.shape, path)
        if x.shape[-1] != config[width]:
            widths = f"embeddings have width {x.shape[-1]}, not {config[width]}"
            raise UserError(f"{path} is for another model: its {stream} {widths}")


def given_contexts(given: TextContexts, config: dict, streams: Sequence) -> dict:
    """Contexts by prompt, passed by a caller, as MLX arrays; UserError if they do not fit
    the transformer or a stream lacks them."""
    found = {}
    for prompt, pair in given.items():
        where = f"contexts[{prompt!r}]"
        both = isinstance(pair, (tuple, list)) and len(pair) == 2
        expect(both, "a pair (video, audio)", pair, where)
        found[prompt] = tuple(None if x is None else mx.array(x) for x in pair)
        check_contexts(where, found[prompt], config, streams)
    return found


class ContextCache:
    """A folder of contexts for the transformer with this `config`; besides the prompt
    they depend on `made_by`."""

    def __init__(self, folder: str | Path, made_by: Any, config: dict):
        self.folder = hub.make_folder(folder)
        self.made_by, self.config = made_by, config

    def path(self, prompt: str) -> Path:
        key = json.dumps([prompt.strip(), self.made_by], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def __call__(self, prompts: Sequence[str], encode: Callable) -> TextContexts:
        """Contexts by prompt; missing ones are made and saved."""
        kept = {prompt: self.read(prompt) for prompt in prompts}
        missing = [prompt for prompt, contexts in kept.items() if contexts is None]
        found = encode(missing) if missing else {}
        for prompt, contexts in found.items():
            arrays = dict(zip(STREAMS, contexts))
            save_arrays(self.path(prompt), arrays, {"prompt": prompt})
        return kept | found

    def read(self, prompt: str) -> Optional[Contexts]:
        """The saved contexts of a prompt; None if there are none that fit."""
        with suppress(UserError):
            arrays, _ = hub.read_arrays(self.path(prompt))
            given = {prompt: tuple(map(arrays.get, STREAMS))}
            return given_contexts(given, self.config, STREAMS)[prompt]
