"""`llava controller`: keep a table of workers, and forward requests to them.

In: flags; registrations and heartbeats of workers; requests of clients. Out: addresses, or the workers' responses, in the
original's protocol and the OpenAI-compatible API. Choosing is in router/dispatch.py, forwarding in router/proxy.py.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser, add_number
from llava.serve.http.flags import add_server_flags, add_worker_key_flag, listen_address_from

EXAMPLES = """\
examples:
  llava controller                                       on this machine alone, port 21001
  llava controller --host 10.0.0.1 --api-key-file keys --worker-key-file worker-keys      for workers on other machines
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava controller", description="Keep a table of workers, and forward requests to them.", epilog=EXAMPLES
    )
    parser.add_argument(
        "--dispatch-method",
        choices=("lottery", "shortest_queue"),
        default="shortest_queue",
        help="at random by speed, or the shortest queue relative to speed (default)",
    )
    add_number(parser, "--deadline", 600.0, "S", "seconds for a whole answer")
    add_server_flags(parser, port=21001)
    workers = parser.add_argument_group("workers")
    add_worker_key_flag(workers)
    workers.add_argument(
        "--allow-worker",
        action="append",
        metavar="ADDRESS",
        default=[],
        help="a worker may be at this host, address or network, as gpu1.example, 10.0.0.7 or 10.0.0.0/24; may be repeated "
        "(default: at the address that registers it)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    address = listen_address_from(args)
    from llava.serve.http.server import run_server
    from llava.serve.router.dispatch import Dispatcher
    from llava.serve.router.places import WorkerPlaces
    from llava.serve.router.routes import ControllerApi, controller_app

    places = WorkerPlaces(args.allow_worker)
    api = ControllerApi(Dispatcher(args.dispatch_method), places=places, deadline_s=args.deadline)
    _, app = controller_app(api, address.access)

    def started() -> None:
        print(f"controller {address.url}", flush=True)

    return run_server(app, address.listeners, drain_s=args.drain_seconds, started=started)


if __name__ == "__main__":
    sys.exit(main())
