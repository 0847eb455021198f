"""Checkpoints: which files open, which are refused, and that every tensor is loaded."""

import io
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
from ltx2 import parts as model_parts  # "parts" is a fixture
from ltx2.base import UserError
from ltx2.components import Components
from ltx2.text import TextEncoder


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
    assert model_parts.parse_version(text) == version
    assert model_parts.generation(version) == generation


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
        (put("config", "not json"), "", "config is not valid JSON"),
        (put("model_version", "0.9.8"), "", "'0.9.8': LTX-2, .* are supported"),
        (
            configure("transformer", "_class_name", "Transformer3DModel"),
            "",
            "this is LTX-Video, an older model: LTX-2, LTX-2.3 and LTX-2.5 are supported",
        ),
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
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>\n<p>Please log in</p>")
    partial = tmp_path / "ltx-2-19b-dev.safetensors"  # its end is still zeros
    shutil.copy(checkpoint("ltx-2"), partial)
    partial.with_name(f"{partial.name}.aria2").touch()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("[1]")
    for name, message in {
        "nowhere": "no such file or folder",
        "models/nowhere.safetensors": "no such file or folder",
        str(tmp_path / "empty"): "has no checkpoint",
        str(tmp_path / "notes.safetensors"): "git-lfs pointer",
        str(tmp_path / "page.safetensors"): "is text, not a safetensors file: .* login",
        str(partial): "not downloaded completely: aria2 can continue it",
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
        ({"upsamplers": [str(path)]}, "does not hold the spatial_upsampler or"),
        ({"upsamplers": [str(later)]}, "upscaler-x2.safetensors is for LTX-2 2.3, not"),
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


@pytest.mark.parametrize(
    "page, parts",
    [
        ("https://huggingface.co/me/it", ("me/it", "")),
        ("https://hf.co/me/it/", ("me/it", "")),
        ("https://huggingface.co/me/it/tree/main/te", ("me/it", "te")),
        (
            "https://huggingface.co/me/it/resolve/main/a/b.safetensors?download=true",
            ("me/it", "a/b.safetensors"),
        ),
        ("me/it/blob/main", ("me/it", "blob/main")),  # a folder of this name
        ("https://example.com/me/it", ("", "")),
    ],
)
def test_a_page_of_the_hub_is_its_repository(page, parts):
    assert hub.split_repository(page) == parts


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
    for folder in (tmp_path, fake_hub.repo):
        (folder / "config.json").write_text("{}")
    assert weights.fetch_text_encoder(str(tmp_path)) == tmp_path
    folder = weights.fetch_text_encoder("mlx-community/gemma")
    assert folder == fake_hub.cache and (folder / "config.json").exists()
    assert "LICENSE" not in fake_hub.fetched


def test_weights_are_evaluated_in_groups(monkeypatch):
    groups = []
    monkeypatch.setattr(weights.mx, "eval", lambda arrays: groups.append(len(arrays)))
    weights.evaluate([mx.zeros(250)] * 5, limit=2000)
    assert groups == [2, 2, 1]


# Other tools' files


DIT = "model.diffusion_model."


def rename(**replaced):
    """Replace parts of keys."""

    def change(tensors, metadata):
        renamed = {k: w for k, w in tensors.items()}
        tensors.clear()
        for key, w in renamed.items():
            for old, new in replaced.values():
                key = key.replace(old, new)
            tensors[key] = w

    return change


def comfy_fp8(scale: str, marks: bool):
    """Make the blocks' weights fp8, as ComfyUI writes them."""

    def change(tensors, metadata):
        for key in [*tensors]:
            layer = key.removesuffix("weight")
            if ".attn1.to_q.weight" not in key:
                continue
            tensors[key] = mx.to_fp8(tensors[key].astype(mx.float32) * 2)
            tensors[f"{layer}{scale}"] = mx.array([0.5])
            if marks:
                tensors[f"{layer}comfy_quant"] = mx.array([7, 7], mx.uint8)
        tensors[f"{DIT}scaled_fp8"] = mx.zeros(2, mx.uint8)

    return change


@pytest.mark.parametrize(
    "change",
    [
        rename(prefix=(DIT, "diffusion_model.")),
        rename(prefix=(DIT, "")),
        rename(compiled=(DIT, f"{DIT}_orig_mod.")),
    ],
)
def test_other_prefixes_are_read(checkpoint, tmp_path, change):
    path = changed(checkpoint("ltx-2"), tmp_path, change)
    expected = weights.open_model(str(checkpoint("ltx-2")))
    model = weights.open_model(str(path))
    model.check(*model.components)
    for name in expected.components:
        ours, theirs = model.weights(name), expected.weights(name)
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "scale, marks", [("scale_weight", False), ("weight_scale", True)]
)
def test_fp8_files_of_comfyui_are_read(checkpoint, tmp_path, scale, marks):
    path = changed(checkpoint("ltx-2"), tmp_path, comfy_fp8(scale, marks))
    model = weights.open_model(str(path))
    model.check("transformer")
    ours = model.weights("transformer")["transformer_blocks.0.attn1.to_q.weight"]
    theirs = mx.load(str(checkpoint("ltx-2")))[Q_BIAS.replace("bias", "weight")]
    assert mx.allclose(
        ours.astype(mx.float32), theirs.astype(mx.float32), rtol=0.07, atol=2e-3
    )
    # In safetensors' order the scales, which are float32, come first.
    scales_first = lambda item: not item[0].endswith("scale")
    part = sorted(model.parts["transformer"].items(), key=scales_first)
    model.parts["transformer"] = dict(part)
    assert Components(model)._stored == mx.bfloat16


