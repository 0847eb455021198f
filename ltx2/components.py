"""The model's components: loaded when needed, freed after use."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence, Union

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import hub, media, weights
from .base import Trace, dtype_name
from .cache import ContextCache
from .dit import Block, DiT, DiTConfig, StreamedBlocks, build_blocks
from .guidance import Contexts, TextContexts
from .inputs import InputFiles
from .lora import Lora, attach
from .parallel import Machines
from .parts import config_errors
from .record import Load
from .request import LoraFile
from .sampling import Noise
from .text import MAX_TOKENS, Gemma4TextEncoder, TextEncoder

Scaled = tuple[Lora, float]  # a LoRA and its strength


class Components:
    """A model that loads each component when it is needed."""

    def __init__(
        self,
        checkpoint: weights.Checkpoint,
        text_encoder: Optional[str] = None,
        dtype: mx.Dtype = mx.bfloat16,
        low_memory: Optional[bool] = None,
        cache_contexts: Union[str, Path, None] = None,
        machines: Optional[Machines] = None,
    ):
        self.checkpoint, self.dtype = checkpoint, dtype
        # Gemma's states overflow float16.
        self._text_dtype = mx.bfloat16 if dtype == mx.float16 else dtype
        how = {"kind": checkpoint.kind, "dtype": dtype_name(dtype)}
        self.origin = Load(**checkpoint.opened, **how, text_encoder=text_encoder)
        self.low_memory, self.cache_contexts = low_memory, cache_contexts
        self.machines = machines or Machines()
        self.text_encoder = checkpoint.encoder(text_encoder)
        self.inputs = InputFiles()
        self._checked: set[str] = set()  # components that fit their configuration
        self._loaded: dict[str, nn.Module] = {}
        self._exact: set[str] = set()  # of what is loaded, in float32
        self._loras: tuple[LoraFile, ...] = ()  # of the loaded transformer
        self.keep = self._keeps = False  # the transformer, for the next run
        self._adopted = False  # whether another one is used
        self.fallback: Optional[mx.Dtype] = None  # if a first step is not finite

    def component(self, name: str, exact: bool = False) -> nn.Module:
        """A component of the model, loaded once; "vae.encoder" and "vae.decoder" are
        halves of the video VAE. `exact`: in float32."""
        half = name.partition("vae.")[2]
        name = "vae" if half else name
        if exact != (name in self._exact):
            self.free(name)
            self._exact ^= {name}
        if name not in self._loaded:
            hub.fetch_all(self.checkpoint.files)
            dtype = self._text_dtype if name == "connectors" else self.dtype
            dtype = mx.float32 if exact else dtype
            self._loaded[name] = self.checkpoint.load(name, dtype, lazy=bool(half))
        module = self._loaded[name]
        if half:
            read = tree_flatten(module[half].parameters())
            weights.evaluate((w for _, w in read), weights.SMALL_GROUP)
        return module

    transformer = property(lambda self: self.component("transformer"))
    connectors = property(lambda self: self.component("connectors"))
    vae = property(lambda self: self.component("vae"))
    audio_vae = property(lambda self: self.component("audio_vae"))
    vocoder = property(lambda self: self.component("vocoder"))

    @property
    def _stored(self) -> mx.Dtype:
        """The dtype of the transformer's stored layers, except fp8's scales."""
        tensors = self.checkpoint.parts["transformer"].items()
        file, key = next(place for name, place in tensors if name.endswith(".weight"))
        dtype = hub.DTYPES[file.header[key][0]]
        return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16

    def free(self, *names: str) -> None:
        """Free the memory of components."""
        for name in names:
            self._loaded.pop(name, None)
            if name == "transformer":
                self._loras, self._adopted = (), False
        mx.clear_cache()

    def _bytes(self, name: str) -> int:
        """The bytes of a component, 0 if it is not loaded."""
        module = self._loaded.get(name)
        return sum(w.nbytes for _, w in tree_flatten(module)) if module else 0

    def fall_back(self) -> str:
        """Load the transformer in the `fallback` dtype from now on; its name."""
        self.dtype, self.fallback = self.fallback, None
        self.free("transformer")
        self.origin = replace(self.origin, dtype=dtype_name(self.dtype))
        return self.origin.dtype

    def _factors(self, loras: tuple[LoraFile, ...]) -> list[Scaled]:
        """LoRAs, whose factors are not read yet, with their strengths."""
        return [(Lora.read(self.inputs.lora_file(x.path)), x.strength) for x in loras]

    def adopt(self, transformer: DiT) -> None:
        """Use this transformer, with what is attached to it, until it is freed."""
        self._loaded["transformer"], self._loras = transformer, ()
        self._adopted = True

    def transformer_with(self, loras: tuple[LoraFile, ...], streamed: bool) -> DiT:
        """The transformer with a stage's LoRAs: in memory, with blocks read in each
        step, or this machine's part of it."""
        rebuilt = streamed or self.machines.mode == "tensor"
        if loras != self._loras and rebuilt:
            self.free("transformer")
        elif loras != self._loras:
            tensors = self.checkpoint.weights("transformer", self.dtype)
            read = lambda keys: {k: mx.contiguous(tensors[k]) for k in keys}
            attach(self.transformer, self._factors(loras), read, stored=self._stored)
        if rebuilt and "transformer" not in self._loaded:
            model = self.checkpoint.load("transformer", self.dtype, lazy=True)
            attach(model, self._factors(loras), stored=self._stored)
            self.machines.shard(model)
            if streamed:
                blocks = lambda: self.blocks(self._factors(loras))
                model.transformer_blocks = StreamedBlocks(blocks)
            self._loaded["transformer"] = model
        self._loras = loras
        weights.evaluate(w for _, w in tree_flatten(self.transformer.parameters()))
        self.machines.wait()
        return self.transformer

    @cached_property
    def dit_config(self) -> DiTConfig:
        """The transformer's configuration."""
        return DiTConfig.from_dict(self.checkpoint.config["transformer"])

    def blocks(self, loras: list[Scaled], apart: bool = False) -> Iterator[Block]:
        """The transformer's blocks with LoRAs (see `attach`), lazily."""
        tensors = self.checkpoint.weights("transformer", self.dtype)
        blocks = build_blocks(self.dit_config, tensors, self.checkpoint.quantization)
        for i, block in enumerate(blocks):
            how = {"prefix": f"transformer_blocks.{i}.", "stored": self._stored}
            attach(block, loras, **how, apart=apart)
            self.machines.shard(block)
            yield block

    def decoded(
        self, decoder: str, latents: mx.array, draw: Noise, exact: bool, **how: Any
    ) -> Iterator[mx.array]:
        """The frames that a component decodes (see its `decode_stream`)."""
        model = self.component("vae.decoder" if decoder == "vae" else decoder, exact)
        if decoder == "diffusion_decoder":
            noise = lambda name, shape: draw(f"vae.{name}", shape)
        else:
            conditioned = model.config.timestep_conditioning
            noise = draw("vae", latents.shape) if conditioned else None
        return model.decode_stream(latents, noise=noise, **how)

    def enlarged(
        self, decoder: str, stills: list[mx.array], height: int, width: int, draw: Noise
    ) -> mx.array:
        """Latents (1, K, H, W, C) of stills (1, 1, h, w, C): decoded, enlarged as
        pictures and encoded again."""
        made = []
        for n, still in enumerate(stills):
            noise = lambda name, shape, n=n: draw(f"plane{n}.{name}", shape)
            [frame] = self.decoded(decoder, still, noise, False)
            pixels = np.array(mx.round(frame[0, 0] * 255).astype(mx.uint8))
            pixels = mx.array(media.enlarge(pixels, height, width))[None, None]
            made.append(self.component("vae.encoder").encode(pixels))
            mx.eval(made[-1])
        self.free("vae", decoder)
        return mx.concatenate(made, axis=1)

    def files(self) -> dict[str, str]:
        """The weights' files with their fingerprints."""
        files = self.checkpoint.files
        return {f.name: f.fingerprint for f in files if f.role and f.path}

    @cached_property
    def encoder_files(self) -> list[hub.File]:
        """The text encoder's files, if they are not the model's own."""
        packed = self.checkpoint.version >= weights.GEMMA_4
        files = [] if packed else weights.text_encoder_files(self.text_encoder)
        return [f for f in files if f.name.endswith(".safetensors")]

    def check_text_encoder(self) -> None:
        """UserError unless the text encoder is complete and fits the model."""
        if self.checkpoint.version >= weights.GEMMA_4:
            return self.checkpoint.require("gemma")
        weights.check_text_encoder(self.text_encoder, self.checkpoint)

    def contexts(self, prompts: Sequence[str], trace: Trace) -> TextContexts:
        """Contexts by prompt, from the cache folder if there is one."""
        encode = lambda prompts: self.encode_prompts(prompts, trace)
        if self.cache_contexts is None or trace is not None:
            return encode(prompts)
        return self.context_cache(self.cache_contexts)(prompts, encode)

    def context_cache(self, folder: str | Path) -> ContextCache:
        """A folder of contexts made by this model and its text encoder."""
        encoder = {f.name: f.fingerprint for f in self.encoder_files}
        made_by = [self.files(), encoder, str(self.dtype)]
        return ContextCache(folder, made_by, self.checkpoint.config["transformer"])

    def encode_prompts(self, prompts: list[str], trace: Trace = None) -> TextContexts:
        """Contexts (video, audio), each (1, 1024, D), by prompt; frees what it loads."""
        if self.checkpoint.version >= weights.GEMMA_4:
            gemma = self.checkpoint.load("gemma", self._text_dtype, lazy=True)
            encoder = Gemma4TextEncoder(gemma, low_memory=True)
            del gemma
        else:
            folder = weights.fetch_text_encoder(self.text_encoder)
            with config_errors(f"text encoder {self.text_encoder}"):
                encoder = TextEncoder(folder, self._text_dtype, low_memory=True)
        states = encoder(prompts, trace)
        mx.eval(states)
        del encoder
        mx.clear_cache()
        contexts = {}
        for prompt, s in zip(prompts, states):
            contexts[prompt] = self.connectors(s, MAX_TOKENS, trace)
            mx.eval(contexts[prompt])
        self.free("connectors")
        return contexts

    def encode_prompt(self, prompt: str) -> Contexts:
        """Contexts (video, audio) of one prompt, each (1, 1024, D)."""
        return self.encode_prompts([prompt])[prompt]
