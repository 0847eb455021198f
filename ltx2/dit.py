"""The joint audio-video transformer of LTX-2: 2.0, 2.3 and 2.5 by its configuration."""

import sys
from dataclasses import dataclass, field
from typing import Callable, Container, Iterator, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import layers
from .base import Config, Trace, traced
from .layers import AdaLayerNormSingle, Attention, Component, FeedForward, Rope
from .linear import Group, quantize_stored

NO_BLOCKS: Container[int] = range(0)
ALL_BLOCKS: Container[int] = range(sys.maxsize)
Both = tuple[Optional[mx.array], Optional[mx.array]]  # video, audio
BothTexts = tuple[Optional[dict], Optional[dict]]  # arguments of `Attention`
Skips = tuple[bool, bool, bool, bool]  # video and audio self-attention, a2v, v2a
FEW_LEVELS = 4  # of timesteps in a run; usual are one, two or three
NO_SKIPS: Skips = (False, False, False, False)
PREFIXES = ("", "audio_")  # of the layers of the video and the audio stream


@dataclass
class DiTConfig(Config):
    """The `transformer` section of a checkpoint's configuration."""

    num_layers: int
    in_channels: int
    out_channels: int
    num_attention_heads: int
    attention_head_dim: int
    cross_attention_dim: int
    caption_channels: int
    audio_num_attention_heads: int
    audio_attention_head_dim: int
    audio_cross_attention_dim: int
    audio_out_channels: int
    av_ca_timestep_scale_multiplier: float
    audio_in_channels: Optional[int] = None  # None: as audio_out_channels
    timestep_scale_multiplier: float = 1000
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10000.0
    positional_embedding_max_pos: list = field(default_factory=lambda: [20, 2048, 2048])
    audio_positional_embedding_max_pos: list = field(default_factory=lambda: [20])
    # From 2.3 on
    apply_gated_attention: bool = False
    cross_attention_adaln: bool = False
    caption_proj_before_connector: bool = False
    # From 2.5 on
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_prompt_adaln_single: bool = True
    use_keyframes_abs_pos_embedding: bool = False

    FIXED = {
        "_class_name": ("AVTransformer3DModel",),
        "activation_fn": ("gelu-approximate",),
        "attention_type": ("default",),
        "frequencies_precision": ("float64",),
        "positional_embedding_type": ("rope",),
        "qk_norm": ("rms_norm",),
        "rope_type": ("split",),
        "standardization_norm": ("rms_norm",),
    }
    FIXED |= dict.fromkeys(
        "attention_bias av_cross_ada_norm causal_temporal_positioning "
        "cross_attention_norm use_audio_video_cross_attention "
        "use_middle_indices_grid".split(),
        (True,),
    )
    FIXED |= dict.fromkeys(
        "caption_proj_input_norm caption_projection_first_linear "
        "caption_projection_second_linear double_self_attention "
        "norm_elementwise_affine only_cross_attention share_ff".split(),
        (False,),
    )
    UNUSED = frozenset(
        "_diffusers_version dropout norm_num_groups num_embeds_ada_norm "
        "num_vector_embeds upcast_attention use_linear_projection "
        # read by text.py
        "use_embeddings_connector connector_attention_head_dim "
        "connector_num_attention_heads connector_num_layers connector_norm_output "
        "connector_positional_embedding_max_pos connector_num_learnable_registers "
        "connector_learnable_registers_std connector_apply_gated_attention "
        "audio_connector_attention_head_dim audio_connector_num_attention_heads "
        "audio_connector_num_layers connector_ff_bias text_encoder_norm_type".split()
    )

    def __post_init__(self):
        self.audio_in_channels = self.audio_in_channels or self.audio_out_channels
        self.video_dim = self.num_attention_heads * self.attention_head_dim
        self.audio_dim = self.audio_num_attention_heads * self.audio_attention_head_dim


# Inputs: the tokens of both streams, and the guidance passes over them


@dataclass
class Tokens:
    """One stream's input, shared by all passes of a step. Timesteps are by level, as a
    conditioned run has two or three; `sigma` is the stream's, 0 when it is frozen. The
    clips of a training's batch have one of both each."""

    latent: mx.array  # (B, T, C)
    timesteps: mx.array  # (U,) float32 in [0, 1]
    sigma: mx.array  # (1,) or (B,)
    rope: Rope  # from DiT.rope
    cross_rope: Rope
    level_index: Optional[mx.array] = None  # (T,); None: a clip's tokens have one level
    mask: Optional[mx.array] = None  # self-attention weights (T, T) in [0, 1]
    keyframes: Optional[mx.array] = None  # (T,), > 0: stands for a single frame (2.5)
    steering: layers.Steering = layers.Steering()  # to text 0, away from text 1
    enabled: bool = True  # False: attended to, but not updated


