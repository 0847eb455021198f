"""The joint audio-video transformer of LTX-2: 2.0, 2.3 and 2.5 by its configuration."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Callable, Container, Iterator, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .base import Config, Trace, traced
from .layers import (
    AdaLayerNormSingle,
    Attention,
    Component,
    FeedForward,
    Rope,
    TimestepMLP,
    prefetch,
    rms_norm,
    rope_cos_sin,
)

NO_BLOCKS: Container[int] = range(0)
ALL_BLOCKS: Container[int] = range(sys.maxsize)


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
        "attention_bias": (True,),
        "attention_type": ("default",),
        "causal_temporal_positioning": (True,),
        "cross_attention_norm": (True,),
        "double_self_attention": (False,),
        "frequencies_precision": ("float64",),
        "norm_elementwise_affine": (False,),
        "only_cross_attention": (False,),
        "positional_embedding_type": ("rope",),
        "qk_norm": ("rms_norm",),
        "rope_type": ("split",),
        "share_ff": (False,),
        "standardization_norm": ("rms_norm",),
        "use_audio_video_cross_attention": (True,),
        "av_cross_ada_norm": (True,),
        "use_middle_indices_grid": (True,),
        "caption_projection_first_linear": (False,),
        "caption_projection_second_linear": (False,),
        "caption_proj_input_norm": (False,),
    }
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

    @property
    def video_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_dim(self) -> int:
        return self.audio_num_attention_heads * self.audio_attention_head_dim


# What goes in: tokens of two streams, and the passes that guidance makes over them.


@dataclass
class Tokens:
    """One stream as the transformer reads it; all passes of a step share it.

    A conditioned run knows two or three denoise-mask levels, so timesteps are given by
    level (U,), float32 in [0, 1], and `level_index` (T,) tells each token's level (None:
    all tokens have the only one). `sigma` is the stream's scalar noise level, 0 when
    the stream is frozen.
    """

    latent: mx.array  # (B, T, C)
    timesteps: mx.array  # (U,)
    sigma: mx.array  # (1,)
    rope: Rope  # from DiT.video_rope, DiT.audio_rope
    cross_rope: Rope
    level_index: Optional[mx.array] = None  # (T,)
    mask: Optional[mx.array] = None  # self-attention (T, T) in [0, 1]
    keyframes: Optional[mx.array] = None  # (T,) > 0: stands for a single frame (2.5)
    enabled: bool = True  # False: only read by the other stream


@dataclass(frozen=True)
class Pass:
    """One guidance pass: the contexts (B, N, D) it reads and, by block, what it perturbs."""

    video_context: Optional[mx.array]
    audio_context: Optional[mx.array]
    skip_video_self_attn: Container[int] = NO_BLOCKS
    skip_audio_self_attn: Container[int] = NO_BLOCKS
    skip_a2v: Container[int] = NO_BLOCKS
    skip_v2a: Container[int] = NO_BLOCKS

    def perturbs(self, block: int) -> bool:
        own = (self.skip_video_self_attn, self.skip_audio_self_attn)
        return any(block in cut for cut in (*own, self.skip_a2v, self.skip_v2a))


# What the blocks see. States are sums over all blocks, too large for float16: they are
# float32 in a float16 run, all else is not.


@mx.compile
def modulate(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    return (rms_norm(x) * (1 + scale) + shift).astype(shift.dtype)


@mx.compile
def gated_add(x: mx.array, y: mx.array, gate: mx.array) -> mx.array:
    return x + y.astype(x.dtype) * gate


@dataclass
class StreamContext:
    """A stream inside the blocks: its modulations by timestep level, tables and mask."""

    modulation: mx.array  # (U, 6 or 9, D)
    embedded: mx.array  # (U, D), for the output layer
    rope: Rope
    cross_rope: Rope
    level_index: Optional[mx.array]
    mask: Optional[mx.array]  # additive (1, 1, T, T)
    enabled: bool
    prompt: Optional[mx.array] = None  # (1, 2, D), text AdaLN
    cross: Optional[mx.array] = None  # (U, 4, D)
    gate: Optional[mx.array] = None  # (1, 1, D)

    def rows(self, table: mx.array, ada: mx.array, rows: slice) -> list[mx.array]:
        """Rows of table + AdaLN, each (1 or T, D): computed by level, picked by token."""
        values = table[rows].astype(ada.dtype) + ada[:, rows]
        if self.level_index is not None and len(values) > 1:
            values = values[self.level_index]
        return [values[:, i] for i in range(values.shape[1])]


class Block(nn.Module):
    """Self-attention and text cross-attention of each stream, the attention between
    them, and the feed-forwards. The audio stream's layers have the video stream's names
    with `audio_` in front, so one method serves both."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        gated, eps = c.apply_gated_attention, c.norm_eps
        rows = 9 if c.cross_attention_adaln else 6
        video, audio = c.video_dim, c.audio_dim
        for prefix, dim, heads, head_dim, context_dim, bias in (
            ("", video, c.num_attention_heads, c.attention_head_dim)
            + (c.cross_attention_dim, c.ff_bias),
            ("audio_", audio, c.audio_num_attention_heads, c.audio_attention_head_dim)
            + (c.audio_cross_attention_dim, c.audio_ff_bias),
        ):
            self[prefix + "attn1"] = Attention(dim, heads, head_dim, None, gated, eps)
            self[prefix + "attn2"] = Attention(
                dim, heads, head_dim, context_dim, gated, eps
            )
            self[prefix + "ff"] = FeedForward(dim, bias)
            self[prefix + "scale_shift_table"] = mx.zeros((rows, dim))
            if c.cross_attention_adaln:
                self[prefix + "prompt_scale_shift_table"] = mx.zeros((2, dim))
        cross = (c.audio_num_attention_heads, c.audio_attention_head_dim)
        self.audio_to_video_attn = Attention(video, *cross, audio, gated, eps)
        self.video_to_audio_attn = Attention(audio, *cross, video, gated, eps)
        self.scale_shift_table_a2v_ca_video = mx.zeros((5, video))
        self.scale_shift_table_a2v_ca_audio = mx.zeros((5, audio))

    def text_keys_values(self, prefix: str, s: StreamContext, context: mx.array):
        """Keys and values of the text; from 2.3 on modulated by table and sigma."""
        table = self.get(prefix + "prompt_scale_shift_table")
        if table is not None:
            table = table.astype(context.dtype)[None]
            shift, scale = mx.split(
                table if s.prompt is None else table + s.prompt, 2, 1
            )
            context = context * (1 + scale) + shift
        return self[prefix + "attn2"].keys_values(context)

    def attend(
        self, prefix: str, s: StreamContext, x: mx.array, text, values_only: bool
    ):
        """Self-attention, then attention to the text's keys and values."""
        table = self[prefix + "scale_shift_table"]
        shift, scale, gate = s.rows(table, s.modulation, slice(0, 3))
        y = self[prefix + "attn1"](
            modulate(x, scale, shift), None, s.rope, s.mask, values_only
        )
        x = gated_add(x, y, gate)
        if len(table) == 6:  # 2.0: neither modulated nor gated
            return x + self[prefix + "attn2"](rms_norm(x).astype(gate.dtype), text)
        shift, scale, gate = s.rows(table, s.modulation, slice(6, 9))
        y = self[prefix + "attn2"](modulate(x, scale, shift), text)
        return gated_add(x, y, gate)

    def feed_forward(self, prefix: str, s: StreamContext, x: mx.array) -> mx.array:
        table = self[prefix + "scale_shift_table"]
        shift, scale, gate = s.rows(table, s.modulation, slice(3, 6))
        return gated_add(x, self[prefix + "ff"](modulate(x, scale, shift)), gate)

    def cross_attend(
        self, video: StreamContext, audio: StreamContext, vx, ax, a2v: bool, v2a: bool
    ):
        """Attention between the streams, both ways from the states before either ran."""
        video_table = self.scale_shift_table_a2v_ca_video
        audio_table = self.scale_shift_table_a2v_ca_audio

        def between(attention, query, source, rows):
            (q, q_x, q_table), (s, s_x, s_table) = query, source
            x = modulate(q_x, *q.rows(q_table, q.cross, rows))
            context = modulate(s_x, *s.rows(s_table, s.cross, rows))
            kv = attention.keys_values(context, s.cross_rope)
            gate = q_table[4].astype(q_x.dtype) + q.gate[:, 0]
            return gated_add(q_x, attention(x, kv, q.cross_rope), gate)

        v, a = (video, vx, video_table), (audio, ax, audio_table)
        if a2v:
            vx = between(self.audio_to_video_attn, v, a, slice(0, 2))
        if v2a:
            ax = between(self.video_to_audio_attn, a, v, slice(2, 4))
        return vx, ax

    def __call__(self, index, video, audio, vx, ax, run: Pass, text: dict):
        """One block of one pass; a stream may be None. `text` keeps the keys and values
        of the contexts, for the other passes."""
        run_video = video is not None and video.enabled
        run_audio = audio is not None and audio.enabled

        def text_of(prefix, stream, context):
            key = (prefix, id(context))
            if key not in text:
                text[key] = self.text_keys_values(prefix, stream, context)
            return text[key]

        if run_video:
            kv = text_of("", video, run.video_context)
            vx = self.attend("", video, vx, kv, index in run.skip_video_self_attn)
        if run_audio:
            kv = text_of("audio_", audio, run.audio_context)
            ax = self.attend("audio_", audio, ax, kv, index in run.skip_audio_self_attn)
        if video is not None and audio is not None:
            a2v = run_video and index not in run.skip_a2v
            v2a = run_audio and index not in run.skip_v2a
            vx, ax = self.cross_attend(video, audio, vx, ax, a2v, v2a)
        if run_video:
            vx = self.feed_forward("", video, vx)
        if run_audio:
            ax = self.feed_forward("audio_", audio, ax)
        return vx, ax


