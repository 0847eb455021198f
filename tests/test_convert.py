"""Conversion to a model folder: exact, streamed, complete or not at all."""

import fcntl
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from huggingface_hub import ModelCard, errors
from mlx.utils import tree_flatten

from ltx2 import base, conversion, hub, weights
from ltx2 import quantization as rounding
from ltx2.base import UserError
from ltx2.conversion import Conversion, quantization
from ltx2.dit import DiTConfig, build_blocks
from ltx2.linear import layer_formats
from ltx2.lora import Lora
from ltx2.quantization import quantize

pytestmark = pytest.mark.usefixtures("quick_rounding")
ROOT = Path(__file__).parent.parent


def convert(*args) -> int:
    """Run convert.py in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", *map(str, args)])
        try:
            runpy.run_path(str(ROOT / "convert.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


def refused(capsys, *args) -> str:
    """The one line that convert.py answers with."""
    assert convert(*args) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def write(path: Path, folder: Path, *args, **options) -> weights.Checkpoint:
    """Convert by the API and open the result."""
    Conversion(weights.open_model(str(path)), *args, **options).write(folder)
    return weights.open_model(str(folder))


@pytest.fixture(scope="module")
def small(checkpoint, tmp_path_factory) -> Path:
    """A checkpoint without VAEs and vocoder, for what is about the transformer."""
    folder = tmp_path_factory.mktemp("small")
    return transformer_alone(checkpoint("ltx-2"), folder)


@pytest.fixture(scope="module")
def one_block(checkpoint, tmp_path_factory) -> Path:
    """The same with one block."""
    path = checkpoint("ltx-2", transformer={"num_layers": 1})
    return transformer_alone(path, tmp_path_factory.mktemp("one-block"))


def transformer_alone(path: Path, folder: Path) -> Path:
    tensors, metadata = mx.load(str(path), return_metadata=True)
    config = json.loads(metadata["config"])
    metadata["config"] = json.dumps({"transformer": config["transformer"]})
    tensors = {k: w for k, w in tensors.items() if k.startswith(("model.", "text_"))}
    path = folder / "ltx-2.safetensors"
    mx.save_safetensors(str(path), tensors, metadata)
    return path


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory) -> Path:
    """A model folder with 4 bits in groups of 32."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    write(checkpoint("ltx-2"), folder, quantization(group_size=32))
    return folder


# What comes out


def test_unquantized_weights_stay_as_they_are(checkpoint, tmp_path):
    official = weights.open_model(str(checkpoint("ltx-2.3")))
    converted = write(checkpoint("ltx-2.3"), tmp_path / "model")
    assert converted.components == official.components
    for name in official.components:
        a, b = official.weights(name), converted.weights(name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype and mx.array_equal(a[key], b[key]), key
        converted.load(name)


@pytest.mark.parametrize(
    "mode, bits, group_size",
    [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)]
    + [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)],
)
def test_quantized_weights_reload_bit_for_bit(
    one_block, tmp_path, mode, bits, group_size
):
    how = quantization(mode, bits, group_size)
    official = weights.open_model(str(one_block)).weights("transformer")
    converted = write(one_block, tmp_path / "model", how)
    assert converted.quantization == how
    module = dict(tree_flatten(converted.load("transformer").parameters()))
    layers = [key.removesuffix(".scales") for key in module if key.endswith(".scales")]
    assert len(layers) == 6 * 4 + 2 * 2  # attentions, feed-forwards
    for layer in layers:
        parts = quantize(official[f"{layer}.weight"], **how)
        for leaf, part in zip(("weight", "scales", "biases"), parts):
            assert mx.array_equal(module[f"{layer}.{leaf}"], part)
    for key, w in official.items():
        if key.removesuffix(".weight") not in layers:
            assert mx.array_equal(module[key], w)


def test_only_the_linears_of_the_blocks_are_quantized(checkpoint, tmp_path):
    how = quantization(group_size=32)
    source = write(checkpoint("ltx-2.3"), tmp_path / "model", how)
    for name in source.components:
        keys = [k for k in source.parts[name] if k.endswith(".scales")]
        assert bool(keys) == (name == "transformer")
    paths = [k.removesuffix(".scales") for k in source.parts["transformer"]]
    assert "transformer_blocks.0.audio_ff.net.0.proj" in paths
    for other in (
        "patchify_proj",
        "adaln_single.linear",
        "transformer_blocks.0.attn1.to_gate_logits",
    ):
        assert f"{other}.scales" not in source.parts["transformer"]


