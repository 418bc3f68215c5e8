"""Flags that several servers share, and what they mean.

In: a parser, or what it parsed and the environment. Out: limits, the door, addresses. Checked before anything is loaded.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli.program import ArgumentParser
from llava.errors import InputError, require
from llava.images.download import ImageLimits

if TYPE_CHECKING:
    import socket

    from llava.serve.http.app import Door
    from llava.serve.http.limits import ServeLimits
    from llava.serve.http.memory_budget import Room

logger = logging.getLogger("llava.serve")

KEY_VARIABLE = "LLAVA_API_KEYS"


def add_server_flags(parser: ArgumentParser, *, port: int) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    server.add_argument("--port", type=int, default=port, help=f"0 picks a free one (default: {port})")
    server.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    server.add_argument(
        "--drain-seconds",
        type=float,
        metavar="S",
        default=30.0,
        help="on SIGTERM, wait so long for running answers (default: 30)",
    )
    door = parser.add_argument_group("who may ask")
    door.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"keys that open this server, one a line; the variable {KEY_VARIABLE} also holds some, with commas",
    )
    door.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        default=[],
        help="answer to this name in the Host header too; on loopback only loopback names are answered",
    )
    door.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        default=[],
        help="let pages of this site ask, as https://example.org (CORS; default: none)",
    )
    door.add_argument(
        "--max-body-mb", type=float, metavar="MB", default=64.0, help="largest body of a request (default: 64)"
    )
    door.add_argument(
        "--max-held-mb",
        type=float,
        metavar="MB",
        default=4096.0,
        help="bodies and images of all requests together; more get status 429 (default: 4096)",
    )


def add_limit_flags(parser: ArgumentParser) -> None:
    limits = parser.add_argument_group("limits of a request")
    limits.add_argument("--max-images", type=int, metavar="N", default=16, help="images in one request (default: 16)")
    limits.add_argument(
        "--max-image-mb", type=float, metavar="MB", default=20.0, help="bytes of one image, encoded (default: 20)"
    )
    limits.add_argument(
        "--max-megapixels",
        type=float,
        metavar="MP",
        default=89.4,
        help="of all images of a request together (default: 89.4)",
    )
    limits.add_argument(
        "--max-requests",
        type=int,
        metavar="N",
        default=2048,
        help="on their way at once, waiting ones included; more get status 429 (default: 2048)",
    )
    limits.add_argument(
        "--deadline", type=float, metavar="S", default=600.0, help="seconds for a whole answer (default: 600)"
    )
    limits.add_argument(
        "--image-timeout", type=float, metavar="S", default=10.0, help="seconds for a download (default: 10)"
    )
    limits.add_argument("--no-image-urls", action="store_true", help="download nothing: images come as data: URLs only")
    limits.add_argument(
        "--allow-private-hosts", action="store_true", help="download images from this machine's own network too"
    )
    limits.add_argument(
        "--image-folder", metavar="FOLDER", help="read file:// images in this folder (default: nowhere)"
    )


def room_from(args: Namespace) -> Room:
    """Room in which one request that is allowed finds its place, or else it would be told to come again for ever."""
    from llava.serve.http.memory_budget import BODY_COPIES, BYTES_PER_PIXEL, Room

    needed = BODY_COPIES * args.max_body_mb + BYTES_PER_PIXEL * getattr(args, "max_megapixels", 0.0) * 1e6 / 2**20
    if not args.max_held_mb >= needed:
        raise InputError(
            f"--max-held-mb is {args.max_held_mb:g}, and one request may hold {needed:.0f}: give more, or lower --max-body-mb "
            "or --max-megapixels"
        )
    return Room(int(args.max_held_mb * 2**20))


def limits_from(args: Namespace) -> ServeLimits:
    require("fastapi", extra="serve")
    from llava.serve.http.limits import ServeLimits

    return ServeLimits(
        max_body_bytes=int(args.max_body_mb * 2**20),
        max_images=args.max_images,
        max_requests=args.max_requests,
        deadline_s=args.deadline,
        images=ImageLimits(
            max_bytes=int(args.max_image_mb * 2**20),
            max_pixels=int(args.max_megapixels * 1e6),
            timeout_s=args.image_timeout,
            allow_private_hosts=args.allow_private_hosts,
        ),
        allow_urls=not args.no_image_urls,
        image_folder=Path(args.image_folder).expanduser() if args.image_folder else None,
    )


@dataclass(frozen=True)
class Place:
    """Where a server listens, who may come in, and with which key it goes to its peers."""

    listener: socket.socket
    address: str
    door: Door
    key: str | None


def place_from(args: Namespace) -> Place:
    """Bind the address and read the keys."""
    require("uvicorn", extra="serve")
    door, key = door_from(args)
    from llava.serve.http.server import address_of, bind

    listener = bind(args.host, args.port)
    return Place(listener, address_of(listener, args.host), door, key)


def door_from(args: Namespace) -> tuple[Door, str | None]:
    """Who may come in, and a key that opens peers' doors."""
    require("fastapi", extra="serve")
    require("httpx", extra="serve")
    from llava.serve.http.app import Door
    from llava.serve.http.limits import ApiKeys, read_keys
    from llava.serve.http.middleware import LOOPBACK_NAMES
    from llava.serve.http.server import is_loopback, set_up_logging

    set_up_logging(args.log_level)
    found = read_keys(args.api_key_file, os.environ.get(KEY_VARIABLE))
    keys = ApiKeys(found)
    loopback = is_loopback(args.host)
    if not loopback and not keys:
        logger.warning("this server is open to everybody who reaches %s: give keys by --api-key-file", args.host)
    door = Door(
        keys=keys,
        max_body_bytes=int(args.max_body_mb * 2**20),
        hosts=(*LOOPBACK_NAMES, *args.allow_host) if loopback else tuple(args.allow_host) or None,
        origins=tuple(args.allow_origin),
        room=room_from(args),
    )
    return door, found[0] if found else None
