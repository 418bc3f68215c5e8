"""Flags that several servers share, and their translation to limits, access policy and address.

In: a parser; what it parsed, and the environment. Out: `ServeLimits`, `AccessPolicy`, `ListenAddress`. All is checked before
a model is loaded.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.cli.program import ArgumentParser, Flags, add_number
from llava.errors import InputError, require
from llava.images.download import ImageLimits

if TYPE_CHECKING:
    import socket

    from llava.serve.http.limits import ServeLimits
    from llava.serve.http.memory_budget import MemoryBudget
    from llava.serve.http.middleware import AccessPolicy

logger = logging.getLogger("llava.serve")

KEY_VARIABLE = "LLAVA_API_KEYS"
WORKER_KEY_VARIABLE = "LLAVA_WORKER_KEYS"
VIDEO_TIMEOUT_FACTOR = 3  # a video's download may take so many times an image's


def add_server_flags(parser: ArgumentParser, *, port: int) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    server.add_argument("--port", type=int, default=port, help=f"0 picks a free one (default: {port})")
    server.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add_number(server, "--drain-seconds", 30.0, "S", "on SIGTERM, wait so long for running answers")
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"accepted API keys, one on a line; the variable {KEY_VARIABLE} adds some, with commas",
    )
    access.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        default=[],
        help="answer to this name in the Host header too; on loopback only loopback names are answered",
    )
    access.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        default=[],
        help="accept requests of this site's pages, as https://example.org (CORS; * for all; default: none)",
    )
    access.add_argument(
        "--trusted-proxy",
        action="append",
        metavar="ADDRESS",
        default=[],
        help="believe the X-Forwarded headers of a proxy at this address or network; unix: at the unix socket",
    )
    access.add_argument(
        "--root-path",
        metavar="PREFIX",
        default="",
        help="the prefix that a proxy publishes this server under, as /llava",
    )
    add_number(access, "--max-body-mb", 64.0, "MB", "largest body of a request")
    add_number(
        access, "--read-timeout", 20.0, "S", "seconds for the head of a request; a body has longer, the more has come"
    )
    access.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="open at once (default: half of the process's file descriptors)",
    )
    access.add_argument(
        "--max-connections-per-client", type=int, metavar="N", help="from one address (default: half of all)"
    )
    add_number(access, "--max-held-mb", 4096.0, "MB", "bodies and images of all requests together; more get status 429")


def add_worker_key_flag(parser: Flags) -> None:
    """Add the flag of controllers and workers for the keys between them."""
    parser.add_argument(
        "--worker-key-file",
        metavar="FILE",
        help="keys by which workers register with a controller, and it asks them; one on a line; not keys of clients; the "
        f"variable {WORKER_KEY_VARIABLE} adds some, with commas",
    )


def add_limit_flags(parser: ArgumentParser) -> None:
    limits = parser.add_argument_group("limits of a request")
    add_number(limits, "--max-images", 16, "N", "images and videos in one request")
    add_number(limits, "--max-image-mb", 20.0, "MB", "bytes of one image, encoded")
    add_number(limits, "--max-megapixels", 89.4, "MP", "of all images of a request together, and of its videos' frames")
    add_number(limits, "--max-video-mb", 100.0, "MB", "bytes of one video")
    add_number(limits, "--max-video-frames", 128, "N", "frames of one video that the model sees")
    add_number(limits, "--max-video-seconds", 3600.0, "S", "duration of one video")
    add_number(
        limits,
        "--max-requests",
        2048,
        "N",
        "answers at once, waiting ones included, each prompt and each n counted; more get status 429",
    )
    add_number(limits, "--deadline", 600.0, "S", "seconds for a whole answer")
    add_number(limits, "--image-timeout", 10.0, "S", "seconds for a download; a video has three times as long")
    limits.add_argument(
        "--strict", action="store_true", help="refuse unknown fields; else a header of the reply names them"
    )
    limits.add_argument(
        "--no-image-urls", action="store_true", help="download nothing: images and videos come as data: URLs"
    )
    limits.add_argument(
        "--allow-private-hosts", action="store_true", help="download from this machine's own network too"
    )
    limits.add_argument(
        "--image-folder", metavar="FOLDER", help="read file:// images and videos there (default: nowhere)"
    )


def memory_budget_from(args: Namespace) -> MemoryBudget:
    """Return the budget, after a check that the largest allowed request fits: else it would get status 429 for ever."""
    from llava.images.formats import BYTES_PER_PIXEL
    from llava.serve.http.memory_budget import BODY_COPIES, MemoryBudget

    needed = BODY_COPIES * args.max_body_mb + BYTES_PER_PIXEL * getattr(args, "max_megapixels", 0.0) * 1e6 / 2**20
    if not args.max_held_mb >= needed:
        raise InputError(
            f"--max-held-mb is {args.max_held_mb:g}, and one request may hold {needed:.0f}: give more, or lower --max-body-mb "
            "or --max-megapixels"
        )
    return MemoryBudget(int(args.max_held_mb * 2**20))


def limits_from(args: Namespace) -> ServeLimits:
    require("fastapi", extra="serve")
    from llava.serve.http.limits import SERVED_VIDEOS, ServeLimits

    return ServeLimits(
        max_images=args.max_images,
        max_requests=args.max_requests,
        deadline_s=args.deadline,
        images=ImageLimits(
            max_bytes=int(args.max_image_mb * 2**20),
            max_pixels=int(args.max_megapixels * 1e6),
            timeout_s=args.image_timeout,
            allow_private_hosts=args.allow_private_hosts,
        ),
        videos=replace(
            SERVED_VIDEOS,
            max_bytes=int(args.max_video_mb * 2**20),
            max_pixels=int(args.max_megapixels * 1e6),
            timeout_s=VIDEO_TIMEOUT_FACTOR * args.image_timeout,
            allow_private_hosts=args.allow_private_hosts,
            max_frames=args.max_video_frames,
            max_duration_s=args.max_video_seconds,
        ),
        allow_urls=not args.no_image_urls,
        strict=args.strict,
        image_folder=Path(args.image_folder).expanduser() if args.image_folder else None,
    )


@dataclass(frozen=True)
class ListenAddress:
    """Bound sockets and their URL, what is accepted there, and the key between a worker and its controller."""

    listeners: list[socket.socket]
    url: str
    access: AccessPolicy
    worker_key: str | None = None
    uds: str | None = None  # the path of the unix socket, where it is one


def listen_address_from(args: Namespace, *, is_worker: bool = False) -> ListenAddress:
    """Set up logging, read the keys, and bind the sockets. A worker registers with the first of its worker keys."""
    for package in ("uvicorn", "fastapi", "httpx"):
        require(package, extra="serve")
    from llava.serve.http.server import bind, bind_unix, url_of
    from llava.serve.process import set_up_logging

    set_up_logging(args.log_level)
    worker_keys = worker_keys_from(args)
    access = access_from(args, worker_keys, is_worker=is_worker)
    key = next(iter(worker_keys), None)
    uds = getattr(args, "uds", None)
    if uds is not None:
        return ListenAddress(
            bind_unix(Path(uds).expanduser()), "http://localhost", access, key, str(Path(uds).expanduser())
        )
    listeners = bind(args.host, args.port)
    return ListenAddress(listeners, url_of(listeners, args.host), access, key)


def worker_keys_from(args: Namespace) -> list[str]:
    """Return the keys between workers and controllers, where a program has a flag for them."""
    from llava.serve.http.keys import read_keys

    if not hasattr(args, "worker_key_file"):  # a server that has nothing to do with workers
        return []
    return read_keys(args.worker_key_file, os.environ.get(WORKER_KEY_VARIABLE))


def access_from(args: Namespace, worker_keys: Sequence[str] = (), *, is_worker: bool = False) -> AccessPolicy:
    """Return who may send requests, and how many connections there may be."""
    from llava.serve.http.connections import ConnectionLimits
    from llava.serve.http.cors import CrossOrigin
    from llava.serve.http.forwarded import TrustedProxies, checked_prefix
    from llava.serve.http.keys import ApiKeys, read_keys
    from llava.serve.http.middleware import LOOPBACK_NAMES, AccessPolicy
    from llava.serve.http.server import is_loopback

    keys = ApiKeys(read_keys(args.api_key_file, os.environ.get(KEY_VARIABLE)))
    between = ApiKeys(worker_keys)
    if keys.overlap(between):
        raise InputError(
            "a key of clients is a worker's key too: its holder could register workers; give different ones"
        )
    loopback = is_loopback(args.host)
    if not loopback and not keys and not (is_worker and between):
        logger.warning("this server is open to everybody who reaches %s: give keys by --api-key-file", args.host)
    return AccessPolicy(
        keys=keys,
        worker_keys=between,
        is_worker=is_worker,
        max_body_bytes=int(args.max_body_mb * 2**20),
        hosts=(*LOOPBACK_NAMES, *args.allow_host) if loopback else tuple(args.allow_host) or None,
        cross_origin=CrossOrigin(tuple(args.allow_origin)),
        proxies=TrustedProxies.given(args.trusted_proxy),
        root_path=checked_prefix(args.root_path),
        memory=memory_budget_from(args),
        connections=ConnectionLimits.given(
            args.max_connections,
            args.max_connections_per_client,
            read_timeout_s=min(args.read_timeout, getattr(args, "deadline", args.read_timeout)),
        ),
    )
