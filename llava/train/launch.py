"""What a process of a training run knows of itself before anything is imported: how it was called, and its rank."""

from __future__ import annotations

import os
from typing import Any

from llava.program import called_as


def program_name() -> str:
    """The name by which the user called the training program."""
    return called_as("llava train")


def is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def rank0_print(*args: Any) -> None:
    """Print on the first process of a distributed run only."""
    if is_first_process():
        print(*args)
