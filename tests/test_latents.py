"""Tokens, their positions, and what conditionings make of a latent state."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from parity import channels_last

from ltx2.latents import (
    LatentState,
    audio_bounds,
    audio_from_tokens,
    audio_tokens,
    latent_frames,
    to_tokens,
    video_bounds,
)

# Conditionings: latent, mask, positions and attention exactly as the reference's


def nothing(g):
    return []


def replaced(g):
    latents, i = channels_last(g["in.latent"]), g["info"]
    return [lambda state: state.hold(latents, i["latent_idx"], i["strength"])]


def keyframe(g):
    latents, i = channels_last(g["in.latent"]), g["info"]
    facts = i["frame_idx"], i["fps"], i["strength"]
    return [lambda state: state.guide(latents, *facts)]


def reference(g):
    latents, i = channels_last(g["in.latent"]), g["info"]
    scale = i.get("downscale_factor", 1), i.get("temporal_scale_factor", 1)
    weights = g["in.attention"][0] if "in.attention" in g else i.get("attention", 1.0)
    facts = i["fps"], i.get("strength", 1.0), *scale, weights
    return [lambda state: state.show(latents, *facts)]


def several(*kinds):
    """Items made from in.latent0, in.latent1 and so on."""

    def items(g):
        latents = [channels_last(g[f"in.latent{n}"]) for n in range(len(kinds))]
        fps = g["info"]["fps"]
        return [
            lambda state, kind=kind, x=x: kind(state, x, fps)
            for kind, x in zip(kinds, latents)
        ]

    return items


hold = lambda state, x, fps: state.hold(x)
guide = lambda state, x, fps: state.guide(x, 8, fps)
show = lambda weight: lambda state, x, fps: state.show(x, fps, visibility=weight)


def slots(g):
    """2.5's keyframes to be generated: empty, each standing for a single frame."""
    first = channels_last(g["in.latent"])
    _, _, height, width, channels = first.shape
    bounds = []
    for t in g["info"]["pixel_frame_indices"]:
        grid = video_bounds(1, height, width, 1)
        grid[0] = np.float32([t, t + 1]) / np.float32(g["info"]["fps"])
        bounds.append(grid)
    bounds = np.concatenate(bounds, axis=1)
    empty = mx.zeros((1, bounds.shape[1], channels))
    return [lambda s: s.hold(first).append(empty, bounds, 0.0, keyframes=True)]


def region(g):
    times = g["info"]["start"], g["info"]["end"]
    return [lambda state: state.regenerate(*times)]


def audio_reference(g):
    tokens = to_tokens(channels_last(g["in.latent"]))
    return [lambda state: state.append(tokens, g["in.positions"][0])]


REGIONS = ["0.0_0.3", "0.2_0.5", "0.04_0.0417", "0.375_0.376", "0.0_10.0"]
CASES = {
    "initial_fps24": nothing,
    "initial_fps25": nothing,
    "initial_fps30": nothing,
    "replace_idx0_s0.6": replaced,
    "replace_idx0_s1": replaced,
    "replace_idx0_with_initial_stage2": replaced,
    "replace_idx1_two_frames": replaced,
    "keyframe_idx0_s1.0": keyframe,
    "keyframe_idx8_s0.8": keyframe,
    "keyframe_idx12_s1.0": keyframe,
    "keyframe_idx16_s0.5": keyframe,
    "keyframe_clip9_idx0": keyframe,
    "keyframe_clip9_idx8": keyframe,
    "reference_plain": reference,
    "reference_s0.5": reference,
    "reference_downscale2": reference,
    "reference_temporal4": reference,
    "reference_temporal2_downscale2": reference,
    "reference_attention0.5": reference,
    "reference_attention_tensor": reference,
    "image0_plus_keyframe16": several(
        hold, lambda state, x, fps: state.guide(x, 16, fps, 0.9)
    ),
    "keyframe_then_two_references_attention": several(guide, show(0.3), show(0.8)),
    "replace_reference_attention_keyframe": several(hold, show(0.3), guide),
    "generated_keyframe_slots": slots,
    **{f"region_video_{times}": region for times in REGIONS},
    **{f"region_audio_{times}": region for times in REGIONS},
    "reference_audio": audio_reference,
    "reference_audio_negative": audio_reference,
}


