"""A client process that costs little, so that overhead.py measures the server and not its clients.

In: one line of JSON on stdin, `{"port", "concurrency", "bodies"}`; then, once "ready" was printed, a line that starts it.
Out: one line of JSON: when it began and ended (in the system's monotonic time), and for each request the seconds to the first
text and to the end. Connections are opened beforehand, and each sends its next request when its answer is complete.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import deque
from typing import Any

FIRST_TEXT = re.compile(rb'"content": ?"[^"]')
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost:{port}\r\n"
    "content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[float | None, float]:
    started, first, seen = time.monotonic(), None, b""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = re.search(rb"content-length: (\d+)", head)
    if length:
        seen = await reader.readexactly(int(length[1]))
    else:
        while size := int(await reader.readline(), 16):
            piece = await reader.readexactly(size + 2)
            if first is None and FIRST_TEXT.search(piece):
                first = time.monotonic() - started
            seen = (seen + piece)[-1000:]
        await reader.readline()
    if not head.startswith(b"http/1.1 200") or b'"finish_reason":"length"' not in seen.replace(b" ", b""):
        raise SystemExit(f"not answered in full: {head.decode()} {seen[-500:].decode()}")
    return first, time.monotonic() - started


async def run(port: int, concurrency: int, requests: deque[bytes]) -> dict[str, Any]:
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(concurrency)]
    answers: list[tuple[float | None, float]] = []

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while requests:
            answers.append(await ask(reader, writer, requests.popleft()))
        writer.close()

    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    await asyncio.gather(*(work(*connection) for connection in connections))
    return {"began": began, "ended": time.monotonic(), "answers": answers}


def main() -> None:
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        bodies = [body.encode() for body in job["bodies"]]
        requests = deque(HEAD.format(port=job["port"], length=len(body)).encode() + body for body in bodies)
        print(json.dumps(asyncio.run(run(job["port"], job["concurrency"], requests))), flush=True)


if __name__ == "__main__":
    main()
