"""What a request and a streamed token cost the server's processor, beside the model's arithmetic.

    python benchmarks/server_cpu.py [--requests 400] [--clients 32] [--http auto|h11] [--loop auto|asyncio]

A worker on the embedded model answers prompts of 36 words with 64 tokens each, to clients in another process. Counted is
processor time by thread, not wall time: the event loop, the threads that make prompts, and in the engine's thread what
reads text off tokens and hands it out. All three share one interpreter lock, so their sum bounds the requests per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import random
import threading
import time
from importlib.metadata import PackageNotFoundError, version

import torch

WORDS = ("red", "blue", "green", "circle", "square", "star", "large", "small", "picture", "left", "right", "bottom")
NUM_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--http", default="auto", choices=("auto", "h11"))
    parser.add_argument("--loop", default="auto", choices=("auto", "asyncio"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args)
    names = ("uvicorn", "fastapi", "uvloop", "httptools", "h11", "sentencepiece", "transformers")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {found(name)}" for name in names))
    print(f"{args.requests} requests of {args.clients} clients, 36 words in, {NUM_TOKENS} tokens out\n")
    print("| answers | event loop, ms a request | prompts, ms a request | handing out, microseconds a token |")
    print("|---|---|---|---|")
    for name, (loop, prompts, handing) in rows.items():
        print(f"| {name} | {loop:.2f} | {prompts:.2f} | {handing:.1f} |")


def found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def measure(args: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    import uvicorn

    from llava.assets import embedded_model_path
    from llava.engine.config import EngineConfig
    from llava.engine.job import AnswerJob
    from llava.model.builder import load
    from llava.serve.app import Door, make_app
    from llava.serve.engine_backend import EngineBackend
    from llava.serve.http_parser import http_protocol
    from llava.serve.limits import ServeLimits
    from llava.serve.openai_api import ModelApi, openai_routes
    from llava.serve.server import bind
    from llava.serve.service import Service

    loaded = load(embedded_model_path(), device="cpu")
    backend = EngineBackend(loaded, name="tiny", config=EngineConfig(max_running=args.clients, num_blocks=4000))
    service = Service(backend, ServeLimits(max_requests=10_000))
    _, app = make_app(
        [openai_routes(ModelApi(service))],
        title="worker",
        metrics=service.metrics,
        door=Door(),
        alive=service.trouble,
        ready=service.trouble,
        lifespans=[service.lifespan],
    )
    handing, add = [0.0], AnswerJob.add

    def timed(self: AnswerJob, *given: object) -> bool:
        started = time.thread_time()
        try:
            return add(self, *given)  # type: ignore[arg-type]
        finally:
            handing[0] += time.thread_time() - started

    AnswerJob.add = timed  # type: ignore[method-assign,assignment]
    listener = bind("127.0.0.1", 0)
    http = http_protocol() if args.http == "auto" else args.http
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, http=http, loop=args.loop))
    serving = threading.Thread(target=lambda: server.run(sockets=[listener]), name="serving")
    serving.start()
    rows = {}
    for stream in (False, True):
        drive(listener.getsockname()[1], args.clients, args.clients, stream)
        before, handing[0] = seconds(), 0.0
        drive(listener.getsockname()[1], args.requests, args.clients, stream)
        loop, prompts = (1000 * (b - a) / args.requests for a, b in zip(before, seconds(), strict=True))
        rows["streamed" if stream else "whole"] = (loop, prompts, 1e6 * handing[0] / args.requests / NUM_TOKENS)
    server.should_exit = True
    serving.join()
    return rows


def seconds() -> tuple[float, float]:
    """Processor time of the event loop, and of the threads that work for it, so far."""
    loop = prompts = 0.0
    for thread in threading.enumerate():
        spent = time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
        if thread.name == "serving":
            loop += spent
        elif thread.name.startswith(("asyncio_", "ThreadPoolExecutor-")):
            prompts += spent
    return loop, prompts


def drive(port: int, num_requests: int, num_clients: int, stream: bool) -> None:
    """Ask from another process, whose own work is not counted."""
    context = multiprocessing.get_context("spawn")
    clients = context.Process(target=_ask_all, args=(port, num_requests, num_clients, stream))
    clients.start()
    clients.join()
    if clients.exitcode:
        raise SystemExit("the clients failed")


def _ask_all(port: int, num_requests: int, num_clients: int, stream: bool) -> None:
    dice, left = random.Random(stream), iter(range(num_requests))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            await _ask(reader, writer, " ".join(dice.choices(WORDS, k=36)), stream)
        writer.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(client() for _ in range(num_clients)))

    asyncio.run(all_of_them())


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str, stream: bool) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": stream, "temperature": 0}
    body = json.dumps({**asked, "max_tokens": NUM_TOKENS, "ignore_eos": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert head.startswith(b"http/1.1 200"), head
    if b"chunked" not in head:
        await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
        return
    while size := int(await reader.readline(), 16):
        await reader.readexactly(size + 2)
    await reader.readline()


if __name__ == "__main__":
    main()
