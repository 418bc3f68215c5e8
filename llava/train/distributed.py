"""Facts about this process of a distributed run that need no torch: the program's name; and the shutdown at its end."""

from __future__ import annotations

import gc
import importlib.util
import os

from llava.cli.program import called_as


def program_name() -> str:
    """Return the name by which the user called the training program."""
    return called_as("llava train")


def import_collectives() -> None:
    """Import the modules that take the default process group as a default argument, while there is no group.

    Imported later (torch and accelerate do so by themselves) they would hold the group for the life of the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        importlib.import_module("torch.distributed.nn.functional")
        if importlib.util.find_spec("deepspeed"):
            importlib.import_module("deepspeed.comm")


def barrier_and_destroy_process_group() -> None:
    """Wait for all ranks, then destroy the process group. The caller must have dropped the trainer.

    A thread of a gloo group that drops a finished operation while the interpreter exits needs the interpreter's lock and
    aborts the process ("terminate called without an active exception"). Two things prevent it: the group is freed here,
    with its threads, where nothing else holds it (DeepSpeed's engine does, through hooks); and the barrier is the one
    that gloo runs in this thread.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return
    gc.collect()  # the trainer, which is part of reference cycles
    if dist.get_backend() == dist.Backend.GLOO:
        dist.monitored_barrier()
    else:
        on_gpu = dist.get_backend() == dist.Backend.NCCL
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)
    dist.destroy_process_group()
