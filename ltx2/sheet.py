"""A contact sheet: frames of a video with their times, and its sound as a waveform."""

from typing import Any, Iterator, Optional

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import color

SIDE, COLUMNS = 320, 4  # of a tile the longer side at most, in pixels
GAP, LABEL, LANE = 8, 18, 64  # a waveform is as high as a lane
NARROW = 200  # room for a line of text
PAPER, INK, WAVE = (44, 44, 48), (212, 212, 216), (96, 165, 250)


class Sheet:
    """Picks frames as they pass; HDR is shown as sRGB, clipped at diffuse white."""

    def __init__(self, fps: float, space: Optional[str] = None, count: int = 12):
        self.fps, self.space, self.count = fps, space or "srgb", count
        self.tiles: list[tuple[float, Image.Image]] = []  # with their times in seconds

    def watch(self, events: Iterator[Any]) -> Iterator[Any]:
        """Pass the events of a run on, and pick from its frames."""
        for event in events:
            if event.frames is not None:
                self.add(event.frames, event.step, event.steps)
            yield event

    def add(self, frames: np.ndarray, end: int, total: int) -> None:
        """Pick from frames (n, H, W, 3), uint8 or float, before frame `end` of `total`."""
        start, count = end - len(frames), min(self.count, total)
        if count > COLUMNS:  # full rows
            count -= count % COLUMNS
        for n in np.linspace(0, total - 1, count).round().astype(int):
            if start <= n < end:
                frame = frames[n - start]
                if frame.dtype != np.uint8:
                    srgb = color.convert(frame, self.space, "srgb").clip(0, 1)
                    frame = np.rint(255 * srgb).astype(np.uint8)
                image = Image.fromarray(frame)
                image.thumbnail((SIDE, SIDE))
                self.tiles.append((n / self.fps, image))

    def draw(self, waveform: Optional[np.ndarray], rate: Optional[int]) -> np.ndarray:
        """The sheet (H, W, 3) uint8; the waveform (samples, channels) may be missing."""
        width, height = self.tiles[0][1].size if self.tiles else (0, 0)
        columns, rows = min(COLUMNS, len(self.tiles)), -(-len(self.tiles) // COLUMNS)
        across = columns * (width + GAP) - GAP if columns else COLUMNS * SIDE
        across = max(NARROW, across)
        below = GAP + rows * (height + LABEL + GAP)
        lanes = 0 if waveform is None else waveform.shape[1] * LANE + LABEL + GAP
        sheet = Image.new("RGB", (across + 2 * GAP, below + lanes), PAPER)
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
        for n, (seconds, image) in enumerate(self.tiles):
            x = GAP + n % COLUMNS * (width + GAP)
            y = GAP + n // COLUMNS * (height + LABEL + GAP)
            sheet.paste(image, (x, y))
            pen.text((x, y + height + 2), f"{seconds:.2f} s", INK, font)
        if lanes:
            peak = draw_sound(pen, waveform, across, below)
            level = f"peak {20 * np.log10(peak):.0f} dB" if peak else "silent"
            text = f"{len(waveform) / rate:.2f} s of sound, {level}"
            pen.text((GAP, sheet.height - GAP - LABEL + 2), text, INK, font)
        return np.asarray(sheet)


def draw_sound(pen: Any, sound: np.ndarray, width: int, top: int) -> float:
    """Each channel in a lane from `top` on, by its extremes in each column of pixels;
    returns the peak, which is as high as a lane."""
    peak = float(np.abs(sound).max(initial=0))
    first = np.arange(width) * len(sound) // width
    for n, wave in enumerate(sound.T):
        middle, scale = top + (n + 0.5) * LANE, (LANE / 2 - 2) / max(peak, 1e-9)
        heights = (middle - scale * f.reduceat(wave, first) for f in (np.fmax, np.fmin))
        for x, (y0, y1) in enumerate(zip(*heights), GAP):
            pen.rectangle((x, y0, x, y1), WAVE)
    return peak
