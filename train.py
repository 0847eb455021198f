"""Train a LoRA on a folder of clips with captions."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx

from generate import DEMO, init_distributed
from ltx2 import adapters, hub, memory, pipeline
from ltx2.base import Parser, Stopped, UserError, awake, run, user_path
from ltx2.conversion import OFFICIAL
from ltx2.options import add_all, add_flags
from ltx2.training import Options, Trainer

EPILOG = """\
DATA is a folder of clips or pictures, each with its caption in a .txt of the same name,
or a metadata.jsonl or .csv with file_name and caption. The adapter is a folder that
generate.py takes with --lora.
"""


FLAGS = {
    "model MODEL": "model to train (default: mlx_model, or the demo model if there is none)",
    "data DATA": "folder of clips, or a list of them",
    "adapter-path FOLDER": "folder to write (default: adapters)",
    "resume-adapter-file PATH": "folder or file of an earlier training to continue",
    "cache FOLDER": "folder for encoded clips and captions (default: cache, in --adapter-path)",
    "kind": "kind of the model, if its name does not say",
    "text-encoder MODEL": "folder or repository of Gemma 3",
    "dtype": "dtype of the transformer (default: bfloat16, on a CPU float32)",
    "low-memory": "always read the transformer's blocks from disk in each step",
    "plan": "print the memory needed, and exit",
    "no-caffeinate": "let the Mac sleep during the training",
    "upload-repo OWNER/NAME": "Hub repository to upload the adapter to",
}
DETAILS = {
    "data": {"required": True},
    "adapter-path": {"default": "adapters"},
    "kind": {"choices": ["dev", "distilled"]},
    "dtype": {"choices": ["bfloat16", "float16", "float32"]},
    "low-memory": {"action": "store_true", "default": None},
}


def parser() -> argparse.ArgumentParser:
    """All flags. One that is not passed is None: defaults are the options'."""
    p = Parser(description=__doc__, epilog=EPILOG)
    add_all(p.add_argument, FLAGS, DETAILS)
    options = p.add_argument_group("training").add_argument
    add_flags(lambda k: options, Options)
    return p


def main() -> None:
    args = parser().parse_args()
    init_distributed()
    resumed = args.resume_adapter_file
    if not args.plan:
        adapters.check_folder(user_path(args.adapter_path), resumed)
    default = "mlx_model" if Path("mlx_model").exists() else str(DEMO)
    cpu = mx.default_device().type == mx.cpu
    dtype = args.dtype or ("float32" if cpu else "bfloat16")
    model = args.model or default, args.text_encoder, args.kind, dtype
    pipe = pipeline.load(*model, low_memory=args.low_memory)
    trainer = Trainer(pipe, vars(args), args.adapter_path, args.cache)
    if resumed is not None:
        trainer.resume(resumed)
    if trainer.step < trainer.options.iters:
        trainer.data.find(args.data)
        plan = trainer.plan()
        print(describe(trainer), plan, sep="\n")
        plan.check()
        if args.plan:
            return
        if args.upload_repo:
            hub.create_repository(args.upload_repo)  # fails now, not after training
        if not args.no_caffeinate:
            awake()
        with memory.limits(plan):
            train(trainer)
        print(f"wrote {args.adapter_path}")
    elif not args.upload_repo:
        raise UserError(f"{resumed} has {trainer.step} steps: pass more --iters")
    if trainer.step < trainer.options.iters:
        print(f"continue with --resume-adapter-file {args.adapter_path}")
        if trainer.stopping != signal.SIGINT:
            raise Stopped(trainer.stopping)
    elif args.upload_repo and trainer.group.rank() == 0:
        license = OFFICIAL[pipe.checkpoint.generation]
        adapters.upload(trainer.folder, args.upload_repo, license)


def train(trainer: Any) -> None:
    """Train to the end, or until a signal: after the step, a second one at once."""

    def stop(number: int, _: Any) -> None:
        if trainer.stopping:
            raise Stopped(number)
        trainer.stopping = number
        print("stopping after this step", flush=True)

    trainer.prepare()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    for line in trainer.train():
        print(line, flush=True)


def describe(trainer: Any) -> str:
    o, data = trainer.options, trainer.data
    kept = "recomputed in" if trainer.by_block else "kept for"
    clips = o.batch_size * o.grad_accumulation_steps
    counts = f"{clips} of {len(data.items)} clips each, {len(data.held_out)} held out"
    steps = f"rank {o.rank}, {o.iters} steps with {counts}"
    return f"{trainer.base}: {steps}; activations are {kept} the backward pass"


if __name__ == "__main__":
    run(main)
