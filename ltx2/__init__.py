"""LTX-2 on MLX: video with its sound from a prompt."""
