"""The latent upsamplers: 2 times the frames, 2 or 1.5 times the height and width."""

import mlx.core as mx
import pytest
from parity import channels_last, read, relative_error

from ltx2 import pipeline
from ltx2.base import UserError
from ltx2.upsampler import LatentUpsampler, UpsamplerConfig

# checkpoint: its model
UPSAMPLERS = {
    "temporal-x2": "ltx-2",
    "spatial-x2-rational": "ltx-2",
    "spatial-x2": "ltx-2.3",
    "spatial-x1.5": "ltx-2.3",
}


def load(path, **changes) -> LatentUpsampler:
    config, weights = read(path)
    model = LatentUpsampler(UpsamplerConfig.from_dict(config | changes))
    return model.load_weights(list(LatentUpsampler.sanitize(weights).items()))


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_latents_match_the_reference(checkpoint, golden, name):
    g = golden(f"{UPSAMPLERS[name]}/upsampler_{name}")
    latents = load(checkpoint(name))(channels_last(g["in.latent"]))
    assert relative_error(latents, channels_last(g["out.raw"])) < 1e-5


@pytest.mark.parametrize(
    "name, frames, height, width",
    [
        ("temporal-x2", 5, 4, 6),  # the first latent frame is one video frame
        ("spatial-x2-rational", 3, 8, 12),
        ("spatial-x2", 3, 8, 12),
        ("spatial-x1.5", 3, 6, 9),
    ],
)
def test_sizes(checkpoint, name, frames, height, width):
    model = load(checkpoint(name))
    channels = model.config.in_channels
    latents = model(mx.zeros((1, 3, 4, 6, channels)))
    assert latents.shape == (1, frames, height, width, channels)


def test_a_run_enlarges_latents_1_5_times(checkpoint):
    files = [str(checkpoint("spatial-x1.5"))]
    pipe = pipeline.load(checkpoint("ltx-2.3"), None, "distilled", "float32", files)
    context = mx.zeros((1, 2, 128)), mx.zeros((1, 2, 64))
    options = {"height": 96, "width": 96, "num_frames": 9, "sigmas": (1.0, 0.0)}
    options |= {"stages": "two", "no_audio": True, "seed": 10}
    result = pipe.generate("a", contexts={"a": context}, **options)
    assert result.video_latents.shape == (2, 3, 3, 32)


@pytest.mark.parametrize("both", [True, False])
def test_an_upsampler_is_either_spatial_or_temporal(checkpoint, both):
    with pytest.raises(UserError, match=f"both {both}"):
        load(checkpoint("spatial-x2"), spatial_upsample=both, temporal_upsample=both)


@pytest.mark.parametrize("change", [{"dims": 2}, {"spatial_scale": 4.0}])
def test_another_upsampler_is_refused(checkpoint, change):
    with pytest.raises(UserError, match="only .* is implemented"):
        load(checkpoint("spatial-x1.5"), **change)


def test_weights_of_another_scale_do_not_fit(checkpoint):
    with pytest.raises(ValueError):
        load(checkpoint("spatial-x1.5"), spatial_scale=2.0)