@dataclass(frozen=True)
class Pass:
    """One guidance pass: each stream's text, by index, and blocks that skip attention."""

    video_text: int = 0
    audio_text: int = 0
    skip_video_self_attn: Container[int] = NO_BLOCKS
    skip_audio_self_attn: Container[int] = NO_BLOCKS
    skip_a2v: Container[int] = NO_BLOCKS
    skip_v2a: Container[int] = NO_BLOCKS

    def skips(self, block: int) -> Skips:
        blocks = self.skip_video_self_attn, self.skip_audio_self_attn
        return tuple(block in b for b in (*blocks, self.skip_a2v, self.skip_v2a))


def common_start(passes: list[Pass], n: int, blocks: int) -> tuple[int, int]:
    """An earlier pass that equals pass n up to a block, and that block."""
    p = passes[n]
    for m, q in enumerate(passes[:n]):
        if (p.video_text, p.audio_text) == (q.video_text, q.audio_text):
            differ = (i for i in range(blocks) if p.skips(i) != q.skips(i))
            return m, next(differ, blocks)
    return n, 0


# Blocks. The hidden states are sums over all blocks, too large for float16: in a
# float16 run they alone are float32.


def by_token(values: mx.array, levels: Optional[mx.array]) -> mx.array:
    """Values (U, D): of one level (1, D), by clip (B, 1, D) or by token (T, D). Few levels
    are selected, not gathered: a compiled function then makes no array of them."""
    if levels is None and len(values) > 1:
        return values[:, None]
    if len(values) > FEW_LEVELS:
        return values[levels]
    found = values[:1]
    for level in range(1, len(values)):
        found = mx.where(levels[:, None] == level, values[level], found)
    return found


@mx.compile
def modulate(x: mx.array, scale: mx.array, shift: mx.array, levels=None) -> mx.array:
    scale, shift = by_token(scale, levels), by_token(shift, levels)
    return (layers.rms_norm(x) * (1 + scale) + shift).astype(shift.dtype)


@mx.compile
def gated_add(x: mx.array, y: mx.array, gate: mx.array, levels=None) -> mx.array:
    return x + y.astype(x.dtype) * by_token(gate, levels)


@mx.compile
def logits(weights: mx.array, lowest: mx.array) -> mx.array:
    """An additive mask from weights in [0, 1]; 0 is the dtype's lowest value."""
    found = mx.where(weights > 0, mx.log(mx.maximum(weights, 1e-38)), lowest)
    return found.astype(lowest.dtype)


@dataclass
class StreamContext:
    """What blocks read besides a stream's state: AdaLN by level, RoPE tables, mask."""

    ada: mx.array  # (U, 6 or 9, D)
    embedded: mx.array  # (U, D), for the output layer
    prompt_ada: mx.array  # (1, 2, D), modulates the text
    mask: Optional[mx.array]  # additive (1, 1, T, T)
    tokens: Tokens  # for RoPE tables, levels, `enabled`
    cross_ada: Optional[mx.array] = None  # (U, 4, D)
    cross_gate: Optional[mx.array] = None  # (1, 1, D)

    def modulation(self, table: mx.array, ada: mx.array, rows: slice) -> list[mx.array]:
        """Rows of table + AdaLN output by level, each (U, D); the tokens' levels."""
        values = table[rows].astype(ada.dtype) + ada[:, rows]
        return [*values.swapaxes(0, 1), self.tokens.level_index]


Streams = tuple[Optional[StreamContext], Optional[StreamContext]]


