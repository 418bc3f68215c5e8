"""`llava worker`: one model on an engine, with the original's protocol and the OpenAI-compatible API.

In: flags; then HTTP requests. Out: streamed answers. The worker registers with a controller and sends it heartbeats
(router/heartbeat.py), unless --no-register is given. Routes are in router/worker_routes.py and openai/routes.py.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from llava.cli import model_flags
from llava.cli.model_flags import find_model
from llava.cli.program import ArgumentParser, add_number
from llava.conversation import get_model_name_from_path, get_template
from llava.engine.config import EngineConfig
from llava.errors import InputError
from llava.serve.http.flags import (
    add_limit_flags,
    add_server_flags,
    add_worker_key_flag,
    limits_from,
    listen_address_from,
)
from llava.serve.process import end_with_stdin
from llava.utils import waiting

if TYPE_CHECKING:
    from llava.serve.backends.base import Backend
    from llava.serve.http.flags import ListenAddress
    from llava.serve.service import Service

EXAMPLES = """\
examples:
  llava worker --model-path ./llava-v1.5-7b                        registers with the controller on this machine
  llava worker --model-path ./llava-v1.5-7b --port 0 \\
      --controller-address http://10.0.0.1:21001 --host 10.0.0.2   another machine's controller, any free port
  llava worker --no-register                                       the small model in the package, by itself
"""


ADAPTER_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


def build_parser() -> ArgumentParser:
    about = "Serve one model, and register it with a controller."
    parser = ArgumentParser(prog="llava worker", description=about, epilog=EXAMPLES)
    add_worker_flags(parser)
    add_model_flags(parser)
    add_server_flags(parser, port=21002)
    add_limit_flags(parser)
    return parser


def add_worker_flags(parser: ArgumentParser) -> None:
    """Add the flags of all kinds of workers."""
    worker = parser.add_argument_group("worker")
    worker.add_argument("--worker-address", metavar="URL", help="where others reach it (default: host and port)")
    worker.add_argument(
        "--controller-address", metavar="URL", default="http://localhost:21001", help="(default: %(default)s)"
    )
    worker.add_argument("--model-name", metavar="NAME", help="(default: the last folder of the model's path)")
    worker.add_argument(
        "--limit-model-concurrency", type=int, metavar="N", help="answer so many at once (default: what memory allows)"
    )
    add_number(worker, "--stream-interval", 1, "N", "tokens in a chunk of the original protocol")
    worker.add_argument("--no-register", action="store_true", help="do not register with a controller")
    worker.add_argument(
        "--end-with-stdin",
        action="store_true",
        help="end when standard input is closed, as by the end of a parent process",
    )
    add_worker_key_flag(worker)


def add_model_flags(parser: ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model_flags.add_model_flags(model)
    model.add_argument(
        "--adapter",
        metavar="NAME=PATH",
        action="append",
        help="a LoRA adapter beside the model, asked for as MODEL:NAME; give the flag once for each",
    )
    add_number(model, "--memory-fraction", 0.9, "F", "of a GPU's memory for weights and cache together")
    model.add_argument(
        "--engine-process",
        choices=("auto", "on", "off"),
        default="auto",
        help="run the engine in a process of its own, apart from the server's Python (default: auto, on with a GPU)",
    )
    model.add_argument("--multi-modal", action="store_true", help="ignored: the model's files decide")
    model.add_argument("--use-flash-attn", action="store_true", help="ignored: the engine has its own attention")


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    if args.stream_interval < 1:
        raise InputError(f"--stream-interval is {args.stream_interval}; give 1 or more tokens")
    limits = limits_from(args)
    check_model_flags(args)
    address = listen_address_from(args, is_worker=True)
    if args.end_with_stdin:
        end_with_stdin()
    from llava.serve.service import Service

    return serve_worker(Service(load_backend(args), limits, address.access.memory), args, address)


def check_model_flags(args: Namespace) -> None:
    """Check flags before torch is loaded, and fill in the model's path."""
    if args.conv_mode is not None:
        get_template(args.conv_mode)
    EngineConfig(max_running=args.limit_model_concurrency, memory_fraction=args.memory_fraction)
    adapters_from(args)
    args.model_path = find_model(args.model_path, args.mmproj)


