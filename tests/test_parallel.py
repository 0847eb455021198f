"""Several machines as one: the same latents, a part of the weights, one end for all.

Machines are processes here. Run as a script, this file is what each of them does.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for those that are started

from ltx2 import conversion, parallel, pipeline, weights  # noqa: E402
from ltx2.base import UserError  # noqa: E402
from ltx2.request import LoraFile, Request  # noqa: E402

LAUNCH = [str(Path(sys.executable).parent / "mlx.launch"), "--backend", "ring"]
GUIDED = dict(cfg_scale=3.0, stg_scale=1.0, stg_blocks=(2,), modality_scale=3.0)


def run(case: dict, group=None) -> dict:
    """One case on this rank: latents by video and stream, and what the blocks hold."""
    pipe = pipeline.load(
        case["model"],
        case["encoder"],
        case["kind"],
        "float32",
        low_memory=case.get("low_memory"),
        group=group,
        share=case.get("share"),
    )
    loras = tuple(LoraFile(path, 0.7) for path in case.get("loras", ()))
    guidance = dict(video_guidance=GUIDED) if case["kind"] == "dev" else {}
    size = dict(height=64, width=64, num_frames=9, sigmas=(1.0, 0.7, 0.0))
    more = guidance | case.get("more", {})
    requests = [
        Request("a cat", seed=seed, no_audio=case.get("silent"), loras=loras, **size)
        for seed in range(case.get("videos", 1))
    ]
    requests = [Request(**{**vars(r), **more}) for r in requests]
    contexts = None
    if not case.get("reads"):  # short ones, which are not encoded
        mx.random.seed(0)
        asked = [pipe.plan(r) for r in requests]
        contexts = {
            prompt: (mx.random.normal((1, 8, 128)), mx.random.normal((1, 8, 128)))
            for job in asked
            for prompt in (job.request.prompt, job.negative_prompt)
        }
    gc.collect()  # of what the last case left
    held, latents, found = mx.get_active_memory(), {}, {}
    for event in pipe.stream(*requests, contexts=contexts):
        if isinstance(event, pipeline.Result):
            latents[f"{len(latents)}.video"] = event.video_latents
        elif event.step and event.snapshot:
            found["held"] = mx.get_active_memory() - held
            if not case.get("low_memory"):
                blocks = tree_flatten(pipe.transformer.transformer_blocks)
                found["blocks"] = sum(w.nbytes for _, w in blocks)
            found["steps"] = found.get("steps", 0) + 1
        elif event.phase == "latents" and not case.get("silent"):
            latents = {k: x[0] for k, x in event.snapshot.latents.items()}
            break
    return dict(found, latents=latents, way=pipe._shared)


def worker(folder: Path) -> None:
    group = mx.distributed.init()
    for case in json.loads((folder / "cases.json").read_text()):
        found = run(case, group)
        name = f"{case['name']}.{group.rank()}.safetensors"
        mx.save_safetensors(str(folder / name), found.pop("latents"))
        (folder / f"{name}.json").write_text(json.dumps(found))


@contextmanager
def launch(ranks: int, *command: str):
    """A Python program on so many machines; nothing of it is left behind."""
    port = free_ports(1)[0]
    flags = ["-n", str(ranks), "--starting-port", str(port), "--", sys.executable]
    launched = subprocess.Popen(
        [*LAUNCH, *flags, *command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(120, os.killpg, (launched.pid, signal.SIGKILL))
    timer.start()
    try:
        yield launched
    finally:
        timer.cancel()
        with suppress(ProcessLookupError):
            os.killpg(launched.pid, signal.SIGKILL)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def together_on_ring(ranks: int, folder: Path) -> None:
    """Run the cases on so many machines. As mlx.launch does it, whose threads, though,
    keep a small computer's cores busy with waiting."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "MLX_HOSTFILE": str(hosts)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=os.environ | one_thread | {"MLX_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    assert [process.wait(timeout=200) for process in started] == [0] * ranks


