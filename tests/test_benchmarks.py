"""The benchmarks count operations of released models without computing them."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ltx2.layers import Attention

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import benchmark  # noqa: E402


def test_benchmarks_need_only_what_the_readme_installs():
    names = ", ".join(sorted(p.stem for p in ROOT.glob("benchmarks/*.py")))
    code = f"import sys; sys.path[:0] = ['benchmarks', 'tests']; sys.modules['pytest'] = None; import {names}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_flops_of_attention_are_counted():
    tokens, width = 10, 64
    attention = Attention(width, heads=2, head_dim=32)
    with benchmark.flops() as count:
        attention(mx.zeros((1, tokens, width)))
    # Four projections, queries with keys, weights with values.
    expected = 4 * 2 * tokens * width**2 + 2 * 2 * tokens**2 * width
    assert sum(count) == expected


@pytest.mark.parametrize("name", ["ltx-2-19b-dev", "ltx-2.3-22b"])
def test_a_step_of_four_passes_costs_at_most_3_4_forwards(name):
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert 3 < benchmark.guided_ratio(name, (768, 512, 121)) < 3.4
    assert mx.get_peak_memory() - before < 1e9  # no weights are made


def test_compared_functions_run_alternately():
    order = []
    watch = lambda name: lambda: order.append(name) or mx.zeros(1)
    found = benchmark.measure(3, a=watch("a"), b=watch("b"))
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]  # the first pair warms up
    assert found.keys() == {"a", "b"} and found["a"][0] > 0


def test_the_bytes_that_machines_exchange_are_counted():
    size, tokens, sound = (768, 512, 121), 16 * 16 * 24, 126
    sent = benchmark.exchanged("ltx-2-19b-dev", size, machines=4)
    ring = 1.5  # times the bytes to be summed
    # Velocities of four passes, in float32.
    velocities = 4 * 4 * 128 * (tokens + sound)
    assert sent["passes"] == pytest.approx(ring * velocities)
    # Outputs of four layers per stream and block, in 3.04 to 3.4 passes, and the norms.
    outputs = 48 * 4 * 2 * (4096 * tokens + 2048 * sound)
    assert 3.04 < sent["shards"] / (ring * outputs) < 3.4


def test_attention_is_measured_by_its_longest_command(monkeypatch):
    monkeypatch.setattr(benchmark, "MAX_FLOPS", 4 * 64 * 32 * 16)  # 16 queries
    found = benchmark.longest_attention(mx.float32, 1, tokens=64, heads=2, dim=16)
    assert found["measured_queries"] == 16
    # 64 queries are four commands.
    assert found["layer"] == pytest.approx(4 * found["longest_command"])


def test_peaks_are_compared_with_the_plan(checkpoint):
    paths = [str(checkpoint(name)) for name in ("ltx-2.3", "gemma3", "spatial-x2")]
    shares = benchmark.against_plan(*paths, "float32", (128, 128, 9))
    assert shares.keys() == {"text", "stage1", "stage2", "video"}
    assert all(0.5 < share < 2 for share in shares.values())


def test_decodes_with_and_without_tf32_are_compared(monkeypatch):
    seen = []

    def run(command, env, check):
        *_, path, _, _ = command
        seen.append(env["MLX_ENABLE_TF32"])
        np.save(path, np.full(9, 0.01 * (env["MLX_ENABLE_TF32"] == "1")))

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    assert benchmark.tf32_decibels(8, 2) == pytest.approx(40)
    assert seen == ["0", "1"]


def test_the_last_line_is_for_the_readmes_table(monkeypatch, capsys):
    block = {"seconds": 1.5, "utilization": 0.5, "measured": "64x64x9"}
    attention = {"layer": 4, "longest_command": 0.5, "flops": 1e12}
    attention["measured_queries"] = 8
    for name, value in (
        ("released_block", block),
        ("longest_attention", attention),
        ("against_plan", {"text": 0.9, "video": 1.1}),
        ("tf32_decibels", float("inf")),
    ):
        monkeypatch.setattr(benchmark, name, lambda *_, value=value: value)
    args = Namespace(dtype=["bfloat16", "float16"], bits=4, size="64x64x9", long=False)
    args.runs = args.target_seconds = 1
    benchmark.short(args, (64, 64, 9), lambda *_, **__: "")
    *_, heads, rule, line = capsys.readouterr().out.splitlines()
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"{heads}\n{rule}\n" in readme
    assert line.endswith("| 50% / 50% | 4 / 4 | 0.5 / 0.5 | 0.90 to 1.10 | inf |")
