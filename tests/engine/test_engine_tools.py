"""What measures the engine runs: `llava bench`, and the benchmarks on small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import CHECKPOINT, environment, run_llava

ROOT = Path(__file__).resolve().parents[2]


def test_bench_measures_a_model() -> None:
    done = run_llava(
        "bench", "-m", CHECKPOINT, "--device", "cpu", "--sequences", "1,2", "--new-tokens", "6", "--runs", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [rate["num_sequences"] for rate in report["rates"]] == [1, 2]
    assert all(rate["tokens_per_s"] > 0 and rate["limit_tokens_per_s"] > 0 for rate in report["rates"])
    assert report["num_prompt_tokens"] == 58 + 16  # words and the image's features
    assert report["first_token_s"] > 0
    assert report["weight_bytes"] > 0


def test_bench_refuses_what_it_cannot_measure() -> None:
    done = run_llava("bench", "--sequences", "1,none")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "llava bench: error: --sequences is '1,none'; give numbers from 1, separated by commas, such as 1,8,64\n"
    )
    assert "weights is 'int5'" in run_llava("bench", "--weights", "int5").stderr


def run_benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.engine.{name}", "--tiny", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**environment(), **{name: value for name, value in os.environ.items() if name.startswith("OMP")}},
        timeout=300,
    )


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_small_shapes(tmp_path: Path) -> None:
    done = run_benchmark(
        "gpu", "--only", "correct,first,followup,decode,mixed,anyres,rounded,many", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if "error" in row], rows
    told = {row["what"] for row in rows if "what" in row}
    assert {
        "first token",
        "follow-up first token",
        "decode 8",
        "mixed 512",
        "anyres first token",
        "int8 decode 1",
    } <= told
    assert "| decode 8 | tok/s |" in (tmp_path / "engine.md").read_text()


@pytest.mark.slow
def test_the_benchmark_of_onevision_runs_on_small_shapes() -> None:
    done = run_benchmark("onevision")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if "error" in row or "skipped" in row], rows
    figures = {row["what"]: row["v"] for row in rows if "v" in row}
    assert figures["image: tokens as model.generate, of 8"] == figures["video: tokens as model.generate, of 8"] == 8
    both = {"image first token", "video first token", "decode 1", "decode 8", "mixed"}
    assert both | {f"stock {what}" for what in both} <= figures.keys()


@pytest.mark.slow
def test_the_cpu_benchmark_runs() -> None:
    done = run_benchmark("cpu", "--forms", "float32")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| float32")]
    assert [line.split(" | ")[1] for line in lines] == ["1", "2"]
