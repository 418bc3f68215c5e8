"""`llava web`: the web page, a conversation about images with the models of a controller.

In: flags; then Gradio's events. Out: a page. Its parts are in web/page.py, its requests to servers and its log in
web/client.py. `llava serve` has the same page over its own model.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser, add_number
from llava.errors import InputError, require
from llava.serve.http.flags import add_server_flags, listen_address_from

EXAMPLES = """\
examples:
  llava web                                             models of the controller on this machine
  llava web --controller-url http://10.0.0.1:21001 --host 0.0.0.0 --log-dir ./logs
"""


def build_parser() -> ArgumentParser:
    about = "Show the web page over a controller's models."
    parser = ArgumentParser(prog="llava web", description=about, epilog=EXAMPLES)
    page = parser.add_argument_group("page")
    page.add_argument(
        "--controller-url", metavar="URL", default="http://localhost:21001", help="(default: %(default)s)"
    )
    add_number(page, "--concurrency-count", 16, "N", "answers at once")
    page.add_argument(
        "--model-list-mode",
        choices=("once", "reload"),
        default="once",
        help="read the list of models once, or for every visitor (default: once)",
    )
    page.add_argument("--share", action="store_true", help="not offered: put the page behind a server of your own")
    page.add_argument("--moderate", action="store_true", help="not offered: nothing is sent to other services")
    page.add_argument("--embed", action="store_true", help="leave the title out, for a frame in another page")
    page.add_argument("--log-dir", metavar="FOLDER", help="keep conversations, votes, images there (default: nowhere)")
    add_server_flags(parser, port=7860)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    for flag in ("share", "moderate"):
        if getattr(args, flag):
            raise InputError(f"--{flag} is a flag of the original that this page does not offer; leave it out")
    require("gradio", extra="ui")
    address = listen_address_from(args)
    from dataclasses import replace

    from fastapi import FastAPI

    from llava.serve.http.keys import ApiKeys
    from llava.serve.http.metrics import Metrics
    from llava.serve.http.middleware import AccessMiddleware
    from llava.serve.http.server import run_server
    from llava.serve.web.page import Page, mount
    from llava.serve.web.visitors import use_private_folder

    use_private_folder()
    page = Page.over(
        args.controller_url,
        log_dir=args.log_dir,
        reload_models=args.model_list_mode == "reload",
        access=address.access,
    )
    app = mount(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "/",
        embed=args.embed,
        concurrency=args.concurrency_count,
    )
    # The page asks for a key itself. Where the models need another one, visitors enter it in the settings.
    access = replace(address.access, keys=ApiKeys())
    return run_server(
        AccessMiddleware(app, access, Metrics(), known_paths=("/",)),
        address.listeners,
        drain_s=args.drain_seconds,
        started=lambda: print(f"page {address.url}", flush=True),
    )


if __name__ == "__main__":
    sys.exit(main())
