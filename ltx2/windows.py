"""Parts of a video that are denoised one after the other.

Windows of a long video carry their last latents to the next one; decoded frames of the
overlap are blended. dfr (detail-fidelity rendering) pads a video to a canvas of
segments that end in keyframes, and refines it at twice the rate in slices of whole
segments.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Callable, Iterator

import mlx.core as mx
import numpy as np

from . import latents
from .latents import TIME_SCALE, Size, Streams

SEGMENTS = (32, 24)  # pixel frames from keyframe to keyframe
ANCHOR_STRENGTH = 0.95  # the reference's: a slice can still smooth its seams
GRIDS = (2, 4)  # tiles along a side of dfr's coarse and fine passes
MAX_FPS = 60.0  # of positions in dfr, the reference's


@dataclass(frozen=True)
class Window:
    """Frames [start, start + num_frames) of a video. The window before made the first
    `carried_in`; the next one starts with the last `carried_out`, and blends
    `blended_out` of them."""

    start: int
    num_frames: int
    carried_in: int = 0
    carried_out: int = 0
    blended_out: int = 0
    prefix: str = ""  # of the names of its stages and noises
    given: bool = False  # frames of an input clip, which are not generated

    @property
    def owned(self) -> range:
        """The frames that only this window makes."""
        return range(self.start + self.carried_in, self.start + self.num_frames)

    def keyframes(self, places: int | tuple[int, ...]) -> tuple[int, ...]:
        """Where it generates keyframes, as frames of the window: a number of them evenly
        (one at the end if another window follows), or at frames of the video."""
        if not isinstance(places, tuple):
            count, at_end = places, bool(self.carried_out) and places > 0
            even = np.linspace(0, len(self.owned) - 1, count - at_end + 2)[1:-1]
            places = [self.owned[round(i)] for i in even.tolist()]
            places += [self.owned[-1]] * at_end
        places = sorted(set(places))
        return tuple(frame - self.start for frame in places if frame in self.owned)

    def handed_on(self, keyframes: tuple[int, ...]) -> tuple[int, ...]:
        """Where the next window has these keyframes, as its frames."""
        first = self.num_frames - self.carried_out
        return tuple(frame - first for frame in keyframes if frame >= first)


def divide(num_frames: int, chunk: int, carry: int, blend: int) -> list[Window]:
    """The windows of a video: full ones of `chunk` frames, and one of the rest."""
    if num_frames <= chunk:
        return [Window(0, num_frames)]
    lengths = [latents.latent_frames(n) for n in (num_frames, chunk, carry)]
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


def extended(clip: int, total: int, before: bool, chunk: int, carry: int, blend: int):
    """The windows that make a clip `total` frames long, after its end or `before`; the
    clip is one of them unless another one sees all of it."""
    rest = clip - carry
    if total <= chunk or before and rest <= 0:
        return [Window(0, total)]
    if before:
        seen = Window(total - clip, clip, carry, given=True)
        return [Window(0, total - rest, 0, carry, blend), seen]
    if rest <= 0:
        return divide(total, chunk, carry, blend)
    found = divide(total - rest, chunk, carry, blend)
    first, *others = (replace(w, start=w.start + rest) for w in found)
    seen = Window(0, clip, 0, carry, blend, given=True)
    return [seen, replace(first, carried_in=carry), *others]


def carried_tokens(frames: int, fps: float) -> int:
    """How many audio tokens are carried on with this many frames."""
    return max(1, latents.audio_tokens(frames, fps)) if frames else 0


def blended(windows: list[Window], decode: Callable) -> Iterator[mx.array]:
    """The frames (1, n, H, W, 3) of all windows; shared frames fade linearly."""
    waiting: deque[mx.array] = deque()  # the last frames of the window before
    for window in windows:
        place, count = 0, len(waiting)
        hold = max(window.num_frames - window.blended_out, window.carried_in)
        for frames in decode(window):
            if len(windows) == 1:
                yield frames
                continue
            for frame in mx.split(frames, frames.shape[1], axis=1):
                if window.carried_in - count <= place < window.carried_in:
                    weight = (place - window.carried_in + count + 1) / (count + 1)
                    yield waiting.popleft() * (1 - weight) + frame * weight
                elif place >= hold:
                    waiting.append(mx.contiguous(frame))
                    mx.eval(waiting[-1])
                elif place >= window.carried_in:
                    yield frame
                place += 1


def crossfaded(pieces: list, windows: list, fps: float, rate: int) -> np.ndarray:
    """Join the windows' waveforms (samples, channels). Of each, the sound of its own
    frames is kept, and up to 40 ms before it to fade in (constant power)."""
    done, waiting, end = [], pieces[0][:0], 0
    extends = any(window.given for window in windows)
    for wave, window in zip(pieces, windows):
        own = min(len(wave), round(len(window.owned) / fps * rate))
        if extends:  # a clip's sound is not 30 ms short, as generated sound is
            own = round(window.start / fps * rate) + len(wave) - end
        end += own
        kept = wave[-(own + min(round(0.04 * rate), len(waiting))) :]
        fade = len(kept) - own
        if fade:
            t = np.linspace(0, np.pi / 2, fade, dtype=np.float32)[:, None]
            mixed = np.cos(t) * waiting[-fade:] + np.sin(t) * kept[:fade]
            waiting, kept = waiting[:-fade], np.concatenate([mixed, kept[fade:]])
        hold = max(0, len(kept) - round(window.blended_out / fps * rate))
        done += [waiting, kept[:hold]]
        waiting = kept[hold:]
    return np.concatenate([*done, waiting])


def canvas(num_frames: int) -> tuple[int, tuple[int, ...]]:
    """How many frames dfr generates for at least 9, and its keyframes, which end segments."""
    length = min(SEGMENTS, key=lambda s: -(num_frames - 1) % s)
    total = num_frames + -(num_frames - 1) % length
    return total, tuple(range(length, total, length))


@dataclass(frozen=True)
class Whole:
    """A stage that denoises all of the previous stage's latents."""

    keyframes = ()  # where the merged latents have keyframes
    grid = 0  # tiles along a side, 0: no tiles
    decoder = ""  # the component that enlarges keyframes to the stage's size, if any

    def under(self, video: mx.array) -> mx.array:
        """The part of a video's latents that covers the stage's frames."""
        return video

    def cut(self, before: Streams) -> mx.array:
        """The video's latents (1, F, H, W, C) that the stage starts from."""
        return self.under(before["video"])

    def merge(self, before: Streams, made: Streams) -> Streams:
        """What the next stage starts from: latents before this stage, and its own."""
        return made

    def whole(self, size: Size) -> Size:
        """The size of the complete video at the stage's frame rate."""
        return size


