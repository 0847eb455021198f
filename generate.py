"""Make videos with their sound from prompts."""

if __name__ == "__main__":  # Ctrl-C during the imports shows no traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import logging
import os
import sys
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Iterator, Optional

import mlx.core as mx
from tqdm import tqdm

from ltx2 import REFERENCE, base, formats, media, outputs, pipeline, timing
from ltx2.base import UserError, awake, run
from ltx2.guidance import Guidance
from ltx2.options import add_all, add_flags, check_range, located, name_and_file
from ltx2.outputs import LATENTS, PREVIEW, SHEET, next_to
from ltx2.parallel import random_seed
from ltx2.record import Record, read_config
from ltx2.request import FILLED, Request
from ltx2.run import save
from ltx2.sheet import Sheet
from ltx2.snapshot import Snapshot
from ltx2.work import operations

EPILOG = """\
MODEL is an official .safetensors file, a folder with one, a folder that convert.py
wrote, or a Hub repository of any of these. The mode follows from the inputs: an image,
a sound, a clip. Guidance is for dev models.
"""
DEMO = Path(__file__).parent / "demo" / "model"
NOTICE = """\
note: no mlx_model here: using the demo model, for prompts like "A red circle moves up, with a low tone"
for the real model: python convert.py -q --q-bits 4 (first lists what it downloads)"""
LOADING = ("model", "kind", "text_encoder", "upsamplers", "parts", "dtype")


# Flags that are not a request's, by title (see add_all)
FLAGS = {
    "output": {
        "prompts FILE": "file of prompts, one per line; each makes a video",
        "num-videos N": "videos of each prompt, with seeds SEED, SEED+1, ... (default: 1)",
        "enhance-prompt": "expand the prompt with Gemma",
        "output FILE": "file to write (default: output.mp4)",
        "overwrite": "replace existing files (default: use the next free name, output-2.mp4)",
        "codec": "video codec; hevc is 10-bit HLG (default: by --output, h264 for .mp4)",
    },
    "model": {
        "model MODEL": "model to use (default: mlx_model, or the demo model if there is none)",
        "kind": "kind of the model, if its name does not say",
        "text-encoder MODEL": "folder or repository of Gemma 3 (not for LTX-2.5)",
        "upsampler FILE": "latent upsampler to use instead of those next to the model; repeatable",
        "part NAME=FILE": "file to use for a component, like vae=FILE; repeatable",
        "dtype": "dtype of the transformer; auto is float16 on M1 and M2, else bfloat16 "
        "(default: auto)",
        "low-memory": "always read the transformer's blocks from disk in each step",
        "cache-contexts FOLDER": "folder that keeps encoded prompts",
        "parallel MODE": "how the machines of mlx.launch split the work: data, passes or tensor",
    },
    "run": {
        "plan": "print memory and time needed, and exit",
        "from MP4": "regenerate a video from the settings stored in it",
        "config JSON": "settings to start from, written by --save-json; other flags override them",
        "trust": "with --from: use any file or model that the video names, or download it",
        "save-json": "write all settings, with full paths, to a .json next to the video",
        "no-metadata": "do not store the settings in the video",
        "save-sheet": "write a contact sheet of frames and waveform, -sheet.png, next to the video",
        "save-latents": "save the latents for --resume",
        "resume LATENTS": "resume an interrupted run, or only decode",
        "preview-every N": "steps between preview images",
        "open": "on a Mac, open the videos at the end",
        "no-caffeinate": "let the Mac sleep during the run",
    },
}
DETAILS = {
    "num-videos": {"type": int, "default": 1},
    "codec": {"choices": ["h264", "hevc", "prores", "ffv1", "exr"]},
    "kind": {"choices": ["dev", "distilled"]},
    "upsampler": {"dest": "upsamplers", "action": "append"},
    "part": {"dest": "parts", "action": "append", "type": name_and_file},
    "dtype": {"choices": ["auto", "bfloat16", "float16", "float32"]},
    "low-memory": {"action": "store_true", "default": None},
    # The last two are earlier names
    "parallel": {"choices": ["data", "passes", "tensor", "many", "shards"]},
    "from": {"dest": "recorded"},
    "preview-every": {"type": int},
}


