"""Steering without another pass: NAG, and prompts by time."""

import dataclasses
import json
import zlib
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from parity import relative_error
from test_pipeline import latents_of

import generate
from ltx2 import layers
from ltx2.base import UserError, checked
from ltx2.defaults import NEGATIVE_PROMPT
from ltx2.guidance import Prompts
from ltx2.latents import LatentState, audio_bounds, video_bounds
from ltx2.layers import Attention, Nag, Steering
from ltx2.request import Request, Segment
from ltx2.tiles import Span, part

SIZE = {"height": 64, "width": 96, "num_frames": 17, "sigmas": (1.0, 0.5, 0.0)}
HALVES = Segment(0, 0.35, "a cat"), Segment(0.35, 0.7, "a dog")


@pytest.fixture(scope="module")
def pipe(load):
    return load("ltx-2.3")


def latents(pipe, job):
    """With random contexts, the same each time for a prompt."""

    def contexts(prompt):
        key = mx.random.key(zlib.crc32(prompt.encode()))
        return tuple(mx.random.normal((1, 64, w), key=key) for w in (128, 64))

    return latents_of(pipe, job, contexts={p: contexts(p) for p in job.prompts})


def run(pipe, prompt="a cat", **options):
    return latents(pipe, pipe.plan(Request(prompt, seed=10, **SIZE | options)))


def difference(a, b):
    return max(relative_error(a[k], b[k]) for k in b)


# Normalized attention guidance


@pytest.fixture
def attention():
    """Gated attention with keys and values of a prompt and of a negative one."""
    mx.random.seed(4)
    layer = Attention(64, heads=4, head_dim=16, context_dim=32, gated=True)
    texts = (mx.random.normal((1, 9, 32)) for _ in range(2))
    return layer, mx.random.normal((1, 50, 64)), *map(layer.keys_values, texts)


def test_nag_is_applied_before_gates_and_output_projection(attention):
    layer, x, prompt, negative = attention
    q = layer._split(layer.q_norm(layer.to_q(x))).swapaxes(1, 2)
    attend = lambda k, v: mx.softmax(q @ k.swapaxes(2, 3) / 4, axis=-1) @ v
    z, other = (np.array(attend(*kv)) for kv in (prompt, negative))
    g = 5 * z - 4 * other
    ratio = np.abs(g).sum((1, 3)) / np.abs(z).sum((1, 3))
    # Some tokens grow by more than the limit, some by less.
    tau = float(np.median(ratio))
    g *= (np.minimum(ratio, tau) / ratio)[:, None, :, None]
    mixed = mx.array(0.3 * g + 0.7 * z).swapaxes(1, 2)
    gates = 2 * mx.sigmoid(layer.to_gate_logits(x))
    expected = layer.to_out[0]((mixed * gates[..., None]).flatten(2))
    ours = layer(x, prompt, nag=Nag(5.0, tau, 0.3), negative=negative)
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(layer(x, prompt), expected) > 0.1


def test_steered_attention_in_pieces_equals_one_piece(attention, monkeypatch):
    layer, x, prompt, negative = attention
    mask = mx.arange(50)[:, None] % 3 == mx.arange(3)
    steering = Steering(mask[None, None], Nag(5.0))
    options = steering({"keys_values": prompt}, {"keys_values": negative})
    expected = layer(x, **options)
    monkeypatch.setattr(layers, "MAX_TOKENS", 7)
    assert relative_error(layer(x, **options), expected) < 1e-6


def test_nag_changes_both_streams_away_from_the_negative_prompt(pipe):
    plain = run(pipe)
    away = run(pipe, nag_scale=11.0, negative_prompt="ugly")
    assert all(relative_error(away[k], plain[k]) > 1e-3 for k in plain)
    same = run(pipe, nag_scale=11.0, negative_prompt="a cat")
    assert difference(same, plain) < 1e-5
    weaker = run(pipe, nag_scale=11.0, nag_alpha=0.1, negative_prompt="ugly")
    assert difference(weaker, plain) < difference(away, plain)


def test_a_scale_of_1_is_the_plain_run_without_a_negative_prompt(pipe, monkeypatch):
    job = pipe.plan(Request("a cat", seed=10, nag_scale=1.0, **SIZE))
    assert job.prompts == ("a cat",)
    plain = run(pipe)
    monkeypatch.setattr(Nag, "__call__", None)
    off = run(pipe, nag_scale=1.0)
    assert all(mx.array_equal(off[k], plain[k]) for k in plain)


def test_the_negative_prompt_is_encoded_for_nag(pipe):
    job = pipe.plan(Request("a cat", seed=10, nag_scale=5, **SIZE))
    assert job.prompts == ("a cat", NEGATIVE_PROMPT)
    assert job.negative_prompt == NEGATIVE_PROMPT


