"""The training benchmark runs, on small shapes, and reports both sides of each figure."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "train.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_train", module)  # dataclasses look their module up
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def test_every_measurement_has_a_figure_of_each_side(benchmark: Any, capsys: pytest.CaptureFixture) -> None:
    benchmark.main(["--tiny", "--eager", "--steps", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not [line for line in lines if "error" in line]
    figures = {(line["what"], line["side"]): line for line in lines if "side" in line}
    measured = ("train_full", "train_mixed", "train_projector", "train_lora")
    assert set(figures) == {(what, side) for what in measured for side in ("stock", "ours")}


def test_the_same_work_is_counted_on_both_sides(benchmark: Any) -> None:
    device = torch.device("cpu")
    bench = benchmark.Bench(benchmark.TINY, device, [0.3], 1)
    samples = benchmark.realistic(benchmark.TINY)
    stock, ours = (
        bench.flops(side(benchmark.TINY, device), samples, per_weight=6) for side in benchmark.SIDES.values()
    )
    assert stock == ours > 0


def test_realistic_lengths_fill_packed_rows(benchmark: Any) -> None:
    samples = benchmark.realistic(benchmark.FULL)
    lengths = [s.text + s.image * benchmark.FULL.image_tokens for s in samples]
    assert min(s.text for s in samples) >= 20
    assert max(s.text for s in samples) <= 2048
    assert sum(not s.image for s in samples) == round(0.06 * len(samples))
    rows = benchmark.plan_rows(lengths, benchmark.FULL.row, seed=0)
    assert sum(lengths) > 0.8 * len(rows) * benchmark.FULL.row
