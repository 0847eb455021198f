"""The video VAE: parity with the reference, exact streams, refusals."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from parity import channels_last, read, relative_error

from ltx2 import vae, weights
from ltx2.base import UserError
from ltx2.layers import patchify, unpatchify
from ltx2.vae import VideoVAE, VideoVAEConfig

MODELS = ["ltx-2", "ltx-2-notc", "ltx-2.3"]


def load(path, **changes) -> VideoVAE:
    section, tensors = read(path, "vae")
    model = VideoVAE(VideoVAEConfig.from_dict(section | changes))
    return model.load_weights(list(VideoVAE.sanitize(tensors).items()))


@pytest.fixture(scope="module")
def models(checkpoint):
    return {name: load(checkpoint(name)) for name in MODELS}


@pytest.fixture(params=["ltx-2", "ltx-2.3"])
def model(models, request):
    return models[request.param]


@pytest.fixture
def conditioned(models):
    return models["ltx-2"]


def draw(model, frames, height=2, width=2, seed=0):
    """Normalized latents, and the noise that a conditioned decoder needs."""
    shape = (1, frames, height, width, model.config.latent_channels)
    latents = mx.random.normal(shape, key=mx.random.key(seed))
    if not model.config.timestep_conditioning:
        return latents, {}
    return latents, {"noise": mx.random.normal(shape, key=mx.random.key(seed + 1))}


def video(frames, batch=1, height=32, width=64):
    shape, key = (batch, frames, height, width, 3), mx.random.key(3)
    return mx.random.uniform(-1, 1, shape, key=key)


def cut(x, sizes):
    """A clip as a stream of chunks of these sizes."""
    assert sum(sizes) == x.shape[1]
    ends = [sum(sizes[:i]) for i in range(1, len(sizes))]
    return iter(mx.split(x, ends, axis=1))


def joined(chunks):
    return mx.concatenate(list(chunks), axis=1)


def image(reference):
    """A golden's image in [-1, 1], clipped to [0, 1] as by the decoder."""
    return mx.clip((channels_last(reference) + 1) / 2, 0, 1)


class Stages(dict):
    """A trace that joins the chunks of each layer."""

    def __call__(self, name, x):
        self[name] = mx.concatenate([self[name], x], axis=1) if name in self else x


# Parity


@pytest.mark.parametrize("name", MODELS)
def test_images_and_layers_match_the_reference(models, golden, name):
    g, stages, model = golden(f"{name}/vae_decode"), Stages(), models[name]
    noise = channels_last(g["in.frame_noise"]) if "in.frame_noise" in g else None
    latents = channels_last(g["in.frame"])
    frame = model.decode(latents, noise=noise, trace=stages)
    assert relative_error(frame, image(g["out.frame"])) < 1e-5
    for key, value in g.items():
        if key.startswith("mid."):
            stage = stages[key.removeprefix("mid.")]
            assert relative_error(stage, channels_last(value)) < 1e-5, key
    unclipped = unpatchify(stages["conv_out"], model.config.patch_size)
    assert relative_error(unclipped, channels_last(g["out.frame"])) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_clip_matches_the_reference(models, golden, name):
    g = golden(f"{name}/vae_decode")
    noise = channels_last(g["in.clip_noise"]) if "in.clip_noise" in g else None
    clip = models[name].decode(channels_last(g["in.clip"]), noise=noise)
    step = g["info"]["stride"]
    assert clip.dtype == mx.float32
    assert relative_error(clip[:, :, ::step, ::step], image(g["out.clip"])) < 1e-5


def test_an_image_without_noise_matches_the_reference(conditioned, golden):
    g = golden("ltx-2/vae_decode")
    frame = conditioned.decode(channels_last(g["in.frame"]), noise_scale=0)
    assert relative_error(frame, image(g["out.frame_without_noise"])) < 1e-5


@pytest.mark.parametrize("name", ["ltx-2", "ltx-2.3"])
def test_latents_match_the_reference(models, golden, name):
    g, model = golden(f"{name}/vae_encode"), models[name]
    frames = channels_last(g["in.frames"]).astype(mx.float32) / 127.5 - 1
    for out, given in ("latent", frames), ("first_frame", frames[:, :1]):
        latents = channels_last(g[f"out.{out}"])
        assert relative_error(model.encode(given), latents) < 1e-5


