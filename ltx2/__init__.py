"""LTX-2 on MLX: video with its sound from a prompt."""

import importlib
import os
from typing import Any

# Before the first product, when MLX reads it: an M5 would round float32 to 10 bits.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

__version__ = "0.2.0"
REFERENCE = "1.4.2"  # the release of the reference whose rules these are
HOMES = {
    "guidance": "Guidance",
    "request": "Image LoraFile Request Segment",
    "pipeline": "Event Frames Phase Pipeline Result Step load",
    "snapshot": "Snapshot",
    "stages": "Job",
}
__all__ = sorted(name for names in HOMES.values() for name in names.split())


def __getattr__(name: str) -> Any:
    """The public names, imported when they are used: `--help` must be quick."""
    for module, names in HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
