"""What attackers do to a server, for soak.py, in a process of their own: each attack goes on until it is cancelled.

In: a server and a client's key; lines on standard input, `start` (all attacks, or those whose names follow) and `stop`. Out:
counts of what was tried and of replies, as JSON at each stop. Every attack keeps to a bounded rate, and the process is nice,
since attackers are on machines of their own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import random
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
from PIL import Image

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
NUM_SOCKETS = 60  # of each kind, open at once


@dataclass
class Target:
    """A server, a key that its operator gave to somebody, and counters."""

    url: str
    model: str
    headers: dict[str, str]
    attacks: Counter[str]
    replies: Counter[str]

    @property
    def chat(self) -> str:
        return f"{self.url}/v1/chat/completions"

    def body(self, text: str = "hi", **more: object) -> dict[str, object]:
        return {"model": self.model, "messages": [{"role": "user", "content": text}], **more}

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.url)
        return await asyncio.open_connection("127.0.0.1", parts.port)


async def _held(target: Target, name: str, data: bytes) -> None:
    """Connections that send the beginning of a request and keep quiet, opened again when the server closes them."""

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await target.connect()
                try:
                    target.attacks[name] += 1
                    writer.write(data)
                    await reader.read(4096)
                finally:
                    writer.close()
            await asyncio.sleep(1.0)

    await asyncio.gather(*(one() for _ in range(NUM_SOCKETS)))


async def silent(target: Target) -> None:
    await _held(target, "silent connections", b"")


async def half_heads(target: Target) -> None:
    await _held(target, "half heads", HEAD)


async def half_bodies(target: Target) -> None:
    """Each with most of a megabyte."""
    key = "".join(f"{name}: {value}\r\n" for name, value in target.headers.items()).encode()
    await _held(target, "half bodies", HEAD + key + b"Content-Length: 1000000\r\n\r\n" + b" " * 900_000)


async def drips(target: Target) -> None:
    """Bodies of a byte a second."""

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await target.connect()
                target.attacks["dripping bodies"] += 1
                writer.write(HEAD + b"Content-Length: 1000\r\n\r\n")
                try:
                    for _ in range(1000):
                        writer.write(b" ")
                        await writer.drain()
                        await asyncio.sleep(1.0)
                finally:
                    writer.close()
            await asyncio.sleep(1.0)

    await asyncio.gather(*(one() for _ in range(10)))


async def flood(target: Target) -> None:
    """One key that asks for as many long answers as it gets."""

    async def one(client: httpx.AsyncClient) -> None:
        while True:
            target.attacks["long answers"] += 1
            body = target.body("go on", n=8, temperature=1, max_tokens=400, ignore_eos=True, stream=True)
            await _post(client, target, "long answers", target.chat, body)
            await asyncio.sleep(0.1)

    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:
        await asyncio.gather(*(one(client) for _ in range(4)))


async def leavers(target: Target) -> None:
    """Streams whose client leaves after the first bytes."""
    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:
        while True:
            target.attacks["leaving clients"] += 1
            body = target.body("go on", max_tokens=400, ignore_eos=True, stream=True)
            with contextlib.suppress(httpx.HTTPError):
                async with client.stream("POST", target.chat, json=body, headers=target.headers) as response:
                    async for _ in response.aiter_bytes():
                        break
            await asyncio.sleep(0.5)


async def bodies(target: Target) -> None:
    """Bodies that are costly, wrong, deep or large."""
    rng = random.Random(1)
    deep = b'{"model": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    schema: dict[str, object] = {"type": "object"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    nested = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    given: list[tuple[str, bytes | dict[str, object]]] = [
        ("deep JSON", deep),
        ("numbers that are none", b'{"model": "x", "temperature": 1e999, "messages": []}'),
        ("names of five megabytes", target.body() | {"model": "m" * 5_000_000}),
        ("costly expressions", target.body(regex="(a{1000}){1000}")),
        ("deep schemas", target.body(response_format=nested)),
        ("half surrogates", json.dumps(target.body("\ud800")).encode()),
        ("many completions", target.body(n=128, temperature=1, max_tokens=2)),
        ("wrong types", target.body(temperature="x", stop={}, n=[])),
    ]  # fmt: skip
    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:
        while True:
            name, body = rng.choice(given)
            target.attacks[name] += 1
            await _post(client, target, name, target.chat, body)
            prompts = {"model": target.model, "prompt": ["hi"] * 1500, "n": 128, "temperature": 1, "max_tokens": 64}
            target.attacks["lists of 1,500 prompts"] += 1
            await _post(client, target, "lists of 1,500 prompts", f"{target.url}/v1/completions", prompts)
            await asyncio.sleep(0.5)


async def images(target: Target) -> None:
    """Images that cost more than they weigh, or are none."""

    def png(width: int, height: int) -> bytes:
        def part(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"\0" * 1000)) + part(b"IEND", b"")
        )

    buffer = io.BytesIO()
    Image.new("L", (1200, 1200)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    scans = whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * 2_000 + b"\xff\xd9"
    given = {
        "a PNG that says 50,000 x 50,000": png(50_000, 50_000),
        "a JPEG of 2,000 scans": scans,
        "no image": b"\0" * 99,
    }
    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:
        while True:
            for name, data in given.items():
                url = "data:image/png;base64," + base64.b64encode(data).decode()
                content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hi"}]
                body = target.body() | {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
                target.attacks[name] += 1
                await _post(client, target, name, target.chat, body)
                await asyncio.sleep(1.0)


async def intruders(target: Target) -> None:
    """Registrations of workers with a client's key and with none, foreign names, keys that are none."""
    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:
        while True:
            status = {"model_names": [target.model], "speed": 1e6, "queue_length": 0}
            body = {"worker_name": "http://127.0.0.1:9", "check_heart_beat": False, "worker_status": status}
            for headers in (target.headers, {}):
                target.attacks["registrations"] += 1
                await _post(client, target, "registrations", f"{target.url}/register_worker", body, headers)
            for headers in (
                {"host": "evil:1@localhost"},
                {"origin": "https://evil.example"},
                {"authorization": "Bearer no"},
            ):
                target.attacks["foreign hosts, origins and keys"] += 1
                await _post(client, target, "foreign hosts, origins and keys", target.chat, target.body(), headers)
            await asyncio.sleep(1.0)