def test_a_predicate_picks_the_layers(small, tmp_path):
    source = write(
        small,
        tmp_path / "model",
        quantization(group_size=32),
        predicate=lambda path: path.endswith("1.ff.net.2"),
    )
    quantized = [k for k in source.parts["transformer"] if k.endswith(".scales")]
    assert quantized == ["transformer_blocks.1.ff.net.2.scales"]
    source.load("transformer")


def test_layers_that_do_not_fit_a_group_stay(small, tmp_path):
    source = write(small, tmp_path / "model", quantization(group_size=64))
    assert "transformer_blocks.0.attn1.to_q.scales" in source.parts["transformer"]
    assert (
        "transformer_blocks.0.audio_attn1.to_q.scales"
        not in source.parts["transformer"]
    )
    source.load("transformer")
    with pytest.raises(UserError, match="no layer can be quantized in groups of 64"):
        write(small, tmp_path / "no", quantization(), predicate=lambda path: False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_dequantizing_gives_an_ordinary_model(small, tmp_path, mode):
    how = quantization(mode, group_size=32)
    quantized = write(small, tmp_path / "quantized", how)
    plain = write(tmp_path / "quantized", tmp_path / "plain", dequantize=True)
    assert plain.quantization is None
    assert plain.provenance["files"] == quantized.provenance["files"]
    official = weights.open_model(str(small)).weights("transformer")
    tensors = plain.weights("transformer")
    assert tensors.keys() == official.keys()
    key = "transformer_blocks.0.ff.net.2"
    packed = quantize(official[f"{key}.weight"], **how)
    assert tensors[f"{key}.weight"].dtype == mx.bfloat16
    assert mx.array_equal(tensors[f"{key}.weight"], mx.dequantize(*packed, **how))
    plain.load("transformer")


def test_dtype_casts_what_is_not_quantized(checkpoint, tmp_path):
    how = quantization(group_size=32)
    source = write(checkpoint("ltx-2"), tmp_path / "model", how, dtype=mx.float16)
    transformer = source.weights("transformer")
    assert transformer["proj_out.weight"].dtype == mx.float16
    assert transformer["transformer_blocks.0.ff.net.2.scales"].dtype == mx.float16
    assert source.weights("vocoder")["conv_pre.weight"].dtype == mx.bfloat16
    recipe = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]
    assert recipe["recipe"] == {"quantization": how, "dtype": "float16", "loras": {}}