def start(g) -> LatentState:
    """The state before any conditioning, as a golden describes it."""
    shape, initial = g["info"]["target_shape"], g.get("in.initial_latent")
    if "mel_bins" in shape:
        bounds = audio_bounds(shape["frames"])
        channels = shape["channels"] * shape["mel_bins"]
    else:
        size = shape["frames"], shape["height"], shape["width"]
        bounds = video_bounds(*size, g["info"]["fps"])
        channels = shape["channels"]
    initial = None if initial is None else to_tokens(channels_last(initial))
    return LatentState.initial(bounds, channels, initial)


@pytest.mark.parametrize("case", CASES)
def test_conditioned_states_are_the_references(golden, case):
    g = golden(f"common/cond_{case}")
    state = start(g)
    for conditioning in CASES[case](g):
        state = conditioning(state)
    equal = np.testing.assert_array_equal
    equal(state.latent, g["out.latent"])
    equal(state.clean_latent, g["out.clean_latent"])
    equal(state.bounds, g["out.positions"][0])
    np.testing.assert_allclose(
        state.denoise_mask, g["out.denoise_mask"][0, :, 0], atol=1e-7
    )
    equal(state.latent[:, : state.num_target_tokens], g["out.cleared_latent"])
    assert (state.attention is None) == ("out.attention_mask" not in g)
    if state.attention is not None:
        equal(state.attention, g["out.attention_mask"][0])
    if "out.keyframes_mask" in g:
        equal(state.keyframes, g["out.keyframes_mask"][0, :, 0])
    for key in (k for k in g if k.startswith("out.noised_latent_scale")):
        x = state.noised(
            mx.array(g["in.noise"]), float(key[len("out.noised_latent_scale") :])
        )
        np.testing.assert_allclose(x, g[key], atol=1e-6)


# Masks


@pytest.fixture
def state():
    """Three latent frames of 2x3 tokens: the first held, the last half held."""
    frame = lambda key: mx.random.normal((1, 1, 2, 3, 4), key=mx.random.key(key))
    initial = mx.random.normal((1, 18, 4), key=mx.random.key(0))
    state = LatentState.initial(video_bounds(3, 2, 3, 24), 4, initial)
    return state.hold(frame(1)).hold(frame(2), 2, 0.5)


def test_x0_is_pulled_to_the_clean_tokens_as_in_the_reference(golden):
    g = golden("common/post_process")
    state = LatentState.initial(video_bounds(3, 2, 3, 24), 16)
    clean, mask = mx.array(g["in.clean"]), g["in.mask"][0, :, 0]
    blended = replace(state, clean_latent=clean, denoise_mask=mask).blend(
        mx.array(g["in.denoised"])
    )
    np.testing.assert_allclose(blended, g["out.latent"], atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.909375, 0.0])
def test_held_and_free_tokens_are_exact(state, scale):
    noise = 100 * mx.random.normal((1, 18, 4), key=mx.random.key(3))
    x = state.noised(noise, scale)
    held, free, half = slice(0, 6), slice(6, 12), slice(12, 18)
    mixed = state.latent * (1 - scale) + noise * scale
    assert mx.array_equal(x[:, held], state.clean_latent[:, held])
    assert mx.array_equal(x[:, free], mixed[:, free])
    assert mx.allclose(x[:, half], (mixed + state.clean_latent)[:, half] / 2, atol=1e-5)
    assert mx.array_equal(state.blend(x)[:, held], x[:, held])
    assert mx.array_equal(state.blend(noise)[:, free], noise[:, free])


