"""The released files by their headers: names, shapes and configurations, no weights."""

import csv
import gzip
import json
from pathlib import Path

from ltx2 import weights
from ltx2.hub import File

HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "data" / "configs.json").read_text())
MODELS = {  # configuration: version, tensors, and the files they are in
    "ltx-2-19b-distilled": ("2.0.0", 4091, ["ltx-2-19b"]),
    "ltx-2-19b-dev": ("2.0.0", 4049, ["ltx-2-19b"]),
    "ltx-2.3-22b": ("2.3.0", 5947, ["ltx-2.3-22b"]),
    "ltx-2.5-22b": (  # of its text encoder, only the projections' shapes are published
        "2.5.0",
        4349 + 4 + 1329 + 170 + 395 + 15,
        [
            f"ltx-2.5-{part}"
            for part in (
                "transformer text-projections audio-vae video-vae-conv "
                "video-vae-diffusion duration-head"
            ).split()
        ],
    ),
}
DIFFUSION = "ltx-2.5-video-vae-diffusion"  # has another configuration


def released(layout: str, config: str, version: str = "") -> File:
    """A released file by its header; the tensors are zeros that are never computed."""
    with gzip.open(HERE / "layouts" / f"{layout}.tsv.gz", "rt") as rows:
        table = list(csv.DictReader(rows, delimiter="\t"))
    config = "ltx-2.5-diffusion-vae" if layout == DIFFUSION else config
    if config == "ltx-2-19b-dev":
        table = [row for row in table if not row["note"]]
    tensors = {row["key"]: ("BF16", tuple(json.loads(row["shape"]))) for row in table}
    f = File(f"{layout}.safetensors", 0)
    sections = dict(CONFIGS[config])
    if "2.5" in layout and "video" not in layout:
        del sections["vae"]  # split files describe what they hold
    f._headers = tensors, {"config": json.dumps(sections)}
    if version:
        f.metadata["model_version"] = version
    return f


def opened(files: list[File]) -> weights.Checkpoint:
    return weights.official(files, {})


def model(config: str, *others: File) -> weights.Checkpoint:
    version, _, layouts = MODELS[config]
    return opened([*(released(f, config, version) for f in layouts), *others])
