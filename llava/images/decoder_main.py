"""A process that decodes images and videos for another one, within limits of time and memory.

In: requests on a socket, and the bytes of files in memory that both processes share. Out: pixels in that memory, or a sentence
that says what is wrong. Frames of a video come behind its bytes; before they are decoded, their number and size are told, and
the other process answers that there is memory for them. Pillow and nothing larger is imported before a video comes.
decoder_pool.py starts this process, and ends it where it takes too long; the system ends it where it takes too much processor
time. When the socket is closed it ends by itself.
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict

from llava.errors import InputError
from llava.images.decode import OutOfMemoryError, decode
from llava.images.download import ImageLimits
from llava.images.formats import read_header

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SPARE_BYTES = 64 * 2**20  # for the interpreter and for libraries that are loaded at the first use of a format
STRIP_BYTES = 2**20
READY = b"ready\n"


class DecodeCommand(TypedDict):
    """One image: where its bytes end in the shared memory, its name for messages, and what it may be."""

    num_bytes: int
    name: str
    max_pixels: int
    upright: bool


class VideoCommand(TypedDict):
    """One video: where its bytes end in the shared memory, its name for messages, and the values of its dataclasses."""

    num_bytes: int
    name: str
    container: str
    sampling: dict[str, Any]
    limits: dict[str, Any]


class VideoReply(TypedDict, total=False):
    """What the frames of a video will take, and then, when they are decoded, what they are; or what is wrong with it."""

    width: int
    height: int
    num_frames: int
    decoder_bytes: int
    times: list[float]
    duration: float
    fps: float
    error: str
    memory: bool


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
            command = json.loads(line)
            replies = _video_replies(command, shared) if "container" in command else iter([_answer(command, shared)])
            for reply in replies:
                channel.sendall(json.dumps(reply).encode() + b"\n")
                if "decoder_bytes" in reply:
                    commands.readline()  # there is memory for it; otherwise this process is ended
                if reply.get("memory"):
                    return  # libraries may be left in any state


def _answer(command: DecodeCommand, shared: int) -> DecodeReply:
    name = command["name"]
    try:
        data = os.pread(shared, command["num_bytes"], 0)
        header = read_header(data, name, ImageLimits(max_pixels=command["max_pixels"]))
        _lift_memory_limit()
        if header.format.name in ("PNG", "TIFF"):  # whose deep greys need numpy, which is large to load
            import numpy as np  # noqa: F401
        _limit(header.decode_seconds, header.decode_bytes)
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


def _video_replies(command: VideoCommand, shared: int) -> Iterator[VideoReply | DecodeReply]:
    """Open a video; then, when the generator goes on, decode its frames."""
    from llava.images.frames import CONTAINERS, OPENING_BYTES, FrameSampling, VideoLimits
    from llava.images.video_decode import import_decoders, open_frames

    name, at = command["name"], command["num_bytes"]
    try:
        container = next(item for item in CONTAINERS if item.name == command["container"])
        limits = VideoLimits(**command["limits"])
        _lift_memory_limit()
        import_decoders(container)
        copied = at if container.is_image else 0
        _limit(limits.max_decode_s, OPENING_BYTES + copied)
        file = io.BufferedReader(_SharedFile(shared, at))
        opened = open_frames(file, container, FrameSampling(**command["sampling"]), limits, name, num_threads=1)
        width, height = opened.size
        yield {
            "width": width,
            "height": height,
            "num_frames": len(opened.times),
            "decoder_bytes": opened.num_bytes + copied,
        }
        # Two frames as they are and as RGB, beside what the decoder keeps.
        _limit(None, opened.num_bytes + 16 * width * height)
        count = 0
        for frame in opened.frames():
            width, height = frame.size
            os.pwrite(shared, frame.tobytes(), at + 3 * width * height * count)
            count += 1
        yield {
            "width": width,
            "height": height,
            "num_frames": count,
            "times": list(opened.times),
            "duration": opened.duration,
            "fps": opened.fps,
        }
    except OutOfMemoryError as error:
        yield {"error": str(error), "memory": True}
    except InputError as error:
        yield {"error": str(error)}


class _SharedFile(io.RawIOBase):
    """The first bytes of the shared memory as a file."""

    def __init__(self, shared: int, num_bytes: int) -> None:
        self._shared, self._num_bytes, self._at = shared, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._num_bytes - self._at)]
        num_bytes = os.preadv(self._shared, [view], self._at) if view else 0
        self._at += num_bytes
        return num_bytes


def _lift_memory_limit() -> None:
    """Allow this process any memory, for what is not of the last file's making: libraries."""
    if sys.platform == "linux":  # elsewhere the system does not keep to it
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _limit(seconds: float | None, num_bytes: int) -> None:
    """Allow this process so much from now on, beside what it has taken; without seconds, as long as before."""
    if seconds is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        end = math.ceil(used.ru_utime + used.ru_stime + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + num_bytes + SPARE_BYTES, resource.RLIM_INFINITY))
