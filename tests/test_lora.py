"""LoRAs: effect, sum, removal, and file formats."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from parity import cosine, relative_error
from streams import inputs, load, quantized

from ltx2 import lora, weights
from ltx2.base import UserError
from ltx2.dit import Pass
from ltx2.inputs import InputFiles
from ltx2.linear import quantize
from ltx2.lora import FusedLinear, Lora, LoRALinear, linear_shape


@pytest.fixture(scope="module")
def loras(checkpoint, name):
    return [Lora.read(checkpoint(f"{name}-{kind}")) for kind in ("lora", "lora2")]


@pytest.fixture(scope="module")
def plain(checkpoint, name):
    return load(checkpoint(name))


@pytest.fixture(scope="module")
def in_four_bits(checkpoint, name):
    return quantized(load(checkpoint(name)), 4)


@pytest.fixture
def attach(checkpoint, name):
    """`lora.attach` with a function that reads weights of the checkpoint again."""

    def run(model, loras):
        source = weights.open_model(str(checkpoint(name)))
        tensors = source.weights("transformer", model.dtype)
        lora.attach(model, loras, lambda keys: {k: tensors[k] for k in keys})

    return run


@pytest.fixture(params=["plain", "in_four_bits"])
def model(request, attach):
    model = request.getfixturevalue(request.param)
    attach(model, [])
    return model


@pytest.fixture
def g(golden, name):
    return golden(f"{name}/transformer_lora")


def velocities(model, g):
    video, audio, texts = inputs(model, g)
    [velocities] = model(video, audio, texts, [Pass()])
    mx.eval(velocities)
    return velocities


def equal(ours, theirs):
    return all(map(mx.array_equal, ours, theirs))


# Effect


@pytest.mark.parametrize("case", ["one", "two"])
def test_velocities_match_the_reference(plain, attach, loras, g, case):
    attach(plain, list(zip(loras, g["info"]["strengths"][case])))
    for stream, ours in zip(("video", "audio"), velocities(plain, g)):
        exact, published = (
            mx.array(g[f"out.{rule}{case}.{stream}"]) for rule in ("", "bf16.")
        )
        assert relative_error(ours, exact) < 1e-5
        # The published rule rounds the fused weight to bfloat16.
        assert 1e-3 < relative_error(ours, published) < 5e-3


def test_the_effects_of_two_loras_add_up(model, attach, loras):
    strengths = (0.8, -0.3)
    base = {k: as_linear(m) for k, m in lora.linear_layers(model).items()}
    attach(model, list(zip(loras, strengths)))
    changed = loras[0].factors.keys() | loras[1].factors.keys()
    assert loras[0].factors.keys() & loras[1].factors.keys()
    for path, layer in lora.linear_layers(model).items():
        outputs, inputs = linear_shape(layer)
        x = mx.random.normal((1, 5, inputs), key=mx.random.key(0))
        expected = base[path](x)
        for one, strength in zip(loras, strengths):
            if path in one.factors:
                a, b = (w.astype(mx.float32) for w in one.factors[path])
                expected += strength * (x @ a.T @ b.T)
        assert layer(x).shape == (1, 5, outputs)
        assert relative_error(layer(x), expected) < 1e-5
        assert isinstance(layer, (LoRALinear, FusedLinear)) == (path in changed)


def as_linear(layer):
    """The layer as it is now, which attaching cannot change."""
    if not isinstance(layer, nn.QuantizedLinear):
        weight, bias = layer.weight, layer.get("bias", 0)
        return lambda x: x @ weight.T + bias
    return layer


def test_removing_loras_restores_the_base_bit_for_bit(model, attach, loras, g):
    before = velocities(model, g)
    weights = dict(tree_flatten(model.parameters()))
    attach(model, [(loras[0], 1.0), (loras[1], 1.0)])
    changed = velocities(model, g)
    assert not mx.allclose(changed[0], before[0], atol=1e-2)
    assert not mx.allclose(changed[1], before[1], atol=1e-2)
    attach(model, [(loras[0], 1.0)])  # replaces both
    one = velocities(model, g)
    assert not mx.allclose(one[0], changed[0], atol=1e-2)
    attach(model, [(loras[0], 1.0)])
    assert equal(velocities(model, g), one)
    attach(model, [])
    assert equal(velocities(model, g), before)
    after = dict(tree_flatten(model.parameters()))
    assert weights.keys() == after.keys()
    assert all(mx.array_equal(weights[key], after[key]) for key in weights)
    kinds = {type(layer) for layer in lora.linear_layers(model).values()}
    assert kinds <= {nn.Linear, nn.QuantizedLinear}


def test_unquantized_weights_are_rounded_once(checkpoint, name, loras):
    """The published rule: the base plus B A, rounded to the base's dtype."""
    model = load(checkpoint(name), mx.bfloat16)
    path = next(iter(loras[0].factors))
    layer = lora.linear_layers(model)[path]
    a, b = (w.astype(mx.float32) for w in loras[0].factors[path])
    expected = (layer.weight.astype(mx.float32) + 0.7 * (b @ a)).astype(mx.bfloat16)
    lora.attach(model, [(loras[0], 0.7)])
    assert mx.array_equal(layer.weight, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_add_the_lora_to_the_dequantized_weight(monkeypatch, bias):
    linear = nn.Sequential(nn.Linear(64, 96, bias))
    quantize(linear, group_size=32, bits=8)
    a, b = mx.random.normal((4, 64)), mx.random.normal((96, 4))
    layer = LoRALinear(linear.layers[0], a, b, mx.full(4, 0.5))
    x = mx.random.normal((2, 20, 64))
    few = layer(x)
    monkeypatch.setattr(lora, "MERGE_FROM", 40)
    assert relative_error(layer(x), few) < 1e-5 and not mx.array_equal(layer(x), few)
    layer.apart = True  # in training
    assert mx.array_equal(layer(x), few)
    layer.lora_a = a[:0]  # the base
    assert mx.array_equal(layer(x), layer.linear(x))
    # For the distilled LoRA (rank 384), counted at 6144 rows: 2 M N per product
    side = 2 * 6144 * 384 * (4096 + 4096)
    merged = 2 * 4096 * 4096 * 384
    assert merged < 0.4 * side


def test_a_bfloat16_run_stays_bfloat16(checkpoint, name, plain, attach, loras, g):
    attach(plain, [(loras[0], 0.8)])
    rounded = load(checkpoint(name), mx.bfloat16)
    factors = {k: (a.astype(mx.float32), b) for k, (a, b) in loras[0].factors.items()}
    lora.attach(rounded, [(replace(loras[0], factors=factors), 0.8)])
    for a, b in zip(velocities(rounded, g), velocities(plain, g)):
        assert a.dtype == mx.bfloat16
        assert cosine(a, b) > 0.9999


# Files


def write(path, source, rename, metadata=None, **more):
    """Write the LoRA with other keys: `rename(module path, "A" or "B")`."""
    tensors = {
        rename(module, part): w
        for module, factors in source.factors.items()
        for part, w in zip("AB", factors)
    }
    mx.save_safetensors(str(path), tensors | more, metadata)
    return path


@pytest.fixture(scope="module")
def lora_of_all_layers(checkpoint, name):
    """A LoRA of every linear layer."""
    return Lora.read(checkpoint(f"{name}-distilled-lora"))


# Official and diffusers names; the first match counts.
RENAMED_BY_DIFFUSERS = {
    "patchify_proj": "proj_in",
    "prompt_adaln_single": "prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "adaln_single": "time_embed",
}


def diffusers_name(module, part):
    for official, name in RENAMED_BY_DIFFUSERS.items():
        if official in module:
            module = module.replace(official, name)
            break
    return f"transformer.{module}.lora_{part}.weight"


def comfy_name(module, part):
    way = {"A": "down", "B": "up"}[part]
    return f"diffusion_model.{module}.lora_{way}.weight"


def flat_name(prefix):
    """kohya's and musubi's names."""
    way = {"A": "down", "B": "up"}
    return lambda module, part: (
        f"{prefix}{module.replace('.', '_')}.lora_{way[part]}.weight"
    )


def peft_name(prefix, adapter=""):
    return lambda module, part: f"{prefix}{module}.lora_{part}{adapter}.weight"


def mlx_name(module, part):
    """As the trainer of ltx-2-mlx writes."""
    names = {".to_out.0": ".to_out", ".net.0.proj": ".proj_in", ".net.2": ".proj_out"}
    names |= {".linear_1": ".linear1", ".linear_2": ".linear2"}
    for official, name in names.items():
        module = module.replace(official, name)
    return f"diffusion_model.{module}.lora_{part}.weight"


RENAMES = {
    "official": peft_name("diffusion_model."),
    "with the file's prefix": peft_name("model.diffusion_model."),
    "ComfyUI": comfy_name,
    "diffusers": diffusers_name,
    "diffusers, long ago": lambda module, part: (
        f"transformer.{module}.lora.{dict(A='down', B='up')[part]}.weight"
    ),
    "kohya": flat_name("lora_unet_"),
    "musubi": flat_name("lora_transformer_"),
    "LyCORIS": flat_name("lycoris_"),
    "peft": peft_name("base_model.model."),
    "peft with its adapter's name": peft_name("base_model.model.", ".default"),
    "peft with a name of a user's": peft_name("base_model.model.", ".my-style"),
    "bare": peft_name(""),
    "compiled": peft_name("_orig_mod."),
    "another tool": peft_name("net.dit."),
    "ltx-2-mlx": mlx_name,
    "another flat one": flat_name("lora_dit_"),
}


@pytest.mark.parametrize("style", RENAMES)
def test_key_styles(plain, lora_of_all_layers, tmp_path, style):
    file = write(tmp_path / "x.safetensors", lora_of_all_layers, RENAMES[style])
    read = Lora.read(file)
    read.check(plain)
    assert read.factors.keys() == lora_of_all_layers.factors.keys()
    for path, factors in read.factors.items():
        assert equal(factors, lora_of_all_layers.factors[path])


def test_kohyas_names_of_a_models_layers_are_unique(plain):
    paths = lora.linear_layers(plain)
    assert len({path.replace(".", "_") for path in paths}) == len(paths)


def test_blocks_find_their_part_of_a_lora(checkpoint, name, loras, tmp_path, g):
    """Streamed blocks are not in a model that knows all names."""
    file = write(tmp_path / "x.safetensors", loras[0], RENAMES["kohya"])
    complete, parts = (load(checkpoint(name)) for _ in range(2))
    lora.attach(complete, [(Lora.read(file), 0.5)])
    for i, block in enumerate(parts.transformer_blocks):
        prefix = f"transformer_blocks.{i}."
        lora.attach(block, [(Lora.read(file), 0.5)], prefix=prefix)
    assert any("transformer_blocks" in path for path in loras[0].factors)
    outside = [p for p in loras[0].factors if not p.startswith("transformer_blocks")]
    layers = lora.linear_layers(complete)
    for path, layer in lora.linear_layers(parts).items():
        assert path in outside or mx.array_equal(layer.weight, layers[path].weight)


PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 16.0}
DIFFUSERS = {f"transformer.{key}": value for key, value in PEFT.items()}


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_adapter_metadata": json.dumps(DIFFUSERS)},
        {"ss_network_alpha": "16.0", "ss_network_dim": "8"},
        {"lora_alpha": "16", "r": "8"},
        {"lora_adapter_metadata": json.dumps(PEFT | {"alpha_pattern": {"to_q": 16}})},
    ],
    ids=["diffusers", "kohya", "plain", "pattern"],
)
def test_alpha_in_the_metadata_scales_the_effect(loras, tmp_path, metadata):
    file = write(tmp_path / "x.safetensors", loras[0], comfy_name, metadata)
    assert_scaled(Lora.read(file), loras[0], 16)