def test_epsilon_of_the_norm_is_1e_8():
    x = mx.full((1, 1, 1, 1, 4), 1e-4)
    assert mx.allclose(vae.norm_act(x), mx.sigmoid(mx.array(0.5**0.5)) * 0.5**0.5)


# Streams


def test_frames_do_not_depend_on_how_latents_are_chunked(model):
    latents, _ = draw(model, 6)
    expected = joined(model.decoder(cut(latents, [6]), None, None))
    assert expected.shape[1] == 41
    for sizes in [1] * 6, [2, 2, 2], [1, 4, 1]:
        streamed = joined(model.decoder(cut(latents, sizes), None, None))
        assert relative_error(streamed, expected) < 1e-5


def test_a_gpu_decodes_small_frames_in_chunks(model, monkeypatch):
    latents, noise = draw(model, 3)
    sizes, expected = [], model.decode(latents, **noise)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    note = lambda name, x: sizes.append(x.shape[1])
    frames = [*model.decode_stream(latents, **noise, trace=note)]
    assert {x.shape for x in frames} == {(1, 1, 64, 64, 3)}
    assert relative_error(joined(iter(frames)), expected) < 1e-5
    assert max(sizes) == 4


def test_a_gpu_computes_while_the_next_convolution_is_prepared(model, monkeypatch):
    latents, noise = draw(model, 3)
    vae.computing.clear()
    launched, waits = [], []
    wait = lambda x: waits.append([x is y for y in launched[-2:]])
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "async_eval", launched.append)
    monkeypatch.setattr(mx, "eval", wait)
    for _ in model.decode_stream(latents, **noise):
        pass
    assert len(waits) == len(launched) - 1 > 50
    assert all(wait == [True, False] for wait in waits)  # for the one before the last
    vae.computing.clear()


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_first_latent_is_one_frame_and_each_other_eight(model, frames):
    latents, noise = draw(model, frames)
    chunks = [*model.decode_stream(latents, **noise)]
    assert [x.shape for x in chunks] == [(1, 1, 64, 64, 3)] * (8 * frames - 7)
    assert mx.array_equal(joined(chunks), model.decode(latents, **noise))


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
def test_memory_does_not_grow_with_the_clip(model):
    def peak(frames):
        latents, noise = draw(model, frames)
        mx.eval(model.parameters(), latents, noise)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for _ in model.decode_stream(latents, **noise):
            pass
        return mx.get_peak_memory() - before

    assert peak(18) < 1.15 * peak(6)


def test_a_materialized_slice_frees_its_parent():
    before = mx.get_active_memory()
    x = mx.ones((1, 50, 8, 8, 128))
    x = vae.materialize(x[:, -2:])
    mx.synchronize()
    assert mx.get_active_memory() - before < 2 * x.nbytes


def test_every_frame_depends_on_the_complete_clip(model):
    latents, noise = draw(model, 3)
    other = mx.concatenate([latents[:, :2], -latents[:, 2:]], axis=1)
    change = mx.abs(model.decode(latents, **noise) - model.decode(other, **noise))
    assert change[:, 0].max() > 1e-3


def test_latents_do_not_depend_on_how_a_video_is_chunked(model):
    frames = video(17)
    patches = patchify(frames, model.config.patch_size)
    expected = model.normalize(joined(model.encoder(iter([patches]), None)))
    for sizes in [17], [1] * 17, [4, 10, 3]:
        latents = [*model.encode_stream(cut(frames, sizes))]
        assert [x.shape[:4] for x in latents] == [(1, 1, 1, 2)] * 3
        assert relative_error(joined(latents), expected) < 1e-5


def test_a_latent_does_not_depend_on_later_frames(model):
    frames = video(17)
    other = mx.concatenate([frames[:, :9], -frames[:, 9:]], axis=1)
    change = mx.abs(model.encode(frames) - model.encode(other))
    assert change[:, :2].max() == 0
    assert change[:, 2].max() > 1e-2


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
def test_encoding_memory_does_not_grow_with_the_clip(model):
    def peak(chunks):
        mx.eval(model.parameters())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for _ in model.encode_stream(iter([video(1)] + [video(8)] * chunks)):
            pass
        return mx.get_peak_memory() - before

    assert peak(6) < 1.15 * peak(2)


