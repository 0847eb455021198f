"""How often clips of the demo model show what their prompts say, by demo/judge.py.

    python benchmarks/prompt_adherence.py --clips 48
    python benchmarks/prompt_adherence.py --clips 378 --variants float32

Scenes go through all combinations of shape, color, motion and pitch, in wordings and with
seeds that training did not use. Each row is a way to run the model: its 8 steps or guided
steps, weights of several precisions, video only, or image-to-video.
"""

import argparse
import itertools
import json
import sys
import tempfile
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from demo import data  # noqa: E402
from demo.judge import judge, read_mp4  # noqa: E402
from ltx2 import conversion, media, pipeline, weights  # noqa: E402
from ltx2.quantization import recipe  # noqa: E402
from ltx2.request import Image, Request  # noqa: E402

DEMO = ROOT / "demo" / "model"
VIDEO = ("color", "shape", "motion", "background")
AUDIO = ("pitch",)
GUIDED = dict(
    steps=12,
    negative_prompt="",
    video_guidance=dict(cfg_scale=2.5, stg_scale=0, modality_scale=1),
    audio_guidance=dict(cfg_scale=2.5, stg_scale=0, modality_scale=1),
)
VARIANTS = {
    "float32": {},
    "bfloat16": dict(dtype="bfloat16"),
    "8 bits": dict(bits=8),
    "4 bits": dict(bits=4),
    "guided": dict(kind="dev", options=GUIDED),
    "unguided, dev": dict(
        kind="dev",
        options=GUIDED
        | dict(negative_prompt=None)
        | {k: v | dict(cfg_scale=1) for k, v in GUIDED.items() if "guidance" in k},
    ),
    "video only": dict(options=dict(no_audio=True)),
    "image-to-video": dict(image=True),
}


def scenes(count: int, seed: int) -> list[tuple[data.Scene, str]]:
    """Scenes and captions; all combinations in random order, repeated or cut to `count`."""
    rng = np.random.default_rng(seed)
    names = dict(shape=data.SHAPES, color=tuple(data.COLORS), motion=data.MOTIONS)
    names["pitch"] = tuple(data.PITCHES)
    combinations = list(itertools.product(*names.values()))
    order = [combinations[i] for i in rng.permutation(len(combinations))]
    chosen = itertools.islice(itertools.cycle(order), count)
    drawn = [data.sample_scene(rng, **dict(zip(names, c))) for c in chosen]
    return [(scene, data.caption(scene, rng, unseen=True)) for scene in drawn]


def make(
    model, prompts, folder, kind=None, dtype="float32", bits=0, options=(), image=0
):
    """Write an mp4 in `folder` for each (scene, caption); paths and results."""
    if bits:
        source, converted = weights.open_model(str(model)), folder / "converted"
        how = conversion.quantization(bits=bits)
        if bits == 4:  # by layer, as convert.py does it
            how = recipe(None, how, source.shapes("transformer"))
        conversion.Conversion(source, how).write(converted)
        model = converted
    requests = []
    for n, (scene, caption) in enumerate(prompts):
        request = dict(options)
        if image:
            path = folder / f"{n}.png"
            media.save_png(path, data.render(scene, [0])[0])
            request.update(images=(Image(str(path)),), image_crf=0)
        requests.append(Request(caption, seed=1000 + n, **request))
    pipe, made, frames = pipeline.load(str(model), None, kind, dtype), [], []
    for event in pipe.stream(*requests):
        if isinstance(event, pipeline.Result):
            event.frames, frames = np.concatenate(frames), []
            path = folder / f"{len(made)}.mp4"
            event.save(path)
            made.append((path, event))
        elif event.frames is not None:
            frames.append(event.frames)
    return made


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images."""
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


def adherence(model, prompts, folder, **variant) -> dict[str, float]:
    """Share of clips with the right color, shape and so on; mean distance of sound and
    shape in frame widths; with an image the PSNR of the first frame."""
    right, pan, first_frame = {}, [], []
    made = make(model, prompts, folder, **variant)
    for (scene, _), (path, result) in zip(prompts, made, strict=True):
        has_audio = result.waveform is not None
        silent = result.frames, np.zeros((24000, 2)), 24000
        clip = read_mp4(path) if has_audio else silent
        found = judge(*clip)
        for name in VIDEO + AUDIO * has_audio:
            right.setdefault(name, []).append(found[name] == getattr(scene, name))
        if has_audio and found["pan_error"] is not None:
            pan.append(found["pan_error"])
        if variant.get("image"):
            first_frame.append(decibels(result.frames[0], data.render(scene, [0])[0]))
    shares = {name: float(np.mean(found)) for name, found in right.items()}
    if pan:
        shares["pan error"] = float(np.mean(pan))
    if first_frame:
        shares["first frame dB"] = float(np.mean(first_frame))
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=DEMO)
    add("--clips", type=int, default=48)
    add("--seed", type=int, default=1)
    add("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    add("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    prompts, found = scenes(args.clips, args.seed), {}
    for name in args.variants:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            found[name] = adherence(args.model, prompts, folder, **VARIANTS[name])
        figures = (f"{k} {v:.3g}" for k, v in found[name].items())
        print(f"{name:<16}", *figures, sep="  ", flush=True)
    if args.json:
        made = {"clips": args.clips, "seed": args.seed, "mlx": mx.__version__}
        args.json.write_text(json.dumps(made | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