def adapters_from(args: Namespace) -> dict[str, str]:
    """Read --adapter: the paths of adapters by name."""
    adapters: dict[str, str] = {}
    for word in args.adapter or ():
        name, equals, path = word.partition("=")
        if not (name and equals and path) or not ADAPTER_NAME.fullmatch(name):
            raise InputError(
                f"--adapter is {word!r}; give NAME=PATH, with letters, digits, '.', '_' and '-' in the name"
            )
        if name in (*adapters, "latest"):
            raise InputError(f"--adapter {word!r}: the name {name!r} is taken; choose another one")
        adapters[name] = path
    return adapters


def load_backend(args: Namespace) -> Backend:
    """Load the engine that the flags ask for, in this process or in one of its own."""
    with waiting("loading libraries"):
        from llava.model.builder import load

    config = EngineConfig(
        max_running=args.limit_model_concurrency,
        memory_fraction=args.memory_fraction,
        weights="int8" if args.load_8bit else "int4" if args.load_4bit else None,
    )
    name = args.model_name or get_model_name_from_path(str(args.model_path))
    load_model = partial(load, args.model_path, base=args.model_base, device=args.device, dtype=args.dtype)
    if _in_own_process(args.engine_process, args.device):
        from llava.serve.backends.subprocess import ProcessBackend

        return ProcessBackend(
            load_model,
            name=name,
            conv_mode=args.conv_mode,
            config=config,
            adapters=adapters_from(args),
            log_level=args.log_level,
        )
    from llava.serve.backends.in_process import EngineBackend

    adapters = adapters_from(args)
    return EngineBackend(load_model(), name=name, conv_mode=args.conv_mode, config=config, adapters=adapters)


def _in_own_process(wanted: str, device: str) -> bool:
    """Decide --engine-process auto: not on a CPU, where the model uses all cores and a second process only takes memory."""
    from llava.model.device import pick_device

    if wanted == "on" and os.name != "posix":
        raise InputError("--engine-process on needs Linux or macOS; without it the engine runs in the server's process")
    return wanted == "on" or (wanted == "auto" and pick_device(device).type == "cuda" and os.name == "posix")


def serve_worker(service: Service, args: Namespace, address: ListenAddress) -> int:
    """Run a worker until a signal comes."""
    from llava.serve.apis import SCHEMAS, model_routes
    from llava.serve.http.app import make_app
    from llava.serve.http.server import run_server
    from llava.serve.router.heartbeat import Heartbeat
    from llava.serve.router.worker_routes import WorkerApi

    api, heartbeat = WorkerApi(service, args.stream_interval), None
    if not args.no_register:
        worker = args.worker_address or address.url
        heartbeat = Heartbeat(args.controller_address, worker, api.status, key=address.worker_key)
        service.changed = heartbeat.changed
    _, app = make_app(
        [api.router(), *model_routes(service)],
        title=f"llava worker: {service.card.name}",
        metrics=service.metrics,
        access=address.access,
        liveness=service.liveness,
        readiness=service.readiness,
        schemas=SCHEMAS,
        lifespans=[service.lifespan, *([heartbeat.lifespan] if heartbeat is not None else [])],
    )

    async def drain() -> None:
        service.draining = True
        if heartbeat is not None:
            await heartbeat.unregister()

    def started() -> None:
        print(f"worker {address.url} serves {service.card.name}", flush=True)

    return run_server(
        app, address.listeners, drain_s=args.drain_seconds, started=started, drain=drain, lost=service.lost
    )


if __name__ == "__main__":
    sys.exit(main())
