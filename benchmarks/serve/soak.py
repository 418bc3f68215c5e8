"""Mixed hostile and normal load on a controller and two workers, whose engine processes are killed at random times.

In: how long. Quiet and hostile phases of a minute take turns, so that both see the same machine. Out: a Markdown table: how
many requests of normal clients were answered, how many got neither an answer nor a worded error, memory over time, and the time
to the first token in both kinds of phases. The exit status is 1 where an expectation failed.

    python -m benchmarks.serve.soak --minutes 60 --out soak.md
    python -m benchmarks.serve.soak --minutes 4 --phase 20

The table: results/soak.md. What attackers do is in hostile.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks import ROOT
from benchmarks.measure import table
from benchmarks.serve.clients import chat_body, number_image
from benchmarks.serve.cluster import ServerProcess, wait_until

NUM_CLIENTS = 4
KILL_S = 1.0  # after a kill, in which requests may fail
WARM_UP_S = 600.0  # after which memory should be flat
MEMORY_S = 10.0  # between measurements
REQUEST_S = 60.0  # after which a request counts as one without an answer
MAX_SLOWDOWN = 2.0
MIN_SUCCESS = 0.999
MAX_GROWTH = 0.05  # of the memory after the warm-up


@dataclass
class RequestOutcome:
    """One request of a normal client."""

    start: float
    end: float
    ok: bool
    worded: bool  # an answer, or an error with a sentence
    reason: str
    first_token_s: float | None = None
    hostile: bool = False


@dataclass
class SoakRecord:
    outcomes: list[RequestOutcome] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # MB of each kind of process
    attacks: Counter[str] = field(default_factory=Counter)
    replies: Counter[str] = field(default_factory=Counter)  # to attackers, by attack and status
    hostile: bool = False


class SoakCluster:
    """A controller with keys and two workers, whose engines have processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.keys = [secrets.token_urlsafe(16) for _ in range(NUM_CLIENTS + 1)]  # the last is the attackers'
        (folder / "keys").write_text("\n".join(self.keys) + "\n")
        (folder / "worker-keys").write_text(secrets.token_urlsafe(32) + "\n")
        files = ["--worker-key-file", str(folder / "worker-keys")]
        words = ["--port", "0", "--deadline", "60", "--read-timeout", "10", *files]
        self.controller = ServerProcess("controller", "--api-key-file", str(folder / "keys"), *words)
        self.url = self.controller.address
        flags = ["--engine-process", "on", "--device", "cpu", "--controller-address", self.url, *words]
        self.workers = [ServerProcess("worker", *flags) for _ in range(2)]
        wait_until(lambda: self.num_registered() == 2, "the workers to register")
        self.model = httpx.get(f"{self.url}/v1/models", headers=self.headers(0)).json()["data"][0]["id"]

    def num_registered(self) -> int:
        page = httpx.get(f"{self.url}/metrics", headers=self.headers(0), timeout=30).text
        return page.count("llava_worker_queue_length{")

    def headers(self, client: int) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[client]}"}

    def engines(self) -> list[psutil.Process]:
        return [engine for worker in self.workers if (engine := engine_of(worker)) is not None]

    def all_ready(self) -> bool:
        """Whether the engines of both workers answer."""
        return all(httpx.get(f"{worker.address}/health", timeout=10).status_code == 200 for worker in self.workers)

    def memory(self) -> dict[str, float]:
        found = {"controller": self.controller.resident_mb}
        for number, worker in enumerate(self.workers, start=1):
            found[f"worker {number}, without its engine"] = worker.resident_mb
            engine = engine_of(worker)
            if engine is not None:
                found[f"engine {number}"] = engine.memory_info().rss / 2**20
        return found

    def stop(self) -> None:
        for process in (*self.workers, self.controller):
            process.stop()


def engine_of(worker: ServerProcess) -> psutil.Process | None:
    try:
        for child in psutil.Process(worker.popen.pid).children():
            if any("subprocess_main" in word for word in child.cmdline()):
                return child
    except psutil.Error:
        pass
    return None


# Normal clients


