"""Training: losses, gradients and steps of the reference, and ways to compute them."""

from __future__ import annotations

import json
import signal
import sys
import zlib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from parity import channels_last, cosine, relative_error
from released import HERE
from streams import load
from test_dataset import write_clip
from test_low_memory import in_four_bits
from test_parallel import ROOT, run_on_ring

import generate
import train
from ltx2 import adapters, dataset, gradients, latents, media, memory, training, weights
from ltx2.base import OutputError, UserError
from ltx2.chips import Chip
from ltx2.conversion import OFFICIAL, quant_predicate
from ltx2.gradients import Trainee, make_example
from ltx2.linear import quantize
from ltx2.lora import Lora, attach
from ltx2.sampling import DISTILLED_SIGMAS

pytestmark = pytest.mark.usefixtures("quick_rounding")
TRAIN = HERE / "golden" / "train"
CASES = (
    "av av_first_frame av_one_sigma_first_frame video_only audio_only audio_to_video "
    "video_to_audio reference_half mask batch2_alpha2r"
).split()
ALL = [("ltx-2-tiny", case) for case in CASES]
NEWER = "av av_first_frame video_only video_to_audio reference_half batch2_alpha2r"
ALL += [("ltx-2.3-tiny", case) for case in NEWER.split()]
ALL += [("ltx-2.5-tiny", "av_first_frame")]
STEPS = [("ltx-2-tiny", "adamw_constant")]
STEPS += [(f"{m}-tiny", "adamw_clip_linear_zero_b") for m in ("ltx-2", "ltx-2.3")]
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
        state = latents.LatentState.initial(bounds, tokens.shape[-1], tokens)
        if name == "video" and first and marked(g, name, sample):
            state = state.hold(x[:, :1])
        if name == "video" and "reference" in kinds:
            reference = channels_last(g["in.reference_latents"])
            state = state.show(reference, FPS, 1.0, 2)
        if info.get(f"{name}_role") == "frozen":
            state = state.freeze()
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
    attach(model, [(lora, alpha)], apart=True)
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
    count = len(g["out.loss_per_element"])
    [batch] = gradients.batches([example(model, g, i) for i in range(count)])
    (loss, by_stream), grads = trainee.gradients(batch)
    assert loss.item() == pytest.approx(g["out.loss"].item(), rel=1e-5)
    for stream, each in zip(("video", "audio"), by_stream):
        if f"out.{stream}_loss" in g:
            assert len(each) == count
            mean = each.mean().item()
            assert mean == pytest.approx(g[f"out.{stream}_loss"].item(), rel=1e-5)
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


@pytest.mark.parametrize("name, case", STEPS)
def test_three_steps_are_the_references(g, name, case):
    g = g(name, case)
    info, model = g["info"], transformer(name)
    paths = sorted({k[3:-7] for k in g if k.startswith("in.") and k[-7:-1] == ".lora_"})
    pair = lambda path: tuple(mx.array(g[f"in.{path}.lora_{n}"]) for n in "AB")
    trainee = adapted(
        model, g, case, Lora("", {path: pair(path) for path in paths}, {})
    )
    before, opt = trainee.parameters, gradients.optimizer(info["lr"], 0.01)
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
        theirs = {p: mx.array(g[f"step{k}.out.{golden_name(p)}"]) for p in before}
        moved = all_of(theirs) - all_of(before)
        assert mx.abs(moved).max() > 1e-4
        wrong = all_of(parameters) - all_of(theirs)
        assert mx.linalg.norm(wrong) < 1e-3 * mx.linalg.norm(moved)


def test_a_step_that_is_not_finite_changes_nothing():
    opt, old = gradients.optimizer(1e-3, 0.01), {"w": mx.ones(3)}
    grads = {"w": mx.array([1.0, mx.nan, 0.0])}
    new, norm = gradients.step(opt, old, grads, 1.0)
    assert new is old and not np.isfinite(norm)


def test_factors_decay_by_the_learning_rate_times_the_weight_decay():
    for decay in (0.0, 2.0):
        opt, old = gradients.optimizer(0.1, decay), {"w": mx.array([1.0, -3.0])}
        new, _ = gradients.step(opt, old, {"w": mx.zeros(2)}, 1.0)
        assert np.allclose(new["w"], (1 - 0.1 * decay) * old["w"])


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


