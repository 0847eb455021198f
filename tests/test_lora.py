"""LoRAs: effect, sum, removal, and file formats."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from parity import cosine, relative_error
from streams import inputs, load, quantized

from ltx2.base import UserError
from ltx2.dit import Pass
from ltx2.lora import Lora, LoRALinear, attach, linear_shape


@pytest.fixture(scope="module")
def loras(checkpoint, name):
    return [Lora.read(checkpoint(f"{name}-{kind}")) for kind in ("lora", "lora2")]


@pytest.fixture(scope="module")
def plain(checkpoint, name):
    return load(checkpoint(name))


@pytest.fixture(scope="module")
def in_four_bits(checkpoint, name):
    return quantized(load(checkpoint(name)), 4)


@pytest.fixture(params=["plain", "in_four_bits"])
def model(request):
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


def lora_layers(model):
    return {k: m for k, m in model.named_modules() if isinstance(m, LoRALinear)}


# Effect


@pytest.mark.parametrize("case", ["one", "two"])
def test_velocities_match_the_reference(plain, loras, g, case):
    attach(plain, list(zip(loras, g["info"]["strengths"][case])))
    for stream, ours in zip(("video", "audio"), velocities(plain, g)):
        exact, published = (
            mx.array(g[f"out.{rule}{case}.{stream}"]) for rule in ("", "bf16.")
        )
        assert relative_error(ours, exact) < 1e-5
        # The published rule rounds the fused weight to bfloat16.
        assert 1e-3 < relative_error(ours, published) < 5e-3


def test_the_effects_of_two_loras_add_up(model, loras):
    strengths = (0.8, -0.3)
    attach(model, list(zip(loras, strengths)))
    layers = lora_layers(model)
    assert layers.keys() == loras[0].factors.keys() | loras[1].factors.keys()
    assert loras[0].factors.keys() & loras[1].factors.keys()
    for path, layer in layers.items():
        outputs, inputs = linear_shape(layer)
        x = mx.random.normal((1, 5, inputs), key=mx.random.key(0))
        expected = layer.linear(x)
        for lora, strength in zip(loras, strengths):
            if path in lora.factors:
                a, b = (w.astype(mx.float32) for w in lora.factors[path])
                expected += strength * (x @ a.T @ b.T)
        assert layer(x).shape == (1, 5, outputs)
        assert relative_error(layer(x), expected) < 1e-5


def test_removing_loras_restores_the_base_bit_for_bit(model, loras, g):
    before = velocities(model, g)
    weights = dict(tree_flatten(model.parameters()))
    attach(model, [(loras[0], 1.0), (loras[1], 1.0)])
    changed = velocities(model, g)
    assert not mx.allclose(changed[0], before[0], atol=1e-2)
    assert not mx.allclose(changed[1], before[1], atol=1e-2)
    attach(model, [(loras[0], 1.0)])  # replaces both
    assert not mx.allclose(velocities(model, g)[0], changed[0], atol=1e-2)
    for nothing in ([], [(loras[0], 0.0), (loras[1], 0.0)]):
        attach(model, nothing)
        assert equal(velocities(model, g), before)
        assert not lora_layers(model)
    after = dict(tree_flatten(model.parameters()))
    assert weights.keys() == after.keys()
    assert all(weights[key] is after[key] for key in weights)


def test_a_bfloat16_run_stays_bfloat16(checkpoint, name, plain, loras, g):
    attach(plain, [(loras[0], 0.8)])
    rounded = load(checkpoint(name), mx.bfloat16)
    factors = {k: (a.astype(mx.float32), b) for k, (a, b) in loras[0].factors.items()}
    attach(rounded, [(replace(loras[0], factors=factors), 0.8)])
    for a, b in zip(velocities(rounded, g), velocities(plain, g)):
        assert a.dtype == mx.bfloat16
        assert cosine(a, b) > 0.9999


# Files


def write(path, lora, rename, **more):
    """Write the LoRA with other keys: `rename(module path, "A" or "B")`."""
    tensors = {
        rename(module, part): w
        for module, factors in lora.factors.items()
        for part, w in zip("AB", factors)
    }
    mx.save_safetensors(str(path), tensors | more)
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


@pytest.mark.parametrize(
    "rename",
    [
        lambda module, part: f"diffusion_model.{module}.lora_{part}.weight",
        lambda module, part: f"model.diffusion_model.{module}.lora_{part}.weight",
        comfy_name,
        diffusers_name,
    ],
    ids=["official", "with the file's prefix", "ComfyUI", "diffusers"],
)
def test_key_styles(plain, lora_of_all_layers, tmp_path, rename):
    lora = Lora.read(write(tmp_path / "x.safetensors", lora_of_all_layers, rename))
    lora.check(plain)
    assert lora.factors.keys() == lora_of_all_layers.factors.keys()
    for path, factors in lora.factors.items():
        assert equal(factors, lora_of_all_layers.factors[path])


def test_alpha_by_rank_scales_the_effect(lora_of_all_layers, tmp_path):
    alphas = {
        f"diffusion_model.{module}.alpha": mx.array(4.0)  # half the rank
        for module in lora_of_all_layers.factors
    }
    path = write(tmp_path / "x.safetensors", lora_of_all_layers, comfy_name, **alphas)
    for module, (a, b) in Lora.read(path).factors.items():
        assert equal((a, 2 * b), lora_of_all_layers.factors[module])


def test_metadata_is_kept(loras):
    assert loras[1].metadata["reference_downscale_factor"] == "2"


@pytest.mark.parametrize("name", ["ltx-2"], indirect=True)
def test_another_generations_lora_is_refused(checkpoint, model, loras, g):
    attach(model, [(loras[0], 1.0)])
    before = velocities(model, g)
    other = Lora.read(checkpoint("ltx-2.3-lora"))
    message = (
        "ltx-2.3-lora.* the model has (no such layer|64x64); .* another generation"
    )
    with pytest.raises(UserError, match=message):
        attach(model, [(loras[1], 1.0), (other, 1.0)])
    assert equal(velocities(model, g), before)  # nothing was changed


def test_a_pair_that_does_not_fit_is_refused(plain, loras):
    path, (a, b) = next(iter(loras[0].factors.items()))
    wrong = replace(loras[0], factors={path: (a[:2], b)})
    with pytest.raises(UserError, match=path):
        wrong.check(plain)


def test_a_missing_factor_is_refused(loras, tmp_path):
    key = "diffusion_model.proj_out.lora_A.weight"
    mx.save_safetensors(str(tmp_path / "half.safetensors"), {key: mx.zeros((4, 64))})
    with pytest.raises(
        UserError, match="half.safetensors: missing lora_A or lora_B for proj_out"
    ):
        Lora.read(tmp_path / "half.safetensors")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"Not a LoRA", "not a safetensors file"),
        ({}, "has no factors"),
        ({"vae.decoder.conv_in.conv.weight": mx.zeros(1)}, "unrecognized key vae"),
        ({"diffusion_model.proj_out.weight": mx.zeros(1)}, "unrecognized key diff"),
        ({"lora_unet_proj_out.lora_up.weight": mx.zeros(1)}, "unrecognized key lora"),
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
