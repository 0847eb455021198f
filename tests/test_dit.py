"""The transformer: parity with the reference, no unneeded work, dtypes."""

from dataclasses import replace
from functools import partial

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from parity import cosine, read, relative_error
from streams import inputs, load, quantized

from ltx2 import dit, layers
from ltx2.base import UserError
from ltx2.dit import ALL_BLOCKS, Block, DiT, DiTConfig, Pass, Tokens


@pytest.fixture(scope="module")
def model(checkpoint, name):
    return load(checkpoint(name))


@pytest.fixture
def spy(monkeypatch):
    """`spy(cls, method)`: the list of later calls, each (instance, arguments)."""

    def watch(cls, method="__call__"):
        calls, original = [], getattr(cls, method)

        def watched(self, *args, **options):
            calls.append((self, args))
            return original(self, *args, **options)

        monkeypatch.setattr(cls, method, watched)
        return calls

    return watch


def reference(g, sample=0):
    return [
        g[key][sample : sample + 1] if key in g else None
        for key in ("out.video", "out.audio")
    ]


def assert_close(ours, theirs, tolerance=1e-5):
    """Both streams are close; a stream may be absent on both sides."""
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, mx.array(b)) < tolerance


# The reference's numbers


@pytest.mark.parametrize(
    "case",
    [
        "basic",
        "per_token",  # timesteps differ between tokens
        "attention_mask",  # weights between 0 and 1
        "frozen_video",
        "frozen_audio",
        "video_only",
        "audio_only",
    ],
)
def test_velocities_match_the_reference(model, name, golden, case):
    g = golden(f"{name}/transformer_{case}")
    for sample in range(len(g.get("out.video", g.get("out.audio")))):
        video, audio, texts = inputs(model, g, sample)
        [velocities] = model(video, audio, texts, [Pass()])
        assert_close(velocities, reference(g, sample))


def skipping(keep: np.ndarray) -> Pass:
    """The pass that skips what is 0 in `keep` (4 kinds, blocks)."""
    return Pass(
        skip_video_self_attn=np.flatnonzero(keep[0] == 0),
        skip_audio_self_attn=np.flatnonzero(keep[1] == 0),
        skip_a2v=np.flatnonzero(keep[2] == 0),
        skip_v2a=np.flatnonzero(keep[3] == 0),
    )


def test_perturbed_velocities_match_the_reference(model, name, golden):
    g = golden(f"{name}/transformer_perturbed")
    video, audio, texts = inputs(model, g)
    passes = [skipping(g["in.keep"][..., i]) for i in range(4)]
    for i, velocities in enumerate(model(video, audio, texts, passes)):
        assert_close(velocities, reference(g, i))


def test_intermediate_values_match_the_reference(model, name, golden):
    g = golden(f"{name}/transformer_basic")
    video, audio, texts = inputs(model, g)
    for stream, tokens in (("video", video), ("audio", audio)):
        prefix = "" if stream == "video" else "audio_"
        for rope, key in ((tokens.rope, "rope"), (tokens.cross_rope, "cross_rope")):
            for table, part in zip(rope, ("cos", "sin")):
                expected = g[f"mid.{stream}.{key}_{part}"][0]
                assert mx.abs(table - mx.array(expected)).max() < 1e-6
        rows, embedded = model[prefix + "adaln_single"](tokens.timesteps * 1000)
        expected = mx.array(g[f"mid.{stream}.timesteps"][0])
        # Sinusoids of angles up to 1000 differ by up to 5e-5 in float32.
        assert relative_error(rows.flatten(1), expected) < 2e-5
        expected = mx.array(g[f"mid.{stream}.embedded_timestep"][0])
        assert relative_error(embedded, expected) < 2e-5
    traced = {}
    model(video, audio, texts, [Pass()], trace=traced.__setitem__)
    assert traced.keys() == {k[4:] for k in g if k.startswith("mid.block")}
    for key, x in traced.items():
        assert relative_error(x, mx.array(g[f"mid.{key}"][:1])) < 1e-5


