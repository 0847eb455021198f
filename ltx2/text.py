"""Prompt to contexts: all hidden states of Gemma (mlx-lm's), features, connectors."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import layers
from .base import Config, Trace, UserError, counted, note, parse_json, traced
from .layers import Attention, Component, FeedForward, Section, Shapes

MAX_TOKENS = 1024  # of a prompt, and the length of every context
TOKENIZERS = "tokenizer.json", "tokenizer.model"


class TextEncoder:
    """Gemma 3 from a folder in Hugging Face layout, quantized or not, without LM head. With
    `low_memory`, at most two layers are in memory, and it can be called only once."""

    def __init__(
        self, folder: Path, dtype: Optional[mx.Dtype] = None, low_memory: bool = False
    ):
        self.encode, self.bos = _tokenizer(tokenizer_folder(Path(folder)))
        self.model = _load(Path(folder)).model
        self.low_memory = low_memory
        if dtype is not None:
            self.model.set_dtype(dtype)
        if not low_memory:
            mx.eval(self.model.parameters())
        # Without the scaling of its long-range layers, the states are wrong in silence.
        for i, layer in enumerate(self.model.layers):
            scale = layer.self_attn.rope.scale
            expected = 1.0 if (i + 1) % self.model.sliding_window_pattern else 1 / 8
            if not math.isclose(scale, expected):
                has = f"layer {i} has RoPE scale {scale}, Gemma 3 has {expected}"
                raise UserError(f"{has}: config.json lacks rope_scaling")

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids with BOS in front and no EOS, at most 1024."""
        ids = self.encode(prompt.strip())
        if ids[:1] != [self.bos]:
            ids = [self.bos] + ids
        if len(ids) > MAX_TOKENS:
            extra = len(ids) - MAX_TOKENS
            note(f"the prompt has {len(ids)} tokens; the last {extra} are ignored")
        return ids[:MAX_TOKENS]

    def __call__(self, prompts: list[str], trace: Trace = None) -> list[list[mx.array]]:
        """All hidden states (1, tokens, D) of each prompt, without padding: embeddings
        and layer outputs, the last one normed."""
        gemma = self.model
        tokens = [mx.array([self.tokenize(prompt)]) for prompt in prompts]
        scale = math.sqrt(gemma.norm.weight.size)
        states = [[gemma.embed_tokens(ids) * scale] for ids in tokens]
        waiting = list(gemma.layers)
        if self.low_memory:
            gemma.layers = []
        taken = (waiting.pop(0) for _ in counted(range(len(waiting)), "text"))
        for layer in layers.prefetch(taken):
            for s in states:
                y = layer(s[-1], "causal", None)
                s.append(y[0] if isinstance(y, tuple) else y)  # Gemma 4 adds its keys
            mx.async_eval([s[-1] for s in states])
        for s in states:
            s[-1] = gemma.norm(s[-1])
            for i, x in enumerate(s):
                traced(trace, f"gemma.{i}", x)
        return states


def read_config(folder: Path) -> dict[str, Any]:
    """A text encoder's config.json."""
    return parse_json((folder / "config.json").read_bytes(), f"{folder}/config.json: ")


def tokenizer_folder(folder: Path) -> Path:
    """The folder of a text encoder's tokenizer: its own, or one next to it (diffusers)."""
    inside = any((folder / name).is_file() for name in TOKENIZERS)
    return folder if inside else folder / "../tokenizer"


