"""Schedules, guidance and samplers: the reference's, step by step."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from parity import relative_error

from ltx2.guidance import Guidance
from ltx2.sampling import (
    DISTILLED_SIGMAS,
    REFINE_SIGMAS,
    SAMPLERS,
    euler,
    euler_ancestral,
    gradient_estimation,
    res_2s,
    shifted_sigmas,
)

STREAMS = ("video", "audio")


# Schedules


@pytest.mark.parametrize("steps", [4, 8, 15, 20, 30, 40])
@pytest.mark.parametrize("suffix, tokens", [("", 4096), ("_lat", 6144)])
def test_dev_schedules_are_the_references(golden, steps, suffix, tokens):
    expected = golden("common/schedulers")[f"out.ltx2_{steps}{suffix}"]
    np.testing.assert_allclose(shifted_sigmas(steps, tokens), expected, atol=3e-7)


def test_every_size_has_the_schedule_of_4096_tokens():
    assert shifted_sigmas(8) == shifted_sigmas(8, 4096)


def test_distilled_schedules_are_the_references(golden):
    g = golden("common/schedulers")
    assert np.array_equal(np.float32(DISTILLED_SIGMAS), g["out.distilled"])
    assert np.array_equal(np.float32(REFINE_SIGMAS), g["out.distilled_stage2"])


# Guidance


@pytest.fixture
def predictions(golden):
    """Conditional, unconditional, perturbed, isolated."""
    g = golden("common/guiders")
    keys = ("cond", "uncond", "perturbed", "modality")
    return [mx.array(g[f"in.{key}"]) for key in keys]


@pytest.mark.parametrize(
    "case, guidance",
    [
        ("default_video", Guidance(3.0, 1.0, None, 3.0, 0.7)),
        ("default_audio", Guidance(7.0, 1.0, None, 3.0, 0.7)),
        ("norescale", Guidance(3.0, 0.5, None, 2.0, 0.0)),
    ],
)
def test_guidance_is_the_references(golden, predictions, case, guidance):
    expected = golden("common/guiders")[f"out.multimodal_{case}"]
    assert relative_error(guidance(*predictions), mx.array(expected)) < 1e-6


@pytest.mark.parametrize(
    "case, guidance",
    [("cfg3", Guidance(cfg_scale=3.0)), ("stg1", Guidance(stg_scale=1.0))],
)
def test_each_term_alone_is_the_references(golden, predictions, case, guidance):
    cond = predictions[0]
    delta = mx.array(golden("common/guiders")[f"out.{case}"])
    assert relative_error(guidance(*predictions) - cond, delta) < 1e-5


def test_without_guidance_the_other_predictions_are_not_needed(predictions):
    assert not Guidance().active
    assert mx.array_equal(Guidance()(predictions[0]), predictions[0])


@pytest.mark.parametrize(
    "setting", [{"cfg_scale": 2.0}, {"stg_scale": 1.0}, {"modality_scale": 0.5}]
)
def test_any_scale_makes_guidance_active(setting):
    assert Guidance(**setting).active


def test_full_rescaling_gives_the_conditional_spread(predictions):
    x = Guidance(cfg_scale=9.0, rescale_scale=1.0)(*predictions)
    assert mx.allclose(mx.std(x, ddof=1), mx.std(predictions[0], ddof=1))


@pytest.mark.parametrize(
    "skip_step, computed", [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 2, 4]), (2, [0, 3])]
)
def test_skipped_steps(skip_step, computed):
    guidance = Guidance(skip_step=skip_step)
    assert [step for step in range(6) if not guidance.skips(step)] == computed


# Samplers, on the reference's analytic denoiser x0 = a x + b sigma + const


class Analytic:
    """The golden's denoiser, mask and stored noise, comparing each call and draw."""

    def __init__(self, g):
        self.g, self.calls, self.draws = g, 0, []
        self.known = {
            k: (
                mx.array(g[f"in.{k}.denoise_mask"]),
                mx.array(g[f"in.{k}.clean_latent"]),
            )
            for k in STREAMS
        }
        self.start = {k: mx.array(g[f"in.{k}.latent"]) for k in STREAMS}

    def blend(self, name, x):
        mask, clean = self.known[name]
        return x * mask + clean * (1 - mask)

    def denoise(self, x, sigma, step):
        g, call, x0 = self.g, self.calls, {}
        self.calls += 1
        assert np.isclose(sigma, g["in.call_sigmas"][call], rtol=1e-6)
        for k, v in x.items():
            expected = mx.array(g[f"mid.call{call}.{k}.x"].astype(np.float32))
            assert v.dtype == mx.float32
            assert relative_error(v, expected) < 1e-5
            f = g["info"]["fake_denoiser"][k]
            const = mx.array(g[f"in.{k}.const"])
            x0[k] = self.blend(k, f["a"] * v + f["b"] * sigma + const)
        return x0

    def noise(self, name, shape):
        stored = self.g[f"in.noise{len(self.draws)}"]
        assert stored.shape == shape
        self.draws.append(name)
        return mx.array(stored.astype(np.float32))

    def run(self, sampler):
        sigmas = self.g["in.sigmas"].tolist()
        return list(sampler(self.denoise, self.start, sigmas, self.blend, self.noise))