WHOLE = Whole()


@dataclass(frozen=True)
class Slice(Whole):
    """Segments [start, stop) of a canvas whose rate was doubled. All but the first
    begin with the last keyframe before their seam and hold the latents up to it."""

    start: int
    stop: int
    segments: int  # of the canvas
    length: int  # of a segment in pixel frames
    rate: int  # frames for one frame of the first stages

    strength = ANCHOR_STRENGTH  # of the keyframes that guide it

    # The pixel frame after which its latents are new (a keyframe), and its first frame
    seam = property(lambda self: self.start * self.length)
    first = property(lambda self: self.seam - self.length // 2 if self.start else 0)
    num_frames = property(lambda self: self.stop * self.length - self.first + 1)

    @property
    def held(self) -> int:
        """How many latents it holds: the keyframe and those up to the seam."""
        return 1 + (self.seam - self.first) // TIME_SCALE if self.start else 0

    @property
    def slots(self) -> tuple[int, ...]:
        """Where it generates keyframes, as its own frames: in the middle of segments."""
        middles = range(self.length // 2, self.segments * self.length, self.length)
        return tuple(p - self.first for p in middles[self.start : self.stop])

    @property
    def keyframes(self) -> tuple[int, ...]:
        space = self.length // min(self.rate, 2)  # a round makes one between two
        return tuple(range(space, self.segments * self.length + 1, space))

    @property
    def guides(self) -> tuple[int, ...]:
        """The frames of the keyframes that can guide it."""
        return tuple(range(self.length, self.segments * self.length + 1, self.length))

    def whole(self, size: Size) -> Size:
        return replace(size, num_frames=self.segments * self.length + 1)

    def under(self, video: mx.array) -> mx.array:
        end = self.stop * self.length // TIME_SCALE + 1
        return video[:, self.first // TIME_SCALE : end]

    def cut(self, before: Streams) -> mx.array:
        video = self.under(before["video"])
        if not self.start:
            return video
        return mx.concatenate([self.plane(before), video[:, 1:]], axis=1)

    def plane(self, before: Streams) -> mx.array:
        """The keyframe (1, 1, H, W, C) that it starts with."""
        return before["slots"][:, self.start - 1 : self.start]

    def held_latents(self, before: Streams) -> mx.array:
        """The latents that it holds at its start."""
        end = self.seam // TIME_SCALE + 1
        made = before["refined"][:, self.first // TIME_SCALE + 1 : end]
        return mx.concatenate([self.plane(before), made], axis=1)

    def seeds(self, before: Streams) -> mx.array:
        """Initial latents of its keyframes: the nearest ones at its start."""
        nearest = [round(place / TIME_SCALE) for place in self.slots]
        return self.cut(before)[:, mx.array(nearest)]

    @property
    def anchor_places(self) -> list[tuple[int, int]]:
        """The guides after the seam: as its own frames, and their numbers."""
        own = range(self.seam + (self.start > 0), self.first + self.num_frames)
        return [(p - self.first, n) for n, p in enumerate(self.guides) if p in own]

    def merge(self, before: Streams, made: Streams) -> Streams:
        """The same canvas and what is refined so far; after the last slice the refined
        canvas with its keyframes."""
        new = {"refined": made["video"][:, self.held :]}
        new |= {"slots": made["keyframes"]} if self.slots else {}
        if self.start:
            new = {k: mx.concatenate([before[k], x], axis=1) for k, x in new.items()}
        if self.stop < self.segments:
            return before | new
        return {"video": new["refined"], "keyframes": self.all_keyframes(before | new)}

    def all_keyframes(self, canvas: Streams) -> mx.array:
        """All keyframes (1, K, H, W, C): a new one before each of the canvas's."""
        return mx.stack([canvas["slots"], canvas["keyframes"]], axis=2).flatten(1, 2)

    def sound(self, audio: mx.array, tokens: int) -> mx.array:
        """Audio latents (1, tokens, mel, C) of its frames, sampled from the canvas's."""
        whole = (self.segments * self.length + self.rate) / audio.shape[1]
        ends = self.first / whole, (self.first + self.num_frames) / whole
        places = ends[0] + np.arange(tokens) * (ends[1] - ends[0]) / tokens
        places = np.clip(places, 0, audio.shape[1] - 1)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, audio.shape[1] - 1)
        weight = mx.array((places - low).astype(np.float32))[None, :, None, None]
        low, high = (audio[:, mx.array(i)] for i in (low, high))
        return low * (1 - weight) + high * weight


@dataclass(frozen=True)
class EnlargedSlice(Slice):
    """A slice at twice the sides: a coarse pass, then a fine one of its result (GRIDS).
    Its guides are the canvas's enlarged keyframes; its first frame if it `opens`."""

    opens: int  # 1, or 0 if an image does
    grid: int
    decoder: str

    slots = ()
    strength = 1.0
    guides = property(lambda self: self.keyframes + (0,) * self.opens)

    def stills(self, before: Streams) -> list[mx.array]:
        """The guides before they are enlarged."""
        keyframes = mx.split(before["keyframes"], len(self.keyframes), axis=1)
        return keyframes + [before["video"][:, :1]] * self.opens

    def plane(self, before: Streams) -> mx.array:
        n = self.keyframes.index(self.first)
        return before["keyframes"][:, n : n + 1]

    def cut(self, before: Streams) -> mx.array:
        return super().cut(before) if self.grid == GRIDS[0] else before["coarse"]

    def merge(self, before: Streams, made: Streams) -> Streams:
        if self.grid == GRIDS[0]:
            return before | {"coarse": made["video"]}
        return super().merge(before, made)

    def all_keyframes(self, canvas: Streams) -> mx.array:
        return canvas["keyframes"][:, : len(self.keyframes)]  # those that guided it


def slices(segments: int, length: int, rate: int) -> list[Slice]:
    """Divide a canvas into at most `rate` slices of whole segments, longer ones first."""
    ends = latents.divided_evenly(segments, min(rate, segments))
    return [Slice(*pair, segments, length, rate) for pair in zip(ends, ends[1:])]


def slices_of_round(number: int, keyframes: tuple[int, ...]) -> list[Slice]:
    """The slices of dfr's round `number` for a canvas with these keyframes (0: one slice)."""
    rate, count = 2**number, 2 if number else 1  # keyframes to a segment
    return slices(len(keyframes) * rate // count, count * keyframes[0], rate)


def conditioned_rate(fps: float) -> float:
    """The frame rate of dfr's positions: 60 for any rate above 30."""
    return MAX_FPS if fps > 30 else fps
