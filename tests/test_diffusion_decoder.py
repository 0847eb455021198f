"""The diffusion decoder of LTX-2.5 against plain neighborhood attention."""

import math

import mlx.core as mx
import numpy as np
import pytest
from parity import relative_error

from ltx2 import diffusion_decoder, weights
from ltx2.diffusion_decoder import (
    Block,
    DiffusionDecoder,
    DiffusionDecoderConfig,
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
    return lambda i, shape: mx.array(rng.standard_normal(shape, np.float32))


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
    frames = [*decoder.decode_stream(latents, lambda i, shape: drawn[:, i : i + 1])]
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
    tables = diffusion_decoder.rope_cos_sin(size, 16)
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
        ours = attention(x, queries, mx.array(visible)[queries])[0]
        assert relative_error(ours, expected[first:last]) < 1e-5


def test_tiles_give_the_same_as_no_tiles(source, monkeypatch):
    small = source.config["diffusion_decoder"] | {"stage_depths": [1] * 5}
    mx.random.seed(0)
    decoder = DiffusionDecoder(DiffusionDecoderConfig.from_dict(small))
    latents = mx.random.normal((1, 1, 3, 3, 20), key=mx.random.key(0))
    split = decode(decoder, latents)
    monkeypatch.setattr(diffusion_decoder, "tile", lambda kernel: 10**6)
    assert mx.abs(decode(decoder, latents) - split).max() < 1e-6


@pytest.mark.cpu
def test_memory_does_not_grow_with_the_clip():
    block = Block(16, 16, (5, 3, 3))

    def peak(length: int) -> int:
        frames = (mx.zeros((1, 1, 8, 8, 16)) for _ in range(length))
        mx.clear_cache()
        mx.reset_peak_memory()
        assert sum(1 for _ in block(frames, length)) == length
        return mx.get_peak_memory()

    assert peak(100) < 1.25 * peak(20)
