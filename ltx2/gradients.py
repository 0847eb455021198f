"""The training loss of the transformer, its gradients, and steps of the parameters.

A clip's noise and sigmas make an `Example`, whose loss is the error of the velocities.
Its gradients are computed at once, or block by block, which recomputes each block but
holds only one, from memory or from the disk.
"""

import math
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from .dit import Block, Both, DiT, Streams, Tokens
from .guidance import stream_tokens
from .latents import States
from .layers import prefetch
from .lora import Lora, linear_layers, linear_shape
from .sampling import DISTILLED_SIGMAS

Layers = dict[str, tuple[int, int]]  # outputs and inputs of linear layers, by path
Parameters = dict[str, mx.array]  # by their names in the transformer
Losses = tuple[mx.array, Both]  # the mean, and those of each video and audio, (B,)

STREAMS = ("video", "audio")
BLOCKS = "transformer_blocks."

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


def sigma_of_step(uniform: float) -> float:
    """The sigma of a distilled model's step, drawn (0 to 1) in proportion to its length."""
    return min(sigma for sigma in DISTILLED_SIGMAS if sigma > uniform)


def some_rows(count: int, least: int, rng: np.random.Generator) -> mx.array:
    """Numbers of a text's rows (of `count`): the first `least`, where the words are, and
    others at random: in all `least` in half of the cases, twice as many in half of the
    rest, ..., or `count`."""
    more = min(least << int(rng.geometric(0.5)) - 1, count) - least
    chosen = least + np.sort(rng.permutation(count - least)[:more])
    return mx.array(np.concatenate([np.arange(least), chosen]))


@dataclass(frozen=True)
class Example:
    """Clips with the noise of one step, by stream: inputs, velocities (B, n, C) of their
    first n tokens, and which of them count (1, n, 1). None where a stream is absent or,
    but for the inputs, frozen."""

    tokens: tuple[Optional[Tokens], Optional[Tokens]]
    targets: Both
    masks: Both
    contexts: Both
    places: tuple[bytes, ...] = ()  # of the tokens; none: no others can join its batch
    preserved: int = 0  # of its clips, the last ones

    clips = property(lambda self: next(len(x) for x in self.contexts if x is not None))


def make_example(
    model: DiT, states: States, noise: Mapping, sigmas: Mapping, contexts: Both
) -> Example:
    """Mix the states' tokens with noise (1, n, C) at the sigmas, by stream. As in the
    reference, no token is marked as a keyframe."""
    tokens, targets, masks = {}, {}, {}
    for name, state in states.items():
        x, sigma, count = state.latent, 0.0, len(state.denoise_mask)
        if not state.frozen:
            z, n, sigma = noise[name], state.num_target_tokens, sigmas[name]
            targets[name] = z - x[:, :n]
            masks[name] = state.denoise_mask_tokens[:, :n]
            # Tokens that guide need no noise.
            x = state.noised(mx.pad(z, ((0, 0), (0, count - n), (0, 0))), sigma)
        ropes = model.rope(name, state.bounds)
        tokens[name] = stream_tokens(state, x, sigma, ropes, mx.zeros(count))
    both = (tuple(map(found.get, STREAMS)) for found in (tokens, targets, masks))
    places = (bytes([s.frozen]) + s.bounds.tobytes() for s in states.values())
    # With held frames or a reference, tokens have more than one level.
    one = all(t.level_index is None for t in tokens.values())
    return Example(*both, contexts, tuple(places) if one else ())


def batches(examples: Sequence[Example]) -> list[Example]:
    """Examples of one clip or more as few: those with tokens at the same places are one."""
    groups = {}
    for n, example in enumerate(examples):
        groups.setdefault(example.places or n, []).append(example)
    return [join(group) for group in groups.values()]


def join(examples: Sequence[Example]) -> Example:
    """One batch of examples with tokens at the same places."""
    first, names = examples[0], ("latent", "timesteps", "sigma")
    by_clip = lambda t: t and {k: getattr(t, k) for k in names}
    parts = [([*map(by_clip, e.tokens)], e.targets, e.contexts) for e in examples]
    joined = lambda *arrays: None if arrays[0] is None else mx.concatenate(arrays)
    new, targets, contexts = tree_map(joined, *parts)
    tokens = tuple(t and replace(t, **x) for t, x in zip(first.tokens, new))
    preserved = sum(e.preserved for e in examples)
    return Example(tokens, targets, first.masks, contexts, first.places, preserved)