def test_large_components_are_sharded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD", 200_000)
    source = write(small, tmp_path / "model")
    files = sorted(p.name for p in (tmp_path / "model").glob("transformer-*"))
    assert len(files) > 2 and files[0].endswith(
        f"00001-of-{len(files):05d}.safetensors"
    )
    assert all((tmp_path / "model" / f).stat().st_size < 300_000 for f in files)
    index = tmp_path / "model" / "transformer.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    assert {
        k: f.name for k, (f, _) in source.parts["transformer"].items()
    } == weight_map
    source.load("transformer")
    (tmp_path / "model" / files[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {files[1]}"):
        weights.open_model(str(tmp_path / "model"))


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
def test_one_tensor_is_in_memory_at_a_time(checkpoint, tmp_path):
    source = weights.open_model(str(checkpoint("ltx-2.3")))
    largest = max(
        w.nbytes for n in source.components for w in source.weights(n).values()
    )
    job = Conversion(source, quantization(group_size=32))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    job.write(tmp_path / "model")
    peak = mx.get_peak_memory() - before  # a transposed tensor is copied once
    assert peak < 2.1 * largest < source.files[0].size / 6


def test_config_records_the_source(checkpoint, tmp_path):
    official = tmp_path / "ltx-2-19b-distilled.safetensors"
    shutil.copy(checkpoint("ltx-2"), official)
    shutil.copy(checkpoint("spatial-x2-rational"), tmp_path / "up.safetensors")
    folder = tmp_path / "model"
    source = weights.open_model(
        str(official), upsamplers=[str(tmp_path / "up.safetensors")]
    )
    Conversion(source, text_encoder="owner/gemma").write(folder)
    config = json.loads((folder / "config.json").read_text())
    metadata = json.loads(hub.read_header(official)[1]["config"])
    assert {key: config[key] for key in metadata} == metadata
    assert config["spatial_upsampler"]["mid_channels"] == 32
    assert (config["model_type"], config["model_version"]) == ("ltx2", "2.0.0")
    assert (config["kind"], config["text_encoder"]) == ("distilled", "owner/gemma")
    sha256 = subprocess.check_output(["sha256sum", official], text=True).split()[0]
    assert config["provenance"]["files"]["ltx-2-19b-distilled.safetensors"] == sha256
    assert config["provenance"]["tool"].startswith("ltx2 ")
    converted = weights.open_model(str(folder))
    assert (converted.kind, converted.kind_assumed) == ("distilled", False)
    assert converted.text_encoder == "owner/gemma" and converted.version == (2, 0, 0)
    converted.load("spatial_upsampler")
    converted = weights.open_model(
        str(folder), upsamplers=[str(tmp_path / "up.safetensors")]
    )
    converted.load("spatial_upsampler")  # an official one next to converted weights


def test_a_folder_may_hold_its_text_encoder_and_other_files(quantized, tmp_path):
    model = shutil.copytree(quantized, tmp_path / "model")
    (model / "gemma").mkdir()
    edit(model, "text_encoder", "gemma")
    (model / "style-lora.safetensors").write_bytes(b"not looked at")
    source = weights.open_model(str(model))
    assert source.text_encoder == str(model / "gemma")
    assert "style-lora.safetensors" not in [f.name for f in source.files]


# A damaged folder


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda m: (m / "vae.safetensors").unlink(), "lacks vae.safetensors"),
        (lambda m: (m / "transformer.safetensors").unlink(), "lacks transformer"),
        (lambda m: (m / "config.json").unlink(), "not an LTX-2 file"),
        (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
        (
            lambda m: (m / "vae.safetensors").write_bytes(b"12345678"),
            "not a safetensors",
        ),
        (lambda m: edit(m, "provenance", None), "provenance is missing"),
        (lambda m: edit(m, "kind", "quick"), "kind must be dev or distilled"),
        (lambda m: edit(m, "transformer", None), "no configuration of the transformer"),
        (
            lambda m: edit(m, "quantization", None),
            "cannot be quantized with None|quantization",
        ),
        (
            lambda m: edit(m, "quantization", quantization(bits=8, group_size=32)),
            "do not match",
        ),
        (
            lambda m: edit(m, "quantization", quantization(bits=4, group_size=64)),
            "do not match|cannot",
        ),
        (lambda m: edit(m, "quantization", quantization("mxfp4")), "do not match"),
        (
            lambda m: edit(m, "quantization", {"bits": 7, "group_size": 32}),
            "bits must be one of",
        ),
        (
            lambda m: edit(m, "defaults", {"num_frames": None}),
            "defaults.num_frames must be a number, got None",
        ),
    ],
)
def test_a_damaged_folder_is_one_line(quantized, tmp_path, damage, message):
    model = shutil.copytree(quantized, tmp_path / "model")
    damage(model)
    with pytest.raises(UserError, match=message) as error:
        weights.open_model(str(model)).load("transformer")
    assert "\n" not in str(error.value)


def edit(model: Path, key: str, value) -> None:
    config = json.loads((model / "config.json").read_text())
    config[key] = value
    if value is None:
        del config[key]
    (model / "config.json").write_text(json.dumps(config))


# Complete or not at all


