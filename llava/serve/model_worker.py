"""A worker: one model on an engine, behind the original protocol and the OpenAI-compatible API.

In: flags; then HTTP requests. Out: streams of answers. The worker registers with a controller and sends it heart-beats, unless
told not to. What a request may hold is serve/router/protocol.py and serve/openai/schema.py; how many run together is
the engine's business.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llava.cli import model_flags
from llava.cli.model_flags import find_model
from llava.cli.program import ArgumentParser
from llava.conversation import get_model_name_from_path, get_template
from llava.engine.config import EngineConfig
from llava.errors import InputError
from llava.serve.http.flags import add_limit_flags, add_server_flags, limits_from, place_from
from llava.serve.router.protocol import OK, GenerateBody, encode_chunk

if TYPE_CHECKING:
    from llava.serve.backends.base import Backend
    from llava.serve.http.flags import Place
    from llava.serve.service import Asked, Service

EXAMPLES = """\
examples:
  llava worker --model-path ./llava-v1.5-7b                        registers with the controller on this machine
  llava worker --model-path ./llava-v1.5-7b --port 0 \\
      --controller-address http://10.0.0.1:21001 --host 10.0.0.2   another machine's controller, any free port
  llava worker --no-register                                       the small model in the package, by itself
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava worker",
        description="Serve one model, and register it with a controller.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_worker_flags(parser)
    add_model_flags(parser)
    add_server_flags(parser, port=21002)
    add_limit_flags(parser)
    return parser


def add_worker_flags(parser: ArgumentParser) -> None:
    """What a worker of any kind has."""
    worker = parser.add_argument_group("worker")
    worker.add_argument(
        "--worker-address", metavar="URL", help="where others reach this worker (default: host and port)"
    )
    worker.add_argument(
        "--controller-address", metavar="URL", default="http://localhost:21001", help="(default: %(default)s)"
    )
    worker.add_argument("--model-name", metavar="NAME", help="(default: the last folder of the model's path)")
    worker.add_argument(
        "--limit-model-concurrency", type=int, metavar="N", help="answer so many at once (default: what memory allows)"
    )
    worker.add_argument(
        "--stream-interval", type=int, metavar="N", default=1, help="tokens in a chunk of the original protocol (1)"
    )
    worker.add_argument("--no-register", action="store_true", help="stay unknown to the controller")


def add_model_flags(parser: ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model_flags.add_model_flags(model)
    model.add_argument(
        "--memory-fraction",
        type=float,
        metavar="F",
        default=0.9,
        help="of a GPU's memory for weights and cache together (default: 0.9)",
    )
    model.add_argument(
        "--engine-process",
        choices=("auto", "on", "off"),
        default="auto",
        help="run the engine in a process of its own, apart from the server's Python (default: auto, on with a GPU)",
    )
    model.add_argument("--multi-modal", action="store_true", help="accepted; the model's files say whether it sees")
    model.add_argument("--use-flash-attn", action="store_true", help="accepted; the engine has its own attention")


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    if args.stream_interval < 1:
        raise InputError(f"--stream-interval is {args.stream_interval}; give 1 or more tokens")
    limits = limits_from(args)
    check_model_flags(args)
    place = place_from(args)
    from llava.serve.service import Service

    return serve_worker(Service(load_backend(args), limits, place.door.room), args, place)


def check_model_flags(args: Namespace) -> None:
    """Refuse what can be refused before torch is loaded, and fill in the model's path."""
    if args.conv_mode is not None:
        get_template(args.conv_mode)
    EngineConfig(max_running=args.limit_model_concurrency, memory_fraction=args.memory_fraction)
    args.model_path = find_model(args.model_path)


def load_backend(args: Namespace) -> Backend:
    """The engine that the flags ask for, in this process or in its own."""
    from llava.model.builder import load

    config = EngineConfig(
        max_running=args.limit_model_concurrency,
        memory_fraction=args.memory_fraction,
        weights="int8" if args.load_8bit else "int4" if args.load_4bit else None,
    )
    name = args.model_name or get_model_name_from_path(str(args.model_path))
    load_it = partial(load, args.model_path, base=args.model_base, device=args.device, dtype=args.dtype)
    if _is_apart(args.engine_process, args.device):
        from llava.serve.backends.subprocess import ProcessBackend

        return ProcessBackend(load_it, name=name, conv_mode=args.conv_mode, config=config, log_level=args.log_level)
    from llava.serve.backends.in_process import EngineBackend

    return EngineBackend(load_it(), name=name, conv_mode=args.conv_mode, config=config)


def _is_apart(wanted: str, device: str) -> bool:
    """On a CPU the model takes all cores anyway, and a second Python would only take memory."""
    from llava.model.device import pick_device

    if wanted == "on" and os.name != "posix":
        raise InputError(
            "--engine-process on needs Linux or macOS; leave it out, and the engine runs in the server's process"
        )
    return wanted == "on" or (wanted == "auto" and pick_device(device).type == "cuda" and os.name == "posix")


def serve_worker(service: Service, args: Namespace, place: Place) -> int:
    """Run a worker until it is told to stop."""
    from llava.serve.http.app import make_app
    from llava.serve.http.server import run_server
    from llava.serve.openai.routes import ModelApi, openai_routes
    from llava.serve.router.heartbeat import Membership
    from llava.serve.worker_api import WorkerApi

    membership = None
    if not args.no_register:
        membership = Membership(
            args.controller_address,
            args.worker_address or place.address,
            service.status,
            key=place.key,
        )
        service.changed = membership.changed
    _, app = make_app(
        [WorkerApi(service, args.stream_interval).router(), openai_routes(ModelApi(service))],
        title=f"llava worker: {service.card.name}",
        metrics=service.metrics,
        door=place.door,
        alive=service.trouble,
        ready=service.trouble_or_draining,
        lifespans=[service.lifespan, *([membership.lifespan] if membership is not None else [])],
    )

    async def drain() -> None:
        service.draining = True
        if membership is not None:
            await membership.leave()

    def started() -> None:
        print(f"worker {place.address} serves {service.card.name}", flush=True)

    return run_server(app, place.listener, drain_s=args.drain_seconds, started=started, drain=drain)


async def generate_stream(asked: Asked, generate: GenerateBody, stream_interval: int) -> AsyncIterator[bytes]:
    """The chunks of one answer: the prompt as it was posted, and what has been written so far."""
    text, sent, num_tokens = generate.prompt, None, 0
    async for chunk in asked:
        text += chunk.text
        num_tokens += len(chunk.token_ids) or 1  # a server elsewhere gives text alone
        if sent is None or (text != sent and num_tokens >= stream_interval):
            yield encode_chunk(text)
            sent, num_tokens = text, 0
    if generate.inspect:
        yield encode_chunk(text, OK, **asked.cost().as_json())
    elif text != sent:
        yield encode_chunk(text)


if __name__ == "__main__":
    sys.exit(main())
