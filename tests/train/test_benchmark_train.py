"""The training benchmarks: that of shapes runs, small, and reports both sides; that of the recipe reads logs rightly."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from golden_data import HERE
from train_kit import argv

from benchmarks.train import profile_steps, single_gpu
from llava.train.arguments import TrainingArguments, parse_train_args


@pytest.mark.slow
def test_every_measurement_has_a_figure_of_each_side(capsys: pytest.CaptureFixture) -> None:
    single_gpu.main(["--tiny", "--eager", "--steps", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert not [line for line in lines if "error" in line]
    figures = {(line["what"], line["side"]): line for line in lines if "side" in line}
    measured = ("train_full", "train_mixed", "train_projector", "train_lora")
    assert set(figures) == {(what, side) for what in measured for side in ("stock", "ours")}


def test_the_same_work_is_counted_on_both_sides() -> None:
    device = torch.device("cpu")
    bench = single_gpu.TrainBench(single_gpu.TINY, device, keeps=[0.3], keeps_frozen=[1.0], steps=1)
    samples = single_gpu.realistic(single_gpu.TINY)
    stock, ours = (
        bench.flops(side(single_gpu.TINY, device), samples, per_weight=6) for side in single_gpu.SIDES.values()
    )
    assert stock == ours > 0


def test_realistic_lengths_fill_packed_rows() -> None:
    samples = single_gpu.realistic(single_gpu.FULL)
    lengths = [s.text + s.image * single_gpu.FULL.image_tokens for s in samples]
    assert min(s.text for s in samples) >= 20
    assert max(s.text for s in samples) <= 2048
    assert sum(not s.image for s in samples) == round(0.06 * len(samples))
    rows = single_gpu.plan_sequences(lengths, single_gpu.FULL.row, seed=0)
    assert sum(lengths) > 0.8 * len(rows) * single_gpu.FULL.row


def test_the_recipe_s_benchmark_counts_what_follows_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    bench = importlib.import_module("benchmarks.train.tiny_recipe")
    runs: list[TrainingArguments] = []

    def run(command: list[str]) -> float:
        """In place of a run: a log whose first lines are slow, and whose last line has no speed."""
        *_, training = parse_train_args(command[3:])
        runs.append(training)
        names = ("tokens_per_second", "padding", "data_wait", "memory_gib")
        speeds = [(1, 5.0), (2, 40.0), (3, 42.0), (4, 50.0)]
        lines = [{"step": step, "images_per_second": speed, **dict.fromkeys(names, 1.0)} for step, speed in speeds]
        Path(training.output_dir, "trainer_state.json").write_text(
            json.dumps({"log_history": [*lines, {"step": 4, "train_runtime": 9.0}]})
        )
        return 12.0

    monkeypatch.setattr(bench, "run", run)
    for flags in bench.ways(bench.CPU, on_gpu=True).values():
        figures = bench.measure(flags, bench.CPU, tmp_path, tmp_path)
        assert (figures["images_per_second"], figures["seconds"]) == (42.0, 12.0)
    padded, packed, compiled = runs
    assert not padded.packing
    assert padded.group_by_modality_length
    assert padded.per_device_train_batch_size == bench.CPU.batch
    assert packed.packing
    assert compiled.packing
    assert (packed.compile_layers, compiled.compile_layers) == (False, True)


def test_single_steps_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(HERE)
    profile_steps.main(
        ["--at", "2", "--steps", "1", "--out", str(tmp_path / "out"), "--", *argv(tmp_path / "run", max_steps=4)]
    )
    times, figures = (json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:])
    assert len(times["milliseconds"]) == 2
    assert min(times["milliseconds"]) > 0
    assert figures["host_operations"] > 500
    assert "aten::mm" in (tmp_path / "out" / "operations.txt").read_text()
    trace = gzip.decompress((tmp_path / "out" / "trace.json.gz").read_bytes())
    assert sum("backward" in event.get("name", "").lower() for event in json.loads(trace)["traceEvents"]) > 20
    assert not list((tmp_path / "run").glob("*.safetensors"))
    with pytest.raises(SystemExit, match="the run ended after 4 steps"):
        profile_steps.main(["--at", "9", "--", *argv(tmp_path / "run", max_steps=4)])


def test_time_in_which_a_gpu_is_busy_counts_once() -> None:
    assert profile_steps.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert profile_steps.covered([]) == 0
