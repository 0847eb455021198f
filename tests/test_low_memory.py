"""Streamed blocks: bit-identical results in less memory."""

import gc
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from streams import inputs
from test_dit import four_passes
from test_pipeline import latents_of, recorded_contexts

from ltx2 import conversion, pipeline, weights
from ltx2.base import UserError
from ltx2.dit import Block, DiT, Pass, StreamedBlocks, build_blocks
from ltx2.request import LoraFile, Request

pytestmark = pytest.mark.usefixtures("quick_rounding")


def in_four_bits(path: Path, folder: Path) -> str:
    """The path of the model, converted."""
    how = conversion.quantization(group_size=32)
    source = weights.open_model(str(path))
    conversion.Conversion(source, how).write(folder / "converted")
    return str(folder / "converted")


@pytest.fixture
def latents(checkpoint, golden):
    """`latents(low_memory, path, kind, upsamplers, **request)`: those of a short run."""

    def run(low_memory, path, kind, upsamplers=(), **options):
        encoder = str(checkpoint("gemma3"))
        pipe = pipeline.load(
            str(path), encoder, kind, mx.float32, upsamplers, low_memory
        )
        request = Request(
            "a dog", seed=10, num_frames=9, sigmas=(1.0, 0.7, 0.0), **options
        )
        job = pipe.plan(request)
        model = f"ltx-{pipe.checkpoint.generation}".removesuffix(".0")
        recorded = recorded_contexts(golden, model)
        contexts = dict(zip(job.prompts, recorded.values()))
        return latents_of(pipe, job, contexts=contexts)

    return run


def assert_identical(resident, streamed):
    for name in ("video", "audio"):
        assert mx.array_equal(resident[name], streamed[name])


@pytest.mark.parametrize(
    "name, kind, converted, loras",
    [
        ("ltx-2", "distilled", False, ()),
        ("ltx-2", "dev", False, ("lora",)),
        ("ltx-2.3", "dev", True, ("lora", "lora2")),
    ],
)
def test_streamed_blocks_give_identical_results(
    checkpoint, latents, tmp_path, name, kind, converted, loras
):
    model = checkpoint(name)
    if converted:
        model = in_four_bits(model, tmp_path)
    files = tuple(LoraFile(str(checkpoint(f"{name}-{n}")), 0.7) for n in loras)
    size = {"height": 64, "width": 64}
    assert_identical(
        *(latents(low, model, kind, loras=files, **size) for low in (False, True))
    )


def test_streamed_stages_have_different_loras(checkpoint, latents):
    lora = LoraFile(str(checkpoint("ltx-2.3-lora")), 0.5, stage=2)
    model, up = checkpoint("ltx-2.3"), [str(checkpoint("spatial-x2"))]
    size = {"height": 128, "width": 128}
    with_lora = [
        latents(low, model, "distilled", up, loras=(lora,), **size)
        for low in (False, True)
    ]
    assert_identical(*with_lora)
    without = latents(True, model, "distilled", up, **size)
    assert not mx.allclose(without["video"], with_lora[1]["video"], atol=1e-3)


def test_a_lora_is_used_once_in_a_stage(checkpoint, tmp_path):
    """A second one would add to its strength in silence."""
    file, other = Path(checkpoint("ltx-2-lora")), tmp_path / "other.safetensors"
    other.symlink_to(file)
    twice = LoraFile(str(file), 0.5), LoraFile(str(other), 0.7)
    pipe = pipeline.load(str(checkpoint("ltx-2")), kind="distilled")
    assert pipe.plan(Request("a", seed=1, loras=twice[:1])).stages[0].loras
    with pytest.raises(UserError, match="is used twice: pass it once, with the sum"):
        pipe.plan(Request("a", seed=1, loras=twice))


