"""Tiles of a large video: a model call sees a part of the picture and all the sound."""

from dataclasses import replace
from itertools import product
from typing import Callable, Iterable, NamedTuple

import mlx.core as mx
import numpy as np

from .latents import LatentState, Size, States, Streams, divided_evenly

Denoiser = Callable[[Streams, float, int], Streams]
OVERLAP = 10  # the reference's, in cells (rows or columns of latents)
Part = tuple[LatentState, np.ndarray, np.ndarray]


class Span(NamedTuple):
    """Cells [start, stop) of a side; its neighbors share `before` and `after` of them."""

    start: int
    stop: int
    before: int
    after: int

    @property
    def weights(self) -> np.ndarray:
        """The weight of each cell; those of all spans sum to 1."""
        weights = np.ones(self.stop - self.start, np.float32)
        rise = lambda n: np.arange(1, n + 1, dtype=np.float32) / (n + 1)
        weights[: self.before] *= rise(self.before)
        weights[len(weights) - self.after :] *= rise(self.after)[::-1]
        return weights


def spans(side: int, size: int) -> list[Span]:
    """Divide a side of cells into spans of `size`, evenly from edge to edge, that overlap
    by about a half, as the reference does."""
    if side <= size:
        return [Span(0, side, 0, 0)]
    overlap, count = size // 2, 2
    most = max(2, 1 + (side - size) // ((size + 1) // 2))
    while (count * size - side) / (count - 1) < overlap and count < most:
        count += 1
    starts = divided_evenly(side - size, count - 1)
    shared = [a + size - b for a, b in zip(starts, starts[1:])]
    pairs = zip(starts, [0, *shared], [*shared, 0])
    return [Span(s, s + size, before, after) for s, before, after in pairs]


def equal_spans(side: int, count: int) -> list[Span]:
    """Divide a side of cells into `count` spans that overlap by OVERLAP, or less if the
    side is short, as in the reference's dfr; fewer than `count` cells are one span."""
    if side < count:
        return [Span(0, side, 0, 0)]
    shared = min(OVERLAP, side - count)
    ends = divided_evenly(side + shared * (count - 1), count)
    found = []
    for n, (start, stop) in enumerate(zip(ends, ends[1:])):
        before, after = shared * (n > 0), shared * (n + 1 < count)
        found.append(Span(start - n * shared, stop - n * shared, before, after))
    return found


def part(state: LatentState, size: Size, rows: Span, columns: Span) -> Part:
    """The state of a tile, with the appended tokens that touch it and positions from its
    corner; its tokens' indices in the complete state; the weights of its cells."""
    frames, height, width = size.latent
    cells = np.arange(frames * height * width).reshape(frames, height, width)
    own = cells[:, rows.start : rows.stop, columns.start : columns.stop].ravel()
    bounds, target = state.bounds, state.num_target_tokens
    low, high = bounds[:, own, 0].min(axis=1), bounds[:, own, 1].max(axis=1)
    start, end = bounds[:, target:, 0].T, bounds[:, target:, 1].T  # (n, 3)
    touches = ((start < high) & (end > low)).all(axis=1)
    touches |= start[:, 0] < 0  # outside of the video's time
    index = np.concatenate([own, target + np.flatnonzero(touches)])
    tile = replace(
        state,
        latent=state.latent[:, mx.array(index)],
        clean_latent=state.clean_latent[:, mx.array(index)],
        denoise_mask=state.denoise_mask[index],
        bounds=bounds[:, index] - low[:, None, None],
        num_target_tokens=len(own),
        keyframes=state.keyframes[index],
        attention=None if state.attention is None else state.attention[index][:, index],
    )
    weights = np.tile(np.outer(rows.weights, columns.weights).ravel(), frames)
    return tile, index, weights


class TiledDenoiser:
    """Computes x0 with one denoiser per tile: the weighted sum of the video, the mean of
    the sound and of appended tokens that several tiles have."""

    def __init__(
        self,
        make: Callable[[States], Denoiser],
        states: States,
        size: Size,
        sides: Iterable[list[Span]],
    ):
        """`make(states)` is a denoiser; `sides` are the spans of rows and of columns."""
        video, self.cached_x0 = states["video"], {}  # no prediction is reused
        parts = [part(video, size, *pair) for pair in product(*sides)]
        seen = np.zeros(len(video.denoise_mask), np.float32)
        for _, index, _ in parts:
            seen[index] += 1
        self.unseen = video.clean_latent * mx.array(seen == 0)[None, :, None]
        self.parts = []
        for state, index, weights in parts:
            appended = 1 / seen[index[len(weights) :]]
            weights = mx.array(np.append(weights, appended))[None, :, None]
            self.parts.append((states | {"video": state}, mx.array(index), weights))
        self.make = make  # in each step: the rope tables of all tiles would be large

    def __call__(self, x: Streams, sigma: float, step: int) -> Streams:
        total = {k: mx.zeros_like(v) for k, v in x.items()} | {"video": self.unseen}
        for states, index, weights in self.parts:
            x0 = self.make(states)(x | {"video": x["video"][:, index]}, sigma, step)
            video = x0.pop("video") * weights
            total["video"] = total["video"].at[:, index].add(video)
            for k, v in x0.items():
                total[k] = total[k] + v / len(self.parts)
            mx.eval(total)  # one tile in memory at a time
        return total
