"""Prompts to the contexts of both streams."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from parity import cosine, read, relative_error

from ltx2 import pipeline, weights
from ltx2.base import UserError
from ltx2.text import MAX_TOKENS, TextConfig, TextEncoder

FOX = "A red fox runs over the snow, slow motion."


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return TextEncoder(checkpoint("gemma3"), mx.float32)


@pytest.fixture(scope="module")
def connectors(checkpoint, name):
    return load(checkpoint(name))


def load(path, dtype=mx.float32):
    return weights.open_model(str(path)).load("connectors", dtype)


def equal(states, others):
    return len(states) == len(others) and all(map(mx.array_equal, states, others))


# Gemma


def test_all_hidden_states_match_the_reference(encoder, golden):
    g = golden("gemma3/hidden")
    prompts = g["info"]["prompts"]
    for i, states in enumerate(encoder(prompts)):
        assert encoder.tokenize(prompts[i]) == g[f"in.ids{i}"].tolist()
        assert len(states) == 1 + 7  # embeddings, layers
        hidden = mx.stack(states, axis=-1)[0]
        for k in range(8):
            expected = mx.array(g[f"out.hidden{i}"][..., k])
            assert relative_error(hidden[..., k], expected) < 1e-5


@pytest.mark.parametrize(
    "prompt, tokens", [("", 1), (" \n", 1), ("a", 2), ("  a ", 2), (FOX, 19)]
)
def test_prompts_are_not_padded(encoder, prompt, tokens):
    [states] = encoder([prompt])
    assert {s.shape for s in states} == {(1, tokens, 48)}
    assert encoder.tokenize(prompt)[0] == encoder.bos


def test_prompts_are_independent(encoder):
    together = encoder([FOX, "", "blurry"])
    assert equal(together[0], encoder([FOX])[0])
    assert equal(together[2], encoder(["blurry"])[0])


def test_a_long_prompt_is_truncated_with_one_note(encoder, caplog):
    exact = "a " * (MAX_TOKENS - 1)
    ids = encoder.tokenize(exact)
    assert len(ids) == MAX_TOKENS and not caplog.records
    assert encoder.tokenize(exact + "b " * 6) == ids
    [record] = caplog.records
    assert "1030 tokens; the last 6 are ignored" in record.message


@pytest.mark.cpu
@pytest.mark.usefixtures("in_step")
def test_low_memory_gives_the_same_bits_in_less_memory(checkpoint):
    # In the file's own dtype: casts would hold both for a while.
    encoder = TextEncoder(checkpoint("gemma3"))
    size = sum(w.nbytes for _, w in tree_flatten(encoder.model.parameters()["layers"]))
    low_memory = TextEncoder(checkpoint("gemma3"), low_memory=True)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    short = low_memory(["a"])
    mx.eval(short)
    assert (
        mx.get_peak_memory() - before < 0.6 * size
    )  # two of seven, and the embeddings
    assert equal(short[0], encoder(["a"])[0])


def new_rope(full="linear"):
    """RoPE settings in the form of transformers 5."""
    return {
        "rope_parameters": {
            "full_attention": {
                "rope_type": full,
                "rope_theta": 1e6,
                **({"factor": 8.0} if full == "linear" else {}),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        # The older keys would be read instead.
        **dict.fromkeys(["rope_scaling", "rope_theta", "rope_local_base_freq"]),
    }


def test_transformers_5_rope_settings_are_read(checkpoint, encoder):
    other = TextEncoder(checkpoint("gemma3", text_config=new_rope()), mx.float32)
    assert equal(other([FOX])[0], encoder([FOX])[0])


@pytest.mark.parametrize("change", [{"rope_scaling": None}, new_rope("default")])
def test_long_range_layers_without_their_scaling_are_refused(checkpoint, change):
    with pytest.raises(
        UserError, match="layer 5 has RoPE scale 1.0, Gemma 3 has 0.125"
    ):
        TextEncoder(checkpoint("gemma3", text_config=change))


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of a text encoder, to be changed."""
    return shutil.copytree(checkpoint("gemma3"), tmp_path / "gemma")


def test_a_text_only_model_gives_the_same_states(copy, encoder):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config["text_config"]))
    file = str(copy / "model.safetensors")
    tensors = {
        key.removeprefix("language_model."): mx.contiguous(w)
        for key, w in mx.load(file).items()
        if key.startswith("language_model.")
    }
    mx.eval(tensors)
    mx.save_safetensors(file, tensors, {"format": "pt"})
    assert equal(TextEncoder(copy, mx.float32)([FOX])[0], encoder([FOX])[0])


