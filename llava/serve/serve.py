"""`llava serve`: a model, its APIs and its page at one address.

In: a model's folder and flags. Out: a server with the OpenAI-compatible API, the original's protocol and the web page. With
several workers each has a process and a GPU of its own (supervisor.py), and this process is their controller.
"""

from __future__ import annotations

import base64
import json
import secrets
import shlex
import struct
import sys
import zlib
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llava.cli.config_file import configured_parser
from llava.cli.program import ArgumentParser, add_number
from llava.conversation import get_model_name_from_path
from llava.errors import InputError, install_command
from llava.serve.http.flags import ListenAddress, add_limit_flags, add_server_flags, limits_from, listen_address_from
from llava.serve.model_worker import add_model_flags, check_model_flags, load_backend

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

    from llava.serve.http.limits import ServeLimits
    from llava.serve.http.middleware import AccessMiddleware, AccessPolicy
    from llava.serve.service import Service

EXAMPLES = """\
examples:
  llava serve                              the small model in the package, on this machine alone
  llava serve ./llava-v1.5-7b --port 9000
  llava serve ./llava-v1.5-7b --num-workers 4                        one worker for each of four GPUs
  llava serve ./llava-v1.5-7b --host 0.0.0.0 --api-key-file keys     for others too
"""
FIRST_FLAGS = (
    "model", "--port", "--host", "--api-key-file", "--num-workers", "--model-name", "--device", "--load-4bit", "--no-page",
    "--config",
)  # fmt: skip
PAGE_PATH = "/page"
QUESTION = "Who are you?"
IMAGE_QUESTION = "What do you see in this picture?"


def build_parser() -> ArgumentParser:
    parser = configured_parser(
        "serve",
        first=(
            "model",
            "--port",
            "--host",
            "--api-key-file",
            "--num-workers",
            "--model-name",
            "--device",
            "--load-4bit",
            "--no-page",
            "--config",
        ),
        prog="llava serve",
        description="Serve a model: OpenAI-compatible API, the original's protocol, and a web page, at one address.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the same as --model-path")
    parser.add_argument("--model-name", metavar="NAME", help="(default: the last folder of the model's path)")
    add_number(parser, "--num-workers", 1, "N", "processes, each with a GPU of its own")
    parser.add_argument(
        "--limit-model-concurrency", type=int, metavar="N", help="answer so many at once (default: what memory allows)"
    )
    parser.add_argument("--no-page", action="store_true", help="without the web page")
    parser.add_argument("--log-dir", metavar="FOLDER", help="keep the page's conversations there (default: nowhere)")
    add_model_flags(parser)
    add_server_flags(parser, port=8000)
    parser.add_argument("--uds", metavar="PATH", help="listen at this unix socket instead of an address and a port")
    add_limit_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    if "model" in args.configured and args.model_path is not None:
        args.model = None  # the command line comes before the file
    if "model_path" in args.configured and args.model is not None:
        args.model_path = None
    if args.model is not None and args.model_path is not None:
        raise InputError("the model is given twice, by MODEL and by --model-path; give it once")
    if args.uds is not None and args.num_workers > 1:
        raise InputError("--uds: workers reach their controller by an address; serve one worker, or give --port")
    if args.num_workers < 1:
        raise InputError(f"--num-workers is {args.num_workers}; give 1 or more")
    limits = limits_from(args)
    args.model_path = args.model or args.model_path
    check_model_flags(args)
    address = listen_address_from(args)
    with_page = not args.no_page
    if with_page and find_spec("gradio") is None:
        print(f"without the web page; for it: {install_command('ui')}", flush=True)
        with_page = False
    if args.num_workers > 1:
        name = args.model_name or get_model_name_from_path(str(args.model_path))
        example = curl_command(address, name)
        return run_app(
            *supervised_app(args, address, name), args, address, limits, example=example, with_page=with_page
        )

    from llava.serve.service import Service

    service = Service(load_backend(args), limits, address.access.memory)

    async def drain() -> None:
        service.draining = True

    apps = model_app(service, address.access)
    example = curl_command(address, service.card.name, with_image=service.card.takes_images)
    return run_app(*apps, args, address, limits, example=example, with_page=with_page, drain=drain, lost=service.lost)


