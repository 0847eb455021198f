"""Tiles of a large video: a model call sees a part of the picture and all the sound."""

from dataclasses import replace
from itertools import product
from typing import Callable, Iterable, NamedTuple

import mlx.core as mx
import numpy as np

from .latents import LatentState, Size, States, Streams, divided_evenly

Denoiser = Callable[[Streams, float, int], Streams]
Make = Callable[[States], Denoiser]
OVERLAP = 10  # of the reference's dfr, in cells (rows or columns of latents)
Part = tuple[LatentState, np.ndarray, np.ndarray]
Tiles = tuple[tuple[int, int], ...]  # on each axis: how many or how long, and overlap
# Tiles of latents in which the reference encodes: 80 frames, 768 pixels; of HDR for
# LTX-2.3, if frames have more than LIGHT_PIXELS
LARGE, LIGHT = ((10, 3), (24, 2), (24, 2)), ((4, 2), (40, 8), (40, 8))
LIGHT_PIXELS = 512 * 768


class Span(NamedTuple):
    """Cells [start, stop) of a side; neighbors share `before` and `after` of them."""

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


def lapped(starts: Iterable[int], stops: Iterable[int]) -> list[Span]:
    """Spans between these cells; neighbors share the cells that are in both."""
    starts, stops = [*starts], [*stops]
    shared = [stop - start for start, stop in zip(starts[1:], stops)]
    return [Span(*span) for span in zip(starts, stops, [0, *shared], [*shared, 0])]


def spans(side: int, size: int) -> list[Span]:
    """Divide a side of cells evenly into spans of `size` that overlap by about half."""
    if side <= size:
        return [Span(0, side, 0, 0)]
    overlap, count = size // 2, 2
    most = max(2, 1 + (side - size) // ((size + 1) // 2))
    while (count * size - side) / (count - 1) < overlap and count < most:
        count += 1
    starts = divided_evenly(side - size, count - 1)
    return lapped(starts, (start + size for start in starts))


def equal_spans(side: int, count: int, overlap: int = OVERLAP) -> list[Span]:
    """Divide a side of cells into `count` spans that overlap by `overlap`, or less if the
    side is short, as the reference does; fewer than `count` cells are one span."""
    count = count if side >= count else 1
    shared = min(overlap, side - count)
    ends = divided_evenly(side + shared * (count - 1), count)
    starts = (end - n * shared for n, end in enumerate(ends[:-1]))
    return lapped(starts, (end - n * shared for n, end in enumerate(ends[1:])))


def sized_spans(side: int, size: int, overlap: int) -> list[Span]:
    """Divide a side of cells into spans of `size`; the last one may be shorter."""
    starts = range(0, max(side - overlap, 1), size - overlap)
    return lapped(starts, (min(start + size, side) for start in starts))


def cells(spans: Iterable[Span], scale: float = 1) -> tuple[slice, ...]:
    """The cells of spans, on a grid with `scale` times as many."""
    return tuple(slice(int(s.start * scale), int(s.stop * scale)) for s in spans)


def blended(total: mx.array, tile: mx.array, spans: Iterable[Span]) -> mx.array:
    """Latents (1, F, H, W, C) and a tile of them, added by its weights."""
    weights = np.einsum("f,h,w->fhw", *(span.weights for span in spans))
    place = slice(None), *cells(spans)
    return total.at[place].add(tile * mx.array(weights)[..., None])


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
        self, make: Make, states: States, size: Size, sides: Iterable[list[Span]]
    ):
        """`make(states)` is a denoiser; `sides` are the spans of rows and of columns."""
        video, self.cached_x0 = states["video"], {}  # no prediction is reused
        parts = [part(video, size, *pair) for pair in product(*sides)]
        seen = np.zeros(len(video.denoise_mask), np.float32)
        for _, index, _ in parts:
            seen[index] += 1
        self.parts, sums = [], np.zeros_like(seen)
        for state, index, weights in parts:
            weights = np.append(weights, 1 / seen[index[len(weights) :]])
            sums[index] += weights  # more than 1 where a short side has many spans
            weights = mx.array(weights)[None, :, None]
            self.parts.append((states | {"video": state}, mx.array(index), weights))
        # What is held is held exactly, as in the reference, also where no tile sees it.
        held = mx.array((1 - sums) * (1 - video.denoise_mask))[None, :, None]
        self.held = video.clean_latent * held
        self.make = make  # in each step: the rope tables of all tiles would be large

    def __call__(self, x: Streams, sigma: float, step: int) -> Streams:
        total = {k: mx.zeros_like(v) for k, v in x.items()} | {"video": self.held}
        for states, index, weights in self.parts:
            x0 = self.make(states)(x | {"video": x["video"][:, index]}, sigma, step)
            total["video"] = total["video"].at[:, index].add(x0.pop("video") * weights)
            for k, v in x0.items():
                total[k] = total[k] + v / len(self.parts)
            mx.eval(total)  # one tile in memory at a time
        return total