def assert_scaled(ours, source, alpha):
    for module, (a, b) in ours.factors.items():
        a_0, b_0 = source.factors[module]
        assert equal((a, b), (a_0, b_0.astype(mx.float32) * (alpha / len(a))))
    assert f"alpha {alpha}, strength 0.5" in ours.describe(0.5)


def test_alpha_tensors_count_more_than_metadata(loras, tmp_path):
    alphas = {f"diffusion_model.{m}.alpha": mx.array(2.0) for m in loras[0].factors}
    metadata = {"ss_network_alpha": "16"}
    file = write(tmp_path / "x.safetensors", loras[0], comfy_name, metadata, **alphas)
    assert_scaled(Lora.read(file), loras[0], 2)


def test_an_adapter_folder_is_read_with_its_configuration(loras, tmp_path):
    rename = peft_name("base_model.model.")
    write(tmp_path / "adapter_model.safetensors", loras[0], rename)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    assert_scaled(Lora.read(tmp_path), loras[0], 16)
    config = PEFT | {"use_rslora": True, "lora_alpha": 2.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for module, (a, b) in Lora.read(tmp_path).factors.items():
        assert relative_error(b, loras[0].factors[module][1] / len(a) ** 0.5 * 2) < 1e-6


def test_alpha_can_differ_by_module(loras, tmp_path):
    first, *others = loras[0].factors
    config = {"lora_alpha": 4.0, "alpha_pattern": {first: 1}}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    file = write(tmp_path / "x.safetensors", loras[0], peft_name(""), metadata)
    read = Lora.read(file)
    for module, alpha in {first: 1, others[0]: 4}.items():
        a, b = read.factors[module]
        assert relative_error(b, loras[0].factors[module][1] * alpha / len(a)) < 1e-6
    assert "rank 4, alpha 1 to 4, strength 1" in read.describe(1.0)


def test_metadata_is_kept(loras):
    assert loras[1].metadata["reference_downscale_factor"] == "2"


@pytest.mark.parametrize("name", ["ltx-2"], indirect=True)
def test_another_generations_lora_is_refused(checkpoint, model, attach, loras, g):
    attach(model, [(loras[0], 1.0)])
    before = velocities(model, g)
    other = Lora.read(checkpoint("ltx-2.3-lora"))
    message = (
        "ltx-2.3-lora.* made for another model: .* this model has (no such layer|64x64)"
    )
    with pytest.raises(UserError, match=message):
        attach(model, [(loras[1], 1.0), (other, 1.0)])
    assert equal(velocities(model, g), before)  # nothing was changed


def test_a_pair_that_does_not_fit_is_refused(plain, loras):
    path, (a, b) = next(iter(loras[0].factors.items()))
    wrong = replace(loras[0], factors={path: (a[:, :2], b)})
    with pytest.raises(UserError, match=path):
        wrong.check(plain)


def test_a_missing_factor_is_refused(loras, tmp_path):
    key = "diffusion_model.proj_out.lora_A.weight"
    mx.save_safetensors(str(tmp_path / "half.safetensors"), {key: mx.zeros((4, 64))})
    with pytest.raises(
        UserError, match="half.safetensors: missing lora_A or lora_B for proj_out"
    ):
        Lora.read(tmp_path / "half.safetensors")


A, B = mx.ones((2, 4)), mx.ones((4, 2))


def pair(a=A, b=B, **more):
    return {"x.lora_A.weight": a, "x.lora_B.weight": b} | {
        f"x.{key}": w for key, w in more.items()
    }


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"Not a LoRA", "not a safetensors file"),
        ({}, "has no factors"),
        ({"vae.decoder.conv_in.conv.weight": A}, "unrecognized key vae"),
        ({"diffusion_model.proj_out.weight": A}, "unrecognized key diff"),
        # more than a LoRA, or something else
        (pair() | {"x.dora_scale": A}, "is a DoRA .x.dora_scale"),
        (pair() | {"x.lora_magnitude_vector.default.weight": A}, "is a DoRA"),
        (pair() | {"x.diff_b": A}, "changes biases"),
        (pair() | {"x.lora_B.bias": A}, "changes biases"),
        (pair() | {"x.diff": A}, "replaces weights"),
        ({"x.lokr_w1": A, "x.alpha": A}, "is a LoKr"),
        ({"x.hada_w1_a": A}, "is a LoHa"),
        (pair() | {"text_encoders.gemma3.x.lora_A.weight": A}, "the text encoder"),
        (pair() | {"lora_te1_x.lora_down.weight": A}, "the text encoder"),
        # factors and alphas
        (pair(mx.ones((0, 4)), mx.ones((4, 0))), "x: factors do not fit"),
        (pair(mx.ones((3, 4))), "x: factors do not fit"),
        (pair(mx.ones(4)), "x: factors do not fit"),
        (pair(A[..., None, None], B[..., None, None]), "x: factors do not fit"),
        (pair(A.astype(mx.uint8)), "x: factors do not fit"),
        (pair(alpha=mx.ones(2)), "invalid alpha .* of x"),
        (pair(alpha=mx.array(float("nan"))), "invalid alpha nan of x"),
        (pair(alpha=mx.array(0.0)), "invalid alpha 0.0 of x"),
        (pair() | {"transformer.x.lora_down.weight": A}, "two factors A for x"),
    ],
)
def test_a_file_that_is_not_a_lora_is_refused(tmp_path, content, message):
    path = tmp_path / "strange.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        mx.save_safetensors(str(path), content)
    with pytest.raises(UserError, match=f"strange.safetensors.*{message}"):
        Lora.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_before_anything_is_loaded(tmp_path, value):
    """A trainer wrote NaN into the B of all gates: the videos were black."""
    gate = "diffusion_model.blocks.0.attn1.to_gate_logits.lora_{}.weight"
    bad = {gate.format("A"): A, gate.format("B"): mx.where(mx.arange(2) == 1, value, B)}
    mx.save_safetensors(str(tmp_path / "gates.safetensors"), pair() | bad)
    message = r"gates.safetensors: .*to_gate_logits.lora_B has NaN or infinite"
    with pytest.raises(UserError, match=message):
        InputFiles().lora(str(tmp_path / "gates.safetensors"))


