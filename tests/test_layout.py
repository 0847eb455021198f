"""Every tensor of the released files has its place, and every parameter its tensor."""

import json

import mlx.core as mx
import pytest
from released import CONFIGS, MODELS, model, opened, released

from ltx2 import vae
from ltx2.base import UserError
from ltx2.conversion import Conversion
from ltx2.quantization import quantization, recipe

UPSAMPLERS = {
    "ltx-2-spatial-upscaler-x2-1.0": "spatial_upsampler",
    "ltx-2-temporal-upscaler-x2-1.0": "temporal_upsampler",
    "ltx-2.3-spatial-upscaler-x2-1.0": "spatial_upsampler",
    "ltx-2.3-spatial-upscaler-x1.5-1.0": "spatial_upsampler_x1.5",
}


@pytest.mark.parametrize("config", MODELS)
def test_every_tensor_has_one_parameter(config):
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    source = model(config)
    for name in source.components:
        source.build(name, source.shapes(name))
    assert sum(len(f.header) for f in source.files) == MODELS[config][1]
    assert mx.get_peak_memory() - before < 1 << 20


@pytest.mark.parametrize("config", ["ltx-2-19b-dev", "ltx-2.5-22b"])
def test_four_bits_by_layer_are_at_most_five_with_scales(config):
    source = model(config)
    how = recipe(None, quantization(), source.shapes("transformer"))
    job = Conversion(source, how)
    job.weights("transformer")  # lazily
    assert 4.9 < job.mean_bits <= 5


def test_a_diffusion_vae_without_the_convolutional_one():
    version, _, layouts = MODELS["ltx-2.5-22b"]
    files = [released(f, "ltx-2.5-22b", version) for f in layouts if "conv" not in f]
    source = opened(files)
    for name in ("vae", "diffusion_decoder"):
        source.build(name, source.shapes(name))
    assert len(source.parts["vae"]) == 84 + 2
    assert len(source.parts["diffusion_decoder"]) == 309 + 2


@pytest.mark.parametrize("file", UPSAMPLERS)
def test_every_upsampler_tensor_has_one_parameter(file):
    config = "ltx-2.3-22b" if "2.3" in file else "ltx-2-19b-dev"
    source = model(config, released(file, file))
    name = UPSAMPLERS[file]
    source.build(name, source.shapes(name))
    assert source.components[-1] == name


def test_unused_statistics_are_accepted():
    source = model("ltx-2-19b-dev")
    f = source.files[0]
    for key in vae.VideoVAE.UNUSED:
        f.header[f"vae.{key}"] = ("BF16", (128,))
    source = opened([f])
    source.build("vae", source.shapes("vae"))


def test_tensors_that_do_not_match_are_named():
    f = released("ltx-2-19b", "ltx-2-19b-dev", "2.0.0")
    del f.header["vae.decoder.conv_in.conv.bias"]
    f.header["vae.decoder.conv_out.conv.bias"] = ("BF16", (47,))
    for i in range(5):
        f.header[f"vae.zebra.{i}"] = ("BF16", (1,))
    source = opened([f])
    with pytest.raises(UserError) as error:
        source.build("vae", source.shapes("vae"))
    message = str(error.value)
    assert "decoder.conv_in.conv.bias is missing, not (1024,)" in message
    assert "decoder.conv_out.conv.bias is (47,), not (48,)" in message
    assert "zebra.2 is (1,), not expected; and 2 more" in message
    assert "zebra.3" not in message


def test_timestep_conditioning_must_be_what_the_tensors_say():
    f = released("ltx-2-19b", "ltx-2-19b-dev", "2.0.0")
    f.metadata["config"] = json.dumps(CONFIGS["ltx-2-19b-distilled"])
    source = opened([f])
    with pytest.raises(UserError, match="last_scale_shift_table is missing"):
        source.build("vae", source.shapes("vae"))
