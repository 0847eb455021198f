"""What a stage is conditioned on: images, clips, sounds, keyframes, earlier latents.

A condition holds paths and numbers, so that a stage can be planned, compared and saved;
`load` makes a conditioning of the latent state when its source is available.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Iterator, Mapping, Optional

import mlx.core as mx

from . import latents
from .guidance import Guidance, Prompts
from .inputs import Encoders
from .latents import SPACE_SCALE, TIME_SCALE, Conditioning, LatentState, Size, Streams
from .request import LoraFile
from .tiles import LARGE, Span, Tiles, blended, cells, equal_spans, spans
from .windows import ANCHOR_STRENGTH, WHOLE, Slice, Whole, Window, carried_tokens

WHOLE_CLIP = Window(0, 0)


class Condition:
    """One condition of a stage on one stream."""

    encoder: ClassVar[str] = ""  # the component that `load` needs
    carried: ClassVar[bool] = False  # made from earlier latents, else from input files
    weighs: ClassVar[bool] = False  # needs a matrix of attention weights
    # How many frames it encodes together
    num_encoded = property(lambda self: getattr(self, "num_frames", 1))

    def tokens(self, size: Size) -> int:
        """How many tokens it appends at a size."""
        return 0

    def load(self, size: Size, source: Encoders) -> Conditioning:
        """The conditioning at a size, from input files."""
        raise NotImplementedError


Loaded = dict[Condition, Conditioning]


# Conditions on input files


@dataclass(frozen=True)
class ShowImage(Condition):
    """Hold an image as the first frame."""

    path: str
    strength: float
    crf: int
    encoder = "vae"

    def load(self, size: Size, source: Encoders) -> Conditioning:
        image = source.image(self.path, self.crf, size)
        return lambda state: state.hold(image, 0, self.strength)


@dataclass(frozen=True)
class GuideImage(ShowImage):
    """Guide with an image at a frame."""

    frame: int

    def tokens(self, size: Size) -> int:
        return size.frame_tokens

    def load(self, size: Size, source: Encoders) -> Conditioning:
        image = source.image(self.path, self.crf, size)
        return lambda state: state.guide(image, self.frame, size.rate, self.strength)


@dataclass(frozen=True)
class ClipPart(Condition):
    """The video or the sound of a part of a clip."""

    path: str
    start: int  # its first frame
    num_frames: int
    stream: str
    encoder = property(lambda self: "vae" if self.stream == "video" else "audio_vae")

    def encoded(self, size: Size, source: Encoders) -> mx.array:
        """Latents, cut to the target's length."""
        if self.stream == "video":
            part = self.path, self.start, self.num_frames
            return source.clip(*part, size, tiles=LARGE)
        tokens = latents.audio_tokens(self.num_frames, size.fps)
        start, seconds = self.start / size.fps, self.num_frames / size.fps
        return source.sound(self.path, start, seconds, min(tokens, size.audio_tokens))


@dataclass(frozen=True)
class HoldClip(ClipPart):
    """Hold a clip at the start or the end of the result: an extension."""

    at_end: bool

    def load(self, size: Size, source: Encoders) -> Conditioning:
        clip = self.encoded(size, source)
        total = size.latent[0] if self.stream == "video" else size.audio_tokens
        before = total - clip.shape[1] if self.at_end else 0
        # Only at the start of a stream does the first latent cover a single frame.
        skip = 1 if before else 0
        return lambda state: state.hold(clip[:, skip:], before + skip)


@dataclass(frozen=True)
class RetakeClip(ClipPart):
    """Start from a clip and regenerate a span of seconds; None: regenerate nothing."""

    span: Optional[tuple[float, float]]

    def load(self, size: Size, source: Encoders) -> Conditioning:
        clip, from_noise = self.encoded(size, source), source.frozen_from_noise
        if self.span is None:
            return lambda state: state.start_from(clip).freeze(from_noise)
        return lambda state: state.start_from(clip).regenerate(*self.span)