def _tokenizer(folder: Path) -> tuple[Callable[[str], list[int]], int]:
    """A function from text to token ids, and BOS's id, of either tokenizer file."""
    if (path := folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        if "model" not in json.loads(path.read_bytes()):
            raise UserError("tokenizer.json has no model")
        tokenizer = Tokenizer.from_file(str(path))
        encode, bos = lambda x: tokenizer.encode(x).ids, tokenizer.token_to_id("<bos>")
    else:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        encode, bos = pieces.encode, pieces.bos_id()
    if bos != 2:  # all prompts would give the same video, in silence
        raise UserError(f"its tokenizer is not Gemma's: <bos> is {bos}, not 2")
    return encode, bos


@dataclass
class Gemma4Config(Config):
    """The text part of the configuration that is packed with LTX-2.5's encoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    num_global_key_value_heads: int
    attention_k_eq_v: bool
    rope_parameters: dict
    rms_norm_eps: float = 1e-6
    layer_types: Optional[list] = None  # None: each sixth and the last one are global
    tokenizer_bytes: int = 0  # not in the section: the size of the tokenizer's tensor

    FIXED = {
        "model_type": ("gemma4_unified_text", "gemma4_text"),
        "attention_bias": (False,),
        "enable_moe_block": (False,),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "hidden_size_per_layer_input": (0, None),
        "num_kv_shared_layers": (0,),
        "use_bidirectional_attention": ("vision", None),
    }
    PARTIAL = True

    @classmethod
    def from_dict(cls, section: dict[str, Any]) -> Config:
        text = section["text_config"]
        window = text.get("sliding_window", MAX_TOKENS)
        if window < MAX_TOKENS:  # prompts are encoded without a window
            raise UserError(f"Gemma 4: a window of {window} tokens is not implemented")
        kinds = text.get("rope_parameters", {}).keys()
        if kinds != {"full_attention", "sliding_attention"}:  # mlx-lm would guess
            raise UserError("Gemma 4: its config lacks rope_parameters by layer type")
        return super().from_dict(text | {"tokenizer_bytes": section["tokenizer_bytes"]})


class Gemma4(Component):
    """LTX-2.5's Gemma 4: its text layers without LM head, and its tokenizer."""

    config_class = Gemma4Config
    UNUSED = "vision_model.", "multi_modal_projector.", "audio_projector.", "hf_asset"

    def __init__(self, c: Gemma4Config):
        from mlx_lm.models.gemma4_text import Gemma4TextModel, ModelArgs

        super().__init__()
        kinds = ["sliding_attention"] * c.num_hidden_layers
        for i in (*range(5, len(kinds), 6), -1):
            kinds[i] = "full_attention"
        args = vars(c) | {"layer_types": c.layer_types or kinds}
        args |= {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
        self.tokenizer_json = mx.zeros(args.pop("tokenizer_bytes"), mx.uint8)
        self.model = Gemma4TextModel(ModelArgs(**args))

    @classmethod
    def infer_sizes(cls, section: Section, shapes: Shapes) -> Section:
        """The section with the size of the packed tokenizer."""
        return {**section, "tokenizer_bytes": shapes["tokenizer_json"][0]}


class Gemma4TextEncoder(TextEncoder):
    """As TextEncoder, with the Gemma 4 and the tokenizer that LTX-2.5 has in one file."""

    def __init__(self, gemma: Gemma4, low_memory: bool = False):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_buffer(bytes(gemma.tokenizer_json))
        self.encode = lambda text: tokenizer.encode(text).ids
        self.bos = tokenizer.token_to_id("<bos>")
        self.model, self.low_memory = gemma.model, low_memory


# What tools write in front of the names of Gemma 3's text layers.
TEXT_NAME = re.compile(
    r"(?:(?:_orig_mod|model|language_model|text_model)\.)*"
    r"((?:embed_tokens|layers|norm)\b.*)"
)
# Sizes that a text_config lacks where they are transformers' defaults
DEFAULTS = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}


def text_name(key: str) -> str:
    """A tensor's or layer's name in Gemma 3's text model; "" for other parts."""
    match = TEXT_NAME.fullmatch(key)
    return match[1] if match else ""


def _load(folder: Path) -> nn.Module:
    """Gemma 3's text model and its LM head, the embedding, lazily; mlx-lm alone reads
    only some spellings of its names."""
    # Late, because it takes seconds and lowers the limit of open files.
    from mlx_lm.models import gemma3_text
    from mlx_lm.utils import load_model

    class Gemma3(gemma3_text.Model):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            named = {f"model.{text_name(k)}": w for k, w in weights.items()}
            named.pop("model.", None)  # of other parts
            return super().sanitize(named)

    config = _for_mlx_lm(read_config(folder))
    how = {"get_model_classes": lambda config: (Gemma3, gemma3_text.ModelArgs)}
    with layers.no_random_weights():
        return load_model(folder, lazy=True, model_config=config, **how)[0]


def _for_mlx_lm(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration for mlx-lm, which ignores transformers-5 RoPE settings."""
    text = DEFAULTS | config | config.get("text_config", {})
    ropes = text.get("rope_parameters") or {}
    full, local = ropes.get("full_attention"), ropes.get("sliding_attention")
    if full and local:
        text["rope_scaling"] = {"rope_type": "linear", "factor": full.get("factor", 1)}
        text["rope_theta"] = full["rope_theta"]
        text["rope_local_base_freq"] = local["rope_theta"]
    how = text.get("quantization") or text.get("quantization_config") or {}
    if how and "quant_method" not in how:  # MLX's; it has layers in another format, too
        name = lambda key: f"model.{text_name(key)}" if text_name(key) else key
        text["quantization"] = {name(key): value for key, value in how.items()}
    return text


ENHANCE = """\
You prepare prompts for a model that makes a short video together with its sound. \
Rewrite the idea below as one paragraph of four to eight sentences in the present tense: \
who or what is seen and how it looks, what happens from beginning to end, the place and \
the light, how the camera stands or moves, and what is heard, with spoken words in \
quotation marks. Keep everything the idea says and contradict none of it. Answer with \
the paragraph alone.

Idea: {prompt}"""


def enhance(folder: Path, prompt: str, seed: int, max_tokens: int = 400) -> str:
    """A longer prompt, written by the same Gemma with its LM head and a `seed`."""
    from mlx_lm import generate
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load_tokenizer

    config = read_config(folder)
    sizes = config.get("text_config", config)
    count, pattern = sizes["num_hidden_layers"], sizes.get("sliding_window_pattern", 6)
    if count < pattern:  # as the demo's, which only encodes
        few = f"text encoder {folder} has {count} layers, too few to write"
        raise UserError(f"{few}: remove --enhance-prompt")
    model = _load(folder)
    ends = config.get("eos_token_id")
    tokenizer = load_tokenizer(tokenizer_folder(folder), eos_token_ids=ends)
    mx.random.seed(seed)
    turn = ENHANCE.format(prompt=prompt.strip())
    turn = f"<start_of_turn>user\n{turn}<end_of_turn>\n<start_of_turn>model\n"
    how = {"max_tokens": max_tokens, "sampler": make_sampler(temp=0.7, top_p=0.95)}
    return " ".join(generate(model, tokenizer, turn, **how).split())


@dataclass
class TextConfig(Config):
    """What the text connectors read of a checkpoint's `transformer` section."""

    caption_channels: int
    connector_num_attention_heads: int
    connector_attention_head_dim: int
    connector_num_layers: int
    audio_connector_num_attention_heads: Optional[int] = None  # None: as video
    audio_connector_attention_head_dim: Optional[int] = None
    audio_connector_num_layers: Optional[int] = None
    connector_num_learnable_registers: int = 128
    connector_positional_embedding_max_pos: list = field(default_factory=lambda: [4096])
    connector_apply_gated_attention: bool = False
    connector_ff_bias: bool = True
    text_encoder_norm_type: Optional[str] = None
    # Not in the section: the number of the text encoder's hidden states
    encoder_states: int = 49

    FIXED = {
        "connector_norm_output": (True,),
        "use_embeddings_connector": (True,),
        "text_encoder_norm_type": ("per_token_rms", None),
    }
    PARTIAL = True

    def __post_init__(self):
        """The number of heads and their size, by stream."""
        heads = self.connector_num_attention_heads
        size = self.connector_attention_head_dim
        self.video = heads, size
        heads = self.audio_connector_num_attention_heads or heads
        size = self.audio_connector_attention_head_dim or size
        self.audio = heads, size


class TextConnectors(Component):
    """Hidden states of one prompt to the contexts of the two streams."""

    config_class = TextConfig

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = c = config
        widths = math.prod(c.video), math.prod(c.audio)
        self.text_embedding_projection = FeatureExtractor(c, *widths)
        depths = c.connector_num_layers, c.audio_connector_num_layers
        self.video_embeddings_connector = Connector(c, *c.video, depths[0])
        self.audio_embeddings_connector = Connector(c, *c.audio, depths[1] or depths[0])

    def __call__(
        self, states: list[mx.array], length: int = MAX_TOKENS, trace: Trace = None
    ) -> tuple[mx.array, mx.array]:
        """Contexts (1, length, D) of video and audio from states (1, tokens, D)."""
        video, audio = self.text_embedding_projection(states)
        traced(trace, "text.video_features", video)
        traced(trace, "text.audio_features", audio)
        video = self.video_embeddings_connector(video, length)
        audio = self.audio_embeddings_connector(audio, length)
        traced(trace, "text.video_context", video)
        return video, traced(trace, "text.audio_context", audio)

    @classmethod
    def infer_sizes(cls, section: Section, shapes: Shapes) -> Section:
        """The section with the number of hidden states, from the projection's shape."""
        for name, shape in shapes.items():
            if name.endswith("_embed.weight") and len(shape) == 2:
                hidden = section.get("caption_channels", shape[1])
                return {**section, "encoder_states": shape[1] // hidden}
        return section


class FeatureExtractor(nn.Module):
    """All hidden states of a token as one vector, normalized and projected.

    2.0: each state is scaled to a range of 8 over the prompt; both streams share a
    projection. From 2.3 on: each state is RMS-normalized by token and scaled to keep its
    variance through the projection; each stream has one.
    """

    def __init__(self, c: TextConfig, video_dim: int, audio_dim: int):
        super().__init__()
        self.hidden = c.caption_channels
        width = self.hidden * c.encoder_states
        if c.text_encoder_norm_type == "per_token_rms":
            self.video_aggregate_embed = nn.Linear(width, video_dim)
            self.audio_aggregate_embed = nn.Linear(width, audio_dim)
        else:
            self.aggregate_embed = nn.Linear(width, video_dim, bias=False)

    def __call__(self, states: list[mx.array]) -> tuple[mx.array, mx.array]:
        # (1, tokens, states, D): stacked on the last axis, each state would be copied
        # with a stride, which is slow on Metal.
        x = mx.stack(states, axis=2).astype(mx.float32)

        def project(x: mx.array, embed: nn.Linear) -> mx.array:
            x = x.astype(embed.weight.dtype).swapaxes(2, 3)
            return embed(x.flatten(2))  # the state's index runs fastest

        if "aggregate_embed" in self:
            low, high = (f(x, axis=(1, 3), keepdims=True) for f in (mx.min, mx.max))
            x = 8 * (x - x.mean((1, 3), keepdims=True)) / (high - low + 1e-6)
            features = project(x, self.aggregate_embed)
            return features, features
        x = layers.rms_norm(x)
        embeds = self.video_aggregate_embed, self.audio_aggregate_embed
        scale = lambda embed: math.sqrt(embed.bias.size / self.hidden)
        return tuple(project(x * scale(embed), embed) for embed in embeds)


class ConnectorBlock(nn.Module):
    """Self-attention and feed-forward, each behind a weightless norm."""

    def __init__(self, c: TextConfig, heads: int, head_dim: int):
        super().__init__()
        dim = heads * head_dim
        gated = c.connector_apply_gated_attention
        self.attn1 = Attention(dim, heads, head_dim, gated=gated)
        self.ff = FeedForward(dim, c.connector_ff_bias)

    def __call__(self, x: mx.array, rope) -> mx.array:
        x = x + self.attn1(layers.rms_norm(x), rope=rope)
        return x + self.ff(layers.rms_norm(x))


class Connector(nn.Module):
    """A small transformer over the prompt's tokens, padded with learned registers."""

    def __init__(self, c: TextConfig, heads: int, head_dim: int, depth: int):
        super().__init__()
        self.heads, self.dim = heads, heads * head_dim
        self.max_pos = c.connector_positional_embedding_max_pos
        shape = c.connector_num_learnable_registers, self.dim
        self.learnable_registers = mx.zeros(shape)
        blocks = (ConnectorBlock(c, heads, head_dim) for _ in range(depth))
        self.transformer_1d_blocks = [*blocks]

    def __call__(self, x: mx.array, length: int) -> mx.array:
        """(1, tokens, D) to (1, length, D); registers are chosen by absolute position."""
        registers = self.learnable_registers.astype(x.dtype)
        padding = registers[mx.arange(x.shape[1], length) % len(registers)]
        x = mx.concatenate([x, padding[None]], axis=1)
        positions = np.arange(length, dtype=np.float32)[None]
        rope = layers.rope_cos_sin(positions, self.dim, self.heads, self.max_pos)
        rope = tuple(table.astype(x.dtype) for table in rope)
        for block in self.transformer_1d_blocks:
            x = block(x, rope)
        return layers.rms_norm(x)