def parser() -> argparse.ArgumentParser:
    """All flags. One that is not passed is None: defaults are the request's."""
    p = base.Parser(description=__doc__, epilog=EPILOG)
    guidance = "guidance (--audio-... for the sound)"
    titles = "output", "sampling", "inputs", guidance, "model", "run"
    add = {title: p.add_argument_group(title).add_argument for title in titles}
    places = {k: title for title, ks in Request.GROUPS.items() for k in ks.split()}
    add_flags(lambda k: add[places.get(k, "sampling")], Request)
    add_flags(lambda k: add[guidance], Guidance)
    add_flags(lambda k: add[guidance], Guidance, "audio_")
    for title, flags in FLAGS.items():
        add_all(add[title], flags, DETAILS)
    return p


def main() -> None:
    args = parser().parse_args()
    group = init_distributed()
    if args.parallel and group is None:
        raise UserError("--parallel needs several machines: start with mlx.launch")
    passed = passed_options(args)
    load, request, resume, made = from_recording(args, passed)
    load |= {k: v for k, v in vars(args).items() if k in LOADING and v is not None}
    requests = build_requests(args, request, passed, group)
    name_outputs(args, requests)  # fails before a model is looked for
    if "model" not in load:
        load["model"] = "mlx_model"
        if not Path("mlx_model").exists():
            print(NOTICE)
            load["model"] = str(DEMO)
    load |= {k: getattr(args, k) for k in ("low_memory", "cache_contexts", "parallel")}
    pipe = pipeline.load(**load, group=group)
    jobs = [pipe.plan(r) for r in requests]
    if args.recorded and pipe.files() != made.files:
        print(f"note: {args.recorded} was made with other weights: results differ")
    if args.recorded and made.reference != REFERENCE:
        rules = f"rules of an earlier reference than {REFERENCE}"
        print(f"note: {args.recorded} follows the {rules}: the result may differ")
    names = name_outputs(args, [job.request for job in jobs], say=True)  # HDR, maybe
    for line in dict.fromkeys(line for job in jobs for line in job.notes):
        print(f"note: {line}")
    print(describe(pipe, jobs[0]))
    memory = pipe.memory(*jobs)
    print(memory)
    if pipe.machines.mode:
        print(f"--parallel {pipe.machines.mode}: {pipe.machines}")
    memory.check()
    if args.plan:
        print(timing.time_plan(pipe, jobs))
        return
    if not args.no_caffeinate:
        awake()
    make(pipe, jobs, names, resume, args)


def make(pipe: Any, jobs: list, names: list[str], resume: Any, args: Any) -> None:
    """Run the jobs and write their videos."""
    if args.enhance_prompt:
        jobs = [enhanced(pipe, job) for job in jobs]
    preview = pipe.preview() if args.preview_every else None
    stream = pipe.stream(*jobs, resume=resume)
    if pipe.machines.rank > 0:
        for _ in stream:  # rank 0 writes
            pass
        return
    left = timing.Remaining([operations(job, pipe.checkpoint) for job in jobs])
    watched = Progress(args, names, preview, left).watch(stream)
    with outputs.claimed(names), closing(watched) as events:
        for job, output in zip(jobs, names):
            sheet = Sheet(job.size.fps, job.request.color_space)
            seen = sheet.watch(events) if args.save_sheet else events
            facts = job.request, job.size.fps, seen, args.codec, not args.no_metadata
            result = save(output, *facts)
            if args.save_sheet:
                picture = sheet.draw(result.waveform, result.sample_rate)
                media.save_png(next_to(output, SHEET), picture)
            if args.save_json:
                text = json.dumps(result.metadata, indent=2) + "\n"
                next_to(output, ".json").write_text(text, "utf-8")
            print(f"wrote {output} (seed {result.request.seed})")
            for path in files_of(args, job.request).of(output)[1:]:
                latents = path == next_to(output, LATENTS)
                if path.exists() and (args.save_latents or not latents):
                    print(f"wrote {path}")
        next(events, None)  # tells that the last file is written, too
    seconds, peaks = zip(*result.phases.values())
    phases = result.phases | {"all": (sum(seconds), max(peaks))}
    rows = [(k, round(s, 3), round(n / 1e9, 3)) for k, (s, n) in phases.items()]
    print(base.table(("phase", "seconds", "peak GB"), rows))
    if args.open:
        base.open_files(names)


