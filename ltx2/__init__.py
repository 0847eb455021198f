"""LTX-2 on MLX: video with its sound from a prompt."""

__version__ = "0.1.0"
