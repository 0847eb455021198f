"""Make videos with their sound from prompts."""

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

from ltx2.base import OutputError, Parser, UserError, run

EPILOG = """\
MODEL is an official .safetensors file, a folder with one, a folder that convert.py
wrote, or a Hub repository of any of these. What is asked for follows from what is
given: an image, a sound, a clip. Guidance is for dev models.
"""
IMAGE, LORA, SOUND = (
    "PATH[@FRAME][:STRENGTH]",
    "PATH[:STRENGTH][@STAGE]",
    "FILE[@START]",
)


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


DEMO = Path(__file__).parent / "demo" / "model"
NOTICE = """\
demo model, it knows prompts as "A red circle moves from left to right, with a low tone": demo/README.md
the real one: python convert.py --quantize -q-bits 4 (it lists what is downloaded first)"""
GUIDANCE = {
    "cfg_scale": (float, "towards the prompt, 1 is off"),
    "stg_scale": (float, "towards coherence, 0 is off"),
    "stg_blocks": (integers, "blocks that STG perturbs, as 28,29"),
    "modality_scale": (float, "towards agreement of picture and sound, 1 is off"),
    "rescale_scale": (float, "0 to 1, against overexposure"),
    "skip_step": (int, "steps left out after each computed one"),
}


def parser() -> argparse.ArgumentParser:
    """All flags; what is not given is None, so that defaults are the model's."""
    p = Parser(description=__doc__, epilog=EPILOG)

    def group(title: str) -> Callable[..., Any]:
        return p.add_argument_group(title).add_argument

    add = group("what to make")
    add("--prompt")
    add("--negative-prompt", metavar="TEXT", help="what to stay away from")
    add("--enhance-prompt", action="store_true", help="let Gemma write it at length")
    add("--prompts", metavar="FILE", help="one prompt a line, a video each")
    add(
        "--num-videos", type=int, default=1, metavar="N", help="seeds SEED, SEED+1, ..."
    )
    add("--height", type=int, help="512, or the model's or clip's own")
    add("--width", type=int, help="768, likewise")
    add("--num-frames", type=int, help="8k+1; 121, the clip's or the prompt's")
    add(
        "--auto-duration",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="seconds between which the prompt tells the length: LTX-2.5, 1 20",
    )
    add("--fps", type=float, help="24, or the clip's")
    add("--no-audio", action="store_true", default=None, help="picture only")
    add("--audio-only", action="store_true", default=None, help="sound only, a .wav")
    add("--output", metavar="FILE", help="output.mp4")

    add = group("what is given")
    add(
        "--image",
        dest="images",
        type=image,
        action="append",
        metavar=IMAGE,
        help="picture to be seen at a frame: 24, -1 (the last), 1.5s; repeatable",
    )
    add("--keyframes", action="store_true", default=None, help="guide at all images")
    add("--image-crf", type=int, help="33, from LTX-2.4 on 18; 0 is off")
    add("--audio", type=sound, metavar=SOUND, help="sound to go with")
    add("--video", metavar="FILE", help="clip to change, or reference of an IC-LoRA")
    add("--retake", type=span, metavar="FROM-TO", help="seconds to make anew")
    add("--retake-streams", type=words, metavar="video,audio", help="what of them")
    add("--extend", type=float, metavar="SECONDS", help="negative: before the clip")
    add("--reference-strength", type=float, help="0 to 1, how firmly it is held")
    add("--reference-attention", type=float, help="0 to 1, how much it is seen")
    add(
        "--lora",
        dest="loras",
        type=lora,
        action="append",
        metavar=LORA,
        help="in all stages or one; repeatable",
    )
    add(
        "--distilled-lora",
        type=lora,
        metavar="PATH[:STRENGTH]",
        help="for the second stage of a dev model",
    )

    add = group("the model")
    add("--model", help="mlx_model, or the demo model if there is none")
    add("--kind", choices=["dev", "distilled"], help="if no name tells")
    add(
        "--text-encoder",
        metavar="MODEL",
        help="Gemma 3, a folder or repository; not of LTX-2.5",
    )
    add("--video-decoder", choices=["conv", "diffusion"], help="conv if it is there")
    add(
        "--upsampler",
        dest="upsamplers",
        metavar="FILE",
        action="append",
        help="latent upsampler instead of those beside the model; repeatable",
    )
    add("--low-memory", action="store_true", default=None, help="whatever there is")
    add("--cache-contexts", metavar="FOLDER", help="where prompts are kept encoded")
    add(
        "--parallel",
        choices=["many", "passes", "shards"],
        help="what machines share, if mlx.launch starts several",
    )
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16")

    add = group("sampling")
    add("--seed", type=int, help="10")
    add(
        "--stages",
        choices=["one", "two", "hq", "dfr"],
        help="distilled: two if there is an upsampler, else one",
    )
    add("--temporal-upsample", action="store_true", default=None, help="double the fps")
    add(
        "--generated-keyframes",
        type=int,
        metavar="N",
        help="LTX-2.5: frames made beside the video, which keep it sharp",
    )
    add(
        "--detailing-lora",
        type=lora,
        metavar="PATH[:STRENGTH]",
        help="of dfr: draws details into the second stage",
    )
    add("--temporal-rounds", type=int, metavar="N", help="of dfr: double the fps, 0-2")
    add("--steps", type=int, help="of a dev model: 40, from LTX-2.3 on 30, hq 15")
    add("--sigmas", type=numbers, metavar="1,...,0", help="instead of a schedule")
    add("--sampler", help="euler, euler_ancestral, res_2s, ...")
    add("--guidance-interval", type=span, metavar="FROM-TO", help="sigmas guided, 0-1")
    add(
        "--step-cache",
        type=float,
        metavar="PART",
        help="0 is off; how far tokens may move before the model is asked again",
    )
    add = group("guidance, with --audio-... in front for the sound")
    for prefix in ("", "audio-"):
        for name, (type_, text) in GUIDANCE.items():
            flag = f"--{prefix}{name}".replace("_", "-")
            add(flag, type=type_, help=None if prefix else text)

    add = group("keeping track")
    add("--plan", action="store_true", help="stop when memory is planned")
    add("--from", dest="recorded", metavar="MP4", help="make that one again")
    add("--save-json", action="store_true", help="how it was made, beside it")
    add("--save-latents", action="store_true", help="beside it, for --resume")
    add("--resume", metavar="LATENTS", help="go on after an interruption, or decode")
    add("--preview-every", type=int, metavar="N", help="a picture strip every N steps")
    return p