def test_a_lora_that_changes_nothing_is_noted(tmp_path, caplog):
    """A trainer wrote B that are all 0."""
    for name, factor in (("zero", 0), ("one", 1)):
        file = str(tmp_path / f"{name}.safetensors")
        mx.save_safetensors(file, pair(b=B * factor))
        InputFiles().lora(file)
    [noted] = caplog.messages
    assert "zero.safetensors: all its B are 0: it changes nothing" in noted


@pytest.mark.parametrize(
    "config",
    ["{", "[]", "[" * 50000, '{"alpha_pattern": 3}', '{"alpha_pattern": {"(": 1}}']
    + [
        '{"lora_alpha": [8]}',
        '{"lora_alpha": "much"}',
        '{"peft_type": "IA3"}',
        '{"use_dora": true}',
    ],
)
def test_an_adapter_with_a_strange_configuration_is_refused(tmp_path, config):
    metadata = {"lora_adapter_metadata": config}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), pair(), metadata)
    with pytest.raises(UserError, match="LoRA .*x.safetensors[: ]"):
        Lora.read(tmp_path / "x.safetensors")


def test_a_folder_with_several_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no .safetensors file"):
        Lora.read(tmp_path)
    for name in ("a", "b"):
        mx.save_safetensors(str(tmp_path / f"{name}.safetensors"), pair())
    named = r"has 2 safetensors files: add the name of one \(a.safetensors, b"
    with pytest.raises(UserError, match=named):
        Lora.read(tmp_path)