@pytest.mark.parametrize("name", ["ltx-2-tiny", "ltx-2.3-tiny"])
def test_every_factor_learns_also_outside_of_the_blocks(g, name):
    g, model = g(name, "av"), transformer(name)
    lora = gradients.new_factors(gradients.target_layers(model, OUTER), 2, 0)
    made = {k: (a, mx.random.normal(b.shape)) for k, (a, b) in lora.factors.items()}
    lora = replace(lora, factors=made)
    attach(model, [(lora, 1.0)], apart=True)
    trainee = Trainee(model, gradients.factor_parameters(lora))
    assert len(gradients.part(trainee.parameters, "")) > 20
    e = example(model, g)
    _, grads = trainee.gradients(e)
    _, by_block = Trainee(model, trainee.parameters, by_block=True).gradients(e)
    assert grads.keys() == by_block.keys() == trainee.parameters.keys()
    for key in trainee.parameters:
        assert mx.abs(grads[key]).max() > 0, key
        assert relative_error(by_block[key], grads[key]) < 1e-4, key
        # Finite differences along the gradient.
        d = grads[key] / mx.linalg.norm(grads[key])
        values = []
        for eps in (-1e-2, 1e-2):
            gradients.put(model, {key: trainee.parameters[key] + eps * d})
            values.append(trainee.loss(e)[0].item())
        gradients.put(model, {key: trainee.parameters[key]})
        slope = (values[1] - values[0]) / 2e-2
        assert slope == pytest.approx(
            mx.linalg.norm(grads[key]).item(), rel=0.05, abs=2e-3
        )


def test_only_parameters_that_there_are_can_be_set():
    model, w = transformer("ltx-2.3-tiny"), mx.zeros(1)
    for name in ("transformer_blocks.0.attn1.to_q.lora_a", "extra"):
        with pytest.raises(ValueError, match="does not have parameter"):
            gradients.put(model, {name: w})


def in_memory(model):
    """Blocks as they would be read from the disk: new ones, each time."""
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


def random_example(model, tokens=(3, 2, 3), audio=9, rows=8, seed=0, hold=False):
    rng, c = np.random.default_rng(seed), model.config
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
        contexts.append(normal(1, rows, width))
    if hold:
        first = found["video"].latent[:, : tokens[1] * tokens[2]]
        found["video"] = found["video"].hold(first.reshape(1, 1, *tokens[1:], -1))
    sigmas = {"video": 0.62 - 0.1 * seed, "audio": 0.31 + 0.1 * seed}
    return make_example(model, found, noise, sigmas, tuple(contexts))


@pytest.mark.parametrize("by_block", [False, True], ids=["at once", "by block"])
@pytest.mark.parametrize("name", ["ltx-2-tiny", "ltx-2.3-tiny"])
def test_a_batch_has_the_losses_and_gradients_of_its_clips(g, name, by_block):
    """Each clip has its own sigmas."""
    g, model = g(name, "av"), transformer(name)
    trainee = adapted(model, g, "av", by_block=by_block)
    examples = [random_example(model, seed=n) for n in range(6)]
    [batch] = gradients.batches(examples)
    (loss, by_stream), grads = trainee.gradients(batch)
    alone = [trainee.gradients(e) for e in examples]
    mean = sum(total for (total, _), _ in alone) / len(examples)
    assert loss.item() == pytest.approx(mean.item(), rel=1e-5)
    for i, each in enumerate(by_stream):
        theirs = mx.concatenate([parts[i] for (_, parts), _ in alone])
        assert mx.allclose(each, theirs, rtol=1e-5)
    weights = [0.5, 3.0, 0.0, 1.0, 1.0, 2.0]
    (again, _), weighted = trainee.gradients(batch, mx.array(weights))
    assert again.item() == loss.item()
    for k, w in grads.items():
        theirs = [found[k] for _, found in alone]
        assert relative_error(w, sum(theirs) / len(examples)) < 1e-5, k
        theirs = sum(x * weight for x, weight in zip(theirs, weights))
        assert relative_error(weighted[k], theirs) < 1e-5, k


def test_clips_of_other_sizes_and_held_frames_are_not_in_a_batch(g):
    model = transformer("ltx-2.3-tiny")
    kinds = ({}, {"tokens": (3, 3, 2)}, {"audio": 8}, {"hold": True})
    made = [random_example(model, seed=n, **kind) for kind in kinds for n in (0, 1)]
    found = [len(batch.contexts[0]) for batch in gradients.batches(made)]
    assert found == [2, 2, 2, 1, 1]


