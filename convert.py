"""Convert official LTX-2 weights to a model folder for MLX."""

if __name__ == "__main__":  # Ctrl-C during the imports shows no traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import re
from pathlib import Path

import mlx.core as mx

from ltx2.base import Parser, UserError, awake, note, run, user_path
from ltx2.options import add_all, name_and_file

EPILOG = """\
examples:
  python convert.py -q --q-bits 4
  python convert.py --hf-path Lightricks/LTX-2.3 --file ltx-2.3-22b-dev.safetensors
  python convert.py --hf-path mlx_model --dequantize --mlx-path mlx_model_bf16
"""


FLAGS = {
    "hf-path SOURCE": "Hub repository, folder or .safetensors file (default: %(default)s)",
    "file FILE": "checkpoint in the repository (default: the distilled 19B, or the only one)",
    "part NAME=FILE": "file to use for a component, like vae=FILE; repeatable",
    "upsampler FILE": "latent upsampler (default: those next to the checkpoint); repeatable",
    "mlx-path FOLDER": "folder to write (default: %(default)s)",
    "overwrite": "replace an existing folder",
    "quantize -q": "quantize the linear layers of the transformer's blocks",
    "q-bits -q-bits": "bits per weight (default: 4)",
    "q-group-size -q-group-size": "number of weights that share a scale (default: 64)",
    "q-mode -q-mode": "number format (default: affine)",
    "quant-predicate RECIPE": "bits of each layer: mixed_4_6, mixed_4_8, a JSON file, or "
    "auto, which measures each kind of layer first (default for 4 bits: by kind of layer "
    "and depth; with --q-group-size all layers are alike)",
    "lora FILE[:STRENGTH]": "LoRA to fuse into the transformer before quantizing; repeatable",
    "dequantize -d": "undo quantization: 16 bits per weight",
    "dtype": "dtype of the weights that are not quantized (default: unchanged)",
    "kind": "kind of the checkpoint (default: from its file name)",
    "text-encoder MODEL": "text encoder to use with the model (default: Gemma 3 12B)",
    "upload-repo OWNER/NAME": "Hub repository to upload the folder to; an existing folder "
    "is not converted again",
}


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    p = Parser(description=__doc__, epilog=EPILOG, formatter_class=raw)
    many = {"action": "append", "default": []}
    details = {
        "hf-path": {"default": "Lightricks/LTX-2"},
        "part": {"type": name_and_file, **many},
        "upsampler": many,
        "mlx-path": {"type": Path, "default": Path("mlx_model")},
        "q-bits": {"type": int, "choices": [2, 3, 4, 5, 6, 8]},
        "q-group-size": {"type": int, "choices": [32, 64, 128]},
        "q-mode": {"choices": ["affine", "mxfp4", "nvfp4", "mxfp8"]},
        "lora": {"type": lora, **many},
        "dtype": {"choices": ["float16", "bfloat16", "float32"]},
        "kind": {"choices": ["dev", "distilled"]},
    }
    add_all(p.add_argument, FLAGS, details)
    return p


def lora(text: str) -> tuple[str, float]:
    path, strength = re.fullmatch(r"(.+?)(?::(-?\d*\.?\d+))?", text).groups()
    return path, float(strength or 1)


def main() -> None:
    args = parser().parse_args()
    how = args.q_bits, args.q_group_size, args.q_mode, args.quant_predicate
    if any(how) and not args.quantize:
        raise UserError("--quant-predicate and all --q-... need --quantize")
    if args.upload_repo and not re.fullmatch(r"[^/\s]+/[^/\s]+", args.upload_repo):
        raise UserError(f"--upload-repo must be owner/name, got {args.upload_repo}")

    from ltx2 import hub

    awake()
    folder, repo = user_path(args.mlx_path).resolve(), args.upload_repo
    if repo:
        hub.create_repository(repo)  # fails now, not after hours of work
    if repo and not args.overwrite and hub.converted_config(hub.folder_files(folder)):
        text = "exists: it is uploaded as it is (--overwrite converts again)"
        note(f"{args.mlx_path} {text}")
    else:
        convert(args, folder)
    if repo:
        count = hub.upload(folder, repo)
        print(f"https://huggingface.co/{repo} has all {count} files, unchanged")