def split(path: Path, folder: Path) -> Path:
    """One file per component in ComfyUI's folders, the VAE without its prefix."""
    tensors, metadata = mx.load(str(path), return_metadata=True)
    files = {
        "diffusion_models/ltx-2-19b-distilled_transformer": lambda k: (
            k.startswith(DIT) and "connector" not in k
        ),
        "text_encoders/ltx-2-connectors": lambda k: "connector" in k or "text_" in k,
        "vae/ltx-2-video": lambda k: k.startswith("vae."),
        "vae/ltx-2-audio": lambda k: k.startswith(("audio_vae.", "vocoder.")),
    }
    for name, held in files.items():
        part = {k.removeprefix("vae."): w for k, w in tensors.items() if held(k)}
        target = folder / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(target), part, metadata)
    return folder


@pytest.fixture
def parts(checkpoint, tmp_path) -> Path:
    return split(checkpoint("ltx-2"), tmp_path / "models")


TRANSFORMER = "diffusion_models/ltx-2-19b-distilled_transformer.safetensors"
COMPONENTS = ["transformer", "connectors", "vae", "audio_vae", "vocoder"]


def test_files_that_are_not_chosen_decide_nothing(parts):
    zeros = {"encoder.down.weight": mx.zeros(2), "decoder.up.weight": mx.zeros(2)}
    mx.save_safetensors(str(parts / "vae/flux.safetensors"), zeros)
    other = {"model.layers.0.mlp.weight": mx.zeros(2, mx.int8)}
    mx.save_safetensors(str(parts / "text_encoders/qwen.safetensors"), other)
    other = {f"{DIT}double_blocks.0.weight": mx.zeros(2)}
    mx.save_safetensors(str(parts / "diffusion_models/wan.safetensors"), other)
    (parts / "diffusion_models/half.safetensors").write_bytes(b"12345678")
    (parts / "vae/pointer.safetensors").write_text("version https://git-lfs.github.com")
    for name in (parts, parts / TRANSFORMER):
        model = weights.open_model(str(name))
        model.check(*COMPONENTS)
        assert model.components == COMPONENTS and len(model.files) == 4


def test_of_a_part_that_exists_twice_the_readable_one_is_used(parts, caplog):
    video = parts / "vae" / "ltx-2-video.safetensors"
    tensors, metadata = mx.load(str(video), return_metadata=True)
    unread = {k: w.astype(mx.int8) for k, w in tensors.items()}
    mx.save_safetensors(str(parts / "vae/a-int8.safetensors"), unread, metadata)
    assert weights.open_model(str(parts)).parts["vae"].popitem()[1][0].path == video
    unread = "not vae/a-int8.safetensors: unsupported dtype I8"
    assert f"using vae/ltx-2-video.safetensors, {unread}" in caplog.text
    shutil.copy(video, parts / "vae" / "ltx-2-dev-copy.safetensors")
    model = weights.open_model(str(parts))
    assert model.parts["vae"].popitem()[1][0].path == video
    assert "using vae/ltx-2-video.safetensors, not vae/ltx-2-dev-copy" in caplog.text
    caplog.clear()
    copy = str(parts / "vae/ltx-2-dev-copy.safetensors")
    model = weights.open_model(str(parts), parts={"vae": copy})
    model.check(*COMPONENTS)
    assert str(model.parts["vae"].popitem()[1][0].path) == copy
    assert not caplog.text