def test_only_new_clips_are_in_the_loss_that_is_reported(run, monkeypatch):
    """Each step preserves a prompt, in one batch with its clip."""
    found, compute = [], Trainee.gradients

    def record(trainee, batch, weights):
        assert weights.tolist() == [1, 1.5]  # what is preserved counts more
        (loss, by_stream), grads = compute(trainee, batch, weights)
        each = [x for x in by_stream if x is not None]
        assert batch.preserved == 1 and {*map(len, each)} == {2}
        found.append(sum(x[0].item() for x in each))
        return (loss, by_stream), grads

    monkeypatch.setattr(training, "PRESERVED_ABOVE", 0)
    monkeypatch.setattr(Trainee, "gradients", record)
    flags = "--iters", "6", "--preserve", "a dog", "--first-frame-prob", "0"
    folder, _ = run(*flags)
    losses = (folder / "loss.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[1]) for row in losses] == pytest.approx(
        found, abs=1e-6
    )


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
        attach(model, [(lora, 1.0)], apart=True)
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
    attach(model, [(lora, 1.0)], apart=True)
    trainee = Trainee(model, gradients.factor_parameters(lora))
    assert trainee.loss(e)[0].item() == before
    _, grads = trainee.gradients(e)
    for key, w in grads.items():  # only B learns at first
        assert w.any() == key.endswith("lora_b"), key
    assert {k.rsplit(".", 1)[1] for k in trainee.parameters} == {"lora_a", "lora_b"}


def test_what_is_to_be_preserved_is_the_bases_prediction(g):
    g, model = g("ltx-2.3-tiny", "av"), transformer("ltx-2.3-tiny")
    trainee = adapted(model, g, "av")
    e = example(model, g)
    texts = tuple(-c for c in e.contexts)
    before, loss = trainee.parameters, trainee.loss(e)[0].item()
    other = trainee.preserved(replace(e, contexts=texts))
    assert trainee.parameters is before and trainee.loss(e)[0].item() == loss
    assert trainee.loss(other)[0].item() > 1e-4
    with trainee.untrained():
        assert trainee.loss(other)[0].item() == 0
    _, grads = trainee.gradients(other)
    assert all(mx.isfinite(w).all() and w.any() for w in grads.values())


@pytest.fixture
def made(monkeypatch):
    """The sigmas by stream and the contexts of each example that is made."""
    found, make = [], gradients.make_example

    def record(model, states, noise, sigmas, contexts):
        found.append((sigmas, contexts))
        return make(model, states, noise, sigmas, contexts)

    monkeypatch.setattr(gradients, "make_example", record)
    return found


@pytest.fixture
def loaded(monkeypatch):
    """The captions of the clips whose latents are read."""
    found, load = [], dataset.Dataset.load

    def record(data, clip):
        found.append(clip.caption)
        return load(data, clip)

    monkeypatch.setattr(dataset.Dataset, "load", record)
    return found


def test_prompts_are_preserved_mainly_where_noise_hides_the_clip(
    run, made, loaded, monkeypatch
):
    kept = []  # how many examples there were

    def preserved(trainee, example):
        kept.append(len(made))
        return example

    monkeypatch.setattr(Trainee, "preserved", preserved)
    run("--iters", "60", "--kind", "distilled", "--preserve", "a dog")
    drawn = [sigmas for sigmas, _ in made]
    assert len(loaded) == len(drawn)
    own = {n for n, caption in enumerate(loaded) if caption == "a dog"}
    hidden = {n for n, sigmas in enumerate(drawn) if min(sigmas.values()) > 0.8}
    # Above the sigma all steps do it, with their own clips
    assert not own & hidden and len(hidden) > 3
    # Below some do it with theirs, some with the base's video, at the same sigmas
    for n in own:
        same = {k: drawn[n][k] for k in drawn[n - 1]}
        assert same == pytest.approx(drawn[n - 1])
    assert not own & {n + 1 for n in own}
    kept = {n - 1 for n in kept}
    assert kept >= own | hidden
    clips, others = kept - own - hidden, 60 - len(hidden)
    assert others > 40
    assert 0.05 < len(clips) / others < 0.35 and 0.35 < len(own) / others < 0.65


def test_the_base_makes_a_video_of_each_prompt_to_preserve_once(
    run, loaded, monkeypatch
):
    made, generate = [], training.Trainer._generate

    def record(trainer, job, *how):
        names = dict(tree_flatten(trainer.pipe.transformer.parameters()))
        assert names and not any("lora" in name for name in names)
        made.append(job.request.prompt)
        assert all(trainer.data.contexts.read(p) is not None for p in job.prompts)
        return generate(trainer, job, *how)

    monkeypatch.setattr(training.Trainer, "_generate", record)
    monkeypatch.setattr(training, "PRESERVED_ABOVE", 1)
    monkeypatch.setattr(training, "WITH_CLIP", 0)
    monkeypatch.setattr(training, "WITH_OWN", 1)  # after each clip
    run("--iters", "2", to="first")
    prompts = "a bird", "a fish"  # not in the cache yet
    more = ["--iters", "8", "--resume-adapter-file", "first"]
    more += [part for prompt in prompts for part in ("--preserve", prompt)]
    for to in ("second", "third"):
        loaded.clear()
        run(*more, to=to)
        assert [caption in prompts for caption in loaded] == [False, True] * 6
        assert {*loaded} >= {*prompts}
    assert made == [*prompts]
    assert same(*map(files, (Path("second"), Path("third"))))
    run("--iters", "2", "--kind", "distilled", *more[4:], to="other")
    assert made == [*prompts, *prompts]