def supervised_app(args: Namespace, address: ListenAddress, name: str) -> tuple[FastAPI, AccessMiddleware]:
    """Build a controller that starts its workers. Returns what `make_app` returns."""
    from llava.serve.http.keys import ApiKeys
    from llava.serve.router.dispatch import Dispatcher
    from llava.serve.router.routes import ControllerApi, controller_app
    from llava.serve.supervisor import Supervisor, worker_command

    command = worker_command(args, address, name)
    key = secrets.token_urlsafe(32)
    supervisor = Supervisor(command, args.num_workers, device=args.device, key=key)
    api = ControllerApi(Dispatcher(), deadline_s=args.deadline)
    access = replace(address.access, worker_keys=ApiKeys([key]))
    return controller_app(api, access, lifespans=[supervisor.lifespan], open_paths=[f"{PAGE_PATH}/"])


def model_app(service: Service, access: AccessPolicy) -> tuple[FastAPI, AccessMiddleware]:
    """Build the application of one model without a controller. Returns what `make_app` returns."""
    from llava.serve.apis import SCHEMAS, model_routes
    from llava.serve.http.app import make_app
    from llava.serve.router.worker_routes import WorkerApi, single_worker_routes

    return make_app(
        [WorkerApi(service).router(), single_worker_routes(service), *model_routes(service)],
        title=f"llava serve: {service.card.name}",
        metrics=service.metrics,
        access=access,
        liveness=service.liveness,
        readiness=service.readiness,
        schemas=SCHEMAS,
        lifespans=[service.lifespan],
        open_paths=[f"{PAGE_PATH}/"],
    )


def run_app(
    app: FastAPI,
    checked: AccessMiddleware,
    args: Namespace,
    address: ListenAddress,
    limits: ServeLimits,
    *,
    example: str,
    with_page: bool,
    drain: Callable[[], Awaitable[None]] | None = None,
    lost: Callable[[], str | None] = lambda: None,
) -> int:
    """Mount the page, print the addresses, and serve `checked`, which is `app` behind its checks."""
    from fastapi.responses import RedirectResponse

    from llava.serve.http.server import run_server

    first_page = f"{PAGE_PATH}/" if with_page else "/docs"

    async def home(request: Request) -> RedirectResponse:
        return RedirectResponse(request.scope.get("root_path", "") + first_page)

    app.add_route("/", home, include_in_schema=False)

    if with_page:
        from llava.serve.web.page import Page, mount
        from llava.serve.web.visitors import use_private_folder

        use_private_folder()
        page = Page.over(address.url, log_dir=args.log_dir, access=address.access, limits=limits, uds=address.uds)
        mount(app, page, PAGE_PATH)

    def started() -> None:
        print(f"API   {address.url}/v1" + (f" at the unix socket {address.uds}" if address.uds else ""))
        if with_page:
            print(f"page  {address.url}{PAGE_PATH}/")
        print(f"docs  {address.url}/docs")
        print(f"try   {example}", flush=True)

    return run_server(checked, address.listeners, drain_s=args.drain_seconds, started=started, drain=drain, lost=lost)


def curl_command(address: ListenAddress, model: str, *, with_image: bool = True) -> str:
    """Return a command that sends the server a question, about an image that is in the command itself."""
    content: str | list[dict[str, object]] = QUESTION
    if with_image:
        image: dict[str, object] = {"type": "image_url", "image_url": {"url": disc_url()}}
        content = [image, {"type": "text", "text": IMAGE_QUESTION}]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 64})
    key = " -H 'Authorization: Bearer KEY'" if address.access.keys else ""
    quoted = body.replace("'", "'\\''")
    unix = f" --unix-socket {shlex.quote(address.uds)}" if address.uds else ""
    return f"curl -s{unix} {address.url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{quoted}'"


def disc_url(side: int = 112) -> str:
    """Return a small PNG of a red disc on white, as a data: URL."""
    rows = []
    for y in range(side):
        bits = "".join(str(int((x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 3) ** 2)) for x in range(side))
        rows.append(b"\0" + int(bits, 2).to_bytes(side // 8, "big"))

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 3, 0, 0, 0)  # one bit for each pixel, an index into the palette
    parts = [
        part(b"IHDR", head),
        part(b"PLTE", b"\xff\xff\xff\xd8\x1e\x1e"),
        part(b"IDAT", zlib.compress(b"".join(rows), 9)),
    ]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(parts) + part(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


if __name__ == "__main__":
    sys.exit(main())
