"""Parts of load.py: killed workers, a killed controller, and malformed requests.

In: a controller and its workers. Out: tables, and which expectations failed: every client gets an error message, the next
requests are answered, and there is no server error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from benchmarks.serve.clients import (
    CHAT,
    GENERATE,
    ClientAnswer,
    ask_chat,
    at_most,
    chat_body,
    new_client,
    number_image,
)
from benchmarks.serve.cluster import Cluster, ServerProcess, queue_length, requests_finished, wait_until
from benchmarks.serve.report import PartReport


def kill(cluster: Cluster, args: argparse.Namespace) -> PartReport:
    """A worker killed with -9 while it answers."""
    address = cluster.controller.address
    count = min(40, args.clients)
    body = chat_body(cluster.model, "hi", max_tokens=900, ignore_eos=True)
    short = chat_body(cluster.model, "hi", max_tokens=3)
    victim = cluster.workers[0]

    async def run() -> tuple[list[ClientAnswer], list[ClientAnswer]]:
        async with new_client() as client:
            running = [asyncio.create_task(ask_chat(client, address, body)) for _ in range(count)]
            # Where no byte was sent yet, the controller asks the other worker; where one was, an error ends the stream.
            await asyncio.to_thread(wait_until, lambda: queue_length(victim), "the worker to be asked")
            victim.popen.kill()
            caught = list(await asyncio.gather(*running))
            return caught, list(await asyncio.gather(*(ask_chat(client, address, short) for _ in range(count))))

    caught, following = asyncio.run(run())
    victim.popen.wait()
    cluster.workers.remove(victim)
    finished = sum(answer.finished for answer in caught)
    with_error = sum(answer.error is not None for answer in caught)
    silent = count - finished - with_error
    next_answered = sum(answer.finished for answer in following)
    new = cluster.add_worker()

    async def again() -> int:
        async with new_client() as client:
            answers = await asyncio.gather(*(ask_chat(client, address, short) for _ in range(count)))
            return sum(answer.finished for answer in answers)

    served = asyncio.run(again())
    by_new = requests_finished(new)
    failures = []
    if silent:
        failures.append(f"{silent} clients of the killed worker got no error message")
    if next_answered < count or served < count:
        failures.append("requests failed after the kill")
    if not by_new:
        failures.append("the new worker got no request")
    return PartReport(
        "A worker killed with -9 while it answers",
        [
            ("clients at that moment", count),
            ("finished by the other worker", finished),
            ("ended with an error message", with_error),
            ("ended without a message", silent),
            ("next requests answered", f"{next_answered} of {count}"),
            ("after a new worker came: answered, of these by it", f"{served} of {count}, {by_new}"),
        ],
        failures,
    )


def controller(cluster: Cluster, args: argparse.Namespace) -> PartReport:
    """The controller killed with -9 and started anew at the same address."""
    port = cluster.controller.address.rpartition(":")[2]
    cluster.controller.stop(signal.SIGKILL)
    cluster.controller = ServerProcess("controller", "--port", port, "--deadline", "300")
    addresses = {worker.address for worker in cluster.workers}
    seconds = wait_until(lambda: addresses <= cluster.registered(), "the workers to register again")

    async def run() -> int:
        async with new_client() as client:
            body = chat_body(cluster.model, "hi", max_tokens=3)
            answers = await asyncio.gather(*(ask_chat(client, cluster.controller.address, body) for _ in range(20)))
            return sum(answer.finished for answer in answers)

    served = asyncio.run(run())
    return PartReport(
        "The controller killed with -9 and started again",
        [
            ("workers registered again after", f"{seconds:.1f} s"),
            ("requests answered then", f"{served} of 20"),
        ],
        [] if served == 20 else ["requests failed after the controller was started again"],
    )


def malformed(cluster: Cluster, args: argparse.Namespace) -> PartReport:
    """Bodies, images and headers that are wrong in many ways, to the controller and to a worker directly."""
    rng = random.Random(2)
    places = [cluster.controller.address, cluster.workers[0].address]
    good = chat_body(cluster.model, "hi", number_image(5), max_tokens=1, stream=False)
    before = {
        place: process.resident_mb
        for place, process in zip(places, (cluster.controller, cluster.workers[0]), strict=True)
    }

    def garbage(size: int) -> bytes:
        return bytes(rng.randrange(256) for _ in range(size))

    def body() -> bytes:
        text = json.dumps(good).encode()
        kind = rng.randrange(7)
        if kind == 0:
            return garbage(rng.randrange(200))
        if kind == 1:
            return text[: rng.randrange(len(text))]
        if kind == 2:
            place = rng.randrange(len(text))
            return text[:place] + garbage(3) + text[place + 3 :]
        wrong = json.loads(text)
        if kind == 3:
            wrong[rng.choice(list(wrong))] = rng.choice([None, -1, "x" * 50, [], {}, 1e300, True])
        elif kind == 4:
            wrong["messages"][0]["content"][1]["image_url"] = {"url": "data:image/png;base64," + garbage(30).hex()}
        elif kind == 5:
            wrong["messages"][0][rng.choice(["role", "content", "name"])] = rng.choice([5, None, "tool", [[]]])
        else:
            wrong[rng.choice(["temperature", "n", "seed", "logit_bias", "stop", "prompt", "images"])] = rng.choice(
                [float("inf"), -5, "a", {"a": "b"}, [None], 2**70]
            )
        return json.dumps(wrong).encode()

    def job(client: httpx.AsyncClient) -> Callable[[], Awaitable[int | str]]:
        path = rng.choice(
            [CHAT, "/v1/completions", GENERATE, "/register_worker", "/receive_heart_beat", "/%00", "/../x"]
        )
        headers: dict[str, Any] = {} if rng.random() < 0.8 else {"content-type": rng.choice(["text/xml", "é".encode()])}
        content, place = body(), rng.choice(places)

        async def send() -> int | str:
            try:
                response = await client.post(place + path, content=content, headers=headers)
                with_code = b'"error_code": 1' in response.content
                return "200 with error_code 1" if response.status_code == 200 and with_code else response.status_code
            except httpx.HTTPError as error:
                return type(error).__name__

        return send

    async def raw(place: str) -> str:
        """Send bytes that are not HTTP, or a head without an end."""
        host, port = place.removeprefix("http://").rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(rng.choice([garbage(100) + b"\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000]))
        data = b""
        with contextlib.suppress(
            ConnectionError
        ):  # a connection closed while there is more to read counts as an answer
            writer.write_eof()
            while piece := await asyncio.wait_for(reader.read(4096), 10):
                data += piece
        writer.close()
        return data.split(b"\r\n")[0].decode(errors="replace")[:12] or "closed"

    async def run() -> Counter[Any]:
        async with new_client() as client:
            jobs = [job(client) for _ in range(args.malformed)]
            statuses = Counter(await at_most(32, jobs))
            num_raw = max(1, args.malformed // 20)
            statuses.update(await at_most(16, [lambda: raw(rng.choice(places)) for _ in range(num_raw)]))
            final = [await ask_chat(client, place, chat_body(cluster.model, "hi", max_tokens=2)) for place in places]
            statuses["then a valid request"] = sum(answer.finished for answer in final)
            return statuses

    statuses = asyncio.run(run())
    faults = {status: count for status, count in statuses.items() if isinstance(status, int) and status >= 500}
    faults |= {status: count for status, count in statuses.items() if "HTTP/1.1 5" in str(status)}
    failures = [f"server errors: {faults}"] if faults else []
    if statuses["then a valid request"] != 2:
        failures.append("valid requests failed afterwards")
    rows: list[tuple[Any, ...]] = sorted(((str(status), count) for status, count in statuses.items()), key=str)
    for place, process in zip(places, (cluster.controller, cluster.workers[0]), strict=True):
        after = process.resident_mb
        name = "controller" if process is cluster.controller else "worker"
        rows.append((f"{name}: MB before and after", f"{before[place]:.0f}, {after:.0f}"))
        if after - before[place] > 64 + 0.004 * args.malformed:
            failures.append(f"the {name} has grown by {after - before[place]:.0f} MB")
    return PartReport(f"{args.malformed:,} malformed requests", rows, failures)
