"""When an engine, a worker or a server dies, requests get an answer or a worded error, and the part comes back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from serve_kit import Program, controller, embedded_backend, running, wait_until, worker

from llava.assets import embedded_model_path
from llava.engine.runner import Runner
from llava.errors import InputError
from llava.model.builder import load
from llava.serve.backends import subprocess as processes
from llava.serve.backends.in_process import EngineBackend
from llava.serve.backends.subprocess import ProcessBackend
from llava.serve.router.dispatch import Dispatcher
from llava.serve.router.protocol import WorkerStatus, read_chunks

MODEL = "llava-v1.5-tiny"
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
NUMBERS = itertools.count()
ENDLESS = BODY | {"max_tokens": 1900, "ignore_eos": True, "stream": True}


def another() -> dict[str, Any]:
    """A request of another conversation, which no worker has seen."""
    return BODY | {"messages": [{"role": "user", "content": f"hi {next(NUMBERS)}"}]}


# An engine


def test_a_device_that_fails_for_good_stops_the_engine_and_the_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded_backend() as backend, worker(backend) as (address, service):
        assert httpx.post(address + CHAT, json=BODY).status_code == 200
        assert service.lost() is None
        launch, failing = Runner.launch, [1]

        def broken(self: Runner, step: Any) -> Any:
            if failing.pop() if failing else False:
                raise RuntimeError("CUDA error: once")
            return launch(self, step)

        monkeypatch.setattr(Runner, "launch", broken)
        assert httpx.post(address + CHAT, json=BODY).status_code == 502
        assert httpx.post(address + CHAT, json=BODY).status_code == 200  # a single failure is one request's
        failing[:] = [1] * 100
        statuses = [httpx.post(address + CHAT, json=BODY).status_code for _ in range(5)]
        assert statuses == [502, 502, 502, 503, 503]
        assert httpx.get(f"{address}/health").status_code == 503
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.post(f"{address}/worker_get_status").status_code == 503
        assert service.lost() is not None


@pytest.mark.slow
def test_a_server_that_is_lost_ends_with_a_failure() -> None:
    """So that whatever started it starts it again."""
    code = (
        "import llava.engine.runner as runner, sys\n"
        "def broken(self, step): raise RuntimeError('CUDA error: device-side assert triggered')\n"
        "runner.Runner.launch = broken\n"
        "from llava.__main__ import main\n"
        "sys.exit(main(['worker', '--no-register', '--port', '0', '--device', 'cpu']))\n"
    )
    with Program("-c", code, module=None) as program:
        address = program.line("worker ").split()[0]
        statuses = [httpx.post(address + CHAT, json=BODY, timeout=60).status_code for _ in range(3)]
        assert statuses == [502, 502, 502]
        assert program.process.wait(timeout=60) == 1
        assert "steps in a row failed" in "".join(program.complaints)


@pytest.mark.slow
def test_an_engine_that_is_killed_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PING_S", 0.05)

    async def survive() -> None:
        backend = ProcessBackend(partial(load, embedded_model_path(), device="cpu"), name=MODEL)
        try:
            for _ in range(2):
                pid = backend.pid
                os.kill(pid, signal.SIGKILL)
                while await backend.is_alive():
                    await asyncio.sleep(0.01)
                while not await backend.is_alive():
                    await asyncio.sleep(0.05)
                assert backend.pid != pid
                assert backend.lost is None
            # One that hangs says nothing, and is ended.
            monkeypatch.setattr(processes, "SILENT_S", 0.5)
            monkeypatch.setattr(processes, "HANG_S", 1.0)
            pid = backend.pid
            os.kill(pid, signal.SIGSTOP)
            while backend.pid == pid:
                await asyncio.sleep(0.05)
            monkeypatch.setattr(processes, "HANG_S", 60.0)
            while not await backend.is_alive():
                await asyncio.sleep(0.05)
        finally:
            await backend.close()
        assert not psutil.pid_exists(backend.pid)

    asyncio.run(asyncio.wait_for(survive(), 120))


@pytest.mark.slow
def test_an_engine_that_cannot_start_again_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(processes, "MAX_PAUSE_S", 0.01)
    monkeypatch.setattr(processes, "MAX_FAILURES", 2)
    calls = tmp_path / "calls"

    async def give_up() -> None:
        backend = ProcessBackend(partial(_load_once, str(calls)), name=MODEL)
        os.kill(backend.pid, signal.SIGKILL)
        while backend.lost is None:
            await asyncio.sleep(0.05)
        assert "in a row" in backend.lost
        assert "the model is gone" in backend.lost
        assert not await backend.is_alive()
        await backend.close()

    asyncio.run(asyncio.wait_for(give_up(), 200))
    assert len(calls.read_text()) == 1 + processes.MAX_FAILURES


def _load_once(calls: str) -> Any:
    """The model the first time, and an error from then on; by name, so that another process can call it."""
    is_first = not os.path.exists(calls)
    with open(calls, "a") as file:
        file.write("x")
    if not is_first:
        raise InputError("the model is gone")
    return load(embedded_model_path(), device="cpu")


# A worker


class FakeWorker:
    """A worker of the test's own, which answers questions about its status unless `hangs`, and requests as `answer` does."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.num_asked = 0
        self.hangs = self.over = False
        self.status = 200
        self.answer = self.failing
        self.app.post("/worker_get_status")(self.get_status)
        self.app.post(CHAT)(self.take)
        self.app.post("/worker_generate_stream")(self.take)

    async def get_status(self) -> Any:
        if self.hangs:
            await self.nothing()
        return JSONResponse({"model_names": [MODEL], "speed": 1, "queue_length": 0}, self.status)

    async def take(self, request: Request) -> Any:
        self.num_asked += 1
        return await self.answer()

    async def failing(self) -> Any:
        return JSONResponse({"error": {"message": "a step of the engine failed"}}, 502)

    async def nothing(self) -> Any:
        while not self.over:
            await asyncio.sleep(0.02)

    async def begin(self) -> Any:
        async def events() -> AsyncIterator[bytes]:
            yield b'data: {"choices": []}\n\n'
            await self.nothing()

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture
def fleet(backend: EngineBackend) -> Iterator[tuple[str, Dispatcher, FakeWorker]]:
    """A controller over a sound worker and one of the test's own, which is asked first."""
    fake = FakeWorker()
    with controller(probe_s=0.1) as (address, dispatcher), running(fake.app) as place:
        dispatcher.register(place, WorkerStatus((MODEL,), 1, 0), check_heart_beat=False)
        dispatcher._choose = lambda able, chance: min(able, key=lambda known: known.name != place)
        with worker(backend, controller=address):
            wait_until(lambda: len(dispatcher.workers()) == 2)
            yield address, dispatcher, fake
            fake.over = True


