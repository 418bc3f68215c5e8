"""Runs the programs as a user does: in a process of their own, in the folder of the recorded checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from golden_data import HERE

CHECKPOINT = "checkpoints/llava-v1.5-tiny-vicuna"
IMAGE = "images/grad_64x48.png"


def environment() -> dict[str, str]:
    root = str(HERE.parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run_python(*arguments: str, stdin: str = "", cwd: Path = HERE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=300,
    )


def run_llava(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return run_python("-m", "llava", *arguments, stdin=stdin)


def start_llava(arguments: Sequence[str], **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "llava", *arguments], cwd=HERE, env=environment(), **streams)