def names(steps, *kinds):
    """The noises of a run in order."""
    return [f"{s}.{kind}{i}" for i in range(steps) for kind in kinds for s in STREAMS]


@pytest.mark.parametrize(
    "case, sampler, drawn",
    [
        ("euler_distilled_masked", euler, []),
        ("gradient_estimation_ltx2_6_masked", gradient_estimation, []),
        ("euler_ancestral_distilled_masked", euler_ancestral, names(7, "step")),
        (
            "euler_ancestral_eta0.5_s0.8_ltx2_6_masked",
            partial(euler_ancestral, eta=0.5, s_noise=0.8),
            names(5, "step"),
        ),
        ("res2s_stage2", res_2s, names(3, "substep", "step")),
        ("res2s_ltx2_6_masked", res_2s, names(6, "substep", "step")),
    ],
)
def test_samplers_are_the_references(golden, case, sampler, drawn):
    g = golden(f"common/sampler_{case}")
    analytic = Analytic(g)
    steps = analytic.run(sampler)
    assert analytic.calls == g["info"]["n_denoiser_calls"]
    assert analytic.draws == drawn
    for k in STREAMS:
        x, x0 = (streams[k] for streams in steps[-1])
        assert relative_error(x, mx.array(g[f"out.{k}"].astype(np.float32))) < 1e-5
        assert mx.allclose(x, x0, atol=1e-5)  # at sigma 0, the last estimate


def seeded(name, shape):
    key = mx.random.key(sum(name.encode()))
    return mx.random.normal(shape, key=key)


def toy(x, sigma, step):
    return {k: 0.3 * v + sigma for k, v in x.items()}


START = {"video": seeded("v", (1, 12, 8)), "audio": seeded("a", (1, 5, 4))}


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return SAMPLERS[request.param]


def test_held_tokens_keep_every_bit(sampler):
    held = {k: (mx.arange(v.shape[1]) < 3)[None, :, None] for k, v in START.items()}
    blend = lambda k, x: mx.where(held[k], START[k], x)
    denoise = lambda *args: {k: blend(k, v) for k, v in toy(*args).items()}
    for x, x0 in sampler(denoise, START, REFINE_SIGMAS, blend, seeded):
        for k in x:
            assert mx.array_equal(x[k][:, :3], START[k][:, :3])
            assert mx.array_equal(x0[k][:, :3], START[k][:, :3])
            assert not mx.allclose(x[k][:, 3:], START[k][:, 3:], atol=1e-2)


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_alone_goes_the_same_way(sampler, stream):
    keep = lambda k, x: x
    both = list(sampler(toy, START, REFINE_SIGMAS, keep, seeded))
    alone = {stream: START[stream]}
    alone = list(sampler(toy, alone, REFINE_SIGMAS, keep, seeded))
    assert len(both) == len(alone)
    for (x, _), (y, _) in zip(both, alone):
        assert y.keys() == {stream}
        assert mx.array_equal(x[stream], y[stream])


def test_a_schedule_may_end_above_zero(sampler):
    sigmas = (0.9, 0.6, 0.3)
    steps = list(sampler(toy, START, sigmas, lambda k, x: x, seeded))
    assert len(steps) == 2
    x, x0 = steps[-1]
    assert not mx.allclose(x["video"], x0["video"], atol=1e-2)  # noise is left


def test_ancestral_without_eta_is_euler_and_draws_nothing():
    plain = list(euler(toy, START, DISTILLED_SIGMAS, None, None))
    quiet = partial(euler_ancestral, eta=0.0)
    for (x, _), (y, _) in zip(plain, quiet(toy, START, DISTILLED_SIGMAS, None, None)):
        for k in STREAMS:
            assert mx.allclose(x[k], y[k], atol=1e-5)


def test_res_2s_takes_one_more_call_to_arrive():
    steps = list(res_2s(toy, START, REFINE_SIGMAS, lambda k, x: x, seeded))
    assert len(steps) == 4
    assert mx.array_equal(steps[-1][0]["video"], steps[-1][1]["video"])
