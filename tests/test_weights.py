"""Checkpoints: which files open, which are refused, and that every tensor is loaded."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub import errors
from mlx.utils import tree_flatten

from ltx2 import hub, weights
from ltx2.base import UserError


def save(path: Path, tensors: dict, metadata: dict) -> Path:
    """Write a safetensors file whose uint8 tensors are declared as fp8."""
    mx.save_safetensors(str(path), tensors, metadata)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(b'"U8"', b'"F8_E4M3"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    return path


def changed(path: Path, folder: Path, change, name: str = "") -> Path:
    """A copy of a checkpoint with tensors and metadata modified by `change`."""
    tensors, metadata = mx.load(str(path), return_metadata=True)
    change(tensors, metadata)
    return save(folder / (name or path.name), tensors, metadata)


# What opens


@pytest.mark.parametrize(
    "name, version, generation",
    [("ltx-2", (2, 0, 0), "2.0"), ("ltx-2.3", (2, 3, 0), "2.3")],
)
def test_a_file_or_its_folder_is_a_model(checkpoint, name, version, generation):
    path = checkpoint(name)
    for place in (path, path.parent):
        source = weights.open_model(str(place))
        assert (source.version, source.generation) == (version, generation)
        assert source.components == [
            "transformer",
            "connectors",
            "vae",
            "audio_vae",
            "vocoder",
        ]
        assert source.config["transformer"]["num_layers"] in (2, 3)
        assert source.quantization is None and source.provenance is None


@pytest.mark.parametrize(
    "name, kind, assumed",
    [
        ("ltx-2-19b-distilled.safetensors", "distilled", False),
        ("ltx-2.3-22b-distilled-1.1.safetensors", "distilled", False),
        ("ltx-2-19b-dev-fp8.safetensors", "dev", False),
        ("my-devices.safetensors", "dev", True),
    ],
)
def test_the_kind_is_read_from_the_file_name(checkpoint, tmp_path, name, kind, assumed):
    path = shutil.copy(checkpoint("ltx-2"), tmp_path / name)
    source = weights.open_model(str(path))
    assert (source.kind, source.kind_assumed) == (kind, assumed)
    source = weights.open_model(str(path), kind="distilled")
    assert (source.kind, source.kind_assumed) == ("distilled", False)


@pytest.mark.parametrize(
    "text, version, generation",
    [
        ("2", (2, 0, 0), "2.0"),
        ("2.3.1", (2, 3, 1), "2.3"),
        ("2.4-rc2", (2, 4, 0), "2.3"),
        ("2.5.1", (2, 5, 1), "2.5"),
    ],
)
def test_versions(text, version, generation):
    assert weights.parse_version(text) == version
    assert weights.generation(version) == generation


def test_without_version_the_configuration_gives_the_generation(checkpoint, tmp_path):
    def forget(tensors, metadata):
        del metadata["model_version"]

    path = changed(checkpoint("ltx-2.3"), tmp_path, forget)
    assert weights.open_model(str(path)).generation == "2.3"


def test_the_newest_upsamplers_next_to_a_checkpoint_are_used(checkpoint, tmp_path):
    shutil.copy(checkpoint("ltx-2"), tmp_path / "ltx-2-dev.safetensors")
    for name, of in {
        "ltx-2-spatial-upscaler-x2-1.0": "spatial-x2",
        "ltx-2-spatial-upscaler-x2-1.1": "spatial-x2-rational",
        "ltx-2-temporal-upscaler-x2-1.0": "temporal-x2",
    }.items():
        shutil.copy(checkpoint(of), tmp_path / f"{name}.safetensors")
    shutil.copy(checkpoint("ltx-2-lora"), tmp_path / "style.safetensors")
    source = weights.open_model(str(tmp_path))
    assert source.components[-2:] == ["spatial_upsampler", "temporal_upsampler"]
    assert "upsampler.blur_down.kernel" in source.parts["spatial_upsampler"]
    assert "style.safetensors" not in [f.name for f in source.files]
    for name in source.components[-2:]:
        source.load(name)
    only = tmp_path / "ltx-2-spatial-upscaler-x2-1.0.safetensors"
    source = weights.open_model(str(tmp_path), upsamplers=[str(only)])
    assert source.components[-1] == "spatial_upsampler"
    assert "temporal_upsampler" not in source.components
    assert "upsampler.blur_down.kernel" not in source.parts["spatial_upsampler"]


def test_one_of_several_checkpoints_is_chosen_by_name(checkpoint, tmp_path):
    for kind in ("dev", "distilled"):
        shutil.copy(checkpoint("ltx-2"), tmp_path / f"ltx-2-{kind}.safetensors")
    with pytest.raises(UserError, match="ltx-2-dev.* and ltx-2-distilled.* both hold"):
        weights.open_model(str(tmp_path))
    source = weights.open_model(str(tmp_path), file="ltx-2-dev.safetensors")
    assert source.kind == "dev"
    shutil.copy(checkpoint("ltx-2"), tmp_path / hub.DEFAULT_FILES[0])
    assert weights.open_model(str(tmp_path)).files[0].name == hub.DEFAULT_FILES[0]


# What is loaded


@pytest.mark.parametrize("name", ["ltx-2", "ltx-2-notc", "ltx-2.3"])
def test_every_parameter_comes_from_the_file(checkpoint, name):
    source = weights.open_model(str(checkpoint(name)))
    official = mx.load(str(checkpoint(name)))
    total = 0
    for component in source.components:
        module = source.load(component, dtype=mx.float32)
        parameters = dict(tree_flatten(module.parameters()))
        assert all(p.dtype == mx.float32 for p in parameters.values())
        total += sum(p.size for p in parameters.values())
        assert mx.all(mx.array([mx.all(mx.isfinite(p)) for p in parameters.values()]))
    unused = {"vocoder.mel_stft.stft_fn.inverse_basis"} & official.keys()
    assert total == sum(w.size for k, w in official.items() if k not in unused)
    proj = source.load("transformer").patchify_proj
    assert mx.array_equal(
        proj.weight, official["model.diffusion_model.patchify_proj.weight"]
    )


def test_the_dtype_applies_to_all_but_float32_components(checkpoint):
    source = weights.open_model(str(checkpoint("ltx-2")))
    assert source.load("transformer").proj_out.weight.dtype == mx.bfloat16
    half = source.load("transformer", dtype=mx.float16)
    assert half.proj_out.weight.dtype == mx.float16
    assert source.load("vocoder", dtype=mx.float16).conv_pre.weight.dtype == mx.float32


def test_lazy_weights_are_read_when_used(checkpoint):
    source = weights.open_model(str(checkpoint("ltx-2")))
    before = mx.get_active_memory()
    module = source.load("transformer", lazy=True)
    assert mx.get_active_memory() - before < 10_000
    mx.eval(module.parameters())
    assert mx.get_active_memory() - before > 100_000


def test_an_fp8_file_is_decoded(checkpoint, tmp_path):
    key = "model.diffusion_model.transformer_blocks.0.attn1.to_q"
    plain = "model.diffusion_model.transformer_blocks.0.attn1.to_k.weight"
    expected = {}

    def to_fp8(tensors, metadata):
        w = tensors[f"{key}.weight"].astype(mx.float32)
        scale = mx.abs(w).max() / 448
        tensors[f"{key}.weight"] = mx.to_fp8(w / scale)
        tensors[f"{key}.weight_scale"] = scale
        tensors[f"{key}.input_scale"] = mx.array(0.5)
        expected["q"] = mx.from_fp8(tensors[f"{key}.weight"], mx.float32) * scale
        tensors[plain] = mx.to_fp8(tensors[plain])
        expected["k"] = mx.from_fp8(tensors[plain], mx.float32)

    path = changed(checkpoint("ltx-2"), tmp_path, to_fp8)
    block = weights.open_model(str(path)).load("transformer").transformer_blocks[0]
    for layer, want in ((block.attn1.to_q, "q"), (block.attn1.to_k, "k")):
        assert layer.weight.dtype == mx.bfloat16
        assert mx.array_equal(layer.weight, expected[want].astype(mx.bfloat16))


# Refusals: one line that message what to do


def drop(key):
    return lambda tensors, metadata: tensors.pop(key)


def put(key, value):
    return lambda tensors, metadata: metadata.__setitem__(key, value)


def add(key):
    return lambda tensors, metadata: tensors.__setitem__(key, mx.zeros(1))


def configure(section, key, value):
    def change(tensors, metadata):
        config = json.loads(metadata["config"])
        config[section][key] = value
        metadata["config"] = json.dumps(config)

    return change


def block_scale(tensors, metadata):
    layer = Q_BIAS.removesuffix(".bias")
    tensors[f"{layer}.weight"] = mx.to_fp8(tensors[f"{layer}.weight"])
    tensors[f"{layer}.weight_scale"] = mx.ones(64)


PROJECTION = "text_embedding_projection.aggregate_embed.weight"
VAE_BIAS = "vae.encoder.conv_in.conv.bias"
Q_BIAS = "model.diffusion_model.transformer_blocks.0.attn1.to_q.bias"


@pytest.mark.parametrize(
    "change, component, message",
    [
        (drop(VAE_BIAS), "vae", "encoder.conv_in.conv.bias is missing"),
        (drop(Q_BIAS), "transformer", "blocks.0.attn1.to_q.bias is missing"),
        (drop(PROJECTION), "connectors", "aggregate_embed.weight is missing"),
        (add("vae.encoder.extra"), "vae", "encoder.extra is .*not expected"),
        (add("audio_vae.extra"), "audio_vae", "extra is .*not expected"),
        (add("vocoder.extra"), "vocoder", "extra is .*not expected"),
        (add("unheard.of"), "", "unexpected tensor unheard.of"),
        (configure("transformer", "num_layers", 3), "transformer", "2.attn1.*missing"),
        (
            configure("transformer", "in_channels", 7),
            "transformer",
            r"24\), not \(64, 7",
        ),
        (configure("transformer", "rope_type", "other"), "transformer", "rope_type"),
        (
            configure("vae", "latent_channels", 9),
            "vae",
            "vae tensors do not match its config|invalid configuration",
        ),
        (block_scale, "transformer", "block-scaled fp8"),
        (put("config", "{}"), "", "has no configuration of the transformer"),
        (put("config", "not json"), "", "config in its metadata is not valid JSON"),
        (put("model_version", "0.9.8"), "", "unsupported model_version '0.9.8'"),
        (put("model_version", "2.3.0"), "", "configured as 2.0"),
        (put("model_version", "latest"), "", "unsupported model_version"),
    ],
)
def test_a_file_whose_config_and_tensors_differ_is_refused(
    checkpoint, tmp_path, change, component, message
):
    path = changed(checkpoint("ltx-2"), tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        weights.open_model(str(path)).load(component)
    assert "\n" not in str(error.value)


def test_an_unknown_dtype_is_refused(checkpoint, tmp_path):
    path = tmp_path / "ltx-2-dev.safetensors"
    data = checkpoint("ltx-2").read_bytes()
    path.write_bytes(data.replace(b'"BF16"', b'"FP16"', 1))
    with pytest.raises(UserError, match="FP16"):
        weights.open_model(str(path))


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_file_is_refused(checkpoint, tmp_path, keep):
    path = tmp_path / "ltx-2-dev.safetensors"
    path.write_bytes(checkpoint("ltx-2").read_bytes()[:keep])
    with pytest.raises(UserError, match="not a safetensors file|truncated"):
        weights.open_model(str(path))


def test_other_files_are_refused_in_one_line(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.safetensors").write_text("version https://git-lfs.github.com")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("[1]")
    for name, message in {
        "nowhere": "no such file or folder",
        "models/nowhere.safetensors": "no such file or folder",
        str(tmp_path / "empty"): "has no checkpoint",
        str(tmp_path / "notes.safetensors"): "git-lfs pointer",
        str(tmp_path / "config"): "must be an object",
        str(checkpoint("ltx-2-lora")): "is a LoRA: pass it with --lora",
        str(checkpoint("temporal-x2")): "is an upsampler: pass it with --upsampler",
        str(checkpoint("gemma3")): "has no checkpoint",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            weights.open_model(name)
        assert "\n" not in str(error.value)


def test_invalid_options_for_a_valid_file(checkpoint, tmp_path):
    path = checkpoint("ltx-2")
    later = shutil.copy(
        checkpoint("spatial-x2"), tmp_path / "ltx-2.3-spatial-upscaler-x2.safetensors"
    )
    for options, message in (
        ({"kind": "fast"}, "kind must be dev or distilled"),
        ({"upsamplers": [str(path)]}, "is not a latent upsampler"),
        ({"upsamplers": [str(later)]}, "does not go with LTX-2 2.0.0"),
    ):
        with pytest.raises(UserError, match=message):
            weights.open_model(str(path), **options)
    with pytest.raises(UserError, match="has no other.safetensors, only ltx-2"):
        weights.open_model(str(path.parent), file="other.safetensors")
    with pytest.raises(UserError, match="missing model parts: temporal_upsampler"):
        weights.open_model(str(path)).load("temporal_upsampler")


# The Hub


def test_a_repository_is_listed_then_downloaded_once(fake_hub, caplog):
    caplog.set_level("INFO", "ltx2")
    source = weights.open_model("Lightricks/LTX-2")
    out = caplog.text
    caplog.clear()
    assert fake_hub.fetched == [
        "ltx-2-19b-distilled.safetensors",
        "ltx-2-temporal-upscaler-x2-1.0.safetensors",
        "LICENSE",
    ]
    assert all(name in out for name in fake_hub.fetched) and "MB" in out
    assert "needed" in out and "free" in out
    assert (source.kind, source.kind_assumed) == ("distilled", False)
    source.load("transformer")
    weights.open_model("Lightricks/LTX-2")
    assert len(fake_hub.fetched) == 3 and caplog.text == ""


def test_a_file_of_a_repository(fake_hub):
    source = weights.open_model("Lightricks/LTX-2/ltx-2-19b-dev.safetensors")
    assert source.kind == "dev"
    with pytest.raises(UserError, match="has no ltx-3.safetensors, only ltx-2-19b-dev"):
        weights.open_model("Lightricks/LTX-2/ltx-3.safetensors")


def test_remote_files_are_checked_by_their_headers(fake_hub):
    source = weights.open_model("Lightricks/LTX-2", fetch=False)
    for name in source.components:
        source.build(name, source.weights(name))
    assert fake_hub.fetched == []
    with pytest.raises(UserError, match="is a LoRA: pass it with --lora"):
        weights.open_model("Lightricks/LTX-2/ltx-2-19b-lora.safetensors")
    assert fake_hub.fetched == []


def test_nothing_is_downloaded_without_disk_space(fake_hub, monkeypatch):
    full = SimpleNamespace(free=10**6)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="not enough space.* needed, 1.00 MB free"):
        weights.open_model("Lightricks/LTX-2")
    assert fake_hub.fetched == []


def test_offline_the_cache_is_used_and_noted(fake_hub, monkeypatch, caplog):
    weights.open_model("Lightricks/LTX-2")

    def offline(*args, **kwargs):
        raise errors.OfflineModeIsEnabled("offline mode")

    monkeypatch.setattr(fake_hub, "model_info", offline)
    snapshot = lambda *args, **kwargs: str(fake_hub.cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = weights.open_model("Lightricks/LTX-2")
    assert re.search("cannot be reached .*copy in the cache", caplog.text)
    assert source.files[0].repo == "Lightricks/LTX-2"
    source.load("transformer")


def test_refusals_of_the_hub_are_one_line(fake_hub, monkeypatch):
    def empty(*args, **kwargs):
        raise errors.LocalEntryNotFoundError("not\nin the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", empty)
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    for error, message in (
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (errors.HTTPError("name not known"), "cannot be reached"),
        (errors.HFValidationError("bad"), "no such folder or Hub"),
        (
            errors.RepositoryNotFoundError("404", response=response),
            "no such folder or Hub",
        ),
        (errors.GatedRepoError("403", response=response), "accept the license at"),
        (errors.HfHubHTTPError("500", response=response), "refuses"),
    ):

        def refuse(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(fake_hub, "model_info", refuse)
        with pytest.raises(UserError, match=message) as caught:
            weights.open_model("Lightricks/LTX-2")
        assert "\n" not in str(caught.value)


def test_a_text_encoder_is_a_folder_or_a_repository(fake_hub, tmp_path):
    assert weights.fetch_text_encoder(str(tmp_path)) == tmp_path
    (fake_hub.repo / "config.json").write_text("{}")
    folder = weights.fetch_text_encoder("mlx-community/gemma")
    assert folder == fake_hub.cache and (folder / "config.json").exists()
    assert "LICENSE" not in fake_hub.fetched


def test_weights_are_evaluated_in_groups(monkeypatch):
    groups = []
    monkeypatch.setattr(weights.mx, "eval", lambda arrays: groups.append(len(arrays)))
    weights.evaluate([mx.zeros(250)] * 5, limit=2000)
    assert groups == [2, 2, 1]
