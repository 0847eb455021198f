"""LTX-2 on MLX: video with its sound from a prompt."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Guidance", "Image", "LoraFile", "Request", "load"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: `--help` must be quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pipeline, request, sampling

    homes = {"load": pipeline, "Guidance": sampling}
    return getattr(homes.get(name, request), name)