@dataclass(frozen=True)
class HoldSound(Condition):
    """Keep a sound file as the audio stream."""

    path: str
    start: float
    skip: int = 0  # tokens that belong to earlier windows
    encoder = "audio_vae"

    def encoded(self, size: Size, source: Encoders) -> mx.array:
        """Latents of the window's part."""
        tokens = self.skip + size.audio_tokens
        seconds = tokens / latents.AUDIO_TOKENS_PER_SECOND + 1
        return source.sound(self.path, self.start, seconds, tokens)[:, self.skip :]

    def load(self, size: Size, source: Encoders) -> Conditioning:
        sound = self.encoded(size, source)
        return lambda state: state.start_from(sound).freeze()


@dataclass(frozen=True)
class ReferenceSound(HoldSound):
    """Show a clip's sound to an IC-LoRA."""

    def tokens(self, size: Size) -> int:
        return size.audio_tokens

    def load(self, size: Size, source: Encoders) -> Conditioning:
        sound = self.encoded(size, source)
        return lambda state: state.show_sound(sound)


@dataclass(frozen=True)
class ReferenceClip(Condition):
    """Show a clip to an IC-LoRA, `downscale` times smaller and `slow` times slower."""

    path: str
    num_frames: int
    strength: float
    attention: float
    downscale: int
    slow: int
    window: Window = WHOLE_CLIP  # the frames that it covers
    # A clip of weights, and at which size it is read
    mask: Optional[tuple[str, Size]] = None
    part: Whole = WHOLE  # which part of it is shown
    tiles: Tiles = ()  # in which it is encoded
    repeats: int = 1  # how often each frame is shown
    encoder = "vae"
    weighs = property(lambda self: self.attention != 1 or self.mask is not None)

    def tokens(self, size: Size) -> int:
        frames = min(latents.latent_frames(self.num_frames) - self.skip, size.latent[0])
        return frames * size.frame_tokens // self.downscale**2

    @property
    def skip(self) -> int:
        """How many latents touch frames carried in from the window before."""
        per_latent = TIME_SCALE * self.slow
        carried = self.window.carried_in
        return 1 + (carried + per_latent - 2) // per_latent if carried else 0

    def load(self, size: Size, source: Encoders) -> Conditioning:
        size = self.part.whole(size)
        smaller = size.divided(self.downscale)
        frames = self.window.start, self.num_frames
        how = self.slow, self.tiles, self.repeats
        clip = source.clip(self.path, *frames, smaller, *how, pads=True)
        clip = self.part.under(clip)
        scale, visible = (self.downscale, self.slow), self.attention
        if self.mask:
            path, sides = self.mask
            # After an upsampler of 1.5 a latent may not be whole pixels of the mask.
            if sides.height % smaller.latent[1] or sides.width % smaller.latent[2]:
                sides = size
            how = self.slow, self.path
            weights = source.weights(path, *frames, sides, smaller, *how)
            weights = self.part.under(weights[None])[0, self.skip :]
            visible = visible * weights.flatten()
        facts = clip, size.rate, self.strength, *scale, visible, self.skip
        return lambda state: state.show(*facts)


@dataclass(frozen=True)
class Keyframes(Condition):
    """Single frames at these places, frames of the window."""

    frames: tuple[int, ...]

    def tokens(self, size: Size) -> int:
        return len(self.frames) * size.frame_tokens


@dataclass(frozen=True)
class ClipKeyframes(Keyframes):
    """Guide with these single frames of a clip."""

    path: str
    shown: tuple[int, ...]
    encoder = "vae"

    def load(self, size: Size, source: Encoders) -> Conditioning:
        still = lambda frame: source.clip(self.path, frame, 1, size)
        stills = mx.concatenate([*map(still, self.shown)], axis=1)
        facts = self.frames, size.rate, ANCHOR_STRENGTH
        return lambda state: state.guide_stills(stills, *facts)