def test_a_single_image_keeps_no_frames_for_the_next_chunk(model):
    image = video(1, height=128, width=128)
    mx.eval(image)
    for single in (True, False):
        before = mx.get_active_memory()
        stream = model.encode_stream(iter([image]), single=single)
        mx.eval(next(stream))
        mx.synchronize()
        assert (mx.get_active_memory() - before < image.nbytes) == single
    assert mx.array_equal(model.encode(image), next(model.encode_stream(iter([image]))))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_only_the_half_of_a_lazily_loaded_vae_that_is_used_is_read(checkpoint, half):
    source = weights.open_model(str(checkpoint("ltx-2.3")))
    model = source.load("vae", mx.float32, lazy=True)
    before = mx.get_active_memory()
    if half == "encoder":
        mx.eval(model.encode(video(1)))
    else:
        mx.eval(model.decode(draw(model, 1)[0]))
    mx.synchronize()
    read = mx.get_active_memory() - before
    sizes = {
        k: sum(w.nbytes for _, w in tree_flatten(model[k].parameters()))
        for k in ("encoder", "decoder")
    }
    assert sizes[half] <= read < sizes[half] + 0.2 * min(sizes.values())


def test_frames_beyond_8k_plus_1_are_left_out_with_a_note(model, caplog):
    frames = video(12)
    latents = model.encode(frames)
    assert "last 3 frames are skipped" in caplog.text
    assert mx.array_equal(latents, model.encode(frames[:, :9]))


def test_clips_of_a_batch_are_independent(model):
    latents, noise = draw(model, 2)
    two = mx.concatenate([latents, -latents])
    noises = {k: mx.concatenate([v, v]) for k, v in noise.items()}
    assert mx.array_equal(
        model.decode(two, **noises)[:1], model.decode(latents, **noise)
    )
    frames = video(9, batch=2)
    assert mx.array_equal(model.encode(frames)[1:], model.encode(frames[1:]))


@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_activations_have_the_dtype_of_the_input(checkpoint, stored, dtype):
    seen = []
    trace = lambda name, x: seen.append(x.dtype)
    model, other = load(checkpoint("ltx-2")), load(checkpoint("ltx-2"))
    other.set_dtype(stored)
    latents, noise = draw(model, 2)
    frames = other.decode(latents.astype(dtype), **noise, trace=trace)
    assert other.encode(video(1).astype(dtype), trace).dtype == dtype
    assert set(seen) == {dtype}
    assert frames.dtype == mx.float32
    close = 1e-6 if dtype == mx.float32 else 0.01
    assert mx.abs(frames - model.decode(latents, **noise)).mean() < close


# Conditioning


def test_the_trained_timestep_is_0_05(conditioned):
    latents, noise = draw(conditioned, 2)
    trained = conditioned.decode(latents, **noise)
    assert mx.array_equal(trained, conditioned.decode(latents, 0.05, **noise))
    for timestep in (0.0, 0.1, None):
        other = conditioned.decode(latents, timestep, **noise)
        assert mx.abs(trained - other).max() > 1e-3


def test_the_timestep_multiplier_comes_from_the_file(conditioned, checkpoint):
    assert conditioned.decoder.timestep_scale_multiplier == 916
    other = load(checkpoint("ltx-2"))
    other.decoder.timestep_scale_multiplier = mx.array(458.0)
    latents, noise = draw(conditioned, 2)
    half = conditioned.decode(latents, 0.05, **noise)
    assert mx.allclose(half, other.decode(latents, 0.1, **noise), atol=1e-5)


def test_without_conditioning_noise_is_not_mixed_in(conditioned):
    latents, noise = draw(conditioned, 2)
    plain = conditioned.decode(latents, timestep=None)
    assert mx.array_equal(plain, conditioned.decode(latents, timestep=None, **noise))


def test_noise_is_mixed_by_its_scale(conditioned):
    latents, noise = draw(conditioned, 2)
    mixed = 0.25 * noise["noise"] + 0.75 * latents
    given = conditioned.decode(latents, noise_scale=0.25, **noise)
    assert mx.allclose(given, conditioned.decode(mixed, noise_scale=0), atol=1e-5)


def test_a_conditioned_decoder_needs_noise_of_the_latents_shape(conditioned):
    latents, noise = draw(conditioned, 2)
    for wrong in (None, noise["noise"][:, :1]):
        with pytest.raises(UserError, match=r"noise of shape \(1, 2, 2, 2, 24\)"):
            conditioned.decode(latents, noise=wrong)


