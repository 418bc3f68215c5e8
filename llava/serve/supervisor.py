"""Worker processes of one model on one machine, one for each GPU: start them, restart them, stop them.

In: the flags of `llava serve`. Out: running `llava worker` processes that register with the controller in this process
(serve.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llava.serve.http.flags import KEY_VARIABLE, WORKER_KEY_VARIABLE, ListenAddress

logger = logging.getLogger("llava.serve")

MAX_PAUSE_S = 60.0  # between starts of a worker that ends again and again
GOOD_RUN_S = 60.0  # a worker that ran so long is restarted after the shortest pause

# Flags of `llava serve` that are passed to the workers.
WORKER_FLAGS = (
    "model_path", "model_base", "conv_mode", "dtype", "limit_model_concurrency", "memory_fraction", "engine_process",
    "log_level", "drain_seconds", "max_body_mb", "max_held_mb", "max_images", "max_image_mb", "max_megapixels", "max_requests",
    "deadline", "image_timeout", "image_folder", "read_timeout",
)  # fmt: skip
WORKER_SWITCHES = ("load_8bit", "load_4bit", "no_image_urls", "allow_private_hosts", "strict")


def worker_command(args: Namespace, address: ListenAddress, name: str) -> list[str]:
    """Return the command line of a worker, without its device."""
    words = [sys.executable, "-m", "llava", "worker", "--port", "0", "--host", "127.0.0.1", "--model-name", name]
    words.append("--end-with-stdin")
    words += ["--controller-address", address.url]
    for flag in WORKER_FLAGS:
        value = getattr(args, flag)
        if value is not None:
            words += ["--" + flag.replace("_", "-"), str(value)]
    for adapter in args.adapter or ():
        words += ["--adapter", adapter]
    return words + ["--" + flag.replace("_", "-") for flag in WORKER_SWITCHES if getattr(args, flag)]


class Supervisor:
    """The worker processes. With the device `auto` or `cuda`, worker i sees the i-th GPU; all share any other device.

    `key` is the workers' key, by which they register and are asked; no other key opens them. They end with this process,
    however it ends, since their standard input does.
    """

    def __init__(self, command: list[str], num_workers: int, *, device: str, key: str) -> None:
        self._command = command
        self._num_workers = num_workers
        self._device = device
        self._key = key
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._supervise(number)) for number in range(self._num_workers)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for process in self._processes.values():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            await asyncio.gather(*(process.wait() for process in self._processes.values()))

    async def _supervise(self, number: int) -> None:
        """Start worker `number`, and restart it whenever it ends."""
        pause = 1.0
        while True:
            started = asyncio.get_running_loop().time()
            process = await asyncio.create_subprocess_exec(
                *self._command,
                "--device",
                self._device,
                env=self._environment(number),
                stdin=asyncio.subprocess.PIPE,
            )
            self._processes[number] = process
            status = await process.wait()
            ran_s = asyncio.get_running_loop().time() - started
            pause = 1.0 if ran_s > GOOD_RUN_S else min(2 * pause, MAX_PAUSE_S)
            logger.error("worker %d ended with status %d; starting it again in %.0f s", number, status, pause)
            await asyncio.sleep(pause)

    def _environment(self, number: int) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
        environment[WORKER_KEY_VARIABLE] = self._key
        if self._device in ("auto", "cuda"):
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            environment["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)] if visible else str(number)
        return environment