def test_all_stages_windows_and_tiles_have_nag(load):
    ups = ["spatial-x2", "temporal-x2"]
    pipe, nag = load("ltx-2.5", upsamplers=ups), {"nag_scale": 5, "nag_tau": 2}
    size = {"height": 128, "width": 128, "num_frames": 49, **nag}
    windows = {"chunk_frames": 25, "carry_frames": 17}
    for options in (
        {"stages": "dfr", "temporal_rounds": 1},
        {"stages": "two"},
        windows,
    ):
        job = pipe.plan(Request("a cat", seed=10, **size, **options))
        assert {stage.prompts.nag for stage in job.stages} == {Nag(5, 2, 0.25)}


def test_guided_passes_of_the_prompt_have_nag_and_the_negative_one_not(
    load, monkeypatch
):
    pipe = load("ltx-2.3", "dev")
    calls, original = [], Nag.__call__
    watch = lambda self, *arguments: calls.append(self) or original(self, *arguments)
    monkeypatch.setattr(Nag, "__call__", watch)
    job = pipe.plan(
        Request("a cat", seed=10, nag_scale=5, **SIZE | {"sigmas": (1.0, 0.0)})
    )
    latents(pipe, job)
    blocks = pipe.dit_config.num_layers
    # Conditional and isolated passes in all blocks, the perturbed one from its block on.
    first = job.stages[0].guidance["video"].stg_blocks[0]
    assert len(calls) == 2 * (2 * blocks + blocks - first)


# Prompts by time


def test_equal_segments_give_the_plain_run(pipe):
    equal = [dataclasses.replace(s, prompt="a cat") for s in HALVES]
    assert difference(run(pipe, segments=equal), run(pipe)) < 1e-5
    assert difference(run(pipe, "", segments=equal), run(pipe)) < 1e-5
    assert difference(run(pipe, "", segments=HALVES), run(pipe)) > 1e-3


def test_segments_need_no_prompt_in_a_call(pipe, monkeypatch):
    asked = lambda self, request, **_: iter([SimpleNamespace(request=request)])
    monkeypatch.setattr(type(pipe), "stream", asked)
    with pytest.raises(UserError, match="prompt must be text"):
        pipe.generate(seed=10, **SIZE)
    assert pipe.generate(segments=HALVES, **SIZE).request.segments == HALVES


def test_a_changed_later_segment_leaves_earlier_tokens_of_an_attention(attention):
    layer, x, prompt, negative = attention
    state = LatentState.initial(audio_bounds(50), 8)
    times = {"audio": ((0.0, 1.0), (1.0, 2.0))}
    steering = Prompts(Nag(5.0), ("a", "b"), times).steering("audio", state)
    texts = [mx.random.normal((1, 9, 32)) for _ in range(3)]
    read = lambda text: {
        "keys_values": layer.keys_values(mx.concatenate([texts[0], text], axis=1))
    }
    negative = {"keys_values": negative}
    first, second = (layer(x, **steering(read(t), negative)) for t in texts[1:])
    earlier = audio_bounds(50)[0].mean(axis=1) < 1
    assert 20 < earlier.sum() < 30
    changed = np.array((first != second).any(axis=2))[0]
    assert (changed == ~earlier).all()


def test_tokens_read_the_segment_of_their_own_time():
    times = {"video": ((0.0, 0.5), (0.45, 0.6), (0.8, 1.0))}  # an overlap, a gap
    prompts = Prompts(None, ("a", "b", "c"), times)
    state = LatentState.initial(video_bounds(3, 1, 1, 24.0), 8)  # 0.02, 0.21, 0.54 s
    for frame in (11, 14, 17, 400):  # appended, at 0.48, 0.6, 0.73 s and after the end
        state = state.guide(mx.zeros((1, 1, 1, 1, 8)), frame, 24.0)
    mask = prompts.steering("video", state).mask
    read = ["".join(np.array(list("abc"))[row]) for row in np.array(mask[0, 0])]
    assert read == ["a", "a", "b", "ab", "b", "b", "c"]
    tile, index, _ = part(
        state, SimpleNamespace(latent=(3, 1, 1)), Span(0, 1, 0, 0), Span(0, 1, 0, 0)
    )
    assert mx.array_equal(
        prompts.steering("video", tile).mask, mask[:, :, mx.array(index)]
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fps": 50, "conditioned_fps": 25},
        {"temporal_upsample": True},
        {"chunk_frames": 25, "carry_frames": 17},
        {"stages": "dfr", "temporal_rounds": 2},
        {"stages": "dfr", "temporal_rounds": 1, "fps": 50},
    ],
    ids=str,
)
def test_times_are_those_of_the_video_in_every_stage(load, options):
    pipe = load("ltx-2.5", upsamplers=["spatial-x2", "temporal-x2"])
    size = {"height": 128, "width": 128, "num_frames": 49, "fps": 24} | options
    ends = [n * 49 / 3 / size["fps"] for n in range(4)]
    segments = [Segment(*pair, text) for *pair, text in zip(ends, ends[1:], "abc")]
    job = pipe.plan(Request("a cat:", seed=10, segments=segments, **size))
    assert job.prompts == ("a cat: a", "a cat: b", "a cat: c")
    for stage in job.stages:
        first = stage.window.start + getattr(stage.part, "first", 0)
        for stream in ("video", "audio"):
            bounds = stage.size.bounds(stream)
            # A stage's tokens, whatever their positions, divide its frames.
            share = bounds[0].mean(axis=1) / bounds[0].max()
            times = (first + share * stage.size.num_frames) / stage.size.fps
            texts = np.array(stage.prompts.segments)
            mask = stage.prompts.steering(stream, LatentState.initial(bounds, 8)).mask
            mask = np.ones((len(times), 1), bool) if mask is None else mask[0, 0]
            for time, row in zip(times, np.array(mask)):
                if min(abs(time - end) for end in ends[1:3]) > 0.02:
                    [text] = texts[row]
                    assert text[-1] == "abc"[np.searchsorted(ends[1:3], time)]