class DiT(Component):
    """Tokens of two streams and their text in, velocities out."""

    config_class = DiTConfig

    group: Optional[mx.distributed.Group] = None  # that the blocks are split over

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
                self[prefix + "caption_projection"] = CaptionProjection(
                    c.caption_channels, dim
                )
            self[prefix + "scale_shift_table"] = mx.zeros((2, dim))
            self[prefix + "proj_out"] = nn.Linear(dim, channels_out)
        self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(c.video_dim, 4)
        self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(c.audio_dim, 4)
        self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(c.video_dim, 1)
        self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(c.audio_dim, 1)
        if c.use_keyframes_abs_pos_embedding:
            self.keyframes_abs_pos_embedding = mx.zeros((1, c.video_dim))
        self.transformer_blocks = [Block(c) for _ in range(c.num_layers)]

    def shard(self, group: mx.distributed.Group) -> None:
        """Keep this rank's heads and part of the feed-forwards of each block, of N ranks
        a 1/N of the weights; the rest of the model is small and on every rank."""
        self.group = group
        for block in self.transformer_blocks:
            for layer in block.children().values():
                if isinstance(layer, (Attention, FeedForward)):
                    layer.shard(group)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the activations: that of the tables, which are never quantised."""
        return self.scale_shift_table.dtype

    def video_rope(self, bounds: np.ndarray) -> tuple[Rope, Rope]:
        """Self- and cross-modal tables of token bounds (3, T, 2): seconds, pixels."""
        c = self.config
        heads, max_pos = c.num_attention_heads, c.positional_embedding_max_pos
        return self._ropes(bounds, c.video_dim, heads, max_pos)

    def audio_rope(self, bounds: np.ndarray) -> tuple[Rope, Rope]:
        """Self- and cross-modal tables of token bounds (1, T, 2) in seconds."""
        c = self.config
        heads, max_pos = (
            c.audio_num_attention_heads,
            c.audio_positional_embedding_max_pos,
        )
        return self._ropes(bounds, c.audio_dim, heads, max_pos)

    def _ropes(self, bounds, dim, heads, max_pos) -> tuple[Rope, Rope]:
        c = self.config
        middle = bounds.astype(np.float32).sum(-1) / np.float32(2)
        own = rope_cos_sin(middle, dim, heads, max_pos, c.positional_embedding_theta)
        cross = rope_cos_sin(
            middle[:1],
            c.audio_cross_attention_dim,
            c.audio_num_attention_heads,
            [
                max(
                    c.positional_embedding_max_pos[0],
                    c.audio_positional_embedding_max_pos[0],
                )
            ],
            c.positional_embedding_theta,
        )

        def mine(table: mx.array) -> mx.array:
            """This rank's heads, in the dtype of the activations."""
            if self.group is not None:
                table = mx.split(table, self.group.size())[self.group.rank()]
            return table.astype(self.dtype)

        return tuple(map(mine, own)), tuple(map(mine, cross))

    def _embed(self, prefix: str, tokens: Tokens, other: Optional[Tokens]):
        """The embedded tokens (B, T, D) and the stream that the blocks see."""
        c, scale = self.config, self.config.timestep_scale_multiplier
        x = self[prefix + "patchify_proj"](tokens.latent.astype(self.dtype))
        x = x.astype(mx.float32) if self.dtype == mx.float16 else x
        if not prefix and c.use_keyframes_abs_pos_embedding:
            marked = (tokens.keyframes > 0).astype(x.dtype)[:, None]
            x = x + marked * self.keyframes_abs_pos_embedding
        modulation, embedded = self[prefix + "adaln_single"](tokens.timesteps * scale)
        mask = None
        if tokens.mask is not None:  # weights in [0, 1] become additive logits
            low = mx.finfo(self.dtype).min
            mask = mx.where(
                tokens.mask > 0, mx.log(mx.maximum(tokens.mask, 1e-38)), low
            )
            mask = mask.astype(self.dtype)[None, None]
        stream = StreamContext(
            modulation,
            embedded,
            tokens.rope,
            tokens.cross_rope,
            tokens.level_index,
            mask,
            tokens.enabled,
        )
        if c.cross_attention_adaln and c.use_prompt_adaln_single:
            stream.prompt, _ = self[prefix + "prompt_adaln_single"](
                tokens.sigma * scale
            )
        if other is not None:
            name, gate = ("audio", "v2a") if prefix else ("video", "a2v")
            cross = self[f"av_ca_{name}_scale_shift_adaln_single"]
            stream.cross, _ = cross(tokens.timesteps * scale)
            # The gate hears how noisy the other stream is.
            gate_scale = c.av_ca_timestep_scale_multiplier
            stream.gate, _ = self[f"av_ca_{gate}_gate_adaln_single"](
                other.sigma * gate_scale
            )
        return x, stream

    def _project(self, prefix: str, s: StreamContext, x: mx.array) -> mx.array:
        x = mx.fast.layer_norm(x, None, None, self.config.norm_eps)
        both = mx.stack([s.embedded, s.embedded], axis=1)
        shift, scale = s.rows(self[prefix + "scale_shift_table"], both, slice(0, 2))
        x = (x * (1 + scale) + shift).astype(self.dtype)
        return self[prefix + "proj_out"](x)

    def _project_text(self, passes: list[Pass]) -> list[Pass]:
        """The passes with contexts in the activations' dtype and, in 2.0, projected."""
        done: dict[tuple[str, int], mx.array] = {}

        def project(prefix: str, context: Optional[mx.array]):
            key = (prefix, id(context))
            if context is not None and key not in done:
                x = context.astype(self.dtype)
                projection = self.get(prefix + "caption_projection")
                done[key] = x if projection is None else projection(x)
            return done.get(key)

        return [
            replace(
                p,
                video_context=project("", p.video_context),
                audio_context=project("audio_", p.audio_context),
            )
            for p in passes
        ]

    def _shared(self, passes: list[Pass], n: int) -> tuple[int, int]:
        """An earlier pass that is equal to pass n up to some block, and that block."""
        p = passes[n]
        for m, q in enumerate(passes[:n]):
            same = p.video_context is q.video_context
            if same and p.audio_context is q.audio_context:
                blocks = range(self.config.num_layers)
                return m, next(
                    (i for i in blocks if p.perturbs(i) or q.perturbs(i)), len(blocks)
                )
        return n, 0

    def __call__(
        self,
        video: Optional[Tokens],
        audio: Optional[Tokens],
        passes: list[Pass],
        trace: Optional[Trace] = None,
    ) -> list[tuple[Optional[mx.array], Optional[mx.array]]]:
        """Velocities (video (B, T, C), audio (B, T, C)) of each pass.

        Either stream may be None. All passes go through a block together, so its text
        keys and values are computed once a context, and a pass that differs from an
        earlier one only by its perturbs starts from that one's state at its first cut.
        """
        vx = ax = video_stream = audio_stream = None
        if video is not None:
            vx, video_stream = self._embed("", video, audio)
        if audio is not None:
            ax, audio_stream = self._embed("audio_", audio, video)
        passes = self._project_text(passes)
        shared = [self._shared(passes, n) for n in range(len(passes))]
        states = [(vx, ax)] * len(passes)
        for i, block in enumerate(self.transformer_blocks):
            text: dict = {}
            for n, run in enumerate(passes):
                earlier, until = shared[n]
                if i < until:
                    states[n] = states[earlier]
                else:
                    states[n] = block(
                        i, video_stream, audio_stream, *states[n], run, text
                    )
                    mx.async_eval(states[n])  # computes while the next is prepared
            for name, x in zip(("video", "audio"), states[0]):
                if x is not None:
                    traced(trace, f"block{i}.{name}", x)
        return [
            (
                None if vx is None else self._project("", video_stream, vx),
                None if ax is None else self._project("audio_", audio_stream, ax),
            )
            for vx, ax in states
        ]


class StreamedBlocks:
    """Blocks that stay on the disk: each pass through them makes them anew with `read`,
    which gives a transformer whose weights are not read yet, and holds two at a time.
    """

    def __init__(self, read: Callable[[], DiT]):
        self.read = read

    def __iter__(self) -> Iterator[Block]:
        return prefetch(self.read().transformer_blocks)


class CaptionProjection(TimestepMLP):
    """2.0's projection of the text into a stream's width: Linear, GELU, Linear."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.gelu_approx(self.linear_1(x)))
