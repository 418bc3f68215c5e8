"""Decode images and videos in processes of their own, so that what a client sends cannot stop a server or take its memory.

In: the bytes of a file and their `ImageHeader`, or a video's file and which frames to take. Out: a Pillow image, RGB, or a
`Video`; or an `InputError`. A process is started when an
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
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from llava.errors import InputError
from llava.images.decode import Reserve, decode_here, reserved
from llava.images.formats import BYTES_PER_PIXEL, ImageHeader
from llava.images.frames import OPENING_BYTES, Container, FrameSampling, Video, VideoLimits
from llava.images.video_decode import LocalVideoDecoder

if TYPE_CHECKING:
    from PIL import Image

    from llava.images.decoder_main import DecodeCommand, DecodeReply, VideoCommand, VideoReply

logger = logging.getLogger(__name__)

START = "from llava.images.decoder_main import main; main({}, {})"
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT")  # no keys among them
MAX_PROCESSES = 8
START_S = 120.0
WALL_SECONDS = 10.0  # that an image may take on a machine with much else to do,
WALL_FACTOR = 10.0  # and so many times its processor time;
WALL_FACTOR_VIDEO = 4.0  # for a video, which takes longer
KEPT_BYTES = 16 * 2**20  # of shared memory, between images
LONGEST_REPLY = 64 * 1024
STRIP_BYTES = 2**20
COPIED_BYTES = 4 * 2**20


def missing_limits(system: str = sys.platform) -> str | None:
    """Return a sentence about the limits that decoders do not have on a system, for a log; None on Linux, which has all."""
    if system == "linux":
        return None
    if system == "win32":
        return "images are decoded in this process, without limits of time and memory, which Windows does not have"
    return "the memory that decoding an image takes is not limited on this system; only its time is"


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
        kept = BYTES_PER_PIXEL * header.num_pixels
        # An image that waits for a process reserves nothing yet.
        with self._process() as process, reserved(reserve, header.decode_bytes, kept):
            return process.decode(data, header, name, upright=upright)

    def decode_video(
        self,
        file: BinaryIO,
        container: Container,
        sampling: FrameSampling,
        limits: VideoLimits,
        name: str,
        *,
        reserve: Reserve,
    ) -> Video:
        """Decode the chosen frames of a video."""
        if os.name == "nt":
            return LocalVideoDecoder().decode_video(file, container, sampling, limits, name, reserve=reserve)
        with self._process() as process:
            return process.decode_video(file, container, sampling, limits, name, reserve=reserve)

    @contextlib.contextmanager
    def _process(self) -> Iterator[DecoderProcess]:
        """Wait for a process that is free, and lend it."""
        with self._free:
            try:
                process = self._idle.pop()
            except IndexError:
                process = DecoderProcess()
            try:
                yield process
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
        command: DecodeCommand = {
            "num_bytes": len(data),
            "name": name,
            "max_pixels": header.num_pixels,
            "upright": upright,
        }
        with self._ended_by_errors():
            _write(self._memory, data)
            reply: DecodeReply = self._reply(command, name, header.decode_seconds, WALL_FACTOR)
            # The process has read untrusted bytes, so its word is not taken for the size.
            if not 0 < reply["width"] * reply["height"] <= header.num_pixels:
                raise RuntimeError(
                    f"the process that decodes images named a size of {reply['width']}x{reply['height']}"
                )
            image = self._image(reply["width"], reply["height"], 0)
        if len(data) > KEPT_BYTES or 3 * header.num_pixels > KEPT_BYTES:
            os.ftruncate(self._memory, 0)
        return image

    def decode_video(
        self,
        file: BinaryIO,
        container: Container,
        sampling: FrameSampling,
        limits: VideoLimits,
        name: str,
        *,
        reserve: Reserve,
    ) -> Video:
        seconds = limits.max_decode_s
        with self._ended_by_errors():
            with reserved(reserve, OPENING_BYTES, 0):
                at = _copy(file, self._memory)
                command: VideoCommand = {
                    "num_bytes": at,
                    "name": name,
                    "container": container.name,
                    "sampling": asdict(sampling),
                    "limits": asdict(limits),
                }
                plan: VideoReply = self._reply(command, name, seconds, WALL_FACTOR_VIDEO)
            count, num_pixels = plan["num_frames"], plan["width"] * plan["height"]
            if not (0 < count <= limits.max_frames and 0 < count * num_pixels <= limits.max_pixels):
                raise RuntimeError(f"the process that decodes videos named {count} frames of {num_pixels} pixels")
            kept = BYTES_PER_PIXEL * num_pixels * count
            # In the shared memory they are once more.
            with reserved(reserve, kept + 3 * num_pixels * count + plan["decoder_bytes"], kept):
                found: VideoReply = self._reply({}, name, seconds, WALL_FACTOR_VIDEO)
                width, height = found["width"], found["height"]
                if width * height != num_pixels or found["num_frames"] != count:
                    raise RuntimeError("the process that decodes videos decoded other frames than it named")
                frames = tuple(self._image(width, height, at + 3 * num_pixels * number) for number in range(count))
                os.ftruncate(self._memory, 0)
            return Video(frames, tuple(found["times"]), found["duration"], found["fps"])

    @contextlib.contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        """End the process where anything goes wrong but that the file is broken."""
        try:
            yield
        except _BrokenFileError as error:
            raise InputError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def _reply(self, command: object, name: str, seconds: float, factor: float) -> Any:
        """Send a command, which may take so much processor time, and return the process's reply."""
        wall = WALL_SECONDS + factor * seconds
        try:
            self._channel.settimeout(wall)
            self._channel.sendall(json.dumps(command).encode() + b"\n")
            reply = json.loads(self._line())
        except TimeoutError:
            raise InputError(f"{name} took longer than {wall:.0f} seconds to decode; save it anew.") from None
        except OSError:
            raise InputError(f"{name} cannot be decoded: {self._end(seconds)}") from None
        if "error" not in reply:
            return reply
        if reply.get("memory"):
            raise InputError(f"{name} takes more memory to decode than one of its size may; save it anew.")
        raise _BrokenFileError(reply["error"])

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

    def _image(self, width: int, height: int, place: int) -> Image.Image:
        """Read an image from a place of the shared memory."""
        from PIL import Image

        # Reading a file, unlike mapping it into memory, ends in an error and in no signal where it is shorter.
        num_rows = max(1, STRIP_BYTES // (3 * width))  # a strip stays in the processor's cache
        pixels = memoryview(bytearray(3 * width * min(num_rows, height)))
        image = Image.new("RGB", (width, height), None)
        for top in range(0, height, num_rows):
            size = width, min(num_rows, height - top)
            strip = pixels[: 3 * size[0] * size[1]]
            _read(self._memory, strip, place + 3 * width * top)
            image.paste(Image.frombuffer("RGB", size, strip, "raw", "RGB", 0, 1), (0, top))
        return image

    def _end(self, seconds: float) -> str:
        """Say how the process ended."""
        self._process.kill()
        status = self._process.wait()
        if status == -signal.SIGXCPU:
            return f"it takes more than {seconds:.0f} seconds of processor time; save it anew."
        logger.warning("a process that decodes images ended with status %d", status)
        return "its decoder failed; save it anew."


class _BrokenFileError(Exception):
    """The process has said what is wrong with a file, and can decode the next."""


def _unnamed_file() -> int:
    """Return a file that has no name, where the system has none in memory."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(descriptor: int, data: bytes, place: int = 0) -> None:
    view = memoryview(data)
    while view:
        num_bytes = os.pwrite(descriptor, view, place)
        view, place = view[num_bytes:], place + num_bytes


def _copy(file: BinaryIO, descriptor: int) -> int:
    """Copy a file to the beginning of another; returns its number of bytes."""
    place = 0
    while data := file.read(COPIED_BYTES):
        _write(descriptor, data, place)
        place += len(data)
    return place


def _read(descriptor: int, buffer: memoryview, place: int) -> None:
    """Fill a buffer from a place of a file."""
    while buffer:
        num_bytes = os.preadv(descriptor, [buffer], place)
        if not num_bytes:
            raise RuntimeError("the process that decodes images wrote less than it said")
        buffer, place = buffer[num_bytes:], place + num_bytes
