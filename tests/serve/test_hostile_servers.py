"""Servers that we ask may send anything: each program says one sentence in time, and keys stay where they belong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llava.cli.http_client import HttpFailureError, send
from llava.conversation import get_template
from llava.diagnose.checks.server import examine_server
from llava.engine.request import Request, SamplingParams
from llava.errors import InputError
from llava.eval.harness import judge as judges
from llava.eval.harness.judge import Judge
from llava.images.addresses import is_public_address
from llava.images.download import ImageLimits
from llava.images.io import load_image
from llava.serve.backends.base import BackendError, ModelCard
from llava.serve.backends.remote import RemoteBackend
from llava.serve.openai_worker import first_model
from llava.serve.router.heartbeat import Heartbeat
from llava.serve.router.protocol import WorkerStatus

KEY = "a-key-of-tests"


class RawServer:
    """Answers every request with the same bytes, piece by piece, and keeps the requests."""

    def __init__(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        self.requests: list[bytes] = []
        self._pieces = pieces
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.requests.append(connection.recv(1 << 20))
            for piece in self._pieces():
                connection.sendall(piece)
                if self.over.is_set():
                    return
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(1.0)
            connection.recv(1 << 20)

    def close(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def reply(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    names = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    names |= {name.replace("_", "-"): value for name, value in headers.items()}
    return (
        f"HTTP/1.1 {status}\r\n".encode()
        + b"".join(f"{n}: {v}\r\n".encode() for n, v in names.items())
        + b"\r\n"
        + body
    )


def endless(head: bytes, piece: bytes, pause: float = 0.0) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        yield head
        while True:
            yield piece
            time.sleep(pause)

    return pieces


CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DEEP = b"[" * 100_000
HOSTILE: dict[str, Callable[[], Iterator[bytes]]] = {
    "no JSON": lambda: iter([reply(b"<html>hello</html>")]),
    "an empty body": lambda: iter([reply(b"")]),
    "a number": lambda: iter([reply(b"5")]),
    "a list": lambda: iter([reply(b"[1, 2]")]),
    "wrong types": lambda: iter([reply(b'{"choices": {"a": 1}, "data": "x", "exist": "yes", "error": [1]}')]),
    "wrong types within": lambda: iter([reply(b'{"choices": [{"message": {"content": {"a": 1}}}], "data": [{"id": 5}]}')]),
    "deep JSON": lambda: iter([reply(DEEP)]),
    "a huge reply": lambda: iter([reply(b" " * (20 << 20))]),
    "an endless reply": endless(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536),
    "an endless head": endless(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
    "a dripping head": endless(b"HTTP/1.1 200 OK\r\n", b"x", 0.1),
    "a dripping body": endless(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b" ", 0.1),
    "a truncated reply": lambda: iter([reply(b'{"choices": [', content_length="1000")]),
    "a negative chunk": lambda: iter([CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n"]),
    "no HTTP": lambda: iter([b"SSH-2.0-OpenSSH_9.6\r\n"]),
    "nothing": lambda: iter([]),
    "an error of another form": lambda: iter([reply(b'{"error": 5}', "500 Oh")]),
    "an error in bytes": lambda: iter([reply(b"\xff\xfe\x00", "500 \xff")]),
}  # fmt: skip


@pytest.fixture(params=HOSTILE, ids=lambda name: name.replace(" ", "-"))
def hostile(request: Any) -> Iterator[RawServer]:
    server = RawServer(HOSTILE[request.param])
    yield server
    server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "NUM_TRIES", 1)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("llava.serve.router.heartbeat.POST_S", 0.7)
    monkeypatch.setattr("llava.serve.backends.remote.CONNECT_S", 0.7)


def is_sentence(text: str) -> bool:
    return 0 < len(text) < 1000 and "\n" not in text.strip() and "Traceback" not in text


def test_a_judge(hostile: RawServer) -> None:
    with pytest.raises(InputError) as caught:
        Judge(f"{hostile.url}/v1", "m", timeout_s=0.7).reply(
            [{"role": "user", "content": "hi"}], max_tokens=5, temperature=0
        )
    assert is_sentence(str(caught.value))


def test_a_server_that_is_examined(hostile: RawServer) -> None:
    report = examine_server(hostile.url, timeout=0.7)
    assert report.findings
    assert all(is_sentence(finding.what) for finding in report.findings)


def test_a_list_of_models(hostile: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.openai_worker.LIST_S", 0.7)
    with pytest.raises(InputError) as caught:
        first_model(hostile.url, KEY)
    assert is_sentence(str(caught.value))


EVENTS: dict[str, bytes] = {
    "a number": b"data: 5\n\n",
    "no JSON": b"data: {\n\n",
    "deep JSON": b"data: " + DEEP + b"\n\n",
    "choices of a wrong type": b'data: {"choices": 5}\n\n',
    "a choice of a wrong type": b'data: {"choices": [5]}\n\n',
    "an index of a wrong type": b'data: {"choices": [{"index": "0", "delta": {"content": "x"}}]}\n\n',
    "an index far away": b'data: {"choices": [{"index": 1000000, "delta": {"content": "x"}}]}\n\n',
    "a text of a wrong type": b'data: {"choices": [{"index": 0, "delta": {"content": [1]}}]}\n\n',
    "a delta of a wrong type": b'data: {"choices": [{"index": 0, "delta": [1]}]}\n\n',
    "usage of a wrong type": b'data: {"choices": [], "usage": {"prompt_tokens": "many"}}\n\n',
    "an end too early": b'data: {"choices": [{"index": 0, "delta": {"content": "x"}}]}\n\n',
    "no events": b"hello\n\n",
    "an error of a wrong type": b'data: {"error": [1, 2]}\n\n',
}


def remote(url: str) -> RemoteBackend:
    card = ModelCard("far-away", get_template("v1"), "v1", context_len=None, image_placeholder="<image>")
    return RemoteBackend(url, model="x", card=card, key=KEY)


def failure(server: RawServer) -> str:
    """The message for a request that the backend passes on, within its time."""

    async def ask() -> str:
        backend = remote(server.url)
        try:
            async with asyncio.timeout(3):
                request = await backend.start(Request("hi", sampling=SamplingParams(max_new_tokens=5)), streamed=True)
                try:
                    async with asyncio.timeout(1.0):
                        _ = [chunks async for chunks in request.batches(lambda: 0.0)]
                finally:
                    request.abort()
        except TimeoutError:  # the server's own deadline, of which there is one sentence
            return "the server that answers is slow"
        except (BackendError, InputError) as error:
            return str(error)
        finally:
            assert await backend.is_alive() in (True, False)
            await backend.close()
        raise AssertionError("that was an answer")

    return asyncio.run(ask())


@pytest.mark.parametrize("name", EVENTS)
def test_a_server_behind_a_worker_that_sends_events(name: str) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    server = RawServer(lambda: iter([head + EVENTS[name]]))
    try:
        message = failure(server)
    finally:
        server.close()
    assert is_sentence(message)
    assert "the server that answers" in message


def test_a_server_behind_a_worker(hostile: RawServer) -> None:
    message = failure(hostile)
    assert is_sentence(message)
    assert "the server that answers" in message


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_a_key_does_not_follow_a_redirect(status: str) -> None:
    other = RawServer(
        lambda: iter([reply(b'{"choices": [{"message": {"content": "stolen"}}], "data": [{"id": "m"}]}')])
    )
    server = RawServer(lambda: iter([reply(b"", status, location=f"{other.url}/v1/chat/completions")]))
    try:
        with pytest.raises(InputError, match=r"redirects to 127\.0\.0\.1"):
            Judge(f"{server.url}/v1", "m", timeout_s=5).reply([], max_tokens=5, temperature=0)
        with pytest.raises(InputError, match="redirects"):
            first_model(server.url, KEY)
        assert examine_server(server.url, api_key=KEY, timeout=5).findings
        assert "redirects to another address" in failure(server)
        assert any(f"Bearer {KEY}".encode() in request for request in server.requests)
        assert other.requests == []
    finally:
        server.close()
        other.close()


def test_a_judge_that_is_busy_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "NUM_TRIES", 3)
    pauses: list[float] = []
    monkeypatch.setattr(judges.time, "sleep", pauses.append)
    answers = iter([
        reply(b"{}", "429 Busy", retry_after="7"), reply(b"{}", "503 Busy", retry_after="100000"),
        reply(b'{"choices": [{"message": {"content": "8 9"}}]}'),
    ])  # fmt: skip
    server = RawServer(lambda: iter([next(answers)]))
    try:
        assert Judge(server.url, "m").reply([], max_tokens=5, temperature=0) == "8 9"
    finally:
        server.close()
    assert pauses == [7.0, 120.0]


def test_addresses_that_are_none_are_a_phrase() -> None:
    for url in (
        "ftp://a",
        "file:///etc/passwd",
        "http://",
        "http://[",
        "nonsense",
        "http://127.0.0.1:99999",
        "http://a b/",
    ):
        with pytest.raises(HttpFailureError) as caught:
            send(url, timeout_s=5)
        assert is_sentence(str(caught.value))


def test_a_controller_that_sends_anything_is_asked_again(
    hostile: RawServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that registers and sends heartbeats outlives every answer."""
    monkeypatch.setattr("llava.serve.router.heartbeat.RETRY_S", 0.05)

    async def run() -> None:
        heartbeat = Heartbeat(
            hostile.url, "http://127.0.0.1:9", lambda: WorkerStatus(("m",), 1, 0), key=KEY, interval_s=0.05
        )
        async with heartbeat.lifespan():
            async with asyncio.timeout(20):
                while len(hostile.requests) < 3:
                    await asyncio.sleep(0.02)

    asyncio.run(run())
    assert not [record for record in caplog.records if record.exc_info]