# Work


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_a_single_stream_runs_no_layer_of_the_other(model, name, golden, spy, stream):
    calls = spy(nn.Linear)
    video, audio, texts = inputs(model, golden(f"{name}/transformer_{stream}_only"))
    model(video, audio, texts, [Pass()])
    names = {id(layer): path for path, layer in model.named_modules()}
    used = {names[id(layer)] for layer, _ in calls}
    audio_layer = lambda path: "audio_" in path and "audio_to" not in path
    between = [p for p in used if "to_audio" in p or "audio_to" in p or "av_ca" in p]
    assert not between
    assert all(audio_layer(path) == (stream == "audio") for path in used)
    assert len({p.split(".")[1] for p in used if "blocks" in p}) == len(
        model.transformer_blocks
    )


def test_a_disabled_stream_is_attended_to_but_not_updated(model, name, golden):
    video, audio, texts = inputs(model, golden(f"{name}/transformer_basic"))
    traced = {}
    read_only = replace(video, enabled=False)
    [(_, with_v2a)] = model(read_only, audio, texts, [Pass()], traced.__setitem__)
    embedded = model.patchify_proj(video.latent)
    for key, x in traced.items():
        assert "audio" in key or mx.array_equal(x, embedded)
    [(_, without)] = model(video, audio, texts, [Pass(skip_v2a=ALL_BLOCKS)])
    assert not mx.allclose(with_v2a, without, atol=1e-3)


def four_passes() -> list[Pass]:
    """As guidance makes them: conditional, unconditional, perturbed, isolated."""
    perturbed = Pass(skip_video_self_attn={1}, skip_audio_self_attn={1})
    isolated = Pass(skip_a2v=ALL_BLOCKS, skip_v2a=ALL_BLOCKS)
    return [Pass(), Pass(1, 1), perturbed, isolated]


def test_passes_in_one_call_equal_passes_in_several(model, name, golden):
    video, audio, texts = inputs(model, golden(f"{name}/transformer_per_token"))
    passes = four_passes()
    together = model(video, audio, texts, passes)
    for i, velocities in enumerate(together):
        [alone] = model(video, audio, texts, passes[i : i + 1])
        for a, b in zip(velocities, alone):
            assert mx.array_equal(a, b)
        if i:
            assert not mx.allclose(velocities[0], together[0][0], atol=1e-3)


def test_common_work_of_passes_is_done_once(model, name, golden, spy):
    video, audio, texts = inputs(model, golden(f"{name}/transformer_basic"))
    blocks = len(model.transformer_blocks)
    calls, text_calls = spy(Block), spy(Block, "text_keys_values")
    model(video, audio, texts, four_passes())
    # The perturbed pass starts at block 1, the isolated one differs from the start.
    assert len(calls) == blocks + blocks + (blocks - 1) + blocks
    assert len(text_calls) == blocks * 2
    calls.clear()
    model(video, audio, texts, [Pass(), Pass(), Pass(skip_v2a={blocks - 1})])
    assert len(calls) == blocks + 0 + 1


@pytest.mark.parametrize("heads, dim", [(32, 64), (4, 16)])
def test_attention_and_feed_forward_in_pieces_equal_one_piece(monkeypatch, heads, dim):
    attention = layers.Attention(64, heads, dim, gated=True)
    feed_forward = layers.FeedForward(64)
    x, key = mx.random.normal((1, 50, 64)), mx.random.key(1)
    rope = layers.rope_cos_sin(np.arange(50.0)[None], heads * dim, heads, [20])
    mask = mx.random.normal((1, 1, 50, 50), key=key)

    def results():
        yield attention(x, None, rope, mask)
        yield attention(x, attention.keys_values(x[:, :9]))
        yield attention(x, values_only=True)
        yield feed_forward(x)

    expected = list(results())
    monkeypatch.setattr(layers, "MAX_FLOPS", 4 * heads * dim * 50 * 7)  # 7 queries
    monkeypatch.setattr(layers, "MAX_TOKENS", 11)
    for ours, theirs in zip(results(), expected):
        assert relative_error(ours, theirs) < 1e-6


