"""A run at the released 19B's size: each phase's peak memory compared with the plan.

    python benchmarks/full_width.py
    python benchmarks/full_width.py --model ltx-2.3-22b --bits 8 --two --lora 32 --depth 12

Writes a quantized model folder and a text encoder whose tensors have their released
shapes. The files are sparse: they take little disk space and read as zeros, except small
tensors (statistics, norms, tables) and the audio decoder, which are filled so that results
pass the checks. Generates a short video, whose first frame is given, with streamed blocks.
Exit code 1 if a phase's peak differs from its plan by more than 10 %: small models hide
what only wide layers need.
"""

import argparse
import json
import resource
import sys
import tempfile
import zlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from convert_memory import ROOT, TESTS, synthesize
from mlx.utils import tree_flatten

sys.path[:0] = [str(ROOT), str(TESTS)]

import checkpoints  # noqa: E402

from ltx2 import conversion, hub, media, pipeline, weights  # noqa: E402
from ltx2.base import table  # noqa: E402
from ltx2.layers import no_random_weights  # noqa: E402
from ltx2.quantization import layers, recipe  # noqa: E402
from ltx2.request import Image, LoraFile, Request  # noqa: E402

SMALL = 1 << 20  # elements: larger tensors stay zeros
# Of the VAE, so that frames differ: zeros pass 2.3's upsamplers, which have no residual.
FILLED = {
    "ltx-2-19b-distilled": ("decoder.conv_in", "decoder.conv_out"),
    "ltx-2.3-22b": ("decoder.",),
}
GEMMA_12B = {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 262208,
}


def write_sparse(path: Path, tensors: dict[str, mx.array], filled=()) -> None:
    """A file with tensors of these shapes and dtypes, which are not evaluated: random
    where they are small floats or their names begin with one of `filled`, else zeros.
    """
    names = {dtype: name for name, dtype in hub.DTYPES.items() if name != "F8_E4M3"}
    header, end = {"__metadata__": {"format": "mlx"}}, 0
    for key, w in tensors.items():
        offsets = [end, end := end + w.nbytes]
        header[key] = dict(dtype=names[w.dtype], shape=w.shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
        for key, w in tensors.items():
            quantized = f"{key.rpartition('.')[0]}.scales" in tensors
            picked = key.startswith(filled) if filled else False
            if not mx.issubdtype(w.dtype, mx.floating) or quantized and w.ndim > 1:
                continue
            if w.size < SMALL or picked:
                seed = [0, zlib.crc32(key.encode())]
                values = checkpoints.random_weight(key, w.shape, seed, 1.0)
                values = mx.array(values.astype(np.float32)).astype(w.dtype)
                raw = values.view(mx.uint16) if w.dtype == mx.bfloat16 else values
                f.seek(8 + len(text) + header[key]["data_offsets"][0])
                f.write(memoryview(raw))


def write_model(folder: Path, encoder: Path, args: argparse.Namespace) -> Path:
    """The model as convert.py writes it, with its upsampler and a LoRA if wanted."""
    source = folder / f"{args.model.removesuffix('-distilled')}-distilled.safetensors"
    synthesize(source, args.depth, args.model)
    generation = "-".join(args.model.split("-")[:2])
    upsampler = folder / f"{generation}-spatial-upscaler-x2-1.0.safetensors"
    if args.two:
        synthesize(upsampler, 0, upsampler.stem)
    upsamplers = [str(upsampler)] * args.two
    model = weights.open_model(str(source), upsamplers=upsamplers)
    for file in model.files:
        file.sha256 = "0" * 64  # not computed: the file is empty
    how = conversion.quantization(bits=args.bits)
    if args.bits == 4:  # as convert.py: some layers have other bits
        how = recipe(None, how, model.shapes("transformer"))
    job = conversion.Conversion(model, how, text_encoder=str(encoder))
    target = folder / "mlx_model"
    target.mkdir()
    for name in model.components:
        vae = FILLED[args.model]
        filled = {"vae": vae, "audio_vae": ("",), "vocoder": ("",)}.get(name, ())
        for file, tensors in job.files(name).items():
            write_sparse(target / file, tensors, filled)
    (target / "config.json").write_text(json.dumps(job.config()))
    if args.lora:
        write_lora(folder / "lora.safetensors", model, args.lora)
    source.unlink()
    return target


def write_lora(path: Path, model: weights.Checkpoint, rank: int) -> None:
    """Factors of every layer of the blocks that can be quantized."""
    factors = {}
    for layer, w in layers(model.shapes("transformer"), 64).items():
        a, b = (rank, w.shape[1]), (w.shape[0], rank)
        for part, shape in (("A", a), ("B", b)):
            key = f"diffusion_model.{layer}.lora_{part}.weight"
            factors[key] = mx.zeros(shape, mx.bfloat16)
    write_sparse(path, factors)


def encoder_config(config: dict) -> dict:
    """Gemma 3 12B's, in 4 bits, from the tests' small one."""
    quantized = {"group_size": 64, "bits": 4}
    text = config["text_config"] | GEMMA_12B
    return config | {"text_config": text, "quantization": quantized}


def encoder_tensors(config: dict) -> dict[str, mx.array]:
    """Its tensors, not evaluated."""
    from mlx_lm.models.gemma3_text import Gemma3Model, ModelArgs

    with no_random_weights():
        model = Gemma3Model(ModelArgs.from_dict(config["text_config"]))
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, **config["quantization"])
    tensors = dict(tree_flatten(model.parameters()))
    return {f"language_model.model.{k}": w for k, w in tensors.items()}


