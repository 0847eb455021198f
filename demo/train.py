"""Train the demo's autoencoders and vocoder: python demo/train.py --work DIR [stage ...]

It also makes the text encoder; transformer.py trains the rest. The stages run in order,
all of them by default; each saves a checkpoint about every minute and resumes from it. A
batch depends only on (SEED, stage, step).
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
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import data, model

SEED = 2026
CONFIG = json.loads((Path(__file__).parent / "config.json").read_text())
TEXT = CONFIG["text_encoder"]
AUDIO_TOKENS = round(data.FRAMES / data.FPS * 25)
MEL_FRAMES = 4 * AUDIO_TOKENS - 3
SHARDS = 64  # of 8 clips, whose latents are measured
RECIPES = {  # steps, batch size, learning rate: half an hour in all on a large GPU
    "vae": (8000, 32, 1.5e-3),
    "audio_vae": (3000, 16, 1.5e-3),
    "vocoder": (5000, 16, 1.5e-3),
}


@dataclasses.dataclass
class Run:
    """Options of a run: folder of checkpoints, device, recipe changes."""

    work: Path
    device: str
    workers: int
    steps: int | None
    batch: int | None

    @property
    def statistics(self) -> Path:
        return self.work / "statistics.pt"

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

    def __init__(self, stage, batch_at):
        self.seed, self.batch_at = sum(stage.encode()), batch_at

    def __getitem__(self, step):
        rng = np.random.default_rng([SEED, step, self.seed])
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
        Batches(stage, batch_at),
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
        torch.manual_seed(SEED + step)
        losses = loss_of(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        count += 1
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + value.detach()
        if time.time() - since > 60 or step + 1 == steps:
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


MODULES = {
    "vae": lambda: model.VideoVAE(CONFIG["vae"]),
    "audio_vae": lambda: model.AudioVAE(CONFIG["audio_vae"]),
    "vocoder": lambda: model.Vocoder(CONFIG["vocoder"]),
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

    The encoder is frozen once statistics of its latents have been measured.
    """
    steps, size, _ = run.recipe("vae")
    vae = MODULES["vae"]()
    vae.encoder.requires_grad_(not run.statistics.exists())

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


def measure_statistics(run: Run):
    """Mean and standard deviation of each latent channel, over clips of the data."""
    vae, audio_vae = load(run, "vae"), load(run, "audio_vae")
    found = {"video": [], "audio": []}
    for n in range(SHARDS):
        rng = np.random.default_rng([SEED, n])
        scenes = [data.sample_scene(rng) for _ in range(8)]
        frames = torch.from_numpy(np.stack([data.render(scene) for scene in scenes]))
        mel = mels(torch.from_numpy(waves(scenes, 16000)).to(run.device))
        with torch.no_grad(), run.autocast():
            video = vae.encoder(to_video(frames.to(run.device))).float().flatten(2)
            found["video"].append(video.transpose(1, 2).cpu())
            found["audio"].append(audio_vae.tokens(mel).float().cpu())
    measured = [model.Statistics(x[0].shape[-1], 2) for x in found.values()]
    for statistics, x in zip(measured, found.values()):
        statistics.measure(torch.cat(x))
    torch.save([statistics.state_dict() for statistics in measured], run.statistics)


def export(run: Run):
    """The autoencoders and the vocoder in the official single-file layout, bfloat16."""
    modules = {name: load(run, name) for name in ("vae", "audio_vae")}
    for module, state in zip(modules.values(), torch.load(run.statistics)):
        module.per_channel_statistics.load_state_dict(state)
    tensors = {
        f"{prefix}.{name}": tensor.bfloat16().contiguous().cpu()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    vocoder = load(run, "vocoder").both_ears()
    tensors |= {f"vocoder.{k}": x.bfloat16() for k, x in vocoder.items()}
    config = {k: v for k, v in CONFIG.items() if k != "text_encoder"}
    metadata = dict(format="pt", model_version="2.3.0", config=json.dumps(config))
    save_file(tensors, run.work / "autoencoders.safetensors", metadata=metadata)


STAGES = {
    "vae": train_vae,
    "audio_vae": train_audio_vae,
    "vocoder": train_vocoder,
    "text": make_text_encoder,
    "statistics": measure_statistics,
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
    given = vars(parser.parse_args())
    torch.set_num_threads(given.pop("threads"))
    stages = given.pop("stages")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"unknown stage {unknown[0]}: choose from {', '.join(STAGES)}")
    given["work"].mkdir(parents=True, exist_ok=True)
    for stage in stages:
        STAGES[stage](Run(**given))


if __name__ == "__main__":
    main()
