"""A process that decodes images for another one, within limits of time and memory.

In: requests on a socket, and the bytes of files in memory that both processes share. Out: pixels in that memory, or a sentence
that says what is wrong. It imports Pillow and nothing larger. decoder_pool.py starts it, and ends it where it takes too long;
the system ends it where it takes too much processor time. When the socket is closed it ends by itself.
"""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import sys
from contextlib import suppress
from typing import TypedDict

from llava.errors import InputError
from llava.images.decode import OutOfMemoryError, decode
from llava.images.download import ImageLimits
from llava.images.formats import ImageHeader, read_header

SPARE_BYTES = 64 * 2**20  # for the interpreter and for libraries that are loaded at the first use of a format
STRIP_BYTES = 2**20
READY = b"ready\n"


class DecodeCommand(TypedDict):
    """One image: where its bytes end in the shared memory, its name for messages, and what it may be."""

    num_bytes: int
    name: str
    max_pixels: int
    upright: bool


class DecodeReply(TypedDict, total=False):
    """The size of the image in the shared memory, or what is wrong with it."""

    width: int
    height: int
    error: str
    memory: bool  # the error is that the memory did not suffice


def main(descriptor: int, shared: int) -> None:
    """Answer requests until the socket is closed. Both numbers are file descriptors: the socket, and the shared memory."""
    from PIL import AvifImagePlugin

    # Many processes decode at once, and each thread of a decoder reserves memory for its stack.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.options.DECODE_THREADS = 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rb") as commands:
        channel.sendall(READY)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print of a broken file belongs in no log
        for line in commands:
            reply = _answer(json.loads(line), shared)
            channel.sendall(json.dumps(reply).encode() + b"\n")
            if reply.get("memory"):
                return  # libraries may be left in any state


def _answer(command: DecodeCommand, shared: int) -> DecodeReply:
    name = command["name"]
    try:
        data = os.pread(shared, command["num_bytes"], 0)
        header = read_header(data, name, ImageLimits(max_pixels=command["max_pixels"]))
        _limit(header)
        image = decode(data, header, name, upright=command["upright"])
    except OutOfMemoryError as error:
        return {"error": str(error), "memory": True}
    except InputError as error:
        return {"error": str(error)}
    num_rows = max(1, STRIP_BYTES // (3 * image.width))
    for top in range(0, image.height, num_rows):
        strip = image.crop((0, top, image.width, min(image.height, top + num_rows)))
        os.pwrite(shared, strip.tobytes(), 3 * image.width * top)
    return {"width": image.width, "height": image.height}


def _limit(header: ImageHeader) -> None:
    """Allow this process what the image may take from now on, beside what it has taken."""
    if sys.platform == "linux":  # elsewhere the system does not keep to it
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if header.format.name in ("PNG", "TIFF"):  # whose deep greys need numpy, which is large to load
        import numpy as np  # noqa: F401
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + header.decode_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            num_bytes = int(file.read().split()[0]) * resource.getpagesize()
        allowed = num_bytes + header.decode_bytes + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.RLIM_INFINITY))
