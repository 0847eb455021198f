"""Frames of clips as one image, one row for each clip: python demo/strip.py strip.png a.mp4 b.mp4"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ltx2 import base, media


def strip(clips: list[np.ndarray], count: int = 8) -> np.ndarray:
    """Evenly spaced frames of clips (F, H, W, 3), all of one size."""
    rows = []
    for frames in clips:
        picked = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
        rows.append(np.concatenate(list(picked), axis=1))
    return np.concatenate(rows)


def main() -> None:
    if len(sys.argv) < 3:
        raise base.UserError("no clips: python demo/strip.py strip.png a.mp4 b.mp4")
    target, *names = sys.argv[1:]
    if Path(target).exists():  # perhaps the tracked demo/strip.png
        raise base.UserError(f"{target} exists: use another name")
    media.save_png(target, strip([np.stack([*media.read_video(n)]) for n in names]))
    print(f"wrote {target}")


if __name__ == "__main__":
    base.run(main)