def write_encoder(folder: Path) -> Path:
    """Gemma 3 12B in 4 bits, with the tests' tokenizer."""
    path = checkpoints.build("gemma3", folder)
    config = encoder_config(json.loads((path / "config.json").read_text()))
    write_sparse(path / "model.safetensors", encoder_tensors(config))
    (path / "config.json").write_text(json.dumps(config))
    return path


def request(folder: Path, args: argparse.Namespace) -> Request:
    """A short video with an image."""
    width, height, frames = map(int, args.size.split("x"))
    options = {"width": width, "height": height, "num_frames": frames}
    options["sigmas"] = tuple(np.linspace(1, 0, args.steps + 1).tolist())
    image = str(folder / "image.png")
    media.save_png(image, np.zeros((height, width, 3), np.uint8))
    if args.lora:
        options["loras"] = (LoraFile(str(folder / "lora.safetensors")),)
    return Request(
        "a dog", **options, images=(Image(image),), stages="two" if args.two else "one"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=FILLED, default=next(iter(FILLED)))
    add("--bits", type=int, default=4)
    add("--depth", type=int, default=48, help="blocks")
    add("--size", default="256x256x9", help="WIDTHxHEIGHTxFRAMES")
    add("--dtype", default="float32")
    add("--steps", type=int, default=1, help="of the first stage")
    add("--two", action="store_true", help="two stages, with an upsampler")
    add("--lora", type=int, default=0, metavar="RANK", help="with a LoRA of this rank")
    add("--held", action="store_true", help="blocks are held, not streamed")
    add("--folder", help="for the model (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        encoder = write_encoder(folder)
        model = str(write_model(folder, encoder, args))
        pipe = pipeline.load(model, dtype=args.dtype, low_memory=not args.held)
        wanted = request(folder, args)
        plan = pipe.memory(pipe.plan(wanted))
        for result in pipe.stream(wanted):
            if result.step == 0:
                print(f"{result.phase} ...", flush=True)
    rows, worst = [], 0.0
    for phase, (seconds, peak) in result.phases.items():
        need = plan.phases[phase].total(plan.streamed)
        worst = max(worst, abs(need / peak - 1))
        row = need / 1e9, peak / 1e9, need / peak
        rows.append((phase, round(seconds), *(round(x, 2) for x in row)))
    print(table(("phase", "seconds", "planned GB", "peak GB", "ratio"), rows))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident *= 1 if sys.platform == "darwin" else 1024
    print(f"the process held {resident / 1e9:.2f} GB")
    return int(worst > 0.1)


if __name__ == "__main__":
    sys.exit(main())
