"""Real servers for tests, on ports that the system picks: in threads of the test's process, or in processes of their own."""

from __future__ import annotations

import base64
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from cli_kit import environment

from llava.serve.apis import SCHEMAS, model_routes
from llava.serve.backends.base import Backend
from llava.serve.backends.in_process import EngineBackend
from llava.serve.http.app import make_app
from llava.serve.http.connections import protocol_class
from llava.serve.http.limits import ServeLimits
from llava.serve.http.middleware import AccessPolicy
from llava.serve.http.server import bind
from llava.serve.router.dispatch import Dispatcher
from llava.serve.router.heartbeat import Heartbeat
from llava.serve.router.routes import ControllerApi, controller_app
from llava.serve.router.worker_routes import WorkerApi, single_worker_routes
from llava.serve.service import Service

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "images/demo.jpg"


def data_url(path: Path = DEMO) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


# A tool, as OpenAI's API describes it.
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
        },
    },
}


@contextlib.contextmanager
def running(app: Any, listener: Any = None) -> Iterator[str]:
    """An application behind a real socket, in a thread; gives its address."""
    listener = listener or bind("127.0.0.1", 0)[0]
    policy = getattr(app, "policy", AccessPolicy())
    http = protocol_class(policy.connections, policy.proxies)
    server = uvicorn.Server(
        uvicorn.Config(app, http=http, log_config=None, access_log=False, lifespan="on", proxy_headers=False)
    )
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=120)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def embedded_backend(**changes: Any) -> Iterator[EngineBackend]:
    """The embedded model on an engine, to be shared by the servers of a test file."""
    from llava.assets import embedded_model_path
    from llava.model.builder import load

    backend = EngineBackend(load(embedded_model_path(), device="cpu"), name="llava-v1.5-tiny", **changes)
    try:
        yield backend
    finally:
        backend.engine.close()


@contextlib.contextmanager
def worker(
    backend: Backend,
    limits: ServeLimits | None = None,
    *,
    access: AccessPolicy | None = None,
    controller: str | None = None,
    key: str | None = None,
) -> Iterator[tuple[str, Service]]:
    """A worker over a backend, which stays open; it answers a controller's questions about itself unless it has one."""
    limits = limits or ServeLimits()
    access = access or AccessPolicy()
    service = Service(backend, limits, access.memory)
    (listener,) = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    api = WorkerApi(service)
    routers = [api.router(), *model_routes(service)]
    lifespans = []
    if controller is None:
        routers.append(single_worker_routes(service))
    else:
        heartbeat = Heartbeat(controller, address, api.status, key=key)
        service.changed = heartbeat.changed
        lifespans.append(heartbeat.lifespan)
    _, app = make_app(
        routers,
        title="worker",
        metrics=service.metrics,
        access=access,
        liveness=service.liveness,
        readiness=service.readiness,
        schemas=SCHEMAS,
        lifespans=lifespans,
    )
    with running(app, listener):
        yield address, service


@contextlib.contextmanager
def controller(
    dispatcher: Dispatcher | None = None, *, access: AccessPolicy | None = None, **options: Any
) -> Iterator[tuple[str, Dispatcher]]:
    dispatcher = dispatcher or Dispatcher()
    _, app = controller_app(ControllerApi(dispatcher, **options), access or AccessPolicy())
    with running(app) as address:
        yield address, dispatcher


@contextlib.contextmanager
def worker_and_controller(backend: Backend) -> Iterator[dict[str, str]]:
    """The addresses of a worker by itself, and of a controller over another one, of the same backend."""
    with controller() as (front, dispatcher), worker(backend) as (own, _), worker(backend, controller=front):
        wait_until(dispatcher.workers)
        yield {"worker": own, "controller": front}


def wait_until(holds: Callable[[], Any], seconds: float = 120.0) -> Any:
    """The first true value of a condition; fails when it does not come in time."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def make_greedy(page: Any) -> None:
    """Set the web page's temperature to 0, in a browser. What is typed before the page has settled is lost."""
    if not page.locator("#settings input[type=number]").first.is_visible():
        page.click("#settings button")
    number, slider = (page.locator(f"#settings input[type={kind}]").first for kind in ("number", "range"))

    def is_set() -> bool:
        number.fill("0")
        number.press("Enter")
        page.wait_for_timeout(100)
        return slider.input_value() == "0"

    wait_until(is_set)


class Program:
    """A `llava` command in a process of its own, and what it says on stdout."""

    def __init__(
        self, *arguments: str, module: str | None = "llava", stdin: int | None = None, **variables: str
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *(["-m", module] if module else []), *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment() | variables,
        )
        self.lines: list[str] = []
        self.complaints: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.complaints), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        lines.extend(iter(stream.readline, ""))

    def line(self, beginning: str, seconds: float = 180.0) -> str:
        """The first line that begins so, without its beginning."""

        def found() -> str | None:
            assert self.process.poll() is None or self.lines, "".join(self.complaints)
            return next((line for line in self.lines if line.startswith(beginning)), None)

        return wait_until(found, seconds).removeprefix(beginning).strip()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 120.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=seconds)
        for thread in self._threads:
            thread.join(timeout=60)
        return status

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
