"""The proof under load in small: `benchmarks/serve.py` with few clients, which fails where a promise is broken."""

from __future__ import annotations

import subprocess
import sys

from cli_kit import environment
from serve_kit import ROOT


def test_crowds_kills_and_malformed_requests_lose_nothing() -> None:
    """A controller and two workers as processes: none lost or mixed up, each killed once with -9, no server fault."""
    parts = ["crowd", "kill", "controller", "malformed"]
    command = [sys.executable, "benchmarks/serve.py", "--device", "cpu", "--clients", "24", "--malformed", "400"]
    command += [word for part in parts for word in ("--only", part)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 of 24" in done.stdout
    assert "| ended without a word | 0 |" in done.stdout
    assert done.stdout.count("\n## ") == len(parts)
