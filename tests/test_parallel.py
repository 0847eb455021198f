"""Distributed generation: same latents, sharded weights, one failure ends all machines.

Machines are processes here. Run as a script, this file is one of them.
"""

import gc
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

pytestmark = [
    pytest.mark.cpu,  # machines are processes with one GPU
    pytest.mark.usefixtures("quick_rounding"),
]
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the started processes

from ltx2 import conversion, outputs, parallel, pipeline, weights  # noqa: E402
from ltx2.base import UserError  # noqa: E402
from ltx2.request import LoraFile, Request  # noqa: E402

LAUNCH = [str(Path(sys.executable).parent / "mlx.launch"), "--backend", "ring"]
GUIDED = dict(cfg_scale=3.0, stg_scale=1.0, stg_blocks=(2,), modality_scale=3.0)


def run(case: dict, group=None) -> dict:
    """Run one case on this rank: latents by video and stream, bytes of the blocks."""
    pipe = pipeline.load(
        case["model"],
        case["encoder"],
        case["kind"],
        "float32",
        low_memory=case.get("low_memory"),
        group=group,
        parallel=case.get("parallel"),
    )
    loras = tuple(LoraFile(path, 0.7) for path in case.get("loras", ()))
    guidance = dict(video_guidance=GUIDED) if case["kind"] == "dev" else {}
    size = dict(height=64, width=64, num_frames=9, sigmas=(1.0, 0.7, 0.0))
    more = guidance | case.get("more", {})
    requests = [
        Request(
            "a cat", seed=seed, no_audio=bool(case.get("silent")), loras=loras, **size
        )
        for seed in range(case.get("videos", 1))
    ]
    requests = [Request(**{**vars(r), **more}) for r in requests]
    jobs = [pipe.plan(r) for r in requests]
    contexts = drawn_contexts([text for job in jobs for text in job.texts])
    if case.get("encodes"):  # on the first machine, whose contexts all others use
        seed, contexts = 0 if group is None else group.rank(), None
        pipe.encode_prompts = lambda prompts, trace: drawn_contexts(prompts, seed)
    gc.collect()  # of the last case
    held, latents = mx.get_active_memory(), {}
    found = {"drawn": pipe.plan(replace(requests[0], seed=None)).request.seed}
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
    return dict(found, latents=latents, mode=pipe.machines.mode)


def drawn_contexts(prompts: list[str], seed: int = 0) -> dict:
    """Short random contexts, instead of the text encoder's."""
    mx.random.seed(seed)
    draw = lambda: mx.random.normal((1, 8, 128))
    return {prompt: (draw(), draw()) for prompt in prompts}


def worker(folder: Path) -> None:
    group = mx.distributed.init()
    for case in json.loads((folder / "cases.json").read_text()):
        found = run(case, group)
        name = f"{case['name']}.{group.rank()}.safetensors"
        mx.save_safetensors(str(folder / name), found.pop("latents"))
        (folder / f"{name}.json").write_text(json.dumps(found))


@contextmanager
def launch(ranks: int, *command: str):
    """A Python program on several machines, killed at the end."""
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
    timer = threading.Timer(600, os.killpg, (launched.pid, signal.SIGKILL))
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


def start_on_ring(ranks: int, folder: Path, *command: str, **options) -> list:
    """Start a Python program on several machines, like mlx.launch, but without its own
    process and with fewer threads: what waits would keep the cores of a small computer
    busy."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "MLX_HOSTFILE": str(hosts)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | one_thread | {"MLX_RANK": str(rank)},
            **options,
        )
        for rank in range(ranks)
    ]


def run_on_ring(ranks: int, folder: Path, *command: str, **options):
    """What a program prints on several machines, and their exit codes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = start_on_ring(ranks, folder, *command, **pipes, **options)
    printed = [process.communicate(timeout=600)[0] for process in started]
    return "".join(printed), [process.returncode for process in started]


