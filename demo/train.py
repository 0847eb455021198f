"""Train the demo model from nothing: python demo/train.py [stage ...], all of them by default.

The stages run in order; each writes a checkpoint to --work every few hundred steps and goes
on from it when started again. Every batch is drawn from (SEED, stage, step) alone.
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
VAE = {
    "_class_name": "CausalVideoAutoencoder",
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 64,
    "encoder_blocks": [
        ["res_x", {"num_layers": 1}],
        ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 1}],
        ["compress_time_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 2, "inject_noise": False}],
        ["compress_all", {"residual": True, "multiplier": 1}],
        ["res_x", {"num_layers": 1, "inject_noise": False}],
        ["compress_all", {"residual": True, "multiplier": 2}],
        ["res_x", {"num_layers": 1, "inject_noise": False}],
        ["compress_all", {"residual": True, "multiplier": 1}],
        ["res_x", {"num_layers": 1, "inject_noise": False}],
    ],
    "scaling_factor": 1.0,
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "causal_decoder": False,
    "timestep_conditioning": False,
    "normalize_latent_channels": False,
    "encoder_base_channels": 32,
    "decoder_base_channels": 8,
    "spatial_padding_mode": "zeros",
}
AUDIO_VAE = {
    "model": {
        "params": {
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 4,
                "resolution": 256,
                "downsample_time": False,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 16,
                "ch_mult": [1, 2, 4],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
            "sampling_rate": 16000,
        }
    },
    "preprocessing": {
        "audio": {
            "sampling_rate": 16000,
            "max_wav_value": 32768.0,
            "duration": 5.12,
            "stereo": True,
            "causal_padding": 3,
        },
        "stft": {
            "filter_length": 1024,
            "hop_length": 160,
            "win_length": 1024,
            "causal": True,
        },
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}
VOCODER = {
    "upsample_initial_channel": 128,
    "resblock": "1",
    "upsample_rates": [8, 6, 5],
    "resblock_kernel_sizes": [3, 7],
    "upsample_kernel_sizes": [16, 12, 15],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    "stereo": True,
}


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices and kernels, Adam for everything else.

    The orthogonal step is scaled to the size of an Adam step, so that one rate serves both.
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @staticmethod
    def orthogonal(g: torch.Tensor) -> torch.Tensor:
        """Newton-Schulz; kernels in groups of 64 rows, so that an upsampler's cost less."""
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
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                if p.ndim >= 2 and min(p.flatten(1).shape) >= 16:
                    state["m"].mul_(group["momentum"]).add_(p.grad)
                    update = self.orthogonal(p.grad + group["momentum"] * state["m"])
                else:
                    state["m"].lerp_(p.grad, 0.1)
                    state["v"].lerp_(p.grad.square(), 0.01)
                    n = state["step"]
                    v = (state["v"] / (1 - 0.99**n)).sqrt() + 1e-8
                    update = state["m"] / (1 - 0.9**n) / v
                p.sub_(group["lr"] * update)


def fit(stage, module, loss_at, steps, rate, work: Path, report=50):
    """Muon with warm-up and cosine decay; resumes from and saves to work/stage.pt."""
    torch.manual_seed(SEED)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = Muon(parameters, lr=rate)
    path, start = work / f"{stage}.pt", 0
    if path.exists():
        saved = torch.load(path)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    total, since = {}, time.time()
    for step in range(start, steps):
        warm = min(1.0, (step + 1) / 50)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * decay
        torch.manual_seed(SEED + step)
        losses = loss_at(step, np.random.default_rng((SEED, sum(stage.encode()), step)))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, value in losses.items():
            total[name] = total.get(name, 0.0) + value.item() / report
        if (step + 1) % report == 0 or step + 1 == steps:
            figures = " ".join(f"{k} {v:.5f}" for k, v in total.items())
            line = (
                f"{stage} step {step + 1}/{steps} {figures} {time.time() - since:.0f}s"
            )
            print(line, flush=True)
            with open(work / "train.log", "a") as log:
                log.write(line + "\n")
            total, since = {}, time.time()
            state = dict(
                module=module.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)