@pytest.fixture(scope="module")
def cases(checkpoint, tmp_path_factory):
    """What is tried on two and on four machines, with 4 heads."""
    sizes = {
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "cross_attention_dim": 128,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 32,
        "audio_cross_attention_dim": 128,
        "connector_attention_head_dim": 32,
        "audio_connector_attention_head_dim": 32,
    }
    model = checkpoint("ltx-2.3", transformer=sizes)
    lora = str(checkpoint("ltx-2.3-lora", transformer=sizes))
    in_4_bits = tmp_path_factory.mktemp("converted") / "model"
    how = conversion.quantization(group_size=32)
    conversion.Conversion(weights.open_model(str(model)), how).write(in_4_bits)
    in_4_bits = str(in_4_bits)
    dev, distilled = dict(kind="dev"), dict(kind="distilled")
    listed = dict(
        many=dict(distilled, videos=3, silent=True, share="many"),
        reads=dict(distilled, videos=2, silent=True, share="many", reads=True),
        passes=dict(dev, share="passes", loras=[lora]),
        cached=dict(dev, share="passes", model=in_4_bits, more=dict(step_cache=0.9)),
        shards=dict(distilled, share="shards"),
        streamed=dict(dev, share="shards", loras=[lora], low_memory=True),
        shards_4_bits=dict(distilled, share="shards", model=in_4_bits, loras=[lora]),
        one_step=dict(distilled, share="shards", more=dict(sigmas=(1.0, 0.0))),
    )
    files = dict(model=str(model), encoder=str(checkpoint("gemma3")))
    return [dict(files, name=name, **case) for name, case in listed.items()]


@pytest.fixture(scope="module")
def alone(cases):
    """The results of one machine by case."""
    return {case["name"]: run(dict(case, share=None)) for case in cases}


FOUR = ("passes", "one_step")  # four processes on a small computer are slow


@pytest.fixture(scope="module", params=[2, 4])
def together(request, cases, tmp_path_factory):
    """The number of machines, and the results of each by case."""
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    if ranks == 4:
        cases = [case for case in cases if case["name"] in FOUR]
    (folder / "cases.json").write_text(json.dumps(cases))
    together_on_ring(ranks, folder)
    found = {}
    for case in cases:
        for rank in range(ranks):
            path = folder / f"{case['name']}.{rank}.safetensors"
            values = json.loads(path.with_name(path.name + ".json").read_text())
            latents = mx.load(str(path), "safetensors")
            found[case["name"], rank] = dict(values, latents=latents)
    return ranks, found


def test_the_first_machine_has_the_same_latents_as_one_machine(cases, alone, together):
    ranks, found = together
    for case in (c for c in cases if (c["name"], 0) in found):
        expected, actual = alone[case["name"]], found[case["name"], 0]
        assert actual["way"] == case["share"]
        assert expected["latents"].keys() == actual["latents"].keys() != set()
        for k, x in expected["latents"].items():
            error = mx.abs(x - actual["latents"][k]).max() / mx.abs(x).max()
            assert error < 1e-4, (case["name"], k)


def test_a_machine_holds_only_its_part_of_the_blocks(alone, together):
    ranks, found = together
    for name, rank in found:
        if name in ("shards", "shards_4_bits", "one_step"):
            whole, part = alone[name], found[name, rank]
            assert part["blocks"] < (1 / ranks + 0.1) * whole["blocks"]
            if name != "shards_4_bits":  # (MLX copies no slice of less than 16 KiB)
                spared = (1 - 1 / ranks - 0.1) * whole["blocks"]
                assert part["held"] < whole["held"] - spared


def test_sharded_blocks_are_streamed_with_low_memory(together):
    ranks, found = together
    if ranks == 2:
        streamed, held = (found[k, 0]["held"] for k in ("streamed", "shards"))
        assert streamed < held


def test_three_videos_are_shared_by_two_machines(together):
    ranks, found = together
    if ranks == 2:
        steps = [found["many", rank]["steps"] for rank in range(ranks)]
        assert sorted(steps) == [2, 4]