def init_distributed() -> Any:
    """The group of machines that mlx.launch starts, or None; only rank 0 prints."""
    group = mx.distributed.init()
    if group.rank() > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")
        base.LOG.setLevel(logging.WARNING)  # no bars
    return group if group.size() > 1 else None


def from_recording(args: Any, passed: dict[str, Any]) -> tuple[dict, Any, Any, Any]:
    """What is repeated or resumed: load options, request, snapshot, record."""
    if args.resume:
        if args.recorded or args.config or args.prompts or args.num_videos > 1:
            others = "--from, --config, --prompts, --num-videos"
            raise UserError(f"--resume continues one video: remove {others}")
        resume = Snapshot.read(args.resume)
        return asdict(resume.load), resume.request, resume, None
    if args.recorded and args.config:
        raise UserError("--config cannot be combined with --from")
    if args.config:
        return *read_config(args.config), None, None
    if args.recorded:
        made = Record.read(args.recorded)
        flags = {k for k in LOADING if getattr(args, k) is not None}
        nearby = [Path(), DEMO.parent]
        made = made.find(args.recorded, nearby, passed.keys() | flags, args.trust)
        return asdict(made.load), made.request, None, made
    return {}, None, None, None


def passed_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that flags set."""
    flags = {k: v for k, v in vars(args).items() if v is not None}
    passed = {k: v for k, v in flags.items() if k in Request.__dataclass_fields__}
    if args.audio:
        passed["audio"], passed["audio_start"] = args.audio
    for stream, prefix in (("video", ""), ("audio", "audio_")):
        names = (n for n in Guidance.__dataclass_fields__ if prefix + n in flags)
        if settings := {name: flags[prefix + name] for name in names}:
            passed[f"{stream}_guidance"] = settings
    return passed


def build_requests(
    args: Any, recorded: Optional[Request], passed: dict[str, Any], group: Any = None
) -> list[Request]:
    """The recorded request changed by flags, for each prompt with consecutive seeds."""
    if args.resume and passed:
        flag = next(iter(passed)).replace("_", "-")
        raise UserError(f"--resume keeps the original settings: remove --{flag}")
    check_range("--num-videos", args.num_videos, 1, 1000)
    if args.preview_every is not None:
        check_range("--preview-every", args.preview_every, 1, 1000)
    start = asdict(recorded) if recorded else {}
    # A passed option replaces recorded ones that it stands for, or that stand for it
    for field in fields(Request):
        others = field.metadata.get("instead_of", "").split()
        if field.name in passed:
            start = {k: v for k, v in start.items() if k not in others}
        elif passed.keys() & {*others}:
            start.pop(field.name, None)
    if "preset" in passed:
        start = {k: v for k, v in start.items() if k not in FILLED}
    prompts = [passed.pop("prompt", start.pop("prompt", None))]
    if args.prompts:
        if args.prompt is not None:
            raise UserError("--prompt cannot be combined with --prompts")
        text = base.read_text(args.prompts)
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"{args.prompts} has no prompts: write one per line")
    instead = (passed | start).get("contexts_file") or args.segments
    if prompts[0] is None and not instead:
        raise UserError("no prompt: pass --prompt or --prompts")
    for name in {"video_guidance", "audio_guidance"} & passed.keys():
        passed[name] = (start.get(name) or {}) | passed[name]
    first = Request(**{**start, **passed, "prompt": prompts[0] or ""})
    seed = random_seed(group) if first.seed is None else first.seed
    pairs = product(prompts, range(args.num_videos))
    return [replace(first, prompt=prompt or "", seed=seed + n) for prompt, n in pairs]


def files_of(args: argparse.Namespace, r: Request) -> outputs.Files:
    """The files that are written for each video."""
    kinds = {LATENTS: True, ".json": args.save_json, PREVIEW: args.preview_every}
    kinds = tuple(k for k, on in (kinds | {SHEET: args.save_sheet}).items() if on)
    return outputs.Files(kinds, args.codec, r.color_space or "srgb", r.audio_only)


def name_outputs(args: Any, requests: list[Request], say: bool = False) -> list[str]:
    """Free names of the videos; UserError if one cannot be written or is an input."""
    r, files = requests[0], files_of(args, requests[0])
    suffix = ".wav" if r.audio_only else formats.FORMATS[args.codec or "h264"].suffix
    stem = (args.resume or "").removesuffix(LATENTS)
    stem = stem if stem != args.resume else ""  # a resumed run's is its latents'
    output = args.output or (stem or "output") + suffix
    found = wanted = outputs.names(output, len(requests))
    if not args.overwrite:
        found = files.free(output, len(requests), args.resume)
    inputs = [x for x in (args.recorded, args.config) if x]
    located(r, lambda path: inputs.append(path) or path)
    for name in found:
        files.check(name, inputs)
    if say and found != wanted:
        how = f"writing {found[0]} (--overwrite replaces them)"
        print(f"note: earlier files stay: {how}")
    return found


def describe(pipe: Any, job: Any) -> str:
    """The model and the stages of a job."""
    checkpoint, r = pipe.checkpoint, job.request
    assumed = ", assumed: see --kind" if checkpoint.kind_assumed else ""
    kind, dtype = f"{checkpoint.kind}{assumed}", pipe.origin.dtype
    lines = [f"LTX-2 {checkpoint.model_version} ({kind}), {dtype}, seed {r.seed}"]
    at_most = "up to " if r.auto_duration else ""
    loras = dict.fromkeys(lora for stage in job.stages for lora in stage.loras)
    lines += [pipe.inputs.lora(x.path).describe(x.strength) for x in loras]
    if len(job.windows) > 1:
        lines.append(f"{len(job.windows)} windows, the first one:")
    for stage in (s for s in job.stages if s.window == job.windows[0]):
        size, guided = stage.size, "guided" if stage.guidance else "not guided"
        frames = f"{at_most}{size.num_frames} frames at {size.fps:g} fps"
        steps = f"{stage.steps} steps of {stage.sampler}, {guided}"
        lines.append(f"{stage.phase}: {size.width}x{size.height}, {frames}, {steps}")
    return "\n".join(lines)


def enhanced(pipe: Any, job: Any) -> Any:
    """The job with its prompt expanded."""
    if job.request.contexts_file or job.request.segments:
        raise UserError("--enhance-prompt cannot be combined with --contexts/--segment")
    prompt = pipe.enhance(job.prompts[0], job.request.seed)
    print(f"prompt: {prompt}")
    request = replace(job.request, prompt=prompt)
    return replace(job, request=request, prompts=(prompt, *job.prompts[1:]))


@dataclass
class Progress:
    """Shows events on stderr as they pass, and saves latents of videos not written."""

    args: argparse.Namespace
    names: list[str]
    preview: Any
    left: Any

    def watch(self, events: Iterator[Any]) -> Iterator[Any]:
        """Pass events on; phases are printed, those with steps as a bar."""
        bar, latest, advice = tqdm(disable=True), {}, "continue with --resume "
        try:
            for event in events:
                seconds = self.left(event)
                if event.snapshot:
                    latest[event.job] = event
                    self.save_preview(event)
                if event.step == 0:
                    bar.close()
                    if event.steps:
                        bar = tqdm(total=event.steps, desc=event.phase)
                    elif not event.snapshot:
                        print(f"{event.phase} ...", file=sys.stderr, flush=True)
                    elif self.args.save_latents or len(self.names) > 1:
                        self.save_latents(event)
                elif event.step is None:
                    bar.close()
                elif not bar.disable:
                    bar.update(event.step - bar.n)
                    if seconds is not None:
                        bar.set_postfix_str(f"about {seconds:.0f} s left in all")
                yield event
                if event.step is None and not event.snapshot:  # its file is written
                    latest.pop(event.job, None)
                    if len(self.names) > 1 and not self.args.save_latents:
                        next_to(self.names[event.job], LATENTS).unlink(missing_ok=True)
        except base.OutputError:  # the same run would fail again
            advice = ""
            raise
        finally:  # also if the caller that takes the events fails
            bar.close()
            for event in latest.values():
                path = self.save_latents(event)
                print(f"\nsaved latents: {advice}{path}")

    def save_latents(self, event: Any) -> Path:
        path = next_to(self.names[event.job], LATENTS)
        event.snapshot.save(path)
        return path

    def save_preview(self, event: Any) -> None:
        shown = self.preview and "video" in (event.denoised or ())
        if shown and event.step % self.args.preview_every == 0:
            path = next_to(self.names[event.job], PREVIEW)
            media.save_png(path, self.preview(event.denoised["video"]))


if __name__ == "__main__":
    run(main)