def test_texts_are_moved_only_with_prompts_to_preserve(run):
    with pytest.raises(UserError, match="text_jitter needs preserve"):
        run("--iters", "1", "--text-jitter", "0.5")


def test_preserving_a_prompt_changes_the_training(run, monkeypatch):
    monkeypatch.setattr(training, "PRESERVED_ABOVE", 0)  # in each step
    flags = ("--iters", "2")  # in the first one the model is still the base
    folders = [
        run(*flags, *more, to=to)[0]
        for to, more in (
            ("plain", ()),
            ("held", ("--preserve", "a dog", "--preserve", "a cat")),
        )
    ]
    plain, held = map(files, folders)
    assert not same(plain, held)


def test_a_distilled_models_steps_are_drawn_by_their_lengths():
    draws = (np.arange(20000) + 0.5) / 20000
    found = [gradients.sigma_of_step(draw) for draw in draws]
    for sigma, after in zip(DISTILLED_SIGMAS, DISTILLED_SIGMAS[1:]):
        assert np.mean(np.equal(found, sigma)) == pytest.approx(sigma - after, abs=1e-4)


def test_texts_are_moved_by_part_of_the_difference_of_two_preserved_ones(
    run, made, loaded, monkeypatch
):
    texts, context = {}, dataset.Dataset.context

    def read(data, caption):
        assert data.contexts.read(caption) is not None  # encoded before the first step
        rng = np.random.default_rng(zlib.crc32(caption.encode()))
        other = lambda x: mx.array(rng.standard_normal(x.shape, np.float32))
        texts[caption] = tuple(map(other, context(data, caption)))
        return texts[caption]

    monkeypatch.setattr(dataset.Dataset, "context", read)
    monkeypatch.setattr(training, "PRESERVED_ABOVE", 1)
    prompts = "--preserve", "a dog", "--preserve", "a cat"
    run("--iters", "20", "--val-clips", "1", *prompts, "--text-jitter", "0.5")
    assert len(loaded) == len(made)
    dog, cat, shares = texts["a dog"], texts["a cat"], {}
    for caption, (_, contexts) in zip(loaded, made):
        for x, text, a, b in zip(contexts, texts[caption], dog, cat):
            way, moved = a - b, x - text
            share = ((moved * way).sum() / (way * way).sum()).item()
            assert mx.allclose(moved, share * way, atol=1e-5)
            shares.setdefault(caption, []).append(share)
    for caption in ("clip 2", "a dog", "a cat"):  # held out, or preserved
        assert np.allclose(shares.pop(caption), 0, atol=1e-6)
    found = np.array(sum(shares.values(), []))
    assert (found[::2] == pytest.approx(found[1::2], abs=1e-4)) and len(found) == 40
    assert -0.5 <= found.min() < -0.1 and 0.1 < found.max() <= 0.5


def test_a_step_reads_the_first_rows_of_a_text_and_some_of_the_others():
    rng, counts = np.random.default_rng(0), []
    for _ in range(300):
        found = gradients.some_rows(64, 8, rng).tolist()
        assert found[:8] == [*range(8)] and found == sorted({*found})
        assert found[-1] < 64
        counts.append(len(found))
    shares = {8: 1 / 2, 16: 1 / 4, 32: 1 / 8, 64: 1 / 8}
    assert {*counts} == {*shares}
    assert all(abs(counts.count(n) / 300 - shares[n]) < 0.08 for n in shares)
    assert gradients.some_rows(64, 64, rng).tolist() == [*range(64)]


