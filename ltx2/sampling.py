"""Sigma schedules, guidance and samplers.

A sampler is a generator over (latents, denoised) by stream name; `denoise(x, sigma,
step)` returns x0 already blended with what is held clean, `blend(name, x)` does that
for the sampler's own results, `noise(name, shape)` is the only source of randomness, and
`first` is the step to go on from after an interruption.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from .latents import Streams

Denoise = Callable[[Streams, float, int], Streams]
Blend = Callable[[str, mx.array], mx.array]
Noise = Callable[[str, tuple[int, ...]], mx.array]
Sampler = Callable[
    [Denoise, Streams, Sequence[float], Blend, Noise, int],
    Iterator[tuple[Streams, Streams]],
]

# Schedules. The constants are the reference's, as the distilled models were trained.

REFINE_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, *REFINE_SIGMAS)


def shifted_sigmas(steps: int, tokens: int = 4096) -> tuple[float, ...]:
    """The dev models' schedule: shifted by the token count, stretched to end at 0.1.

    The shift's exponent is linear in the tokens, 0.95 at 1024 and 2.05 at 4096, which
    is also what the reference uses for every size.
    """
    shift = math.exp(0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024))
    one, shift = np.float32(1), np.float32(shift)
    s = np.linspace(1, 0, steps + 1, dtype=np.float32)[:-1]
    s = shift / (shift + (one / s - one))
    s = one - (one - s) / ((one - s[-1]) / np.float32(1 - 0.1))
    return tuple(np.append(s, np.float32(0)).tolist())


# Samplers


def pairs(sigmas: Sequence[float], first: int) -> list[tuple[int, float, float]]:
    """Index, sigma and next sigma of the steps from `first` on."""
    return [(i, *sigmas[i : i + 2]) for i in range(first, len(sigmas) - 1)]


def euler(denoise, x, sigmas, blend, noise, first=0):
    """First-order steps along the velocity."""
    for i, s, to in pairs(sigmas, first):
        x0 = denoise(x, s, i)
        x = {k: x[k] + (x[k] - x0[k]) / s * (to - s) for k in x}
        yield x, x0


def gradient_estimation(denoise, x, sigmas, blend, noise, first=0, gamma=2.0):
    """Euler with the velocity extrapolated from the last one's."""
    last: Streams = {}
    for i, s, to in pairs(sigmas, first):
        x0 = denoise(x, s, i)
        v = {k: (x[k] - x0[k]) / s for k in x}
        if to == 0:
            x = x0
        else:
            drift = {k: last[k] + gamma * (v[k] - last[k]) if last else v[k] for k in v}
            x = {k: x[k] + drift[k] * (to - s) for k in x}
        last = v
        yield x, x0


def euler_ancestral(denoise, x, sigmas, blend, noise, first=0, eta=1.0, s_noise=1.0):
    """Euler to below the next sigma, then fresh noise up to it (rectified flow)."""
    for i, s, to in pairs(sigmas, first):
        x0 = denoise(x, s, i)
        if to == 0:
            x = x0
        else:
            down = to * (1 + (to / s - 1) * eta)
            x = {k: down / s * x[k] + (1 - down / s) * x0[k] for k in x}
            if eta > 0:
                keep = (1 - to) / (1 - down)
                fresh = s_noise * math.sqrt(max(0.0, to**2 - (down * keep) ** 2))
                x = {
                    k: blend(k, keep * v + fresh * noise(f"{k}.step{i}", v.shape))
                    for k, v in x.items()
                }
        yield x, x0


def res_2s(denoise, x, sigmas, blend, noise, first=0, eta=0.5, anchored=True):
    """Second-order exponential steps with fresh noise, for the HQ stages.

    The state is kept in float64 by numpy (no GPU has it in MLX). A schedule that ends
    in 0 is walked to 0.0011, where one more call gives the result. `anchored` moves
    the step's start to where the noised midpoint says it was, which the reference finds
    by 100 rounds of a contraction; here its fixed point is solved for.
    """
    ends_at_zero = sigmas[-1] == 0
    if ends_at_zero:
        sigmas = (*sigmas[:-1], 0.0011, 0.0)
    steps = len(sigmas) - 1 - ends_at_zero
    f64 = lambda streams: {k: np.array(v, np.float64) for k, v in streams.items()}
    f32 = lambda streams: {
        k: mx.array(v.astype(np.float32)) for k, v in streams.items()
    }
    blend64 = lambda k, v: np.array(
        blend(k, mx.array(v.astype(np.float32))), np.float64
    )

    def renoise(kind, step, start, denoised, s, to, eta):
        return {
            k: blend64(
                k,
                _variance_preserving(
                    start[k],
                    denoised[k],
                    s,
                    to,
                    eta,
                    _standardised(noise(f"{k}.{kind}{step}", start[k].shape)),
                ),
            )
            for k in start
        }

    for i in range(first, steps):
        s, to = sigmas[i], sigmas[i + 1]
        h = -math.log(to / s)
        a21 = 0.5 * _phi1(h / 2)
        b2 = 2 * _phi2(h)
        b1 = _phi1(h) - b2
        start = f64(x)
        x0 = denoise(x, s, i)
        near = f64(x0)
        middle = {k: start[k] + h * a21 * (near[k] - start[k]) for k in start}
        sigma_middle = math.sqrt(s * to)
        middle = renoise("substep", i, start, middle, s, sigma_middle, 0.5)
        slope = {k: near[k] - start[k] for k in start}
        if anchored and h < 0.5 and s > 0.03:
            slope = {k: (near[k] - middle[k]) / (1 - h * a21) for k in start}
            start = {k: middle[k] - h * a21 * slope[k] for k in start}
        far = f64(denoise(f32(middle), sigma_middle, 0))  # never skipped
        end = {
            k: start[k] + h * (b1 * slope[k] + b2 * (far[k] - start[k])) for k in start
        }
        x = f32(renoise("step", i, start, end, s, to, eta))
        yield x, x0
    if ends_at_zero and first <= steps:
        x = denoise(x, sigmas[-2], steps)
        yield x, x


def _phi1(h: float) -> float:
    return (math.exp(-h) - 1) / -h


def _phi2(h: float) -> float:
    return (math.exp(-h) - 1 + h) / h**2


def _standardised(n: mx.array) -> np.ndarray:
    """Noise of zero mean and unit (unbiased) spread, over all and by the last axes."""
    n = np.array(n, np.float64)
    n = (n - n.mean()) / n.std(ddof=1)
    axes = (-2, -1)
    return (n - n.mean(axes, keepdims=True)) / n.std(axes, ddof=1, keepdims=True)


def _variance_preserving(y, denoised, s, to, eta, n):
    """From `y` at s over `denoised` to sigma `to`, a part `eta` of it fresh noise."""
    up = min(to * eta, 0.9999 * to)
    if up == 0 or to == 0:
        return denoised
    rest = math.sqrt(to**2 - up**2)
    alpha = 1 - to + rest
    eps = (y - denoised) / (s - to)
    return alpha * (y - s * eps + rest / alpha * eps) + up * n


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "euler_half_ancestral": partial(euler_ancestral, eta=0.5),
    "gradient_estimation": gradient_estimation,
    "res_2s": res_2s,
}
