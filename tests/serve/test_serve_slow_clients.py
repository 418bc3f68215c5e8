"""Clients that are slow, many or greedy: what they hold is bounded in time, number and memory, and others are answered."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from cli_kit import environment
from serve_kit import wait_until, worker

from llava.errors import InputError
from llava.serve.backends.in_process import EngineBackend
from llava.serve.http.connections import ConnectionLimits, network_of
from llava.serve.http.keys import ApiKeys
from llava.serve.http.limits import ServeLimits
from llava.serve.http.memory_budget import ArrivingBody, BodyPool, MemoryBudget
from llava.serve.http.middleware import AccessPolicy
from llava.serve.http.server import bind

MODEL = "llava-v1.5-tiny"
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
KEY = "a-key-of-tests"


def connected(address: str, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=20)
    connection.sendall(data)
    return connection


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            data += part
    return data


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"POST /v1/chat", b"408"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-", b"408"),
        (HEAD % 1000 + b"{", b"408"),
        (HEAD % 1000, b"408"),
        (HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"5\r\n{", b"408"),
    ],
)
def test_what_does_not_arrive_ends(backend: EngineBackend, sent: bytes, status: bytes | None) -> None:
    access = AccessPolicy(connections=ConnectionLimits(read_timeout_s=0.5))
    with worker(backend, access=access) as (address, _), connected(address, sent) as connection:
        answer = received(connection)
        assert answer.split(b" ")[1:2] == ([] if status is None else [status])
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_head_that_drips_ends_too_and_a_kept_connection_may_wait(backend: EngineBackend) -> None:
    """Single bytes do not put off the end; between two requests the time of the head does not run."""
    access = AccessPolicy(connections=ConnectionLimits(read_timeout_s=1.0))
    with worker(backend, access=access) as (address, _):
        with connected(address) as connection:
            ended = threading.Event()

            def drip() -> None:
                with contextlib.suppress(OSError):
                    for byte in b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 1000:
                        connection.sendall(bytes([byte]))
                        if ended.wait(0.1):
                            return

            thread = threading.Thread(target=drip)
            thread.start()
            received(connection)
            ended.set()
            thread.join()
        with httpx.Client() as client:
            assert client.get(f"{address}/health").status_code == 200
            ended.clear()
            ended.wait(1.5)
            assert client.get(f"{address}/health").status_code == 200


def test_a_slow_body_that_goes_on_has_time(backend: EngineBackend) -> None:
    """The more of a body has come, the longer it has."""
    access = AccessPolicy(connections=ConnectionLimits(read_timeout_s=0.5))
    body = json.dumps(BODY).encode() + b" " * 200_000
    with worker(backend, access=access) as (address, _), connected(address, HEAD % len(body)) as connection:
        for start in range(0, len(body), 25_000):
            connection.sendall(body[start : start + 25_000])
            threading.Event().wait(0.2)  # 125 KB/s, for longer than the timeout
        assert b" 200 " in connection.recv(100)


def test_connections_that_wait_make_room_for_new_ones(backend: EngineBackend) -> None:
    limits = ConnectionLimits(max_connections=8, max_per_client=8)
    with (
        worker(backend, access=AccessPolicy(connections=limits)) as (address, service),
        contextlib.ExitStack() as stack,
    ):
        body = json.dumps(BODY | {"max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()
        running = stack.enter_context(connected(address, HEAD % len(body) + body))
        assert b" 200 " in running.recv(1000)
        for number in range(30):
            stack.enter_context(connected(address, (b"", b"GET /", HEAD % 9)[number % 3]))
        assert httpx.get(f"{address}/health").status_code == 200
        assert service.num_requests == 1  # the answer that runs is not given up for them
        assert running.recv(1000)


def test_a_client_that_waits_for_answers_on_all_its_connections_gets_no_more(backend: EngineBackend) -> None:
    limits = ConnectionLimits(max_connections=100, max_per_client=2)
    with (
        worker(backend, access=AccessPolicy(connections=limits)) as (address, _),
        contextlib.ExitStack() as stack,
    ):
        body = json.dumps(BODY | {"max_tokens": 1500, "ignore_eos": True, "stream": True}).encode()
        for _ in range(2):
            assert b" 200 " in stack.enter_context(connected(address, HEAD % len(body) + body)).recv(1000)
        with connected(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as refused:
            assert received(refused).startswith(b"HTTP/1.1 429 ")
    with pytest.raises(InputError, match="max_per_client"):
        ConnectionLimits(max_per_client=0)


def test_addresses_are_clients() -> None:
    assert network_of("127.0.0.1") == network_of("::1") == network_of("127.9.9.9")
    assert network_of("::ffff:10.0.0.7") == network_of("10.0.0.7") == "10.0.0.7"
    assert network_of("2001:db8:1:2::5") == network_of("2001:db8:1:2:ffff::") != network_of("2001:db8:1:3::5")
    assert network_of(None) == ""


def test_unfinished_bodies_hold_nothing_of_what_others_need(backend: EngineBackend) -> None:
    """Bodies without a key, to an open path, that never end, of more bytes together than the server may hold."""
    memory = MemoryBudget(16 << 20)
    access = AccessPolicy(keys=ApiKeys([KEY]), max_body_bytes=3 << 20, memory=memory)

    with worker(backend, access=access) as (address, _), contextlib.ExitStack() as stack:
        size = (3 << 20) - 10
        head = b"POST /docs HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        for keyed in (False, True):
            key = b"Authorization: Bearer %s\r\n" % KEY.encode() if keyed else b""
            for _ in range(12):
                data = HEAD.replace(b"\r\n\r\n", b"\r\n" + key + b"\r\n") % size if keyed else head % size
                stack.enter_context(connected(address, data + b" " * (size - 10)))
        headers = {"authorization": f"Bearer {KEY}"}
        for _ in range(3):
            assert httpx.post(address + CHAT, json=BODY, headers=headers).status_code == 200
        assert memory.num_bytes <= 16 << 20


def test_the_pool_takes_from_whoever_holds_most() -> None:
    pool = BodyPool(1000)
    evicted: list[str] = []

    def body(client: str, name: str) -> ArrivingBody:
        return ArrivingBody(client, lambda: evicted.append(name))

    small = body("small", "small")
    pool.grow(small, 300)
    large = [body("large", f"large {number}") for number in range(3)]
    for one in large:
        pool.grow(one, 300)
    assert evicted == ["large 0"]
    pool.grow(small, 200)
    assert evicted == ["large 0", "large 1"]
    pool.remove(large[0])  # gone already
    assert pool.num_bytes == 800
    for one in (small, *large):
        pool.remove(one)
    assert pool.num_bytes == 0
    alone = body("alone", "alone")
    pool.grow(alone, 1001)
    assert evicted[-1] == "alone"


def test_prompts_and_completions_count_one_by_one(backend: EngineBackend) -> None:
    with worker(backend, ServeLimits(max_requests=6)) as (address, service):
        many = {"model": MODEL, "prompt": ["hi"] * 4, "n": 2, "temperature": 1, "max_tokens": 4}
        response = httpx.post(f"{address}/v1/completions", json=many)
        assert response.status_code == 400
        assert "asks for 8 answers" in response.json()["error"]["message"]
        some = many | {"prompt": ["hi"] * 3, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=some) as running:
            lines = running.iter_lines()
            next(lines)
            assert service.num_answers == 6
            response = httpx.post(address + CHAT, json=BODY)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
        wait_until(lambda: service.num_answers == 0, seconds=5)
        assert httpx.post(address + CHAT, json=BODY).status_code == 200


def test_what_a_client_sent_is_not_repeated_whole(backend: EngineBackend, caplog: pytest.LogCaptureFixture) -> None:
    name = "m" * 5_000_000
    with caplog.at_level("INFO", "llava.serve"), worker(backend) as (address, _):
        for path, body in (
            (CHAT, BODY | {"model": name}),
            ("/worker_generate_stream", {"prompt": "hi", "stop": {name: 1}}),
        ):
            assert len(httpx.post(address + path, json=body).content) < 2000
        for header in ("evil:1@localhost", "localhost@evil", "localhost:1:2", "[::1", "localhost/x", "a" * 70_000):
            with connected(address, b"GET /health HTTP/1.1\r\nHost: " + header.encode() + b"\r\n\r\n") as connection:
                assert len(connection.recv(65536)) < 2000
        chunked = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"-5\r\nhello\r\n"
        with connected(address, chunked) as connection:
            assert received(connection).startswith(b"HTTP/1.1 400 ")
    assert max(len(record.getMessage()) for record in caplog.records) < 2000
    assert not [record for record in caplog.records if record.exc_info]


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (110, 110))
sys.argv = ["llava", "controller", "--port", "0", "--read-timeout", "600"]
from llava.__main__ import main
sys.exit(main())
"""


def test_a_server_whose_descriptors_are_used_up_goes_on_and_logs_little() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FULL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(connected(address))
            for _ in range(5):
                assert httpx.get(f"{address}/health", timeout=20).status_code == 200
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert len(errors.splitlines()) < 30
        assert "Traceback" not in errors


def test_localhost_is_both_loopback_addresses() -> None:
    listeners = bind("localhost", 0)
    families = [listener.family for listener in listeners]
    assert families[0] == socket.AF_INET
    assert len({listener.getsockname()[1] for listener in listeners}) == 1
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        assert families == [socket.AF_INET, socket.AF_INET6]
    with pytest.raises(InputError, match="in use"):
        bind("localhost", listeners[0].getsockname()[1])
    for listener in listeners:
        listener.close()
