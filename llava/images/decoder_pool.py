"""Decode images in processes of their own, so that what a client sends cannot stop a server or take its memory.

In: the bytes of a file and their `ImageHeader`. Out: a Pillow image, RGB; or an `InputError`. A process is started when an
image comes and none is idle, up to a number; each decodes one image at a time (decoder_main.py) within the time and memory
that the header allows, and one that goes beyond is ended. Bytes and pixels pass through memory that both processes share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING

from llava.errors import InputError
from llava.images.decode import Reserve, decode_here, reserved
from llava.images.formats import ImageHeader

if TYPE_CHECKING:
    from PIL import Image

    from llava.images.decoder_main import DecodeCommand, DecodeReply

logger = logging.getLogger(__name__)

START = "from llava.images.decoder_main import main; main({}, {})"
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT")  # no keys among them
MAX_PROCESSES = 8
START_S = 120.0
WALL_SECONDS = 10.0  # that an image may take on a machine with much else to do,
WALL_FACTOR = 10.0  # and so many times its processor time
KEPT_BYTES = 16 * 2**20  # of shared memory, between images
LONGEST_REPLY = 64 * 1024
STRIP_BYTES = 2**20


class DecoderPool:
    """An `ImageDecoder` whose processes are started when they are needed; any thread may call it.

    On Windows, which has no such limits, images are decoded in this process.
    """

    def __init__(self, max_processes: int | None = None) -> None:
        self.max_processes = max_processes or min(MAX_PROCESSES, max(2, os.cpu_count() or 1))
        self._free = threading.Semaphore(self.max_processes)
        self._idle: list[DecoderProcess] = []

    def __call__(self, data: bytes, header: ImageHeader, name: str, *, upright: bool, reserve: Reserve) -> Image.Image:
        if os.name == "nt":
            return decode_here(data, header, name, upright=upright, reserve=reserve)
        with self._free, reserved(reserve, header):  # an image that waits for a process reserves nothing yet
            try:
                process = self._idle.pop()
            except IndexError:
                process = DecoderProcess()
            try:
                return process.decode(data, header, name, upright=upright)
            finally:
                if process.is_alive:
                    self._idle.append(process)

    def close(self) -> None:
        """End the processes that are idle. A later image starts new ones."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


class DecoderProcess:
    """One process, for one image at a time. It is ended by whatever goes wrong but a broken image."""

    def __init__(self) -> None:
        self._memory = os.memfd_create("llava-image") if hasattr(os, "memfd_create") else _unnamed_file()
        here, there = socket.socketpair()
        with there:
            kept = {variable: os.environ[variable] for variable in KEPT_VARIABLES if variable in os.environ}
            path = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-c", START.format(there.fileno(), self._memory)],
                pass_fds=[there.fileno(), self._memory],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**kept, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C at a terminal is for the server, which finishes its requests first
            )
        self._channel = here
        self.is_alive = True
        self._channel.settimeout(START_S)
        try:
            self._line()
        except OSError as error:
            self.close()
            raise RuntimeError(f"the process that decodes images did not start: {error}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def decode(self, data: bytes, header: ImageHeader, name: str, *, upright: bool) -> Image.Image:
        seconds = WALL_SECONDS + WALL_FACTOR * header.decode_seconds
        try:
            try:
                self._channel.settimeout(seconds)
                _write(self._memory, data)
                command: DecodeCommand = {
                    "num_bytes": len(data),
                    "name": name,
                    "max_pixels": header.num_pixels,
                    "upright": upright,
                }
                self._channel.sendall(json.dumps(command).encode() + b"\n")
                reply: DecodeReply = json.loads(self._line())
            except TimeoutError:
                raise InputError(f"{name} took longer than {seconds:.0f} seconds to decode; save it anew.") from None
            except OSError:
                raise InputError(f"{name} cannot be decoded: {self._end(header)}") from None
            if "error" in reply:
                if not reply.get("memory"):
                    raise _BrokenImageError(reply["error"])
                raise InputError(f"{name} takes more memory to decode than an image of its size may; save it anew.")
            image = self._image(reply["width"], reply["height"], header)
        except _BrokenImageError as error:
            raise InputError(str(error)) from None
        except BaseException:
            self.close()
            raise
        if len(data) > KEPT_BYTES or 3 * header.num_pixels > KEPT_BYTES:
            os.ftruncate(self._memory, 0)
        return image

    def close(self) -> None:
        if self.is_alive:
            self.is_alive = False
            self._process.kill()
            self._process.wait()
            self._channel.close()
            os.close(self._memory)

    def _line(self) -> bytes:
        """Return the next line that the process writes; OSError where it has ended or says too much."""
        line = b""
        while not line.endswith(b"\n"):
            part = self._channel.recv(LONGEST_REPLY)
            line += part
            if not part or len(line) > LONGEST_REPLY:
                raise ConnectionError("it ended")
        return line

    def _image(self, width: int, height: int, header: ImageHeader) -> Image.Image:
        from PIL import Image

        # The process has read untrusted bytes, so its word is not taken for the size. Reading a file, unlike mapping it
        # into memory, ends in an error and in no signal where it is shorter.
        if not 0 < width * height <= header.num_pixels:
            raise RuntimeError(f"the process that decodes images named a size of {width}x{height}")
        num_rows = max(1, STRIP_BYTES // (3 * width))  # a strip stays in the processor's cache
        pixels = memoryview(bytearray(3 * width * min(num_rows, height)))
        image = Image.new("RGB", (width, height), None)
        for top in range(0, height, num_rows):
            size = width, min(num_rows, height - top)
            strip = pixels[: 3 * size[0] * size[1]]
            _read(self._memory, strip, 3 * width * top)
            image.paste(Image.frombuffer("RGB", size, strip, "raw", "RGB", 0, 1), (0, top))
        return image

    def _end(self, header: ImageHeader) -> str:
        """Say how the process ended."""
        self._process.kill()
        status = self._process.wait()
        if status == -signal.SIGXCPU:
            return f"it takes more than {header.decode_seconds:.0f} seconds of processor time; save it anew."
        logger.warning("a process that decodes images ended with status %d", status)
        return "its decoder failed; save it anew."


class _BrokenImageError(Exception):
    """The process has said what is wrong with the image, and can decode the next."""


def _unnamed_file() -> int:
    """Return a file that has no name, where the system has none in memory."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(descriptor: int, data: bytes) -> None:
    place, view = 0, memoryview(data)
    while place < len(view):
        place += os.pwrite(descriptor, view[place:], place)


def _read(descriptor: int, buffer: memoryview, place: int) -> None:
    """Fill a buffer from a place of a file."""
    while buffer:
        num_bytes = os.preadv(descriptor, [buffer], place)
        if not num_bytes:
            raise RuntimeError("the process that decodes images wrote less than it said")
        buffer, place = buffer[num_bytes:], place + num_bytes
