"""Files of a training: the adapter, the state to resume, the losses, a model card."""

import csv
import json
import math
import shutil
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any, Mapping, Optional, Sequence

import mlx.core as mx
from PIL import Image, ImageDraw

from . import hub
from .base import UserError, note, parse_json
from .conversion import SAMPLE, card_head
from .gradients import Layers, Parameters, factor_parameters
from .lora import Lora, adapter_file

ADAPTERS, STATE = "adapters.safetensors", "state.safetensors"
CONFIG, LOSSES, CHART = "adapter_config.json", "loss.csv", "loss.png"
COLORS = {"loss": (160, 190, 220), "mean": (20, 80, 160), "held out": (210, 80, 40)}


def official(parameters: Parameters, dtype: mx.Dtype) -> Parameters:
    """Factors under the key names of official LoRAs."""
    name = lambda key: key.replace("lora_a", "lora_A").replace("lora_b", "lora_B")
    items = parameters.items()
    return {f"diffusion_model.{name(k)}.weight": w.astype(dtype) for k, w in items}


def check_folder(folder: Path, resumed: Optional[str]) -> None:
    """UserError if a training would replace files of another one than the resumed one."""
    own = resumed and adapter_file(resumed).resolve()
    names = (ADAPTERS, STATE, CONFIG, LOSSES, CHART)
    there = [name for name in names if (folder / name).exists()]
    if there and own not in [(folder / name).resolve() for name in (ADAPTERS, STATE)]:
        text = f"{folder} has an earlier {there[0]}: use another --adapter-path"
        raise UserError(f"{text}, or continue with --resume-adapter-file {folder}")


def read_state(name: str, base: str, layers: Layers, rank: int) -> tuple[list, dict]:
    """Steps with losses, factors and moments of an earlier training, or a LoRA's factors
    alone; only headers are read. UserError if they are not of this base and layers."""
    file, history = adapter_file(name), []
    state = file.with_name(STATE)
    if file.name in (ADAPTERS, STATE) and state.is_file():
        arrays, metadata = hub.read_arrays(state)
        kind = list[tuple[int, Optional[float], Optional[float]]]
        rows = parse_json(metadata.get("history", ""), f"{state}: history", kind)
        history = [[n, math.nan if x is None else x, y] for n, x, y in rows]
        parts = "pmv"
    else:
        note(f"{name} has no {STATE}: training begins at step 0")
        lora = Lora.read(file)
        lora.check_finite()
        arrays = {f"p.{k}": w for k, w in factor_parameters(lora).items()}
        metadata, parts = lora.metadata, "p"
    if (model := metadata.get("base_model", base)) != base:
        raise UserError(f"{name} was trained on {model}, this model is {base}")
    found = {k: w.shape for k, w in arrays.items()}
    expected = {"step": ()} if history else {}
    for path, (outputs, inputs) in layers.items():
        for k, shape in (("lora_a", (rank, inputs)), ("lora_b", (outputs, rank))):
            expected |= {f"{part}.{path}.{k}": shape for part in parts}
    if wrong := expected.items() ^ found.items():
        k, _ = min(wrong)
        there, fits = found.get(k, "missing"), expected.get(k, "expected")
        how = f"{k} is {there}, not {fits}; pass the flags that it was made with"
        raise UserError(f"{name} does not fit: {how}")
    return history, arrays


def save_losses(folder: Path, history: Sequence[Sequence]) -> None:
    """loss.csv of rows (step, loss, held-out loss or None), and its picture loss.png."""
    with open(folder / LOSSES, "w", newline="") as f:
        csv.writer(f).writerows([("step", "loss", "held_out"), *history])
    drawn = lambda x: x is not None and math.isfinite(x)
    loss = [(n, x) for n, x, _ in history if drawn(x)]
    held_out = [(n, x) for n, _, x in history if drawn(x)]
    half, mean = len(loss) // 40 + 1, []
    for i, (n, _) in enumerate(loss):
        mean.append((n, fmean(x for _, x in loss[max(i - half, 0) : i + half + 1])))
    lines = {"loss": loss, "mean": mean, "held out": held_out}
    draw_chart(folder / CHART, {k: line for k, line in lines.items() if line})


def draw_chart(path: Path, lines: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """A picture of lines (step, value) with their names and ranges."""
    width, height, edge = 960, 540, 50
    points = [point for line in lines.values() for point in line]
    last = max((n for n, _ in points), default=1)
    values = sorted(x for _, x in points) or [0.0]
    low, high = values[0], values[int(0.99 * (len(values) - 1))]  # without outliers
    right = lambda n: edge + n / last * (width - 2 * edge)
    part = lambda x: (min(x, high) - low) / (high - low or 1)
    down = lambda x: height - edge - part(x) * (height - 2 * edge)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for n in range(5):
        x, step = low + (high - low) * n / 4, last * n // 4
        draw.line([(edge, down(x)), (width - edge, down(x))], "lightgray")
        draw.text((4, down(x) - 6), f"{x:.3g}", "black")
        draw.text((right(step), height - edge + 8), str(step), "black")
    for n, (name, line) in enumerate(lines.items()):
        places = [(right(step), down(x)) for step, x in line]
        draw.line(places, COLORS[name], 1 if name == "loss" else 3)
        draw.text((edge + 90 * n, 20), name, COLORS[name])
    image.save(path)


def upload(folder: Path, repo: str, license: tuple[str, str, str]) -> None:
    """Put the adapter into a Hub repository, with a card and the base's `license`."""
    config = json.loads((folder / CONFIG).read_bytes())
    hub.create_repository(repo)
    with tempfile.TemporaryDirectory() as copy:
        for name in (ADAPTERS, CONFIG, CHART):
            shutil.copyfile(folder / name, Path(copy, name))
        card = model_card(config, repo, license)
        (Path(copy) / "README.md").write_text(card, "utf-8", "replace")
        hub.upload(Path(copy), repo, "Add the LoRA")


def model_card(config: dict[str, Any], repo: str, license: tuple[str, str, str]) -> str:
    options, name = config["options"], repo.split("/")[-1]
    trigger = options["trigger"] and f"Trigger word: `{options['trigger']}`\n\n"
    return f"""{card_head(name, license, "adapter", "mlx, lora, ltx-2")}
A LoRA of rank {options["rank"]} for {config["base_model"]}, trained on {config["clips"]}
clips in {config["steps"]} steps.

{trigger}```bash
python generate.py --prompt "..." --lora {repo}
```

{SAMPLE}"""