# Conditions on the previous stage's latents


class Carried(Condition):
    """A condition made from the latents of earlier stages."""

    carried = True

    def apply(self, state: LatentState, size: Size, before: Streams) -> LatentState:
        """The state with the condition, at a size."""
        raise NotImplementedError


class NewKeyframes(Carried, Keyframes):
    """Generate single frames, starting from those of the previous stage."""

    def apply(self, state: LatentState, size: Size, before: Streams) -> LatentState:
        return state.generate_stills(self.frames, size, before.get("keyframes"))


@dataclass(frozen=True)
class CarriedLatents(Carried):
    """Hold the last latents of the window before, of the same stage."""

    stream: str
    stage: str

    def apply(self, state: LatentState, size: Size, before: Streams) -> LatentState:
        return state.hold(before[carry_key(self.stage, self.stream)])


@dataclass(frozen=True)
class CarriedKeyframes(Carried, Keyframes):
    """Guide with keyframes that the window before generated in its last frames."""

    stage: str

    def apply(self, state: LatentState, size: Size, before: Streams) -> LatentState:
        stills = before[carry_key(self.stage, "keyframes")]
        return state.guide_stills(stills, self.frames, size.rate)


def carry_key(stage: str, stream: str) -> str:
    """The key of what a stage passes to the same stage of the next window."""
    return f"carry.{stage}.{stream}"


@dataclass(frozen=True)
class KeepAudio(Carried):
    """Keep the previous stage's audio; `as_reference`: an IC-LoRA also sees it."""

    as_reference: bool = False

    def tokens(self, size: Size) -> int:
        return size.audio_tokens * self.as_reference

    def apply(self, state: LatentState, size: Size, before: Streams) -> LatentState:
        state = state.freeze()
        return state.show_sound(before["audio"]) if self.as_reference else state


@dataclass(frozen=True)
class PreviousAsReference(Carried):
    """Show the previous stage's smaller video to an IC-LoRA."""

    downscale: int
    part: Whole = WHOLE  # which part of that video

    def tokens(self, size: Size) -> int:
        return size.tokens // self.downscale**2

    def apply(self, state: LatentState, size: Size, before: Streams) -> LatentState:
        smaller = self.part.under(before["smaller"])
        return state.show(smaller, size.rate, 1.0, self.downscale)


@dataclass(frozen=True)
class SliceKeyframes(Carried):
    """Guide a slice with the canvas's keyframes, generate one in each segment, and hold
    the latents of the slice before."""

    part: Slice

    def tokens(self, size: Size) -> int:
        return (len(self.part.slots) + len(self.part.anchor_places)) * size.frame_tokens

    def apply(self, state: LatentState, size: Size, before: Streams) -> LatentState:
        part, (frames, numbers) = self.part, zip(*self.part.anchor_places)
        stills = before["keyframes"][:, mx.array(numbers)]
        state = state.guide_stills(stills, frames, size.rate, part.strength)
        if part.slots:
            state = state.generate_stills(part.slots, size, part.seeds(before))
        return state.hold(part.held_latents(before)) if part.start else state


@dataclass(frozen=True)
class SliceSound(Carried):
    """Keep the first stage's audio of a slice's frames."""

    part: Slice

    def apply(self, state: LatentState, size: Size, before: Streams) -> LatentState:
        sound = self.part.sound(before["final_audio"], size.audio_tokens)
        return state.start_from(sound).freeze()