@pytest.mark.parametrize("name", ["ltx-2-notc", "ltx-2.3"])
@pytest.mark.parametrize("timestep", [0.0, 0.05])
def test_an_unconditioned_decoder_refuses_a_timestep(models, name, timestep):
    latents, _ = draw(models[name], 1)
    with pytest.raises(UserError, match="remove timestep"):
        models[name].decode(latents, timestep=timestep)


@pytest.mark.parametrize("name", ["ltx-2", "ltx-2-notc"])
def test_config_and_tensors_must_agree_about_conditioning(checkpoint, name):
    with pytest.raises(ValueError, match="decoder.last_scale_shift_table"):
        load(checkpoint(name), timestep_conditioning=name != "ltx-2")


def test_a_decoder_is_conditioned_unless_its_config_says_no(checkpoint):
    section, _ = read(checkpoint("ltx-2-notc"), "vae")
    del section["timestep_conditioning"]
    assert VideoVAEConfig.from_dict(section).timestep_conditioning


# Images and latents


def test_bias_is_added_before_clipping(model):
    latents, noise = draw(model, 1)
    plain = model.decode(latents, **noise)
    lighter = model.decode(latents, bias=0.31, **noise)
    inside = mx.logical_and(plain > 0, plain < 0.69)
    assert inside.any() and lighter.max() == 1
    assert mx.where(inside, mx.abs(lighter - plain - 0.31), 0).max() < 1e-6


def test_denormalize_undoes_normalize(model):
    latents, _ = draw(model, 2)
    plain = model.denormalize(latents)
    assert mx.abs(plain - latents).max() > 0.1
    assert mx.allclose(model.normalize(plain), latents, atol=1e-6)


def test_patches_count_columns_before_rows():
    pixels = mx.arange(2 * 2 * 3).reshape(1, 1, 2, 2, 3)
    patch = patchify(pixels, 2)
    assert patch.flatten().tolist() == [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]
    assert mx.array_equal(unpatchify(patch, 2), pixels)


# Refusals


@pytest.mark.parametrize("height, width", [(1, 2), (2, 1)])
def test_a_border_of_one_latent_cannot_be_reflected(models, height, width):
    for name in ("ltx-2", "ltx-2-notc"):
        latents, noise = draw(models[name], 1, height, width)
        with pytest.raises(UserError, match="64x64"):
            models[name].decode(latents, **noise)
    latents, _ = draw(models["ltx-2.3"], 1, height, width)
    frame = models["ltx-2.3"].decode(latents)
    assert frame.shape == (1, 1, 32 * height, 32 * width, 3)


@pytest.mark.parametrize("height, width", [(48, 64), (64, 40)])
def test_sides_must_be_divisible_by_32(model, height, width):
    with pytest.raises(UserError, match=f"{width}x{height}"):
        model.encode(video(1, height=height, width=width))


@pytest.mark.parametrize(
    "change",
    [
        {"decoder_blocks": [["attn_res_x", {"num_layers": 1}]]},
        {"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]},
        {"encoder_blocks": [["compress_all", {"multiplier": 2}]]},
        {"spatial_padding_mode": "replicate"},
        {"causal_decoder": True},
        {"norm_layer": "group_norm"},
        {"latent_log_var": "per_channel"},
        {"_class_name": "CausalDiffusionVAE"},
    ],
)
def test_another_architecture_is_refused(checkpoint, change):
    with pytest.raises(UserError, match="implemented"):
        load(checkpoint("ltx-2.3"), **change)


@pytest.mark.parametrize("component", weights.COMPONENTS)
def test_only_moved_weights_are_copied(component):
    """A convolution would copy a view each time; other weights are read from the file
    into place, without work for a GPU that would wait for the disk."""
    shapes = {"a.weight": (4, 3), "ups.0.weight": (3, 4, 5), "b.weight": (4, 2, 5)}
    shapes |= {"c.weight": (4, 2, 3, 3), "d.weight": (4, 2, 3, 3, 3), "e.bias": (4,)}
    given = {key: mx.random.normal(shape) for key, shape in shapes.items()}
    for key, w in weights.COMPONENTS[component][1].sanitize(given).items():
        assert w is given[key] or memoryview(w).c_contiguous
        assert w is given[key] or w.shape != given[key].shape


def test_only_unused_statistics_are_dropped():
    names = [*VideoVAE.UNUSED, "per_channel_statistics.std-of-means", "decoder.new"]
    kept = VideoVAE.sanitize({name: mx.zeros(2) for name in names})
    assert [*kept] == ["per_channel_statistics.std-of-means", "decoder.new"]