def test_steps_read_few_rows_of_texts_and_held_out_losses_all(run, monkeypatch):
    rows = {"gradients": [], "loss": [], "preserved": []}

    def recorded(compute, found):
        def record(trainee, e, *weights):
            found.append(next(x.shape[1] for x in e.contexts if x is not None))
            return compute(trainee, e, *weights)

        return record

    for name, found in rows.items():
        monkeypatch.setattr(Trainee, name, recorded(getattr(Trainee, name), found))
    monkeypatch.setattr(training, "PRESERVED_ABOVE", 0)  # in each step
    monkeypatch.setattr(training, "MAX_TOKENS", 64)
    run("--iters", "24", "--text-rows", "8", "--preserve", "a dog", "--val-clips", "1")
    assert {*rows["gradients"]} == {*rows["preserved"]} <= {8, 16, 32, 64}
    assert rows["preserved"].count(8) > 6 and {*rows["preserved"]} != {8}
    assert {*rows["loss"]} == {64}


@pytest.mark.parametrize("kind", ["dev", "distilled"])
def test_a_distilled_base_trains_also_at_the_sigmas_of_its_steps(run, made, kind):
    run("--iters", "12", "--kind", kind)
    values = [{*sigmas.values()} for sigmas, _ in made]
    own = [sigmas for sigmas in values if sigmas < {*DISTILLED_SIGMAS}]
    assert len(made) == 12 and all(len(sigmas) == 1 for sigmas in own)
    assert 3 <= len(own) <= 9 if kind == "distilled" else not own


@pytest.mark.parametrize("streams, count", [("both", 48), ("video", 16), ("audio", 16)])
def test_target_layers_match_complete_names(streams, count):
    layers = gradients.target_layers(
        transformer("ltx-2-tiny"), gradients.TARGETS[streams]
    )
    assert len(layers) == count and all("transformer_blocks" in k for k in layers)
    if streams == "video":
        assert not any("audio" in k for k in layers)


# Whole runs


SIZES = ("--resolution", "64x64x9", "--resolution", "64x64x1")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for n, frames in enumerate((9, 17, 9, 1)):
        write_clip(folder / f"{n}.mp4", frames, sound=n != 2)
        (folder / f"{n}.txt").write_text(f"clip {n}")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(checkpoint, clips, cache, quick_text, monkeypatch, capsys, tmp_path):
    """`run("--iters", "3", to="a")`: the folder of the adapter, and what was printed."""

    def call(*flags, to="adapter", model="ltx-2"):
        monkeypatch.chdir(tmp_path)
        argv = ["train.py", "--model", str(checkpoint(model)), "--data", str(clips)]
        if model != "ltx-2.5":  # which has its own
            argv += ["--text-encoder", str(checkpoint("gemma3"))]
        argv += ["--cache", str(cache)]
        argv += ["--adapter-path", to, *SIZES, "--rank", "2", "--learning-rate", "1e-2"]
        argv += ["--steps-per-report", "1", "--steps-per-eval", "2", "--val-clips", "0"]
        argv += ["--sample-every", "0"]
        argv += flags
        monkeypatch.setattr(sys, "argv", argv)
        train.main()
        return tmp_path / to, capsys.readouterr().out

    return call


def files(folder):
    return {
        name: mx.load(str(folder / name))
        for name in ("adapters.safetensors", "state.safetensors")
    }


def same(a, b) -> bool:
    return all(
        a[f].keys() == b[f].keys()
        and all(mx.array_equal(a[f][k], b[f][k]) for k in a[f])
        for f in a
    )


def test_an_interrupted_training_continues_bit_for_bit(run, monkeypatch):
    flags = ("--iters", "4", "--batch-size", "2", "--val-clips", "1")
    whole, printed = run(*flags, to="whole")
    assert "Iter 4: held-out loss" in printed and "it/s" in printed
    measure = training.Trainer.held_out_loss

    def interrupt(trainer):
        signal.raise_signal(signal.SIGINT)  # Ctrl-C, in step 2
        return measure(trainer)

    monkeypatch.setattr(training.Trainer, "held_out_loss", interrupt)
    part, printed = run(*flags, to="part")
    assert "stopping after this step" in printed
    assert "continue with --resume-adapter-file part" in printed
    assert not same(files(part), files(whole))
    with pytest.raises(UserError, match="part has an earlier adapters"):
        run(*flags, to="part")
    monkeypatch.setattr(training.Trainer, "held_out_loss", measure)
    run(*flags, "--resume-adapter-file", "part", to="part")
    assert same(files(part), files(whole))
    lines = [(f / "loss.csv").read_text().splitlines() for f in (part, whole)]
    assert lines[0] == lines[1] and len(lines[0]) == 5
    assert media.load_image(part / "loss.png").shape == (540, 960, 3)