@pytest.mark.parametrize(
    "start",
    ["", "model.", "text_model.", "model.language_model.", "_orig_mod.model."],
)
@pytest.mark.parametrize("text_only", [False, True])
def test_any_tools_names_give_the_same_states(
    copy, encoder, checkpoint, start, text_only
):
    """transformers writes model.language_model. since 4.52, and the tied LM head at
    times; the vision tower's layers are not taken for the text model's."""
    config = json.loads((copy / "config.json").read_text())
    if text_only:
        config = config["text_config"] | {"model_type": "gemma3_text"}
        (copy / "config.json").write_text(json.dumps(config))
    file, old = str(copy / "model.safetensors"), "language_model.model."
    tensors = {k.replace(old, start): w for k, w in mx.load(file).items()}
    tensors["lm_head.weight"] = tensors[f"{start}embed_tokens.weight"]
    tensors |= {f"model.{k}": w for k, w in tensors.items() if k.startswith("vision")}
    mx.eval(tensors)
    mx.save_safetensors(file, tensors, {"format": "pt"})
    weights.check_text_encoder(str(copy), weights.open_model(str(checkpoint("ltx-2"))))
    assert equal(TextEncoder(copy, mx.float32)([FOX])[0], encoder([FOX])[0])


def sentencepiece_model(tokenizer: dict) -> bytes:
    """The vocabulary of a tokenizer.json as SentencePiece's `tokenizer.model`."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    model, bpe = pb.ModelProto(), tokenizer["model"]
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    for i, name in enumerate(("pad", "eos", "bos", "unk")):
        setattr(model.trainer_spec, f"{name}_id", i)
        setattr(model.trainer_spec, f"{name}_piece", f"<{name}>")
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    rank = {"".join(pair): n for n, pair in enumerate(bpe["merges"])}
    kinds = pb.ModelProto.SentencePiece
    special = {"<pad>": kinds.CONTROL, "<eos>": kinds.CONTROL, "<bos>": kinds.CONTROL}
    special["<unk>"] = kinds.UNKNOWN
    special |= {f"<0x{i:02X}>": kinds.BYTE for i in range(256)}
    for piece in sorted(bpe["vocab"], key=bpe["vocab"].get):
        kind = special.get(piece, kinds.NORMAL)
        model.pieces.add(piece=piece, score=-rank.get(piece, 1e4), type=kind)
    return model.SerializeToString()


def test_a_folder_with_only_a_sentencepiece_tokenizer_gives_the_same_ids(copy, encoder):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(sentencepiece_model(tokenizer))
    other = TextEncoder(copy, mx.float32)
    assert other.bos == encoder.bos
    texts = [FOX, "", " a  b", "Über\n\nten: 10 %", "the " * 2000]
    for text in texts:
        assert other.tokenize(text) == encoder.tokenize(text)
    assert equal(other([FOX])[0], encoder([FOX])[0])


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"rope_scaling": {"rope_type": "none"}}),
        ("config.json", {"sliding_window_pattern": None}),
        ("config.json", {"query_pre_attn_scalar": "x"}),
        ("config.json", {"vocab_size": 7}),
        ("config.json", {"rope_scaling": None}),
        ("tokenizer.json", {}),
        ("tokenizer.json", ""),
    ],
)
def test_a_damaged_encoder_is_one_line(copy, checkpoint, file, change):
    if file == "config.json":
        config = json.loads((copy / file).read_text())
        config["text_config"] |= change
        change = config | {k: v for k, v in change.items() if k in config}
    (copy / file).write_text(json.dumps(change) if change != "" else "")
    pipe = pipeline.load(str(checkpoint("ltx-2")), str(copy), "distilled", "float32")
    with pytest.raises(UserError, match=f"^text encoder {copy}: .*") as error:
        pipe.encode_prompt(FOX)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(copy):
    """Else all prompts give the same video."""
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("<bos>", "<s>"))
    with pytest.raises(UserError, match="its tokenizer is not Gemma's: <bos> is None"):
        TextEncoder(copy)
    (copy / "tokenizer.json").unlink()
    other = sentencepiece_model(json.loads(text.replace('"<bos>"', '"<none>"')))
    (copy / "tokenizer.model").write_bytes(other)
    with pytest.raises(UserError, match="its tokenizer is not Gemma's"):
        TextEncoder(copy)


# Features and connectors


def hidden_states(g):
    """A list by layer from a golden's (1, tokens, D, layers)."""
    return [mx.array(x) for x in np.moveaxis(g.reshape(-1, *g.shape[-3:]), -1, 0)]


