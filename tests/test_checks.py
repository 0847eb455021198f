"""Diagnostics: correct traces, and every kind of damage is found."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import round_quickly
from test_look import Page

from ltx2 import base, checks, pipeline, weights
from ltx2.checks import Tracer
from ltx2.conversion import Conversion, quantization
from ltx2.request import Request

SMALL = ("--height", 64, "--width", 64, "--num-frames", 9)


@pytest.fixture
def check(monkeypatch, capsys):
    """`check("probe", path)`: exit code and what was printed."""

    def call(*args) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["checks", *map(str, args)])
        capsys.readouterr()
        try:
            base.run(checks.main)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        seen = capsys.readouterr()
        return code, seen.out + seen.err

    return call


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each line of a table by its first word."""
    cells = [line.split() for line in table.splitlines()]
    return {c[0]: c[1:] for c in cells if c}


def test_help_loads_no_model_code():
    program = (
        "import sys, ltx2.checks as c\n"
        "c.parser().format_help()\n"
        "assert not {'ltx2.weights', 'ltx2.pipeline', 'mlx.nn', 'numpy'} & sys.modules.keys()"
    )
    root = Path(checks.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


# Traces


def traced(*stages) -> Tracer:
    """A trace of stages (name, mean, std)."""
    tracer = Tracer()
    for name, mean, std in stages:
        tracer(name, mx.array([mean - std, mean + std]))
    return tracer


def test_chunks_of_a_stage_add_up():
    rng = np.random.default_rng(0)
    chunks = [rng.normal(i, i + 1, (2, i + 1, 3)) for i in range(4)]
    tracer = Tracer()
    for chunk in chunks:
        tracer("stage", mx.array(chunk, mx.float32))
    x = np.concatenate(chunks, axis=1)
    expected = x.mean(), x.std(), x.min(), x.max()
    np.testing.assert_allclose(tracer.stages["stage"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name, x, flags",
    [
        ("block0.video", [-9999.0, 9999.0], []),
        ("block0.video", [-10001.0, 99.0], ["explosion"]),
        ("block0.video", [0.0, 10001.0], ["explosion"]),
        ("block0.video", [-0.11, 0.11], []),
        ("block0.video", [-0.09, 0.09], ["collapse"]),
        ("block0.video", [float("nan"), 1.0], ["not finite"]),
        ("block0.video", [float("inf"), 1.0], ["not finite", "explosion"]),
        ("audio.waveform", [-0.01, 0.01], []),  # -40 dB
        ("audio.waveform", [-1e-4, 1e-4], ["collapse"]),
        ("video.frames", [0.07, 0.13], []),  # a dark picture
        ("video.frames", [0.1, 0.13], ["collapse"]),
    ],
)
def test_anomalies_are_flagged(name, x, flags):
    tracer = Tracer()
    tracer(name, mx.array(x))
    assert tracer.flags() == {name: flags}


@pytest.mark.parametrize(
    "before, after, flips",
    [
        (("video.up0", 1.0, 2.0), ("video.up1", -0.6, 2.0), True),
        (("video.up0", 1.0, 2.0), ("video.up1", 0.6, 2.0), False),
        (("video.up0", 1.0, 2.0), ("video.up1", -0.4, 2.0), False),  # another magnitude
        (("video.up0", 1.0, 2.0), ("video.up1", -2.1, 2.0), False),
        (
            ("video.up0", 0.1, 2.0),
            ("video.up1", -0.1, 2.0),
            False,
        ),  # both are almost zero
        (("block0.video", 1.0, 2.0), ("block0.audio", -1.0, 2.0), False),
        (("audio.mel", 1.0, 2.0), ("audio.waveform", -1.0, 2.0), False),
        (("video.conv_out", -0.34, 0.4), ("video.frames", 0.33, 0.2), False),
    ],
)
def test_a_sign_flip_is_a_mean_of_opposite_sign(before, after, flips):
    tracer = traced(before, ("block0.audio" if flips else "start", 0.5, 1), after)
    expected = ["sign flip"] if flips else []
    assert traced(before, after).flags()[after[0]] == expected
    assert not flips or tracer.flags()[after[0]] == expected  # other streams between


def test_the_table_is_aligned_and_names_the_first_flag():
    tracer = traced(("conv_in", 0.0, 1.0), ("up0", 0.0, 2e4), ("up1", 0.0, 0.0))
    head, *lines, end = tracer.table().splitlines()
    assert head.split() == ["stage", "mean", "std", "min", "max"]
    assert lines[1].split() == ["up0", "0", "2e+04", "-2e+04", "2e+04", "explosion"]
    assert {line.index("0", 8) for line in lines} == {head.index("mean") + 3}
    assert end == "2 of 3 flagged, the first is up0"


def test_the_drift_between_two_traces():
    ours = traced(("same", 1.0, 2.0), ("moved", 1.5, 2.0), ("wider", 1.0, 2.5))
    theirs = traced(("same", 1.0, 2.0), ("moved", 1.0, 2.0), ("wider", 1.0, 2.0))
    table = rows(ours.table(theirs))
    drift = {name: float(table[name][4]) for name in ("same", "moved", "wider")}
    assert drift == {"same": 0, "moved": 0.25, "wider": 0.25}


@pytest.mark.parametrize(
    "latents, std, flags", [("zeros", 0, ["collapse"]), ("random", 1, [])]
)
def test_every_stage_of_a_decode_is_traced(check, checkpoint, latents, std, flags):
    code, out = check("trace", checkpoint("ltx-2.3"), "--latents", latents, *SMALL)
    stages = rows(out[out.index("stage") :])
    assert code == 0
    sound = ["audio.latents", "audio.mel", "audio.waveform"]
    ups = [f"video.up{i}" for i in range(9)]
    picture = ["video.latents", "video.conv_in", *ups]
    picture += ["video.act", "video.conv_out", "video.frames"]
    assert [name for name in stages if name.startswith("audio.")] == sound
    assert [name for name in stages if name.startswith("video.")] == picture
    for name in "audio.latents", "video.latents":
        assert float(stages[name][1]) == pytest.approx(std, abs=0.1)
        assert stages[name][4:] == flags
    low, high = map(float, stages["video.frames"][2:])
    assert 0 <= low < high <= 1


def test_every_stage_of_a_run_is_traced(check, checkpoint, short_contexts):
    run = ("--prompt", "a dog", "--steps", 2, "--text-encoder", checkpoint("gemma3"))
    run += ("--dtype", "float32")  # which is faster on CPUs
    code, out = check("trace", checkpoint("ltx-2-notc"), *run, *SMALL)
    assert code == 0
    assert {
        "gemma.0",
        "text.audio_context",
        "stage1.step0.block1.video",
        "stage1.step1.block0.audio",
        "stage1.audio",
        "audio.waveform",
        "video.up6",
    } <= rows(out).keys()


def test_saved_latents_are_traced_in_two_dtypes(check, checkpoint, tmp_path):
    request = Request("a dog", height=64, width=64, num_frames=9, stages="one")
    path = tmp_path / "dog.latents.safetensors"
    latents = {"video": mx.full((1, 2, 2, 2, 24), 0.5)}
    pipe = pipeline.load(checkpoint("ltx-2"))
    start = pipe.initial_snapshot(pipe.plan(request))
    dataclasses.replace(start, stage=1, latents=latents).save(path)
    args = ("trace", checkpoint("ltx-2"), "--latents", path, "--against", "float32")
    code, out = check(*args, "--html", tmp_path / "page.html")
    stages = rows(out)
    assert code == 0 and "audio" not in out
    assert stages["video.latents"][:2] == ["0.5", "0"]
    assert float(stages["video.up6"][4]) == 0  # the decoder is float32 in any run
    page = Page((tmp_path / "page.html").read_text())
    heads, *cells = ([c for c in row if c] for row in page.rows)
    assert heads[-1] == "drift" and dict((c[0], c[1:6]) for c in cells) == {
        name: stages[name][:5] for name, *_ in cells
    }
    assert page.tags.count("img") == 2  # the frames of both
    assert page.tags.count("svg") == 2  # the layers of the decoder, and their drift


def test_a_rejected_run_shows_its_trace(check, checkpoint, tmp_path):
    tensors, metadata = mx.load(str(checkpoint("ltx-2")), return_metadata=True)
    key = "vae.decoder.up_blocks.2.res_blocks.0.conv1.conv.weight"
    tensors[key] = tensors[key] * mx.nan
    path = tmp_path / "broken.safetensors"
    mx.save_safetensors(str(path), tensors, metadata)
    html = tmp_path / "page.html"
    code, out = check("trace", path, "--latents", "random", *SMALL, "--html", html)
    assert code == 1
    assert rows(out)["video.up2"] == ["nan"] * 4 + ["not", "finite"]
    assert "the first is video.up2" in out
    page, flagged = Page(html.read_text()), [
        name for name, v in rows(out).items() if v[-1] == "finite"
    ]
    assert [row[0] for row in page.marked] == flagged and "video.up2" in flagged
    assert {row[-1] for row in page.marked} == {"not finite"}
    assert page.tags.count("circle") == len(flagged)  # in the charts
    assert out.splitlines()[-1].startswith(
        "error: output rejected: frames are not finite"
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (("--latents", "nosuch"), "nosuch: no such file"),
        (
            ("--latents", "nosuch", "--height", 64),
            "--height cannot be combined with --latents nosuch",
        ),
        (
            ("--latents", "zeros", "--steps", 3),
            "--steps cannot be combined with --latents zeros",
        ),
        (("--latents", "zeros", "--height", 65), "height must be a multiple of 32"),
        (("--latents", "zeros", "--html", "/dev/null/x"), "x: cannot be written"),
        (("--prompt", "a dog", "--num-frames", 10), "num_frames must be 8k+1"),
        (("--prompt", ""), "the prompt is empty"),
    ],
)
def test_invalid_trace_arguments_are_one_line(check, checkpoint, args, message):
    code, out = check("trace", checkpoint("ltx-2"), *args)
    assert code == 2
    assert message in out and len(out.splitlines()) == 1


def test_a_trace_has_the_size_that_the_model_is_made_for(check):
    prompt = "A red circle moves from left to right on a dark background, with a low pure tone."
    args = "--prompt", prompt, "--dtype", "float32"  # which is faster on CPUs
    code, out = check("trace", Path(__file__).parents[1] / "demo/model", *args)
    assert code == 0 and "0 of 87 flagged" in out


def test_the_limit_of_steps_is_checked(check, checkpoint):
    args = "quality", checkpoint("ltx-2"), "--against", checkpoint("ltx-2"), "--limit"
    assert check(*args, -1) == (
        2,
        "error: --limit must be between 1 and 1000, got -1\n",
    )


@pytest.mark.parametrize(
    "stage, name",
    [
        ("gemma.3", "gemma"),
        ("text.audio_context", "text, audio"),
        ("stage1.step0.block12.video", "stage1.step0, video"),
        ("chunk1.stage2.step3.block0.audio", "chunk1.stage2.step3, audio"),
        ("video.up3", "video"),
        ("audio.waveform", "audio"),
    ],
)
def test_stages_that_follow_each_other_are_one_chart(stage, name):
    assert checks.series(stage) == name


# Weights and their source

LAYER = "transformer_blocks.0.attn1.to_q"  # quantized, square
OTHER = "transformer_blocks.1.attn1.to_q"
TENSOR = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"
OTHER_TENSOR = "decoder.up_blocks.0.res_blocks.1.conv1.conv.weight"
HOW = quantization("affine", 4, 32)


def convert(path: Path, folder: Path, *args) -> Path:
    Conversion(weights.open_model(str(path)), *args).write(folder)
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    return convert(checkpoint("ltx-2"), folder, HOW)


@pytest.fixture
def damaged(converted, tmp_path):
    """`damaged("vae", change)`: a 4-bit folder of which `change` has changed a file."""

    def make(component: str, change) -> Path:
        folder = Path(shutil.copytree(converted, tmp_path / "model"))
        path = folder / f"{component}.safetensors"
        tensors = mx.load(str(path))
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(str(path), tensors, {"format": "mlx"})
        return folder

    return make


@pytest.mark.parametrize(
    "args, layers, low, high",
    [
        ((), 0, 0, 0),
        ((HOW,), 56, 0.03, 0.1),
        ((quantization("affine", 8, 64),), 28, 0.001, 0.01),  # not the narrow ones
        ((quantization("mxfp4"),), 56, 0.05, 0.2),
        ((HOW, False, mx.float16), 56, 0.03, 0.1),
    ],
)
def test_an_exact_conversion_has_no_faults(
    checkpoint, converted, tmp_path, check, args, layers, low, high, monkeypatch
):
    source, folder = checkpoint("ltx-2"), converted
    if args != (HOW,):
        round_quickly(monkeypatch)
        folder = convert(source, tmp_path / "model", *args)
    code, out = check("compare", folder, source)
    assert code == 0 and out.endswith("\nno faults\n")
    table = rows(out)
    assert table["vae"][:3] == ["100", "0", "0"]
    assert table["transformer"][1] == str(layers)
    if args:
        number, mean, worst, name = table["attn1.to_q"]
        assert number == "2" and low < float(mean) <= float(worst) < high
        assert name in (f"{LAYER}.weight", f"{OTHER}.weight")


def swap(a: str, b: str):
    def change(tensors):
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def replace(key: str, new):
    def change(tensors):
        tensors[key] = new(tensors[key])

    return change


def swap_layers(tensors):
    for leaf in ("weight", "scales", "biases"):
        swap(f"{LAYER}.{leaf}", f"{OTHER}.{leaf}")(tensors)


def transpose_layer(tensors):
    parts = [tensors[f"{LAYER}.{leaf}"] for leaf in ("weight", "scales", "biases")]
    parts = mx.quantize(mx.dequantize(*parts, **HOW).T, **HOW)
    for leaf, part in zip(("weight", "scales", "biases"), parts):
        tensors[f"{LAYER}.{leaf}"] = part


def scale_layer(tensors):
    for leaf in ("scales", "biases"):
        replace(f"{LAYER}.{leaf}", lambda w: w * 1.0625)(tensors)


@pytest.mark.parametrize(
    "component, change, faults",
    [
        ("vae", swap(TENSOR, OTHER_TENSOR), {TENSOR: "cosine", OTHER_TENSOR: "cosine"}),
        ("vae", replace(TENSOR, lambda w: w.swapaxes(0, 4)), {TENSOR: "error 1.4"}),
        ("vae", replace(TENSOR, lambda w: w * 0), {TENSOR: "error 1, cosine 0.000"}),
        ("vae", replace(TENSOR, lambda w: w * 2), {TENSOR: "norm 2 times"}),
        ("vae", replace(TENSOR, lambda w: w[:8]), {TENSOR: "is (8,"}),
        ("vae", replace(TENSOR, lambda w: w * mx.nan), {TENSOR: "nan"}),
        ("vae", lambda t: t.pop(TENSOR), {TENSOR: "is missing"}),
        ("vae", lambda t: t.update(x=mx.ones(2)), {"x": "is not in the source"}),
        ("transformer", swap_layers, {LAYER: "error 1.4", OTHER: "error 1.4"}),
        ("transformer", transpose_layer, {LAYER: "error 1.39"}),
        ("transformer", scale_layer, {LAYER: "error 0.0822"}),
        (
            "transformer",
            replace(f"{LAYER}.weight", mx.zeros_like),
            {LAYER: "quantizing gives 0.0"},
        ),
        (
            "transformer",
            replace(f"{LAYER}.scales", lambda w: w[:, :1]),
            {LAYER: "is not (64, 64) quantized with"},
        ),
        (
            "transformer",
            lambda t: t.pop(f"{LAYER}.biases"),
            {LAYER: "is not (64, 64) quantized with"},
        ),
        (
            "transformer",
            lambda t: t.pop(f"{LAYER}.weight"),
            {LAYER: "is not (64, 64) quantized with"},
        ),
    ],
)
def test_damage_is_found(check, checkpoint, damaged, component, change, faults):
    code, out = check("compare", damaged(component, change), checkpoint("ltx-2"))
    *_, count = out.splitlines()
    found = [line for line in out.splitlines() if line.startswith(f"{component}: ")]
    assert code == 1
    assert count == f"{len(faults)} faults"
    for (key, words), line in zip(sorted(faults.items()), found, strict=True):
        assert key in line and words in line


def test_a_changed_configuration_is_found(check, checkpoint, damaged):
    folder = damaged("vae", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["vae"]["spatial_padding_mode"] = "zeros"
    (folder / "config.json").write_text(json.dumps(config))
    code, out = check("compare", folder, checkpoint("ltx-2"))
    assert code == 1
    assert "config.json: vae differs from the source\n1 faults" in out


def test_another_model_is_not_the_source(check, checkpoint, converted):
    code, out = check("compare", converted, checkpoint("ltx-2", seed=1))
    assert code == 1
    assert out.count("differs: ") == 20  # the rest is only counted
    assert int(out.splitlines()[-1].split()[0]) > 500


def test_an_upsampler_is_part_of_the_source(check, checkpoint, tmp_path):
    model, upsampler = checkpoint("ltx-2.3"), checkpoint("spatial-x2")
    source = weights.open_model(str(model), upsamplers=[str(upsampler)])
    Conversion(source).write(tmp_path / "model")
    args = ("compare", tmp_path / "model", model)
    code, out = check(*args)
    assert (
        code == 1 and "spatial_upsampler: initial_conv.bias is not in the source" in out
    )
    code, out = check(*args, "--upsampler", upsampler)
    assert code == 0, out


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
def test_tensors_are_compared_one_at_a_time(checkpoint, tmp_path):
    source = weights.open_model(str(checkpoint("ltx-2")))
    Conversion(source).write(tmp_path / "model")
    converted = weights.open_model(str(tmp_path / "model"))
    largest = max(w.nbytes for w in source.weights("vae").values())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert not checks.compare(converted, source)[1]
    assert mx.get_peak_memory() - before < 3 * largest  # ours, theirs, what is equal


@pytest.mark.parametrize("swapped", [True, False])
def test_invalid_comparisons_are_one_line(check, checkpoint, converted, swapped):
    model = checkpoint("ltx-2") if swapped else converted
    code, out = check("compare", model, converted)
    assert code == 2
    assert "compare needs a converted folder, then its unquantized source" in out
    assert len(out.splitlines()) == 1


# Known latents


@pytest.mark.parametrize("name", ["ltx-2", "ltx-2-notc", "ltx-2.3"])
def test_a_healthy_decoder_has_no_faults(check, checkpoint, name):
    code, out = check("probe", checkpoint(name))
    assert code == 0 and out.endswith("\nno faults\n")
    assert ("another timestep" in out) == (name == "ltx-2")
    assert out.splitlines()[1].split()[-1] == "0"  # the first is equal to itself


@pytest.fixture
def vae(checkpoint):
    source = weights.open_model(str(checkpoint("ltx-2")))
    return source.load("vae", mx.float32)


def flatten(vae):
    conv = vae.decoder.conv_out.conv
    conv.weight, conv.bias = mx.zeros_like(conv.weight), mx.zeros_like(conv.bias)


def forget_the_timestep(vae):
    vae.decoder.timestep_scale_multiplier = mx.zeros(())


def shift(amount):
    def change(vae):
        vae.decoder.conv_out.conv.bias += mx.array(amount)

    return change


SAME = "same result as for the random latent"


@pytest.mark.parametrize(
    "change, faults",
    [
        (
            lambda v: v.per_channel_statistics.update({"std-of-means": mx.zeros(24)}),
            [
                f"another latent: {SAME}",
                f"zero latent: {SAME}",
                f"another noise: {SAME}",
            ],
        ),
        (forget_the_timestep, [f"another timestep: {SAME}"]),
        (flatten, ["random latent: flat", "random latent: all frames are the same"]),
        (shift(-1.5), ["random latent: dark", "zero latent: dark"]),
        (shift(1.5), ["random latent: bright", "another noise: bright"]),
        (shift([0.0] * 16 + [2.0] * 16 + [-2.0] * 16), ["random latent: tinted"]),
        (shift(float("nan")), ["random latent: not finite", "zero latent: not finite"]),
        (
            lambda v: v.decoder.conv_out.conv.update(
                {"weight": 20 * v.decoder.conv_out.conv.weight}
            ),
            ["random latent: clipped"],
        ),
    ],
)
def test_anomalies_of_a_broken_decoder_are_named(vae, change, faults):
    change(vae)
    found = checks.probe_decoder(vae)[1]
    assert set(faults) <= set(found)


def test_zeroed_statistics_are_found(check, damaged):
    def zero(tensors):
        for leaf in ("mean-of-means", "std-of-means"):
            key = f"per_channel_statistics.{leaf}"
            tensors[key] = mx.zeros_like(tensors[key])

    code, out = check("known", damaged("vae", zero))
    assert code == 1
    assert f"another latent: {SAME}" in out
