"""Train the demo's transformer and text connectors with the product's modules and trainer.

    python demo/transformer.py --work DIR                              # on demo/model
    python demo/transformer.py --work DIR --model DIR/autoencoders.safetensors --new

All weights are trained by the gradients of ltx2/gradients.py, on clips that the model's
own autoencoders encode. It writes ltx-2.3-demo-distilled.safetensors in the official
layout, about once a minute, and resumes from there. A batch depends only on its step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo import data  # noqa: E402
from ltx2 import gradients, latents, weights  # noqa: E402
from ltx2.audio_vae import log_mel  # noqa: E402
from ltx2.dit import DiT, DiTConfig  # noqa: E402
from ltx2.layers import no_random_weights  # noqa: E402
from ltx2.sampling import DISTILLED_SIGMAS  # noqa: E402
from ltx2.text import MAX_TOKENS, TextConfig, TextConnectors, TextEncoder  # noqa: E402

SEED = 2026
CONFIG = json.loads((ROOT / "demo" / "config.json").read_text())
SIZE = latents.Size(data.SIZE, data.SIZE, data.FRAMES, data.FPS)
SIZE = dataclasses.replace(SIZE, audio_tokens=latents.audio_tokens(25, data.FPS))
HELD_OUT = 64  # clips
OFFICIAL = "model.diffusion_model."
PROJECTION = "text_embedding_projection."


class Denoiser(DiT):
    """The transformer with the text connectors, so that one gradient goes through both.
    Its texts are hidden states of the text encoder, a list for each clip of a batch."""

    def __init__(self, section: dict):
        super().__init__(DiTConfig.from_dict(section))
        layers = CONFIG["text_encoder"]["text_config"]["num_hidden_layers"]
        config = TextConfig.from_dict(section)
        config = dataclasses.replace(config, encoder_states=layers + 1)
        self.connectors = TextConnectors(config)
        self.length = MAX_TOKENS  # of the contexts

    def project_text(self, contexts):
        def project(states):
            made = zip(*(self.connectors(s, self.length) for s in states))
            return tuple(map(mx.concatenate, made))

        made = [project(next(x for x in pair if x is not None)) for pair in contexts]
        return [
            tuple(c if old is not None else None for c, old in zip(*pairs))
            for pairs in zip(made, contexts)
        ]


def open_denoiser(model: weights.Checkpoint, new: bool) -> Denoiser:
    """A model's transformer and connectors, or new ones."""
    with no_random_weights():
        denoiser = Denoiser(CONFIG["transformer"])
    if new:
        gradients.put(denoiser, initial(denoiser))
        return denoiser
    found = model.weights("transformer", mx.float32)
    text = model.weights("connectors", mx.float32)
    found |= {f"connectors.{k}": w for k, w in text.items()}
    denoiser.load_weights(list(found.items()))
    return denoiser


