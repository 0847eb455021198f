"""The training loss of the transformer, its gradients, and steps of the parameters.

A clip's noise and sigmas make an `Example`, whose loss is the error of the velocities.
Its gradients are computed at once, or block by block, which recomputes each block but
holds only one, from memory or from the disk.
"""

from __future__ import annotations

import math
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Iterable, Iterator, Mapping, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from .dit import Block, Both, DiT, Streams, Tokens
from .guidance import stream_tokens
from .latents import LatentState
from .layers import prefetch
from .lora import Lora, linear_shape

Parameters = dict[str, mx.array]  # by their names in the transformer
Losses = tuple[mx.array, Both]  # all, and of the video and the audio

STREAMS = ("video", "audio")
BLOCKS = "transformer_blocks."
STATES = ("x0", "x1")
# Of a StreamContext: computed before the blocks, also from parameters that train.
CARRIED = ("ada", "embedded", "prompt_ada", "cross_ada", "cross_gate")

# Endings of the names of layers, by the streams that are trained; the reference's.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "both": ATTENTION,
    "video": tuple(f"attn{n}.{name}" for n in (1, 2) for name in ATTENTION),
    "audio": tuple(f"audio_attn{n}.{name}" for n in (1, 2) for name in ATTENTION),
}
SCHEDULES = {  # the part of the learning rate after a part of the steps
    "linear": lambda done: 1 - 0.9 * done,
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
}


# Noise and loss


def sample_sigmas(
    tokens: int, normal: np.ndarray, uniform: np.ndarray, coin: np.ndarray
) -> np.ndarray:
    """Sigmas (N,) for a stream of so many tokens, from draws (N,) each: the reference's
    shifted logit-normal, stretched to [0, 1], and uniform with probability 0.1."""
    shift = 0.95 + (tokens - 1024) * 1.10 / 3072
    logistic = lambda z: 1 / (1 + np.exp(-(shift + z)))
    low, high, x = map(logistic, (-2.5758, 3.0902, np.asarray(normal)))
    x = (x - low) / (high - low)
    x = np.where(x < 0.001, 0.002 - x, x).clip(0, 1)
    return np.where(np.asarray(coin) > 0.1, x, 0.001 + 0.999 * np.asarray(uniform))


@dataclass(frozen=True)
class Example:
    """A clip with the noise of one step, by stream: inputs, velocities (1, n, C) of its
    first n tokens, and which of them count (1, n, 1). None where a stream is absent or,
    but for the inputs, frozen."""

    tokens: tuple[Optional[Tokens], Optional[Tokens]]
    targets: Both
    masks: Both
    contexts: Both


def make_example(
    model: DiT,
    states: Mapping[str, LatentState],
    noise: Mapping[str, mx.array],
    sigmas: Mapping[str, float],
    contexts: Both,
) -> Example:
    """Mix the states' tokens with noise (1, n, C) at the sigmas, by stream."""
    tokens, targets, masks = [], [], []
    for name in STREAMS:
        state = states.get(name)
        trained = state is not None and not state.frozen
        tokens.append(state and noised_tokens(model, name, state, noise, sigmas))
        n = state.num_target_tokens if trained else 0
        targets.append(noise[name] - state.latent[:, :n] if trained else None)
        masks.append(state.denoise_mask_tokens[:, :n] if trained else None)
    return Example(tuple(tokens), tuple(targets), tuple(masks), contexts)


def noised_tokens(model: DiT, name: str, state: LatentState, noise, sigmas) -> Tokens:
    """A stream's input; no token is marked as a keyframe, as in the reference."""
    sigma, x = (0.0, state.latent) if state.frozen else (sigmas[name], None)
    if x is None:  # tokens that guide need no noise
        guides = len(state.denoise_mask) - state.num_target_tokens
        x = state.noised(mx.pad(noise[name], ((0, 0), (0, guides), (0, 0))), sigma)
    keyframes = mx.zeros(len(state.denoise_mask))
    return stream_tokens(state, x, sigma, model.rope(name, state.bounds), keyframes)


def begin(model: DiT, example: Example) -> tuple[Parameters, Streams]:
    """What the blocks read: arrays that parameters may change, and the rest."""
    [texts] = model.project_text([example.contexts])
    states, streams = model.embed(*example.tokens)
    flat = {}
    for n, s in enumerate(streams):
        if s is not None:
            flat |= {f"x{n}": states[n], f"text{n}": texts[n]}
            flat |= {f"{k}{n}": getattr(s, k) for k in CARRIED}
    return {k: x for k, x in flat.items() if x is not None}, streams


