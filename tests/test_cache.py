"""Contexts in the cache: found again only if nothing they depend on has changed."""

import mlx.core as mx
import pytest

from ltx2 import pipeline
from ltx2.request import Request

SIZE = {"height": 64, "width": 64, "num_frames": 9, "sigmas": (1.0, 0.0)}


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """`run(prompt)`: latents, and the prompts that had to be encoded."""

    def run(
        prompts, name="ltx-2", cache=tmp_path / "cache", dtype=mx.float32, **changes
    ):
        encoder = str(checkpoint("gemma3", **changes))
        model = str(checkpoint(name))
        pipe = pipeline.load(model, encoder, "distilled", dtype, cache_contexts=cache)
        encoded = []

        def encode(prompts, trace):  # short contexts, which cost nothing
            encoded.extend(prompts)
            return {
                p: tuple(mx.full((1, 8, 48), len(p), dtype) for _ in range(2))
                for p in prompts
            }

        monkeypatch.setattr(pipe, "encode_prompts", encode)
        events = pipe.stream(*(Request(p, **SIZE) for p in prompts.split("|")))
        latents = next(e for e in events if e.phase == "latents").snapshot.latents
        return latents["video"], encoded

    return run


def test_a_prompt_is_encoded_once(run, tmp_path):
    first, encoded = run("a dog")
    assert encoded == ["a dog"]
    again, encoded = run("a dog")
    assert not encoded and mx.array_equal(first, again)
    _, encoded = run("a horse|a dog")
    assert encoded == ["a horse"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [{"name": "ltx-2-notc"}, {"dtype": mx.float16}, {"seed": 1}, {"cache": None}],
    ids=str,
)
def test_a_prompt_is_encoded_again_with_another_model_dtype_or_encoder(run, change):
    run("a dog")
    assert run("a dog", **change)[1] == ["a dog"]