class Block(nn.Module):
    """Self-attention and text attention of each stream, attention between the streams,
    and feed-forwards. The audio stream's layers have the video stream's names with
    `audio_` in front, so one method serves both."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        gated, eps = c.apply_gated_attention, c.norm_eps
        rows = 9 if c.cross_attention_adaln else 6
        video, audio = c.video_dim, c.audio_dim
        video_heads = c.num_attention_heads, c.attention_head_dim
        audio_heads = c.audio_num_attention_heads, c.audio_attention_head_dim
        text, audio_text = c.cross_attention_dim, c.audio_cross_attention_dim
        for prefix, dim, heads, context_dim, bias in (
            ("", video, video_heads, text, c.ff_bias),
            ("audio_", audio, audio_heads, audio_text, c.audio_ff_bias),
        ):
            self[prefix + "attn1"] = Attention(dim, *heads, None, gated, eps)
            self[prefix + "attn2"] = Attention(dim, *heads, context_dim, gated, eps)
            self[prefix + "ff"] = FeedForward(dim, bias)
            self[prefix + "scale_shift_table"] = mx.zeros((rows, dim))
            if c.cross_attention_adaln:
                self[prefix + "prompt_scale_shift_table"] = mx.zeros((2, dim))
        self.audio_to_video_attn = Attention(video, *audio_heads, audio, gated, eps)
        self.video_to_audio_attn = Attention(audio, *audio_heads, video, gated, eps)
        self.scale_shift_table_a2v_ca_video = mx.zeros((5, video))
        self.scale_shift_table_a2v_ca_audio = mx.zeros((5, audio))

    def shard(self, group: Group) -> None:
        """Keep this rank's heads and part of each feed-forward."""
        for layer in self.children().values():
            if isinstance(layer, (Attention, FeedForward)):
                layer.shard(group)

    def text_keys_values(self, streams: Streams, text: Both) -> BothTexts:
        """Each stream's keys and values of its text (B, N, D), from 2.3 on modulated by
        table and sigma; None for a stream that is absent or not updated."""

        def keys_values(prefix: str, s: Optional[StreamContext], x: mx.array):
            if s is None or not s.tokens.enabled:
                return None
            table = self.get(prefix + "prompt_scale_shift_table")
            if table is not None:
                shift, scale = mx.split(table.astype(x.dtype) + s.prompt_ada, 2, axis=1)
                x = x * (1 + scale) + shift
            return {"keys_values": self[prefix + "attn2"].keys_values(x)}

        return tuple(map(keys_values, PREFIXES, streams, text))

    def attend(
        self, prefix: str, s: StreamContext, x: mx.array, text, values_only: bool
    ) -> mx.array:
        """Self-attention, then attention to the text."""
        table = self[prefix + "scale_shift_table"]
        shift, scale, gate, levels = s.modulation(table, s.ada, slice(0, 3))
        y = modulate(x, scale, shift, levels)
        y = self[prefix + "attn1"](y, None, s.tokens.rope, s.mask, values_only)
        x = gated_add(x, y, gate, levels)
        if len(table) == 6:  # 2.0: neither modulated nor gated
            y = layers.rms_norm(x).astype(gate.dtype)
            return x + self[prefix + "attn2"](y, **text)
        shift, scale, gate, levels = s.modulation(table, s.ada, slice(6, 9))
        y = self[prefix + "attn2"](modulate(x, scale, shift, levels), **text)
        return gated_add(x, y, gate, levels)

    def feed_forward(self, prefix: str, s: StreamContext, x: mx.array) -> mx.array:
        table = self[prefix + "scale_shift_table"]
        shift, scale, gate, levels = s.modulation(table, s.ada, slice(3, 6))
        y = self[prefix + "ff"](modulate(x, scale, shift, levels))
        return gated_add(x, y, gate, levels)

    def cross_attend(
        self, vx, ax, video: StreamContext, audio: StreamContext, a2v: bool, v2a: bool
    ) -> tuple[mx.array, mx.array]:
        """Attention between the streams, both ways from the states before either."""

        def attend(attention, query, source, rows):
            (q_x, q, q_table), (s_x, s, s_table) = query, source
            x = modulate(q_x, *q.modulation(q_table, q.cross_ada, rows))
            context = modulate(s_x, *s.modulation(s_table, s.cross_ada, rows))
            kv = attention.keys_values(context, s.tokens.cross_rope)
            gate = q_table[4].astype(q_x.dtype) + q.cross_gate[:, 0]
            return gated_add(q_x, attention(x, kv, q.tokens.cross_rope), gate)

        v = (vx, video, self.scale_shift_table_a2v_ca_video)
        a = (ax, audio, self.scale_shift_table_a2v_ca_audio)
        if a2v:
            vx = attend(self.audio_to_video_attn, v, a, slice(0, 2))
        if v2a:
            ax = attend(self.video_to_audio_attn, a, v, slice(2, 4))
        return vx, ax

    def __call__(
        self, states: Both, streams: Streams, text: BothTexts, skips: Skips = NO_SKIPS
    ) -> Both:
        """The states (B, T, D) of both streams after this block; either stream may be
        None. `text` is what `text_keys_values` returned."""
        x = list(states)
        updated = [i for i, s in enumerate(streams) if s and s.tokens.enabled]
        for i in updated:
            x[i] = self.attend(PREFIXES[i], streams[i], x[i], text[i], skips[i])
        if None not in streams:
            a2v, v2a = (i in updated and not skips[2 + i] for i in (0, 1))
            x = list(self.cross_attend(*x, *streams, a2v, v2a))
        for i in updated:
            x[i] = self.feed_forward(PREFIXES[i], streams[i], x[i])
        return tuple(x)