@dataclass(frozen=True)
class Tile(Whole):
    """A tile of a video's frames, rows and columns, denoised by itself as if the video
    began with it; tiles are added by their weights."""

    spans: tuple[Span, Span, Span]
    full: Size  # of the video
    last: bool

    def whole(self, size: Size) -> Size:
        return self.full

    @property
    def size(self) -> Size:
        """The tile's size; nothing of it is padding."""
        frames, *sides = (s.stop - s.start for s in self.spans)
        height, width = (SPACE_SCALE * side for side in sides)
        sides = {"height": height, "width": width, "shown": None}
        return replace(self.full, num_frames=(frames - 1) * TIME_SCALE + 1, **sides)

    def under(self, video: mx.array) -> mx.array:
        scale = video.shape[2] / self.full.latent_sides[0]  # of a smaller reference
        place = *cells(self.spans[:1]), *cells(self.spans[1:], scale)
        return video[(slice(None), *place)]

    def merge(self, before: Streams, made: Streams) -> Streams:
        """The same video and the sum so far; the sum after the last tile."""
        total = before.get("refined", mx.zeros_like(before["video"]))
        total = blended(total, made["video"], self.spans)
        return {"video": total} if self.last else before | {"refined": total}


@dataclass(frozen=True)
class Stage:
    """One denoising loop: its size, schedule and conditions."""

    name: str
    size: Size
    sigmas: tuple[float, ...]
    sampler: str = "euler"
    noise_scale: float = 1.0
    guidance: Mapping[str, Guidance] = field(default_factory=dict)  # by stream
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    step_cache: float = 0.0
    loras: tuple[LoraFile, ...] = ()
    upsampler: Optional[str] = None  # brings the previous latents to this size
    conditions: Mapping[str, tuple[Condition, ...]] = field(default_factory=dict)
    final: tuple[str, ...] = ("video", "audio")  # streams that the result takes from it
    part: Whole = WHOLE  # which part of the previous latents
    window: Window = WHOLE_CLIP
    tile: Optional[tuple[int, int]] = None  # latents of a model call: height, width
    prompts: Prompts = Prompts()

    streams = property(lambda self: tuple(self.conditions))  # that it denoises
    whole = property(lambda self: self.part.whole(self.size))  # the video's size
    steps = property(lambda self: len(self.sigmas) - 1)
    first = property(lambda self: self.noise_scale == 1)  # starts from noise alone

    @property
    def spans(self) -> list[list[Span]]:
        """The tiles' rows and columns, [] without tiles; a call sees one tile."""
        sides = self.size.latent_sides
        if self.part.grid:
            return [equal_spans(side, self.part.grid) for side in sides]
        return [spans(*pair) for pair in zip(sides, self.tile)] if self.tile else []

    @property
    def seen(self) -> float:
        """The fraction of its tokens that a model call sees."""
        largest = lambda side: max(s.stop - s.start for s in side) / side[-1].stop
        return math.prod(map(largest, self.spans))

    @property
    def tokens(self) -> tuple[float, int]:
        """Tokens of the video and of the audio that a model call sees."""
        video = self.size.tokens + sum(c.tokens(self.size) for c in self.all_conditions)
        video *= ("video" in self.streams) * self.seen
        return video, self.size.audio_tokens * ("audio" in self.streams)

    @property
    def phase(self) -> str:
        """Its name without the prefix of its window."""
        return self.name.removeprefix(self.window.prefix)

    def carry(self, made: Streams) -> Streams:
        """What the same stage of the next window starts with."""
        if not self.window.carried_out:
            return {}
        frames = latents.latent_frames(self.window.carried_out)
        tokens = carried_tokens(self.window.carried_out, self.size.fps)
        tails = {"video": made["video"][:, -frames:]}
        if "audio" in made:
            tails["audio"] = made["audio"][:, -tokens:]
        if count := len(self.window.handed_on(self.slots)):
            tails["keyframes"] = made["keyframes"][:, -count:]
        return {carry_key(self.phase, k): mx.contiguous(x) for k, x in tails.items()}

    @property
    def all_conditions(self) -> Iterator[Condition]:
        return (c for items in self.conditions.values() for c in items)

    @property
    def slots(self) -> tuple[int, ...]:
        """The places of the keyframes that it generates."""
        new = (c for c in self.all_conditions if isinstance(c, NewKeyframes))
        return sum((c.frames for c in new), ())
