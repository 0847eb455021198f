"""Train a LoRA on a folder of clips with captions."""

if __name__ == "__main__":  # Ctrl-C during the imports shows no traceback
    import os
    import signal

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import signal
from pathlib import Path
from typing import Any

from generate import DEMO, init_distributed
from ltx2 import __version__
from ltx2.base import Parser, UserError, awake, run
from ltx2.options import add_flags

EPILOG = """\
DATA is a folder of clips or pictures, each with its caption in a .txt of the same name,
or a metadata.jsonl or .csv with file_name and caption. The adapter is a folder that
generate.py takes with --lora.
"""


def parser() -> argparse.ArgumentParser:
    """All flags. One that is not passed is None: defaults are the options'."""
    from ltx2.training import Options

    p = Parser(description=__doc__, epilog=EPILOG)
    p.add_argument("--version", action="version", version=f"ltx2 {__version__}")
    add = p.add_argument
    text = "model to train (default: mlx_model, or the demo model if there is none)"
    add("--model", help=text)
    add("--data", required=True, metavar="DATA", help="folder of clips, or a list")
    folder = "folder to write (default: adapters)"
    add("--adapter-path", default="adapters", metavar="FOLDER", help=folder)
    resume = "folder or file of an earlier training to continue"
    add("--resume-adapter-file", metavar="PATH", help=resume)
    cache = "folder for encoded clips and captions (default: cache, in --adapter-path)"
    add("--cache", metavar="FOLDER", help=cache)
    kind = "kind of the model, if its name does not say"
    add("--kind", choices=["dev", "distilled"], help=kind)
    add("--text-encoder", metavar="MODEL", help="folder or repository of Gemma 3")
    dtypes = ["bfloat16", "float16", "float32"]
    add("--dtype", choices=dtypes, help="default: bfloat16, on a CPU float32")
    low = "always read the transformer's blocks from disk in each step"
    add("--low-memory", action="store_true", default=None, help=low)
    add("--plan", action="store_true", help="print the memory needed, and exit")
    sleeps = "let the Mac sleep during the training"
    add("--no-caffeinate", action="store_true", help=sleeps)
    add("--upload-repo", metavar="REPO", help="Hub repository to upload the adapter to")
    options = p.add_argument_group("training").add_argument
    add_flags(lambda k: options, Options)
    return p


def main() -> None:
    args = parser().parse_args()
    import mlx.core as mx

    from ltx2 import adapters, dataset, memory, pipeline, training
    from ltx2.conversion import OFFICIAL

    init_distributed()
    folder = Path(args.adapter_path)
    there = (folder / adapters.ADAPTERS).exists()
    if there and args.resume_adapter_file is None and not args.plan:
        raise UserError(
            f"{folder} has an adapter: add --resume-adapter-file {folder} to continue, or "
            "use another --adapter-path"
        )
    default = "mlx_model" if Path("mlx_model").exists() else str(DEMO)
    cpu = mx.default_device().type == mx.cpu
    pipe = pipeline.load(
        args.model or default,
        args.text_encoder,
        args.kind,
        args.dtype or ("float32" if cpu else "bfloat16"),
    )
    known = training.Options.__dataclass_fields__
    passed = {k: v for k, v in vars(args).items() if k in known and v is not None}
    lists = {k: tuple(v) for k, v in passed.items() if isinstance(v, list)}
    options = training.Options(**passed | lists)
    trainer = training.Trainer(pipe, options, folder, args.cache, args.low_memory)
    trainer.fit(dataset.find_clips(args.data, options.reference_data))
    plan = trainer.plan()
    print(describe(trainer), plan, sep="\n")
    plan.check()
    if args.plan:
        return
    if args.upload_repo:
        from ltx2 import hub

        hub.create_repository(args.upload_repo)  # fails now, not after the training
    if not args.no_caffeinate:
        awake()
    with memory.limits(plan):
        trainer.prepare(args.resume_adapter_file)
        signal.signal(signal.SIGINT, lambda *_: stop(trainer))
        for report in trainer.train():
            show(report, trainer.options.iters)
    print(f"wrote {folder}")
    if trainer.step < trainer.options.iters:
        print(f"continue with --resume-adapter-file {folder}")
    elif args.upload_repo and trainer.group.rank() == 0:
        license = OFFICIAL[pipe.checkpoint.generation]
        adapters.upload(folder, args.upload_repo, license)


def stop(trainer: Any) -> None:
    """The first Ctrl-C ends the training after the current step, a second one at once."""
    if trainer.stopping:
        raise KeyboardInterrupt
    trainer.stopping = True
    print("stopping after this step", flush=True)


def describe(trainer: Any) -> str:
    o, c = trainer.options, trainer.pipe.checkpoint
    blocks = "recomputed" if trainer.by_block else "kept for the backward pass"
    return (
        f"LTX-2 {c.model_version} ({c.kind}): rank {o.rank}, {o.iters} steps of "
        f"{o.batch_size * o.grad_accumulation_steps} clips out of "
        f"{len(trainer.data.items)}, {len(trainer.data.held_out)} held out; blocks are {blocks}"
    )


def show(report: Any, iters: int) -> None:
    """A line for the losses, one for the held-out loss."""
    if report.held_out is not None:
        print(f"Iter {report.step}: held-out loss {report.held_out:.4f}", flush=True)
    if report.loss is not None:
        left = (iters - report.step) / report.per_second
        print(
            f"Iter {report.step}: loss {report.loss:.4f}, mean {report.mean:.4f}, "
            f"learning rate {report.learning_rate:.3g}, {report.per_second:.3g} it/s, "
            f"{left / 60:.1f} min left, peak {report.peak / 1e9:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
