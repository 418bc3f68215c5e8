"""What a process of a training run knows of itself before anything is imported: how it was called, and its rank; and how
the processes part at its end."""

from __future__ import annotations

import os
from typing import Any

from llava.cli.program import called_as


def program_name() -> str:
    """The name by which the user called the training program."""
    return called_as("llava train")


def is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def rank0_print(*args: Any) -> None:
    """Print on the first process of a distributed run only."""
    if is_first_process():
        print(*args)


def barrier_and_destroy_process_group() -> None:
    """End the group of a distributed run's processes, once all of them are done.

    A process that ends while its group's threads still run may be aborted by them, after everything was saved.
    """
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        on_gpu = dist.get_backend() == dist.Backend.NCCL
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)
        dist.destroy_process_group()