def present(both: Both) -> Parameters:
    """By stream, without those that are absent."""
    return {k: x for k, x in zip(STREAMS, both) if x is not None}


def begin(model: DiT, example: Example) -> tuple[Parameters, Streams, Both]:
    """The first states by stream, and the streams and texts that the blocks read."""
    [texts] = model.project_text([example.contexts])
    states, streams = model.embed(*example.tokens)
    return present(states), streams, texts


def run(block: Block, states: Parameters, streams: Streams, texts: Both) -> Parameters:
    """The states after a block."""
    read = block.text_keys_values(streams, texts)
    return present(block(tuple(map(states.get, STREAMS)), streams, read))


def end(
    model: DiT, example: Example, states: Parameters, streams: Streams, texts: Both
) -> Parameters:
    """The mean squared error of each stream's generated tokens (0: none), (B,)."""
    found, velocities = {}, model.velocities(tuple(map(states.get, STREAMS)), streams)
    parts = zip(STREAMS, velocities, example.targets, example.masks)
    for name, v, target, mask in parts:
        if target is not None:
            n, channels = target.shape[1:]
            squares = mask * (v[:, :n].astype(mx.float32) - target) ** 2
            found[name] = squares.sum((1, 2)) / mx.maximum(mask.sum() * channels, 1)
    return found


def losses(found: Parameters) -> Losses:
    return sum(x.mean() for x in found.values()), tuple(map(found.get, STREAMS))


# Gradients


def put(module: nn.Module, parameters: Parameters, prefix: str = "") -> None:
    """Set a module's parameters, named with `prefix` in front."""
    inner = lambda at, name: at[int(name) if isinstance(at, list) else name]
    for key, w in parameters.items():
        *path, name = key.removeprefix(prefix).split(".")
        reduce(inner, path, module).update({name: w})


def part(parameters: Parameters, prefix: str) -> Parameters:
    """Those of a block, or with "" those outside of the blocks."""
    inside = lambda k: k.startswith(prefix or BLOCKS) == bool(prefix)
    return {k: w for k, w in parameters.items() if inside(k)}


class Stage(NamedTuple):
    """A part of the model: its module, what its parameters' names begin with, and what
    it makes of states, streams and texts."""

    module: nn.Module
    prefix: str
    compute: Callable[[Parameters, Streams, Both], Parameters]