def test_a_request_that_a_worker_fails_at_goes_to_another_one(fleet: tuple[str, Dispatcher, FakeWorker]) -> None:
    address, dispatcher, fake = fleet
    for stream in (False, True):
        response = httpx.post(address + CHAT, json=another() | {"stream": stream})
        assert response.status_code == 200
        assert "choices" in response.text
    assert fake.num_asked == 2
    assert sum(known.num_failures for known in dispatcher.workers()) >= 2
    assert "llava_worker_failures" in httpx.get(f"{address}/metrics").text


def test_a_request_at_which_all_workers_fail_is_not_passed_on_for_ever() -> None:
    fakes = [FakeWorker() for _ in range(4)]
    with controller(probe_s=0.1) as (address, dispatcher), contextlib.ExitStack() as stack:
        for fake in fakes:
            place = stack.enter_context(running(fake.app))
            dispatcher.register(place, WorkerStatus((MODEL,), 1, 0), check_heart_beat=False)
        response = httpx.post(address + CHAT, json=BODY)
        assert response.status_code == 502
        assert response.json()["error"]["message"] == "a step of the engine failed"
    assert sum(fake.num_asked for fake in fakes) == 2


def test_a_worker_that_says_it_does_not_work_is_taken_out_and_back(fleet: tuple[str, Dispatcher, FakeWorker]) -> None:
    address, dispatcher, fake = fleet
    fake.status = 503
    wait_until(lambda: sum(dispatcher.is_reachable(known) for known in dispatcher.workers()) == 1, seconds=10)
    for _ in range(5):
        assert httpx.post(address + CHAT, json=another()).status_code == 200
    assert fake.num_asked == 0
    assert httpx.get(f"{address}/ready").status_code == 200
    fake.status = 200
    wait_until(lambda: sum(dispatcher.is_reachable(known) for known in dispatcher.workers()) == 2, seconds=10)
    httpx.post(address + CHAT, json=another())
    assert fake.num_asked == 1


