"""What quantizing costs, measured against the source."""

import json
import runpy
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import QuickVocoder, round_quickly, shorten_contexts
from test_look import Page

from ltx2 import checks, pipeline, quality, weights
from ltx2.base import UserError
from ltx2.conversion import Conversion
from ltx2.pipeline import Pipeline
from ltx2.quantization import layers, quantization, recipe

SIZE = {"height": 64, "width": 64, "num_frames": 9}


@pytest.fixture(scope="module", autouse=True)
def quick_sound_and_text():
    """As `quick_vocoder`, for the whole file, and short contexts."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_contexts(patch)
        patch.setattr(Pipeline, "vocoder", QuickVocoder())
        yield


@pytest.fixture(scope="module")
def source(checkpoint):
    return str(checkpoint("ltx-2.3"))


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """The model in 3 and 8 bits."""
    found = {}
    for bits in (3, 8):
        found[bits] = tmp_path_factory.mktemp("quality") / str(bits)
        how = quantization(bits=bits, group_size=32)
        with pytest.MonkeyPatch.context() as patch:
            round_quickly(patch)
            Conversion(weights.open_model(source), how).write(found[bits])
    return found


def pipe(path) -> Pipeline:
    return pipeline.load(str(path), dtype="float32")


@pytest.fixture(scope="module")
def runs(source):
    p = pipe(source)
    wanted = quality.requests(p, {**SIZE, "steps": 3}, SIZE)[:1]
    return [quality.run(p, clip) for clip in quality.clips(p, wanted, True)]


def test_the_source_has_no_error(source, runs):
    p = pipe(source)
    assert quality.mean_square([quality.errors(p, runs[0], 9)]) == 0
    again = quality.run(p, runs[0])
    assert quality.decibels(again, runs[0]) > 100
    assert quality.spectra(again.sound, runs[0].sound) == 0


def test_a_model_is_read_once_for_all_its_steps(source, runs, monkeypatch):
    p, read, load = pipe(source), [], weights.Checkpoint.load
    count = lambda self, name, *how, **more: read.append(name) or load(
        self, name, *how, **more
    )
    monkeypatch.setattr(weights.Checkpoint, "load", count)
    assert len(quality.errors(p, runs[0], 3)) == 3
    assert read.count("transformer") == 1


def test_fewer_bits_have_a_larger_error(folders, runs):
    square = {
        bits: quality.mean_square([quality.errors(pipe(folder), runs[0], 2)])
        for bits, folder in folders.items()
    }
    assert 0 < 25 * square[8] < square[3]


def test_four_bits_by_layer_have_half_the_error_of_plain_ones(tmp_path):
    """Of the demo model, which is trained; plain: `mx.quantize` in groups of 64."""
    demo = weights.open_model(str(Path(__file__).parents[1] / "demo" / "model"))
    shapes, how = demo.shapes("transformer"), quantization()
    done = Conversion(demo, recipe(None, how, shapes))
    done.write(tmp_path / "model")
    assert done.mean_bits <= 5
    plain = quality.quantized(demo, dict.fromkeys(layers(shapes, 64), how))
    source = Pipeline(demo, dtype=mx.float32)
    clip = quality.clips(source, quality.requests(source, {}, SIZE)[:1], True)
    runs = [quality.run(source, c, decode=False) for c in clip]
    error = lambda p: quality.mean_square(quality.errors(p, c, 2) for c in runs) ** 0.5
    ours, theirs = pipe(tmp_path / "model"), Pipeline(plain, dtype=mx.float32)
    assert error(ours) < 0.55 * error(theirs)


def test_a_step_starts_where_the_source_is(folders, runs):
    """The error of a step does not depend on the steps before it."""
    model = pipe(folders[3])
    every, last = (quality.errors(model, runs[0], n) for n in (3, 1))
    assert list(every) == [0, 1, 2] and list(last) == [2]
    assert last[2] == every[2]


def test_steps_are_spread_evenly():
    assert quality.spread(8, 99) == [*range(8)]
    assert quality.spread(8, 4) == [1, 3, 5, 7]
    assert quality.spread(3, 1) == [2]


def test_a_part_of_the_layers_is_quantized(source):
    checkpoint = weights.open_model(source)
    paths = ["transformer_blocks.0.ff.net.2"]
    how = quantization(bits=4, group_size=32)
    changed = quality.quantized(checkpoint, dict.fromkeys(paths, how))
    before, after = checkpoint.weights("transformer"), changed.weights("transformer")
    different = [k for k, w in before.items() if not mx.array_equal(w, after[k])]
    assert different == [f"{path}.weight" for path in paths]


def test_bits_go_to_the_kinds_that_cause_the_error():
    def zeros(rows, columns):
        return mx.zeros((rows, columns), mx.bfloat16)

    names = "attn1.to_q", "attn1.to_v", "ff.net.2"
    shapes = {
        f"transformer_blocks.{i}.{name}.weight": zeros(64, 64)
        for i in range(4)
        for name in names
    }
    squares = dict(zip(names, (1e-6, 1e-4, 2e-4)))
    squares |= {quality.QUARTER.format(n): n * 1e-4 for n in (1, 2, 3, 4)}
    kinds = quality.Kinds(quantization(), shapes, squares)
    how, expected = kinds.recipe()
    bits = [
        [how.get(f"transformer_blocks.{i}.{n}", how)["bits"] for i in range(4)]
        for n in names
    ]
    assert bits[0] == [3, 3, 3, 3] and bits[1] == sorted(bits[1])
    assert bits[2][3] >= bits[2][0] > 3
    assert expected < sum(squares[name] for name in names) ** 0.5 / 2
    heads, rows = kinds.table
    assert rows[0][0] == "quarter 4 of the blocks" and "attn1.to_q" in {
        r[0] for r in rows
    }


def test_distances_are_known():
    clip = quality.Clip(None, {})
    one, two = (
        quality.replace(clip, frames=[np.full((1, 2, 2, 3), n, np.uint8)])
        for n in (10, 11)
    )
    assert quality.decibels(one, two) == pytest.approx(48.13, abs=0.01)
    tone = np.sin(np.arange(4096) / 20)[:, None] * np.ones((1, 2))
    assert quality.spectra(tone, tone) == 0
    assert 0 < quality.spectra(
        tone, tone + 1e-3 * np.random.default_rng(0).normal(size=(4096, 2))
    )


def test_parts_are_measured_one_at_a_time(source, runs):
    paths = {
        "ff.net.2": [f"transformer_blocks.{i}.ff.net.2" for i in (0, 1)],
        "nothing": [],
    }
    model, how = pipe(source), quantization(bits=4, group_size=32)
    kinds = quality.Kinds(how, model.checkpoint.shapes("transformer"))
    kinds.parts = paths
    kinds.measure(model, runs, 1)
    assert kinds.squares["nothing"] == 0 < kinds.squares["ff.net.2"]


@pytest.fixture
def measured(monkeypatch):
    """All parts of the layers cause the same error, and are rounded after a short search."""

    def measure(kinds, source, runs, limit):
        kinds.squares = dict.fromkeys(kinds.parts, 1e-4)

    monkeypatch.setattr(quality.Kinds, "measure", measure)
    monkeypatch.setattr(quality, "CLIPS", 1)
    round_quickly(monkeypatch)


def run_convert(monkeypatch, source, folder, *args):
    args = ["convert.py", "--hf-path", source, "--mlx-path", folder, "-q", *args]
    monkeypatch.setattr(sys, "argv", [*map(str, args)])
    runpy.run_path("convert.py", run_name="__main__")


def test_the_command_saves_a_recipe_that_convert_takes(
    source, folders, measured, tmp_path, monkeypatch, capsys
):
    file, model = tmp_path / "bits.json", tmp_path / "model"
    args = [str(folders[3]), "--against", source, "--dtype", "float32", "--limit", "1"]
    args += ["--height", "64", "--width", "64", "--steps", "2", "--recipe", str(file)]
    args += ["--html", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", ["checks", "quality", *args])
    checks.main()
    out = capsys.readouterr().out
    # Both runs have 2 steps, of which 1 is compared, also for 28 kinds and the quarters
    # of 3 blocks; each with 4 passes of guidance.
    assert out.startswith(f"1 clips, {4 * (2 * 2 + 1 + 31)} calls of the transformer")
    for text in ("overall error of x0", "PSNR", "one part quantized", "is expected"):
        assert text in out
    page = Page((tmp_path / "page.html").read_text())
    numbers = {word for line in out.splitlines() for word in line.split()}
    assert all(numbers >= set(" ".join(row).split()) for row in page.rows)
    assert page.tags.count("table") == len(page.marked) == 3  # the largest of each
    assert page.tags.count("img") == 3  # source, model, difference
    recipe = json.loads(file.read_text())
    assert recipe["bits"] == 3 and recipe["group_size"] == 32
    run_convert(monkeypatch, source, model, "--quant-predicate", file)
    assert weights.open_model(str(model)).quantization == recipe


def test_convert_measures_its_own_source(
    source, measured, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(checks, "SIZE", SIZE)
    args = ("--quant-predicate", "auto", "--q-group-size", 32, "--kind", "distilled")
    run_convert(monkeypatch, source, tmp_path / "model", *args)
    assert "is expected as the relative error of x0" in capsys.readouterr().out
    card = (tmp_path / "model" / "README.md").read_text()
    assert "is expected as the relative error of x0" in card


def test_the_source_must_not_be_quantized(source, folders):
    options = {"limit": None, "recipe": None, "prompt": None}
    with pytest.raises(UserError, match="needs the unquantized source"):
        quality.report(pipe(source), pipe(folders[8]), options, SIZE)
