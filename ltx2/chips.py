"""What is faster on which chip, with the evidence."""

import math
from dataclasses import dataclass
from functools import cache

import mlx.core as mx


@dataclass(frozen=True)
class Chip:
    """The dtype of `--dtype auto`; how many rows make dequantizing a layer first pay, and
    how many weights at a time; how many inputs a dense layer multiplies at a time."""

    dtype: str = "bfloat16"
    dequantize_from: float = math.inf
    weights_at_a_time: float = math.inf
    inputs_at_a_time: float = math.inf


# By the start of MLX's name of the architecture: g13 is M1, g14 M2, a final d an Ultra.
# float16: two ports publish 4 to 27 % less time on M1 and M2, which have no bfloat16
# arithmetic, and an error against float32 of 0.007 instead of 0.035.
# Dequantized: a quantized matmul is slow on MLX's CPU backend (measured) and, at many
# rows, on M1 and M2 (published). The CPU has no kernel for it: 3, 5 and 6 bits make up to
# 7 copies in float32, of as many layers as are in flight (measured).
# Inputs: on an M1 Ultra the second product of a feed-forward (16384 inputs, 6000 rows)
# falls from 19 to 10 TFLOP/s, and does not in parts of 2048 (published). On an M3 Ultra
# it does so from some 8000 rows on, which `layers.pieces` never gives it.
CHIPS = {
    "cpu": Chip(dequantize_from=6, weights_at_a_time=1 << 20),
    "applegpu_g13d": Chip("float16", 512, inputs_at_a_time=2048),
    "applegpu_g13": Chip("float16", 512),
    "applegpu_g14": Chip("float16", 512),
}


def chip_named(architecture: str) -> Chip:
    """The first row whose pattern fits, or the usual chip."""
    fits = (chip for name, chip in CHIPS.items() if architecture.startswith(name))
    return next(fits, Chip())


@cache
def this_chip() -> Chip:
    """The chip of MLX's default device."""
    cpu = mx.default_device().type == mx.cpu
    return chip_named("cpu" if cpu else mx.device_info().get("architecture", ""))