def test_a_missing_part_is_named_with_the_file_that_was_not_used(parts):
    video, audio = (parts / f"vae/ltx-2-{n}.safetensors" for n in ("video", "audio"))
    tensors, metadata = mx.load(str(audio), return_metadata=True)
    audio.unlink()
    shutil.copy(video, audio)  # one of them is a copy of the other
    message = "missing model parts: audio_vae, vocoder; pass a folder that holds all"
    with pytest.raises(UserError, match=message):
        weights.open_model(str(parts)).check(*COMPONENTS)
    mx.save_safetensors(str(audio), tensors)
    message = r"vocoder \(not used: vae/ltx-2-audio.safetensors is not an LTX-2 file"
    with pytest.raises(UserError, match=message):
        weights.open_model(str(parts)).check(*COMPONENTS)
    audio.write_text("version https://git-lfs.github.com")
    with pytest.raises(
        UserError, match="not used: .*audio.safetensors is a git-lfs poi"
    ):
        weights.open_model(str(parts)).check(*COMPONENTS)
    metadata["model_version"] = "2.3.0"
    mx.save_safetensors(str(audio), tensors, metadata)
    with pytest.raises(UserError, match="audio.safetensors is for LTX-2 2.3.0, not"):
        weights.open_model(str(parts)).check(*COMPONENTS)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"vae": "vae/ltx-2-audio.safetensors"},
            "audio.safetensors does not hold the vae",
        ),
        ({"vae": "nowhere.safetensors"}, "no such file"),
        ({"vae": "vae"}, "no such file"),
        ({"transformer": TRANSFORMER}, "unknown part 'transformer'"),
        ({"decoder": TRANSFORMER}, "choose from connectors, vae"),
    ],
)
def test_invalid_parts_are_one_line(parts, options, message):
    options = {name: str(parts / file) for name, file in options.items()}
    with pytest.raises(UserError, match=message):
        weights.open_model(str(parts), parts=options)


