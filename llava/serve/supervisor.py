"""Several workers of one model on one machine, a process and a GPU for each, behind a controller in this process.

In: the flags of `llava serve`. Out: a server that passes requests on to its workers, starts them, starts them again when they
die, and stops them when it stops.
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

from llava.conversation import get_model_name_from_path
from llava.serve.http.flags import KEY_VARIABLE, Place
from llava.serve.router.dispatch import Dispatcher
from llava.serve.router.routes import ControllerApi, controller_app
from llava.serve.serve import PAGE_PATH, open_house

logger = logging.getLogger("llava.serve")

LONGEST_PAUSE_S = 60.0  # between starts of a worker that dies again and again
GOOD_RUN_S = 60.0  # a worker that lived so long is started again at once

# Flags that a worker gets as they were given here.
PASSED_ON = (
    "model_path", "model_base", "conv_mode", "dtype", "limit_model_concurrency", "memory_fraction", "engine_process",
    "log_level", "drain_seconds", "max_body_mb", "max_held_mb", "max_images", "max_image_mb", "max_megapixels", "max_requests",
    "deadline", "image_timeout", "image_folder",
)  # fmt: skip
SWITCHES = ("load_8bit", "load_4bit", "no_image_urls", "allow_private_hosts")


def serve_fleet(args: Namespace, place: Place, *, with_page: bool) -> int:
    name = args.model_name or get_model_name_from_path(str(args.model_path))
    api = ControllerApi(Dispatcher(), key=place.key, deadline_s=args.deadline)
    fleet = Fleet(worker_command(args, place, name), args.num_workers, device=args.device, key=place.key)
    app, guarded = controller_app(api, place.door, lifespans=[fleet.lifespan], open_paths=[f"{PAGE_PATH}/"])
    return open_house(app, guarded, args, place, model=name, with_page=with_page)


def worker_command(args: Namespace, place: Place, name: str) -> list[str]:
    words = [sys.executable, "-m", "llava", "worker", "--port", "0", "--host", "127.0.0.1", "--model-name", name]
    words += ["--controller-address", place.address]
    for flag in PASSED_ON:
        value = getattr(args, flag)
        if value is not None:
            words += ["--" + flag.replace("_", "-"), str(value)]
    return words + ["--" + flag.replace("_", "-") for flag in SWITCHES if getattr(args, flag)]


class Fleet:
    """The processes. On GPUs, worker number i sees the i-th of them; a device that was named otherwise is for all."""

    def __init__(self, command: list[str], num_workers: int, *, device: str, key: str | None) -> None:
        self._command = command
        self._num_workers = num_workers
        self._device = device
        self._key = key
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._keep(number)) for number in range(self._num_workers)]
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

    async def _keep(self, number: int) -> None:
        """Start worker `number`, and start it again whenever it ends."""
        pause = 1.0
        while True:
            started = asyncio.get_running_loop().time()
            process = await asyncio.create_subprocess_exec(
                *self._command,
                "--device",
                self._device,
                env=self._environment(number),
                stdin=asyncio.subprocess.DEVNULL,
            )
            self._processes[number] = process
            status = await process.wait()
            lived = asyncio.get_running_loop().time() - started
            pause = 1.0 if lived > GOOD_RUN_S else min(2 * pause, LONGEST_PAUSE_S)
            logger.error("worker %d ended with status %d; starting it again in %.0f s", number, status, pause)
            await asyncio.sleep(pause)

    def _environment(self, number: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self._key:
            environment[KEY_VARIABLE] = self._key
        if self._device in ("auto", "cuda"):
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            environment["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)] if visible else str(number)
        return environment