# Untrusted images


def test_a_chunk_of_negative_size_in_a_download_is_a_sentence() -> None:
    server = RawServer(HOSTILE["a negative chunk"])
    try:
        with pytest.raises(InputError, match="cannot be downloaded"):
            load_image(f"{server.url}/a.png", limits=ImageLimits(timeout_s=5, allow_private_hosts=True))
    finally:
        server.close()


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.9.9.9", "168.63.129.16",
        "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.9", "192.0.0.170",
        "192.0.0.192", "192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.168.1.1", "192.175.48.1",
        "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:10.0.0.1", "::ffff:168.63.129.16",
        "::ffff:0:192.168.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::1", "64:ff9b::a9fe:a9fe", "100::1", "100:0:0:1::1",
        "2001::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:30::1", "2001:1::1", "2001:db8::1", "2002:a00:1::",
        "2002:a83f:8110::", "2620:4f:8000::1", "3fff::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254",
        "fe80::1", "fec0::1", "ff02::1", "8000::1",
    ],
)  # fmt: skip
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public_address(address)
    if ":" not in address:
        assert not is_public_address(f"::ffff:{address}")
        assert not is_public_address(f"64:ff9b::{address}")


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "168.63.129.15", "192.0.1.1", "192.1.0.1", "172.32.0.1", "100.128.0.1", "223.255.255.255",
     "2606:4700::1111", "2a00::1", "2400:cb00::1", "2002:808:808::", "::ffff:8.8.8.8"],
)  # fmt: skip
def test_ordinary_addresses_are_public(address: str) -> None:
    assert is_public_address(address)
