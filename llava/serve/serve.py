"""`llava serve`: a model, its APIs and its page at one address.

In: a model's folder and flags. Out: a server that speaks the OpenAI-compatible API and the original's protocol, and shows the
page. With several workers (supervisor.py) each has a process and a GPU of its own, and this one passes requests on to them.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.serve.http.flags import Place, add_limit_flags, add_server_flags, limits_from, place_from
from llava.serve.model_worker import add_model_flags, check_model_flags, load_backend

if TYPE_CHECKING:
    from llava.serve.http.app import Door
    from llava.serve.service import Service

EXAMPLES = """\
examples:
  llava serve                              the small model in the package, on this machine alone
  llava serve ./llava-v1.5-7b --port 9000
  llava serve ./llava-v1.5-7b --num-workers 4                        one worker for each of four GPUs
  llava serve ./llava-v1.5-7b --host 0.0.0.0 --api-key-file keys     for others too
"""
PAGE_PATH = "/page"
QUESTION = "Who are you?"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava serve",
        description="Serve a model: OpenAI-compatible API, the original's protocol, and a web page, at one address.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the same as --model-path")
    parser.add_argument("--model-name", metavar="NAME", help="(default: the last folder of the model's path)")
    parser.add_argument(
        "--num-workers", type=int, metavar="N", default=1, help="processes, each with a GPU of its own (1)"
    )
    parser.add_argument(
        "--limit-model-concurrency", type=int, metavar="N", help="answer so many at once (default: what memory allows)"
    )
    parser.add_argument("--no-page", action="store_true", help="without the web page")
    parser.add_argument("--log-dir", metavar="FOLDER", help="keep the page's conversations there (default: nowhere)")
    add_model_flags(parser)
    add_server_flags(parser, port=8000)
    add_limit_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    if args.model is not None and args.model_path is not None:
        raise InputError("the model is given twice, by MODEL and by --model-path; give it once")
    if args.num_workers < 1:
        raise InputError(f"--num-workers is {args.num_workers}; give 1 or more")
    limits = limits_from(args)
    args.model_path = args.model or args.model_path
    check_model_flags(args)
    place = place_from(args)
    with_page = not args.no_page
    if with_page and find_spec("gradio") is None:
        print("without the web page, for which: pip install 'llava[ui]'", flush=True)
        with_page = False
    if args.num_workers > 1:
        from llava.serve.supervisor import serve_fleet

        return serve_fleet(args, place, with_page=with_page)

    from llava.serve.service import Service

    service = Service(load_backend(args), limits, place.door.room)
    app, guarded = model_app(service, place.door)

    async def drain() -> None:
        service.draining = True

    return open_house(app, guarded, args, place, model=service.card.name, with_page=with_page, drain=drain)


def model_app(service: Service, door: Door) -> tuple[Any, Any]:
    """A model's APIs, with a controller's answers, where it is all there is: the application, and its guarded form."""
    from llava.serve.http.app import make_app
    from llava.serve.openai.routes import ModelApi, openai_routes
    from llava.serve.worker_api import WorkerApi, own_controller

    return make_app(
        [WorkerApi(service).router(), own_controller(service), openai_routes(ModelApi(service))],
        title=f"llava serve: {service.card.name}",
        metrics=service.metrics,
        door=door,
        alive=service.trouble,
        ready=service.trouble_or_draining,
        lifespans=[service.lifespan],
        open_paths=[f"{PAGE_PATH}/"],
    )


def open_house(
    app: Any,
    guarded: Any,
    args: Namespace,
    place: Place,
    *,
    model: str,
    with_page: bool,
    drain: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Add the page and the way to it, say where everything is, and serve."""
    from fastapi.responses import RedirectResponse

    from llava.serve.http.server import run_server

    first_page = f"{PAGE_PATH}/" if with_page else "/docs"

    @app.get("/", include_in_schema=False)
    async def home() -> Any:
        return RedirectResponse(first_page)

    if with_page:
        from llava.serve.web.page import Page, mount

        app = mount(app, Page.over(place.address, log_dir=args.log_dir), PAGE_PATH)

    def started() -> None:
        print(f"API   {place.address}/v1")
        if with_page:
            print(f"page  {place.address}{PAGE_PATH}/")
        print(f"docs  {place.address}/docs")
        print(f"try   {curl_line(place, model)}", flush=True)

    return run_server(guarded, place.listener, drain_s=args.drain_seconds, started=started, drain=drain)


def curl_line(place: Place, model: str) -> str:
    """A command that asks the server something, as it stands."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64})
    key = " -H 'Authorization: Bearer KEY'" if place.key else ""
    quoted = body.replace("'", "'\\''")
    return f"curl -s {place.address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{quoted}'"


if __name__ == "__main__":
    sys.exit(main())
