"""Time from the start of `llava chat IMAGE QUESTION` to the first character of its answer, and to the end of the process.

In: nothing but the package and its embedded model. Out: a table (results/first_token.md) of fresh processes, with files in
the page cache after a first run that is not counted.

    python -m benchmarks.cli.first_token [--runs 10]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

from benchmarks import ROOT
from benchmarks.measure import table

QUESTION = "What do you see in this picture?"


def run_once() -> tuple[float, float]:
    """Seconds to the first character, and to the end."""
    command = [sys.executable, "-m", "llava", "chat", "images/demo.jpg", QUESTION]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        to_first = time.perf_counter() - started
        process.stdout.read()
    if process.returncode != 0 or not first:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return to_first, time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args(argv)
    run_once()
    runs = [run_once() for _ in range(args.runs)]
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    print(f"Python {platform.python_version()}, {versions}, {os.cpu_count()} CPU cores, {args.runs} runs\n")
    named = zip(("first character", "end of the process"), zip(*runs, strict=True), strict=True)
    rows = [(name, *(f"{value:.2f}" for value in (statistics.median(v), min(v), max(v)))) for name, v in named]
    print(table(("seconds from process start", "median", "least", "most"), rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