def test_a_state_that_is_damaged_or_a_strangers_is_named(run, tmp_path):
    folder, _ = run("--iters", "1", to="done")
    state = folder / training.STATE
    arrays, metadata = mx.load(str(state), return_metadata=True)
    arrays = {k: mx.array(w) for k, w in arrays.items()}
    key = next(k for k in arrays if k.startswith("m."))
    cases = [
        (arrays, metadata | {"history": '"two"'}, "history must be a list"),
        (arrays, metadata | {"history": "[[1, 2]]"}, "history.0. must be a list of 3"),
        (arrays, metadata | {"history": "}"}, "is not valid JSON"),
        (arrays, {}, "is not valid JSON"),
        (arrays, metadata | {"base_model": "LTX-2 2.3.0 dev"}, "was trained on LTX-2"),
        ({k: w for k, w in arrays.items() if k != key}, metadata, "is missing, not"),
        (arrays | {key: mx.zeros(3)}, metadata, r"is \(3,\), not"),
    ]
    for tensors, facts, message in cases:
        mx.save_safetensors(str(state), tensors, facts)
        with pytest.raises(UserError, match=message):
            run("--iters", "2", "--resume-adapter-file", "done", to="done")
    state.write_bytes(b"nothing")
    with pytest.raises(UserError, match="state"):
        run("--iters", "2", "--resume-adapter-file", "done", to="done")


