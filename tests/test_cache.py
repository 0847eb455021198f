"""Contexts on the disk: found again, and only where nothing they depend on differs."""

import mlx.core as mx
import pytest

from ltx2 import pipeline
from ltx2.request import Request

SIZE = {"height": 64, "width": 64, "num_frames": 9, "sigmas": (1.0, 0.0)}


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """`run(prompt)`: latents, and the prompts that had to be encoded."""

    def run(prompt, name="ltx-2", cache=tmp_path / "kept", dtype=mx.float32, **changes):
        encoder = str(checkpoint("gemma3", **changes))
        model = str(checkpoint(name))
        pipe = pipeline.load(model, encoder, "distilled", dtype, cache_contexts=cache)
        asked, encode = [], pipe.encode_prompts
        watched = lambda prompts, trace: asked.extend(prompts) or encode(prompts)
        monkeypatch.setattr(pipe, "encode_prompts", watched)
        events = pipe.stream(*(Request(p, **SIZE) for p in prompt.split("|")))
        latents = next(e for e in events if e.phase == "latents").snapshot.latents
        return latents["video"], asked

    return run


def test_a_prompt_is_encoded_once(run, tmp_path):
    first, asked = run("a dog")
    assert asked == ["a dog"]
    again, asked = run("a dog")
    assert not asked and mx.array_equal(first, again)
    _, asked = run("a cat|a dog")
    assert asked == ["a cat"]
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [{"name": "ltx-2-notc"}, {"dtype": mx.float16}, {"seed": 1}, {"cache": None}],
    ids=str,
)
def test_what_depends_on_something_else_is_not_found(run, change):
    run("a dog")
    assert run("a dog", **change)[1] == ["a dog"]