def parts(form: str, pattern: str, text: str) -> tuple[Any, ...]:
    """The groups of a flag's value."""
    match = re.fullmatch(pattern, text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return match.groups()


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def span(text: str) -> tuple[float, ...]:
    return tuple(map(float, parts("FROM-TO", r"([\d.]+)-([\d.]+)", text)))


def image(text: str) -> dict[str, Any]:
    """PATH[@FRAME][:STRENGTH], where FRAME is an index, -1 or a time as 1.5s."""
    path, frame, strength = parts(
        IMAGE, r"(.+?)(?:@(-?\d+|[\d.]+s))?(?::(\d*\.?\d+))?", text
    )
    index = frame if frame and frame.endswith("s") else int(frame or 0)
    return {"path": path, "frame": index, "strength": float(strength or 1)}


def lora(text: str) -> dict[str, Any]:
    """PATH[:STRENGTH][@STAGE]."""
    path, strength, stage = parts(LORA, r"(.+?)(?::(-?\d*\.?\d+))?(?:@(\d+))?", text)
    stage = int(stage) if stage else None
    return {"path": path, "strength": float(strength or 1), "stage": stage}


def sound(text: str) -> tuple[str, float]:
    path, start = parts(SOUND, r"(.+?)(?:@([\d.]+)s?)?", text)
    return path, float(start or 0)


def main() -> None:
    args = parser().parse_args()
    from ltx2 import media, pipeline

    group = machines()
    if args.parallel and group is None:
        raise UserError("--parallel is for several machines: start with mlx.launch")
    load, request, resume, made_with = recorded(args)
    for name in ("model", "kind", "text_encoder", "upsamplers", "dtype"):
        if getattr(args, name) is not None:
            load[name] = getattr(args, name)
    requests = asked(args, request)
    suffix = ".wav" if requests[0].audio_only else ".mp4"
    outputs = name_outputs(args.output or f"output{suffix}", len(requests))
    inputs = {r.video for r in requests} | {r.audio for r in requests} | {args.recorded}
    for output in outputs:
        media.check_output(output, suffix)
        if any(i and Path(i).resolve() == Path(output).resolve() for i in inputs):
            raise UserError(f"{output} is read for this run: give another --output")
    how = {"low_memory": args.low_memory, "cache_contexts": args.cache_contexts}
    how |= {"group": group, "share": args.parallel}
    if "model" not in load:
        load["model"] = "mlx_model"
        if not Path("mlx_model").exists():
            print(NOTICE)
            load["model"] = str(DEMO)
    pipe = pipeline.load(**load, **how)
    jobs = [pipe.plan(r) for r in requests]
    if args.recorded and pipe.files() != made_with:
        print(f"note: {args.recorded} was made with other weights")
    for line in dict.fromkeys(line for job in jobs for line in job.notes):
        print(f"note: {line}")
    print(pipe.describe(jobs[0]))
    needed = pipe.memory(*jobs)
    print(needed)
    needed.check()
    if args.plan:
        return
    if args.enhance_prompt:
        requests = [enhanced(pipe, r) for r in requests]
    strips = pipe.preview() if args.preview_every else None
    run_ = Run(args, outputs, strips)
    events = run_.watch(pipe.stream(*requests, resume=resume))
    if pipe.rank > 0:
        for _ in events:  # the first machine writes
            pass
        return
    for job, output in zip(jobs, outputs):
        result = write(output, job, events)
        if args.save_json:
            text = json.dumps(result.metadata, indent=2) + "\n"
            Path(output).with_suffix(".json").write_text(text)
        print(f"wrote {output}")
    print(table(result.phases))


def machines() -> Any:
    """The group of machines that mlx.launch starts, or None; the first one tells."""
    import mlx.core as mx

    group = mx.distributed.init()
    if group.rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return group if group.size() > 1 else None


def recorded(args: argparse.Namespace) -> tuple[dict, Any, Any, Any]:
    """How to load the model, the request to start from, a snapshot and the fingerprints
    of the weights, as far as an earlier video or saved latents tell."""
    from ltx2 import media, snapshot
    from ltx2.request import Request

    if args.resume and (args.recorded or args.prompts or args.num_videos > 1):
        raise UserError(
            "--resume goes on with one video: drop --from, --prompts, --num-videos"
        )
    if args.resume:
        resume = snapshot.Snapshot.read(args.resume)
        return resume.load, resume.request, resume, resume.files
    if args.recorded:
        metadata = media.read_metadata(args.recorded)
        if not {"load", "request"} <= metadata.keys():
            raise UserError(f"{args.recorded} was not made by generate.py")
        request = Request.from_json(metadata["request"])
        return metadata["load"], request, None, metadata["model"]["files"]
    return {}, None, None, None


def asked(args: argparse.Namespace, request: Any) -> list[Any]:
    """The requests: what is recorded, changed by the flags that are given."""
    from ltx2.request import Request

    known = {f.name for f in dataclasses.fields(Request)}
    given = {k: v for k, v in vars(args).items() if k in known and v is not None}
    if args.audio:
        given["audio"], given["audio_start"] = args.audio
    for stream, prefix in (("video", ""), ("audio", "audio_")):
        flags = {name: getattr(args, prefix + name) for name in GUIDANCE}
        flags = {name: value for name, value in flags.items() if value is not None}
        if flags:
            given[f"{stream}_guidance"] = flags
    if args.resume and given:
        flag = next(iter(given)).replace("_", "-")
        raise UserError(f"--resume goes on as it was asked: drop --{flag}")
    base = dataclasses.asdict(request) if request else {}
    prompts = [given.pop("prompt", base.pop("prompt", None))]
    if args.prompts:
        if args.prompt is not None:
            raise UserError("--prompt and --prompts were both given: drop one")
        text = Path(args.prompts).read_bytes().decode("utf-8-sig", "replace")
        lines = text.splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"{args.prompts} has no prompts, one a line")
    if prompts[0] is None:
        raise UserError("what is to be seen and heard? give a --prompt")
    if args.preview_every is not None and args.preview_every < 1:
        raise UserError(f"--preview-every is {args.preview_every}: give 1 or more")
    if not 1 <= args.num_videos <= 1000:
        raise UserError(f"--num-videos is {args.num_videos}, allowed are 1 to 1000")
    first = Request.from_json({**base, **given, "prompt": prompts[0]})
    return [
        dataclasses.replace(first, prompt=prompt, seed=first.seed + n)
        for prompt in prompts
        for n in range(args.num_videos)
    ]