@pytest.fixture(scope="module")
def cases(checkpoint, tmp_path_factory):
    """The cases that run on two and on four machines; the model has 4 heads."""
    sizes = {
        "num_layers": 3,
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
    # Machines that wait for each other spin, on a small computer for long: those that
    # share each layer have one step, four of them one block.
    one_block = checkpoint("ltx-2.3", transformer=sizes | {"num_layers": 1})
    in_4_bits = tmp_path_factory.mktemp("converted") / "model"
    how = conversion.quantization(group_size=32)
    conversion.Conversion(weights.open_model(str(model)), how).write(in_4_bits)
    in_4_bits = str(in_4_bits)
    dev, distilled = dict(kind="dev"), dict(kind="distilled")
    shared = dict(parallel="tensor", more=dict(sigmas=(1.0, 0.0)))
    listed = dict(
        data=dict(distilled, videos=3, silent=True, parallel="data", encodes=True),
        passes=dict(dev, parallel="passes", loras=[lora]),
        cached=dict(dev, parallel="passes", model=in_4_bits, more=dict(step_cache=0.9)),
        tensor=dict(shared | distilled),
        streamed=dict(shared | dev, loras=[lora], low_memory=True),
        tensor_4_bits=dict(shared | distilled, model=in_4_bits, loras=[lora]),
        one_block=dict(shared | distilled, model=str(one_block)),
    )
    # Two steps: the blocks are read again
    listed["streamed"]["more"] = dict(sigmas=(1.0, 0.5, 0.0), nag_scale=5.0)
    files = dict(model=str(model), encoder=str(checkpoint("gemma3")))
    return [dict(files, name=name, **case) for name, case in listed.items()]


@pytest.fixture(scope="module")
def alone(cases):
    """The results of one machine by case."""
    return {case["name"]: run(dict(case, parallel=None)) for case in cases}


CASES = {  # by the number of machines
    2: "data passes cached tensor streamed tensor_4_bits".split(),
    4: ["passes", "one_block"],
}


@pytest.fixture(scope="module", params=[2, 4])
def together(request, cases, tmp_path_factory):
    """The number of machines, and the results of each by case."""
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    cases = [case for case in cases if case["name"] in CASES[ranks]]
    (folder / "cases.json").write_text(json.dumps(cases))
    started = start_on_ring(ranks, folder, __file__, str(folder))
    assert [process.wait(timeout=600) for process in started] == [0] * ranks
    found = {}
    for case in cases:
        for rank in range(ranks):
            path = folder / f"{case['name']}.{rank}.safetensors"
            values = json.loads(path.with_name(path.name + ".json").read_text())
            latents = mx.load(str(path), "safetensors")
            found[case["name"], rank] = dict(values, latents=latents)
    return ranks, found


def test_the_first_machine_gets_the_latents_of_a_single_machine(cases, alone, together):
    ranks, found = together
    for case in (c for c in cases if (c["name"], 0) in found):
        expected, actual = alone[case["name"]], found[case["name"], 0]
        assert actual["mode"] == case["parallel"]
        assert expected["latents"].keys() == actual["latents"].keys() != set()
        for k, x in expected["latents"].items():
            error = mx.abs(x - actual["latents"][k]).max() / mx.abs(x).max()
            assert error < 1e-4, (case["name"], k)


def test_machines_draw_the_same_seeds(cases, together):
    ranks, found = together
    names = {name for name, _ in found}
    drawn = [{found[name, rank]["drawn"] for rank in range(ranks)} for name in names]
    assert all(len(seeds) == 1 for seeds in drawn) and len(set.union(*drawn)) > 1


def test_a_machine_holds_only_its_part_of_the_blocks(alone, together):
    ranks, found = together
    for name, rank in found:
        if name in ("tensor", "tensor_4_bits", "one_block"):
            whole, part = alone[name], found[name, rank]
            assert part["blocks"] < (1 / ranks + 0.1) * whole["blocks"]
            if name != "tensor_4_bits":  # (MLX copies no slice of less than 16 KiB)
                spared = (1 - 1 / ranks - 0.1) * whole["blocks"]
                assert part["held"] < whole["held"] - spared


def test_sharded_blocks_are_streamed_with_low_memory(together):
    ranks, found = together
    if ranks == 2:
        streamed, held = (found[k, 0]["held"] for k in ("streamed", "tensor"))
        assert streamed < held


def test_three_videos_are_shared_by_two_machines(together):
    ranks, found = together
    if ranks == 2:
        steps = [found["data", rank]["steps"] for rank in range(ranks)]
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
    load.encode_prompts = lambda prompts, trace: drawn_contexts(prompts)
    request = Request("a cat", height=64, width=64, num_frames=9, sigmas=(1.0, 0.0))
    assert any(event.phase == "stage1" for event in load.stream(request))
    return "--cache-contexts", str(folder)


def processes(marker: str) -> list[int]:
    """Running processes with this in their command line."""
    if Path("/proc/self/cmdline").exists():  # ps may be missing
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


def test_all_machines_end_and_leave_no_file_if_one_dies(command, contexts, tmp_path):
    output = tmp_path / "out.mp4"
    flags = "--dtype", "float32", "--output", str(output), "--parallel", "passes"
    with launch(2, *command, *contexts, *flags) as launched:
        while "/500" not in (line := launched.stdout.readline()):
            assert line
        running = processes(str(output))
        assert len(running) == 2
        os.kill(max(running), signal.SIGKILL)
        launched.stdout.read()  # until the end (mlx.launch spins if stdin is closed)
        launched.wait()
        assert not processes(str(output))
    # Rank 0 may be killed too while it waits: its lock is free, and the next run removes
    # its partial folder.
    kept = r"out\.latents\.safetensors|\.out\.mp4(-\w+\.partial|\.lock)"
    assert all(re.fullmatch(kept, path.name) for path in tmp_path.iterdir())
    assert not outputs.is_claimed(str(output))


def test_a_mistake_is_told_and_ends_all(command, tmp_path, tmp_path_factory):
    flags = "--output", str(tmp_path / "out.mp4"), "--parallel", "data"
    hosts = tmp_path_factory.mktemp("hosts")
    printed, codes = run_on_ring(2, hosts, *command, *flags, cwd=ROOT)
    assert "--parallel data needs more than one video" in printed
    assert codes == [2, 2]
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


class Ranks:
    """A group of which only the size and the rank are used."""

    def __init__(self, size):
        self.size, self.rank = lambda: size, lambda: 0


@pytest.fixture
def choose(monkeypatch):
    """`choose(ranks, mode, videos, passes, fits)` for a model of 4 and 8 heads."""
    monkeypatch.setattr(mx.distributed, "all_min", lambda x, group: x)
    config = SimpleNamespace(
        num_attention_heads=4,
        audio_num_attention_heads=8,
        video_dim=64 * 4,
        audio_dim=32 * 4,
    )

    def call(ranks, mode, *work, group_size=1):
        machines = parallel.Machines(Ranks(ranks), mode)
        machines.split(*work, config, group_size)
        return machines.mode

    return call


def test_the_mode_follows_from_the_work(choose):
    assert choose(2, None, 3, 4, True) == "data"
    assert choose(4, None, 3, 4, True) == "passes"
    assert choose(2, None, 1, 1, True) == "tensor"
    assert choose(2, None, 3, 4, False) == "tensor"  # too large for one machine
    assert choose(2, "passes", 3, 4, True) == "passes"


def test_earlier_names_of_the_modes_are_accepted(choose):
    assert choose(2, "many", 3, 4, True) == "data"
    assert choose(2, "shards", 3, 4, True) == "tensor"


@pytest.mark.parametrize(
    "work, message",
    [
        ((2, "data", 1, 4, True), "needs more than one video"),
        ((2, "passes", 3, 1, True), "needs guidance"),
        ((3, "tensor", 1, 1, True), "cannot divide 4 and 8 heads among 3 machines"),
    ],
)
def test_a_mode_that_splits_nothing_is_refused(choose, work, message):
    with pytest.raises(UserError, match=message):
        choose(*work)


def test_groups_of_quantized_weights_are_not_divided(choose):
    in_groups = lambda size: choose(4, "tensor", 1, 1, True, group_size=size)
    assert in_groups(32) == "tensor"
    with pytest.raises(UserError, match="cannot divide"):
        in_groups(64)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    worker(Path(sys.argv[1]))


def operations(*arrays: mx.array) -> set[str]:
    """What is still to compute."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return set(re.findall(r'label ="(\w+)"', graph.getvalue()))


def test_no_gpu_waits_for_another_machine(monkeypatch):
    group, sums = mx.distributed.init(), []

    def all_sum(x, group):
        sums.append(operations(x))
        return x + 1  # not evaluated

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    tokens = [SimpleNamespace(latent=mx.zeros((1, n, 3))) for n in (4, 5)]
    passes = parallel.PassParallel(Velocities(), group)
    found = passes(*tokens, [], [None, None])
    assert sums == [set(), set()]  # all inputs of the exchange were evaluated
    assert operations(*(v for pair in found for v in pair)) <= {"Split", "Squeeze"}


class Velocities:
    """A transformer that computes ones."""

    config = SimpleNamespace(out_channels=3, audio_out_channels=2)

    def __call__(self, video, audio, texts, passes, trace):
        return [(mx.ones((1, 4, 3)), mx.ones((1, 5, 2)))] * len(passes)


@pytest.mark.parametrize("mode, waits", [("tensor", 1), ("passes", 1), ("data", 0)])
def test_machines_of_the_same_step_wait_until_all_have_read(monkeypatch, mode, waits):
    sums = []
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group: sums.append(x) or x)
    machines = parallel.Machines(mx.distributed.init())
    machines.mode = mode
    machines.wait()
    assert len(sums) == waits