class CaptionProjection(layers.TimestepMLP):
    """2.0's projection of the text into a stream's width: Linear, GELU, Linear."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.gelu_approx(self.linear_1(x)))


class DiT(Component):
    """Tokens of two streams and their texts to velocities."""

    config_class = DiTConfig

    group: Optional[Group] = None  # the ranks that share the blocks

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = c = config
        rows = 9 if c.cross_attention_adaln else 6
        for prefix, dim, channels_in, channels_out in (
            ("", c.video_dim, c.in_channels, c.out_channels),
            ("audio_", c.audio_dim, c.audio_in_channels, c.audio_out_channels),
        ):
            self[prefix + "patchify_proj"] = nn.Linear(channels_in, dim)
            self[prefix + "adaln_single"] = AdaLayerNormSingle(dim, rows)
            if c.cross_attention_adaln and c.use_prompt_adaln_single:
                self[prefix + "prompt_adaln_single"] = AdaLayerNormSingle(dim, 2)
            if not c.caption_proj_before_connector:
                projection = CaptionProjection(c.caption_channels, dim)
                self[prefix + "caption_projection"] = projection
            self[prefix + "scale_shift_table"] = mx.zeros((2, dim))
            self[prefix + "proj_out"] = nn.Linear(dim, channels_out)
        self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(c.video_dim, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(c.audio_dim, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(c.video_dim, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(c.audio_dim, 1)
        if c.use_keyframes_abs_pos_embedding:
            self.keyframes_abs_pos_embedding = mx.zeros((1, c.video_dim))
        self.transformer_blocks = [Block(c) for _ in range(c.num_layers)]

    def shard(self, group: Group) -> None:
        """Keep this rank's part of each block, 1/N of it."""
        self.group = group
        for block in self.transformer_blocks:
            block.shard(group)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the activations: that of the tables, which are never quantized."""
        return self.scale_shift_table.dtype

    def rope(self, stream: str, bounds: np.ndarray) -> tuple[Rope, Rope]:
        """Tables for self-attention and for attention between the streams, from [start,
        end) of each token (axes, T, 2): seconds and, of video, rows and columns."""
        c, theta = self.config, self.config.positional_embedding_theta
        times = c.positional_embedding_max_pos, c.audio_positional_embedding_max_pos
        dim, heads, max_pos = {
            "video": (c.video_dim, c.num_attention_heads, times[0]),
            "audio": (c.audio_dim, c.audio_num_attention_heads, times[1]),
        }[stream]
        middle = bounds.astype(np.float32).sum(-1) / np.float32(2)
        self_rope = layers.rope_cos_sin(middle, dim, heads, max_pos, theta)
        # Between the streams only time counts, in heads of the audio stream's width.
        longest = max(times[0][:1], times[1])
        width, heads = c.audio_cross_attention_dim, c.audio_num_attention_heads
        cross_rope = layers.rope_cos_sin(middle[:1], width, heads, longest, theta)

        def local(table: mx.array) -> mx.array:
            """This rank's heads, in the dtype of the activations."""
            if self.group is not None:
                table = mx.split(table, self.group.size())[self.group.rank()]
            return table.astype(self.dtype)

        return tuple(map(local, self_rope)), tuple(map(local, cross_rope))

    def project_text(self, contexts: Sequence[Both]) -> list[Both]:
        """Contexts (video, audio), each (B, N, D) or None, in the activations' dtype and,
        in 2.0, projected to the stream's width: once for a set of LoRAs."""

        def project(prefix: str, context: Optional[mx.array]) -> Optional[mx.array]:
            if context is None:
                return None
            projection = self.get(prefix + "caption_projection", nn.Identity())
            return projection(context.astype(self.dtype))

        return [tuple(map(project, PREFIXES, pair)) for pair in contexts]

    def embed(self, video: Tokens | None, audio: Tokens | None) -> tuple[Both, Streams]:
        """The first states (B, T, D) of both streams, and what the blocks read of them."""
        return tuple(zip(*map(self._embed, PREFIXES, (video, audio), (audio, video))))

    def _embed(self, prefix: str, tokens: Optional[Tokens], other: Optional[Tokens]):
        if tokens is None:
            return None, None
        c, scale = self.config, self.config.timestep_scale_multiplier
        x = self[prefix + "patchify_proj"](tokens.latent.astype(self.dtype))
        x = x.astype(mx.float32) if self.dtype == mx.float16 else x
        if not prefix and c.use_keyframes_abs_pos_embedding:
            marked = (tokens.keyframes > 0).astype(x.dtype)[:, None]
            x = x + marked * self.keyframes_abs_pos_embedding
        ada, embedded = self[prefix + "adaln_single"](tokens.timesteps * scale)
        lowest = mx.array(mx.finfo(self.dtype).min, self.dtype)
        mask = None if tokens.mask is None else logits(tokens.mask, lowest)[None, None]
        prompt_ada = mx.zeros((1, 2, 1), self.dtype)
        if c.cross_attention_adaln and c.use_prompt_adaln_single:
            prompt_ada, _ = self[prefix + "prompt_adaln_single"](tokens.sigma * scale)
        s = StreamContext(ada, embedded, prompt_ada, mask, tokens)
        if other is not None:
            name, gate = ("audio", "v2a") if prefix else ("video", "a2v")
            cross = self[f"av_ca_{name}_scale_shift_adaln_single"]
            s.cross_ada, _ = cross(tokens.timesteps * scale)
            # The gate is conditioned on the other stream's sigma.
            sigma = other.sigma * c.av_ca_timestep_scale_multiplier
            s.cross_gate, _ = self[f"av_ca_{gate}_gate_adaln_single"](sigma)
        return x, s

    def _velocity(self, prefix: str, s: Optional[StreamContext], x: mx.array):
        if s is None:
            return None
        x = mx.fast.layer_norm(x, None, None, self.config.norm_eps)
        table = self[prefix + "scale_shift_table"]
        *rows, levels = s.modulation(table, s.embedded[:, None], slice(0, 2))
        shift, scale = (by_token(row, levels) for row in rows)
        x = (x * (1 + scale) + shift).astype(self.dtype)
        return self[prefix + "proj_out"](x)

    def velocities(self, states: Both, streams: Streams) -> Both:
        """Velocities (B, T, C) of the last block's states; None for an absent stream."""
        return tuple(map(self._velocity, PREFIXES, streams, states))

    def __call__(
        self,
        video: Optional[Tokens],
        audio: Optional[Tokens],
        texts: Sequence[Both],
        passes: list[Pass],
        trace: Trace = None,
    ) -> list[Both]:
        """Velocities (video (B, T, C), audio (B, T, C)) of each pass.
        Either stream may be None; `texts` is what `project_text` returned. All passes go
        through a block together, so its text keys and values are computed once a text,
        and a pass that differs from an earlier one only by its skips starts from that
        one's state at the first block where they differ.
        """
        states, streams = self.embed(video, audio)
        blocks = self.config.num_layers
        starts = [common_start(passes, n, blocks) for n in range(len(passes))]
        states = [states] * len(passes)
        for i, block in enumerate(self.transformer_blocks):
            read = [block.text_keys_values(streams, text) for text in texts]
            both = zip(streams, *read[:2])
            read[0] = tuple(t[0] and s.tokens.steering(*t) for s, *t in both)
            for n, p in enumerate(passes):
                earlier, first = starts[n]
                if i < first:
                    states[n] = states[earlier]
                    continue
                text = read[p.video_text][0], read[p.audio_text][1]
                states[n] = block(states[n], streams, text, p.skips(i))
                # Computes while the next pass is prepared. Training, which cannot
                # evaluate inside a transformation, runs the blocks by itself.
                mx.async_eval(states[n])
            for name, x in zip(("video", "audio"), states[0]):
                if x is not None:
                    traced(trace, f"block{i}.{name}", x)
        return [self.velocities(s, streams) for s in states]


class StreamedBlocks:
    """Blocks that stay on disk. Each iteration takes them from a new iterator that `read`
    returns, with weights that are not loaded yet, and holds two at a time."""

    def __init__(self, read: Callable[[], Iterator[Block]]):
        self.read = read

    def __iter__(self) -> Iterator[Block]:
        return layers.prefetch(self.read())


def build_blocks(
    config: DiTConfig, weights: dict[str, mx.array], quantization: Optional[dict] = None
) -> Iterator[Block]:
    """The transformer's blocks, built one by one; their tensors leave `weights`."""
    for i in range(config.num_layers):
        prefix = f"transformer_blocks.{i}."
        keys = [key for key in weights if key.startswith(prefix)]
        tensors = {key.removeprefix(prefix): weights.pop(key) for key in keys}
        with layers.no_random_weights():
            block = Block(config)
        if quantization:
            quantize_stored(block, quantization, tensors, prefix)
        yield block.load_weights(list(tensors.items()))
