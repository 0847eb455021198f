"""The diffusion decoder of LTX-2.5 against plain neighborhood attention."""

import math
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from parity import relative_error

from ltx2 import diffusion_decoder, weights
from ltx2.base import UserError
from ltx2.diffusion_decoder import (
    Block,
    Clip,
    DiffusionDecoder,
    DiffusionDecoderConfig,
    Keyframes,
    NeighborhoodAttention,
)


@pytest.fixture(scope="module")
def source(checkpoint):
    return weights.open_model(str(checkpoint("ltx-2.5")))


@pytest.fixture(scope="module")
def decoder(source):
    return source.load("diffusion_decoder", mx.float32)


def frames_of_noise(seed: int, shape=None):
    rng = np.random.default_rng(seed)
    return lambda name, shape: mx.array(rng.standard_normal(shape, np.float32))


def decode(decoder, latents, seed=0):
    frames = decoder.decode_stream(latents, frames_of_noise(seed))
    return mx.concatenate(list(frames), axis=1)


@pytest.mark.parametrize("case", [0, 1])
def test_frames_match_the_reference(decoder, golden, case):
    g = golden("ltx-2.5/diffusion_decode")
    latents = g[f"in.latent{case}"]
    rng = np.random.default_rng(case)
    assert np.array_equal(rng.standard_normal(latents.shape, np.float32), latents)
    height, width = (32 * max(side, 3) for side in latents.shape[3:])
    drawn = mx.array(rng.standard_normal((1, 17, height, width, 3), np.float32))
    latents = mx.array(np.moveaxis(latents, 1, -1))
    noise = lambda name, shape: drawn[:, int(name[5:]) :][:, :1]  # of "frame<i>"
    frames = [*decoder.decode_stream(latents, noise)]
    ours = mx.concatenate(frames, axis=1)[:, :, ::4, ::4]
    reference = mx.array(np.moveaxis(g[f"out.frames{case}"], 1, -1))
    reference = mx.clip((reference + 1) / 2, 0, 1)
    assert relative_error(ours, reference) < 1e-4