def initial(denoiser: Denoiser) -> gradients.Parameters:
    """Weights to begin with, by name and shape."""
    rng, found = np.random.default_rng(SEED), {}
    parameters = dict(tree_flatten(denoiser.parameters()))
    for name, w in parameters.items():
        uniform = lambda high, shape=w.shape: rng.uniform(-high, high, shape)
        if "adaln_single.linear" in name:
            x = np.zeros(w.shape)
        elif name.endswith("norm.weight"):
            x = np.ones(w.shape)
        elif "scale_shift_table" in name:
            x = 0.02 * rng.standard_normal(w.shape)
            # Gates start slightly open, so that blocks learn from the start.
            x[[4] if "a2v_ca" in name else [2, 5, 8][: len(x) // 3]] += 0.5
        elif "registers" in name:
            # Nearly equal, so that attention separates words from registers early.
            x = uniform(1, w.shape[-1:]) + 0.1 * uniform(1)
        else:
            matrix = parameters[name.replace("bias", "weight")]
            x = uniform(1 / math.sqrt(matrix.shape[-1]))
        found[name] = mx.array(x, mx.float32)
    return found


def encode_clips(model: weights.Checkpoint, work: Path, count: int):
    """Latents of random clips by stream, normalized, and their scenes; made once."""
    rng = np.random.default_rng([SEED, 0])
    scenes = [data.sample_scene(rng) for _ in range(count)]
    path = work / f"latents-{count}.safetensors"
    if not path.exists():
        vae, audio_vae = (model.load(k, mx.float32) for k in ("vae", "audio_vae"))
        found = {"video": [], "audio": []}
        for i in range(0, count, 8):
            frames = np.stack([data.render(s) for s in scenes[i : i + 8]])
            sound = np.stack([data.sound(s, 16000) for s in scenes[i : i + 8]])
            found["video"].append(vae.encode(mx.array(frames / np.float32(127.5) - 1)))
            heard = audio_vae.encode(log_mel(mx.array(sound.astype(np.float32))))
            found["audio"].append(heard[:, : SIZE.audio_tokens])
            mx.eval(found)
        arrays = {k: mx.concatenate(x) for k, x in found.items()}
        mx.save_safetensors(str(path), arrays)
    return mx.load(str(path)), scenes


@dataclasses.dataclass
class Batches:
    """Clips with the noise of one step, from their latents and captions."""

    denoiser: Denoiser
    encoder: TextEncoder
    latents: dict[str, mx.array]
    scenes: list[data.Scene]

    def draw(self, rng: np.random.Generator, clips: np.ndarray, sigma=None):
        """An example of clips that share their noise level and what is held: one caption
        in ten is empty, one batch in four keeps its clean first latent frame, one in
        eight its clean sound; one in eight has no attention between the streams, so its
        video or its sound alone."""
        captions = [
            "" if rng.random() < 0.1 else data.caption(self.scenes[i], rng)
            for i in clips
        ]
        states, noise = {}, {}
        for name, x in self.latents.items():
            tokens = latents.to_tokens(x[mx.array(clips)])
            state = latents.LatentState.initial(SIZE.bounds(name), 64, tokens)
            noise[name] = mx.array(rng.standard_normal(tokens.shape, np.float32))
            states[name] = state
        u, listed = rng.random(), rng.choice(DISTILLED_SIGMAS[:-1])
        shifted = 6 * u / (1 + 5 * u) if rng.random() < 0.5 else listed
        sigmas = dict.fromkeys(states, shifted if sigma is None else sigma)
        first, alone = rng.random(2)
        if first < 0.25:
            held = self.latents["video"][mx.array(clips)][:, :1]
            states["video"] = states["video"].hold(held)
        if alone < 0.125:
            states["audio"] = states["audio"].freeze()
        elif alone < 0.25:
            del states["video" if alone < 0.1875 else "audio"]
        texts = self.encoder(captions)
        contexts = tuple(texts if k in states else None for k in gradients.STREAMS)
        return gradients.make_example(self.denoiser, states, noise, sigmas, contexts)


def held_out_loss(batches: Batches, trainee: gradients.Trainee) -> float:
    """The mean loss of the last clips, always with the same noise and sigmas."""
    clips = np.arange(len(batches.scenes))[-HELD_OUT:].reshape(-1, 8)
    batches.denoiser.length, found = MAX_TOKENS, []
    for n, some in enumerate(clips):
        rng = np.random.default_rng([SEED, 1, n])
        example = batches.draw(rng, some, (n + 0.5) / len(clips))
        found.append(trainee.loss(example)[0].item())
    return float(np.mean(found))


def optimizer() -> optim.Optimizer:
    """Muon for matrices, Adam for everything else."""
    muon = optim.Muon(0.0, weight_decay=0.0)
    matrix = lambda path, w: w.ndim == 2 and min(w.shape) >= 16
    return optim.MultiOptimizer([muon, optim.Adam(0.0, [0.9, 0.99])], [matrix])


def tree(parameters: gradients.Parameters) -> dict:
    """Parameters as nested dictionaries and lists, as optimizers have them."""
    return tree_unflatten(list(parameters.items()))


def train(args: argparse.Namespace) -> None:
    model = weights.open_model(str(args.model), "distilled")
    denoiser = open_denoiser(model, args.new)
    parameters = dict(tree_flatten(denoiser.parameters()))
    opt, start, path = optimizer(), 0, args.work / "transformer.safetensors"
    opt.init(tree(parameters))
    if path.exists():
        saved, facts = mx.load(str(path), return_metadata=True)
        parameters = {k: saved.pop(k) for k in parameters}
        opt.state, start = tree(saved), int(facts["step"])
    trainee = gradients.Trainee(denoiser, parameters)
    encoder = TextEncoder(args.text_encoder, mx.float32)
    batches = Batches(denoiser, encoder, *encode_clips(model, args.work, args.clips))
    print(f"held-out loss {held_out_loss(batches, trainee):.4f}", flush=True)
    odds = [1 + (s.motion in ("growing", "bouncing")) for s in batches.scenes]
    odds = np.array(odds[:-HELD_OUT]) / sum(odds[:-HELD_OUT])
    total, since, saved_at = [], time.time(), time.time()
    for step in range(start, args.steps):
        rng, grads, losses = np.random.default_rng([SEED, 2, step]), {}, []
        # The registers would hide the words at first.
        growth = min(1.0, step / (0.4 * args.steps)) if args.new else 1.0
        denoiser.length = round(64 * (MAX_TOKENS / 64) ** growth)
        for _ in range(args.groups):
            clips = rng.choice(len(odds), args.batch // args.groups, p=odds)
            (loss, _), found = trainee.gradients(batches.draw(rng, clips))
            grads = {k: g / args.groups + grads.get(k, 0) for k, g in found.items()}
            mx.eval(loss, grads)
            losses.append(loss.item())
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps))
        rate = args.rate * min(1.0, (step + 1) / 50) * decay
        for one, factor in zip(opt.optimizers, (5.0, 1.0)):
            one.learning_rate = rate * factor
        clipped, _ = optim.clip_grad_norm(grads, 1.0)
        new = opt.apply_gradients(tree(clipped), tree(trainee.parameters))
        trainee.update(dict(tree_flatten(new)))
        mx.eval(trainee.parameters, opt.state)
        total.append(np.mean(losses))
        last = step + 1 == args.steps
        if time.time() - saved_at > 60 or last:
            pace = (time.time() - since) / len(total)
            print(f"step {step + 1}: {np.mean(total):.4f}, {pace:.2f} s", flush=True)
            state = dict(tree_flatten(opt.state))
            mx.save_safetensors(
                str(path), trainee.parameters | state, {"step": str(step + 1)}
            )
            total, since, saved_at = [], time.time(), time.time()
    print(f"held-out loss {held_out_loss(batches, trainee):.4f}", flush=True)
    export(model, trainee.parameters, args.work)


def official(name: str) -> str:
    """The official name of a parameter of the denoiser."""
    name = name.removeprefix("connectors.")
    return name if name.startswith(PROJECTION) else OFFICIAL + name


def export(model: weights.Checkpoint, parameters, work: Path) -> None:
    """Everything in the official single-file layout, in bfloat16."""
    tensors = {official(k): w for k, w in parameters.items()}
    for name in ("vae", "audio_vae", "vocoder"):
        for file, key in set(model.parts[name].values()):
            tensors[key] = file.arrays()[key]
    tensors = {k: w.astype(mx.bfloat16) for k, w in tensors.items()}
    config = {k: v for k, v in CONFIG.items() if k != "text_encoder"}
    facts = {"format": "pt", "model_version": "2.3.0", "config": json.dumps(config)}
    path = work / "ltx-2.3-demo-distilled.safetensors"
    mx.save_safetensors(str(path), tensors, facts)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for latents and weights")
    add("--model", type=Path, default=ROOT / "demo" / "model", help="to start from")
    add("--text-encoder", type=Path, default=ROOT / "demo" / "model" / "text_encoder")
    add("--new", action="store_true", help="begin with new weights")
    add("--clips", type=int, default=8192, help="to encode and train on")
    add("--steps", type=int, default=5000)
    add("--batch", type=int, default=32, help="clips a step")
    add("--groups", type=int, default=4, help="of clips that share a noise level")
    add("--rate", type=float, help="learning rate (default: 2e-5, with --new 4e-3)")
    args = parser.parse_args()
    args.rate = args.rate or (4e-3 if args.new else 2e-5)
    args.work.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
