"""The user's images, clips and sounds as starts and conditionings of the streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import media
from .audio_vae import log_mel
from .latents import (
    AUDIO_TOKENS_PER_SECOND,
    MEL_FRAMES_PER_TOKEN,
    MEL_HOP,
    MEL_RATE,
    Conditioning,
    Freeze,
    Keyframe,
    KeyframeSlots,
    Reference,
    Regenerate,
    Replace,
)
from .request import Job, Stage
from .sampling import Streams

ANCHOR_STRENGTH = 0.95  # the reference's: a tile may still settle its seams
Load = Callable[[str], nn.Module]


@dataclass
class Start:
    """Where a stream starts: initial latents, if there are any, and conditionings."""

    initial: Optional[mx.array] = None
    items: list[Conditioning] = field(default_factory=list)

    @property
    def arrays(self) -> list:
        """All that is to be evaluated before the encoders are freed."""
        return [
            self.initial,
            *(value for i in self.items for value in vars(i).values()),
        ]


def wanted(job: Job) -> bool:
    """Whether a job has any inputs but its prompt."""
    return bool(job.images or job.clip or job.request.audio)


def encode(job: Job, stage: Stage, load: Load) -> dict[str, Start]:
    """Where each stream of a stage starts, at the stage's size and rate; `load` gives
    the "vae" and the "audio_vae" if they are needed."""
    r = job.request
    starts = {name: Start() for name in job.streams}
    first, rate = 0, stage.fps / r.fps
    if stage.tile:
        starts.pop("audio", None)
        first, rate = stage.tile.first, stage.tile.rate
    for image in job.images:
        frame = round(image.frame * rate) - first
        if not 0 <= frame < stage.num_frames:  # of another tile
            continue
        pixels = media.recompress(media.load_image(image.path), job.image_crf)
        pixels = media.resize_and_crop(pixels[None], stage.height, stage.width)
        latents = load("vae").encode(mx.array(pixels)[None])
        starts["video"].items.append(
            Keyframe(latents, frame, stage.fps, image.strength)
            if frame or r.keyframes
            else Replace(latents, 0, image.strength)
        )
    if r.audio:
        tokens = job.audio_tokens
        seconds = tokens / AUDIO_TOKENS_PER_SECOND + 1
        latents = encode_audio(load, r.audio, r.audio_start, seconds, tokens)
        starts["audio"] = Start(latents, [Freeze()])
    if job.clip and r.extend is not None:
        extend(job, stage, starts, load)
    elif job.clip and r.retake is not None:
        retake(job, stage, starts, load)
    elif job.clip and stage.references:
        starts["video"].items.append(reference(job, stage, load))
    return starts


def carried(stage: Stage, latents: Streams) -> list[Conditioning]:
    """The keyframes of a stage, and what guides it of the last one's latents."""
    items: list[Conditioning] = []
    initial = latents.get("keyframes")
    if stage.tile:
        for frame, still in stage.tile.anchors(initial):
            items.append(Keyframe(still, frame, stage.fps, ANCHOR_STRENGTH))
        initial = stage.tile.seeds(latents["video"])
    if stage.keyframes:
        where = stage.keyframes, stage.latent_size, stage.fps
        items.append(KeyframeSlots(*where, initial))
    if stage.details:
        items.append(Reference(latents["smaller"], stage.fps, 1.0, stage.details))
    return items


def extend(job: Job, stage: Stage, starts: dict[str, Start], load: Load) -> None:
    """Hold the clip at the beginning, or at the end when the new part comes before it."""
    clip, sound = encode_clip(job, stage, load), encode_sound(job, stage, load)
    for name, latents, total in (
        ("video", clip, stage.latent_size[0]),
        ("audio", sound, job.audio_tokens),
    ):
        if name in starts and latents is not None:
            before = total - latents.shape[1] if job.request.extend < 0 else 0
            # The first latent spans one frame only where a stream begins.
            skip = 1 if before else 0
            starts[name].items.append(Replace(latents[:, skip:], before + skip))


def retake(job: Job, stage: Stage, starts: dict[str, Start], load: Load) -> None:
    """Make a stretch of the clip anew in the streams asked for, keep all else."""
    clip, sound = encode_clip(job, stage, load), encode_sound(job, stage, load)
    for name, latents in (("video", clip), ("audio", sound)):
        if name in starts and latents is not None:
            again = name in job.request.retake_streams
            item = Regenerate(*job.request.retake) if again else Freeze()
            starts[name] = Start(latents, [item])


def reference(job: Job, stage: Stage, load: Load) -> Reference:
    """The clip as an IC-LoRA's reference, scaled as the LoRA's metadata say."""
    latents = encode_clip(job, stage, load, *job.reference_scale)
    r = job.request
    return Reference(
        latents,
        stage.fps,
        r.reference_strength,
        *job.reference_scale,
        r.reference_attention,
    )


def encode_clip(
    job: Job, stage: Stage, load: Load, down: int = 1, slow: int = 1
) -> mx.array:
    """The input video as latents (1, f, h, w, C), streamed through the encoder, `down`
    times smaller, with the first and then each `slow`-th frame."""
    height, width = stage.height // down, stage.width // down
    frames = media.read_video(job.request.video, 0, job.clip_frames, stage.fps)
    chunks = (
        mx.array(media.resize_and_crop(frame[None], height, width))[None]
        for i, frame in enumerate(frames)
        if i == 0 or (i - 1) % slow == 0
    )
    return mx.concatenate(list(load("vae").encode_stream(chunks)), axis=1)


def encode_sound(job: Job, stage: Stage, load: Load) -> Optional[mx.array]:
    """The input video's sound as latents (1, t, mel, C), if there is one."""
    if "audio" not in job.streams or not job.clip.has_audio:
        return None
    seconds = job.clip_frames / stage.fps
    tokens = min(round(seconds * AUDIO_TOKENS_PER_SECOND), job.audio_tokens)
    return encode_audio(load, job.request.video, 0.0, seconds, tokens)


def encode_audio(
    load: Load, path: str, start: float, seconds: float, tokens: int
) -> mx.array:
    """A window of sound as latents (1, tokens, mel, C): mono is doubled, and what is
    missing at the end is silence."""
    sound, rate = media.read_audio(path, start, seconds)
    sound = media.resample(sound[:, :2], rate, MEL_RATE)
    if sound.shape[1] == 1:
        sound = np.repeat(sound, 2, axis=1)
    if len(sound) // MEL_HOP < (tokens - 1) * MEL_FRAMES_PER_TOKEN:
        whole = tokens * MEL_FRAMES_PER_TOKEN * MEL_HOP
        sound = np.pad(sound, ((0, whole - len(sound)), (0, 0)))
    return load("audio_vae").encode(log_mel(mx.array(sound)[None]))[:, :tokens]
