"""The demo's transformer and connectors train through the product's gradients."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from demo import data, transformer
from ltx2 import gradients, weights
from ltx2.text import TextEncoder

GOLDEN = Path(__file__).parent / "golden" / "train" / "demo.json"


@pytest.fixture(scope="module")
def batches():
    """Two clips with random latents, and the demo's weights."""
    model = weights.open_model(str(transformer.ROOT / "demo" / "model"))
    rng = np.random.default_rng(5)
    shapes = {"video": (2, 4, 3, 3, 64), "audio": (2, 26, 16, 4)}
    draw = lambda shape: mx.array(rng.standard_normal(shape, np.float32))
    return transformer.Batches(
        transformer.open_denoiser(model, new=False),
        TextEncoder(transformer.ROOT / "demo/model/text_encoder", mx.float32),
        {name: draw(shape) for name, shape in shapes.items()},
        [data.sample_scene(rng) for _ in range(2)],
    )


def gradients_of(batches, seed):
    parameters = dict(tree_flatten(batches.denoiser.parameters()))
    example = batches.draw(np.random.default_rng(seed), np.arange(2))
    trainee = gradients.Trainee(batches.denoiser, parameters)
    (loss, _), grads = trainee.gradients(example)
    return example, loss.item(), grads


def test_loss_and_gradients_are_those_of_the_pytorch_description(batches):
    """By name: the norm, and the sum weighted by alternating signs."""
    golden = json.loads(GOLDEN.read_text())
    _, loss, grads = gradients_of(batches, golden["seed"])
    assert loss == pytest.approx(golden["loss"], rel=1e-5)
    assert {transformer.official(k) for k in grads} == golden["gradients"].keys()
    largest = max(norm for norm, _ in golden["gradients"].values())
    for name, w in grads.items():
        g = np.array(w).ravel()
        found = np.linalg.norm(g), g[::2].sum() - g[1::2].sum()
        expected = golden["gradients"][transformer.official(name)]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4 * largest), name


def test_batches_hold_first_frames_and_sound_and_drop_streams(batches):
    kinds = set()
    for seed in range(40):
        video, audio = batches.draw(np.random.default_rng(seed), np.arange(2)).tokens
        kinds.add("both" if video and audio else "alone")
        if video and video.level_index is not None:
            kinds.add("held first frame")
        if audio and audio.sigma.item() == 0:
            kinds.add("sound held")
    assert kinds == {"both", "held first frame", "sound held", "alone"}


def test_new_weights_learn(batches):
    denoiser = batches.denoiser
    trained = dict(tree_flatten(denoiser.parameters()))
    gradients.put(denoiser, transformer.initial(denoiser))
    denoiser.length = 64
    _, _, grads = gradients_of(batches, 4)
    moved = [k for k, g in grads.items() if mx.abs(g).max().item() > 0]
    still = {k for k in grads if k not in moved}
    assert all("adaln_single" in k for k in still)  # behind layers that begin at zero
    denoiser.length = transformer.MAX_TOKENS
    gradients.put(denoiser, trained)
