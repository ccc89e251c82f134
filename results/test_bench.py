"""Test of bench.py. Run: pytest"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_opsdc import TOY, call, table

BENCHMARKS = table("""loss --tokens 40 --hidden 16 --vocabulary 900 --rounds 1 => plain
    memory --sizes {} --ranks 2 --micro 4 => backward
    step --config {} --flags=--max_new_tokens=5 => --offload
    rollout --config {} --prompt_tokens 9 --new_tokens 5 --rows 1 3 => 3 rows""")


@pytest.mark.parametrize("command, shown", BENCHMARKS)
def test_every_benchmark_runs_with_tiny_shapes(monkeypatch, command, shown):
    from results import bench

    monkeypatch.setattr("results.simulate.TOKENS", 99)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", ThreadPoolExecutor)  # starts at once
    assert shown in call(bench, *command.format(TOY / "config.json").split())
