"""What the servers hold: many clients at once, killed processes, sleepy and malformed clients, and memory over many requests.

In: nothing but the package and its embedded model (or --model-path). It starts a controller and two workers on loopback, sends
bounded numbers of requests to them, and stops them. Out: Markdown tables; the exit status is 1 if a promise was broken.

    python benchmarks/serve.py                                   the whole, on a CPU in about half an hour
    python benchmarks/serve.py --only crowd --clients 500        one part of it
    python benchmarks/serve.py --only overhead --workers 1 --device cuda     requests/s and first token over the bare engine
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
CHAT = "/v1/chat/completions"
GENERATE = "/worker_generate_stream"
LONGEST_S = 900.0  # no part of this waits longer


class Process:
    """A `llava` command and the address that it prints."""

    def __init__(self, word: str, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "llava", word, "--log-level", "warning", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.address = ""
        found = threading.Event()

        def read() -> None:
            for line in iter(self.popen.stdout.readline, ""):  # type: ignore[union-attr]
                match = re.match(rf"{word} +(http\S+)", line)
                if match:
                    self.address = match[1]
                    found.set()

        threading.Thread(target=read, daemon=True).start()
        if not found.wait(180):
            self.stop(signal.SIGKILL)
            raise SystemExit(f"llava {word} did not start")

    @property
    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()


@dataclass
class House:
    """A controller and its workers."""

    controller: Process
    workers: list[Process]
    arguments: list[str]
    model: str = ""

    @classmethod
    def start(cls, arguments: list[str], *, num_workers: int = 2) -> House:
        controller = Process("controller", "--port", "0", "--deadline", "300")
        house = cls(controller, [], arguments)
        for _ in range(num_workers):
            house.add_worker()
        house.model = httpx.get(f"{controller.address}/v1/models", timeout=30).json()["data"][0]["id"]
        return house

    def add_worker(self) -> Process:
        worker = Process("worker", "--port", "0", "--controller-address", self.controller.address, *self.arguments)
        self.workers.append(worker)
        wait_until(lambda: worker.address in self.registered(), "a worker to register")
        return worker

    def registered(self) -> set[str]:
        """The workers that the controller knows, dead ones included until it notices."""
        page = httpx.get(f"{self.controller.address}/metrics", timeout=30).text
        return set(re.findall(r'^llava_worker_queue_length{worker="([^"]+)"}', page, flags=re.MULTILINE))

    def stop(self) -> None:
        for process in (*self.workers, self.controller):
            process.stop()


def wait_until(holds: Callable[[], Any], what: str, seconds: float = 120) -> float:
    started = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - started
        except httpx.HTTPError:
            pass
        if time.monotonic() - started > seconds:
            raise SystemExit(f"waited in vain for {what}")
        time.sleep(0.05)


# Asking


@dataclass
class Answer:
    text: str = ""
    first_s: float | None = None
    total_s: float = 0.0
    status: int = 0
    error: str | None = None  # told in words
    finished: bool = False
    num_tokens: int = 0


def number_picture(number: int) -> str:
    """A picture of a number, which the embedded model reads."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (224, 224), (250, 250, 250))
    ImageDraw.Draw(image).text((112, 112), str(number), (20, 20, 20), ImageFont.load_default(72), anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def chat_body(model: str, text: str, picture: str | None = None, **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}})
    return {"model": model, "messages": [{"role": "user", "content": parts}], "stream": True} | more


async def ask_chat(client: httpx.AsyncClient, address: str, body: dict[str, Any], *, pause_s: float = 0.0) -> Answer:
    """A streamed answer over the OpenAI-compatible API; `pause_s` is how long a sleepy client waits after each piece."""
    answer, started = Answer(), time.perf_counter()
    try:
        async with client.stream("POST", address + CHAT, json=body) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = json.loads(await response.aread())["error"]["message"]
                return answer
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    answer.finished = True
                elif line.startswith("data:"):
                    event = json.loads(line[5:])
                    if "error" in event:
                        answer.error = event["error"]["message"]
                    for choice in event.get("choices") or ():
                        piece = choice["delta"].get("content")
                        if piece:
                            answer.first_s = answer.first_s or time.perf_counter() - started
                            answer.text += piece
                            answer.num_tokens += 1
                    if pause_s:
                        await asyncio.sleep(pause_s)
    except httpx.HTTPError as error:
        answer.text += f" [{type(error).__name__}]"
    answer.total_s = time.perf_counter() - started
    return answer


