"""Register a worker with a controller by hand, where it does not register itself.

In: flags. Out: a registration, and an exit status. Workers of this package register themselves (router/heartbeat.py).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.errors import InputError, require
from llava.serve.http.flags import add_worker_key_flag, worker_keys_from


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m llava.serve.register_worker", description="Register a worker with a controller by hand."
    )
    parser.add_argument("--controller-address", metavar="URL", help="the controller, as http://localhost:21001")
    parser.add_argument("--worker-name", metavar="URL", help="its address; the controller asks it for its models")
    add_worker_key_flag(parser)
    parser.add_argument("--check-heart-beat", action="store_true", help="remove it when its heartbeats stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    for flag in ("controller_address", "worker_name"):
        if not getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')} is missing")
    httpx = require("httpx", extra="serve")
    keys = worker_keys_from(args)
    headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
    body = {"worker_name": args.worker_name, "check_heart_beat": args.check_heart_beat, "worker_status": None}
    try:
        response = httpx.post(
            f"{args.controller_address.rstrip('/')}/register_worker", json=body, headers=headers, timeout=10
        )
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(f"the controller {args.controller_address} did not take the worker: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