def test_an_interrupted_conversion_leaves_nothing(small, tmp_path):
    def interrupt(size):
        raise KeyboardInterrupt

    source = weights.open_model(str(small))
    with pytest.raises(KeyboardInterrupt):
        Conversion(source).write(tmp_path / "model", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    left = tmp_path / ".model-abcdefgh.partial"  # by a process that was killed
    (left / "new").mkdir(parents=True)
    (left / "lock").touch()
    (left / "new" / "transformer.safetensors").write_text("half")
    Conversion(source).write(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    before = (tmp_path / "model" / "config.json").stat().st_ino
    with pytest.raises(KeyboardInterrupt):
        Conversion(source).write(tmp_path / "model", True, progress=interrupt)
    assert (tmp_path / "model" / "config.json").stat().st_ino == before
    Conversion(source).write(tmp_path / "model", True)
    assert (tmp_path / "model" / "config.json").stat().st_ino != before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_can_be_converted_in_place(quantized, tmp_path):
    model = shutil.copytree(quantized, tmp_path / "model")
    assert convert("--hf-path", model, "-d", "--mlx-path", model, "--overwrite") == 0
    assert weights.open_model(str(model)).quantization is None


def test_an_empty_folder_may_be_the_target(small, tmp_path):
    (tmp_path / "new").mkdir()
    assert convert("--hf-path", small, "--mlx-path", tmp_path / "new") == 0


def test_another_model_is_not_overwritten(small, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    args = ("--hf-path", small, "--mlx-path", tmp_path, "--overwrite")
    assert "not a converted model" in refused(capsys, *args)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    def full(self, path, weights, progress):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Conversion, "write_file", full)
    path = small
    message = refused(capsys, "--hf-path", path, "--mlx-path", tmp_path / "model")
    assert "No space left on device" in message
    assert list(tmp_path.iterdir()) == []


def test_no_permission(small, tmp_path, monkeypatch, capsys):
    def forbidden(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    message = refused(capsys, "--hf-path", small, "--mlx-path", tmp_path / "m")
    assert "Permission denied" in message


@pytest.mark.parametrize(
    "target",
    [
        'a folder\'s "name" #1: yes',
        "名前",
        "x" * 250,
        "new/parents/model",
        "new/../model",
        "model/.",
        "dangling",
        "linked/model",
    ],
)
def test_the_target_may_be_any_path(small, tmp_path, target):
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    path = f"{tmp_path}/{target}"
    assert convert("--hf-path", small, "--mlx-path", path) == 0
    assert convert("--hf-path", small, "--mlx-path", path, "--overwrite") == 0
    model = weights.open_model(str(Path(path).resolve()))
    model.check("transformer", "connectors")
    assert not list(tmp_path.rglob(".*.partial"))


def with_encoder(model: Path, encoder: Path) -> Path:
    """A model folder that holds its text encoder, as a relative path."""
    shutil.copytree(encoder, model / "text_encoder")
    edit(model, "text_encoder", "text_encoder")
    return model


def test_a_text_encoder_in_the_model_folder_is_copied(
    quantized, checkpoint, tmp_path, monkeypatch
):
    model = Path(shutil.copytree(quantized, tmp_path / "model"))
    with_encoder(model, checkpoint("gemma3"))
    target = tmp_path / "plain"
    assert convert("--hf-path", model, "-d", "--mlx-path", target) == 0
    monkeypatch.chdir("/")
    found = weights.open_model(str(target)).text_encoder
    assert found == str(target / "text_encoder")
    weights.check_text_encoder(found)
    assert convert("--hf-path", target, "--mlx-path", target, "--overwrite") == 0
    weights.check_text_encoder(found)


def test_a_text_encoder_in_a_repository_is_found(
    quantized, checkpoint, tmp_path, fake_hub
):
    model = Path(shutil.copytree(quantized, tmp_path / "model"))
    with_encoder(model, checkpoint("gemma3"))
    shutil.rmtree(fake_hub.repo)
    shutil.copytree(model, fake_hub.repo)
    found = weights.open_model("mlx-community/it").text_encoder
    assert found == "mlx-community/it/text_encoder"
    weights.check_text_encoder(found)
    folder = weights.fetch_text_encoder(found)
    assert folder == fake_hub.cache / "text_encoder"
    assert "text_encoder/model.safetensors" in fake_hub.fetched


def test_a_text_encoder_elsewhere_is_found_from_any_folder(
    small, checkpoint, tmp_path, monkeypatch
):
    gemma = checkpoint("gemma3")
    monkeypatch.chdir(gemma.parent)
    args = ("--hf-path", small, "--text-encoder", gemma.name)
    assert convert(*args, "--mlx-path", tmp_path / "model") == 0
    monkeypatch.chdir("/")
    assert weights.open_model(str(tmp_path / "model")).text_encoder == str(gemma)


@pytest.mark.parametrize("name", ["nothere", "./no/folder", "gemma.safetensors"])
def test_a_text_encoder_that_is_not_there_is_refused(small, tmp_path, capsys, name):
    args = ("--hf-path", small, "--mlx-path", tmp_path / "model")
    message = refused(capsys, *args, "--text-encoder", name)
    assert f"text encoder {name}: no such folder" in message
    assert not (tmp_path / "model").exists()


def test_a_model_whose_text_encoder_was_moved_is_converted(small, checkpoint, tmp_path):
    gemma = shutil.copytree(checkpoint("gemma3"), tmp_path / "gemma")
    how = quantization(group_size=32)
    write(small, tmp_path / "model", how, text_encoder=str(gemma))
    gemma.rename(tmp_path / "elsewhere")
    plain = write(tmp_path / "model", tmp_path / "plain", dequantize=True)
    assert plain.quantization is None and plain.text_encoder == str(gemma)


def test_a_text_encoder_that_does_not_fit_is_refused(
    small, quantized, checkpoint, tmp_path, capsys
):
    other = shutil.copytree(checkpoint("gemma3"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (other / "config.json").write_text(json.dumps(config))
    args = ("--hf-path", small, "--mlx-path", tmp_path / "model", "--text-encoder")
    assert "was trained with another size" in refused(capsys, *args, other)
    assert "has no tokenizer" in refused(capsys, *args, quantized)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["style-lora.safetensors", "notes", ".git", "loras"])
def test_a_folder_with_other_files_is_not_replaced(quantized, tmp_path, capsys, name):
    model = Path(shutil.copytree(quantized, tmp_path / "model"))
    (model / name).mkdir()
    args = ("--hf-path", model, "-d", "--mlx-path", model, "--overwrite")
    assert f"also holds {name}: move it" in refused(capsys, *args)
    assert (model / name).exists()


def test_the_source_is_never_replaced_by_a_conversion_above_it(small, tmp_path, capsys):
    source = tmp_path / "models" / "ltx-2.safetensors"
    source.parent.mkdir()
    shutil.copy(small, source)
    args = ("--hf-path", source, "--mlx-path", source.parent, "--overwrite")
    assert "refusing to overwrite" in refused(capsys, *args)
    assert source.exists()


def test_conversions_to_one_folder_do_not_share_temporary_files(small, tmp_path):
    source = weights.open_model(str(small))
    other = tmp_path / ".model-abcdefgh.partial"
    other.mkdir()
    with open(other / "lock", "w") as lock:  # of a conversion that runs
        fcntl.flock(lock, fcntl.LOCK_EX)
        Conversion(source).write(tmp_path / "model")
    assert other.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["attn1.to_q.weight", "attn1.to_q.bias"])
def test_weights_that_are_not_finite_are_refused(small, tmp_path, capsys, value, key):
    tensors, metadata = mx.load(str(small), return_metadata=True)
    key = f"transformer_blocks.1.{key}"
    w = tensors[f"model.diffusion_model.{key}"]
    w[..., 3] = value
    mx.save_safetensors(str(tmp_path / "ltx-2.safetensors"), tensors, metadata)
    args = ("--hf-path", tmp_path / "ltx-2.safetensors", "--mlx-path", tmp_path / "m")
    for options in ((), ("-q", "--q-mode", "mxfp4")):
        message = refused(capsys, *args, *options)
        assert f"{key} has NaN or infinite values" in message
        assert not (tmp_path / "m").exists()


def test_a_lora_that_is_not_finite_is_refused(small, checkpoint, tmp_path, capsys):
    tensors, metadata = mx.load(str(checkpoint("ltx-2-lora")), return_metadata=True)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key] * mx.nan
    mx.save_safetensors(str(tmp_path / "lora.safetensors"), tensors, metadata)
    args = ("--hf-path", small, "--mlx-path", tmp_path / "m")
    message = refused(capsys, *args, "--lora", tmp_path / "lora.safetensors")
    assert "has NaN or infinite values" in message
    lora = checkpoint("ltx-2-lora")
    assert "strength 0" in refused(capsys, *args, "--lora", f"{lora}:0")
    with pytest.raises(UserError, match="strength inf"):
        write(small, tmp_path / "m", loras=[(str(lora), float("inf"))])
    assert "is used twice" in refused(
        capsys, *args, "--lora", lora, "--lora", f"{lora}:0.5"
    )


# The command line


def test_the_documented_flags(checkpoint, tmp_path, capsys):
    source, model = checkpoint("ltx-2"), tmp_path / "model"
    args = ("--quantize", "-q-bits", "4", "--q-group-size", "32")
    assert convert("--hf-path", source, "--mlx-path", model, *args) == 0
    out = capsys.readouterr().out
    assert "LTX-2 2.0.0, dev (assumed, see --kind)" in out
    assert "ltx-2.safetensors" in out
    assert "transformer.safetensors  56 layers quantized" in out
    assert "vocoder.safetensors" in out and "needed" in out and "free" in out
    assert weights.open_model(str(model)).quantization["bits"] == 4
    for file in model.glob("*.safetensors"):  # the sizes listed are those written
        assert (
            f"{hub.gigabytes(sum(w.nbytes for w in mx.load(str(file)).values()))}  {file.name}"
            in out
        )


def test_four_bits_are_spent_by_layer(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rounding, "MODES", rounding.MODES | {"affine": (32, 4)})
    source, model = checkpoint("ltx-2.3"), tmp_path / "model"
    args = ("-q", "--q-bits", "4", "--dtype", "bfloat16")
    assert convert("--hf-path", source, "--mlx-path", model, *args) == 0
    out = capsys.readouterr().out
    loaded = weights.open_model(str(model))
    found = [f["bits"] for f in layer_formats(loaded.quantization).values()]
    assert found[0] == 4 and {*found} > {4, 5} and len(found) < 56
    tensors = mx.load(str(model / "transformer.safetensors"))
    blocks = {k: w for k, w in tensors.items() if "transformer_blocks" in k}
    size = sum(
        w.size
        for k, w in weights.open_model(str(source)).shapes("transformer").items()
        if "transformer_blocks" in k
    )
    mean = 8 * sum(w.nbytes for w in blocks.values()) / size
    assert f"{mean:.2f} bits per weight in the transformer's blocks" in out
    card = (model / "README.md").read_text()
    assert (
        f"{mean:.2f} bits per weight with scales. Rounding changed these weights by"
        in card
    )
    # Whole, block by block, and dequantized it is the same model.
    whole = dict(tree_flatten(loaded.load("transformer").parameters()))
    blocks = build_blocks(
        DiTConfig.from_dict(loaded.config["transformer"]),
        loaded.weights("transformer"),
        loaded.quantization,
    )
    for i, block in enumerate(blocks):
        for key, w in tree_flatten(block.parameters()):
            assert mx.array_equal(w, whole[f"transformer_blocks.{i}.{key}"])
    assert convert("--hf-path", model, "-d", "--mlx-path", tmp_path / "plain") == 0
    weights.open_model(str(tmp_path / "plain")).load("transformer")


def test_kind_and_dtype_from_the_command_line(checkpoint, tmp_path, monkeypatch):
    args = ("--kind", "distilled", "--dtype", "float32", "--text-encoder", "owner/here")
    model, kept = tmp_path / "model", []
    monkeypatch.setattr(base, "awake", lambda: kept.append("awake"))
    assert convert("--hf-path", checkpoint("ltx-2"), "--mlx-path", model, *args) == 0
    assert kept == ["awake"]
    source = weights.open_model(str(model))
    assert (source.kind, source.text_encoder) == ("distilled", "owner/here")
    assert source.weights("connectors").popitem()[1].dtype == mx.float32
    # What is computed in float32 in any case is stored as released.
    assert source.weights("vae")["encoder.conv_in.conv.bias"].dtype == mx.bfloat16


@pytest.mark.parametrize(
    "args, message",
    [
        (["--q-bits", "4"], "need --quantize"),
        (["--quant-predicate", "mixed_4_6"], "need --quantize"),
        (["-q", "--quant-predicate", "mixed"], "choose mixed_4_6"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "mxfp4 needs 4 bits"),
        (["-q", "--q-mode", "nvfp4", "--q-group-size", "64"], "groups of 16"),
        (["--file", "x"], "--file cannot be used"),
        (["--file", ""], "--file is empty"),
        (["--text-encoder="], "--text-encoder= is empty"),
        (["--part", "vae"], "'vae' is not of the form NAME=FILE"),
        (["--part", "vae=nowhere"], "nowhere: no such file"),
        (["--upload-repo", "mine"], "must be owner/name"),
        (["--dequantize"], "not quantized: remove"),
        (["--dequantize", "-q"], "not quantized: remove"),
        (["--hf-path", "nowhere"], "no such file"),
        (["--upsampler", "nowhere"], "no such file"),
        (["--mlx-path", "/"], "exists"),
        (["--mlx-path", "/", "--overwrite"], "not a converted model"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(
    small, tmp_path, monkeypatch, capsys, args, message
):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, "--hf-path", small, *args)
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_lora_and_a_truncated_file_are_refused(checkpoint, tmp_path, capsys):
    half = tmp_path / "ltx-2-dev.safetensors"
    half.write_bytes(checkpoint("ltx-2").read_bytes()[:-1])
    target = tmp_path / "model"
    for path, message in (
        (checkpoint("ltx-2-lora"), "with --lora"),
        (half, "download it again"),
    ):
        assert message in refused(capsys, "--hf-path", path, "--mlx-path", target)
    assert not target.exists()


def test_without_disk_space_nothing_is_downloaded_or_written(
    fake_hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda p: SimpleNamespace(free=7e6))
    assert "not enough space" in refused(capsys, "--mlx-path", tmp_path / "model")
    assert fake_hub.fetched == [] and not (tmp_path / "model").exists()


def test_help_is_quick(capsys):
    code = (
        "import runpy, sys; sys.argv = ['convert.py', '--help']\n"
        "try: runpy.run_path('convert.py', run_name='__main__')\n"
        "except SystemExit: print(*sys.modules)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert "-q-bits" in out and "Lightricks/LTX-2" in out
    modules = out.splitlines()[-1].split()
    assert "ltx2.base" in modules
    assert not {"mlx.nn", "numpy", "huggingface_hub", "tqdm"} & set(modules)


# The Hub


def test_the_default_model_from_the_hub_and_back(fake_hub, tmp_path, capsys):
    model = tmp_path / "model"
    args = ("--quantize", "--q-group-size", "32", "--upload-repo", "mlx-community/it")
    assert convert("--mlx-path", model, *args) == 0
    out = capsys.readouterr().out
    assert out.index("ltx-2-19b-distilled.safetensors  to be downloaded") < out.index(
        "wrote"
    )
    assert (model / "LICENSE.md").read_text() == "the license"
    config = json.loads((model / "config.json").read_text())
    assert config["provenance"]["source"] == "Lightricks/LTX-2"
    assert set(config["provenance"]["files"].values()) == {"ab" * 32}
    assert fake_hub.created == "mlx-community/it"
    assert fake_hub.uploaded == (
        "mlx-community/it",
        sorted(
            ["LICENSE.md", "README.md", "config.json", "temporal_upsampler.safetensors"]
            + ["transformer.safetensors", "connectors.safetensors", "vae.safetensors"]
            + ["audio_vae.safetensors", "vocoder.safetensors"]
        ),
    )
    card = ModelCard.load(model / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model == "Lightricks/LTX-2"
    assert card.data.library_name == "mlx"
    assert card.data.pipeline_tag == "text-to-video" and "mlx" in card.data.tags
    assert card.data.base_model_relation == "quantized"
    assert card.data.license == "other"
    assert card.data.license_name == "ltx-2-community-license-agreement"
    assert card.data.license_link.startswith("https://")
    assert "mlx-community/it" in card.text and "4 bits" in card.text
    assert "Notice of change" in card.text and "sample.mp4" in card.text
    assert re.search(r"\| size \| [\d.]+ MB \|", card.text)
    peaks = r"computed \| ([\d.]+) GB for 1536x1024 with 121 frames, ([\d.]+) GB with"
    held, streamed = map(float, re.search(peaks, card.text).groups())
    assert 0 < streamed <= held
    assert "would name this model LTX-2-19b-distilled-4bit" in out
    shutil.rmtree(fake_hub.repo)
    shutil.copytree(model, fake_hub.repo)  # what was uploaded, at another user's
    shutil.rmtree(fake_hub.cache)
    fake_hub.cache.mkdir()
    source = weights.open_model("mlx-community/it")
    assert source.kind == "distilled" and source.quantization["bits"] == 4
    for name in source.components:
        source.load(name)


def test_an_upload_that_fails_leaves_the_model(fake_hub, tmp_path, monkeypatch, capsys):
    def refuse(**kwargs):
        raise errors.HTTPError("no route")

    monkeypatch.setattr(fake_hub, "upload_folder", refuse)
    model = tmp_path / "model"
    message = refused(capsys, "--mlx-path", model, "--upload-repo", "mlx-community/it")
    assert "cannot be reached" in message
    weights.open_model(str(model)).load("vae")


def test_a_folder_that_exists_is_uploaded_without_converting(
    fake_hub, quantized, capsys, monkeypatch
):
    before = (quantized / "config.json").stat().st_mtime_ns
    assert convert("--mlx-path", quantized, "--upload-repo", "me/it") == 0
    assert "exists: it is uploaded as it is" in capsys.readouterr().out
    assert fake_hub.uploaded[0] == "me/it" and fake_hub.fetched == []
    assert (quantized / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["config.json", "vae.safetensors"])
@pytest.mark.parametrize("damage", ["lost", "cut", "changed"])
def test_what_arrived_is_compared_and_sent_again(
    fake_hub, quantized, monkeypatch, capsys, name, damage
):
    send, args = fake_hub.upload_folder, ("--mlx-path", quantized, "--upload-repo")

    def damaged(**options):
        send(**options)
        file = fake_hub.uploads / "me/it" / name
        data = file.read_bytes()
        changed = bytes([data[-1] ^ 1]) if damage == "changed" else b""
        file.write_bytes(data[:-1] + changed)
        if damage == "lost":
            file.unlink()

    monkeypatch.setattr(fake_hub, "upload_folder", damaged)
    assert f"differs from {quantized}: {name}; run" in refused(capsys, *args, "me/it")
    monkeypatch.setattr(fake_hub, "upload_folder", send)
    assert convert(*args, "me/it") == 0
    out = capsys.readouterr().out
    assert "uploading to me/it as me" in out and "files, unchanged" in out


def test_files_of_macos_are_passed_over(
    fake_hub, checkpoint, quantized, tmp_path, usb_disk
):
    copy = shutil.copytree(quantized, tmp_path / "copy")
    shutil.copytree(checkpoint("gemma3"), copy / "text_encoder")
    names = {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()}
    usb_disk(copy)
    model = weights.open_model(str(copy))
    weights.check_text_encoder(str(copy / "text_encoder"), model)
    assert {*model.components} == {*weights.open_model(str(quantized)).components}
    assert convert("--mlx-path", copy, "--upload-repo", "me/it") == 0
    sent = fake_hub.uploads / "me/it"
    assert {str(p.relative_to(sent)) for p in sent.rglob("*") if p.is_file()} == names
    shutil.rmtree(copy / "text_encoder")
    arguments = ("--hf-path", checkpoint("ltx-2"), "--mlx-path", copy, "--overwrite")
    assert convert(*arguments) == 0


@pytest.mark.parametrize(
    "model, how, name",
    [
        ("ltx-2.3", {"quantization": quantization(bits=8)}, "LTX-2.3-22b-dev-8bit"),
        ("ltx-2.3", {"quantization": quantization("mxfp4")}, "LTX-2.3-22b-dev-mxfp4"),
        ("ltx-2", {"dtype": mx.float16}, "LTX-2-19b-dev-fp16"),
        ("ltx-2.5", {}, "LTX-2.5-22b-dev-bf16"),
    ],
)
def test_the_name_says_model_kind_and_bits(checkpoint, model, how, name):
    source = weights.open_model(str(checkpoint(model)), "dev")
    assert Conversion(source, **how).hub_name == name


def test_uploading_needs_a_login(fake_hub, tmp_path, monkeypatch, capsys):
    def refuse():
        raise errors.LocalTokenNotFoundError("no token")

    monkeypatch.setattr(fake_hub, "whoami", refuse)
    args = ("--mlx-path", tmp_path / "model", "--upload-repo", "me/it")
    assert "hf auth login" in refused(capsys, *args)
    assert fake_hub.fetched == [] and not (tmp_path / "model").exists()


def test_the_hub_identity_is_checked_first(fake_hub, tmp_path, monkeypatch, capsys):
    def refuse(**kwargs):
        response = SimpleNamespace(headers={}, request=None, status_code=401)
        raise errors.HfHubHTTPError("401 Unauthorized", response=response)

    monkeypatch.setattr(fake_hub, "create_repo", refuse)
    args = ("--mlx-path", tmp_path / "model", "--upload-repo", "me/it")
    assert "refuses me/it: 401" in refused(capsys, *args)
    assert fake_hub.fetched == [] and not (tmp_path / "model").exists()


def test_a_part_from_another_file(checkpoint, small, tmp_path):
    args = ("--hf-path", small, "--mlx-path", tmp_path / "model")
    assert convert(*args, "--part", f"vae={checkpoint('ltx-2')}") == 0
    model = weights.open_model(str(tmp_path / "model"))
    assert model.components == ["transformer", "connectors", "vae"]


# LoRAs


def test_a_lora_is_added_before_quantizing(checkpoint, tmp_path):
    source = weights.open_model(str(checkpoint("ltx-2")))
    file = Lora.read(checkpoint("ltx-2-lora"))
    fused = write(
        checkpoint("ltx-2"),
        tmp_path / "m",
        loras=[(str(checkpoint("ltx-2-lora")), 0.5)],
    )
    before, after = source.weights("transformer"), fused.weights("transformer")
    assert fused.provenance["recipe"]["loras"] == {"ltx-2-lora.safetensors": 0.5}
    for key, w in before.items():
        a, b = file.factors.get(key.removesuffix(".weight"), (None, None))
        if a is None:
            assert mx.array_equal(w, after[key])
        else:
            wanted = w + 0.5 * b.astype(mx.float32) @ a.astype(mx.float32)
            assert mx.array_equal(wanted.astype(w.dtype), after[key])
            assert not mx.array_equal(w, after[key])


def test_a_lora_that_does_not_fit_is_refused(checkpoint, tmp_path, capsys):
    lora, source = checkpoint("ltx-2.3-lora"), checkpoint("ltx-2")
    error = refused(
        capsys, "--hf-path", source, "--lora", lora, "--mlx-path", tmp_path / "m"
    )
    assert "was made for another model" in error


def test_a_lora_cannot_be_added_to_quantized_weights(quantized, checkpoint):
    with pytest.raises(UserError, match="LoRAs can only be fused into unquantized"):
        Conversion(
            weights.open_model(str(quantized)),
            loras=[(str(checkpoint("ltx-2-lora")), 1)],
        )
