"""Transfer functions, primaries and HLG are the reference's, by its tables."""

import numpy as np
import pytest

from ltx2 import color


@pytest.fixture(scope="module")
def table(golden):
    return golden("common/hdr")


CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize(
    "curve, x, y",
    [
        (color.linear_to_acescct, "in.linear", "out.acescct"),
        (color.acescct_to_linear, "in.code", "out.acescct_linear"),
        (color.linear_to_logc3, "in.linear", "out.logc3"),
        (color.logc3_to_linear, "in.code", "out.logc3_linear"),
        (color.srgb_to_linear, "in.code", "out.srgb_linear"),
        (color.linear_to_srgb, "out.srgb_linear", "in.code"),
        (color.hlg, "in.rgb_linear709", "out.hlg_signal"),
    ],
)
def test_curves(table, curve, x, y):
    made = curve(table[x])
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, table[y], **CLOSE)


@pytest.mark.parametrize(
    "source, target, name",
    [
        (color.REC709, color.AP1, "rec709_to_acescg"),
        (color.AP1, color.REC709, "acescg_to_rec709"),
        (color.REC709, color.REC2020, "rec709_to_rec2020"),
        (color.AP1, color.REC2020, "acescg_to_rec2020"),
    ],
)
def test_matrices(table, source, target, name):
    expected = table[f"in.matrix_{name}"]
    np.testing.assert_allclose(color.matrix(source, target), expected, atol=1e-7)
    np.testing.assert_allclose(color.YCBCR, table["in.matrix_rgb_to_ycbcr2020"], 1e-6)


@pytest.mark.parametrize(
    "source, target, x, y",
    [
        ("srgb_linear", "acescct", "in.rgb_linear709", "out.rgb_acescct"),
        ("acescct", "srgb_linear", "out.rgb_acescct", "out.rgb_linear709_again"),
        ("srgb", "acescct", "in.rgb_srgb", "out.srgb_acescct"),
    ],
)
def test_frames_from_space_to_space(table, source, target, x, y):
    made = color.convert(table[x], source, target)
    # The reference computed in float32: of the brightest channel, 6 times white.
    atol = 1e-6 * max(1, table[y].max())
    np.testing.assert_allclose(made, table[y], rtol=1e-6, atol=atol)


def test_hlg_in_10_bits_is_exactly_the_references(table):
    for n, frame in enumerate(table["in.rgb_linear709"]):
        for plane, name in zip(color.hlg_planes(frame), "yuv"):
            assert np.array_equal(plane, table[f"out.hlg_{name}10"][n])


@pytest.mark.parametrize("space", color.SPACES, ids=str)
def test_every_space_leads_back(space):
    light = np.random.default_rng(0).uniform(0.1, 0.9, (4, 4, 3)).astype(np.float32)
    there = color.convert(light, "srgb_linear", space)
    again = color.convert(there, space, "srgb_linear")
    np.testing.assert_allclose(again, light, atol=2e-6)