def test_a_window_reads_only_the_segments_of_its_frames(load):
    pipe = load("ltx-2.5")
    segments = [Segment(n, n + 1, text) for n, text in enumerate("abcd")]
    size = {"height": 64, "width": 64, "chunk_frames": 49, "carry_frames": 25}
    job = pipe.plan(Request("", seed=10, segments=segments, stages="one", **size))
    assert job.request.num_frames == 97  # as long as the segments
    read = ["".join(stage.prompts.segments) for stage in job.stages]
    assert read == ["abc", "bcd", "cd"]


def test_the_negative_prompt_is_not_segmented(load):
    pipe = load("ltx-2.3", "dev")
    equal = [dataclasses.replace(s, prompt="a cat") for s in HALVES]
    options = {"negative_prompt": "ugly", "nag_scale": 5.0, "images": ()}
    job = pipe.plan(Request("", seed=10, segments=HALVES, **SIZE, **options))
    assert job.prompts == ("a cat", "a dog", "ugly") and job.negative_prompt == "ugly"
    plain = run(pipe, **options)
    assert difference(run(pipe, segments=equal, **options), plain) < 1e-4


def test_the_prompt_is_put_before_each_segment_that_does_not_begin_with_it():
    segments = Segment(0, 1, "it runs"), Segment(1, 2, "a cat sleeps")
    assert Request("a cat", seed=10, segments=segments).prompts == (
        "a cat it runs",
        "a cat sleeps",
    )
    assert Request("", seed=10, segments=segments).prompts == (
        "it runs",
        "a cat sleeps",
    )
    assert Request("a cat").prompts == ("a cat",)


def test_segments_are_recorded_and_parsed():
    request = Request("a cat", seed=10, segments=HALVES)
    recorded = json.loads(json.dumps(dataclasses.asdict(request)))
    assert checked(Request, recorded, "request") == request
    flags = ["--segment", "0-.35:a cat", "--segment", "0.35-0.7:a dog: a brown one"]
    parsed = generate.parser().parse_args(flags).segments
    assert parsed == [HALVES[0], Segment(0.35, 0.7, "a dog: a brown one")]


def segments(*times):
    return {"segments": [Segment(*pair, "a") for pair in times]}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            segments((0, 0.7), (0.7, 9)),
            "from 0 to 0.71 s, .* at most 0.33 s, got 0-0.7,",
        ),
        (segments((0, 0.3)), "segments must follow each other"),
        (segments((0.4, 0.7)), "segments must follow each other"),
        (segments((0, 0.1), (0.5, 0.7)), "segments must follow each other"),
        (segments((0, 0.6), (0.1, 0.7)), "segments must follow each other"),
        (segments((0, float("nan")), (0.3, 0.7)), "segments must follow each other"),
        (segments((0, 0.4), (0.4, 0.2), (0.2, 0.7)), "segments must follow each other"),
        ({"segments": [Segment(0, 0.7, " ")]}, "the prompt is empty"),
        (segments((0, 0.7)) | {"contexts_file": "a"}, "combined with contexts_file"),
        (segments((0, 0.7)) | {"auto_duration": (1, 2)}, "combined with auto_duration"),
        ({"nag_scale": 0.5}, "nag_scale must be between 1 and 100, got 0.5"),
        ({"nag_tau": 2.0}, "nag_tau needs nag_scale"),
        ({"nag_scale": 2.0, "nag_tau": 0.0}, "nag_tau must be between 0.01 and 10"),
        ({"nag_scale": 2.0, "nag_alpha": 1.5}, "nag_alpha must be between 0 and 1"),
        ({"negative_prompt": "ugly"}, "negative_prompt needs .* or nag_scale above 1"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_the_run(pipe, options, message):
    prompt = "" if "segments" in options else "a cat"
    with pytest.raises(UserError, match=message):
        pipe.plan(Request(prompt, seed=10, **SIZE | options))