TEXT = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": 1,
    "image_token_index": 4,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rms_norm_eps": 1e-06,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "image_size": 28,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 7,
        "vision_use_head": False,
    },
}
TRANSFORMER = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 32,
    "attention_type": "default",
    "caption_channels": 128,
    "cross_attention_dim": 192,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 64,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "num_attention_heads": 6,
    "num_embeds_ada_norm": 1000,
    "num_layers": 4,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "out_channels": 64,
    "upcast_attention": False,
    "use_linear_projection": False,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "timestep_scale_multiplier": 1000,
    "av_ca_timestep_scale_multiplier": 1000.0,
    "causal_temporal_positioning": True,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 32,
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "audio_in_channels": 64,
    "audio_out_channels": 64,
    "audio_cross_attention_dim": 128,
    "audio_positional_embedding_max_pos": [20],
    "av_cross_ada_norm": True,
    "use_embeddings_connector": True,
    "connector_attention_head_dim": 32,
    "connector_num_attention_heads": 6,
    "connector_num_layers": 1,
    "connector_positional_embedding_max_pos": [4096],
    "connector_num_learnable_registers": 128,
    "connector_norm_output": True,
    "use_middle_indices_grid": True,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "apply_gated_attention": True,
    "connector_apply_gated_attention": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "connector_learnable_registers_std": 1,
    "caption_proj_before_connector": True,
    "audio_connector_attention_head_dim": 32,
    "audio_connector_num_attention_heads": 4,
    "cross_attention_adaln": True,
    "text_encoder_norm_type": "per_token_rms",
}
SCHEDULE = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]


class Denoiser(torch.nn.Module):
    """What the last stage trains: text projection, connectors and transformer."""

    def __init__(self):
        super().__init__()
        section = TEXT["text_config"]
        self.projection = model.TextProjection(
            section["hidden_size"], section["num_hidden_layers"] + 1, 192, 128
        )
        self.transformer = model.Transformer(TRANSFORMER)


MODULES = {
    "dit": Denoiser,
    "vae": lambda: model.VideoVAE(VAE),
    "audio_vae": lambda: model.AudioVAE(AUDIO_VAE),
    "vocoder": lambda: model.Vocoder(VOCODER),
}


def load(work: Path, stage: str) -> torch.nn.Module:
    """A trained stage, frozen."""
    module = MODULES[stage]()
    module.load_state_dict(torch.load(work / f"{stage}.pt")["module"])
    return module.requires_grad_(False).eval()


def to_video(frames: np.ndarray) -> torch.Tensor:
    """uint8 (B, F, H, W, 3) to float (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


VAE_STEPS, VAE_STILL, VAE_WHOLE = 1500, 720, 80


def train_vae(work: Path):
    """Single frames first, then nine of a corner, whole clips last; noise on the latents."""
    vae = model.VideoVAE(VAE)

    def loss_at(step, rng):
        still, whole = step < VAE_STILL, step >= VAE_STEPS - VAE_WHOLE
        size, length = (20, 1) if still else (1, 25) if whole else (3, 9)
        clips = []
        for _ in range(size):
            first = rng.integers(26 - length)
            clip = data.render(data.sample_scene(rng), range(first, first + length))
            if not whole:
                top, left = rng.integers(0, data.SIZE - 63, 2)
                clip = clip[:, top : top + 64, left : left + 64]
            clips.append(clip)
        video = to_video(np.stack(clips))
        background = video.flatten(2).median(-1).values[:, :, None, None, None]
        shape = (video - background).abs().amax(1, keepdim=True) > 0.05
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encoder(video)
            noisy = latents + 0.1 * torch.randn_like(latents)
            decoded = vae.decoder(noisy)
        error = (decoded.float() - video).abs() * (1 + 3 * shape)
        return dict(
            l1=error.mean(),
            mse=4 * (error * (decoded.float() - video).abs()).mean(),
            size=1e-3 * latents.float().square().mean(),
        )

    fit("vae", vae, loss_at, VAE_STEPS, 1.5e-3, work)


AUDIO_TOKENS = round(data.FRAMES / data.FPS * 25)
MEL_FRAMES = 4 * AUDIO_TOKENS - 3


def mels(scenes: list[data.Scene]) -> torch.Tensor:
    """Log-mels (B, 2, MEL_FRAMES, 64) of the scenes' sound."""
    waves = np.stack([data.sound(scene, 16000) for scene in scenes])
    return model.log_mel(torch.from_numpy(waves).transpose(1, 2))[:, :, :MEL_FRAMES]