def test_a_worker_that_stops_loses_its_requests_to_another_one(
    fleet: tuple[str, Dispatcher, FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process takes connections and says nothing: what has begun ends with an error, the rest is asked elsewhere."""
    monkeypatch.setattr("llava.serve.router.routes.STATUS_S", 0.2)
    address, _, fake = fleet
    fake.answer = fake.begin
    with httpx.stream("POST", address + CHAT, json=another() | {"stream": True}, timeout=30) as response:
        lines = response.iter_lines()
        assert "choices" in next(lines)
        fake.answer = fake.nothing
        waiting: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: waiting.append(httpx.post(address + CHAT, json=another(), timeout=30)))
        thread.start()
        wait_until(lambda: fake.num_asked == 2)
        fake.hangs = True
        rest = "\n".join(lines)
        assert "event: error" in rest
        assert "lost in the middle" in rest
        thread.join()
        assert waiting[0].status_code == 200
    assert httpx.post(address + CHAT, json=another()).status_code == 200
    assert fake.num_asked == 2


# A server that ends


def serving(*flags: str) -> Program:
    return Program("worker", "--no-register", "--port", "0", "--device", "cpu", *flags)


def address_of(program: Program) -> str:
    return program.line("worker ").split()[0]


def test_answers_that_outlast_the_drain_end_with_an_error() -> None:
    """Whole or streamed, in each protocol."""
    with serving("--drain-seconds", "1") as program:
        address = address_of(program)
        ended: dict[str, str] = {}

        def ask(name: str, path: str, body: dict[str, Any]) -> None:
            ended[name] = httpx.post(address + path, json=body, timeout=60).text

        prompt = {"model": MODEL, "prompt": "hi", "max_new_tokens": 1900, "temperature": 1.0}
        asked = {"chat": (CHAT, ENDLESS), "whole": (CHAT, ENDLESS | {"stream": False, "n": 6, "temperature": 1})}
        threads = [threading.Thread(target=ask, args=(name, *given)) for name, given in asked.items()]
        for thread in threads:
            thread.start()
        with httpx.stream("POST", f"{address}/worker_generate_stream", json=prompt, timeout=60) as response:
            parts = response.iter_bytes()
            begun = next(parts)
            time.sleep(0.5)
            program.process.send_signal(signal.SIGTERM)
            last = list(read_chunks([begun, *parts]))[-1]
        for thread in threads:
            thread.join()
        assert program.process.wait(timeout=60) == 0
    assert last["error_code"] in (0, 1)  # it may have ended by itself
    assert json.loads(ended["whole"])["error"]["code"] == "server_stopping"
    *_, final = [line for line in ended["chat"].splitlines() if line.startswith("data: ")]
    assert "is being stopped" in json.loads(final.removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in "".join(program.complaints)


def test_a_second_signal_ends_a_server_at_once() -> None:
    with serving("--drain-seconds", "60") as program:
        address = address_of(program)
        with httpx.stream("POST", address + CHAT, json=ENDLESS | {"n": 32, "temperature": 1}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            program.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert program.process.poll() is None
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(timeout=10) == 128 + signal.SIGTERM
            with contextlib.suppress(httpx.HTTPError):
                list(lines)


@pytest.mark.slow
def test_a_worker_ends_with_whoever_started_it() -> None:
    """A front that is killed says nothing: its workers see that their standard input has ended."""
    here, there = os.pipe()
    with Program(
        "worker", "--no-register", "--port", "0", "--device", "cpu", "--end-with-stdin", stdin=here
    ) as program:
        os.close(here)
        address_of(program)
        assert program.process.poll() is None
        os.close(there)
        assert program.process.wait(timeout=60) == 0


@pytest.mark.slow
def test_killing_the_front_leaves_no_workers_and_killing_an_engine_loses_no_request() -> None:
    flags = ("--num-workers", "2", "--engine-process", "on", "--device", "cpu", "--no-page", "--port", "0")
    with Program("serve", *flags) as program:
        address = program.line("API ").removesuffix("/v1")
        wait_until(lambda: "llava_workers 2.0" in httpx.get(f"{address}/metrics").text)
        front = psutil.Process(program.process.pid)
        workers = front.children()
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))):
            pass
        (engine,) = workers[0].children()
        engine.kill()
        assert {httpx.post(address + CHAT, json=BODY, timeout=60).status_code for _ in range(20)} == {200}
        wait_until(lambda: len(workers[0].children()) == 1)
        wait_until(lambda: "llava_workers 2.0" in httpx.get(f"{address}/metrics").text)
        everyone = front.children(recursive=True)
        assert len(everyone) == 4
        program.process.kill()
        wait_until(lambda: not any(process.is_running() for process in everyone), seconds=30)
