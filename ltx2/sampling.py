"""Sigma schedules and samplers.

A sampler is a generator over (latents, denoised) by stream name. `denoise(x, sigma,
step)` returns x0 with the clean tokens held, `blend(name, x)` holds them in the
sampler's own results, `noise(name, shape)` is the only source of randomness, `first` is
the step to resume at.
"""

import math
from functools import partial
from typing import Callable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from .latents import Streams

Noise = Callable[[str, tuple[int, ...]], mx.array]

# Schedules. The constants are the reference's, as the distilled models were trained.

REFINE_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, *REFINE_SIGMAS)


def shifted_sigmas(steps: int, tokens: int = 4096) -> tuple[float, ...]:
    """The dev models' schedule, stretched to end at 0.1, shifted by an exponent linear
    in the tokens: 0.95 at 1024 and 2.05 at 4096, the reference's for all sizes."""
    shift = math.exp(0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024))
    one, shift = np.float32(1), np.float32(shift)
    s = np.linspace(1, 0, steps + 1, dtype=np.float32)[:-1]
    s = shift / (shift + (one / s - one))
    s = one - (one - s) / ((one - s[-1]) / np.float32(1 - 0.1))
    return tuple(np.append(s, np.float32(0)).tolist())


# Samplers


def steps_from(sigmas: Sequence[float], first: int) -> list[tuple[int, float, float]]:
    """Index, sigma and next sigma of the steps from `first` on."""
    return [(i, *sigmas[i : i + 2]) for i in range(first, len(sigmas) - 1)]


def euler(denoise, x, sigmas, blend, noise, first=0):
    """First-order steps along the velocity."""
    for i, s, sigma_next in steps_from(sigmas, first):
        x0 = denoise(x, s, i)
        x = {k: x[k] + (x[k] - x0[k]) / s * (sigma_next - s) for k in x}
        yield x, x0


def gradient_estimation(denoise, x, sigmas, blend, noise, first=0, gamma=2.0):
    """Euler with a velocity that is extrapolated from the previous one."""
    previous: Streams = {}
    for i, s, sigma_next in steps_from(sigmas, first):
        x0 = denoise(x, s, i)
        v = {k: (x[k] - x0[k]) / s for k in x}
        if sigma_next == 0:
            x = x0
        else:
            old = previous or v
            drift = {k: old[k] + gamma * (v[k] - old[k]) for k in v}
            x = {k: x[k] + drift[k] * (sigma_next - s) for k in x}
        previous = v
        yield x, x0


def euler_ancestral(denoise, x, sigmas, blend, noise, first=0, eta=1.0, s_noise=1.0):
    """Euler to below the next sigma, then new noise up to it (rectified flow)."""
    for i, s, sigma_next in steps_from(sigmas, first):
        x0 = denoise(x, s, i)
        if sigma_next == 0:
            yield x0, x0
            continue
        down = sigma_next * (1 + (sigma_next / s - 1) * eta)
        x = {k: down / s * x[k] + (1 - down / s) * x0[k] for k in x}
        if eta > 0:
            keep = (1 - sigma_next) / (1 - down)
            new = s_noise * math.sqrt(max(0.0, sigma_next**2 - (down * keep) ** 2))
            for k, v in x.items():
                x[k] = blend(k, keep * v + new * noise(f"{k}.step{i}", v.shape))
        yield x, x0


def res_2s(denoise, x, sigmas, blend, noise, first=0):
    """Second-order exponential steps with new noise, for the hq stages. A schedule that
    ends in 0 runs to 0.0011; one final model call gives x0. The state is float64 in
    numpy (no GPU has it in MLX) between the blends."""
    to_zero = sigmas[-1] == 0
    sigmas = (*sigmas[:-1], 0.0011) if to_zero else sigmas
    for i, s, sigma_next in steps_from(sigmas, first):
        x0 = denoise(x, s, i)
        steps = {k: Res2sStep(x[k], x0[k], s, sigma_next) for k in x}
        draw = lambda k, kind, i=i, x=x: noise(f"{k}.{kind}{i}", x[k].shape)
        sigma_mid, mid = math.sqrt(s * sigma_next), {}
        for k, step in steps.items():
            mid[k] = blend(k, step.midpoint(sigma_mid, draw(k, "substep")))
            step.anchor(mid[k])
        x0_mid = denoise(mid, sigma_mid, 0)  # never skipped
        ends = {k: step.end(x0_mid[k], draw(k, "step")) for k, step in steps.items()}
        x = {k: blend(k, end) for k, end in ends.items()}
        yield x, x0
    if to_zero and first < len(sigmas):
        x = denoise(x, sigmas[-1], len(sigmas) - 1)
        yield x, x


class Res2sStep:
    """One stream's step of res_2s from `x` at sigma `s`; arrays in and out are MLX's."""

    def __init__(self, x: mx.array, x0: mx.array, s: float, sigma_next: float):
        self.start, self.x0 = np.array(x, np.float64), np.array(x0, np.float64)
        self.slope = self.x0 - self.start
        self.s, self.sigma_next, self.h = s, sigma_next, -math.log(sigma_next / s)
        self.a21 = self.h * 0.5 * _phi1(self.h / 2)

    def midpoint(self, sigma: float, noise: mx.array) -> mx.array:
        """The state after half of the step, with new noise."""
        return self._renoised(self.start + self.a21 * self.slope, sigma, noise)

    def anchor(self, midpoint: mx.array) -> None:
        """Move the start to where the noised midpoint implies it was, the fixed point
        of 100 iterations in the reference."""
        if self.h < 0.5 and self.s > 0.03:
            midpoint = np.array(midpoint, np.float64)
            self.slope = (self.x0 - midpoint) / (1 - self.a21)
            self.start = midpoint - self.a21 * self.slope

    def end(self, x0_mid: mx.array, noise: mx.array) -> mx.array:
        """The state after the step, with new noise."""
        b2 = 2 * (math.exp(-self.h) - 1 + self.h) / self.h**2
        b1 = _phi1(self.h) - b2
        second = np.array(x0_mid, np.float64) - self.start
        end = self.start + self.h * (b1 * self.slope + b2 * second)
        return self._renoised(end, self.sigma_next, noise)

    def _renoised(self, x0, sigma: float, noise: mx.array) -> mx.array:
        """From the start at `s` along `x0` to `sigma`, half of it new noise, of zero mean
        and unit (unbiased) deviation over all and by the last axes."""
        up, axes = 0.5 * sigma, (-2, -1)
        rest = math.sqrt(sigma**2 - up**2)
        alpha = 1 - sigma + rest
        eps = (self.start - x0) / (self.s - sigma)
        x0 = alpha * (self.start - self.s * eps + rest / alpha * eps)
        n = np.array(noise, np.float64)
        n = (n - n.mean()) / n.std(ddof=1)
        n = (n - n.mean(axes, keepdims=True)) / n.std(axes, ddof=1, keepdims=True)
        return mx.array((x0 + up * n).astype(np.float32))


def _phi1(h: float) -> float:
    return (math.exp(-h) - 1) / -h


SAMPLERS: dict[str, Callable[..., Iterator[tuple[Streams, Streams]]]] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "euler_half_ancestral": partial(euler_ancestral, eta=0.5),
    "gradient_estimation": gradient_estimation,
    "res_2s": res_2s,
}