def test_no_operation_takes_seconds_at_67000_tokens(monkeypatch):
    """Operations are counted, not computed, in a block of the released size."""
    config = checkpoints.CONFIGS["ltx-2.3-22b"]["transformer"] | {"num_layers": 1}
    flops, attend = [], mx.fast.scaled_dot_product_attention

    def attention(q, k, v, **options):
        flops.append(4 * q.shape[2] * k.size)
        return attend(q, k, v, **options)

    def linear(self, x):
        flops.append(2 * x.size * len(self.weight))
        return x @ self.weight.T

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(nn.Linear, "__call__", linear)
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    model = DiT.from_config(config)
    tokens = []
    for length, width, channels in ((67320, 128, 128), (268, 64, 128)):
        rope = (mx.zeros((32, length, width // 2)),) * 2
        cross = (mx.zeros((32, length, 32)),) * 2
        latent, one = mx.zeros((1, length, channels)), mx.zeros((1,))
        tokens.append(Tokens(latent, one, one, rope, cross))
    texts = model.project_text([(mx.zeros((1, 1024, 4096)), mx.zeros((1, 1024, 2048)))])
    passes = [Pass(), Pass(skip_video_self_attn=ALL_BLOCKS)]
    model(*tokens, texts, passes)
    assert max(flops) <= layers.MAX_FLOPS
    # 4 T^2 D of one self-attention and 16 T D^2 of each pass's feed-forward are there.
    assert sum(flops) > 4 * 67320**2 * 4096 + 2 * 16 * 67320 * 4096**2


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
def test_timesteps_by_token_take_no_memory():
    """As with an image, whose tokens have their own: AdaLN's rows are not copied."""
    x, rows = mx.random.normal((1, 4096, 64)), mx.random.normal((3, 64))
    levels = mx.arange(4096) % 3
    mx.eval(x, rows, levels)

    def peak(function, *inputs):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(function(x, *inputs))
        return mx.get_peak_memory() - before

    for function, n in ((dit.modulate, 2), (partial(dit.gated_add, x), 1)):
        # The least of many: MLX can write over the norm's array only if it is free in time
        least = min(peak(function, *[rows] * n, levels) for _ in range(50))
        assert x.nbytes <= least < 1.2 * x.nbytes
    for count in (1, 3, 6):
        values, index = mx.random.normal((count, 64)), levels % count
        assert mx.array_equal(dit.by_token(values, index) + 0 * x[0], values[index])


# Precision


def test_timesteps_are_embedded_in_float32(checkpoint, name, golden, monkeypatch):
    model = load(checkpoint(name), mx.bfloat16)
    seen = []
    original = layers.timestep_embedding
    monkeypatch.setattr(
        layers, "timestep_embedding", lambda t: seen.append(t) or original(t)
    )
    video, audio, texts = inputs(model, golden(f"{name}/transformer_basic"))
    sigma = mx.array([0.975])  # 0.9766 in bfloat16
    one = {"timesteps": sigma, "sigma": sigma, "level_index": None}
    model(replace(video, **one), replace(audio, **one), texts, [Pass()])
    factor = model.config.av_ca_timestep_scale_multiplier
    assert len(seen) == (8 if name == "ltx-2.3" else 6)
    assert {t.dtype for t in seen} == {mx.float32}
    assert {t.item() for t in seen} <= {975.0, np.float32(0.975) * np.float32(factor)}


def test_rope_tables_are_rounded_only_at_the_end(checkpoint, name, golden):
    g = golden(f"{name}/transformer_basic")
    exact, rounded = (
        inputs(load(checkpoint(name), dtype), g)[:2]
        for dtype in (mx.float32, mx.bfloat16)
    )
    for a, b in zip(exact, rounded):
        for rope_a, rope_b in ((a.rope, b.rope), (a.cross_rope, b.cross_rope)):
            for x, y in zip(rope_a, rope_b):
                assert mx.array_equal(x.astype(mx.bfloat16), y)


def float_dtypes(block: Block, args, monkeypatch) -> set:
    """The dtypes of all floating values computed or read inside a block."""
    # Count an RMS norm as one operation, as on a GPU: inside, it uses float32.
    monkeypatch.setattr(
        mx.fast, "rms_norm", lambda x, weight, eps: x if weight is None else x * weight
    )
    states, streams, text, skips = args
    seen = set()

    def note(part):
        if part["type"] == "primitive":
            seen.update(dtype for _, _, dtype in part["inputs"] + part["outputs"])

    call = lambda vx, ax: block((vx, ax), streams, text, skips)
    mx.export_function(note, call, *states)
    return {dtype for dtype in seen if mx.issubdtype(dtype, mx.floating)}


@pytest.mark.parametrize("bits", [16, 4])
def test_nothing_in_a_bfloat16_block_is_float32(
    checkpoint, name, golden, spy, monkeypatch, bits
):
    model = load(checkpoint(name), mx.bfloat16)
    model = model if bits == 16 else quantized(model, bits)
    calls = spy(Block)
    video, audio, texts = inputs(model, golden(f"{name}/transformer_per_token"))
    weights = mx.linspace(0, 1, 18)  # of the attention mask
    video = replace(video, mask=mx.broadcast_to(weights, (18, 18)))
    mx.eval(model(video, audio, texts, four_passes()))
    assert calls
    for block, args in list(calls):
        assert float_dtypes(block, args, monkeypatch) == {mx.bfloat16}


def test_the_float32_check_finds_a_float32_rope_table(
    checkpoint, name, golden, spy, monkeypatch
):
    model = load(checkpoint(name), mx.bfloat16)
    calls = spy(Block)
    video, audio, texts = inputs(model, golden(f"{name}/transformer_basic"))
    leak = tuple(table.astype(mx.float32) for table in video.rope)
    mx.eval(model(replace(video, rope=leak), audio, texts, [Pass()]))
    assert mx.float32 in float_dtypes(*calls[0], monkeypatch)


@pytest.mark.parametrize("bits, least", [(16, 0.9999), (8, 0.9995), (4, 0.99)])
def test_low_precision_stays_close_to_float32(
    model, checkpoint, name, golden, bits, least
):
    g = golden(f"{name}/transformer_basic")
    small = load(checkpoint(name), mx.bfloat16)
    small = small if bits == 16 else quantized(small, bits)
    exact, rounded = (
        m(video, audio, texts, [Pass()])[0]
        for m in (model, small)
        for video, audio, texts in [inputs(m, g)]
    )
    for a, b in zip(rounded, exact):
        assert a.dtype == mx.bfloat16
        assert cosine(a, b) > least


# Configuration


@pytest.fixture
def section(checkpoint, name):
    return read(checkpoint(name), "transformer")[0]


@pytest.mark.parametrize("key", DiTConfig.FIXED)
def test_what_is_not_implemented_is_refused(section, key):
    with pytest.raises(UserError, match=f"{key} is 'interleaved'.* implemented"):
        DiTConfig.from_dict(section | {key: "interleaved"})


def test_an_unknown_key_is_reported(section, caplog):
    DiTConfig.from_dict(section | {"zebra": 3})
    assert "'zebra': 3" in caplog.text


def test_a_missing_key_is_named(section):
    del section["num_layers"]
    with pytest.raises(UserError, match="num_layers"):
        DiTConfig.from_dict(section)


def test_released_configurations_raise_no_warning(caplog):
    for config in checkpoints.CONFIGS.values():
        if "transformer" in config:
            DiTConfig.from_dict(config["transformer"])
    assert not caplog.text


def test_building_a_model_does_not_change_the_random_state(section):
    mx.random.seed(3)
    mx.random.normal((1,))  # so that the state is not the seed
    state = mx.array(mx.random.state[0])
    DiT.from_config(section)
    assert mx.array_equal(mx.random.state[0], state)


@pytest.mark.parametrize("name", ["ltx-2.3"], indirect=True)
def test_2_5_has_no_bias_in_the_video_feed_forward(section):
    block = Block(DiTConfig.from_dict(section | {"ff_bias": False}))
    biased = {k for k, _ in tree_flatten(block.parameters()) if k.endswith(".bias")}
    assert "audio_ff.net.2.bias" in biased
    assert not any(key.startswith("ff.") for key in biased)


@pytest.mark.parametrize("name", ["ltx-2.3"], indirect=True)
def test_2_5_adds_an_embedding_to_single_frame_tokens(section, golden):
    # Without blocks, tokens are independent.
    changes = {"use_keyframes_abs_pos_embedding": True}
    model = DiT(DiTConfig.from_dict(section | changes))
    model.transformer_blocks = []
    mark = mx.linspace(-1, 1, model.config.video_dim)
    model.keyframes_abs_pos_embedding = mark[None]
    video, _, texts = inputs(model, golden("ltx-2.3/transformer_video_only"))

    def marked(keyframes):
        return model(replace(video, keyframes=keyframes), None, texts, [Pass()])[0][0]

    first_frame = mx.arange(18) < 6
    none, every = marked(mx.zeros(18)), marked(mx.ones(18))
    expected = mx.where(first_frame[:, None], every, none)
    assert mx.array_equal(marked(first_frame.astype(mx.float32)), expected)
    model.patchify_proj.bias += mark
    assert mx.allclose(marked(mx.zeros(18)), every, atol=1e-5)
    assert not mx.allclose(none, every, atol=1e-2)
