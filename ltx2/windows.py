"""Parts of a video that are denoised one after the other.

A long video is made in windows: each carries the last latents of the one before, and
decoded frames of the overlap are blended.

dfr (detail-fidelity rendering) pads a video to a canvas of segments that end in
keyframes. Each round refines it at twice the frame rate in tiles of whole segments.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Callable, Iterator

import mlx.core as mx
import numpy as np

from .latents import (
    TIME_SCALE,
    Size,
    Streams,
    audio_tokens,
    evenly_spaced,
    latent_frames,
)

SEGMENTS = (32, 24)  # pixel frames from keyframe to keyframe
MAX_FPS = 60.0  # of positions: above, a latent would be shorter than any in training


@dataclass(frozen=True)
class Window:
    """Frames [start, start + num_frames) of a video; the first `carried_in` of them are
    the window's before, the last `carried_out` are carried on, `blended_out` blended.
    """

    start: int
    num_frames: int
    carried_in: int = 0
    carried_out: int = 0
    blended_out: int = 0
    prefix: str = ""  # of its stages' names and noises

    @property
    def owned(self) -> range:
        """The frames that only this window makes."""
        return range(self.start + self.carried_in, self.start + self.num_frames)

    @property
    def own_frames(self) -> int:
        return self.num_frames - self.carried_in

    def keyframes(self, places: int | tuple[int, ...]) -> tuple[int, ...]:
        """Where it generates keyframes, by its own frames: evenly in what it owns, one
        of them at its end if another window follows; or at frames of the video."""
        if not isinstance(places, tuple):
            count, at_end = places, bool(self.carried_out) and places > 0
            even = evenly_spaced(count - at_end, self.own_frames)
            places = [self.owned[i] for i in even] + [self.owned[-1]] * at_end
        return tuple(frame - self.start for frame in places if frame in self.owned)

    def handed_on(self, keyframes: tuple[int, ...]) -> tuple[int, ...]:
        """Where the next window has these keyframes, by its own frames."""
        first = self.num_frames - self.carried_out
        return tuple(frame - first for frame in keyframes if frame >= first)


def divide(num_frames: int, chunk: int, carry: int, blend: int) -> list[Window]:
    """The windows of a video: one if it fits in `chunk` frames, else full ones and a
    last one of what is left."""
    if num_frames <= chunk:
        return [Window(0, num_frames)]
    lengths = [latent_frames(n) for n in (num_frames, chunk, carry)]
    total, size, overlap = lengths
    full, rest = divmod(total - size, size - overlap)
    frames = [chunk] * (1 + full) + [(overlap + rest - 1) * TIME_SCALE + 1] * bool(rest)
    windows, end = [], 0
    for n, length in enumerate(frames):
        carried = carry if n else 0
        out = (carry, blend) if n + 1 < len(frames) else (0, 0)
        windows.append(Window(end - carried, length, carried, *out, f"chunk{n}."))
        end += length - carried
    return windows


def carried_tokens(window: Window, fps: float, out: bool = False) -> int:
    """Audio tokens that are carried into a window, or out of it."""
    frames = window.carried_out if out else window.carried_in
    return max(1, audio_tokens(frames, fps)) if frames else 0


def blended(
    windows: list[Window], decode: Callable[[Window], Iterator[mx.array]]
) -> Iterator[mx.array]:
    """The frames (1, n, H, W, 3) of all windows in order; those that two windows have
    are blended, weighted by their place."""
    waiting: deque[mx.array] = deque()  # the last frames of the window before
    for window in windows:
        place, count = 0, len(waiting)
        for frames in decode(window):
            if len(windows) == 1:
                yield frames
                continue
            for frame in mx.split(frames, frames.shape[1], axis=1):
                if window.carried_in - count <= place < window.carried_in:
                    weight = (place - window.carried_in + count + 1) / (count + 1)
                    yield waiting.popleft() * (1 - weight) + frame * weight
                elif place >= window.num_frames - window.blended_out:
                    waiting.append(mx.contiguous(frame))
                    mx.eval(waiting[-1])
                elif place >= window.carried_in:
                    yield frame
                place += 1


def crossfaded(
    pieces: list[np.ndarray], windows: list[Window], fps: float, rate: int
) -> np.ndarray:
    """The waveforms (samples, channels) of all windows as one. What a window owns is
    kept, and up to 40 ms more where frames are blended, to fade in (constant power)."""
    done, waiting = [], pieces[0][:0]
    for wave, window in zip(pieces, windows):
        own = min(len(wave), round(window.own_frames / fps * rate))
        kept = wave[-(own + min(round(0.04 * rate), len(waiting))) :]
        fade = len(kept) - own
        if fade:
            t = np.linspace(0, np.pi / 2, fade, dtype=np.float32)[:, None]
            mixed = np.cos(t) * waiting[-fade:] + np.sin(t) * kept[:fade]
            waiting, kept = np.concatenate([waiting[:-fade], mixed]), kept[fade:]
        hold = len(kept) - round(window.blended_out / fps * rate)
        done += [waiting, kept[:hold]]
        waiting = kept[hold:]
    return np.concatenate([*done, waiting])


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