def test_a_module_with_two_names_is_refused(plain, loras):
    path, factors = next(iter(loras[0].factors.items()))
    both = {path: factors, path.replace(".", "_"): factors}
    with pytest.raises(UserError, match=f"two factors .* for {path}"):
        replace(loras[0], factors=both).check(plain)


def test_another_models_name_is_not_taken_for_one_of_ours(plain, loras):
    path = "transformer_blocks.0.attn1.to_q"
    other = {f"single_{path}": loras[0].factors[path]}  # fits by its shape
    with pytest.raises(UserError, match="single_.* this model has no such layer"):
        replace(loras[0], factors=other).check(plain)


@pytest.mark.parametrize("name", ["me/lora", "me/lora/it.safetensors"])
def test_a_lora_of_the_hub_is_downloaded_once(fake_hub, checkpoint, name):
    shutil.rmtree(fake_hub.repo)
    fake_hub.repo.mkdir()
    shutil.copy(checkpoint("ltx-2-lora"), fake_hub.repo / "it.safetensors")
    (fake_hub.repo / "README.md").write_text("what it does")
    found = [Lora.read(name) for _ in range(2)]
    assert fake_hub.fetched == ["it.safetensors"]
    assert [lora.factors.keys() for lora in found] == [
        Lora.read(checkpoint("ltx-2-lora")).factors.keys()
    ] * 2


def test_a_repository_with_several_loras_asks_for_one(fake_hub):
    with pytest.raises(
        UserError, match="LoRA me/lora has 4 safetensors files: add the name of one"
    ):
        Lora.read("me/lora")
    with pytest.raises(UserError, match="me/lora/x.safetensors is not there"):
        Lora.read("me/lora/x.safetensors")
    assert fake_hub.fetched == []


def test_the_configuration_of_peft_comes_along(fake_hub, checkpoint):
    shutil.rmtree(fake_hub.repo)
    fake_hub.repo.mkdir()
    for name in ("adapter_model", "optimizer"):
        file = fake_hub.repo / f"{name}.safetensors"
        shutil.copy(checkpoint("ltx-2-lora"), file)
    config = fake_hub.repo / "adapter_config.json"
    config.write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    assert Lora.read("me/lora").alphas == {2}
    assert fake_hub.fetched == ["adapter_model.safetensors", "adapter_config.json"]