async def smugglers(target: Target) -> None:
    """Requests that are no HTTP."""
    given = (
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n",
        HEAD + b"Host: other\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        b"GET / HTTP/1.1\r\n" + b"x: " + b"a" * 100_000,
    )
    while True:
        for data in given:
            target.attacks["requests that are no HTTP"] += 1
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await target.connect()
                try:
                    writer.write(data)
                    async with asyncio.timeout(15):
                        answer = await reader.read(4096)
                    target.replies[f"requests that are no HTTP: {answer[9:12].decode() or 'closed'}"] += 1
                finally:
                    writer.close()
        await asyncio.sleep(1.0)


async def _post(
    client: httpx.AsyncClient,
    target: Target,
    name: str,
    url: str,
    body: bytes | dict[str, object],
    headers: dict[str, str] | None = None,
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        async with client.stream(
            "POST", url, content=data, headers=target.headers if headers is None else headers
        ) as response:
            async for _ in response.aiter_bytes():
                pass
            target.replies[f"{name}: {response.status_code}"] += 1
    except httpx.HTTPError as error:
        target.replies[f"{name}: {type(error).__name__}"] += 1


ATTACKS: tuple[Callable[[Target], Coroutine[None, None, None]], ...] = (
    silent, half_heads, half_bodies, drips, flood, leavers, bodies, images, intruders, smugglers,
)  # fmt: skip


async def attack(target: Target) -> None:
    """Attack between the lines `start` and `stop` of standard input, until it ends."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        word, *names = line.split()
        if word == "start":
            tasks = [asyncio.create_task(one(target)) for one in ATTACKS if not names or one.__name__ in names]
        else:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            print(json.dumps({"attacks": target.attacks, "replies": target.replies}), flush=True)


if __name__ == "__main__":
    os.nice(10)
    url, model, key = sys.argv[1:]
    asyncio.run(attack(Target(url, model, {"authorization": f"Bearer {key}"}, Counter(), Counter())))
