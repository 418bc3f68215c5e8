"""The controller: it knows the workers, says which one to ask, and passes requests on to them.

In: flags; registrations and heart-beats of workers; requests of clients. Out: addresses, or the workers' answers. Choosing
is serve/router/dispatch.py, passing on is serve/router/proxy.py. It speaks the original's protocol and the
OpenAI-compatible API over all workers.
"""

from __future__ import annotations

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.serve.http.flags import add_server_flags, place_from

EXAMPLES = """\
examples:
  llava controller                                       on this machine alone, port 21001
  llava controller --host 10.0.0.1 --api-key-file keys   for workers on other machines; keys guard registration too
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava controller",
        description="Know the workers, and pass requests on to them.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dispatch-method",
        choices=("lottery", "shortest_queue"),
        default="shortest_queue",
        help="by speed and chance, or the shortest queue for its speed (default)",
    )
    parser.add_argument(
        "--deadline", type=float, metavar="S", default=600.0, help="seconds for a whole answer (default: 600)"
    )
    add_server_flags(parser, port=21001)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    place = place_from(args)
    from llava.serve.http.server import run_server
    from llava.serve.router.dispatch import Dispatcher
    from llava.serve.router.routes import ControllerApi, controller_app

    api = ControllerApi(Dispatcher(args.dispatch_method), key=place.key, deadline_s=args.deadline)
    _, app = controller_app(api, place.door)

    def started() -> None:
        print(f"controller {place.address}", flush=True)

    return run_server(app, place.listener, drain_s=args.drain_seconds, started=started)


if __name__ == "__main__":
    sys.exit(main())
