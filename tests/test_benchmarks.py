"""The benchmarks count operations of released models without computing them."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest

from ltx2.layers import Attention

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import benchmark  # noqa: E402


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
