"""Audio: waveform to log-mel to latents, and back through the vocoders."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from parity import channels_last, read, relative_error

from ltx2 import audio_vae, vocoder
from ltx2.audio_vae import AudioVAE, AudioVAEConfig, log_mel
from ltx2.base import UserError

SILENCE = math.log(1e-5)


@pytest.fixture(scope="module")
def vae(checkpoint, name):
    section, weights = read(checkpoint(name), "audio_vae")
    model = AudioVAE(AudioVAEConfig.from_dict(section))
    return model.load_weights(list(audio_vae.AudioVAE.sanitize(weights).items()))


# Log-mel


def test_log_mel_matches_the_reference(golden):
    g = golden("ltx-2/audio_encode")
    mel = log_mel(channels_last(g["in.waveform"]))
    assert mx.abs(mel - channels_last(g["out.mel"])).max() < 5e-5


@pytest.mark.parametrize("samples", [513, 1599, 1600, 1601, 16000])
def test_log_mel_has_a_frame_every_10_ms_and_one_more(samples):
    mel = log_mel(mx.zeros((1, samples, 2)))
    assert mel.shape == (1, samples // 160 + 1, 64, 2)


def test_silence_is_at_the_floor():
    assert mx.allclose(log_mel(mx.zeros((1, 1600, 2))), mx.array(SILENCE))


def test_a_tone_is_in_its_bin_and_its_channel():
    # 66 equidistant edges up to 8 kHz; below 1 kHz, mel 15, a mel is 200/3 Hz.
    mels, loudest = 15 + 27 * math.log(8) / math.log(6.4), 14
    center = (loudest + 1) / 65 * mels * 200 / 3
    tone = np.sin(2 * np.pi * center * np.arange(8000) / 16000)
    waveform = mx.array(np.stack([tone, 0 * tone], -1)[None], mx.float32)
    mel = log_mel(waveform)[0, 5:-5]  # without the frames that contain a reflection
    assert (mx.argmax(mel[..., 0], axis=1) == loudest).all()
    assert mx.allclose(mel[..., 1], mx.array(SILENCE))


def test_audio_too_short_to_reflect_is_refused():
    with pytest.raises(UserError, match="512 samples"):
        log_mel(mx.zeros((1, 512, 2)))


# Audio VAE


def test_encode_matches_the_reference(vae, name, golden):
    g = golden(f"{name}/audio_encode")
    latents = channels_last(g["out.latent"])
    assert relative_error(vae.encode(channels_last(g["out.mel"])), latents) < 1e-5
    waveform = channels_last(g["in.waveform"])
    assert relative_error(vae.encode(log_mel(waveform)), latents) < 1e-5


def test_decode_matches_the_reference(vae, name, golden):
    g = golden(f"{name}/audio_decode")
    mel = vae.decode(channels_last(g["in.latent"]))
    assert relative_error(mel, channels_last(g["out.mel"])) < 1e-5


@pytest.mark.parametrize("frames, latents", [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_four_mel_frames_are_a_latent_frame(vae, frames, latents):
    z = vae.encode(mx.zeros((1, frames, 64, 2)))
    assert z.shape == (1, latents, 16, 8)
    assert vae.decode(z).shape == (1, 4 * latents - 3, 64, 2)


def test_both_directions_are_causal(vae):
    mel = mx.random.normal((1, 21, 64, 2), key=mx.random.key(0))
    later = mx.where(mx.arange(21)[:, None, None] > 8, 0.0, mel)
    z, z_later = vae.encode(mel), vae.encode(later)
    assert mx.allclose(z[:, :3], z_later[:, :3], atol=1e-5)
    assert not mx.allclose(z[:, 3], z_later[:, 3], atol=1e-2)
    cut = mx.where(mx.arange(6)[:, None, None] > 2, 0.0, z)
    y, y_cut = vae.decode(z), vae.decode(cut)
    assert mx.allclose(y[:, :9], y_cut[:, :9], atol=1e-5)
    assert not mx.allclose(y[:, 9], y_cut[:, 9], atol=1e-2)


def changed(section: dict, *keys, value) -> dict:
    copy = json.loads(json.dumps(section))
    part = copy
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return copy


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (["model", "params", "ddconfig", "norm_type"], "group", "norm_type is 'group'"),
        (["preprocessing", "stft", "hop_length"], 256, "hop_length is 256"),
        (["preprocessing", "audio", "sampling_rate"], 24000, "16000 and 24000"),
    ],
)
def test_another_audio_vae_is_refused(checkpoint, keys, value, message):
    section, _ = read(checkpoint("ltx-2"), "audio_vae")
    with pytest.raises(UserError, match=message):
        AudioVAEConfig.from_dict(changed(section, *keys, value=value))


def test_an_unknown_key_is_reported(checkpoint, caplog):
    section, _ = read(checkpoint("ltx-2"), "audio_vae")
    AudioVAEConfig.from_dict(changed(section, "model", "tanh_out", value=True))
    assert "tanh_out" in caplog.text


# Vocoders. The checkpoints' bfloat16 weights are not cast: matching the float32 reference
# shows that all is computed in float32.


def load_vocoder(path):
    section, weights = read(path, "vocoder")
    model = vocoder.Vocoder.from_config(section)
    return model.load_weights(list(vocoder.Vocoder.sanitize(weights).items()))


@pytest.mark.parametrize("which", ["", "2"])
@pytest.mark.parametrize("name, rate", [("ltx-2", 24000), ("ltx-2.3", 48000)])
def test_waveform_matches_the_reference(checkpoint, name, rate, which, golden):
    model = load_vocoder(checkpoint(name))
    g = golden(f"{name}/vocoder")
    mel = channels_last(g[f"in.mel{which}"])
    waveform = model(mel)
    assert model.sample_rate == rate == g["info"]["sampling_rate"]
    assert waveform.dtype == mx.float32
    assert waveform.shape == (1, mel.shape[1] * rate // 100, 2)
    assert relative_error(waveform, channels_last(g[f"out.waveform{which}"])) < 1e-5


def test_steps_of_the_bandwidth_extension_match_the_reference(checkpoint, golden):
    model = load_vocoder(checkpoint("ltx-2.3"))
    g = golden("ltx-2.3/vocoder")
    low, mel = channels_last(g["mid.low_rate"]), channels_last(g["mid.bwe_mel"])
    assert relative_error(model.vocoder(channels_last(g["in.mel"])), low) < 1e-5
    assert mx.abs(model.log_mel(low) - mel).max() < 5e-5
    residual = channels_last(g["mid.residual"])
    assert relative_error(model.bwe_generator(mel), residual) < 1e-5


def test_resampling_keeps_a_tone(checkpoint):
    def tone(rate, samples):
        return mx.sin(2 * math.pi * 1000 / rate * mx.arange(samples))[None, :, None]

    resampled = load_vocoder(checkpoint("ltx-2.3")).resample(tone(16000, 800))
    assert resampled.shape == (1, 2400, 1)
    error = mx.abs(resampled - tone(48000, 2400))
    assert error[:, 60:-60].max() < 2e-3


def test_rates_that_contradict_the_layers_are_refused(checkpoint):
    section, _ = read(checkpoint("ltx-2.3"), "vocoder")
    with pytest.raises(UserError, match="44100"):
        vocoder.Vocoder.from_config(
            changed(section, "bwe", "output_sampling_rate", value=44100)
        )


def test_only_the_known_unused_tensor_is_dropped(checkpoint):
    _, weights = read(checkpoint("ltx-2.3"), "vocoder")
    clean = vocoder.Vocoder.sanitize(weights | {"unknown": mx.zeros(1)})
    assert weights.keys() - clean.keys() == {"mel_stft.stft_fn.inverse_basis"}
    assert "unknown" in clean
