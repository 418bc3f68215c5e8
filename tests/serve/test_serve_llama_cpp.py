"""A worker in front of a real llama.cpp server; skipped where its program is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from cli_kit import environment
from serve_kit import ROOT

LLAMA_SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


@pytest.mark.skipif(LLAMA_SERVER is None, reason="set LLAMA_SERVER to llama.cpp's program llama-server")
def test_every_client_gets_what_llama_cpp_says_and_its_end_in_words() -> None:
    command = [sys.executable, "-m", "benchmarks.serve.llama_cpp", str(LLAMA_SERVER)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("15 of 15") == 3