def test_damaged_latents_are_made_again(run):
    folder, _ = run("--iters", "1", "--cache", "kept", to="one")
    damaged = sorted(Path("kept").glob("*.latents.safetensors"))[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    run("--iters", "1", "--cache", "kept", to="two")
    assert damaged.read_bytes() == whole


def test_the_adapter_is_an_official_lora(run, checkpoint, monkeypatch, capsys):
    flags = "--iters 2 --trigger sks --save-every 1 --sample-every 2 --kind distilled"
    folder, _ = run(*flags.split(), "--learning-rate", "0.2")
    lora = Lora.read(folder)
    model = load(checkpoint("ltx-2"))
    lora.check(model)
    assert len(lora.factors) == 2 * 6 * 4
    assert all(b.any() for _, b in lora.factors.values())
    assert lora.metadata["rank"] == lora.metadata["alpha"] == "2"
    assert lora.metadata["trigger_words"] == "sks"
    assert lora.metadata["base_model"] == "LTX-2 2.0.0 distilled"
    keys = mx.load(str(folder / "adapters.safetensors")).keys()
    assert "diffusion_model.transformer_blocks.1.attn2.to_out.0.lora_A.weight" in keys
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 2 and config["steps"] == 2
    assert config["load"]["model"] == "ltx-2.safetensors"  # without its folder
    assert (folder / "0000001_adapters.safetensors").is_file()
    # A sample is to the right of the untrained model's.
    before, after = (
        np.stack([*media.read_video(folder / "samples" / f"000000{n}-1.mp4")])
        for n in (0, 2)
    )
    assert after.shape == (9, 64, 128, 3)
    assert np.abs(after[:, :, :64].astype(int) - before).mean() < 8
    assert np.abs(after[:, :, 64:].astype(int) - before).mean() > 16
    argv = ["generate.py", "--model", str(checkpoint("ltx-2")), "--prompt", "a"]
    argv += ["--text-encoder", str(checkpoint("gemma3")), "--lora", str(folder)]
    argv += ["--kind", "distilled", "--height", "64", "--width", "64"]
    monkeypatch.setattr(sys, "argv", [*argv, "--num-frames", "9"])
    generate.main()
    assert "wrote output.mp4" in capsys.readouterr().out


def test_ltx_2_5_is_trained(run, checkpoint):
    folder, _ = run("--iters", "1", model="ltx-2.5")
    lora = Lora.read(folder)
    lora.check(load(checkpoint("ltx-2.5")))
    assert lora.metadata["model_version"] == "2.5.1"


@pytest.fixture(scope="module")
def four_bits(checkpoint, tmp_path_factory):
    return in_four_bits(checkpoint("ltx-2.3"), tmp_path_factory.mktemp("4 bits"))


@pytest.mark.parametrize("memory", [("--grad-checkpoint",), ("--low-memory",)])
def test_a_4_bit_model_is_trained(run, checkpoint, four_bits, memory, monkeypatch):
    flags = ("--model", four_bits, "--iters", "2", *memory)
    flags += ("--batch-size", "2", "--preserve", "a dog", "--text-rows", "8")
    monkeypatch.setattr(training, "MAX_TOKENS", 64)
    folder, _ = run(*flags, "--learning-rate", "0.02", model="ltx-2.3")
    lora = Lora.read(folder)
    lora.check(load(checkpoint("ltx-2.3")))
    assert all(b.any() for _, b in lora.factors.values())
    rows = (folder / "loss.csv").read_text().splitlines()
    assert len(rows) == 3


def test_the_adapter_is_uploaded_with_a_card(run, fake_hub):
    run("--iters", "1", "--trigger", "sks", "--upload-repo", "me/mine")
    names = ["README.md", "adapter_config.json", "adapters.safetensors", "loss.png"]
    assert fake_hub.uploaded == ("me/mine", names)
    again = "--iters", "1", "--resume-adapter-file", "adapter"
    with pytest.raises(UserError, match="adapter has 1 steps: pass more --iters"):
        run(*again)
    fake_hub.uploaded = None  # as if the upload had failed
    run(*again, "--upload-repo", "me/mine")
    assert fake_hub.uploaded == ("me/mine", names)


def test_the_card_names_base_license_and_trigger():
    options = {"trigger": "sks", "rank": 4}
    config = {
        "options": options,
        "base_model": "LTX-2 2.3.0 dev",
        "clips": 5,
        "steps": 9,
    }
    card = adapters.model_card(config, "me/mine", OFFICIAL["2.3"])
    for text in (
        "base_model: Lightricks/LTX-2.3",
        "license_name: ltx-2",
        "`sks`",
        "--lora me/mine\n",
        "pipeline_tag: text-to-video",
        "sample.mp4",
    ):
        assert text in card


def test_streamed_training_is_that_in_memory(run):
    flags = ("--iters", "2", "--val-clips", "1", "--batch-size", "2")
    flags += ("--preserve", "a dog", "--cache")
    plain, printed = run(*flags, "one", to="plain")
    assert "held in memory" in printed and "kept for the backward pass" in printed
    streamed, printed = run(*flags, "two", "--low-memory", to="streamed")
    assert "read block by block" in printed
    for f, arrays in files(plain).items():
        for k, w in files(streamed)[f].items():
            w, other = (x.astype(mx.float32) for x in (w, arrays[k]))
            assert mx.allclose(w, other, rtol=1e-3, atol=1e-5), k


@pytest.mark.parametrize("streams", ["video", "audio"])
def test_one_stream_is_trained_alone(run, streams):
    flags = f"--iters 1 --streams {streams} --sample-every 1 --kind distilled"
    folder, _ = run(*flags.split())
    paths = Lora.read(folder).factors
    assert len(paths) == 16 and all(
        ("audio" in p) == (streams == "audio") for p in paths
    )
    suffix = {"video": "mp4", "audio": "wav"}[streams]
    assert (folder / "samples" / f"0000001-1.{suffix}").is_file()


def test_a_reference_lora_says_its_scale(run, clips):
    flags = ("--iters", "1", "--streams", "video", "--reference-data", str(clips))
    more = ("--resolution", "128x64x9", "--reference-downscale", "2")
    folder, _ = run(*flags, *more)
    assert Lora.read(folder).metadata["reference_downscale_factor"] == "2"


def test_a_plan_reads_no_weights(run, monkeypatch):
    def fail(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr(weights, "evaluate", fail)
    folder, printed = run("--plan")
    assert "train" in printed and "encode" in printed and not folder.exists()
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    with pytest.raises(UserError, match="needs .* GB but .* try a lower-bit model"):
        run()
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    smaller = "--batch-size 1 with more --grad-accumulation-steps would fit"
    with pytest.raises(UserError, match=f"needs .* GB but .*; {smaller}"):
        run("--batch-size", "1024")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rank 0", "rank must be between 1 and 1024"),
        ("--learning-rate nan", "learning_rate must be a finite number"),
        ("--val-clips 9", "val_clips must be between 0 and 3"),
        ("--target-modules to_x", "no linear layer's name ends in to_x: try to_q"),
        ("--text-encoder .", "text encoder . has no config.json"),
        ("--reference-downscale 2", "needs reference_data"),
        ("--reference-data nowhere", "nowhere: no such folder of reference clips"),
        ("--reference-data . --streams audio", "combined with --streams audio"),
        ("--reference-data . --reference-downscale 3", "multiples of 96"),
        ("--data /dev/null", "no such folder or list"),
        ("--adapter-path ~/taken", "taken has an earlier adapter_config.json"),
        ("--adapter-path taken/adapter_config.json", "cannot be written"),
        ("--resume-adapter-file nowhere", "nowhere: no such file"),
    ],
)
def test_a_mistake_is_refused_before_weights_are_read(
    run, monkeypatch, tmp_path, flags, message
):
    def fail(*_):
        raise AssertionError("weights are read")

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(weights, "evaluate", fail)
    monkeypatch.setattr("ltx2.components.TextEncoder", fail)
    with pytest.raises(UserError, match=message):
        run(*flags.split())


