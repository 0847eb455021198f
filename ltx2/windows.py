"""Parts of a video that are denoised one after the other: dfr's segments and tiles.

dfr (detail-fidelity rendering) pads a video to a canvas of segments that end in
keyframes. Each round refines it at twice the frame rate in tiles of whole segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .latents import TIME_SCALE, Size, Streams, latent_frames

SEGMENTS = (32, 24)  # pixel frames from keyframe to keyframe
MAX_FPS = 60.0  # of positions: above, a latent would be shorter than any in training


def canvas(num_frames: int) -> tuple[int, tuple[int, ...]]:
    """The frames that dfr makes for `num_frames` (at least 9) and its keyframes: the
    last frame of each segment. The segment length is the one that adds fewer frames."""
    length = min(SEGMENTS, key=lambda s: -(num_frames - 1) % s)
    total = num_frames + -(num_frames - 1) % length
    return total, tuple(range(length, total, length))


@dataclass(frozen=True)
class Whole:
    """A stage that denoises all of the previous stage's latents."""

    def cut(self, latents: mx.array) -> mx.array:
        """The part of the video's latents (1, F, H, W, C) that the stage denoises."""
        return latents

    def merge(self, before: Streams, made: Streams) -> Streams:
        """What the next stage starts from: latents before this stage, and its own."""
        return made

    def tokens(self, size: Size) -> int:
        """Tokens of all the latents of which a stage of this size denoises a part."""
        return size.tokens


WHOLE = Whole()


@dataclass(frozen=True)
class Tile(Whole):
    """Segments [start, stop) of a canvas; the first `lead` of them belong to the tile
    before."""

    start: int
    stop: int
    lead: int
    segments: int  # of the canvas
    length: int  # of a segment in pixel frames
    rate: int  # frames for one frame of the first stages

    @property
    def first(self) -> int:
        """Its first pixel frame."""
        return self.start * self.length

    @property
    def num_frames(self) -> int:
        return (self.stop - self.start) * self.length + 1

    def tokens(self, size: Size) -> int:
        frames = latent_frames(self.segments * self.length + 1)
        return frames * size.frame_tokens

    @property
    def slots(self) -> tuple[int, ...]:
        """Where it generates keyframes: in the middle of each segment."""
        return tuple(range(self.length // 2, self.num_frames, self.length))

    def cut(self, latents: mx.array) -> mx.array:
        per_segment = self.length // TIME_SCALE
        return latents[:, self.start * per_segment : self.stop * per_segment + 1]

    def seeds(self, latents: mx.array) -> mx.array:
        """Initial latents of its keyframes: the canvas's latent frames in their place."""
        half = self.length // TIME_SCALE // 2
        return self.cut(latents)[:, half :: 2 * half]

    def anchors(self, keyframes: mx.array) -> list[tuple[int, mx.array]]:
        """The canvas's keyframes between its segments and at its end: frame, latents."""
        ends = range(max(self.start, 1), self.stop + 1)
        frame = lambda n: (n - self.start) * self.length
        return [(frame(n), keyframes[:, n - 1 : n]) for n in ends]

    def merge(self, before: Streams, made: Streams) -> Streams:
        """The same canvas with what has been refined so far; after the last tile the
        refined canvas with twice as many keyframes."""

        def joined(name: str, new: mx.array) -> mx.array:
            return mx.concatenate([before[name], new], 1) if self.lead else new

        # At the seam, the latent of the keyframe is the earlier tile's.
        video = made["video"][:, self.lead * (self.length // TIME_SCALE + 1) :]
        refined = joined("refined", video)
        slots = joined("slots", made["keyframes"][:, self.lead :])
        if self.stop < self.segments:
            return before | {"refined": refined, "slots": slots}
        # (1, K, 2, H, W, C): a new keyframe before each of the canvas's
        keyframes = mx.stack([slots, before["keyframes"]], axis=2).flatten(1, 2)
        return {"video": refined, "keyframes": keyframes}


def tiles(segments: int, length: int, rate: int) -> list[Tile]:
    """Divide a canvas into at most `rate` tiles of whole segments, longer ones first.
    Every tile but the first starts one segment early, because its first latent covers a
    single frame, as only a video's first latent may."""
    count = min(rate, segments)
    size, longer = divmod(segments, count)
    starts = [n * size + min(n, longer) for n in range(count + 1)]
    return [
        Tile(start - (start > 0), stop, int(start > 0), segments, length, rate)
        for start, stop in zip(starts, starts[1:])
    ]