def test_a_state_without_conditionings_starts_as_its_noise():
    noise = mx.random.normal((1, 7, 4), key=mx.random.key(0))
    state = LatentState.initial(audio_bounds(7), 4)
    assert mx.array_equal(state.noised(noise), noise)
    assert mx.array_equal(state.blend(noise), noise)
    assert not state.frozen


def test_a_frozen_state_keeps_every_bit(state):
    noise = mx.random.normal((1, 18, 4), key=mx.random.key(3))
    frozen = state.freeze()
    assert frozen.frozen and not state.frozen
    assert mx.array_equal(frozen.noised(noise), state.clean_latent)


def test_a_retake_keeps_what_is_outside_to_the_bit(state):
    again = state.regenerate(0.1, 0.2)  # inside frames 1 to 8
    noise = mx.random.normal((1, 18, 4), key=mx.random.key(3))
    x = again.noised(noise)
    assert again.denoise_mask.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 6
    assert mx.array_equal(x[:, :6], state.clean_latent[:, :6])
    assert mx.array_equal(x[:, 6:12], noise[:, 6:12])
    assert mx.array_equal(x[:, 12:], state.clean_latent[:, 12:])


def test_the_later_item_wins_and_the_state_before_stays(state):
    before = mx.array(np.array(state.clean_latent)), state.denoise_mask.copy()
    latents = mx.ones((1, 1, 2, 3, 4))
    after = state.hold(latents, 0, 0.25)
    assert mx.array_equal(after.clean_latent[:, :6], mx.ones((1, 6, 4)))
    assert (after.denoise_mask[:6] == 0.75).all()
    assert mx.array_equal(state.clean_latent, before[0])
    assert np.array_equal(state.denoise_mask, before[1])


def test_levels_are_the_distinct_masks(state):
    levels, level_index = state.levels
    assert levels.tolist() == [0.0, 0.5, 1.0]
    assert np.array_equal(levels[np.array(level_index)], state.denoise_mask)
    assert state.freeze().levels == (np.zeros(1), None)


# Shapes and positions


def test_audio_is_as_long_as_the_video(golden):
    g = golden("common/audio_token_counts")
    for frames, counts in zip(g["in.num_frames"].tolist(), g["out.tokens"].tolist()):
        assert [audio_tokens(frames, fps) for fps in g["info"]["fps"]] == counts


@pytest.mark.parametrize("frames, latents", [(1, 1), (9, 2), (17, 3), (121, 16)])
def test_the_first_frame_is_a_latent_of_its_own(frames, latents):
    assert latent_frames(frames) == latents


def test_video_tokens_run_frame_row_column():
    latents = mx.arange(2 * 2 * 3 * 4).reshape(1, 2, 2, 3, 4)
    tokens = to_tokens(latents)
    assert tokens.shape == (1, 12, 4)
    assert mx.array_equal(tokens[0, 1 * 6 + 1 * 3 + 2], latents[0, 1, 1, 2])
    bounds = video_bounds(2, 2, 3, 24)[:, 1 * 6 + 1 * 3 + 2]
    expected = np.float32([[1 / 24, 9 / 24], [32, 64], [64, 96]])
    np.testing.assert_array_equal(bounds, expected)


def test_audio_tokens_count_channels_before_mel_bins(golden):
    g = golden("common/cond_reference_audio")
    latents = channels_last(g["in.latent"])
    tokens = to_tokens(latents)
    assert mx.array_equal(tokens, mx.array(g["in.tokens"]))
    assert mx.array_equal(audio_from_tokens(tokens, 2), latents)


def test_an_audio_token_is_40_ms_the_first_10():
    seconds = audio_bounds(4)
    np.testing.assert_allclose(seconds[0, :, 0], [0, 0.01, 0.05, 0.09], atol=1e-7)
    np.testing.assert_array_equal(seconds[0, 1:, 0], seconds[0, :-1, 1])
