"""Color: transfer functions, primaries, color spaces of frames, HLG video.

Arrays have shape (..., 3) or any; results are float32. Linear light 1 is diffuse white.
"""

from typing import Callable, NamedTuple

import numpy as np

# Chromaticities x, y of red, green, blue and white.
REC709 = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)
REC2020 = (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290)
AP1 = (0.713, 0.293, 0.165, 0.830, 0.128, 0.044, 0.32168, 0.33767)
# The reference's matrices are of this; with CAT02 they would differ by up to 4e-3.
BRADFORD = [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367]]
BRADFORD = np.array([*BRADFORD, [0.0389, -0.0685, 1.0296]])
YCBCR = np.array([[0.2627, 0.6780, 0.0593], [0, 0, 0], [0, 0, 0]])  # BT.2020
YCBCR[1] = ([0, 0, 1] - YCBCR[0]) / 1.8814
YCBCR[2] = ([1, 0, 0] - YCBCR[0]) / 1.4746

HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
DIFFUSE_WHITE = (np.exp((0.75 - HLG_C) / HLG_A) + HLG_B) / 12  # light of signal 0.75


def _xyz(chromaticities: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The matrix from RGB to XYZ, and the XYZ of white."""
    x, y = np.reshape(chromaticities, (4, 2)).T
    columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    white = columns[:, 3]
    return columns[:, :3] * np.linalg.solve(columns[:, :3], white), white


def matrix(source: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """From linear RGB of some primaries to others', white to white (Bradford)."""
    (to_xyz, old), (from_xyz, new) = _xyz(source), _xyz(target)
    scale = np.diag(BRADFORD @ new / (BRADFORD @ old))
    return np.linalg.inv(from_xyz) @ np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ to_xyz


def identity(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32)


def srgb_to_linear(x: np.ndarray) -> np.ndarray:
    """From sRGB's curve to light; values above 1 follow the same curve."""
    x = np.float64(x)
    power = ((np.maximum(x, 0) + 0.055) / 1.055) ** 2.4
    return np.where(x <= 0.04045, x / 12.92, power).astype(np.float32)


def linear_to_srgb(x: np.ndarray) -> np.ndarray:
    """From light to sRGB's curve; values above 1 follow the same curve."""
    x = np.float64(x)
    power = 1.055 * np.maximum(x, 0.0031308) ** (1 / 2.4) - 0.055
    return np.where(x <= 0.0031308, x * 12.92, power).astype(np.float32)


def linear_to_acescct(x: np.ndarray) -> np.ndarray:
    """From light in AP1 to ACEScct codes in [0, 1]."""
    x = np.maximum(np.float64(x), 0)
    log = (np.log2(np.maximum(x, 1e-12)) + 9.72) / 17.52
    line = 10.5402377416545 * x + 0.0729055341958355
    return np.where(x > 0.0078125, log, line).clip(0, 1).astype(np.float32)


def acescct_to_linear(x: np.ndarray) -> np.ndarray:
    x = np.float64(x).clip(0, 1)
    line = (x - 0.0729055341958355) / 10.5402377416545
    power = 2 ** (x * 17.52 - 9.72)
    return np.where(x > 0.155251141552511, power, line).astype(np.float32)


def linear_to_logc3(x: np.ndarray) -> np.ndarray:
    """From light to ARRI LogC3 codes in [0, 1], at EI 800."""
    x = np.maximum(np.float64(x), 0)
    log = 0.247190 * np.log10(5.555556 * x + 0.052272) + 0.385537
    line = 5.367655 * x + 0.092809
    return np.where(x >= 0.010591, log, line).clip(0, 1).astype(np.float32)


def logc3_to_linear(x: np.ndarray) -> np.ndarray:
    x = np.float64(x).clip(0, 1)
    line = (x - 0.092809) / 5.367655
    power = (10 ** ((x - 0.385537) / 0.247190) - 0.052272) / 5.555556
    return np.where(x >= 5.367655 * 0.010591 + 0.092809, power, line).astype(np.float32)


class Space(NamedTuple):
    """What the values of a frame mean."""

    primaries: tuple[float, ...]
    to_linear: Callable[[np.ndarray], np.ndarray]
    from_linear: Callable[[np.ndarray], np.ndarray]
    name: str  # in an EXR file


SPACES = {
    "srgb": Space(REC709, srgb_to_linear, linear_to_srgb, "sRGB"),
    "srgb_linear": Space(REC709, identity, identity, "sRGB"),
    "acescg": Space(AP1, identity, identity, "ACEScg"),
    "acescct": Space(AP1, acescct_to_linear, linear_to_acescct, "ACEScct"),
    "logc3": Space(REC709, logc3_to_linear, linear_to_logc3, "LogC3"),
}


def convert(frames: np.ndarray, source: str, target: str) -> np.ndarray:
    """Convert frames (..., 3), float or uint8, from one of SPACES to another. As in the
    reference, negative values, outside of the target's primaries, become 0."""
    x = frames / 255 if frames.dtype == np.uint8 else frames
    if source == target:
        return identity(x)
    old, new = SPACES[source], SPACES[target]
    x = old.to_linear(x)
    if old.primaries != new.primaries:
        x = np.float64(x) @ matrix(old.primaries, new.primaries).T
    return new.from_linear(np.maximum(x, 0))


def hlg(light: np.ndarray) -> np.ndarray:
    """Rec.709 light (..., 3) to an HLG signal in Rec.2020. Diffuse white is at 0.75;
    what is brighter rolls off to 1, with the same slope at white."""
    x = np.maximum(np.float64(light) @ matrix(REC709, REC2020).T, 0)
    slope = DIFFUSE_WHITE / (1 - DIFFUSE_WHITE)
    brighter = 1 - (1 - DIFFUSE_WHITE) * np.exp(-slope * np.maximum(x - 1, 0))
    x = np.where(x <= 1, x * DIFFUSE_WHITE, brighter)
    log = HLG_A * np.log(np.maximum(12 * x - HLG_B, 1e-12)) + HLG_C
    return np.where(x <= 1 / 12, np.sqrt(3 * x), log).clip(0, 1).astype(np.float32)


def hlg_planes(light: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rec.709 light (H, W, 3), even sides, as 10-bit limited Y, Cb, Cr, 4:2:0."""
    x = np.float64(hlg(light)) @ YCBCR.T
    height, width = (side // 2 for side in x.shape[:2])
    chroma = x[..., 1:].reshape(height, 2, width, 2, 2).mean((1, 3))
    y, chroma = x[..., 0] * 876 + 64, chroma * 896 + 512
    planes = y, chroma[..., 0], chroma[..., 1]
    return tuple(np.rint(plane).astype(np.uint16) for plane in planes)
