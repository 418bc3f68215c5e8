"""Parts of load.py: many clients at once, many requests one after another, and clients that read slowly.

In: a controller and its workers. Out: tables, and which expectations failed: no answer is lost, mixed up with another or
slowed down, and memory does not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from benchmarks.serve.clients import (
    QUESTION,
    ClientAnswer,
    ask_chat,
    ask_original,
    at_most,
    chat_body,
    new_client,
    number_image,
    original_body,
)
from benchmarks.serve.cluster import Cluster, ServerProcess, gauge
from benchmarks.serve.report import PartReport


def concurrent(cluster: Cluster, args: argparse.Namespace) -> PartReport:
    """All clients at once, half of them in each protocol, each with its own number in its image."""
    numbers = random.Random(0).sample(range(100, 1000), min(args.clients, 900))
    numbers = [numbers[i % len(numbers)] for i in range(args.clients)]
    images = {number: number_image(number) for number in set(numbers)}
    address = cluster.controller.address

    def job(client: httpx.AsyncClient, index: int) -> Awaitable[ClientAnswer]:
        number = numbers[index]
        if index % 2:
            return ask_chat(client, address, chat_body(cluster.model, QUESTION, images[number], max_tokens=16))
        return ask_original(client, address, original_body(cluster.model, images[number], f"client {index}"))

    async def run() -> tuple[list[ClientAnswer], list[ClientAnswer], float]:
        async with new_client() as client:
            alone = [await job(client, index) for index in range(args.clients)]
            started = time.perf_counter()
            together = await asyncio.gather(*(job(client, index) for index in range(args.clients)))
            return alone, list(together), time.perf_counter() - started

    alone, together, seconds = asyncio.run(run())
    lost = sum(not answer.finished for answer in together)
    changed = sum(one.text != other.text for one, other in zip(alone, together, strict=True))
    echoed = [
        answer.text.startswith(original_body(cluster.model, "", f"client {index}")["prompt"])
        for index, answer in enumerate(together)
        if index % 2 == 0
    ]
    read = sum(str(number) in answer.text for number, answer in zip(numbers, together, strict=True))
    firsts = sorted(answer.first_s for answer in together if answer.first_s is not None)
    failures = []
    if lost:
        failures.append(f"{lost} answers were lost, such as {next(a for a in together if not a.finished)}")
    if changed:
        failures.append(f"{changed} answers differ from those given alone")
    if not all(echoed):
        failures.append("another client's prompt was echoed")
    return PartReport(
        f"{args.clients} streaming clients at once",
        [
            ("answers finished", f"{len(together) - lost} of {len(together)}"),
            ("equal to the answer that the same client gets alone", f"{len(together) - changed} of {len(together)}"),
            ("own prompt echoed (original protocol)", f"{sum(echoed)} of {len(echoed)}"),
            ("the client's own number is in the answer (if the model reads it)", f"{read} of {len(together)}"),
            ("first piece, median / last", f"{statistics.median(firsts):.2f} s / {firsts[-1]:.2f} s"),
            ("all done after", f"{seconds:.1f} s"),
            ("requests per second", f"{len(together) / seconds:.1f}"),
        ],
        failures,
    )


def memory(cluster: Cluster, args: argparse.Namespace) -> PartReport:
    """Many short requests, of which every tenth shows an image that was never seen before."""
    address, sizes, features = cluster.controller.address, [], []
    processes = {"controller": cluster.controller} | {
        f"worker {number}": process for number, process in enumerate(cluster.workers, start=1)
    }
    step = max(1, args.requests // 10)
    rng = random.Random(1)

    def job(client: httpx.AsyncClient, index: int) -> Callable[[], Awaitable[ClientAnswer]]:
        image = number_image(rng.randrange(10**6)) if index % 10 == 0 else None
        body = chat_body(cluster.model, f"Say something about {index}.", image, max_tokens=2)
        return lambda: ask_chat(client, address, body)

    async def run() -> tuple[int, float]:
        failed, started = 0, time.perf_counter()
        async with new_client() as client:
            for first in range(0, args.requests, step):
                jobs = [job(client, index) for index in range(first, min(first + step, args.requests))]
                failed += sum(not answer.finished for answer in await at_most(64, jobs))
                sizes.append({name: process.resident_mb for name, process in processes.items()})
                features.append({name: encoder_cache_mb(process) for name, process in processes.items()})
        return failed, time.perf_counter() - started

    failed, seconds = asyncio.run(run())
    middle = len(sizes) // 2
    # The encoder cache grows up to its bound; the rest must not grow.
    growth = {
        name: (sizes[-1][name] - features[-1][name]) - (sizes[middle][name] - features[middle][name])
        for name in processes
    }
    failures = [f"{failed} requests failed"] if failed else []
    per_request = {name: 1024 * grown / (args.requests - (middle + 1) * step or 1) for name, grown in growth.items()}
    failures += [
        f"the {name} grows by {kb:.1f} KB a request" for name, kb in per_request.items() if kb > 4 and growth[name] > 64
    ]
    rows: list[tuple[Any, ...]] = []
    for name in processes:
        sizes_mb = f"{sizes[middle][name]:.0f}, {sizes[-1][name]:.0f}"
        rows.append((f"{name}: MB after {(middle + 1) * step:,} requests, and after all", sizes_mb))
        if features[-1][name]:
            kept = f"{features[middle][name]:.0f}, {features[-1][name]:.0f}"
            rows.append(("... of these, the encoder cache", kept))
            rows.append(("... growth beside them", f"{growth[name]:.0f}"))
    rows += [("failed", failed), ("requests per second, 64 at once", f"{args.requests / seconds:.0f}")]
    return PartReport(f"Memory over {args.requests:,} requests", rows, failures)


def slow_readers(cluster: Cluster, args: argparse.Namespace) -> PartReport:
    """Clients that read slowly beside others."""
    address = cluster.controller.address
    body = chat_body(cluster.model, "hi", max_tokens=24, ignore_eos=True)
    long = chat_body(cluster.model, "hi", max_tokens=300, ignore_eos=True, logprobs=True, top_logprobs=20)
    count, num_slow = 40, min(50, args.clients)

    async def measured(client: httpx.AsyncClient) -> list[float]:
        answers = [await ask_chat(client, address, body) for _ in range(count)]
        return [answer.total_s for answer in answers if answer.finished]

    async def run() -> tuple[list[float], list[float]]:
        async with new_client() as client, new_client() as other:
            before = await measured(client)
            tasks = [asyncio.create_task(ask_chat(other, address, long, pause_s=0.5)) for _ in range(num_slow)]
            # The model works for the slow clients too. Measured is the time after that, while they have not read yet.
            await asyncio.sleep(2)
            await idle(cluster)
            during = await measured(client)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return before, during

    before, during = asyncio.run(run())
    slower = statistics.median(during) / statistics.median(before)
    failures = [] if len(during) == count and slower < 3 else [f"others were answered {slower:.1f} times slower"]
    return PartReport(
        f"{num_slow} clients that read slowly",
        [
            ("an answer of 24 tokens without them, median", f"{statistics.median(before):.3f} s"),
            ("beside them", f"{statistics.median(during):.3f} s"),
            ("answered beside them", f"{len(during)} of {count}"),
        ],
        failures,
    )


def encoder_cache_mb(process: ServerProcess) -> float:
    return (gauge(process, "llava_engine_feature_cache_bytes") or 0.0) / 2**20


async def idle(cluster: Cluster) -> None:
    """Until no engine computes."""
    async with new_client() as client:
        for _ in range(600):
            pages = [(await client.get(f"{worker.address}/metrics")).text for worker in cluster.workers]
            if all("llava_engine_running 0.0" in page and "llava_engine_waiting 0.0" in page for page in pages):
                return
            await asyncio.sleep(0.2)
