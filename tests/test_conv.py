"""Convolutions in parts: equal to one convolution, in a known workspace."""

import mlx.core as mx
import pytest
from parity import relative_error

from ltx2 import conv
from ltx2.conv import WORKSPACE, conv3d, workspace


@pytest.fixture
def metal(monkeypatch):
    """The formulas of a Mac."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


# A convolution of the reference's sizes (frames, rows, columns), channels in and out, and
# GB held in total: workspace, with an output per tap, input and output, at 768x512,
# 1280x704 and 1920x1088
@pytest.mark.parametrize(
    "size, dim_in, dim, expected",
    [
        # encoding 8 frames
        ((8, 128, 192), 128, 128, 1.86),
        ((8, 176, 320), 128, 128, 4.26),
        ((8, 272, 480), 128, 128, 9.71),
        # the spatial upsampler, 121, 121 and 257 frames
        ((16, 16, 24), 1024, 1024, 1.31),
        ((16, 22, 40), 1024, 1024, 1.97),
        ((33, 34, 60), 1024, 1024, 6.0),
        # decoding: too few pixels for Winograd, and one frame of the largest size
        ((1, 32, 48), 512, 4096, 0.085),
        ((1, 272, 480), 128, 128, 1.34),
    ],
)
def test_bytes_held_by_a_convolution_on_metal(metal, size, dim_in, dim, expected):
    activations, filters = workspace(size, dim_in, dim)
    frames, height, width = size
    pixels = height * width
    arrays = 4 * pixels * ((frames + 2) * dim_in + frames * dim)
    assert (activations + filters + arrays) / 1e9 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "size, dim",
    [
        ((1, 64, 63), 128),  # fewer than 4096 pixels
        ((1, 64, 64), 96),  # fewer than 256 channels
        ((1, 64, 64), 129),  # not a multiple of 32
    ],
)
def test_without_winograd_there_are_only_the_outputs_of_two_more_taps(metal, size, dim):
    assert workspace((1, 64, 64), 128, 128)[0] > 2 * 4 * 64 * 64 * 128
    assert workspace(size, 128, dim) == (2 * 4 * size[1] * size[2] * dim, 0)


@pytest.mark.cpu
def test_the_cpu_unfolds_the_input():
    assert workspace((2, 5, 7), 3, 100) == (4 * 27 * 2 * 5 * 7 * 3, 0)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("limit", [3.1e5, 1e5, 3e4])  # a part: frames, rows, fewer
def test_parts_give_the_same_as_one_convolution(monkeypatch, padding, taps, limit):
    mx.random.seed(0)
    x = mx.random.normal((2, 4 + taps, 12, 14, 16))
    weight = mx.random.normal((64, taps, 3, 3, 16)) / 20
    pad = (0, padding, padding)
    expected = mx.conv3d(x, weight, padding=pad)
    seen, original = [], mx.conv3d

    def watched(x, weight, padding):
        y = original(x, weight, padding=padding)
        assert (
            max(found := conv.workspace(y.shape[1:4], 16, len(weight), taps)) <= limit
        )
        return seen.append(found) or y

    monkeypatch.setattr(conv, "WORKSPACE", limit)
    monkeypatch.setattr(
        conv,
        "workspace",
        lambda size, dim_in, dim, taps: (
            4 * dim_in * 9 * taps * size[0] * size[1] * size[2],
            64 * 4 * dim_in * dim,
        ),
    )
    monkeypatch.setattr(mx, "conv3d", watched)
    assert relative_error(conv3d(x, weight, padding), expected) < 2e-6  # rounding
    assert len(seen) > 2


@pytest.mark.parametrize(
    "size, dim_in, dim",
    [((8, 272, 480), 128, 128), ((1, 272, 480), 128, 128), ((8, 34, 60), 512, 4096)],
)
def test_parts_are_within_the_workspace_at_1920x1088(
    metal, monkeypatch, size, dim_in, dim
):
    frames, height, width = size
    seen = []

    def counted(x, weight, padding):
        y = mx.zeros((1, x.shape[1] - 2, *x.shape[2:4], len(weight)))
        y = y if padding[1] else y[:, :, 1:-1, 1:-1]
        seen.append(workspace(y.shape[1:4], dim_in, len(weight)))
        return y

    monkeypatch.setattr(mx, "conv3d", counted)
    monkeypatch.setattr(mx, "eval", lambda *_: None)
    x = mx.zeros((1, frames + 2, height, width, dim_in))
    y = conv3d(x, mx.zeros((dim, 3, 3, 3, dim_in)), 1)
    assert y.shape == (1, *size, dim)
    assert max(map(max, seen)) <= WORKSPACE
    complete = workspace(size, dim_in, dim)
    assert len(seen) <= 4 * sum(complete) / WORKSPACE