def name_outputs(output: str, count: int) -> list[str]:
    """out.mp4, or out-1.mp4, out-2.mp4, ..."""
    path = Path(output)
    if count == 1:
        return [output]
    return [str(path.with_stem(f"{path.stem}-{n + 1}")) for n in range(count)]


def enhanced(pipe: Any, request: Any) -> Any:
    longer = pipe.enhance(request.prompt, request.seed)
    print(f"prompt: {longer}")
    return dataclasses.replace(request, prompt=longer)


class Run:
    """Shows events as they pass, and keeps latents for the case that it ends early."""

    def __init__(self, args: argparse.Namespace, outputs: list[str], preview: Any):
        self.args, self.outputs, self.preview = args, outputs, preview

    def watch(self, events: Iterator[Any]) -> Iterator[Any]:
        """Pass events on; phases are named, and those with steps have a bar."""
        from tqdm import tqdm

        bar, last = tqdm(disable=True), {}
        try:
            for event in events:
                if getattr(event, "snapshot", None):
                    last[event.job] = event
                    self.picture(event)
                if getattr(event, "step", None) == 0:
                    bar.close()
                    if event.steps:
                        bar = tqdm(total=event.steps, desc=event.phase, file=sys.stdout)
                    elif not event.snapshot:
                        print(f"{event.phase} ...", flush=True)
                    elif self.args.save_latents:
                        self.keep(event)
                elif not hasattr(event, "step"):
                    bar.close()
                elif not bar.disable:
                    bar.update(event.step - bar.n)
                yield event
        except (KeyboardInterrupt, OutputError):
            for event in last.values():
                print(f"\nlatents are kept, go on with --resume {self.keep(event)}")
            raise
        finally:
            bar.close()

    def keep(self, event: Any) -> Path:
        path = Path(self.outputs[event.job]).with_suffix(".latents.safetensors")
        event.snapshot.save(path)
        return path

    def picture(self, event: Any) -> None:
        from ltx2 import media

        if not (self.preview and event.denoised and "video" in event.denoised):
            return
        if event.step % self.args.preview_every == 0:
            path = Path(self.outputs[event.job]).with_suffix(".preview.png")
            media.save_png(path, self.preview(event.denoised["video"]))


def write(path: str, job: Any, events: Iterator[Any]) -> Any:
    """Bring frames to the mp4 as they are decoded; the file appears when all is well."""
    from ltx2 import media, pipeline

    if "video" not in job.streams:
        result = next(e for e in events if isinstance(e, pipeline.Result))
        result.save(path)
        return result
    with media.VideoWriter(path, job.fps) as video:
        for event in events:
            if isinstance(event, pipeline.Result):
                video.sound, video.metadata = event.sound, event.metadata
                return event
            if event.frames is not None:
                video.write(event.frames)


def table(phases: dict[str, tuple[float, float]]) -> str:
    """Seconds and peak memory by phase."""
    rows = [f"{'phase':<10}{'seconds':>10}{'peak GB':>10}"]
    for name, (seconds, peak) in phases.items():
        rows.append(f"{name:<10}{seconds:>10.1f}{peak / 1e9:>10.2f}")
    total = sum(seconds for seconds, _ in phases.values())
    peak = max(peak for _, peak in phases.values())
    return "\n".join([*rows, f"{'all':<10}{total:>10.1f}{peak / 1e9:>10.2f}"])


if __name__ == "__main__":
    run(main)
