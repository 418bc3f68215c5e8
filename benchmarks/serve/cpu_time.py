"""Processor time of the server for a request and for a streamed token, without the model's arithmetic.

    python -m benchmarks.serve.cpu_time [--requests 400] [--clients 32]          table: results/server_cpu.md

A worker on the embedded model answers prompts of 45 words with 64 tokens each, to clients in another process. Processor time
is counted by thread: the event loop, the threads that build prompts, and in the engine's thread the detokenizing and
delivery of tokens. All three share one interpreter lock, so that their sum limits the requests per second.
"""

from __future__ import annotations

import argparse
import platform
import threading
import time
from importlib.metadata import version

import torch
import uvicorn

from benchmarks.serve.overhead import MODEL, NUM_WORDS, Clients, Questions
from llava.assets import embedded_model_path
from llava.engine.config import EngineConfig
from llava.engine.sequence import GenerationState
from llava.model.builder import load
from llava.serve.backends.in_process import EngineBackend
from llava.serve.http.app import make_app
from llava.serve.http.connections import ConnectionLimits, protocol_class
from llava.serve.http.limits import ServeLimits
from llava.serve.http.middleware import AccessPolicy
from llava.serve.http.server import bind
from llava.serve.openai.routes import SCHEMAS, ModelApi, openai_routes
from llava.serve.process import freeze_heap
from llava.serve.service import Service

NUM_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args)
    names = ["uvicorn", "fastapi", "sentencepiece", "transformers"]
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"{args.requests} requests of {args.clients} clients, {NUM_WORDS} words in, {NUM_TOKENS} tokens out\n")
    print("| answers | event loop, ms a request | prompts, ms a request | handing out, microseconds a token |")
    print("|---|---|---|---|")
    for name, (loop, prompts, handing) in rows.items():
        print(f"| {name} | {loop:.2f} | {prompts:.2f} | {handing:.1f} |")


def measure(args: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    loaded = load(embedded_model_path(), device="cpu")
    backend = EngineBackend(loaded, name=MODEL, config=EngineConfig(max_running=args.clients, num_blocks=4000))
    access = AccessPolicy()
    service = Service(backend, ServeLimits(max_requests=10_000), access.memory)
    _, app = make_app(
        [openai_routes(ModelApi(service))],
        title="worker",
        metrics=service.metrics,
        access=access,
        liveness=service.liveness,
        readiness=service.liveness,
        schemas=SCHEMAS,
        lifespans=[service.lifespan],
    )
    handing, add = [0.0], GenerationState.add

    def timed(self: GenerationState, *given: object) -> bool:
        started = time.thread_time()
        try:
            return add(self, *given)  # type: ignore[arg-type]
        finally:
            handing[0] += time.thread_time() - started

    GenerationState.add = timed  # type: ignore[method-assign,assignment]
    (listener,) = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(app, http=protocol_class(ConnectionLimits()), loop="asyncio", log_config=None, access_log=False)
    )
    serving = threading.Thread(target=lambda: server.run(sockets=[listener]), name="serving")
    serving.start()
    clients, questions = Clients(1, f"http://127.0.0.1:{listener.getsockname()[1]}"), Questions()
    freeze_heap()
    rows = {}
    for stream in (False, True):
        for num_requests in (args.clients, args.requests):  # the first few are to warm up
            before, handing[0] = seconds(), 0.0
            drawn = questions.draw(num_requests, with_image=False)
            clients.ask(drawn, args.clients, num_tokens=NUM_TOKENS, stream=stream)
        loop, prompts = (1000 * (b - a) / args.requests for a, b in zip(before, seconds(), strict=True))
        rows["streamed" if stream else "whole"] = (loop, prompts, 1e6 * handing[0] / args.requests / NUM_TOKENS)
    clients.stop()
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
        elif thread.name.startswith("asyncio_"):
            prompts += spent
    return loop, prompts


if __name__ == "__main__":
    main()