@pytest.fixture
def command(cases):
    """generate.py with a request that takes some time."""
    model = cases[0]["model"], "--text-encoder", cases[0]["encoder"], "--kind", "dev"
    size = "--height", "64", "--width", "64", "--num-frames", "9", "--steps", "500"
    return "generate.py", "--prompt", "a cat", "--model", *model, *size


@pytest.fixture
def contexts(cases, tmp_path_factory):
    """A cache of the command's contexts: its processes need not load a text encoder."""
    folder, files = tmp_path_factory.mktemp("contexts"), cases[0]
    model, encoder = files["model"], files["encoder"]
    load = pipeline.load(model, encoder, "dev", "float32", cache_contexts=folder)
    request = Request("a cat", height=64, width=64, num_frames=9, sigmas=(1.0, 0.0))
    assert any(event.phase == "stage1" for event in load.stream(request))
    return "--cache-contexts", str(folder)


def processes(marker: str) -> list[int]:
    """Those that run with this in their command line."""
    if Path("/proc/self/cmdline").exists():  # where ps may not be
        commands = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                commands[int(path.parent.name)] = path.read_bytes().decode(
                    "utf-8", "replace"
                )
    else:
        command = ["ps", "-wweo", "pid=,args="]
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
        lines = (line.split(maxsplit=1) for line in listed.stdout.splitlines())
        commands = {int(number): args for number, args in lines}
    programs = {n: args for n, args in commands.items() if marker in args}
    return [n for n, args in programs.items() if "mlx.launch" not in args]


def test_if_one_machine_dies_all_end_and_no_file_is_left(command, contexts, tmp_path):
    output = tmp_path / "out.mp4"
    flags = "--dtype", "float32", "--output", str(output), "--parallel", "passes"
    with launch(2, *command, *contexts, *flags) as launched:
        while "/500" not in (line := launched.stdout.readline()):
            assert line
        running = processes(str(output))
        assert len(running) == 2
        os.kill(max(running), signal.SIGKILL)
        launched.stdout.read()  # till the end (stdin open: mlx.launch spins without)
        launched.wait()
        assert not processes(str(output))
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_told_and_ends_all(command, tmp_path):
    flags = "--output", str(tmp_path / "out.mp4"), "--parallel", "many"
    with launch(2, *command, *flags) as launched:
        printed = launched.stdout.read()
    assert "--parallel many: there is one video" in printed
    assert "exited with code 2" in printed and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


class Ranks:
    """A group that is asked only for its size."""

    def __init__(self, size):
        self.size = lambda: size


@pytest.fixture
def choose(monkeypatch):
    """`choose(ranks, wanted, videos, passes, fits)` for a model of 4 and 4 heads."""
    monkeypatch.setattr(mx.distributed, "all_min", lambda x, group: x)
    heads = [(4, 64 * 4), (8, 32 * 4)]

    def call(ranks, *asked, group_size=1):
        return parallel.choose(Ranks(ranks), *asked, heads, group_size)

    return call


def test_the_way_follows_from_what_is_asked(choose):
    assert choose(2, None, 3, 4, True) == "many"
    assert choose(4, None, 3, 4, True) == "passes"
    assert choose(2, None, 1, 1, True) == "shards"
    assert choose(2, None, 3, 4, False) == "shards"  # too large for one machine
    assert choose(2, "passes", 3, 4, True) == "passes"


@pytest.mark.parametrize(
    "asked, message",
    [
        ((2, "many", 1, 4, True), "there is one video"),
        ((2, "passes", 3, 1, True), "without guidance"),
        ((3, "shards", 1, 1, True), "cannot be cut into 3 parts"),
    ],
)
def test_a_way_that_shares_nothing_is_refused(choose, asked, message):
    with pytest.raises(UserError, match=message):
        choose(*asked)


def test_groups_of_quantised_weights_are_not_cut(choose):
    in_groups = lambda size: choose(4, "shards", 1, 1, True, group_size=size)
    assert in_groups(32) == "shards"
    with pytest.raises(UserError, match="cannot be cut"):
        in_groups(64)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