def carried(flat: Parameters, streams: Streams) -> tuple[Both, Streams]:
    """The states and the streams' contexts with the arrays of `flat`."""
    contexts = []
    for n, s in enumerate(streams):
        found = {k: flat[f"{k}{n}"] for k in CARRIED if f"{k}{n}" in flat}
        contexts.append(s and replace(s, **found))
    return tuple(map(flat.get, STATES)), tuple(contexts)


def run(block: Block, flat: Parameters, streams: Streams) -> Parameters:
    """The states after a block."""
    states, streams = carried(flat, streams)
    texts = block.text_keys_values(streams, (flat.get("text0"), flat.get("text1")))
    states = block(states, streams, texts)
    return {k: x for k, x in zip(STATES, states) if x is not None}


def end(model: DiT, flat: Parameters, streams: Streams, example: Example) -> Losses:
    """The loss, and the mean squared error of each stream's generated tokens; 0 where
    all are held."""
    errors = []
    velocities = model.velocities(*carried(flat, streams))
    for v, target, mask in zip(velocities, example.targets, example.masks):
        if target is not None:
            n, channels = target.shape[1:]
            squares = mask * (v[:, :n].astype(mx.float32) - target) ** 2
            count = mx.maximum(mask.sum() * channels, 1) * len(v)
            errors.append(squares.sum() / count)
        else:
            errors.append(None)
    return sum(x for x in errors if x is not None), tuple(errors)


# Gradients


def put(module: nn.Module, parameters: Parameters, prefix: str = "") -> None:
    """Set parameters, named from `prefix` on."""
    named = [(k.removeprefix(prefix), w) for k, w in parameters.items()]
    if named:
        module.update(tree_unflatten(named))


def dot(outputs: Parameters, cotangents: Parameters) -> mx.array:
    """Its gradients are the outputs' times the cotangents."""
    return sum((x * cotangents[k]).sum() for k, x in outputs.items())