@dataclass
class Trainee:
    """A transformer and the parameters of it that are trained. `read` gives blocks that
    stay on the disk, `by_block` recomputes each block in the backward pass."""

    model: DiT
    parameters: Parameters
    by_block: bool = False
    read: Optional[Callable[[], Iterable[Block]]] = None

    def __post_init__(self):
        self.one_by_one = self.by_block or self.read is not None
        self.update(self.parameters)

    def update(self, parameters: Parameters) -> None:
        self.parameters = parameters
        put(self.model, parameters if self.read is None else part(parameters, ""))

    def blocks(self, backwards: bool = False) -> Iterator[tuple[str, Block]]:
        """The blocks with their prefixes, each in memory only while it is used."""
        blocks = [*(self.read() if self.read else self.model.transformer_blocks)]
        order = range(len(blocks))[:: -1 if backwards else 1]
        taken = (blocks.pop(-1 if backwards else 0) for _ in order)
        for i, block in zip(order, prefetch(taken) if self.one_by_one else taken):
            prefix = f"{BLOCKS}{i}."
            if self.read is not None:  # else `update` has set them
                put(block, part(self.parameters, prefix), prefix)
            yield prefix, block

    def _stages(self, example: Example, backwards: bool = False) -> Iterator[Stage]:
        """The blocks and the output layers; backwards also what comes before them."""
        model = self.model
        last = Stage(model, "", partial(end, model, example))
        if backwards:
            yield last
        for prefix, block in self.blocks(backwards):
            yield Stage(block, prefix, partial(run, block))
        yield Stage(model, "", lambda states, *_: states) if backwards else last

    def _forward(self, example: Example, evaluate: bool = True) -> list[Parameters]:
        """The states before each stage, and at the end the losses."""
        states, *read = begin(self.model, example)
        found = [states]
        for stage in self._stages(example):
            found.append(stage.compute(found[-1], *read))
            if evaluate:
                mx.async_eval(found[-1])
        return found

    def loss(self, example: Example) -> Losses:
        """The loss alone."""
        return losses(self._forward(example)[-1])

    @contextmanager
    def untrained(self) -> Iterator[None]:
        """Use the base model in a block: factors without rows are not computed."""
        trained = self.parameters
        self.update({k: w[:0] if "lora_a" in k else w for k, w in trained.items()})
        try:
            yield
        finally:
            self.update(trained)

    def preserved(self, example: Example) -> Example:
        """The example with the base's velocities, which must stay."""
        with self.untrained():
            states, streams = self._forward(example)[-2], begin(self.model, example)[1]
            velocities = self.model.velocities(tuple(map(states.get, STREAMS)), streams)
            mx.eval(velocities)
        cut = lambda v, t: None if t is None else v[:, : t.shape[1]].astype(t.dtype)
        targets = tuple(map(cut, velocities, example.targets))
        return replace(example, targets=targets, preserved=example.clips)

    def gradients(
        self, example: Example, weights: Optional[mx.array] = None
    ) -> tuple[Losses, Parameters]:
        """The loss, and by the names of the parameters the gradients of the sum of the
        clips' losses times their weights (B,), which are 1 / B if not given."""
        if weights is None:
            weights = mx.full(example.clips, 1 / example.clips)
        if self.one_by_one:
            return self._by_block(example, weights)

        def loss(parameters: Parameters) -> tuple[mx.array, Losses]:
            put(self.model, parameters)
            found = self._forward(example, evaluate=False)[-1]
            return sum((weights * x).sum() for x in found.values()), losses(found)

        (_, found), grads = mx.value_and_grad(loss)(self.parameters)
        put(self.model, self.parameters)  # in place of the traced ones
        return found, grads

    def _by_block(self, example: Example, weights) -> tuple[Losses, Parameters]:
        """As `gradients`, but each stage is computed again in the backward pass."""
        *before, made = self._forward(example)
        grads, cotangents = {}, dict.fromkeys(made, weights)
        outer, fixed = part(self.parameters, ""), begin(self.model, example)
        start = lambda: begin(self.model, example) if outer else fixed
        for stage in self._stages(example, backwards=True):
            states = before.pop() if before else {}
            own = outer | part(self.parameters, stage.prefix)
            if states or own:
                found, cotangents = self._pull(stage, start, own, states, cotangents)
                grads |= {k: grads.get(k, 0) + x for k, x in found.items()}
                mx.async_eval(found, cotangents)
        return losses(made), {k: grads[k] for k in self.parameters}

    def _pull(self, stage: Stage, start: Callable, own, states, cotangents):
        """Gradients of parameters, the stage's and those outside of the blocks, which
        decide what `start` gives, and of its states (none: the first ones). Both must be
        arguments: the gradients of what a function only closes over are zero."""

        def assign(own: Parameters) -> None:
            put(self.model, part(own, ""))
            put(stage.module, part(own, stage.prefix), stage.prefix)

        def dot(own: Parameters, states: Parameters) -> mx.array:
            assign(own)
            first, *read = start()
            made = stage.compute(states or first, *read)
            return sum((made[k] * x).sum() for k, x in cotangents.items())

        found = mx.grad(dot, (0, 1))(own, states)
        assign(own)  # in place of the traced ones
        return found


# Parameters and steps


def target_layers(model: nn.Module, endings: Sequence[str]) -> Layers:
    """The linear layers whose names have these endings."""
    ends, layers = tuple(f".{ending}" for ending in endings), linear_layers(model)
    found = [path for path in layers if f".{path}".endswith(ends)]
    return {path: linear_shape(layers[path]) for path in found}


def new_factors(layers: Layers, rank: int, seed: int) -> Lora:
    """A LoRA without effect, as PEFT starts: A uniform within 1/sqrt(in), B zero."""
    factors = {}
    for path, (outputs, inputs) in layers.items():
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        a = rng.uniform(-1, 1, (rank, inputs)) / math.sqrt(inputs)
        factors[path] = mx.array(a, mx.float32), mx.zeros((outputs, rank))
    return Lora("adapter", factors, {})


def factor_parameters(lora: Lora) -> Parameters:
    """The factors, by their names in a transformer with the LoRA attached."""
    found = {}
    for path, (a, b) in lora.factors.items():
        found |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    return {key: w.astype(mx.float32) for key, w in found.items()}


def optimizer(learning_rate: float, decay: float) -> optim.AdamW:
    """The reference's AdamW, compiled; it has the bias correction that MLX leaves off."""
    opt = optim.AdamW(learning_rate, [0.9, 0.999], 1e-8, decay, bias_correction=True)
    opt.apply_gradients = mx.compile(opt.apply_gradients, opt.state, opt.state)
    return opt


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
