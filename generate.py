"""Make videos with their sound from prompts: parse, call, report."""

import argparse
import dataclasses
import sys
import warnings
from typing import Any, Iterator

from ltx2.base import UserError, run

EPILOG = """\
MODEL is an official .safetensors file, a folder with one, a folder that convert.py
wrote, or a Hub repository of any of these. Guidance needs a dev model, an upsampler
is found beside the model or given with --upsampler.
"""
GUIDANCE = {
    "cfg_scale": (float, "towards the prompt, 1 is off"),
    "stg_scale": (float, "towards coherence, 0 is off"),
    "stg_blocks": (lambda text: integers(text), "blocks that STG perturbs, as 28,29"),
    "modality_scale": (float, "towards agreement of picture and sound, 1 is off"),
    "rescale_scale": (float, "0 to 1, against overexposure"),
    "skip_step": (int, "steps left out after each computed one"),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    p.add_argument("--prompt", required=True)
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to stay away from")
    p.add_argument("--output", metavar="FILE", default="output.mp4")
    p.add_argument("--model", default="mlx_model", help="default: mlx_model")
    p.add_argument("--kind", choices=["dev", "distilled"], help="if no name tells")
    p.add_argument("--text-encoder", metavar="MODEL", help="Gemma 3 folder or repo")
    p.add_argument("--upsampler", metavar="FILE", action="append", default=[])
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--height", type=int, help="512, or the clip's")
    p.add_argument("--width", type=int, help="768, or the clip's")
    p.add_argument("--num-frames", type=int, help="8k+1; 121, or the clip's")
    p.add_argument("--fps", type=float, help="24, or the clip's")
    p.add_argument("--seed", type=int, default=10)
    p.add_argument("--stages", choices=["one", "two", "hq"])
    p.add_argument("--steps", type=int, help="of a dev model")
    p.add_argument("--sigmas", type=numbers, help="1,0.9,...,0 instead of a schedule")
    p.add_argument("--sampler", help="euler, euler_ancestral, res_2s, ...")
    p.add_argument("--no-audio", action="store_true", help="picture only")
    p.add_argument("--audio-only", action="store_true", help="sound only, to a .wav")
    g = p.add_argument_group("guidance of dev models, the sound's with --audio-...")
    for prefix in ("", "audio-"):
        for name, (type_, text) in GUIDANCE.items():
            flag = f"--{prefix}{name}".replace("_", "-")
            g.add_argument(flag, type=type_, help=None if prefix else text)
    return p


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def main() -> None:
    args = parser().parse_args()
    warnings.showwarning = lambda message, *_: print(f"note: {message}")
    from ltx2 import media, pipeline, request

    media.check_output(args.output, ".wav" if args.audio_only else ".mp4")
    pipe = pipeline.load(
        args.model, args.text_encoder, args.kind, args.dtype, args.upsampler
    )
    known = {f.name for f in dataclasses.fields(request.Request)}
    asked = {k: v for k, v in vars(args).items() if k in known}
    for stream, prefix in (("video", ""), ("audio", "audio_")):
        given = {name: getattr(args, prefix + name) for name in GUIDANCE}
        given = {name: value for name, value in given.items() if value is not None}
        asked[f"{stream}_guidance"] = given or None
    job = pipe.plan(request.Request(**asked))
    for line in job.notes:
        print(f"note: {line}")
    print(pipe.describe(job))
    result = write(args.output, job, show(pipe.stream(job.request)))
    print(table(result.phases))
    print(f"wrote {args.output}")


def write(path: str, job: Any, events: Iterator[Any]) -> Any:
    """Bring frames to the mp4 as they are decoded; the file appears when all is well."""
    from ltx2 import media, pipeline

    if "video" not in job.streams:
        result = [*events][-1]
        result.save(path)
        return result
    with media.VideoWriter(path, job.stages[-1].fps) as video:
        for event in events:
            if isinstance(event, pipeline.Result):
                video.sound, video.metadata = event.sound, event.metadata
                return event
            if event.frames is not None:
                video.write(event.frames)


def show(events: Iterator[Any]) -> Iterator[Any]:
    """Pass events on; phases are named, and those with steps have a bar."""
    from tqdm import tqdm

    bar = tqdm(disable=True)
    for event in events:
        if getattr(event, "step", None) == 0:
            bar.close()
            if event.steps:
                bar = tqdm(total=event.steps, desc=event.phase, file=sys.stdout)
            else:
                print(f"{event.phase} ...", flush=True)
        elif not bar.disable and hasattr(event, "step"):
            bar.update(event.step - bar.n)
        yield event
    bar.close()


def table(phases: dict[str, tuple[float, float]]) -> str:
    rows = [f"{'phase':<10}{'seconds':>10}{'peak GB':>10}"]
    for name, (seconds, peak) in phases.items():
        rows.append(f"{name:<10}{seconds:>10.1f}{peak / 1e9:>10.2f}")
    total = sum(seconds for seconds, _ in phases.values())
    peak = max(peak for _, peak in phases.values())
    return "\n".join([*rows, f"{'all':<10}{total:>10.1f}{peak / 1e9:>10.2f}"])


if __name__ == "__main__":
    run(main)