def test_each_streamed_block_is_used_before_the_next_is_built(checkpoint, monkeypatch):
    source = weights.open_model(str(checkpoint("ltx-2.3")))
    config = source.load("transformer", lazy=True).config
    events, build = [], Block.__init__
    note = lambda self, c: events.append("built") or build(self, c)
    monkeypatch.setattr(Block, "__init__", note)
    read = lambda: build_blocks(config, source.weights("transformer"))
    for _ in range(2):
        events.clear()
        for _ in StreamedBlocks(read):
            events.append("used")
        assert events == ["built", "used"] * config.num_layers


def test_a_second_stage_holds_one_transformer_and_no_upsampler(
    checkpoint, golden, monkeypatch
):
    """A stage's transformer is freed, without the collector, before the next is built."""
    model, encoder = (str(checkpoint(n)) for n in ("ltx-2.3", "gemma3"))
    up, load, alive = [str(checkpoint("spatial-x2"))], weights.Checkpoint.load, []

    def count(self, name, *arguments, **options):
        if name == "transformer":
            alive.append(sum(type(x) is DiT for x in gc.get_objects()))
        return load(self, name, *arguments, **options)

    lora = LoraFile(str(checkpoint("ltx-2.3-lora")), 0.5, stage=2)
    size = {"height": 128, "width": 128, "num_frames": 9, "sigmas": (1.0, 0.0)}
    pipe = pipeline.load(model, encoder, "distilled", mx.float32, up, low_memory=True)
    job = pipe.plan(Request("a dog", seed=10, **size, loras=(lora,)))
    contexts = dict(zip(job.prompts, recorded_contexts(golden, "ltx-2.3").values()))
    gc.collect()  # of earlier tests
    monkeypatch.setattr(weights.Checkpoint, "load", count)
    held = {}
    for event in pipe.stream(job, contexts=contexts):
        if event.step and event.snapshot:
            held[event.phase] = set(pipe._loaded)
        if event.phase == "latents":
            break
    assert held == {"stage1": {"transformer"}, "stage2": {"transformer"}}
    assert len(alive) == 2 and alive[0] == alive[1]  # fixtures may keep some


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
@pytest.mark.parametrize("depth", [4, 8])
def test_peak_memory_does_not_depend_on_the_depth(checkpoint, golden, depth):
    path = checkpoint("ltx-2.3", transformer={"num_layers": depth})
    source = weights.open_model(str(path))
    model: DiT = source.load("transformer", mx.float32, lazy=True)
    block = sum(w.nbytes for w in tree_leaves(model.transformer_blocks[0]))
    config = model.config  # not the model, which would be in a circle
    read = lambda: source.weights("transformer", mx.float32)
    model.transformer_blocks = StreamedBlocks(lambda: build_blocks(config, read()))
    video, audio, texts = inputs(model, golden("ltx-2.3/transformer_basic"))
    mx.eval(model.parameters(), video.latent, texts)
    gc.collect()  # of earlier tests
    before = mx.get_active_memory()
    for passes in ([Pass()], four_passes()):
        mx.reset_peak_memory()
        mx.eval(model(video, audio, texts, passes))
        assert mx.get_active_memory() < before + block
        assert 2 * block < mx.get_peak_memory() - before < 4 * block


def tree_leaves(module):
    return [w for _, w in tree_flatten(module.parameters())]


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_hub_is_asked_once_for_a_lora(
    latents, checkpoint, fake_hub, monkeypatch, low_memory
):
    """Streamed blocks are read with their LoRAs in each step."""
    asked, info = [], fake_hub.model_info
    counting = lambda repo, **how: asked.append(repo) or info(repo, **how)
    monkeypatch.setattr(fake_hub, "model_info", counting)
    lora = "me/lora/ltx-2-19b-lora.safetensors"
    model = checkpoint("ltx-2"), "distilled"
    of_hub = latents(low_memory, *model, loras=(LoraFile(lora),))
    assert asked == ["me/lora"]
    local = (LoraFile(str(checkpoint("ltx-2-lora"))),)
    assert_identical(latents(low_memory, *model, loras=local), of_hub)
