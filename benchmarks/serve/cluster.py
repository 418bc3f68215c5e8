"""A controller and its workers as processes of their own, for load.py.

In: flags of workers. Out: their addresses, memory and metrics.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks import ROOT
from benchmarks.measure import process_memory


class ServerProcess:
    """A `llava` command, or a module of llava.serve, and the address that it prints after `word`."""

    def __init__(self, word: str, *arguments: str, module: str | None = None) -> None:
        program = ["llava", word] if module is None else [f"llava.serve.{module}"]
        self.popen = subprocess.Popen(
            [sys.executable, "-m", *program, "--log-level", "warning", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.address = ""
        found = threading.Event()

        def read() -> None:
            for line in iter(self.popen.stdout.readline, ""):  # type: ignore[union-attr]
                match = re.match(rf"{word} +(http\S+)", line)
                if match:
                    self.address = match[1]
                    found.set()

        threading.Thread(target=read, daemon=True).start()
        if not found.wait(180):
            self.stop(signal.SIGKILL)
            raise SystemExit(f"llava {word} did not start")

    @property
    def resident_mb(self) -> float:
        return process_memory(self.popen.pid, "VmRSS") / 2**20

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()


@dataclass
class Cluster:
    """A controller and its workers."""

    controller: ServerProcess
    workers: list[ServerProcess]
    arguments: list[str]
    model: str = ""

    @classmethod
    def start(cls, arguments: list[str], *, num_workers: int = 2) -> Cluster:
        controller = ServerProcess("controller", "--port", "0", "--deadline", "300")
        cluster = cls(controller, [], arguments)
        for _ in range(num_workers):
            cluster.add_worker()
        cluster.model = httpx.get(f"{controller.address}/v1/models", timeout=30).json()["data"][0]["id"]
        return cluster

    def add_worker(self) -> ServerProcess:
        worker = ServerProcess(
            "worker", "--port", "0", "--controller-address", self.controller.address, *self.arguments
        )
        self.workers.append(worker)
        wait_until(lambda: worker.address in self.registered(), "a worker to register")
        return worker

    def registered(self) -> set[str]:
        """Return the addresses of the workers that the controller knows, dead ones included until it notices."""
        page = httpx.get(f"{self.controller.address}/metrics", timeout=30).text
        return set(re.findall(r'^llava_worker_queue_length{worker="([^"]+)"}', page, flags=re.MULTILINE))

    def stop(self) -> None:
        for process in (*self.workers, self.controller):
            process.stop()


def wait_until(holds: Callable[[], Any], what: str, seconds: float = 120) -> float:
    """Wait until a condition holds; return the seconds that took."""
    started = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - started
        except httpx.HTTPError:
            pass
        if time.monotonic() - started > seconds:
            raise SystemExit(f"gave up waiting for {what} after {seconds:.0f} s")
        time.sleep(0.05)


def gauge(process: ServerProcess, name: str) -> float | None:
    """Return a value of the metrics page; None where the process has no such metric."""
    page = httpx.get(f"{process.address}/metrics", timeout=30).text
    found = re.search(rf"^{name} (\S+)", page, flags=re.MULTILINE)
    return float(found[1]) if found else None


def queue_length(worker: ServerProcess) -> int:
    """How many requests a worker has not finished."""
    return int(httpx.post(f"{worker.address}/worker_get_status", timeout=30).json()["queue_length"])


def requests_finished(worker: ServerProcess) -> int:
    return int(gauge(worker, r'llava_requests_total\{end="finished"\}') or 0)