def test_formats_that_are_not_supported_are_named(checkpoint, parts, tmp_path):
    gguf, diffusers, nvfp4 = (tmp_path / n for n in ("gguf", "diffusers", "nvfp4"))
    for folder in (gguf, diffusers, nvfp4):
        folder.mkdir()
    (gguf / "ltx-2-Q4.gguf").write_bytes(b"GGUF" + bytes(64))
    (diffusers / "model_index.json").write_text("{}")

    def pack(tensors, metadata):
        layer = Q_BIAS.removesuffix("bias")
        tensors[f"{layer}weight_scale_2"] = mx.array(1.0)

    changed(checkpoint("ltx-2"), nvfp4, pack)
    shutil.copy(gguf / "ltx-2-Q4.gguf", tmp_path / "renamed.safetensors")
    for name, message in {
        gguf: "GGUF files are not supported",
        gguf / "ltx-2-Q4.gguf": "GGUF files are not supported",
        tmp_path / "renamed.safetensors": "is a GGUF file",
        diffusers: "diffusers folders are not supported",
        nvfp4: "nvfp4 weights are not supported",
        "/dev/zero": "no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            weights.open_model(str(name))


def int8_copy(path: Path, name: str) -> None:
    """The same file with linear weights in int8, as ComfyUI has it."""
    tensors, metadata = mx.load(str(path), return_metadata=True)
    for key, w in tensors.items():
        if "layers." in key or "blocks." in key:
            tensors[key] = mx.zeros(w.shape, mx.int8)
    mx.save_safetensors(str(path.parent / name), tensors, metadata)


def test_files_of_ltx_2_5_in_int8_are_passed_over(checkpoint, tmp_path, fake_hub):
    shutil.rmtree(fake_hub.repo)
    pack = Path(shutil.copytree(checkpoint("ltx-2.5"), fake_hub.repo))
    path = pack / "diffusion_models" / "ltx-2.5-transformer.safetensors"
    chosen = path.rename(path.with_name(hub.DEFAULT_FILES[1]))
    shutil.copy(chosen, path.with_name("ltx-2.5-22b-dev-transformer-bf16.safetensors"))
    int8_copy(chosen, "ltx-2.5-22b-distilled-transformer-comfy-int8.safetensors")
    encoder = pack / "text_encoders" / "ltx-2.5-text-encoder.safetensors"
    int8_copy(encoder, "ltx-2.5-a-text-encoder-int8.safetensors")
    expected = weights.open_model(str(checkpoint("ltx-2.5")))
    model = weights.open_model("Lightricks/LTX-2.5", fetch=False)
    assert model.kind == "distilled" and model.components == expected.components
    model.check(*model.components)
    assert not any("int8" in f.name for f in model.files) and not fake_hub.fetched
    name = "Lightricks/LTX-2.5/diffusion_models/ltx-2.5-22b-dev-transformer-bf16"
    model = weights.open_model(f"{name}.safetensors", fetch=False)
    assert model.kind == "dev" and model.components == expected.components


# Hostile headers and configurations


def header(change):
    """A change of the header's JSON text."""

    def apply(path: Path) -> None:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        start = change(data[8:end])
        path.write_bytes(len(start).to_bytes(8, "little") + start + data[end:])

    return apply


def offsets(value):
    return header(lambda s: re.sub(rb'"data_offsets":\[\d+,\d+\]', value, s, count=1))


@pytest.mark.parametrize(
    "change",
    [
        *(offsets(b'"data_offsets":' + v) for v in (b"[]", b"[9,2]", b"[-2,2]", b"{}")),
        offsets(b'"data_offsets":[2,1000000000000]'),
        header(lambda s: s.replace(b'"BF16"', b'["BF16"]', 1)),
        header(lambda s: b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        header(lambda s: s.replace(b'"vae.', b'"audio_vae.', 1).replace(b"{", b"[", 1)),
    ],
)
def test_a_hostile_header_is_one_line(checkpoint, tmp_path, change):
    path = Path(shutil.copy(checkpoint("ltx-2"), tmp_path / "ltx-2.safetensors"))
    change(path)
    with pytest.raises(UserError, match="not a safetensors file") as error:
        weights.open_model(str(path))
    assert "\n" not in str(error.value)


def test_duplicate_tensor_names_are_refused(tmp_path):
    path = tmp_path / "ltx-2.safetensors"
    tensor = '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    start = f"{{{tensor},{tensor}}}".encode()
    path.write_bytes(len(start).to_bytes(8, "little") + start + b"12")
    with pytest.raises(UserError, match="duplicate tensor names"):
        weights.open_model(str(path))


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        (
            "transformer",
            "num_layers",
            "two",
            "num_layers must be an integer, got 'two'",
        ),
        ("transformer", "num_layers", None, "num_layers must be an integer, got None"),
        ("transformer", "num_layers", 10**9, "num_layers must be above 0 and at most"),
        ("transformer", "num_layers", 10**7, "but there are .* tensors"),
        ("transformer", "num_attention_heads", True, "must be an integer, got True"),
        ("transformer", "norm_eps", float("nan"), "norm_eps must be a finite number"),
        ("vae", "patch_size", 0, "patch_size must be above 0"),
        ("vae", "encoder_blocks", [["res_x", 4]], r"encoder_blocks\[0\]\[1\] must be"),
        ("vae", "encoder_blocks", [[]], r"encoder_blocks\[0\] must be a list of 2"),
        ("vocoder", "upsample_rates", [[]], r"upsample_rates\[0\] must be an integer"),
        ("audio_vae", "model", 5, "AudioVAEConfig.ch is missing"),
    ],
)
def test_a_hostile_configuration_is_one_line(
    checkpoint, tmp_path, section, key, value, message
):
    path = changed(checkpoint("ltx-2"), tmp_path, configure(section, key, value))
    with pytest.raises(UserError, match=message) as error:
        weights.open_model(str(path)).check(*COMPONENTS)
    assert "\n" not in str(error.value)


def test_parts_of_different_models_are_refused(checkpoint):
    up = checkpoint("spatial-x2", in_channels=12)
    model = weights.open_model(str(checkpoint("ltx-2")), upsamplers=[str(up)])
    with pytest.raises(UserError, match="latent channels are transformer 24, .* 12"):
        model.check("transformer", "spatial_upsampler")


# Text encoders


@pytest.fixture
def gemma(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint("gemma3"), tmp_path / "gemma"))


def renamed(path: Path, old: str, new: str) -> None:
    tensors, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(tensors)
    tensors = {k.replace(old, new): w for k, w in tensors.items()}
    mx.save_safetensors(str(path), tensors, metadata)


def index(folder: Path) -> None:
    files = {"a": "model-1.safetensors", "b": "model.safetensors"}
    text = json.dumps({"weight_map": files})
    (folder / "model.safetensors.index.json").write_text(text)