def convert(args: argparse.Namespace, folder: Path) -> None:
    """List what is read and written, check it, then write the model folder."""
    from tqdm import tqdm

    from ltx2 import conversion, hub, quantization, weights

    options, name = None, args.quant_predicate
    if args.quantize:
        options = quantization.choose(name, args.q_mode, args.q_bits, args.q_group_size)
    conversion.check_target(folder, args.overwrite)
    names = args.hf_path, args.kind, args.file, args.upsampler
    source = weights.open_model(*names, fetch=False, parts=dict(args.part))
    dtype = getattr(mx, args.dtype) if args.dtype else None
    expected = None
    if name == "auto":
        from ltx2 import checks, quality

        hub.fetch_all(source.files)
        options, expected = quality.auto(source, options, checks.SIZE)
    elif name or options == quantization.quantization() and not args.q_group_size:
        names = {"transformer", "gemma"} & {*source.components}
        found = {k: w for n in names for k, w in source.shapes(n, dtype).items()}
        options = quantization.recipe(name, options, found)
    how = (options, args.dequantize, dtype, args.text_encoder)
    job = conversion.Conversion(source, *how, loras=args.lora, expected=expected)

    kind = f"{source.kind}{' (assumed, see --kind)' if source.kind_assumed else ''}"
    print(f"LTX-2 {source.model_version}, {kind}")
    if (args.upload_repo or "/").split("/")[1] not in ("", job.hub_name):
        note(f"mlx-community would name this model {job.hub_name}")
    print(hub.listing(source.files))
    print(f"to {args.mlx_path}:")
    size = 0
    for name in source.components:
        for file, tensors in job.files(name).items():
            n = sum(w.nbytes for w in tensors.values())
            layers = sum(key.endswith(".scales") for key in tensors)
            quantized = f"  {layers} layers quantized" if layers else ""
            print(f"{hub.gigabytes(n):>12}  {file}{quantized}")
            size += n
    if job.mean_bits:
        print(f"{job.mean_bits:.2f} bits per weight in the transformer's blocks")
    to_fetch = sum(f.size for f in source.files if f.path is None)
    print(f"{hub.gigabytes(to_fetch)} to download, {hub.gigabytes(size)} to write")
    hub.check_space({hub.cache_folder(): to_fetch, folder: size})

    for f in source.files:
        f.fetch()
    with tqdm(total=size, unit="B", unit_scale=True) as bar:
        job.write(folder, args.overwrite, args.upload_repo, bar.update, peaks)
    print(f"wrote {args.mlx_path}. {job.summary()}")
    if not (folder / "LICENSE.md").exists():
        note("no LICENSE next to the weights: add it before you share them")


def peaks(folder: Path) -> str:
    """The memory of a Mac, without the text encoder; "" for a model with parts missing."""
    from ltx2 import memory, pipeline, request, weights

    model = weights.open_model(str(folder), fetch=False)
    options = {"width": 1536, "height": 1024, "num_frames": 121}
    try:
        job = pipeline.Pipeline(model).plan(request.Request("a", **options))
    except UserError:
        return ""
    needs = memory.Estimator(model, mx.bfloat16, gpu=True)(job, lambda path: 0)
    plans = (memory.MemoryPlan(needs, 0, low) for low in (False, True))
    held, low = (f"{plan.peak[0] / 1e9:.3g} GB" for plan in plans)
    return f"{held} for 1536x1024 with 121 frames, {low} with `--low-memory`"


if __name__ == "__main__":
    run(main)