@dataclass
class Trainee:
    """A transformer and the parameters of it that are trained. `read` gives blocks that
    stay on the disk, `by_block` recomputes each block in the backward pass."""

    model: DiT
    parameters: Parameters
    by_block: bool = False
    read: Optional[Callable[[], Iterable[Block]]] = None

    def __post_init__(self):
        self.update(self.parameters)

    def update(self, parameters: Parameters) -> None:
        self.parameters = parameters
        put(self.model, parameters if self.read is None else self.outer)

    @property
    def outer(self) -> Parameters:
        """Parameters outside of the blocks."""
        return {k: w for k, w in self.parameters.items() if not k.startswith(BLOCKS)}

    def inner(self, i: int) -> Parameters:
        """Parameters of a block."""
        prefix = f"{BLOCKS}{i}."
        return {k: w for k, w in self.parameters.items() if k.startswith(prefix)}

    def blocks(self, backwards: bool = False) -> Iterator[tuple[int, Block]]:
        """The blocks with their numbers, each in memory only while it is used."""
        blocks = [*(self.read() if self.read else self.model.transformer_blocks)]
        order = range(len(blocks))[:: -1 if backwards else 1]
        taken = (blocks.pop(-1 if backwards else 0) for _ in order)
        for i, block in zip(order, prefetch(taken)):
            put(block, self.inner(i), f"{BLOCKS}{i}.")
            yield i, block

    def loss(self, example: Example) -> Losses:
        """The loss alone."""
        return end(self.model, *self._states(example), example)

    def _states(self, example: Example) -> tuple[Parameters, Streams]:
        flat, streams = begin(self.model, example)
        for _, block in self.blocks():
            flat |= run(block, flat, streams)
            mx.async_eval(flat)
        return flat, streams

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """The base in a block: with B zero, factors have no effect."""
        trained = self.parameters
        zero = lambda k, w: mx.zeros_like(w) if k.endswith("lora_b") else w
        self.update({k: zero(k, w) for k, w in trained.items()})
        yield
        self.update(trained)

    def preserved(self, example: Example, contexts: Both) -> Example:
        """With another text, for which the base's velocities are to stay."""
        pairs = zip(contexts, example.contexts)
        contexts = tuple(c if old is not None else None for c, old in pairs)
        other = replace(example, contexts=contexts)
        with self.untrained():
            velocities = self.model.velocities(*carried(*self._states(other)))
            mx.eval(velocities)
        cut = lambda v, t: None if t is None else v[:, : t.shape[1]].astype(t.dtype)
        return replace(other, targets=tuple(map(cut, velocities, example.targets)))

    def gradients(self, example: Example) -> tuple[Losses, Parameters]:
        """The loss, and its gradients by the names of the parameters."""
        if self.by_block or self.read is not None:
            return self._by_block(example)

        def loss(parameters: Parameters) -> Losses:
            put(self.model, parameters)
            flat, streams = begin(self.model, example)
            for block in self.model.transformer_blocks:
                flat |= run(block, flat, streams)
            return end(self.model, flat, streams, example)

        found = mx.value_and_grad(loss)(self.parameters)
        put(self.model, self.parameters)  # in place of the traced ones
        return found

    def _by_block(self, example: Example) -> tuple[Losses, Parameters]:
        """As `gradients`. What blocks read is passed to the functions that are
        differentiated: the gradients of what they only close over would be zero."""
        model, outer, before = self.model, self.outer, []
        flat, streams = begin(model, example)
        for _, block in self.blocks():
            before.append({k: flat[k] for k in STATES if k in flat})
            flat |= run(block, flat, streams)
            mx.async_eval(flat)

        def head(outer: Parameters, flat: Parameters) -> Losses:
            put(model, outer)
            return end(model, flat, streams, example)

        losses, (grads, cotangents) = mx.value_and_grad(head, (0, 1))(outer, flat)
        for i, block in self.blocks(backwards=True):
            flat |= before.pop()
            inputs = flat if outer else {k: flat[k] for k in STATES if k in flat}
            found, back = self._pull(i, block, flat, inputs, streams, cotangents)
            for k, x in back.items():
                cotangents[k] = x if k in STATES else cotangents[k] + x
            grads |= found
            mx.async_eval(found, cotangents)

        def start(outer: Parameters) -> mx.array:
            put(model, outer)
            return dot(begin(model, example)[0], cotangents)

        if outer:
            for k, x in mx.grad(start)(outer).items():
                grads[k] = grads[k] + x
            put(model, outer)
        return losses, {k: grads[k] for k in self.parameters}

    def _pull(self, i, block: Block, flat, inputs, streams, cotangents):
        """Gradients of a block's parameters and of its inputs."""
        prefix, inner = f"{BLOCKS}{i}.", self.inner(i)

        def after(inner: Parameters, inputs: Parameters) -> mx.array:
            put(block, inner, prefix)
            return dot(run(block, flat | inputs, streams), cotangents)

        found = mx.grad(after, (0, 1))(inner, inputs)
        put(block, inner, prefix)
        return found


# Parameters and steps


def target_layers(model: nn.Module, endings: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers whose names are, or end in "." and, one of these."""
    ends = tuple(f".{ending}" for ending in endings)
    return {
        path: layer
        for path, layer in model.named_modules()
        if f".{path}".endswith(ends) and linear_shape(layer)
    }


def new_factors(layers: Mapping[str, nn.Module], rank: int, seed: int) -> Lora:
    """A LoRA without effect, as PEFT begins: A is uniform within 1/sqrt(in), B zero."""
    factors = {}
    for path, layer in layers.items():
        outputs, inputs = linear_shape(layer)
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        a = rng.uniform(-1, 1, (rank, inputs)) / math.sqrt(inputs)
        factors[path] = mx.array(a, mx.float32), mx.zeros((outputs, rank))
    return Lora("adapter", factors, {})


def factor_parameters(lora: Lora) -> Parameters:
    """The factors by their names in a transformer that they are attached to."""
    return {
        f"{path}.{name}": w.astype(mx.float32)
        for path, pair in lora.factors.items()
        for name, w in zip(("lora_a", "lora_b"), pair)
    }


def optimizer(learning_rate: float) -> optim.AdamW:
    """The reference's; MLX's default is without bias correction."""
    return optim.AdamW(learning_rate, [0.9, 0.999], 1e-8, 0.01, bias_correction=True)


def step(
    opt: optim.Optimizer, parameters: Parameters, grads: Parameters, max_norm: float
) -> tuple[Parameters, float]:
    """One step of the optimizer, and the gradients' norm. Nothing changes if that is not
    finite; `max_norm` 0 does not clip."""
    clipped, norm = optim.clip_grad_norm(grads, max_norm or math.inf)
    if math.isfinite(norm.item()):
        parameters = opt.apply_gradients(clipped, parameters)
        mx.eval(parameters, opt.state)
    return parameters, norm.item()
