"""Training: losses, gradients and steps of the reference, and ways to compute them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from parity import channels_last, cosine, relative_error
from streams import load
from test_layout import HERE

from ltx2 import gradients, latents
from ltx2.conversion import quant_predicate
from ltx2.gradients import Trainee, make_example
from ltx2.linear import quantize
from ltx2.lora import Lora, attach

TRAIN = HERE / "golden" / "train"
CASES = (
    "av av_first_frame av_one_sigma_first_frame video_only audio_only audio_to_video "
    "video_to_audio reference_half mask batch2_alpha2r"
).split()
ALL = [(m, case) for m in ("ltx-2-tiny", "ltx-2.3-tiny") for case in CASES]
ALL += [("ltx-2.5-tiny", "av_first_frame")]
FPS = 24


def transformer(name: str):
    return load(TRAIN / name / "transformer.safetensors")


def states(g: dict[str, Any], sample: int = 0, prefix: str = "in."):
    """The streams' states as the golden's settings say."""
    info, found = g["info"], {}
    kinds = [c["type"] for c in info.get("conditions", ())]
    first = "first_frame" in kinds or info.get("first_frame")
    for name in ("video", "audio"):
        if f"{prefix}{name}_latents" not in g:
            continue
        x = channels_last(g[f"{prefix}{name}_latents"][sample : sample + 1])
        bounds = latents.audio_bounds(x.shape[1])
        if name == "video":
            bounds = latents.video_bounds(*x.shape[1:4], FPS)
        tokens = latents.to_tokens(x)
        items = []
        if name == "video" and first and marked(g, name, sample):
            items.append(latents.Replace(x[:, :1]))
        if name == "video" and "reference" in kinds:
            reference = channels_last(g["in.reference_latents"])
            items.append(latents.Reference(reference, FPS, 1.0, 2))
        state = latents.LatentState.initial(bounds, tokens.shape[-1], tokens)
        if info.get(f"{name}_role") == "frozen":
            items.append(latents.Freeze())
        state = latents.condition(state, items)
        if name == "video" and "mask" in kinds:
            mask = 1 - g["in.video_mask"].flatten().astype(np.float32)
            state = replace(state, denoise_mask=mask)
        found[name] = state
    return found


def marked(g, name, sample) -> bool:
    """Whether the coin gave the first frame."""
    timesteps = g.get(f"mid.{name}_timesteps")
    return bool((timesteps[sample] == 0).any())


def example(model, g, sample: int = 0, prefix: str = "in."):
    get = lambda key: mx.array(g[f"{prefix}{key}"][sample : sample + 1])
    found = states(g, sample, prefix)
    noise = {k: get(f"{k}_noise") for k in found if f"{prefix}{k}_noise" in g}
    sigmas = {k: get(f"{k}_sigma").item() for k in noise}
    contexts = tuple(
        get(f"{k}_context") if k in found else None for k in ("video", "audio")
    )
    return make_example(model, found, noise, sigmas, contexts)


def adapted(model, g, case: str, lora: Lora | None = None, **options) -> Trainee:
    info = g["info"]
    lora = lora or Lora.read(TRAIN / info["model"] / info["lora_file"])
    alpha = info["lora"]["alpha"] / info["lora"]["rank"] if "lora" in info else 1.0
    attach(model, [(lora, alpha)])
    return Trainee(model, gradients.factor_parameters(lora), **options)


def golden_name(parameter: str) -> str:
    return parameter.replace("lora_a", "lora_A").replace("lora_b", "lora_B")


def all_of(parameters) -> mx.array:
    return mx.concatenate([w.flatten() for w in parameters.values()])


@pytest.fixture
def g(golden):
    return lambda name, case: golden(f"train/{name}/{case}")


@pytest.mark.parametrize("by_block", [False, True], ids=["at once", "by block"])
@pytest.mark.parametrize("name, case", ALL)
def test_losses_and_gradients_are_the_references(g, name, case, by_block):
    g = g(name, case)
    model = transformer(name)
    trainee = adapted(model, g, case, by_block=by_block)
    batch = len(g["out.loss_per_element"])
    found = [trainee.gradients(example(model, g, i)) for i in range(batch)]
    loss = sum(total.item() for (total, _), _ in found) / batch
    assert loss == pytest.approx(g["out.loss"].item(), rel=1e-5)
    for i, stream in enumerate(("video", "audio")):
        if f"out.{stream}_loss" in g:
            mean = sum(parts[i].item() for (_, parts), _ in found) / batch
            assert mean == pytest.approx(g[f"out.{stream}_loss"].item(), rel=1e-5)
    grads = {k: sum(grads[k] for _, grads in found) / batch for k in found[0][1]}
    silent = {golden_name(k) for k, w in grads.items() if not w.any()}
    assert silent == set(g["info"]["no_gradient"])
    theirs = {
        k: mx.array(g[f"out.grad.{golden_name(k)}"])
        for k in grads
        if golden_name(k) not in silent
    }
    grads = {k: grads[k] for k in theirs}
    for k, w in theirs.items():
        assert relative_error(grads[k], w) < 1e-4, k
    assert relative_error(all_of(grads), all_of(theirs)) < 1e-5


# Steps


@pytest.mark.parametrize("case", ["adamw_constant", "adamw_clip_linear_zero_b"])
@pytest.mark.parametrize("name", ["ltx-2-tiny", "ltx-2.3-tiny"])
def test_three_steps_are_the_references(g, name, case):
    g = g(name, case)
    info, model = g["info"], transformer(name)
    paths = sorted({k[3:-7] for k in g if k.startswith("in.") and k[-7:-1] == ".lora_"})
    pair = lambda path: tuple(mx.array(g[f"in.{path}.lora_{n}"]) for n in "AB")
    trainee = adapted(
        model, g, case, Lora("", {path: pair(path) for path in paths}, {})
    )
    before, opt = trainee.parameters, gradients.optimizer(info["lr"])
    for k in (1, 2, 3):
        part = gradients.SCHEDULES[info["schedule"]]((k - 1) / info["total_steps"])
        assert part * info["lr"] == pytest.approx(g[f"step{k}.out.learning_rate"])
        opt.learning_rate = part * info["lr"]
        (loss, _), grads = trainee.gradients(example(model, g, 0, f"step{k}.in."))
        assert loss.item() == pytest.approx(g[f"step{k}.out.loss"].item(), rel=1e-5)
        limit = info["max_grad_norm"]
        parameters, norm = gradients.step(opt, trainee.parameters, grads, limit)
        trainee.update(parameters)
        if limit:
            assert norm == pytest.approx(g[f"step{k}.out.grad_norm"].item(), rel=1e-4)
        get = lambda p: mx.array(g[f"step{k}.out.{golden_name(p)}"])
        theirs = {p: get(p) for p in before}
        moved = all_of(theirs) - all_of(before)
        assert mx.abs(moved).max() > 1e-4
        wrong = all_of(parameters) - all_of(theirs)
        assert mx.linalg.norm(wrong) < 1e-3 * mx.linalg.norm(moved)


def test_a_step_that_is_not_finite_changes_nothing():
    opt, old = gradients.optimizer(1e-3), {"w": mx.ones(3)}
    grads = {"w": mx.array([1.0, mx.nan, 0.0])}
    new, norm = gradients.step(opt, old, grads, 1.0)
    assert new is old and not np.isfinite(norm)


def test_sigmas_are_the_references(golden):
    g = golden("train/sigma_sampler")
    draws = [g[f"in.{k}"] for k in ("normal", "uniform", "coin")]
    rng = np.random.default_rng(0)
    many = rng.standard_normal(200_000), *rng.uniform(size=(2, 200_000))
    for tokens in g["info"]["lengths"]:
        theirs = g[f"out.sigma.{tokens}"]
        assert np.allclose(gradients.sample_sigmas(tokens, *draws), theirs, atol=1e-5)
        quantiles = np.quantile(
            gradients.sample_sigmas(tokens, *many), g["in.quantiles"]
        )
        population = g[f"out.population_quantiles.{tokens}"]
        inside = (g["in.quantiles"] >= 0.05) & (g["in.quantiles"] <= 0.95)
        assert np.abs(quantiles - population)[inside].max() < 0.005


# What differentiation can get wrong in silence


OUTER = ("to_q", "adaln_single.linear", "proj_out", "patchify_proj", "linear_2")


@pytest.mark.parametrize("by_block", [False, True], ids=["at once", "by block"])
@pytest.mark.parametrize("name", ["ltx-2-tiny", "ltx-2.3-tiny"])
def test_every_factor_learns_also_outside_of_the_blocks(g, name, by_block):
    g, model = g(name, "av"), transformer(name)
    lora = gradients.new_factors(gradients.target_layers(model, OUTER), 2, 0)
    lora = replace(
        lora,
        factors={
            k: (a, mx.random.normal(b.shape)) for k, (a, b) in lora.factors.items()
        },
    )
    attach(model, [(lora, 1.0)])
    trainee = Trainee(model, gradients.factor_parameters(lora), by_block)
    assert len(trainee.outer) > 20
    e = example(model, g)
    _, grads = trainee.gradients(e)
    assert grads.keys() == trainee.parameters.keys()
    for key in trainee.parameters:
        assert mx.abs(grads[key]).max() > 0, key
        # Finite differences along the gradient.
        d = grads[key] / mx.linalg.norm(grads[key])
        values = []
        for eps in (-1e-2, 1e-2):
            changed = trainee.parameters | {key: trainee.parameters[key] + eps * d}
            values.append(Trainee(model, changed).loss(e)[0].item())
        slope = (values[1] - values[0]) / 2e-2
        assert slope == pytest.approx(
            mx.linalg.norm(grads[key]).item(), rel=0.05, abs=2e-3
        )
    Trainee(model, trainee.parameters)


def in_memory(model):
    """Blocks as they would be read from the disk: new ones, each time."""
    from copy import deepcopy

    return lambda: [deepcopy(block) for block in model.transformer_blocks]


@pytest.mark.parametrize(
    "name, case",
    [("ltx-2-tiny", "av"), ("ltx-2.3-tiny", "reference_half"), ("ltx-2.3-tiny", "av")],
)
def test_gradients_by_block_are_the_plain_ones(g, name, case):
    g, model = g(name, case), transformer(name)
    plain = adapted(model, g, case)
    (loss, _), theirs = plain.gradients(example(model, g))
    for options in ({"by_block": True}, {"read": in_memory(model)}):
        trainee = Trainee(model, plain.parameters, **options)
        (again, _), grads = trainee.gradients(example(model, g))
        assert again.item() == pytest.approx(loss.item(), rel=1e-6)
        assert trainee.loss(example(model, g))[0].item() == pytest.approx(
            loss.item(), rel=1e-6
        )
        for key in theirs:
            assert relative_error(grads[key], theirs[key]) < 1e-5


def random_example(model, tokens=(3, 2, 3), audio=9):
    rng, c = np.random.default_rng(0), model.config
    normal = lambda *shape: mx.array(rng.standard_normal(shape, np.float32))
    bounds = latents.video_bounds(*tokens, FPS), latents.audio_bounds(audio)
    found, noise, contexts = {}, {}, []
    widths = c.cross_attention_dim, c.audio_cross_attention_dim
    channels = c.in_channels, c.audio_in_channels
    for name, b, dim, width in zip(("video", "audio"), bounds, channels, widths):
        shape = 1, b.shape[1], dim
        found[name] = latents.LatentState.initial(b, dim, normal(*shape))
        noise[name] = normal(*shape)
        width = width if c.caption_proj_before_connector else c.caption_channels
        contexts.append(normal(1, 8, width))
    sigmas = {"video": 0.62, "audio": 0.31}
    return make_example(model, found, noise, sigmas, tuple(contexts))


@pytest.mark.parametrize("by_block", [False, True], ids=["at once", "by block"])
@pytest.mark.parametrize("bits, least", [(4, 0.98), (8, 0.999)])
@pytest.mark.parametrize("name", ["ltx-2", "ltx-2.3"])
def test_gradients_go_through_a_quantized_base(checkpoint, name, bits, least, by_block):
    lora = Lora.read(checkpoint(f"{name}-lora"))
    found = []
    for model in (load(checkpoint(name)), load(checkpoint(name))):
        if found:
            picked = lambda path, _: quant_predicate(path)
            quantize(model, group_size=32, bits=bits, class_predicate=picked)
        attach(model, [(lora, 1.0)])
        trainee = Trainee(model, gradients.factor_parameters(lora), by_block)
        found.append(all_of(trainee.gradients(random_example(model))[1]))
    assert cosine(*found) > least


def test_new_factors_leave_the_base_as_it_is(g):
    g, model = g("ltx-2.3-tiny", "av"), transformer("ltx-2.3-tiny")
    e = example(model, g)
    before = Trainee(model, {}).loss(e)[0].item()
    layers = gradients.target_layers(model, gradients.TARGETS["both"])
    assert len(layers) == 2 * 6 * 4
    lora = gradients.new_factors(layers, 3, 0)
    attach(model, [(lora, 1.0)])
    trainee = Trainee(model, gradients.factor_parameters(lora))
    assert trainee.loss(e)[0].item() == before
    _, grads = trainee.gradients(e)
    for key, w in grads.items():  # only B learns at first
        assert w.any() == key.endswith("lora_b"), key
    assert {k.rsplit(".", 1)[1] for k in trainee.parameters} == {"lora_a", "lora_b"}


@pytest.mark.parametrize("streams, count", [("both", 48), ("video", 16), ("audio", 16)])
def test_target_layers_match_complete_names(streams, count):
    layers = gradients.target_layers(
        transformer("ltx-2-tiny"), gradients.TARGETS[streams]
    )
    assert len(layers) == count and all("transformer_blocks" in k for k in layers)
    if streams == "video":
        assert not any("audio" in k for k in layers)
