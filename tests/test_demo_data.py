"""The demo's judge measures what its generator drew and played."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from demo import data
from demo.judge import judge, pan_track, read_mp4
from ltx2 import formats
from ltx2.weights import COMPONENTS


def measured(scene: data.Scene, rate: int = 24000) -> dict:
    return judge(data.render(scene), data.sound(scene, rate), rate)


@pytest.mark.parametrize("motion", data.MOTIONS)
def test_the_judge_measures_every_attribute_of_synthetic_clips(motion):
    rng = np.random.default_rng(len(motion))
    for shape, color in itertools.product(data.SHAPES, data.COLORS):
        scene = data.sample_scene(rng, motion=motion, shape=shape, color=color)
        found = measured(scene)
        assert {
            k: found[k] for k in ("shape", "color", "motion", "background", "pitch")
        } == {
            "shape": shape,
            "color": color,
            "motion": motion,
            "background": scene.background,
            "pitch": scene.pitch,
        }
        assert found["pan_error"] < 0.06


@pytest.mark.parametrize("rate", [16000, 24000, 48000])
def test_pitch_is_measured_at_any_sample_rate(rate):
    rng = np.random.default_rng(1)
    for pitch, timbre in itertools.product(data.PITCHES, data.TIMBRES):
        scene = data.sample_scene(rng, pitch=pitch, timbre=timbre)
        assert measured(scene, rate)["pitch"] == pitch


def test_a_mono_clip_is_heard_in_the_middle(tmp_path):
    frames = np.zeros((24, 32, 32, 3), np.uint8)
    tone = np.sin(np.arange(24000) * 0.1).astype(np.float32)[:, None] / 2
    with formats.VideoWriter(tmp_path / "a.mp4", 24) as video:
        video.write(frames)
        video.sound = tone, 24000
    seen, sound, _ = read_mp4(tmp_path / "a.mp4")
    assert seen.shape == frames.shape and sound.shape[1] == 2
    assert np.abs(pan_track(sound, 24) - 0.5).max() < 1e-3


def test_an_empty_silent_clip_has_no_attributes():
    found = judge(np.full((25, 96, 96, 3), 30, np.uint8), np.zeros((24000, 2)), 24000)
    assert [found[k] for k in ("color", "shape", "motion", "pitch")] == [None] * 4


def test_in_a_mirrored_clip_motion_is_reversed_and_sound_is_misplaced():
    rng = np.random.default_rng(2)
    scene = data.sample_scene(rng, motion="right")
    found = judge(data.render(scene)[:, :, ::-1], data.sound(scene, 24000), 24000)
    assert found["motion"] == "left"
    assert found["pan_error"] > 0.2


def test_a_bounce_clicks_when_it_touches_the_floor():
    rng = np.random.default_rng(3)
    scene = data.sample_scene(rng, motion="bouncing", timbre="pure", pitch="low")
    height = data.trajectory(scene, data.contacts(scene))[1]
    np.testing.assert_allclose(height, data.FLOOR, atol=1e-6)
    wave = np.abs(np.diff(data.sound(scene, 24000).sum(1)))
    assert (
        abs(np.argmax(wave) / 24000 % data.BOUNCE_PERIOD - scene.first_contact) < 0.01
    )


def test_unseen_captions_name_the_attributes_in_other_wordings():
    rng = np.random.default_rng(4)
    seen = {data.caption(data.sample_scene(rng), rng) for _ in range(2000)}
    assert len(seen) > 1950
    for _ in range(200):
        scene = data.sample_scene(rng)
        text = data.caption(scene, rng, unseen=True)
        assert text not in seen
        for attribute in (scene.color, scene.shape, scene.pitch):
            words = data.WORDS[attribute]
            assert any(word in text.lower() for word in words), text


def test_the_same_seed_gives_the_same_clip_and_caption():
    a, b = (np.random.default_rng(5) for _ in range(2))
    first, second = data.sample_scene(a), data.sample_scene(b)
    assert first == second
    assert data.caption(first, a) == data.caption(second, b)


@pytest.mark.parametrize(
    "name", ["transformer", "connectors", "vae", "audio_vae", "vocoder"]
)
def test_the_demo_config_fits_the_product_models_without_warnings(name):
    config = json.loads((Path(data.__file__).parent / "config.json").read_text())
    section, component = COMPONENTS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        component.from_config(config[section])
