"""The proof under load in small: `benchmarks/serve/load.py` with few clients, which fails where a promise is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cli_kit import environment
from serve_kit import ROOT


@pytest.mark.slow
def test_many_clients_kills_and_malformed_requests_lose_nothing() -> None:
    """A controller and two workers as processes: none lost or mixed up, each killed once with -9, no server fault."""
    parts = ["concurrent", "kill", "controller", "malformed"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.serve.load",
        "--device",
        "cpu",
        "--clients",
        "10",
        "--malformed",
        "150",
    ]
    command += [word for part in parts for word in ("--only", part)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10" in done.stdout
    assert "| ended without a message | 0 |" in done.stdout
    assert done.stdout.count("\n## ") == len(parts)


@pytest.mark.slow
def test_the_cost_of_http_is_measured_and_drawn(tmp_path: Path) -> None:
    """Every way at every level, asked by processes of their own; a request that is not answered in full ends the program."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.serve.load",
        "--device",
        "cpu",
        "--only",
        "overhead",
        "--shapes",
        "tiny",
    ]
    command += ["--levels", "1,3", "--image-levels", "1", "--least", "1", "--tokens", "3", "--rounds", "1"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in (tmp_path / "serve_overhead.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 3", "| 1, a new image each"]
    drawn = ElementTree.parse(tmp_path / "serve_overhead.svg").getroot()
    lines = drawn.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [
        2
    ] * 5  # three ways of requests, two of first tokens
