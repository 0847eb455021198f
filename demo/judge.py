"""Measure color, shape, motion, pitch and panning of a clip: python demo/judge.py clip.mp4

It uses no model, only the frames (F, H, W, 3) uint8 and the waveform (samples, 2), and
returns names of `demo.data`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import data  # noqa: E402
from ltx2 import base, media  # noqa: E402


def masks(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Background color (3,) and the share of each pixel that the shape covers, (F, H, W)."""
    pixels = frames.astype(np.float32)
    sides = (pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    background = np.median(border, 0)
    difference = np.abs(pixels - background).max(-1)
    strongest = np.quantile(difference, 0.995)
    if strongest < 40:
        return background, np.zeros_like(difference)
    cover = np.clip(difference / strongest, 0, 1)
    return background, np.where(cover > 0.3, cover, 0)


def name_color(frames: np.ndarray, cover: np.ndarray) -> str | None:
    """The color of the palette that is nearest in chromaticity to the shape's pixels."""
    inside = frames[cover > 0.8].astype(np.float32)
    if len(inside) < 20:
        return None
    seen = np.median(inside, 0)
    names = list(data.COLORS)
    palette = np.array([data.COLORS[name] for name in names], np.float32)

    def chromaticity(rgb):
        centered = rgb - rgb.mean(-1, keepdims=True)
        return centered / (np.linalg.norm(centered, axis=-1, keepdims=True) + 1e-3)

    if np.ptp(seen) < 40:
        return None
    return names[int(np.argmax(chromaticity(palette) @ chromaticity(seen)))]


def name_shape(cover: np.ndarray) -> str | None:
    """By the share of the bounding box that the shape fills: 1/2, pi/4 or 1."""
    shares = []
    for frame in cover:
        rows, columns = (np.flatnonzero((frame > 0.5).any(axis)) for axis in (1, 0))
        if len(rows) < 8 or len(columns) < 8:
            continue
        top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
        if (
            min(top, left) == 0
            or bottom == frame.shape[0] - 1
            or right == frame.shape[1] - 1
        ):
            continue
        box = (bottom - top + 1) * (right - left + 1)
        shares.append((frame[top : bottom + 1, left : right + 1] > 0.5).sum() / box)
    if not shares:
        return None
    share = np.median(shares)
    return "triangle" if share < 0.655 else "circle" if share < 0.89 else "square"


def track(cover: np.ndarray) -> np.ndarray:
    """Center x, center y (0 to 1) and area (share of the frame) in each frame, (F, 3)."""
    f, h, w = cover.shape
    area = cover.sum((1, 2))
    weight = cover / np.maximum(area, 1e-6)[:, None, None]
    x = (weight * (np.arange(w) + 0.5)).sum((1, 2)) / w
    y = (weight * (np.arange(h) + 0.5)[:, None]).sum((1, 2)) / h
    return np.stack([x, y, area / (h * w)], 1)


def name_motion(path: np.ndarray) -> str | None:
    """From the path of the center and the growth of the area."""
    if (path[:, 2] < 0.004).mean() > 0.2:
        return None
    start, end = path[:3].mean(0), path[-3:].mean(0)
    dx, dy = end[:2] - start[:2]
    way = np.abs(np.diff(path[:, 1])).sum()
    if way > 0.35 and way > 1.8 * abs(dy) and np.ptp(path[:, 1]) > 0.15 > abs(dx):
        return "bouncing"
    if max(abs(dx), abs(dy)) > 0.2:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    if end[2] > 1.8 * start[2]:
        return "growing"
    return "still" if max(np.ptp(path[:, 0]), np.ptp(path[:, 1])) < 0.15 else None


def name_pitch(waveform: np.ndarray, rate: int) -> str | None:
    """The pitch nearest to the strongest frequency."""
    mono = waveform.mean(1)
    if len(mono) < rate // 4 or np.sqrt((mono**2).mean()) < 0.01:
        return None
    power = np.abs(np.fft.rfft(mono * np.hanning(len(mono)), 4 * len(mono))) ** 2
    hertz = np.fft.rfftfreq(4 * len(mono), 1 / rate)
    peak = hertz[np.argmax(np.where((hertz > 80) & (hertz < 2200), power, 0))]
    names = sorted(data.PITCHES, key=data.PITCHES.get)
    distance = [abs(np.log(peak / data.PITCHES[name])) for name in names]
    return names[int(np.argmin(distance))]


def pan_track(waveform: np.ndarray, frames: int) -> np.ndarray:
    """Position of the sound during each frame, 0 (left) to 1 (right), (frames,)."""
    energy = np.stack([(part**2).sum(0) for part in np.array_split(waveform, frames)])
    left, right = np.sqrt(energy.T + 1e-12)
    return (np.arctan2(right, left) / (np.pi / 2) - 0.1) / 0.8


def judge(frames: np.ndarray, waveform: np.ndarray, rate: int) -> dict:
    """Attributes of a clip, None where unclear; `pan_error` is the mean distance of sound and
    shape in frame widths."""
    background, cover = masks(frames)
    path = track(cover)
    pan = pan_track(waveform, len(frames))
    seen = path[:, 2] > 0.004
    return dict(
        color=name_color(frames, cover),
        shape=name_shape(cover),
        motion=name_motion(path),
        background="light" if background.mean() > 128 else "dark",
        pitch=name_pitch(waveform, rate),
        pan_error=float(np.abs(pan - path[:, 0])[seen].mean()) if seen.any() else None,
    )


def read_mp4(path: str | Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Frames, stereo waveform and its rate of a clip; UserError if it cannot be read."""
    sound, rate = media.read_audio(path)
    sound = np.broadcast_to(sound, (len(sound), 2))  # also mono
    return np.stack([*media.read_video(path)]), sound, rate


def main() -> None:
    if not sys.argv[1:]:
        raise base.UserError("no clip: python demo/judge.py clip.mp4")
    for name in sys.argv[1:]:
        print(name, json.dumps(judge(*read_mp4(name))))


if __name__ == "__main__":
    base.run(main)