def gemma_config(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


MODEL = "model.safetensors"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / MODEL).unlink(), "it has no weights"),
        (lambda f: (f / "config.json").write_text("{}"), "is None, not Gemma 3"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "must be an object"),
        (
            lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:999]),
            "truncated",
        ),
        (index, "lacks model-1.safetensors: download"),
        (gemma_config(hidden_size="x"), "hidden_size must be an integer, got 'x'"),
        (gemma_config(hidden_size=7), "hidden_size is 7, but norm.weight is"),
        (gemma_config(num_hidden_layers=9), "tensors: layers.7"),
        (gemma_config(num_hidden_layers=10**9), "num_hidden_layers must be above 0"),
        (gemma_config(num_hidden_layers=10**6), "lacks .* tensors"),
        (
            lambda f: renamed(f / MODEL, "layers.1.", "layers.9."),
            "lacks 13 tensors: .*layers.1.",
        ),
        (lambda f: renamed(f / MODEL, "language_model.", "x."), "it has multi_modal"),
        (
            lambda f: renamed(f / MODEL, "0.mlp.down_proj.weight", "0.mlp.absmax"),
            "by another tool than MLX .*layers.0.mlp.absmax",
        ),
        (
            lambda f: renamed(
                f / MODEL, "0.mlp.up_proj.weight", "0.mlp.up_proj.scales"
            ),
            "is quantized, but its config.json does not say how",
        ),
    ],
)
def test_an_unfit_text_encoder_is_one_line(gemma, damage, message):
    weights.check_text_encoder(str(gemma))
    damage(gemma)
    with pytest.raises(UserError, match=message) as error:
        weights.check_text_encoder(str(gemma))
    assert "\n" not in str(error.value)


def test_a_text_encoder_of_another_size_is_refused(gemma, checkpoint):
    weights.check_text_encoder(str(gemma), weights.open_model(str(checkpoint("ltx-2"))))
    model = weights.open_model(str(checkpoint("ltx-2")))
    f, key = model.parts["connectors"][
        "text_embedding_projection.aggregate_embed.weight"
    ]
    f.header[key] = ("BF16", (96, 12))
    with pytest.raises(UserError, match="7 layers of 48, this model was trained with"):
        weights.check_text_encoder(str(gemma), model)


def test_an_empty_folder_is_no_text_encoder(tmp_path):
    with pytest.raises(UserError, match="has no files"):
        weights.fetch_text_encoder(str(tmp_path))


def test_a_text_encoder_in_a_single_file_is_refused(gemma):
    with pytest.raises(UserError, match="a single file: pass a folder"):
        weights.check_text_encoder(str(gemma / MODEL))


@pytest.mark.parametrize("name", ["", "text_encoder"])
def test_a_text_encoder_may_be_laid_out_as_in_diffusers(
    gemma, fake_hub, tmp_path, name
):
    """With its tokenizer in a folder next to it, as in Lightricks/LTX-2 itself."""
    local = tmp_path / "diffusers"
    (local / "tokenizer").mkdir(parents=True)
    (gemma / "tokenizer.json").rename(local / "tokenizer" / "tokenizer.json")
    gemma.rename(local / "text_encoder")
    shutil.rmtree(fake_hub.repo)
    shutil.copytree(local, fake_hub.repo)
    repo = f"Lightricks/LTX-2/{name}".strip("/")
    places = {str(local / name): local, repo: fake_hub.cache}
    for place, folder in places.items():
        weights.check_text_encoder(place)
        found = weights.fetch_text_encoder(place)
        assert found == folder / "text_encoder"
        assert TextEncoder(found).tokenize("a cat")[0] == 2
    assert "tokenizer/tokenizer.json" in fake_hub.fetched


# Loading


def test_the_transformer_is_read_without_computing(checkpoint):
    model = weights.open_model(str(checkpoint("ltx-2")))
    loaded = model.load("transformer", mx.bfloat16, lazy=True)
    graph = io.StringIO()
    mx.export_to_dot(graph, *[w for _, w in tree_flatten(loaded.parameters())])
    assert set(re.findall(r'label ="(\w+)"', graph.getvalue())) == {"Load"}


def test_planning_opens_no_file(checkpoint, monkeypatch):
    model = weights.open_model(str(checkpoint("ltx-2")))
    seen = lambda tensors: {k: (w.shape, w.dtype) for k, w in tensors.items()}
    expected = [seen(model.weights(name, mx.float16)) for name in model.components]
    monkeypatch.setattr(mx, "load", None)
    model.check(*model.components)
    assert [seen(model.shapes(n, mx.float16)) for n in model.components] == expected