async def ask(client: httpx.AsyncClient, cluster: SoakCluster, number: int, rng: random.Random) -> RequestOutcome:
    """Send one request of a random kind, and read it to its end."""
    image = number_image(rng.randrange(100)) if rng.random() < 0.3 else None
    stream = rng.random() < 0.7
    question = f"Hello {rng.randrange(10**6)}, who are you?"
    body = chat_body(cluster.model, question, image, max_tokens=rng.choice([4, 16, 48]), stream=stream)
    start = time.monotonic()
    first: float | None = None
    reason, ok, worded = "", False, False
    try:
        async with (
            asyncio.timeout(REQUEST_S),
            client.stream("POST", f"{cluster.url}/v1/chat/completions", json=body, headers=cluster.headers(number)) as response,
        ):  # fmt: skip
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                reason, worded = f"status {response.status_code}", '"message":' in text
            elif not stream:
                text = (await response.aread()).decode()
                ok = worded = '"finish_reason":' in text
            else:
                async for line in response.aiter_lines():
                    if first is None and '"content":"' in line and '"content":""' not in line:
                        first = time.monotonic() - start
                    ok = ok or line == "data: [DONE]"
                    worded = worded or '"error"' in line
                reason = "an error in the stream" if worded else "" if ok else "a stream without an end"
                worded = worded or ok
    except (httpx.HTTPError, TimeoutError) as error:
        reason = type(error).__name__
    return RequestOutcome(start, time.monotonic(), ok, worded, reason, first)


async def normal(cluster: SoakCluster, record: SoakRecord, number: int, seed: int) -> None:
    rng = random.Random(seed)
    async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
        while True:
            hostile = record.hostile
            outcome = await ask(client, cluster, number, rng)
            outcome.hostile = hostile or record.hostile
            record.outcomes.append(outcome)
            await asyncio.sleep(rng.uniform(0.5, 1.5))


# What happens to them


async def phases(cluster: SoakCluster, record: SoakRecord, seconds: float) -> None:
    """Quiet and hostile phases in turn."""
    words = ["-m", "benchmarks.serve.hostile", cluster.url, cluster.model, cluster.keys[NUM_CLIENTS]]
    attackers = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert attackers.stdin is not None
    assert attackers.stdout is not None
    try:
        while True:
            await asyncio.sleep(seconds)
            attackers.stdin.write(b"start\n")
            record.hostile = True
            await asyncio.sleep(seconds)
            attackers.stdin.write(b"stop\n")
            counts = json.loads(await attackers.stdout.readline())
            record.attacks, record.replies = Counter(counts["attacks"]), Counter(counts["replies"])
            record.hostile = False
    finally:
        attackers.kill()
        await attackers.wait()


async def killer(cluster: SoakCluster, record: SoakRecord, mean_s: float, seed: int) -> None:
    """Kill an engine at random times; not while the other one is being started again, since nobody could answer then."""
    rng = random.Random(seed)
    while True:
        await asyncio.sleep(5 + rng.expovariate(1 / mean_s))
        try:
            if await asyncio.to_thread(cluster.all_ready) and len(engines := cluster.engines()) == 2:
                record.kills.append(time.monotonic())
                rng.choice(engines).kill()
        except (httpx.HTTPError, psutil.Error):
            continue


async def watch(cluster: SoakCluster, record: SoakRecord) -> None:
    while True:
        record.memory.append((time.monotonic(), cluster.memory()))
        await asyncio.sleep(MEMORY_S)