def test_attention_equals_attention_of_each_position_to_its_window():
    size, kernel = (5, 9, 11), (3, 5, 7)
    attention = NeighborhoodAttention(32, 16, kernel)
    x = mx.random.normal((1, *size, 32))
    q, k, v = (
        mx.unflatten(y, -1, (-1, 16)) for y in mx.split(attention.qkv(x[0]), 3, axis=-1)
    )
    tables = diffusion_decoder.rope_cos_sin(*map(np.arange, size[:1]), *size[1:], 16)
    q = diffusion_decoder.apply_rope(attention.q_norm(q), *tables) / 4
    k = diffusion_decoder.apply_rope(attention.k_norm(k), *tables)
    rows = []
    for place in np.ndindex(size):
        starts = (
            max(0, min(i - w // 2, n - w)) for i, w, n in zip(place, kernel, size)
        )
        window = tuple(slice(s, s + w) for s, w in zip(starts, kernel))
        keys, values = (y[window].reshape(math.prod(kernel), 2, 16) for y in (k, v))
        logits = (q[place] * keys).sum(-1)
        rows.append((mx.softmax(logits, 0)[..., None] * values).sum(0).flatten())
    expected = attention.proj(mx.stack(rows).reshape(*size, 32))
    visible = np.abs(np.subtract.outer(np.clip(np.arange(5), 1, 3), np.arange(5))) <= 1
    for first, last in ((0, 5), (1, 4)):
        queries = mx.arange(first, last)
        seen = mx.array(visible)[queries]
        ours = attention(x, np.arange(5), queries, seen)[0]
        assert relative_error(ours, expected[first:last]) < 1e-5


def test_groups_of_queries_give_the_same_as_one(source, monkeypatch):
    small = source.config["diffusion_decoder"] | {"stage_depths": [1] * 5}
    mx.random.seed(0)
    decoder = DiffusionDecoder(DiffusionDecoderConfig.from_dict(small))
    latents = mx.random.normal((1, 1, 3, 3, 20), key=mx.random.key(0))
    split = decode(decoder, latents)
    monkeypatch.setattr(diffusion_decoder, "group_size", lambda kernel: 10**6)
    assert mx.abs(decode(decoder, latents) - split).max() < 1e-6


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
@pytest.mark.parametrize("keyframes", [False, True])
def test_memory_does_not_grow_with_the_clip(keyframes):
    block = Block(16, 16, (5, 3, 3))

    def peak(length: int) -> int:
        frames, planes = (
            (mx.zeros((1, 1, 8, 8, 16)) for _ in range(length)) for _ in range(2)
        )
        times = np.arange(5.0, length, 10) if keyframes else np.zeros(0)
        clip = block(block(Clip(frames, length, planes, times)), planes=False)
        mx.clear_cache()
        mx.reset_peak_memory()
        assert sum(1 for _ in clip.frames) == length
        return mx.get_peak_memory()

    assert peak(60) < 1.25 * peak(18)


# Keyframes


def attended(attention, x, times, queries, keys):
    """By definition: each place of frame `queries[n]` attends to those of the frames
    `keys[n]` that are in the kernel's rows and columns around it."""
    q, k, v = (
        mx.unflatten(y, -1, (-1, 16)) for y in mx.split(attention.qkv(x[0]), 3, axis=-1)
    )
    tables = diffusion_decoder.rope_cos_sin(times, *x.shape[2:4], 16)
    q = diffusion_decoder.apply_rope(attention.q_norm(q), *tables) / 4
    k = diffusion_decoder.apply_rope(attention.k_norm(k), *tables)
    out, (_, down, across) = [], attention.kernel
    for (n, frame), i, j in product(enumerate(queries), *map(range, x.shape[2:4])):
        rows = slice(max(i - down // 2, 0), i + down // 2 + 1)
        columns = slice(max(j - across // 2, 0), j + across // 2 + 1)
        near, values = (y[mx.array(keys[n])][:, rows, columns] for y in (k, v))
        logits = (q[frame, i, j] * near).sum(-1).reshape(-1, 2)
        weights = mx.softmax(logits, 0)[..., None]
        out.append((weights * values.reshape(-1, 2, 16)).sum(0).flatten())
    return attention.proj(mx.stack(out).reshape(1, len(queries), *x.shape[2:4], -1))


def test_frames_and_keyframes_attend_to_the_nearest_of_each_other():
    mx.random.seed(0)
    block, times = Block(32, 16, (3, 5, 3)), np.array([-2.5, 1.0, 4.5, 11.0])
    x = mx.random.normal((1, 13, 4, 3, 32))  # 4 keyframes, then 9 frames
    apart = lambda x: iter(mx.split(x, x.shape[1], axis=1))
    made = block(Clip(apart(x[:, 4:]), 9, apart(x[:, :4]), times))
    # Of equally near ones the first; windows are cut off at the borders.
    guides = [(1, 0), (1, 0), (1, 2), (1, 2), (2, 1), (2, 1), (2, 1), (2, 3), (2, 3)]
    windows = [range(max(n - 1, 0), min(n + 2, 9)) for n in range(9)]
    keys = [[0, 4, 5], [1, 5, 4], [2, 8, 9], [3, 12, 11]]
    keys += [[*two, *(4 + n for n in w)] for two, w in zip(guides, windows)]
    places = np.append(times, np.arange(9))
    y = attended(block.attn, block.norm1(x), places, range(13), keys)
    expected = x + y + block.mlp(block.norm2(x + y))
    frames = mx.concatenate([*made.frames], axis=1)
    assert relative_error(frames, expected[:, 4:]) < 1e-5
    planes = mx.concatenate([*made.planes], axis=1)
    assert relative_error(planes, expected[:, :4]) < 1e-5


def test_a_keyframe_is_at_the_middle_of_its_frame_in_every_stage():
    times = lambda start, rate: [*Keyframes(None, (0, 8, 13), start).times(rate)]
    assert times(0, 8) == [0, 11.5 / 8, 16.5 / 8]
    assert times(0, 2) == [0, 4.25, 6.75]
    assert times(0, 1) == [0, 8, 13]
    assert times(8, 8) == [-11.5 / 8, 0, 5 / 8]


def test_keyframes_change_the_frames_of_the_same_video(decoder):
    latents, stills = mx.random.normal((2, 1, 2, 3, 3, 20), key=mx.random.key(0))
    drawn, names = frames_of_noise(0), set()

    def noise(name, shape):
        names.add(name)
        return drawn(name, shape) if "key" not in name else mx.zeros(shape)

    plain = decode(decoder, latents)
    guided = decoder.decode_stream(latents, noise, keyframes=Keyframes(stills, (0, 7)))
    guided = mx.concatenate([*guided], axis=1)
    assert guided.shape == plain.shape == (1, 9, 96, 96, 3)
    assert not mx.allclose(plain, guided, atol=0.01)
    assert {n for n in names if "key" in n} == {"keyframe0", "keyframe1"}


def test_the_type_embedding_is_optional_but_strictly_loaded(source, tmp_path):
    released, _ = source.parts["diffusion_decoder"]["conv_in.weight"]
    made, metadata = mx.load(str(released.path), "safetensors", return_metadata=True)
    file, model = str(tmp_path / "vae.safetensors"), str(released.path.parents[1])

    def loaded(size):
        value = {"decoder.type_emb": mx.ones(size)} if size else {}
        mx.save_safetensors(file, made | value, metadata)
        other = weights.open_model(model, parts={"diffusion_decoder": file})
        other.check("diffusion_decoder")
        return other.load("diffusion_decoder", mx.float32).get("type_emb")

    assert loaded(0) is None
    assert loaded(20).tolist() == [1] * 20
    assert loaded(128) is None  # the released size, which is not this model's
    with pytest.raises(UserError, match=r"type_emb is \(7,\), not \(20,\)"):
        loaded(7)
