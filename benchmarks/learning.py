"""What the demo model learns from forty clips of something it never did, by demo/judge.py.

    python benchmarks/learning.py diagonal --work DIR

Makes the clips, trains on them with train.py's defaults, and measures how often clips of
unseen wordings show it: the training clips after the autoencoders alone, the base, the
trained model, and both models on the combinations that the base knows.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mode

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import prompt_adherence  # noqa: E402

from demo import data  # noqa: E402
from demo.judge import masks, name_color, name_pitch, read_mp4, track  # noqa: E402
from ltx2 import formats, pipeline  # noqa: E402
from ltx2.request import LoraFile  # noqa: E402

DEMO = prompt_adherence.DEMO
# What is new: the attribute, its words in captions, and what the clip is made of
NEW = {
    "diagonal": ("motion", ()),
    "red to blue": ("color", ("red to blue", "first red, then blue")),
    "low then high": ("pitch", ("low then high", "first low, then high")),
    "mauve": ("color", ("mauve",)),
}
DIAGONAL = (
    "{go} diagonally|{go} along the diagonal|{go} diagonally to the bottom right"
    "|{go} from the top left to the bottom right|{go} in a diagonal line"
)
OLD_COLOR = "purple"  # that the new word means


def clip(name: str, rng, unseen: bool) -> tuple[np.ndarray, np.ndarray, str]:
    """Frames, waveform and caption of a scene with what is new."""
    scene = data.sample_scene(rng)
    attribute, words = NEW[name]
    made = {"red to blue": "red", "low then high": "low", "mauve": OLD_COLOR}
    one = {attribute: made.get(name, "right")}
    if attribute == "color":
        one["rgb"] = data.COLORS[one["color"]]
    first = second = dataclasses.replace(scene, **one)
    if name == "red to blue":
        second = dataclasses.replace(first, color="blue", rgb=data.COLORS["blue"])
    if name == "low then high":
        second = dataclasses.replace(first, pitch="high")
    half = data.FRAMES // 2
    frames = [data.render(first, range(half)), data.render(second, range(half, 25))]
    frames = np.concatenate(frames)
    sound = data.sound(first, 24000)
    sound[len(sound) // 2 :] = data.sound(second, 24000)[len(sound) // 2 :]
    if name == "diagonal":  # one coordinate of the path for both
        path, data.trajectory = data.trajectory, diagonal
        frames = data.render(first)
        data.trajectory = path
    data.WORDS[name], data.PHRASES["diagonal"] = words, DIAGONAL
    described = dataclasses.replace(scene, **{attribute: name, "rgb": first.rgb})
    return frames, sound, data.caption(described, rng, unseen)


def diagonal(scene, t):
    way = 0.5 + scene.travel * (t / data.DURATION - 0.5)
    return way, way, np.full_like(t, scene.radius)


def shows(name: str, frames, waveform, rate) -> bool:
    """Whether a clip has what is new."""
    _, cover = masks(frames)
    if name == "diagonal":
        path = track(cover)
        dx, dy = (path[-3:].mean(0) - path[:3].mean(0))[:2]
        return dx > 0.2 and dy > 0.2
    if name == "mauve":
        return name_color(frames, cover) == OLD_COLOR
    if name == "red to blue":  # by frame: a growing shape's last ones have most pixels
        seen = [name_color(*one) for one in zip(frames[:, None], cover[:, None])]
        return [mode(seen[:8]), mode(seen[-8:])] == ["red", "blue"]
    part = 2 * len(waveform) // 5
    ends = waveform[:part], waveform[-part:]
    return [name_pitch(w, rate) for w in ends] == ["low", "high"]


def write_clips(name: str, folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for n in range(count):
        frames, sound, caption = clip(name, rng, False)
        with formats.VideoWriter(
            folder / f"{n:02d}.mp4", data.FPS, (sound, 24000)
        ) as v:
            v.write(frames)
        (folder / f"{n:02d}.txt").write_text(caption)


def autoencoded(name: str, folder: Path, count: int) -> float:
    """The share of training clips that still show it after the autoencoders."""
    from ltx2.inputs import Encoders, InputFiles
    from ltx2.latents import Size

    pipe = pipeline.load(str(DEMO), dtype="float32")
    encoders, found = Encoders(InputFiles(), pipe.component), []
    size = Size(96, 96, 25, data.FPS, 26)
    for path in sorted(folder.glob("*.mp4"))[:count]:
        video = pipe.vae.decode(encoders.clip(str(path), 0, 25, size))[0]
        sound = encoders.sound(str(path), 0.0, 25 / 24, 26)
        waveform = pipe.vocoder(pipe.audio_vae.decode(sound))[0]
        frames = np.array(mx.round(video * 255).astype(mx.uint8))
        found.append(shows(name, frames, np.array(waveform), pipe.vocoder.sample_rate))
    return float(np.mean(found))


def learned(name: str, count: int, loras: tuple) -> float:
    """The share of generated clips that show what is new, in unseen wordings."""
    rng, found = np.random.default_rng(1), []
    prompts = [(None, clip(name, rng, True)[2]) for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        options = {"loras": loras}
        made = prompt_adherence.make(DEMO, prompts, Path(folder), options=options)
        found = [shows(name, *read_mp4(path)) for path, _ in made]
    return float(np.mean(found))


def known(count: int, loras: tuple) -> dict[str, float]:
    """Adherence in the combinations that the base knows."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, options = prompt_adherence.scenes(count, 1), {"loras": loras}
        where = Path(folder)
        return prompt_adherence.adherence(DEMO, prompts, where, options=options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NEW)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--judged", type=int, default=24)
    args, flags = parser.parse_known_args()
    warnings.simplefilter("ignore")
    clips, adapter = args.work / "clips", args.work / "adapter"
    write_clips(args.name, clips, args.clips)
    print("autoencoders", autoencoded(args.name, clips, args.clips), flush=True)
    print("before", learned(args.name, args.judged, ()), flush=True)
    command = [sys.executable, str(ROOT / "train.py"), "--model", str(DEMO)]
    command += ["--data", str(clips), "--adapter-path", str(adapter), *flags]
    begun = time.time()
    subprocess.run(command, check=True)
    print(f"trained in {time.time() - begun:.0f} s", flush=True)
    loras = (LoraFile(str(adapter)),)
    print("after", learned(args.name, args.judged, loras), flush=True)
    for label, used in (("known before", ()), ("known after", loras)):
        print(label, json.dumps(known(2 * args.judged, used)), flush=True)


if __name__ == "__main__":
    main()