async def soak(cluster: SoakCluster, args: argparse.Namespace) -> SoakRecord:
    record = SoakRecord()
    jobs = [
        phases(cluster, record, args.phase),
        killer(cluster, record, args.kill_every, args.seed),
        watch(cluster, record),
        *(normal(cluster, record, number, args.seed + number) for number in range(NUM_CLIENTS)),
    ]
    tasks = [asyncio.create_task(job) for job in jobs]
    done, _ = await asyncio.wait(tasks, timeout=60 * args.minutes, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()  # none ends by itself
    return record


# What came of it


def rows_of(record: SoakRecord, started: float) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the table's rows, and the expectations that failed."""
    failures = []

    def near_a_kill(one: RequestOutcome) -> bool:
        return any(one.start < kill + KILL_S and one.end > kill for kill in record.kills)

    away = [one for one in record.outcomes if not near_a_kill(one)]
    num_ok = sum(one.ok for one in away)
    unworded = [one for one in record.outcomes if not one.worded]
    success = num_ok / max(1, len(away))
    if success < MIN_SUCCESS:
        failures.append(f"{success:.3%} of the requests away from a kill were answered")
    if unworded:
        failures.append(f"{len(unworded)} requests got neither an answer nor a worded error")
    near = [one for one in record.outcomes if near_a_kill(one)]
    reasons = Counter(one.reason for one in away if not one.ok)
    rows = [
        ("requests of normal clients", f"{len(record.outcomes):,}"),
        ("engine processes killed", f"{len(record.kills)}"),
        ("answered, of those outside of the second after a kill", f"{num_ok:,} of {len(away):,} ({success:.3%})"),
        ("answered, of those that ran in that second", f"{sum(one.ok for one in near):,} of {len(near):,}"),
        ("neither an answer nor a worded error", f"{len(unworded)}"),
        ("reasons of failures outside of that second", ", ".join(f"{count} {name}" for name, count in reasons.items()) or "-"),
    ]  # fmt: skip
    times = {
        hostile: [one.first_token_s for one in away if one.hostile == hostile and one.first_token_s is not None]
        for hostile in (False, True)
    }
    if all(len(values) >= 20 for values in times.values()):
        measures = {"median": statistics.median, "95 %": lambda values: statistics.quantiles(values, n=20)[18]}
        for name, measure in measures.items():
            quiet, hostile = measure(times[False]), measure(times[True])
            shown = f"{1000 * quiet:.0f} ms, {1000 * hostile:.0f} ms ({hostile / quiet:.2f} times)"
            rows.append((f"first token, {name}: undisturbed, during attacks", shown))
            if name == "median" and hostile > MAX_SLOWDOWN * quiet:
                failures.append(f"the first token came {hostile / quiet:.2f} times as late during attacks")
    for kind in record.memory[0][1]:
        values = [(when - started, found[kind]) for when, found in record.memory if kind in found]
        late = [value for when, value in values if when >= WARM_UP_S]
        if len(late) < 12:
            rows.append((f"memory, MB: {kind}, first and last", f"{values[0][1]:.0f}, {values[-1][1]:.0f}"))
            continue
        part = max(6, len(late) // 5)
        before, after = statistics.median(late[:part]), statistics.median(late[-part:])
        rows.append((f"memory, MB: {kind}, after ten minutes and at the end", f"{before:.0f}, {after:.0f}"))
        if not kind.startswith("engine") and after > before * (1 + MAX_GROWTH) + 5:
            failures.append(f"the memory of {kind} grew from {before:.0f} to {after:.0f} MB")
    rows += [(f"attack: {name}", f"{count:,}") for name, count in sorted(record.attacks.items())]
    return rows, failures


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--phase", type=float, default=60.0, help="seconds of a quiet or hostile phase (default: 60)")
    parser.add_argument(
        "--kill-every", type=float, default=60.0, help="seconds between kills, on average (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))  # of each of the two engines
    with tempfile.TemporaryDirectory() as folder:
        cluster = SoakCluster(Path(folder))
        started, load = time.monotonic(), os.getloadavg()
        try:
            record = asyncio.run(soak(cluster, args))
        finally:
            cluster.stop()
    rows, failures = rows_of(record, started)
    loads = f"load average {load[1]:.1f} before and {os.getloadavg()[1]:.1f} after"
    head = f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, {loads}; {args.minutes:g} minutes"
    text = f"{head}\n\n{table(('', ''), rows)}\n\nReplies to attackers: " + ", ".join(
        f"{name} {count:,}" for name, count in sorted(record.replies.items())
    )
    for failure in failures:
        text += f"\n\nFAILED: {failure}"
    print(text, flush=True)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
