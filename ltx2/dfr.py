"""DFR, detail-fidelity rendering: segments that end in keyframes, and the tiles of them
in which a canvas is refined at twice its frame rate, as the reference lays them out."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .latents import TIME_SCALE
from .sampling import Streams

SEGMENTS = (32, 24)  # pixel frames from keyframe to keyframe
MAX_FPS = 60.0  # of positions: beyond, a latent lasts less than any in training


def canvas(num_frames: int) -> tuple[int, tuple[int, ...]]:
    """How many frames are made for `num_frames` (at least 9), and their keyframes: the last
    of each segment, of the length that adds the fewest."""
    length = min(SEGMENTS, key=lambda s: -(num_frames - 1) % s)
    total = num_frames + -(num_frames - 1) % length
    return total, tuple(range(length, total, length))


@dataclass(frozen=True)
class Tile:
    """Segments [start, stop) of a canvas; the first `lead` of them are another tile's."""

    start: int
    stop: int
    lead: int
    segments: int  # the canvas has
    length: int  # of a segment in pixel frames
    rate: int  # frames for one of the first stages

    @property
    def first(self) -> int:
        return self.start * self.length

    @property
    def num_frames(self) -> int:
        return (self.stop - self.start) * self.length + 1

    @property
    def slots(self) -> tuple[int, ...]:
        """Where it makes keyframes: in the middle of each segment."""
        return tuple(range(self.length // 2, self.num_frames, self.length))

    def cut(self, latents: mx.array) -> mx.array:
        """Its part of a canvas (1, F, H, W, C)."""
        each = self.length // TIME_SCALE
        return latents[:, self.start * each : self.stop * each + 1]

    def seeds(self, latents: mx.array) -> mx.array:
        """What its keyframes begin from: the canvas's latent frames at their place."""
        half = self.length // TIME_SCALE // 2
        return self.cut(latents)[:, half :: 2 * half]

    def anchors(self, keyframes: mx.array) -> list[tuple[int, mx.array]]:
        """The canvas's keyframes where its segments meet and end, by its own frames."""
        meet = range(max(self.start, 1), self.stop + 1)
        place = lambda n: (n - self.start) * self.length
        return [(place(n), keyframes[:, n - 1 : n]) for n in meet]

    def stitch(self, given: Streams, made: Streams) -> Streams:
        """What the next stage is given: the same canvas, with all that is refined so far,
        or, after the last tile, the refined one with twice the keyframes."""

        def joined(name: str, new: mx.array) -> mx.array:
            return mx.concatenate([given[name], new], 1) if self.lead else new

        # At the seam, the keyframe's own latent is the tile's before.
        video = made["video"][:, self.lead * (self.length // TIME_SCALE + 1) :]
        refined = joined("refined", video)
        slots = joined("slots", made["keyframes"][:, self.lead :])
        if self.stop < self.segments:
            return given | {"refined": refined, "slots": slots}
        keyframes = mx.stack([slots, given["keyframes"]], axis=2).flatten(1, 2)
        return {"video": refined, "keyframes": keyframes}


def tiles(segments: int, length: int, rate: int) -> list[Tile]:
    """A canvas in at most `rate` runs of whole segments, the longer ones first. All but the
    first begin a segment early: their first latent is a single frame, as only a video's
    own may be."""
    size, more = divmod(segments, min(rate, segments))
    starts = [n * size + min(n, more) for n in range(min(rate, segments) + 1)]
    return [
        Tile(start - (start > 0), stop, int(start > 0), segments, length, rate)
        for start, stop in zip(starts, starts[1:])
    ]