def train_audio_vae(work: Path):
    vae = model.AudioVAE(AUDIO_VAE)

    def loss_at(step, rng):
        mel = mels([data.sample_scene(rng) for _ in range(4)])
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.tokens(mel)
            decoded = vae.mel(latents + 0.1 * torch.randn_like(latents))
        return dict(
            l1=(decoded.float() - mel).abs().mean(),
            size=1e-3 * latents.float().square().mean(),
        )

    fit("audio_vae", vae, loss_at, 1400, 1.5e-3, work)


def spectral_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Difference of linear and log magnitudes at three resolutions; waves (B, samples)."""
    total = 0.0
    for n in (512, 1024, 2048):
        x, y = (
            torch.stft(w, n, n // 4, window=torch.hann_window(n), return_complex=True)
            .abs()
            .div(n**0.5)
            for w in (a, b)
        )
        total += (x - y).abs().mean() + 0.1 * (
            torch.log(x + 1e-3) - torch.log(y + 1e-3)
        ).abs().mean()
    return total


def train_vocoder(work: Path):
    """From true mels and from those the audio VAE makes of slightly noisy latents."""
    vae = load(work, "audio_vae")
    vocoder = model.Vocoder(VOCODER)

    def loss_at(step, rng):
        scenes = [data.sample_scene(rng) for _ in range(4)]
        mel = mels(scenes)
        waves = np.stack([data.sound(s, 24000)[: MEL_FRAMES * 240] for s in scenes])
        waves = torch.from_numpy(waves).transpose(1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.tokens(mel[1:])
                noisy = latents + 0.15 * torch.randn_like(latents)
                mel = torch.cat([mel[:1], vae.mel(noisy).float()])
            made = vocoder(mel).float()
        return dict(
            l1=10 * (made - waves).abs().mean(),
            spectrum=spectral_distance(made.flatten(0, 1), waves.flatten(0, 1)),
        )

    fit("vocoder", vocoder, loss_at, 4000, 5e-4, work)


def make_text_encoder(work: Path):
    """A tokenizer of the captions' words and a small Gemma 3 with random weights."""
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

    folder = work / "text_encoder"
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
    names = dict(
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    described = dict(
        names,
        tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=True,
        add_eos_token=False,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    (folder / "config.json").write_text(json.dumps(TEXT, indent=1))
    torch.manual_seed(SEED)
    tensors = {}
    for name, p in (
        Gemma3ForConditionalGeneration(Gemma3Config(**TEXT)).state_dict().items()
    ):
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
            random = torch.randn(p.shape) / p.shape[-1] ** 0.5
            tensors[name] = (random if p.ndim == 2 else torch.zeros(p.shape)).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TextEncoder:
    """Captions to all hidden states (B, T, D, layers), padded on the right, and lengths."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer
        from transformers import Gemma3TextConfig, Gemma3TextModel

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        section = dict(TEXT["text_config"])
        theta, local = section.pop("rope_theta"), section.pop("rope_local_base_freq")
        scaling = section.pop("rope_scaling")
        section["rope_parameters"] = {
            "full_attention": dict(scaling, rope_theta=theta),
            "sliding_attention": dict(rope_type="default", rope_theta=local),
        }
        self.model = Gemma3TextModel(Gemma3TextConfig(**section)).eval()
        tensors = load_file(folder / "model.safetensors")
        prefix = "language_model.model."
        self.model.load_state_dict(
            {k.removeprefix(prefix): v.float() for k, v in tensors.items()}
        )

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = [self.tokenizer.encode(caption.strip()).ids for caption in captions]
        longest = max(map(len, ids))
        rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        states = self.model(rows, output_hidden_states=True).hidden_states
        return torch.stack(states, -1), torch.tensor([len(row) for row in ids])


SHARDS, SHARD = 16, 128


def make_latents(work: Path):
    """Clips as tokens, in shards; several processes may share the work."""
    vae, audio_vae = load(work, "vae"), load(work, "audio_vae")
    for shard in np.random.permutation(SHARDS):
        path = work / f"latents-{shard:02}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng((SEED, shard))
        scenes = [data.sample_scene(rng) for _ in range(SHARD)]
        video, audio = [], []
        for start in range(0, SHARD, 8):
            batch = scenes[start : start + 8]
            frames = to_video(np.stack([data.render(scene) for scene in batch]))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                video.append(vae.encoder(frames).float().flatten(2).transpose(1, 2))
                audio.append(audio_vae.tokens(mels(batch)).float())
        rows = [dataclasses.asdict(scene) for scene in scenes]
        torch.save(
            dict(video=torch.cat(video), audio=torch.cat(audio), scenes=rows), path
        )
        print(path, flush=True)


def load_latents(work: Path):
    """Normalised video tokens, audio tokens and their scenes; the two sets of statistics."""
    shards = [
        torch.load(p, weights_only=False) for p in sorted(work.glob("latents-*.pt"))
    ]
    video, audio = (torch.cat([s[name] for s in shards]) for name in ("video", "audio"))
    measured = model.Statistics(64, 2), model.Statistics(64, 2)
    for statistics, first in zip(measured, (shards[0]["video"], shards[0]["audio"])):
        statistics.measure(first)
    scenes = [data.Scene(**scene) for shard in shards for scene in shard["scenes"]]
    return measured[0].normalize(video), measured[1].normalize(audio), scenes, measured


VIDEO_POSITIONS = model.video_positions(4, 3, 3, data.FPS)
AUDIO_POSITIONS = model.audio_positions(AUDIO_TOKENS)
CONTEXT = 1024


def context_rows(rng: np.random.Generator, real: int, sampled: int, length: float):
    """Positions 0..real-1 and `sampled` of the others, which stand for all up to `length`.

    The logarithm of how many a row stands for, added to its attention logits, makes the
    softmax an estimate of that over the whole context, at a small part of the cost.
    """
    if sampled == 0:
        return torch.arange(CONTEXT), None
    edges = np.linspace(real, CONTEXT, sampled + 1)
    far = np.floor(rng.uniform(edges[:-1], edges[1:])).astype(int)
    bias = torch.zeros(real + sampled)
    bias[real:] = math.log((length - real) / sampled)
    return torch.cat([torch.arange(real), torch.from_numpy(far)]), bias


DIT_STEPS, DIT_WHOLE, DIT_BATCH = 1000, 60, 32


def train_dit(work: Path):
    """Rectified flow on the latents.

    The weight of the context's registers grows until it is that of 1024 rows, or the words
    would hardly be heard at first; the last steps take the whole context as it is.
    One caption in ten is empty, one batch in four keeps its clean first latent frames, one
    clip in eight its clean sound; one batch in eight cuts the two streams apart.
    """
    video, audio, scenes, _ = load_latents(work)
    encoder = TextEncoder(work / "text_encoder")
    denoiser = Denoiser()

    def loss_at(step, rng):
        whole = step >= DIT_STEPS - DIT_WHOLE
        size = DIT_BATCH // 4 if whole else DIT_BATCH
        chosen = rng.integers(len(scenes), size=size)
        captions = [
            "" if rng.random() < 0.1 else data.caption(scenes[i], rng) for i in chosen
        ]
        states, lengths = encoder(captions)
        length = 64 * (CONTEXT / 64) ** min(1.0, step / (0.6 * DIT_STEPS))
        rows, bias = context_rows(rng, states.shape[1], 0 if whole else 24, length)
        clean_v, clean_a = video[chosen], audio[chosen]
        u = torch.from_numpy(rng.random(size)).float()
        shifted = 6 * u / (1 + 5 * u)
        listed = torch.tensor(SCHEDULE)[torch.from_numpy(rng.integers(8, size=size))]
        sigma = torch.where(torch.from_numpy(rng.random(size) < 0.5), shifted, listed)
        # Where a whole batch is alike, timesteps are one a sample: cheaper modulation.
        mask_v, mask_a = torch.ones(size, 1), torch.ones(size, 1)
        if rng.random() < 0.25:
            mask_v = torch.ones(size, 36)
            mask_v[:, :9] = 0
        mask_a[torch.from_numpy(rng.random(size) < 0.125)] = 0
        noise_v, noise_a = torch.randn_like(clean_v), torch.randn_like(clean_a)
        time_v, time_a = sigma[:, None] * mask_v, sigma[:, None] * mask_a
        sigma_a = time_a.amax(1)
        with torch.autocast("cpu", torch.bfloat16):
            features_v, features_a = denoiser.projection(states)
            t = denoiser.transformer
            streams = [
                dict(
                    x=torch.lerp(clean, noise, time[..., None]),
                    t=time,
                    sigma=s,
                    context=connector(features, lengths, rows, bias),
                    bias=bias,
                    positions=positions,
                )
                for clean, noise, time, s, connector, features, positions in (
                    (
                        clean_v,
                        noise_v,
                        time_v,
                        sigma,
                        t.video_embeddings_connector,
                        features_v,
                        VIDEO_POSITIONS,
                    ),
                    (
                        clean_a,
                        noise_a,
                        time_a,
                        sigma_a,
                        t.audio_embeddings_connector,
                        features_a,
                        AUDIO_POSITIONS,
                    ),
                )
            ]
            v, a = t(*streams, crossed=rng.random() > 0.125)
        error_v = (v - (noise_v - clean_v)).square().mean(-1)
        error_a = (a - (noise_a - clean_a)).square().mean(-1)
        mask_v, mask_a = mask_v.expand_as(error_v), mask_a.expand_as(error_a)
        return dict(
            video=(error_v * mask_v).sum() / mask_v.sum(),
            audio=(error_a * mask_a).sum() / mask_a.sum(),
        )

    fit("dit", denoiser, loss_at, DIT_STEPS, 4e-3, work)


def autoencoders(work: Path):
    """Both autoencoders with the statistics that their latents had in training."""
    pair = load(work, "vae"), load(work, "audio_vae")
    for module, statistics in zip(pair, load_latents(work)[3]):
        module.per_channel_statistics.load_state_dict(statistics.state_dict())
    return pair


@torch.no_grad()
def sample(denoiser, encoder, captions, seed, sigmas=(*SCHEDULE, 0.0), first=None):
    """Normalised video and audio tokens by Euler steps; `first` are clean first frames."""
    states, lengths = encoder(captions)
    rows, bias = context_rows(None, states.shape[1], 0, CONTEXT)
    t = denoiser.transformer
    features = denoiser.projection(states)
    contexts = (
        t.video_embeddings_connector(features[0], lengths, rows),
        t.audio_embeddings_connector(features[1], lengths, rows),
    )
    torch.manual_seed(seed)
    size = len(captions)
    x, y = torch.randn(size, 36, 64), torch.randn(size, AUDIO_TOKENS, 64)
    mask = torch.ones(size, 36)
    if first is not None:
        x[:, :9], mask[:, :9] = first, 0
    for now, after in zip(sigmas, sigmas[1:]):
        sigma = torch.full((size,), now)
        v, w = t(
            dict(
                x=x,
                t=sigma[:, None] * mask,
                sigma=sigma,
                context=contexts[0],
                bias=None,
                positions=VIDEO_POSITIONS,
            ),
            dict(
                x=y,
                t=sigma[:, None],
                sigma=sigma,
                context=contexts[1],
                bias=None,
                positions=AUDIO_POSITIONS,
            ),
        )
        x = x + (after - now) * v * mask[..., None]
        y = y + (after - now) * w
    return x, y


def evaluate(work: Path, count=96, batch=8):
    """Judge clips of unseen wordings and seeds; the truth's own reconstruction beside it."""
    (vae, audio_vae), vocoder = autoencoders(work), load(work, "vocoder")
    denoiser, encoder = load(work, "dit"), TextEncoder(work / "text_encoder")
    rng = np.random.default_rng(SEED + 1)
    right = {}
    for start in range(0, count, batch):
        scenes = [data.sample_scene(rng) for _ in range(batch)]
        video = to_video(np.stack([data.render(scene) for scene in scenes]))
        captions = [data.caption(scene, rng, unseen=True) for scene in scenes]
        with torch.no_grad():
            true_x = vae.per_channel_statistics.normalize(vae.encoder(video))
            true_x = true_x.flatten(2).transpose(1, 2)
            true_y = audio_vae.per_channel_statistics.normalize(
                audio_vae.tokens(mels(scenes))
            )
        made = sample(denoiser, encoder, captions, SEED + start)
        for kind, (x, y) in dict(truth=(true_x, true_y), made=made).items():
            x = x.transpose(1, 2).unflatten(2, (4, 3, 3))
            with torch.no_grad():
                decoded = vae.decoder(vae.per_channel_statistics.denormalize(x))
                mel = audio_vae.mel(audio_vae.per_channel_statistics.denormalize(y))
                waves = vocoder(mel)
            frames = ((decoded + 1) * 127.5).round().clamp(0, 255).byte()
            frames = frames.permute(0, 2, 3, 4, 1).numpy()
            for i, scene in enumerate(scenes):
                found = judge(frames[i], waves[i].T.numpy(), 24000)
                for name in ("colour", "shape", "motion", "background", "pitch"):
                    key = f"{kind} {name}"
                    right[key] = right.get(key, 0) + (
                        found[name] == getattr(scene, name)
                    )
                error = (decoded[i, :, 0] - video[i, :, 0]).square().mean() / 4
                right["first frame dB"] = right.get("first frame dB", 0) - (
                    10 * math.log10(error) if kind == "truth" else 0
                )
    report = ", ".join(f"{key} {value / count:.3f}" for key, value in right.items())
    print(f"{count} clips: {report}", flush=True)


def export(work: Path):
    """The official single-file layout, bfloat16, beside the text encoder's folder."""
    latents = torch.load(work / "latents.pt", weights_only=False)
    modules = {
        name: load(work, name) for name in ("vae", "audio_vae", "vocoder", "dit")
    }
    statistics_in(modules["vae"], modules["audio_vae"], latents)
    denoiser = modules.pop("dit")
    modules["model.diffusion_model"] = denoiser.transformer
    modules["text_embedding_projection"] = denoiser.projection
    tensors = {
        f"{prefix}.{name}": tensor.bfloat16().contiguous()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    config = dict(
        transformer=TRANSFORMER, vae=VAE, audio_vae=AUDIO_VAE, vocoder=VOCODER
    )
    metadata = dict(format="pt", model_version="2.3.0", config=json.dumps(config))
    path = work / "ltx-2.3-demo.safetensors"
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
    parser.add_argument("stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and logs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        STAGES[stage](arguments.work)


if __name__ == "__main__":
    main()