@pytest.mark.parametrize("case", ["random", "from_gemma"])
def test_contexts_match_the_reference(connectors, name, golden, case):
    g = golden(f"{name}/text_{case}")
    stored = g if case == "random" else golden("gemma3/hidden")
    states = hidden_states(stored["in.hidden0" if case == "random" else "out.hidden0"])
    traced = {}
    contexts = connectors(states, g["info"]["length"], traced.__setitem__)
    assert len(traced) == 4
    for stream, context in zip(("video", "audio"), contexts):
        features = traced[f"text.{stream}_features"]
        # In 2.0 both streams have the same features.
        expected = g.get(f"mid.{stream}_features0", g["mid.video_features0"])
        assert relative_error(features, mx.array(expected)) < 1e-5
        assert relative_error(context, mx.array(g[f"out.{stream}0"])) < 1e-5
        assert mx.array_equal(traced[f"text.{stream}_context"], context)


def test_contexts_of_a_prompt_match_the_reference(connectors, encoder, name, golden):
    g = golden(f"{name}/text_from_gemma")
    [states] = encoder([g["info"]["prompts"][0]])
    contexts = connectors(states, g["info"]["length"])
    for stream, context in zip(("video", "audio"), contexts):
        assert relative_error(context, mx.array(g[f"out.{stream}0"])) < 1e-5


@pytest.mark.parametrize("prompt", ["", "a", "a " * 1023, "a " * 1024])
def test_every_length_gives_finite_contexts(connectors, encoder, prompt):
    [states] = encoder([prompt])
    video, audio = connectors(states)
    assert video.shape == (1, 1024, connectors.video_embeddings_connector.dim)
    assert audio.shape == (1, 1024, connectors.audio_embeddings_connector.dim)
    for context in (video, audio):
        assert mx.isfinite(context).all()
        assert mx.allclose(mx.mean(context**2, -1), mx.array(1.0), atol=1e-3)  # normed


def test_different_prompts_give_different_contexts(connectors, encoder):
    fox, blurry = (connectors(s, 64) for s in encoder([FOX, "blurry, low contrast"]))
    for a, b in zip(fox, blurry):
        assert cosine(a[:, :5], b[:, :5]) < 0.9


@pytest.mark.parametrize(
    "key, value",
    [
        ("text_encoder_norm_type", "per_layer"),
        ("connector_norm_output", False),
        ("use_embeddings_connector", False),
    ],
)
def test_what_is_not_implemented_is_refused(checkpoint, key, value):
    section, _ = read(checkpoint("ltx-2.3"), "transformer")
    with pytest.raises(UserError, match=f"{key} is {value!r}.* implemented"):
        TextConfig.from_dict(section | {key: value})


# Low precision


def test_bfloat16_stays_close_to_float32(checkpoint, connectors, name, encoder):
    rounded = load(checkpoint(name), mx.bfloat16)
    [states] = TextEncoder(checkpoint("gemma3"), mx.bfloat16)([FOX])
    assert {s.dtype for s in states} == {mx.bfloat16}
    for a, b in zip(rounded(states, 64), connectors(encoder([FOX])[0], 64)):
        assert a.dtype == mx.bfloat16
        assert cosine(a, b) > 0.9999


@pytest.mark.parametrize(
    "bits, least, key",
    [(8, 0.995, "quantization"), (4, 0.9, "quantization_config")],  # mlx-lm writes both
)
def test_a_quantized_encoder_stays_close(checkpoint, tmp_path, bits, least, key):
    source = checkpoint("gemma3", text_config={"hidden_size": 64, "head_dim": 32})
    folder = shutil.copytree(source, tmp_path / "gemma")
    config = json.loads((folder / "config.json").read_text())
    how = {"group_size": 32, "bits": bits}
    first, other = "language_model.model.layers.0.mlp.down_proj", how | {"bits": 6}
    config[key] = how | {first: other, "vision_tower.x": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for key, w in mx.load(str(source / "model.safetensors")).items():
        if w.ndim == 2 and key.startswith("language_model."):
            path = key.removesuffix("weight")
            parts = mx.quantize(w, **(other if path == f"{first}." else how))
            keys = (path + name for name in ("weight", "scales", "biases"))
            tensors.update(zip(keys, parts))
        else:
            tensors[key] = w
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    [exact], [rounded] = (TextEncoder(f)([FOX]) for f in (source, folder))
    for a, b in zip(rounded, exact):
        assert cosine(a, b) > least
