"""What clients may send a server, byte by byte: what is ambiguous or does not end is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from serve_kit import wait_until

from llava.errors import InputError
from llava.serve.http.connections import ConnectionLimits, protocol_class
from llava.serve.http.server import bind

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"


async def told(scope: Any, receive: Any, send: Any) -> None:
    """Tells what it was asked; /slow takes its time."""
    if scope["type"] == "lifespan":
        for _ in range(2):
            await send({"type": (await receive())["type"] + ".complete"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    names = [name.decode() for name, _ in scope["headers"]]
    answer = json.dumps([scope["path"], body.decode(), names]).encode() + b"\n"
    length = str(len(answer)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    (listener,) = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(told, http=protocol_class(ConnectionLimits()), log_config=None, access_log=False, lifespan="on")
    )
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(timeout=120)
    listener.close()


def answers(port: int, *blocks: bytes, num: int = 1) -> list[Any]:
    """Statuses and what was told, of so many answers, or until the server closes the connection (None)."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as line, line.makefile("rb") as incoming:
        for block in blocks:
            line.sendall(block)
        seen: list[Any] = []
        while len(seen) < num:
            status = incoming.readline()
            if not status:
                return [*seen, None]
            head = list(iter(incoming.readline, b"\r\n"))
            is_told = b"content-length" in b"".join(head).lower() and b" 200 " in status
            seen.append(json.loads(incoming.readline()) if is_told else int(status.split()[1]))
            if not is_told:
                incoming.read()  # to the end, which has to come
        return seen


@pytest.mark.parametrize(
    "sent",
    [
        b"hello there\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n" * 3,  # TLS
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: b\0c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX(: b\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
        POST + b"Content-Length: +3\r\n\r\nabc",
        POST + b"Content-Length: -3\r\n\r\nabc",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\nabc",
        POST + b"Transfer-Encoding: gzip\r\n\r\nabc",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CHUNKED + b"\r\nzz\r\nabc\r\n0\r\n\r\n",
        CHUNKED + b"\r\n3\r\nabcX0\r\n\r\n",
    ],
)
def test_malformed_requests_are_refused(port: int, sent: bytes) -> None:
    assert answers(port, sent) == [400]


@pytest.mark.parametrize("order", [1, -1])
def test_two_lengths_never_hide_a_request(port: int, order: int) -> None:
    """Nobody takes the second request for a body."""
    lengths = [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"][::order]
    seen = answers(port, POST + b"".join(lengths) + b"\r\n0\r\n\r\n" + GET, num=2)
    assert [answer if isinstance(answer, int) else answer[:2] for answer in seen if answer] in (
        [["/", ""], ["/", ""]],
        [400],
    )


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /", b"y" * 999),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"y" * 999),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: " + b"y" * 994 + b"\r\n"),
        (CHUNKED + b"\r\n3;", b"y" * 999),
        (CHUNKED + b"\r\n3\r\nabc\r\n0\r\n", b"X: " + b"y" * 994 + b"\r\n"),
        (b"", b"\r\n" * 500),
    ],
)
def test_what_does_not_end_is_not_kept(port: int, start: bytes, piece: bytes) -> None:
    """The server hangs up, perhaps long after everything was sent: the system holds a megabyte for a server that is busy."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as line, contextlib.suppress(ConnectionError):
        line.sendall(start)
        for _ in range(1600):
            line.sendall(piece)
        while line.recv(1 << 16):  # a TimeoutError if it neither answers nor hangs up
            pass


def test_a_long_body_in_small_chunks_is_no_head(port: int) -> None:
    seen = answers(port, CHUNKED + b"\r\n", *[b"1\r\na\r\n" * 100 for _ in range(60)], b"0\r\n\r\n")
    assert seen[0][1] == "a" * 6000


def test_trailers_are_no_headers(port: int) -> None:
    seen = answers(port, CHUNKED + b"\r\n3\r\nabc\r\n0\r\nAuthorization: x\r\n\r\n" + GET, num=2)
    assert seen[0] == ["/", "abc", ["host", "transfer-encoding"]]
    assert seen[1] == ["/", "", ["host"]]


@pytest.mark.parametrize("cut", [False, True])
def test_an_offer_of_another_protocol_is_declined_and_the_body_read(port: int, cut: bool) -> None:
    """Java's client offers HTTP/2 with its first request."""
    head = (
        POST
        + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nContent-Length: 3\r\n"
    )
    blocks = [head[:40], head[40:], b"\r\nab", b"c" + GET] if cut else [head + b"\r\nabc" + GET]
    seen = answers(port, *blocks, num=2)
    assert [answer[:2] for answer in seen] == [["/", "abc"], ["/", ""]]


def test_requests_in_a_row_are_answered_in_their_order(port: int) -> None:
    asked = [b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n" % name for name in (b"slow", b"2", b"3")]
    assert [answer[0] for answer in answers(port, b"".join(asked), num=3)] == ["/slow", "/2", "/3"]


def test_garbage_behind_a_request_is_not_answered_first(port: int) -> None:
    seen = answers(port, GET.replace(b"/ ", b"/slow ") + b"garbage\r\n\r\n", num=2)
    assert seen in ([["/slow", "", ["host"]], 400], [None])


@pytest.mark.parametrize("number", [-1, 65536, 99999])
def test_a_port_that_does_not_exist_is_refused(number: int) -> None:
    with pytest.raises(InputError, match=f"--port is {number}"):
        bind("127.0.0.1", number)