async def ask_original(client: httpx.AsyncClient, address: str, body: dict[str, Any]) -> Answer:
    """A streamed answer in the original protocol; its text begins with the prompt."""
    from llava.serve.protocol import ChunkReader

    answer, started, reader = Answer(), time.perf_counter(), ChunkReader()
    try:
        async with client.stream("POST", address + GENERATE, json=body) as response:
            answer.status = response.status_code
            async for data in response.aiter_raw():
                for chunk in reader.feed(data):
                    answer.first_s = answer.first_s or time.perf_counter() - started
                    answer.text, answer.error = chunk["text"], chunk["text"] if chunk["error_code"] else None
            answer.finished = answer.error is None
    except httpx.HTTPError as error:
        answer.text += f" [{type(error).__name__}]"
    answer.total_s = time.perf_counter() - started
    return answer


def new_client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.0)
    return httpx.AsyncClient(timeout=httpx.Timeout(LONGEST_S, connect=60), limits=limits, trust_env=False)


async def at_most(number: int, jobs: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Do all jobs, so many at a time."""
    gate = asyncio.Semaphore(number)

    async def one(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    return await asyncio.gather(*(one(job) for job in jobs))


# The parts. Each gives a heading, rows of a table, and what was broken.


@dataclass
class Part:
    heading: str
    rows: list[tuple[Any, ...]]
    broken: list[str]

    def show(self) -> None:
        print(f"\n## {self.heading}\n\n| | |\n| --- | ---: |")
        for row in self.rows:
            print("| " + " | ".join(str(value) for value in row) + " |")
        for promise in self.broken:
            print(f"\nBROKEN: {promise}")
        sys.stdout.flush()


QUESTION = "What is written here?\nAnswer the question using a single word or phrase."


def original_body(model: str, picture: str, tag: str) -> dict[str, Any]:
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        f"and polite answers to the user's questions. USER: {tag} ASSISTANT: Yes.</s>USER: <image>\n{QUESTION} ASSISTANT:"
    )
    return {
        "model": model,
        "prompt": prompt,
        "images": [picture],
        "temperature": 0,
        "max_new_tokens": 16,
        "stop": "</s>",
    }


def crowd(house: House, args: argparse.Namespace) -> Part:
    """All clients at once, half of them in each protocol, each with a number of its own in its picture."""
    numbers = random.Random(0).sample(range(100, 1000), min(args.clients, 900))
    numbers = [numbers[i % len(numbers)] for i in range(args.clients)]
    pictures = {number: number_picture(number) for number in set(numbers)}
    address = house.controller.address

    def job(client: httpx.AsyncClient, index: int) -> Awaitable[Answer]:
        number = numbers[index]
        if index % 2:
            return ask_chat(client, address, chat_body(house.model, QUESTION, pictures[number], max_tokens=16))
        return ask_original(client, address, original_body(house.model, pictures[number], f"client {index}"))

    async def run() -> tuple[list[Answer], list[Answer], float]:
        async with new_client() as client:
            alone = [await job(client, index) for index in range(args.clients)]
            started = time.perf_counter()
            together = await asyncio.gather(*(job(client, index) for index in range(args.clients)))
            return alone, list(together), time.perf_counter() - started

    alone, together, seconds = asyncio.run(run())
    lost = sum(not answer.finished for answer in together)
    changed = sum(one.text != other.text for one, other in zip(alone, together, strict=True))
    echoed = [
        answer.text.startswith(original_body(house.model, "", f"client {index}")["prompt"])
        for index, answer in enumerate(together)
        if index % 2 == 0
    ]
    read = sum(str(number) in answer.text for number, answer in zip(numbers, together, strict=True))
    firsts = sorted(answer.first_s for answer in together if answer.first_s is not None)
    broken = []
    if lost:
        broken.append(f"{lost} answers were lost, such as {next(a for a in together if not a.finished)}")
    if changed:
        broken.append(f"{changed} answers differ from those given alone")
    if not all(echoed):
        broken.append("a prompt of somebody else was echoed")
    return Part(
        f"{args.clients} streaming clients at once",
        [
            ("answers finished", f"{len(together) - lost} of {len(together)}"),
            ("equal to the answer that the same client gets alone", f"{len(together) - changed} of {len(together)}"),
            ("own prompt echoed (original protocol)", f"{sum(echoed)} of {len(echoed)}"),
            ("the client's own number is in the answer (as well as the model reads)", f"{read} of {len(together)}"),
            ("first piece, median / last", f"{statistics.median(firsts):.2f} s / {firsts[-1]:.2f} s"),
            ("all done after", f"{seconds:.1f} s"),
            ("requests per second", f"{len(together) / seconds:.1f}"),
        ],
        broken,
    )


def memory(house: House, args: argparse.Namespace) -> Part:
    """Many short requests, of which every tenth shows a picture that was never seen before."""
    address, sizes = house.controller.address, []
    processes = {"controller": house.controller} | {
        f"worker {number}": process for number, process in enumerate(house.workers, start=1)
    }
    step = max(1, args.requests // 10)
    random_numbers = random.Random(1)

    def job(client: httpx.AsyncClient, index: int) -> Callable[[], Awaitable[Answer]]:
        picture = number_picture(random_numbers.randrange(10**6)) if index % 10 == 0 else None
        body = chat_body(house.model, f"Say something about {index}.", picture, max_tokens=2)
        return lambda: ask_chat(client, address, body)

    async def run() -> tuple[int, float]:
        failed, started = 0, time.perf_counter()
        async with new_client() as client:
            for first in range(0, args.requests, step):
                jobs = [job(client, index) for index in range(first, min(first + step, args.requests))]
                failed += sum(not answer.finished for answer in await at_most(64, jobs))
                sizes.append({name: process.resident_mb for name, process in processes.items()})
        return failed, time.perf_counter() - started

    failed, seconds = asyncio.run(run())
    middle = len(sizes) // 2
    growth = {name: sizes[-1][name] - sizes[middle][name] for name in processes}
    broken = [f"{failed} requests failed"] if failed else []
    per_request = {name: 1024 * grown / (args.requests - (middle + 1) * step or 1) for name, grown in growth.items()}
    broken += [
        f"the {name} grows by {kb:.1f} KB a request" for name, kb in per_request.items() if kb > 4 and growth[name] > 64
    ]
    rows: list[tuple[Any, ...]] = [
        (
            f"{name}: MB after {(middle + 1) * step:,} requests, and after all",
            f"{sizes[middle][name]:.0f}, {sizes[-1][name]:.0f}",
        )
        for name in processes
    ]
    cached = {process.address: gauge(process, "llava_engine_feature_cache_bytes") for process in house.workers}
    rows.append(
        (
            "of these, image features kept for pictures that come again",
            ", ".join(f"{n / 2**20:.0f}" for n in cached.values()),
        )
    )
    rows += [("failed", failed), ("requests per second, 64 at once", f"{args.requests / seconds:.0f}")]
    return Part(f"Memory over {args.requests:,} requests", rows, broken)


def gauge(process: Process, name: str) -> float:
    page = httpx.get(f"{process.address}/metrics", timeout=30).text
    return float(re.search(rf"^{name} (\S+)", page, flags=re.MULTILINE)[1])  # type: ignore[index]


def kill(house: House, args: argparse.Namespace) -> Part:
    """A worker killed with -9 while it answers."""
    address = house.controller.address
    count = min(40, args.clients)
    body = chat_body(house.model, "hi", max_tokens=300, ignore_eos=True)
    short = chat_body(house.model, "hi", max_tokens=3)
    victim = house.workers[0]

    async def run() -> tuple[list[Answer], list[Answer]]:
        async with new_client() as client:
            running = [asyncio.create_task(ask_chat(client, address, body)) for _ in range(count)]
            await asyncio.sleep(1.5)
            victim.popen.kill()
            caught = list(await asyncio.gather(*running))
            return caught, list(await asyncio.gather(*(ask_chat(client, address, short) for _ in range(count))))

    caught, following = asyncio.run(run())
    victim.popen.wait()
    house.workers.remove(victim)
    finished = sum(answer.finished for answer in caught)
    told = sum(answer.error is not None for answer in caught)
    silent = count - finished - told
    went_on = sum(answer.finished for answer in following)
    new = house.add_worker()

    async def again() -> int:
        async with new_client() as client:
            answers = await asyncio.gather(*(ask_chat(client, address, short) for _ in range(count)))
            return sum(answer.finished for answer in answers)

    served = asyncio.run(again())
    by_new = requests_finished(new)
    broken = []
    if silent:
        broken.append(f"{silent} clients of the killed worker were told nothing")
    if not told:
        broken.append("nobody was being answered by the killed worker")
    if went_on < count or served < count:
        broken.append("requests failed after the kill")
    if not by_new:
        broken.append("the new worker was asked nothing")
    return Part(
        "A worker killed with -9 while it answers",
        [
            ("clients at that moment", count),
            ("finished by the other worker", finished),
            ("ended with an error in words", told),
            ("ended without a word", silent),
            ("next requests answered", f"{went_on} of {count}"),
            ("after a new worker came: answered, of these by it", f"{served} of {count}, {by_new}"),
        ],
        broken,
    )


def requests_finished(worker: Process) -> int:
    page = httpx.get(f"{worker.address}/metrics", timeout=30).text
    found = re.search(r'^llava_requests_total{end="finished"} (\S+)', page, flags=re.MULTILINE)
    return int(float(found[1])) if found else 0


def controller(house: House, args: argparse.Namespace) -> Part:
    """The controller killed with -9 and started anew at the same address."""
    port = house.controller.address.rpartition(":")[2]
    house.controller.stop(signal.SIGKILL)
    house.controller = Process("controller", "--port", port, "--deadline", "300")
    everybody = {worker.address for worker in house.workers}
    seconds = wait_until(lambda: everybody <= house.registered(), "the workers to register again")

    async def run() -> int:
        async with new_client() as client:
            body = chat_body(house.model, "hi", max_tokens=3)
            answers = await asyncio.gather(*(ask_chat(client, house.controller.address, body) for _ in range(20)))
            return sum(answer.finished for answer in answers)

    served = asyncio.run(run())
    return Part(
        "The controller killed with -9 and started again",
        [
            ("workers registered again after", f"{seconds:.1f} s"),
            ("requests answered then", f"{served} of 20"),
        ],
        [] if served == 20 else ["requests failed after the controller's return"],
    )


def sleepy(house: House, args: argparse.Namespace) -> Part:
    """Clients that read slowly beside others."""
    address = house.controller.address
    body = chat_body(house.model, "hi", max_tokens=24, ignore_eos=True)
    long = chat_body(house.model, "hi", max_tokens=300, ignore_eos=True, logprobs=True, top_logprobs=20)
    count, num_sleepy = 40, min(50, args.clients)

    async def measured(client: httpx.AsyncClient) -> list[float]:
        answers = [await ask_chat(client, address, body) for _ in range(count)]
        return [answer.total_s for answer in answers if answer.finished]

    async def run() -> tuple[list[float], list[float]]:
        async with new_client() as client, new_client() as other:
            before = await measured(client)
            tasks = [asyncio.create_task(ask_chat(other, address, long, pause_s=0.5)) for _ in range(num_sleepy)]
            # The model works for the sleepy ones too; what is compared is when it has done so and they have not read it.
            await asyncio.sleep(2)
            await idle(house)
            during = await measured(client)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return before, during

    before, during = asyncio.run(run())
    slower = statistics.median(during) / statistics.median(before)
    broken = [] if len(during) == count and slower < 3 else [f"others were answered {slower:.1f} times slower"]
    return Part(
        f"{num_sleepy} clients that read slowly",
        [
            ("an answer of 24 tokens without them, median", f"{statistics.median(before):.3f} s"),
            ("beside them", f"{statistics.median(during):.3f} s"),
            ("answered beside them", f"{len(during)} of {count}"),
        ],
        broken,
    )


async def idle(house: House) -> None:
    """Until no engine computes."""
    async with new_client() as client:
        for _ in range(600):
            pages = [(await client.get(f"{worker.address}/metrics")).text for worker in house.workers]
            if all("llava_engine_running 0.0" in page and "llava_engine_waiting 0.0" in page for page in pages):
                return
            await asyncio.sleep(0.2)


def malformed(house: House, args: argparse.Namespace) -> Part:
    """Bodies, pictures and headers that are wrong in many ways, to the controller and to a worker directly."""
    chance = random.Random(2)
    places = [house.controller.address, house.workers[0].address]
    good = chat_body(house.model, "hi", number_picture(5), max_tokens=1, stream=False)
    before = {
        place: process.resident_mb for place, process in zip(places, (house.controller, house.workers[0]), strict=True)
    }

    def garbage(size: int) -> bytes:
        return bytes(chance.randrange(256) for _ in range(size))

    def body() -> bytes:
        text = json.dumps(good).encode()
        kind = chance.randrange(7)
        if kind == 0:
            return garbage(chance.randrange(200))
        if kind == 1:
            return text[: chance.randrange(len(text))]
        if kind == 2:
            place = chance.randrange(len(text))
            return text[:place] + garbage(3) + text[place + 3 :]
        wrong = json.loads(text)
        if kind == 3:
            wrong[chance.choice(list(wrong))] = chance.choice([None, -1, "x" * 50, [], {}, 1e300, True])
        elif kind == 4:
            wrong["messages"][0]["content"][1]["image_url"] = {"url": "data:image/png;base64," + garbage(30).hex()}
        elif kind == 5:
            wrong["messages"][0][chance.choice(["role", "content", "name"])] = chance.choice([5, None, "tool", [[]]])
        else:
            wrong[chance.choice(["temperature", "n", "seed", "logit_bias", "stop", "prompt", "images"])] = (
                chance.choice([float("inf"), -5, "a", {"a": "b"}, [None], 2**70])
            )
        return json.dumps(wrong).encode()

    def job(client: httpx.AsyncClient) -> Callable[[], Awaitable[int | str]]:
        path = chance.choice(
            [CHAT, "/v1/completions", GENERATE, "/register_worker", "/receive_heart_beat", "/%00", "/../x"]
        )
        headers = {} if chance.random() < 0.8 else {"content-type": chance.choice(["text/xml", "é".encode()])}
        content, place = body(), chance.choice(places)

        async def send() -> int | str:
            try:
                response = await client.post(place + path, content=content, headers=headers)
                in_words = b'"error_code": 1' in response.content
                return "200 with error_code 1" if response.status_code == 200 and in_words else response.status_code
            except httpx.HTTPError as error:
                return type(error).__name__

        return send

    async def raw(place: str) -> str:
        """Bytes that are no HTTP at all, and heads without an end."""
        host, port = place.removeprefix("http://").rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(chance.choice([garbage(100) + b"\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000]))
        writer.write_eof()
        data = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return data.split(b"\r\n")[0].decode(errors="replace")[:12] or "closed"

    async def run() -> Counter[Any]:
        async with new_client() as client:
            jobs = [job(client) for _ in range(args.malformed)]
            statuses = Counter(await at_most(32, jobs))
            num_raw = max(1, args.malformed // 20)
            statuses.update(await at_most(16, [lambda: raw(chance.choice(places)) for _ in range(num_raw)]))
            final = [await ask_chat(client, place, chat_body(house.model, "hi", max_tokens=2)) for place in places]
            statuses["then a right request"] = sum(answer.finished for answer in final)
            return statuses

    statuses = asyncio.run(run())
    faults = {status: count for status, count in statuses.items() if isinstance(status, int) and status >= 500}
    faults |= {status: count for status, count in statuses.items() if "HTTP/1.1 5" in str(status)}
    broken = [f"server faults: {faults}"] if faults else []
    if statuses["then a right request"] != 2:
        broken.append("right requests failed afterwards")
    rows: list[tuple[Any, ...]] = sorted(((str(status), count) for status, count in statuses.items()), key=str)
    for place, process in zip(places, (house.controller, house.workers[0]), strict=True):
        after = process.resident_mb
        name = "controller" if process is house.controller else "worker"
        rows.append((f"{name}: MB before and after", f"{before[place]:.0f}, {after:.0f}"))
        if after - before[place] > 64 + 0.004 * args.malformed:
            broken.append(f"the {name} has grown by {after - before[place]:.0f} MB")
    return Part(f"{args.malformed:,} malformed requests", rows, broken)


def overhead(house: House, args: argparse.Namespace) -> Part:
    """Requests per second and first token against concurrency, through one worker's HTTP and on the bare engine."""
    from llava.assets import embedded_model_path
    from llava.engine.engine import Engine
    from llava.engine.request import Request, SamplingParams
    from llava.model.builder import load

    worker, num_tokens = house.workers[0], args.tokens
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    served: dict[int, tuple[float, float]] = {}

    async def over_http(concurrency: int, count: int) -> tuple[float, float]:
        async with new_client() as client:
            bodies = [
                chat_body(house.model, f"{concurrency} {index} hi", max_tokens=num_tokens, ignore_eos=True)
                for index in range(count)
            ]
            started = time.perf_counter()
            jobs = [lambda body=body: ask_chat(client, worker.address, body) for body in bodies]
            answers = await at_most(concurrency, jobs)
            seconds = time.perf_counter() - started
        assert all(answer.finished for answer in answers)
        return count / seconds, statistics.median(answer.first_s for answer in answers)

    def bare(engine: Engine, template: Any, concurrency: int, count: int) -> tuple[float, float]:
        gate, firsts = threading.Semaphore(concurrency), []

        def one(index: int) -> None:
            conversation = template.copy()
            conversation.append_message(conversation.roles[0], f"{concurrency} {index} hi")
            conversation.append_message(conversation.roles[1], None)
            started = time.perf_counter()
            stream = iter(engine.stream(Request(conversation, sampling=sampling)))
            next(stream)
            firsts.append(time.perf_counter() - started)
            for _ in stream:
                pass
            gate.release()

        started = time.perf_counter()
        threads = []
        for index in range(count):
            gate.acquire()
            threads.append(threading.Thread(target=one, args=(index,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return count / (time.perf_counter() - started), statistics.median(firsts)

    levels = [level for level in (1, 8, 32, 128, 256) if level <= args.clients]
    asyncio.run(over_http(4, 8))
    for level in levels:
        served[level] = asyncio.run(over_http(level, max(8, 2 * level)))
    from llava.conversation import get_template

    for process in house.workers:  # they hold a GPU's memory
        process.stop()
    loaded = load(args.model_path or embedded_model_path(), device=args.device)
    template, rows = get_template(loaded.conv_mode), []
    with Engine.from_loaded(loaded) as engine:
        bare(engine, template, 4, 8)
        for level in levels:
            rate, first = bare(engine, template, level, max(8, 2 * level))
            over = 100 * (rate / served[level][0] - 1)
            rows.append(
                (
                    f"{level} at once, {num_tokens} tokens each: requests/s over HTTP, bare engine, overhead",
                    f"{served[level][0]:.2f}, {rate:.2f}, {over:.0f}%",
                )
            )
            rows.append(("... median first token over HTTP, bare engine", f"{served[level][1]:.3f} s, {first:.3f} s"))
    return Part("Over HTTP and on the bare engine", rows, [])


PARTS = {
    "crowd": crowd,
    "memory": memory,
    "kill": kill,
    "controller": controller,
    "sleepy": sleepy,
    "malformed": malformed,
    "overhead": overhead,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this part; may be given several times")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer in the part overhead")
    parser.add_argument("--workers", type=int, default=2, help="kill needs two, overhead only one")
    parser.add_argument("--model-path")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    share = 0.9 / args.workers  # of a GPU that they have to share
    worker_flags = [
        "--device",
        args.device,
        "--memory-fraction",
        f"{share:.2f}",
        *(["--model-path", args.model_path] if args.model_path else []),
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "fastapi", "uvicorn"))
    print(
        f"Python {platform.python_version()}, {packages}, {os.cpu_count()} CPU cores; a controller and {args.workers} workers",
        flush=True,
    )
    house, broken = House.start(worker_flags, num_workers=args.workers), False
    try:
        for name in args.only or PARTS:
            part = PARTS[name](house, args)
            part.show()
            broken |= bool(part.broken)
    finally:
        house.stop()
    return int(broken)


if __name__ == "__main__":
    raise SystemExit(main())
