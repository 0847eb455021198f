"""Train the demo model from scratch: python demo/train.py --work DIR [stage ...]

The stages run in order, all of them by default; each saves a checkpoint about every minute
and resumes from it. A batch depends only on (SEED, stage, step).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import data, model
from demo.judge import judge

SEED = 2026
CONFIG = json.loads((Path(__file__).parent / "config.json").read_text())
TEXT = CONFIG["text_encoder"]
CONTEXT = 1024
SCHEDULE = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]
AUDIO_TOKENS = round(data.FRAMES / data.FPS * 25)
MEL_FRAMES = 4 * AUDIO_TOKENS - 3
VIDEO_POSITIONS = model.video_positions(4, 3, 3, data.FPS)
AUDIO_POSITIONS = model.audio_positions(AUDIO_TOKENS)
SHARDS, SHARD = 64, 128
RECIPES = {  # steps, batch size, learning rate: half an hour in all on a large GPU
    "vae": (8000, 32, 1.5e-3),
    "audio_vae": (3000, 16, 1.5e-3),
    "vocoder": (5000, 16, 1.5e-3),
    "dit": (10000, 128, 4e-3),
}


@dataclasses.dataclass
class Run:
    """Options of a run: folder of checkpoints, device, processes, recipe changes."""

    work: Path
    device: str
    workers: int
    steps: int | None
    batch: int | None
    clips: int
    rank: int
    ranks: int

    def recipe(self, stage: str) -> tuple[int, int, float]:
        steps, batch, rate = RECIPES[stage]
        return self.steps or steps, self.batch or batch, rate

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16)


class Muon(torch.optim.Optimizer):
    """Muon (orthogonalized momentum) for matrices and kernels, Adam for everything else.

    The Muon step is scaled to the size of an Adam step, so that one learning rate fits both.
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @staticmethod
    def orthogonal(g: torch.Tensor) -> torch.Tensor:
        """Newton-Schulz; kernels in groups of 64 rows, which is cheaper for upsamplers."""
        groups = len(g) // 64 if g.ndim > 2 and len(g) % 64 == 0 else 1
        x = g.reshape(groups, len(g) // groups, -1).bfloat16()
        wide = x.shape[1] <= x.shape[2]
        x = x if wide else x.mT.contiguous()
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = 0.2 * max(x.shape[1:]) ** 0.5 * x.float()
        return (x if wide else x.mT).reshape(g.shape)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                matrix = p.ndim >= 2 and min(p.flatten(1).shape) >= 16
                state = self.state[p]
                if "m" not in state:
                    state.update(step=0, m=torch.zeros_like(p))
                    state.update({} if matrix else dict(v=torch.zeros_like(p)))
                state["step"] += 1
                if matrix:
                    state["m"].mul_(group["momentum"]).add_(p.grad)
                    update = self.orthogonal(p.grad + group["momentum"] * state["m"])
                else:
                    state["m"].lerp_(p.grad, 0.1)
                    state["v"].lerp_(p.grad.square(), 0.01)
                    n = state["step"]
                    v = (state["v"] / (1 - 0.99**n)).sqrt() + 1e-8
                    update = state["m"] / (1 - 0.9**n) / v
                p.sub_(group["lr"] * update)


class Batches(torch.utils.data.Dataset):
    """The batches that `batch_at` draws for step numbers."""

    def __init__(self, stage, batch_at, steps, rank=0):
        self.seed, self.batch_at, self.steps = (
            [sum(stage.encode()), rank],
            batch_at,
            steps,
        )

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        rng = np.random.default_rng([SEED, step] + self.seed)
        return self.batch_at(step, rng)


def fit(run: Run, stage: str, module, batch_at, loss_of):
    """Muon with warm-up and cosine decay; resumes from and saves to work/stage.pt."""
    steps, _, rate = run.recipe(stage)
    module.to(run.device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = Muon(parameters, lr=rate)
    path, start = run.work / f"{stage}.pt", 0
    if path.exists():
        saved = torch.load(path, map_location=run.device)
        module.load_state_dict(saved["module"])
        if len(saved["optimizer"]["state"]) == len(parameters):
            optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    batches = torch.utils.data.DataLoader(
        Batches(stage, batch_at, steps, run.rank),
        batch_size=None,
        sampler=range(start, steps),
        num_workers=run.workers,
    )
    total, count, since = {}, 0, time.time()
    for step, batch in zip(range(start, steps), batches):
        batch = {
            k: v.to(run.device) if isinstance(v, torch.Tensor) else v
            for k, v in batch.items()
        }
        warm = min(1.0, (step + 1) / 50)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * decay
        torch.manual_seed(SEED + step * run.ranks + run.rank)
        losses = loss_of(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        if run.ranks > 1:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            gradients = [p.grad for p in parameters]
            flat = torch.nn.utils.parameters_to_vector(gradients)
            torch.distributed.all_reduce(flat)
            torch.nn.utils.vector_to_parameters(flat / run.ranks, gradients)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        count += 1
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + value.detach()
        if run.rank == 0 and (time.time() - since > 60 or step + 1 == steps):
            figures = " ".join(f"{k} {v.item() / count:.5f}" for k, v in total.items())
            pace = (time.time() - since) / count
            line = f"{stage} step {step + 1}/{steps} {figures} {pace:.3f} s/step"
            print(line, flush=True)
            with open(run.work / "train.log", "a") as log:
                log.write(line + "\n")
            state = dict(module=module.state_dict(), optimizer=optimizer.state_dict())
            torch.save(dict(state, step=step + 1), path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
            total, count, since = {}, 0, time.time()


class Denoiser(torch.nn.Module):
    """The modules of the last stage: text projection, connectors and transformer."""

    def __init__(self):
        super().__init__()
        section = TEXT["text_config"]
        self.transformer = model.Transformer(CONFIG["transformer"])
        self.projection = model.TextProjection(
            section["hidden_size"],
            section["num_hidden_layers"] + 1,
            self.transformer.c["width"],
            self.transformer.c["audio_width"],
        )


MODULES = {
    "vae": lambda: model.VideoVAE(CONFIG["vae"]),
    "audio_vae": lambda: model.AudioVAE(CONFIG["audio_vae"]),
    "vocoder": lambda: model.Vocoder(CONFIG["vocoder"]),
    "dit": Denoiser,
}


def load(run: Run, stage: str) -> torch.nn.Module:
    """A trained stage, frozen."""
    module = MODULES[stage]()
    saved = torch.load(run.work / f"{stage}.pt", map_location="cpu")
    module.load_state_dict(saved["module"])
    return module.requires_grad_(False).eval().to(run.device)


def to_video(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (B, F, H, W, 3) to float (B, 3, F, H, W) in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_vae(run: Run):
    """On single frames, then nine frames of a crop, then full clips; with noise on latents.

    The encoder is frozen once latents have been computed with it.
    """
    steps, size, _ = run.recipe("vae")
    vae = MODULES["vae"]()
    vae.encoder.requires_grad_(not any(run.work.glob("latents-*.pt")))

    def batch_at(step, rng):
        still, whole = step < 0.15 * steps, step >= 0.8 * steps
        clips = []
        for _ in range(size * 6 if still else max(1, size // 3) if whole else size):
            length = 1 if still else 25 if whole else 9
            first = rng.integers(26 - length)
            clip = data.render(data.sample_scene(rng), range(first, first + length))
            if not whole:
                top, left = rng.integers(0, data.SIZE - 63, 2)
                clip = clip[:, top : top + 64, left : left + 64]
            clips.append(clip)
        return dict(frames=np.stack(clips))

    def loss_of(batch):
        video = to_video(batch["frames"])
        background = video.flatten(2).median(-1).values[:, :, None, None, None]
        shape = (video - background).abs().amax(1, keepdim=True) > 0.05
        with run.autocast():
            latents = vae.encoder(video)
            decoded = vae.decoder(latents + 0.1 * torch.randn_like(latents)).float()
        difference = decoded - video
        error = difference.abs() * (1 + 3 * shape)
        return dict(
            l1=error.mean(),
            mse=4 * (error * difference.abs()).mean(),
            edges=sum(difference.diff(dim=axis).abs().mean() for axis in (3, 4)),
            size=1e-3 * latents.float().square().mean(),
        )

    fit(run, "vae", vae, batch_at, loss_of)


def waves(scenes: list[data.Scene], rate: int) -> np.ndarray:
    """The scenes' sound, (B, 2, samples)."""
    return np.stack([data.sound(scene, rate).T for scene in scenes])


def mels(at_16k: torch.Tensor) -> torch.Tensor:
    """Log-mels (B, 2, MEL_FRAMES, 64) of waveforms (B, 2, samples)."""
    return model.log_mel(at_16k)[:, :, :MEL_FRAMES]


def side(stereo: torch.Tensor) -> torch.Tensor:
    """Left minus right, which is only the panning: other losses give it little weight."""
    return stereo[:, 0] - stereo[:, 1]


def train_audio_vae(run: Run):
    vae, size = MODULES["audio_vae"](), run.recipe("audio_vae")[1]

    def batch_at(step, rng):
        return dict(at_16k=waves([data.sample_scene(rng) for _ in range(size)], 16000))

    def loss_of(batch):
        mel = mels(batch["at_16k"])
        with run.autocast():
            latents = vae.tokens(mel)
            decoded = vae.mel(latents + 0.1 * torch.randn_like(latents))
        difference = decoded.float() - mel
        return dict(
            l1=difference.abs().mean(),
            side=2 * side(difference).abs().mean(),
            size=1e-3 * latents.float().square().mean(),
        )

    fit(run, "audio_vae", vae, batch_at, loss_of)


def spectral_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Difference of linear and log magnitudes at three resolutions; waves (B, samples)."""
    total = 0.0
    for n in (512, 1024, 2048):
        window = torch.hann_window(n, device=a.device)
        x, y = (
            torch.stft(w, n, n // 4, window=window, return_complex=True).abs() / n**0.5
            for w in (a, b)
        )
        logarithms = torch.log(x + 1e-3) - torch.log(y + 1e-3)
        total += (x - y).abs().mean() + 0.1 * logarithms.abs().mean()
    return total


def train_vocoder(run: Run):
    """On mels of the data and on mels that the audio VAE decodes from noisy latents."""
    vae, vocoder = load(run, "audio_vae"), MODULES["vocoder"]()
    size = run.recipe("vocoder")[1]

    def batch_at(step, rng):
        scenes = [data.sample_scene(rng) for _ in range(size)]
        target = waves(scenes, 24000)[:, :, : MEL_FRAMES * 240]
        return dict(at_16k=waves(scenes, 16000), target=target)

    def loss_of(batch):
        mel, target, true = mels(batch["at_16k"]), batch["target"], size // 4
        with run.autocast():
            with torch.no_grad():
                latents = vae.tokens(mel[true:])
                noisy = latents + 0.15 * torch.randn_like(latents)
                mel = torch.cat([mel[:true], vae.mel(noisy).float()])
            made = vocoder(mel).float()
        return dict(
            l1=10 * (made - target).abs().mean(),
            spectrum=spectral_distance(made.flatten(0, 1), target.flatten(0, 1)),
        )

    fit(run, "vocoder", vocoder, batch_at, loss_of)


def make_text_encoder(run: Run):
    """A tokenizer for the captions' words and a small Gemma 3 with random weights."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder = run.work / "text_encoder"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(SEED)
    captions = [
        data.caption(data.sample_scene(rng), rng, i % 5 == 0) for i in range(20000)
    ]
    tokenizer = Tokenizer(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<image_soft_token>"]
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=TEXT["text_config"]["vocab_size"],
            special_tokens=special + [f"<0x{i:02X}>" for i in range(256)],
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    described = dict(
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=True,
        add_eos_token=False,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    (folder / "config.json").write_text(json.dumps(TEXT, indent=1))
    torch.manual_seed(SEED)
    tensors = {}
    names = Gemma3ForConditionalGeneration(Gemma3Config(**TEXT)).state_dict()
    for name, p in names.items():
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
            random = torch.randn(p.shape) / p.shape[-1] ** 0.5
            tensors[name] = (random if p.ndim == 2 else torch.zeros(p.shape)).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TextEncoder:
    """Captions to token ids (B, T), padded on the right, their lengths, and hidden states."""

    def __init__(self, run: Run):
        from tokenizers import Tokenizer
        from transformers import Gemma3TextConfig, Gemma3TextModel

        folder = run.work / "text_encoder"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        section = dict(TEXT["text_config"])
        theta, local = section.pop("rope_theta"), section.pop("rope_local_base_freq")
        section["rope_parameters"] = {
            "full_attention": dict(section.pop("rope_scaling"), rope_theta=theta),
            "sliding_attention": dict(rope_type="default", rope_theta=local),
        }
        self.model = Gemma3TextModel(Gemma3TextConfig(**section)).eval()
        tensors = load_file(folder / "model.safetensors")
        prefix = "language_model.model."
        tensors = {k.removeprefix(prefix): v.float() for k, v in tensors.items()}
        self.model.load_state_dict(tensors)
        self.model.to(run.device)

    def tokenize(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [self.tokenizer.encode(caption.strip()).ids for caption in captions]
        longest = max(map(len, ids))
        rows = np.array([row + [0] * (longest - len(row)) for row in ids])
        return rows, np.array([len(row) for row in ids])

    @torch.no_grad()
    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """All hidden states (B, T, D, layers + 1)."""
        return torch.stack(self.model(ids, output_hidden_states=True).hidden_states, -1)


def make_latents(run: Run):
    """Encode clips to tokens, in shards; several processes may share the work."""
    vae, audio_vae = load(run, "vae"), load(run, "audio_vae")

    def batch_at(step, rng):
        scenes = [data.sample_scene(rng) for _ in range(SHARD)]
        return dict(
            frames=np.stack([data.render(scene) for scene in scenes]),
            at_16k=waves(scenes, 16000),
            scenes=[dataclasses.asdict(scene) for scene in scenes],
        )

    paths = [run.work / f"latents-{shard:02}.pt" for shard in range(SHARDS)]
    missing = [i for i in np.random.permutation(SHARDS) if not paths[i].exists()]
    batches = torch.utils.data.DataLoader(
        Batches("latents", batch_at, SHARDS),
        batch_size=None,
        sampler=missing,
        num_workers=run.workers,
    )
    for shard, batch in zip(missing, batches):
        if paths[shard].exists():
            continue
        video, audio = [], []
        with torch.no_grad(), run.autocast():
            for i in range(0, SHARD, 8):
                frames = to_video(batch["frames"][i : i + 8].to(run.device))
                mel = mels(batch["at_16k"][i : i + 8].to(run.device))
                video.append(
                    vae.encoder(frames).float().flatten(2).transpose(1, 2).cpu()
                )
                audio.append(audio_vae.tokens(mel).float().cpu())
        tokens = dict(video=torch.cat(video), audio=torch.cat(audio))
        torch.save(dict(tokens, scenes=batch["scenes"]), paths[shard])
        print(paths[shard], flush=True)


def load_latents(run: Run):
    """Normalized video tokens, audio tokens and their scenes; the two sets of statistics."""
    shards = [
        torch.load(path, weights_only=False)
        for path in sorted(run.work.glob("latents-*.pt"))
    ]
    video, audio = (torch.cat([s[name] for s in shards]) for name in ("video", "audio"))
    measured = [model.Statistics(x.shape[-1], 2) for x in (video, audio)]
    path = run.work / "statistics.pt"
    if not path.exists():
        for statistics, x in zip(measured, (video, audio)):
            statistics.measure(x)
        torch.save([statistics.state_dict() for statistics in measured], path)
    for statistics, state in zip(measured, torch.load(path)):
        statistics.load_state_dict(state)
    scenes = [data.Scene(**scene) for shard in shards for scene in shard["scenes"]]
    return measured[0].normalize(video), measured[1].normalize(audio), scenes, measured


def context_rows(rng: np.random.Generator, real: int, sampled: int, length: float):
    """Positions 0..real-1 and `sampled` of the others, which stand for all up to `length`.

    Each sampled row gets the logarithm of the number of rows that it stands for as a bias
    on its attention logits: an estimate of the softmax over all rows at a fraction of the
    cost.
    """
    edges = np.linspace(real, CONTEXT, sampled + 1)
    far = np.floor(rng.uniform(edges[:-1], edges[1:])).astype(int)
    bias = np.zeros(real + sampled, np.float32)
    bias[real:] = math.log((length - real) / sampled)
    return np.concatenate([np.arange(real), far]), bias


def contexts(denoiser: Denoiser, states, lengths, rows, bias):
    """The contexts of the two streams."""
    t = denoiser.transformer
    connectors = t.video_embeddings_connector, t.audio_embeddings_connector
    return [
        connector(features, lengths, rows, bias)
        for connector, features in zip(connectors, denoiser.projection(states))
    ]


def train_dit(run: Run):
    """Rectified flow on the latents.

    The registers' total weight grows to that of 1024 rows, because it would hide the words
    at first; the last steps use the complete context.
    One caption in ten is empty, one batch in four keeps its clean first latent frames, one
    clip in eight its clean sound; one batch in eight has no cross-modal attention.
    """
    video, audio, scenes, _ = load_latents(run)
    encoder, denoiser = TextEncoder(run), Denoiser()
    steps, full_size, _ = run.recipe("dit")
    # The motions that are learned last are drawn twice as often.
    odds = np.array([1 + (s.motion in ("growing", "bouncing")) for s in scenes])
    odds = odds / odds.sum()

    def batch_at(step, rng):
        whole = step >= 0.93 * steps
        size = max(4, full_size // 4) if whole else full_size
        chosen = rng.choice(len(scenes), size, p=odds)
        captions = [
            "" if rng.random() < 0.1 else data.caption(scenes[i], rng) for i in chosen
        ]
        ids, lengths = encoder.tokenize(captions)
        growth = min(1.0, step / (0.4 * steps))
        rows, bias = np.arange(CONTEXT), np.zeros(CONTEXT, np.float32)
        if not whole:
            length = 64 * (CONTEXT / 64) ** growth
            rows, bias = context_rows(rng, ids.shape[1], 24, length)
        u = rng.random(size)
        shifted, listed = (
            6 * u / (1 + 5 * u),
            np.array(SCHEDULE)[rng.integers(8, size=size)],
        )
        # If no token of the batch is masked, one timestep per sample is cheaper.
        mask_v = np.ones((size, 36 if rng.random() < 0.25 else 1), np.float32)
        mask_v[:, : mask_v.shape[1] // 4] = 0
        mask_a = (rng.random((size, 1)) > 0.125).astype(np.float32)
        return dict(
            clean_v=video[chosen],
            clean_a=audio[chosen],
            ids=ids,
            lengths=lengths,
            rows=rows,
            bias=bias,
            sigma=np.where(rng.random(size) < 0.5, shifted, listed).astype(np.float32),
            mask_v=mask_v,
            mask_a=mask_a,
            crossed=rng.random() > 0.125,
        )

    def loss_of(batch):
        sigma, streams, targets, masks = batch["sigma"], [], [], []
        bias = batch["bias"] if batch["bias"].any() else None
        with run.autocast():
            both = contexts(
                denoiser,
                encoder.states(batch["ids"]),
                batch["lengths"],
                batch["rows"],
                bias,
            )
            for kind, context, positions in zip(
                "va", both, (VIDEO_POSITIONS, AUDIO_POSITIONS)
            ):
                clean, mask = batch[f"clean_{kind}"], batch[f"mask_{kind}"]
                noise, t = torch.randn_like(clean), sigma[:, None] * mask
                streams.append(
                    dict(
                        x=torch.lerp(clean, noise, t[..., None]),
                        t=t,
                        sigma=t.amax(1),
                        context=context,
                        bias=bias,
                        positions=positions.to(run.device),
                    )
                )
                targets.append(noise - clean)
                masks.append(mask)
            velocities = denoiser.transformer(*streams, crossed=bool(batch["crossed"]))
        losses = {}
        for name, v, target, mask in zip(
            ("video", "audio"), velocities, targets, masks
        ):
            error = (v - target).square().mean(-1)
            mask = mask.expand_as(error)
            losses[name] = (error * mask).sum() / mask.sum().clamp(min=1)
        return losses

    fit(run, "dit", denoiser, batch_at, loss_of)


def autoencoders(run: Run):
    """Both autoencoders with the statistics that their latents had in training."""
    pair = load(run, "vae"), load(run, "audio_vae")
    for module, statistics in zip(pair, load_latents(run)[3]):
        module.per_channel_statistics.load_state_dict(statistics.state_dict())
    return pair


@torch.no_grad()
def sample(run, denoiser, encoder, captions, seed, first=None):
    """Normalized video and audio tokens by Euler steps; `first` are clean first frames."""
    ids, lengths = (
        torch.from_numpy(x).to(run.device) for x in encoder.tokenize(captions)
    )
    rows = torch.arange(CONTEXT, device=run.device)
    both = contexts(denoiser, encoder.states(ids), lengths, rows, None)
    positions = VIDEO_POSITIONS.to(run.device), AUDIO_POSITIONS.to(run.device)
    generator = torch.Generator().manual_seed(seed)
    xs = [
        torch.randn(len(captions), p.shape[1], 64, generator=generator).to(run.device)
        for p in positions
    ]
    masks = [torch.ones(x.shape[:2], device=run.device) for x in xs]
    if first is not None:
        xs[0][:, :9], masks[0][:, :9] = first, 0
    for now, after in zip(SCHEDULE, SCHEDULE[1:] + [0.0]):
        sigma = torch.full((len(captions),), now, device=run.device)
        streams = [
            dict(x=x, t=now * mask, sigma=sigma, context=c, bias=None, positions=p)
            for x, mask, c, p in zip(xs, masks, both, positions)
        ]
        velocities = denoiser.transformer(*streams)
        xs = [
            x + (after - now) * v * m[..., None]
            for x, v, m in zip(xs, velocities, masks)
        ]
    return xs


@torch.no_grad()
def evaluate(run: Run):
    """Evaluate clips with unseen wordings and seeds, and the autoencoders on the data."""
    (vae, audio_vae), vocoder = autoencoders(run), load(run, "vocoder")
    denoiser, encoder = load(run, "dit"), TextEncoder(run)
    rng = np.random.default_rng(SEED + 1)
    right, size = {}, 8
    total = math.ceil(run.clips / size) * size
    for start in range(0, total, size):
        scenes = [data.sample_scene(rng) for _ in range(size)]
        captions = [data.caption(scene, rng, unseen=True) for scene in scenes]
        frames = np.stack([data.render(scene) for scene in scenes])
        video = to_video(torch.from_numpy(frames).to(run.device))
        mel = mels(torch.from_numpy(waves(scenes, 16000)).to(run.device))
        x = vae.per_channel_statistics.normalize(vae.encoder(video))
        x = x.flatten(2).transpose(1, 2)
        y = audio_vae.per_channel_statistics.normalize(audio_vae.tokens(mel))
        for kind, (seen, heard) in dict(
            truth=(x, y),
            text=sample(run, denoiser, encoder, captions, SEED + start),
            image=sample(run, denoiser, encoder, captions, SEED + start, x[:, :9]),
        ).items():
            seen = seen.transpose(1, 2).unflatten(2, (4, 3, 3))
            decoded = vae.decoder(vae.per_channel_statistics.denormalize(seen))
            mel = audio_vae.mel(audio_vae.per_channel_statistics.denormalize(heard))
            sounds = vocoder(mel).transpose(1, 2).cpu().numpy()
            pixels = ((decoded + 1) * 127.5).round().clamp(0, 255).byte()
            pixels = pixels.permute(0, 2, 3, 4, 1).cpu().numpy()
            error = (decoded[:, :, 0] - video[:, :, 0]).square().mean((1, 2, 3)) / 4
            decibels = (-10 * error.log10()).sum().item()
            key = f"{kind} first frame dB"
            right[key] = right.get(key, 0) + decibels
            for i, scene in enumerate(scenes):
                found = judge(pixels[i], sounds[i], 24000)
                for name in ("colour", "shape", "motion", "background", "pitch"):
                    key = f"{kind} {name}"
                    right[key] = right.get(key, 0) + (
                        found[name] == getattr(scene, name)
                    )
    lines = [f"{key}: {value / total:.3f}" for key, value in right.items()]
    print(f"{total} clips of unseen wordings", *lines, sep="\n", flush=True)


def export(run: Run):
    """The official single-file layout, bfloat16, next to the text encoder's folder."""
    modules = dict(zip(("vae", "audio_vae"), autoencoders(run)))
    denoiser, vocoder = load(run, "dit"), load(run, "vocoder")
    modules["model.diffusion_model"] = denoiser.transformer
    modules["text_embedding_projection"] = denoiser.projection
    tensors = {
        f"{prefix}.{name}": tensor.bfloat16().contiguous().cpu()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    } | {f"vocoder.{k}": x.bfloat16() for k, x in vocoder.both_ears().items()}
    config = {k: v for k, v in CONFIG.items() if k != "text_encoder"}
    metadata = dict(format="pt", model_version="2.3.0", config=json.dumps(config))
    path = run.work / "ltx-2.3-demo-distilled.safetensors"
    save_file(tensors, path, metadata=metadata)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


STAGES = {
    "vae": train_vae,
    "audio_vae": train_audio_vae,
    "vocoder": train_vocoder,
    "text": make_text_encoder,
    "latents": make_latents,
    "dit": train_dit,
    "evaluate": evaluate,
    "export": export,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=list(STAGES), metavar="stage")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and logs")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that draw batches"
    )
    parser.add_argument("--steps", type=int, help="replaces the recipe's")
    parser.add_argument("--batch", type=int, help="replaces the recipe's")
    parser.add_argument(
        "--clips", type=int, default=96, help="number of clips to evaluate"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that share a batch"
    )
    parser.add_argument("--rank", type=int, default=0, help="rank of this process")
    given = vars(parser.parse_args())
    torch.set_num_threads(given.pop("threads"))
    stages = given.pop("stages")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"unknown stage {unknown[0]}: choose from {', '.join(STAGES)}")
    given["work"].mkdir(parents=True, exist_ok=True)
    if given["ranks"] > 1:
        torch.distributed.init_process_group(
            "gloo",
            "tcp://127.0.0.1:29517",
            rank=given["rank"],
            world_size=given["ranks"],
        )
    for stage in stages:
        STAGES[stage](Run(**given))


if __name__ == "__main__":
    main()
