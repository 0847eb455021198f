"""Predict the video's duration from the contexts of its prompt (2.5)."""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .base import Config
from .layers import Component, Section, Shapes


@dataclass
class DurationConfig(Config):
    """The `duration_head` section; sizes come from the tensors' shapes."""

    video_dim: int
    audio_dim: int
    dim: int
    hidden: int
    num_pooler_heads: int = 4

    FIXED = {"num_queries": (1,)}
    UNUSED = frozenset({"pooler_hidden_dim", "mlp_hidden"})


class AttentionPooler(nn.Module):
    """One learned query attends to all tokens: (B, T, D) to (B, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_tokens = mx.zeros((1, dim))
        self.cross_attn = {
            "in_proj_weight": mx.zeros((3 * dim, dim)),
            "in_proj_bias": mx.zeros(3 * dim),
            "out_proj": nn.Linear(dim, dim),
        }

    def __call__(self, x: mx.array) -> mx.array:
        query = mx.broadcast_to(self.query_tokens, (len(x), *self.query_tokens.shape))
        weights = mx.split(self.cross_attn["in_proj_weight"], 3)
        biases = mx.split(self.cross_attn["in_proj_bias"], 3)
        q, k, v = (
            (y @ w.T + b).reshape(*y.shape[:2], self.heads, -1).swapaxes(1, 2)
            for y, w, b in zip((query, x, x), weights, biases)
        )
        scale = 1 / math.sqrt(q.shape[-1])
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.cross_attn["out_proj"](out.flatten(1))


class DurationHead(Component):
    """Contexts (B, T, D) of video and audio to seconds (B,)."""

    config_class = DurationConfig

    def __init__(self, c: DurationConfig):
        super().__init__()
        for stream, dim in (("video", c.video_dim), ("audio", c.audio_dim)):
            self[f"{stream}_input_proj"] = nn.Linear(dim, c.dim)
            self[f"{stream}_modality_emb"] = mx.zeros(c.dim)
        self.attention_pooler = AttentionPooler(c.dim, c.num_pooler_heads)
        self.mlp_hidden = nn.Linear(c.dim, c.hidden)
        self.mlp_out = nn.Linear(c.hidden, 1)

    def __call__(self, video: mx.array, audio: mx.array) -> mx.array:
        tokens = [
            self[f"{stream}_input_proj"](x) + self[f"{stream}_modality_emb"]
            for stream, x in (("video", video), ("audio", audio))
        ]
        x = self.attention_pooler(mx.concatenate(tokens, axis=1))
        x = self.mlp_out(nn.gelu_approx(self.mlp_hidden(x)))
        return mx.exp(x.astype(mx.float32)).squeeze(-1)

    @classmethod
    def infer_sizes(cls, section: Section, shapes: Shapes) -> Section:
        """The section with the sizes of the tensors."""
        names = ("video_input_proj", "audio_input_proj", "mlp_hidden")
        video, audio, hidden = (shapes.get(f"{name}.weight", (0, 0)) for name in names)
        sizes = {"video_dim": video[1], "audio_dim": audio[1], "dim": video[0]}
        return section | sizes | {"hidden": hidden[0]}


def whole_frames(seconds: float, fps: float, low: float, high: float) -> int:
    """The number of frames, 8k + 1, of `seconds` clipped to [low, high]."""
    low, high = round(low * fps), round(high * fps)
    frames = (min(max(round(seconds * fps), low), high) - 1) // 8 * 8 + 1
    return frames + 8 if frames < low else frames