def test_an_error_keeps_the_steps_before_it(run, monkeypatch, tmp_path):
    def full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(training.Trainer, "_generate", full)  # of the untrained model
        run("--iters", "4", "--sample-every", "3")
    assert all(b.any() for _, b in Lora.read(tmp_path / "adapter").factors.values())
    folder, _ = run("--iters", "4", "--resume-adapter-file", "adapter")
    assert len((folder / "loss.csv").read_text().splitlines()) == 5


def test_a_training_ends_whose_gradients_are_never_finite(run, monkeypatch):
    same = lambda opt, parameters, *_: (parameters, float("nan"))
    monkeypatch.setattr(gradients, "step", same)
    with pytest.raises(OutputError, match="10 steps in a row had no finite gradients"):
        run("--iters", "12")


def test_what_is_planned_for_a_sound_has_no_picture():
    size = latents.Size(64, 32, 9, 24, 10)
    of = lambda *streams: dataset.of_streams(size, streams)
    assert (of("audio").tokens, of("audio").audio_tokens) == (0, 10)
    assert (of("video").tokens, of("video").audio_tokens) == (4, 0)
    assert of("video", "audio") == size


def test_losses_that_are_not_finite_are_left_out_of_the_picture(tmp_path):
    rows = [[1, float("nan"), None], [2, 1.5, 0.5]]
    adapters.save_losses(tmp_path, rows)
    assert (tmp_path / "loss.csv").read_text().split()[1:] == ["1,nan,", "2,1.5,0.5"]
    chart = media.load_image(tmp_path / "loss.png")
    assert chart.std() > 0
    adapters.save_losses(tmp_path, [*rows, [2, 1.5, float("nan")]])  # held out
    longer = media.load_image(tmp_path / "loss.png")
    adapters.save_losses(tmp_path, [*rows, [2, 1.5, None]])
    assert (longer == media.load_image(tmp_path / "loss.png")).all()


def test_two_machines_average_their_gradients(run, clips, cache, checkpoint, tmp_path):
    flags = ["--iters", "2"]
    single, _ = run(*flags, "--batch-size", "2", to="single")
    command = [str(ROOT / "train.py"), *sys.argv[1:]]
    command[command.index("single")] = str(tmp_path / "double")
    command[command.index("--batch-size") + 1] = "1"
    printed, _ = run_on_ring(2, tmp_path, *command)
    assert printed.count("Iter 2: loss") == 1, printed
    for f, arrays in files(single).items():
        for k, w in files(tmp_path / "double")[f].items():
            assert mx.allclose(w, arrays[k], rtol=1e-3, atol=1e-5), k


@pytest.mark.cpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("by_block", [False, True], ids=["at once", "by block"])
def test_training_holds_the_memory_that_is_planned(checkpoint, by_block, batch):
    wide = checkpoints.widths(heads=4, video=64, audio=32)
    path = checkpoint("ltx-2.3", transformer={**wide, "num_layers": 4})
    source = weights.open_model(str(path))
    model = source.load("transformer", mx.float32)
    lora = gradients.new_factors(gradients.target_layers(model, ("to_q",)), 2, 0)
    attach(model, [(lora, 1.0)], apart=True)
    trainee = Trainee(model, gradients.factor_parameters(lora), by_block)
    [e] = gradients.batches([random_example(model, (5, 8, 8), 40, 1024)] * batch)
    mx.eval([t.latent for t in e.tokens], e.targets, e.contexts)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(trainee.gradients(e))
    size = latents.Size(8 * 32, 8 * 32, 33, 24, 40)
    estimator = memory.Estimator(source, mx.float32)
    planned = estimator.training([size], 0, by_block, batch=batch)["train"].buffers
    assert 0.7 < (mx.get_peak_memory() - before) / planned < 1.15


def test_dequantized_weights_are_planned_once_for_a_batch(four_bits, monkeypatch):
    """They are kept from as many rows on as all clips of the batch have."""
    monkeypatch.setattr(memory, "this_chip", lambda: Chip(dequantize_from=100))
    source = weights.open_model(four_bits)
    estimator = memory.Estimator(source, mx.float32)
    size = latents.Size(8 * 32, 8 * 32, 1, 24, 1)  # of 64 tokens
    for by_block, parts in (
        (False, 1),
        (True, source.config["transformer"]["num_layers"]),
    ):
        one, two = (
            estimator.training([size], 0, by_block, batch=n)["train"].buffers
            for n in (1, 2)
        )
        held = estimator.blocks / parts * 8 / estimator.bits * 4
        assert two - 2 * one == pytest.approx(held)
