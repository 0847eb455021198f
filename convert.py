"""Convert official LTX-2 weights to a model folder for MLX: parse, call, report."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ltx2.base import Parser, UserError, run

EPILOG = """\
examples:
  python convert.py --quantize -q-bits 4
  python convert.py --hf-path Lightricks/LTX-2.3 --file ltx-2.3-22b-dev.safetensors
  python convert.py --hf-path mlx_model --dequantize --mlx-path mlx_model_bf16
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--hf-path",
        default="Lightricks/LTX-2",
        help="Hub repository, folder or .safetensors file (default: %(default)s)",
    )
    p.add_argument(
        "--file",
        help="which checkpoint of the repository or folder "
        "(default: the distilled 19B, or the only one)",
    )
    p.add_argument(
        "--upsampler",
        action="append",
        default=[],
        metavar="FILE",
        help="latent upsampler, file or owner/name/file, repeatable "
        "(default: those beside the checkpoint)",
    )
    p.add_argument(
        "--mlx-path",
        type=Path,
        default=Path("mlx_model"),
        help="folder to write (default: %(default)s)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace that folder")
    p.add_argument(
        "-q",
        "--quantize",
        action="store_true",
        help="quantize the linear layers of the transformer's blocks",
    )
    p.add_argument(
        "--q-bits", "-q-bits", type=int, choices=[2, 3, 4, 5, 6, 8], help="default: 4"
    )
    p.add_argument(
        "--q-group-size",
        "-q-group-size",
        type=int,
        choices=[32, 64, 128],
        help="default: 64",
    )
    p.add_argument("--q-mode", "-q-mode", choices=["affine", "mxfp4", "nvfp4", "mxfp8"])
    p.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="add to the transformer's weights before quantizing, repeatable",
    )
    p.add_argument("-d", "--dequantize", action="store_true", help="undo --quantize")
    p.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of transformer and text side, if not quantized (default: as released)",
    )
    p.add_argument(
        "--kind",
        choices=["dev", "distilled"],
        help="of the checkpoint (default: by its name)",
    )
    p.add_argument("--text-encoder", help="to be used with it (default: Gemma 3 12B)")
    p.add_argument("--upload-repo", help="Hub repository to upload the folder to")
    return p


def lora(text: str) -> tuple[str, float]:
    path, strength = re.fullmatch(r"(.+?)(?::(-?\d*\.?\d+))?", text).groups()
    return path, float(strength or 1)


def main() -> None:
    args = parser().parse_args()
    given = [args.q_bits, args.q_group_size, args.q_mode]
    if any(given) and not args.quantize:
        raise UserError("--q-bits, --q-group-size and --q-mode need --quantize")
    if args.upload_repo and args.upload_repo.count("/") != 1:
        raise UserError(
            f"--upload-repo {args.upload_repo} is not of the form owner/name"
        )

    import mlx.core as mx
    from tqdm import tqdm

    from ltx2 import conversion, hub, weights

    how = None
    if args.quantize:
        mode = args.q_mode or "affine"
        how = conversion.quantization(mode, args.q_bits, args.q_group_size)
    folder = args.mlx_path.expanduser().absolute()
    conversion.check_target(folder, args.overwrite)
    source = weights.open_model(
        args.hf_path, args.kind, args.file, args.upsampler, fetch=False
    )
    job = conversion.Conversion(
        source,
        how,
        args.dequantize,
        getattr(mx, args.dtype) if args.dtype else None,
        args.text_encoder,
        loras=args.lora,
    )

    kind = f"{source.kind}{' (assumed, see --kind)' if source.kind_assumed else ''}"
    print(f"LTX-2 {source.model_version}, {kind}")
    print(hub.listing(source.files))
    print(f"becomes {args.mlx_path}")
    size = 0
    for name in source.components:
        for file, tensors in job.files(name).items():
            n = sum(w.nbytes for w in tensors.values())
            layers = sum(key.endswith(".scales") for key in tensors)
            quantized = f"  {layers} layers quantized" if layers else ""
            print(f"{hub.gigabytes(n):>12}  {file}{quantized}")
            size += n
    to_fetch = sum(f.size for f in source.files if f.path is None)
    print(f"{hub.gigabytes(to_fetch)} to fetch, {hub.gigabytes(size)} to write")
    hub.check_space({hub.cache_folder(): to_fetch, folder: size})

    for f in source.files:
        f.fetch()
    with tqdm(total=size, unit="B", unit_scale=True) as bar:
        job.write(folder, args.overwrite, args.upload_repo, bar.update)
    print(f"wrote {args.mlx_path}")
    if not (folder / "LICENSE.md").exists():
        print(
            "There was no LICENSE beside the weights: add theirs before sharing them."
        )
    if args.upload_repo:
        hub.upload(folder, args.upload_repo)
        print(f"uploaded to https://huggingface.co/{args.upload_repo}")


if __name__ == "__main__":
    run(main)
