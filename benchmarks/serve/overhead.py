"""The part `overhead` of load.py: what HTTP costs over the bare engine, in requests per second and time to first token.

In: a model, or LLaVA-1.5-7B's shapes with random weights, which are drawn on the device. Out: a table and a plot, against
concurrency. The server is a worker as `llava worker` runs it, in this process, with its engine in a process of its own. The
bare engine is a second one in this process, which is idle while the server is measured. Threads submit requests to it for
whole answers, the least work that it can be given, and open their images themselves. With `--engine-process off` one
engine, in this process, serves both. Clients are other processes. The ways alternate round by round, each request has a
text (and image) of its own, and medians of the rounds are shown.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.serve.clients import chat_body, image_text
from benchmarks.serve.report import PartReport

NUM_WORDS = 45  # of a question, which becomes a prompt of about 50 tokens with the template
WORDS = [
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "star",
    "large",
    "small",
    "image",
    "left",
    "right",
    "top",
    "bottom",
]
IMAGE_SIDE = 336
WAYS = ("bare", "whole", "streamed")
MODEL = "measured"


@dataclass(frozen=True)
class Level:
    concurrency: int
    with_image: bool

    @property
    def name(self) -> str:
        return f"{self.concurrency}{', a new image each' if self.with_image else ''}"


@dataclass(frozen=True)
class Rate:
    """Of one way at one level."""

    per_s: float
    first_s: float | None  # None for whole answers over HTTP, which show no first token


@dataclass(frozen=True)
class Question:
    text: str
    image: bytes | None = None  # PNG
    encoded: str | None = None  # the same in base64, for HTTP


class Questions:
    """Questions of one length, no two alike."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def draw(self, count: int, *, with_image: bool) -> list[Question]:
        return [self._one(with_image) for _ in range(count)]

    def _one(self, with_image: bool) -> Question:
        text = " ".join(self._random.choice(WORDS) for _ in range(NUM_WORDS))
        if not with_image:
            return Question(text)
        from PIL import Image

        small = Image.frombytes("RGB", (12, 12), self._random.randbytes(3 * 144))
        buffer = io.BytesIO()
        small.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG")
        return Question(text, buffer.getvalue(), image_text(buffer.getvalue()))


