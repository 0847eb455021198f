"""Peak memory of converting a file of the released 19B's size, filled with zeros.

    python benchmarks/convert_memory.py --depth 48 --q-bits 4

Every tensor of `ltx-2-19b` has its released shape; the file is sparse, so it takes no
disk space and reads as zeros. `--depth` sets the number of transformer blocks: time and
the size of the result depend on it, memory does not. Exit code 1 if the conversion took
more memory than 3 GB plus the largest tensor.
"""

import argparse
import csv
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"


def synthesize(path: Path, depth: int, name: str = "ltx-2-19b-distilled") -> int:
    """Write the sparse file and return the bytes of its largest tensor. `name` is that of
    a configuration in tests/data/configs.json, an upsampler's too."""
    layout = name.removesuffix("-distilled")
    with gzip.open(TESTS / "layouts" / f"{layout}.tsv.gz", "rt") as rows:
        table = list(csv.DictReader(rows, delimiter="\t"))
    config = json.loads((TESTS / "data" / "configs.json").read_text())[name]
    metadata = {}
    if "transformer" in config:
        config["transformer"]["num_layers"] = depth
        metadata["model_version"] = "2.3.0" if "2.3" in name else "2.0.0"
    header = {"__metadata__": metadata | {"config": json.dumps(config)}}
    end = 0
    for row in table:
        block = row["key"].removeprefix("model.diffusion_model.transformer_blocks.")
        if block != row["key"] and int(block.split(".")[0]) >= depth:
            continue
        start, end = end, end + 2 * int(row["numel"])
        header[row["key"]] = {
            "dtype": "BF16",
            "shape": json.loads(row["shape"]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    return max(2 * int(row["numel"]) for row in table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=6, help="blocks (released: 48)")
    parser.add_argument("--q-bits", type=int, help="default: not quantized")
    parser.add_argument("--dtype", help="as for convert.py")
    parser.add_argument("--folder", help="for the result (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "ltx-2-19b-distilled.safetensors"
        largest = synthesize(source, args.depth)
        command = [sys.executable, str(ROOT / "convert.py"), "--hf-path", str(source)]
        command += ["--mlx-path", f"{folder}/mlx_model"]
        if args.q_bits:
            command += ["--quantize", "--q-bits", str(args.q_bits)]
        if args.dtype:
            command += ["--dtype", args.dtype]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        read = source.stat().st_size
        written = sum(p.stat().st_size for p in Path(folder, "mlx_model").iterdir())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    bound = 3 * 10**9 + largest
    print(
        f"{read / 1e9:.1f} GB to {written / 1e9:.1f} GB in {seconds:.0f} s: "
        f"peak {peak / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, "
        f"bound {bound / 1e9:.2f} GB"
    )
    return int(peak > bound)


if __name__ == "__main__":
    sys.exit(main())
