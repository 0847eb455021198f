"""Contexts in the cache: found again only if nothing they depend on has changed. And
contexts from a file, which replace a prompt."""

import shutil
import sys

import mlx.core as mx
import pytest
from test_pipeline import latents_of

import generate
from ltx2 import pipeline
from ltx2.base import UserError
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
        events = pipe.stream(*(Request(p, seed=10, **SIZE) for p in prompts.split("|")))
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


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b""])
def test_damaged_contexts_are_made_again(run, tmp_path, damage):
    first, _ = run("a dog")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again, encoded = run("a dog")
    assert encoded == ["a dog"] and mx.array_equal(first, again)
    assert not run("a dog")[1]


def test_contexts_of_another_width_are_made_again(run, tmp_path):
    first, _ = run("a dog")
    (path,) = (tmp_path / "cache").iterdir()
    arrays = {k: mx.ones((1, 8, 7)) for k in ("video", "audio")}
    mx.save_safetensors(str(path), arrays)
    again, encoded = run("a dog")
    assert encoded == ["a dog"] and mx.array_equal(first, again)
    mx.save_safetensors(str(path), {k: mx.ones((8, 72)) for k in arrays})
    assert run("a dog")[1] == ["a dog"]


def test_a_cache_that_is_a_file_is_refused(checkpoint, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cache: cannot be written"):
        pipeline.load(checkpoint("ltx-2"), cache_contexts=tmp_path / "cache")


@pytest.mark.parametrize(
    "change",
    [{"name": "ltx-2-notc"}, {"dtype": mx.float16}, {"seed": 1}, {"cache": None}],
    ids=str,
)
def test_a_prompt_is_encoded_again_with_another_model_dtype_or_encoder(run, change):
    run("a dog")
    assert run("a dog", **change)[1] == ["a dog"]


# From a file

SILENT = SIZE | {"no_audio": True}


@pytest.fixture
def model(checkpoint, tmp_path):
    """A small LTX-2.5 without its text encoder."""
    folder = shutil.copytree(checkpoint("ltx-2.5"), tmp_path / "model")
    (folder / "text_encoders" / "ltx-2.5-text-encoder.safetensors").unlink()
    return pipeline.load(str(folder), None, "distilled", "float32")


VIDEO = mx.random.normal((1, 16, 72), key=mx.random.key(0))
AUDIO = mx.random.normal((1, 16, 48), key=mx.random.key(1))


@pytest.fixture
def save(tmp_path):
    """`save(video_context=x)`: the path of a file with these arrays."""

    def save(**arrays):
        path = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors")
        mx.save_safetensors(path, arrays)
        return path

    return save


def test_contexts_in_a_file_replace_the_prompt_and_the_text_encoder(
    model, checkpoint, save
):
    path = save(video_context=VIDEO, audio_context=AUDIO)
    found = latents_of(model, Request("", seed=10, contexts_file=path, **SIZE))
    whole = pipeline.load(str(checkpoint("ltx-2.5")), None, "distilled", "float32")
    given = {"contexts": {"a dog": (VIDEO, AUDIO)}}
    expected = latents_of(whole, Request("a dog", seed=10, **SIZE), **given)
    assert all(mx.array_equal(found[k], expected[k]) for k in ("video", "audio"))


def test_each_video_has_the_contexts_of_its_own_file(model, save):
    files = save(video_prompt_embeds=VIDEO[0]), save(video=VIDEO[0] * 2)
    two = (Request("", seed=10, contexts_file=path, **SILENT) for path in files)
    events = [e for e in model.stream(*two) if e.phase == "latents"]
    first, second = (e.snapshot.latents["video"] for e in events)
    assert not mx.array_equal(first, second)


@pytest.mark.parametrize(
    "arrays, prompt, reason",
    [
        ({"video_context": VIDEO}, "", "has no embeddings for audio: set no_audio"),
        ({"video_context": AUDIO}, "", "video embeddings have width 48, not 72"),
        ({"audio_context": AUDIO}, "", "has no text embeddings"),
        (
            {"video": mx.concatenate([VIDEO, VIDEO])},
            "",
            r"video embeddings \(1, tokens, width\), got \(2, ",
        ),
        (
            {"video": VIDEO, "audio": AUDIO},
            "a dog",
            "instead of the prompt: remove one",
        ),
    ],
)
def test_contexts_that_do_not_fit_are_refused(model, save, arrays, prompt, reason):
    with pytest.raises(UserError, match=reason):
        model.plan(Request(prompt, seed=10, contexts_file=save(**arrays), **SIZE))


def test_the_command_line_needs_no_prompt_then(checkpoint, save, tmp_path, monkeypatch):
    path, output = save(video_context=VIDEO), str(tmp_path / "a.mp4")
    argv = ["generate.py", "--model", str(checkpoint("ltx-2.5")), "--kind", "distilled"]
    argv += ["--contexts", path, "--no-audio", "--output", output, "--num-frames", "9"]
    monkeypatch.setattr(
        sys, "argv", [*argv, "--height", "64", "--width", "64", "--plan"]
    )
    generate.main()
    monkeypatch.setattr(sys, "argv", [*argv, "--enhance-prompt"])
    with pytest.raises(UserError, match="combined with --contexts"):
        generate.main()
    monkeypatch.setattr(sys, "argv", [*argv, "--contexts", str(tmp_path / "b.mp4")])
    with pytest.raises(UserError, match="b.mp4: no such file"):
        generate.main()