class Clients:
    """Processes that ask over HTTP, each a share of the requests."""

    def __init__(self, number: int, address: str) -> None:
        command = [sys.executable, "-m", "benchmarks.serve.rate_client"]
        self._port = int(address.rpartition(":")[2])
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
        ]

    def ask(self, questions: Sequence[Question], concurrency: int, *, num_tokens: int, stream: bool) -> Rate:
        bodies = [
            json.dumps(
                chat_body(MODEL, question.text, question.encoded, max_tokens=num_tokens, ignore_eos=True, stream=stream)
            )
            for question in questions
        ]
        number = min(len(self._processes), concurrency)
        for place, process in enumerate(self._processes[:number]):
            share = len(range(place, concurrency, number))
            job = {"port": self._port, "concurrency": share, "bodies": bodies[place::number]}
            self._send(process, json.dumps(job))
        for process in self._processes[:number]:
            assert self._receive(process) == "ready"
        for process in self._processes[:number]:
            self._send(process, "begin")
        replies = [json.loads(self._receive(process)) for process in self._processes[:number]]
        seconds = max(one["ended"] for one in replies) - min(one["began"] for one in replies)
        firsts = [first for one in replies for first, _ in one["answers"] if first is not None]
        return Rate(len(bodies) / seconds, statistics.median(firsts) if firsts else None)

    @staticmethod
    def _send(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    @staticmethod
    def _receive(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("a client process ended; its error is above")
        return line.strip()

    def stop(self) -> None:
        for process in self._processes:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(30)


def ask_bare(engine: Any, card: Any, questions: Sequence[Question], concurrency: int, *, num_tokens: int) -> Rate:
    """Measure the bare engine: each thread waits for a whole answer before its next request, as a client over HTTP does."""
    from llava.conversation import with_image_placeholders
    from llava.engine.request import Request, SamplingParams
    from llava.images.io import load_image

    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    waiting, firsts, begin = deque(questions), [], threading.Barrier(concurrency + 1)

    def work() -> None:
        begin.wait()
        while waiting:
            try:
                question = waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            started = time.perf_counter()
            images = () if question.image is None else (load_image(question.image),)
            conversation = card.template.copy()
            conversation.append_message(
                conversation.roles[0], with_image_placeholders(question.text, len(images), card.image_placeholder)
            )
            conversation.append_message(conversation.roles[1], None)
            handle = engine.submit(Request(conversation, images, sampling), streamed=False)
            submitted = time.perf_counter()
            firsts.append(submitted - started + handle.result().timings.first_token_s)

    threads = [threading.Thread(target=work) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    begin.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return Rate(len(questions) / (time.perf_counter() - began), statistics.median(firsts))


def measure(engine: Any, card: Any, address: str, args: argparse.Namespace) -> dict[Level, dict[str, list[Rate]]]:
    questions = Questions()
    levels = [Level(n, False) for n in args.levels] + [Level(n, True) for n in args.image_levels]
    clients = Clients(min(4, max(1, (os.cpu_count() or 1) // 4)), address)
    ways: dict[str, Callable[..., Rate]] = {
        "bare": lambda asked, n, tokens: ask_bare(engine, card, asked, n, num_tokens=tokens),
        "whole": lambda asked, n, tokens: clients.ask(asked, n, num_tokens=tokens, stream=False),
        "streamed": lambda asked, n, tokens: clients.ask(asked, n, num_tokens=tokens, stream=True),
    }

    def once(level: Level, way: str, count: int, num_tokens: int) -> Rate:
        asked = questions.draw(count, with_image=level.with_image)
        return ways[way](asked, level.concurrency, num_tokens)

    found: dict[Level, dict[str, list[Rate]]] = {level: {way: [] for way in WAYS} for level in levels}
    try:
        for level in levels:
            for way in WAYS:
                once(level, way, level.concurrency, min(8, args.tokens))  # warm
            for number in range(args.rounds):
                for way in WAYS if number % 2 == 0 else reversed(WAYS):
                    count = max(args.least, 3 * level.concurrency)
                    found[level][way].append(once(level, way, count, args.tokens))
            print(f"{level.name}: done", file=sys.stderr, flush=True)
    finally:
        clients.stop()
    return found


def overhead(args: argparse.Namespace) -> PartReport:
    """Start a worker in this process, measure it and the bare engine, and return the table."""
    from llava.assets import embedded_model_path
    from llava.engine.config import EngineConfig
    from llava.engine.engine import Engine
    from llava.model.builder import load
    from llava.serve.backends.in_process import EngineBackend
    from llava.serve.backends.subprocess import ProcessBackend
    from llava.serve.http.flags import limits_from, listen_address_from
    from llava.serve.model_worker import build_parser, serve_worker
    from llava.serve.service import Service

    if args.shapes is not None:
        from benchmarks.random_checkpoint import in_memory

        make, what = partial(in_memory, args.shapes, args.device), f"random weights in LLaVA-1.5-{args.shapes}'s shapes"
    else:
        path = args.model_path or embedded_model_path()
        make, what = partial(load, path, device=args.device), f"the model {Path(path).name}"
    flags = build_parser().parse_args(["--no-register", "--host", "127.0.0.1", "--port", "0", "--log-level", "warning"])
    address = listen_address_from(flags)
    apart = args.engine_process == "on"
    # The first engine takes 0.45 of a GPU's memory, the second what is then left of 0.9.
    backend: Any = ProcessBackend(make, name=MODEL, config=EngineConfig(memory_fraction=0.45)) if apart else None
    loaded = make()
    if backend is None:
        backend = EngineBackend(loaded, name=MODEL)
        engine = backend.engine
    else:
        engine = Engine.from_loaded(loaded)
    found: list[Any] = []

    def run() -> None:
        try:
            wait_for(address.url)
            found.append(measure(engine, backend.model.card, address.url, args))
        except BaseException as error:
            found.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=run, daemon=True).start()
    serve_worker(Service(backend, limits_from(flags), address.access.memory), flags, address)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if isinstance(found[0], BaseException):
        raise found[0]
    medians = {level: {way: median(rates) for way, rates in by_way.items()} for level, by_way in found[0].items()}
    part = PartReport(
        f"Over HTTP and on the bare engine: {what} on {device_name(loaded.model.device)}, {args.tokens} tokens an answer, "
        f"the server's engine in {'a process of its own' if apart else 'its process'}, median of {args.rounds} rounds",
        [row(level, ways, found[0][level]["bare"]) for level, ways in medians.items()],
        [],
        columns=(
            "at once",
            *("requests/s: bare engine", "whole answers", "streamed", "overhead: whole", "streamed", "spread of bare"),
            *("first token, ms: bare engine", "streamed"),
        ),
    )
    if args.out is not None:
        from benchmarks.serve.plot import plot

        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "serve_overhead.svg").write_text(plot(medians, what), encoding="utf-8")
        (args.out / "serve_overhead.md").write_text(part.table() + "\n", encoding="utf-8")
    return part


def median(rates: Sequence[Rate]) -> Rate:
    firsts = [rate.first_s for rate in rates if rate.first_s is not None]
    return Rate(statistics.median(rate.per_s for rate in rates), statistics.median(firsts) if firsts else None)


def row(level: Level, ways: dict[str, Rate], bare: Sequence[Rate]) -> tuple[str, ...]:
    def over(way: str) -> str:
        return f"{100 * (ways['bare'].per_s / ways[way].per_s - 1):.1f}%"

    spread = (max(rate.per_s for rate in bare) - min(rate.per_s for rate in bare)) / ways["bare"].per_s
    rates = [f"{ways[way].per_s:.2f}" for way in WAYS]
    firsts = [f"{1000 * (ways[way].first_s or 0):.1f}" for way in ("bare", "streamed")]
    return (level.name, *rates, over("whole"), over("streamed"), f"{100 * spread:.1f}%", *firsts)


def wait_for(address: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/ready", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the worker did not become ready")


def device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU with {os.cpu_count()} cores"
