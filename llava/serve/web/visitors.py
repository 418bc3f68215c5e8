"""The visitors of the web page: who they are, the files that they have uploaded, and what they hold.

In: a cookie or an address, uploads, the page's open connections. Out: `Visitor`s. Files lie in a folder of the page that
nobody else reads, count in the memory budget of the server, and are deleted when a visitor has left. Who may ask for what is
decided in middleware.py.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from llava.errors import InputError
from llava.serve.backends.base import ServerBusyError
from llava.serve.http.memory_budget import MemoryBudget, Reservation

MAX_NAME = 80  # characters of a file's name


@dataclass(frozen=True)
class VisitorLimits:
    """What the visitors of a page may hold."""

    max_visitors: int = 2000
    max_files: int = 64  # of one visitor
    max_bytes: int = 256 * 2**20  # of these files together
    max_file_bytes: int = 20 * 2**20
    max_pages: int = 16  # open at once
    max_page_bytes: int = 32 * 2**20  # that the events of a page may leave in memory
    max_event_bytes: int = 4 * 2**20  # of one event's data
    body_s: float = 120.0  # for an upload or an event to arrive
    left_s: float = 120.0  # after its last page is closed, a visitor has left
    login_s: float = 30 * 86_400.0  # a login holds so long


@dataclass(eq=False)
class Visitor:
    """One visitor; `key` is the API key that they have logged in with."""

    name: str
    folder: Path
    reservation: Reservation
    key: str = ""
    entered: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)
    pages: dict[str, int] = field(default_factory=dict)  # by Gradio's session, the bytes that its events have left
    connected: set[str] = field(default_factory=set)  # pages that are open in a browser
    closed: dict[str, float] = field(default_factory=dict)  # when the others were last heard of
    files: dict[Path, int] = field(default_factory=dict)

    def owns(self, path: Path) -> bool:
        return path in self.files


class Visitors:
    """All visitors of one page; used in one event loop."""

    def __init__(self, folder: Path, memory: MemoryBudget, limits: VisitorLimits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="visitors-", dir=folder)).resolve()  # for this user only
        self.limits = limits
        self._memory = memory
        self._visitors: dict[str, Visitor] = {}

    def __len__(self) -> int:
        return len(self._visitors)

    def find(self, name: str) -> Visitor | None:
        visitor = self._visitors.get(name)
        if visitor is not None:
            visitor.seen = time.monotonic()
        return visitor

    def enter(self, name: str, *, key: str = "") -> Visitor:
        """Return the visitor of a name, a new one where there is none.

        Raises:
            ServerBusyError: there are too many.
        """
        visitor = self.find(name)
        if visitor is None:
            if len(self._visitors) >= self.limits.max_visitors:
                self.tidy()
            if len(self._visitors) >= self.limits.max_visitors:
                raise ServerBusyError("too many visitors are on this page; try again in a moment")
            folder = self.folder / secrets.token_urlsafe(16)
            visitor = self._visitors[name] = Visitor(name, folder, self._memory.reserve(), key)
        return visitor

    def open(self, visitor: Visitor, session: str, *, connected: bool = False) -> None:
        """Count a page of a visitor that sends an event, or one whose browser keeps a connection open (`connected`).

        Raises:
            InputError: the session is another visitor's.
            ServerBusyError: they have too many pages.
        """
        if any(session in other.pages for other in self._visitors.values() if other is not visitor):
            raise InputError("this page belongs to another visitor; load it again")
        if session not in visitor.pages:
            if len(visitor.pages) >= self.limits.max_pages and visitor.closed:
                self._drop_page(visitor, min(visitor.closed, key=visitor.closed.__getitem__))
            if len(visitor.pages) >= self.limits.max_pages:
                raise ServerBusyError(f"{len(visitor.pages)} pages are open; close one, and load this one again")
            visitor.pages[session] = 0
        if connected:
            visitor.connected.add(session)
            visitor.closed.pop(session, None)
        elif session not in visitor.connected:
            visitor.closed[session] = time.monotonic()

    def hold(self, visitor: Visitor, session: str, num_bytes: int) -> None:
        """Count what an event leaves in memory until its page is closed.

        Raises:
            InputError: its page holds too much.
            ServerBusyError: all requests and visitors together hold too much.
        """
        if visitor.pages[session] + num_bytes > self.limits.max_page_bytes:
            raise InputError("this conversation holds too much; load the page again")
        visitor.reservation.change(num_bytes)
        visitor.pages[session] += num_bytes

    def close_page(self, visitor: Visitor, session: str) -> None:
        """Note that a page's connection has ended; it may come back soon."""
        visitor.connected.discard(session)
        if session in visitor.pages:
            visitor.closed[session] = time.monotonic()

    def keep(self, visitor: Visitor, name: str, data: bytes) -> Path:
        """Write a file of a visitor, and return its path. Where they have too many, the oldest are deleted.

        Raises:
            InputError: it is too large.
            ServerBusyError: there is no memory for it.
        """
        limits = self.limits
        if len(data) > limits.max_file_bytes:
            raise InputError(
                f"{name[:MAX_NAME]!r} has {len(data):,} bytes, and at most {limits.max_file_bytes:,} are allowed"
            )
        while len(visitor.files) >= limits.max_files or sum(visitor.files.values()) + len(data) > limits.max_bytes:
            self._delete(visitor, next(iter(visitor.files)))
        visitor.reservation.change(len(data))
        folder = visitor.folder / secrets.token_urlsafe(8)
        folder.mkdir(parents=True)
        path = folder / plain_name(name)
        visitor.files[path] = len(data)
        path.write_bytes(data)
        return path

    def _delete(self, visitor: Visitor, path: Path) -> None:
        visitor.reservation.change(-visitor.files.pop(path))
        shutil.rmtree(path.parent, ignore_errors=True)

    def tidy(self) -> list[str]:
        """Delete what visitors that have left held; return the sessions of pages that are closed for good."""
        now, limits = time.monotonic(), self.limits
        gone = []
        for visitor in list(self._visitors.values()):
            for session, closed in list(visitor.closed.items()):
                if now - closed > limits.left_s:
                    gone.append(session)
                    self._drop_page(visitor, session)
            quiet = now - visitor.seen
            if not visitor.connected and quiet > limits.left_s:
                gone += visitor.pages
                self._drop(visitor, logged_out=now - visitor.entered > limits.login_s)
        return gone

    def leave(self, name: str) -> None:
        """Delete everything of a visitor, who is logged out."""
        if name in self._visitors:
            self._drop(self._visitors[name], logged_out=True)

    def close(self) -> None:
        for visitor in list(self._visitors.values()):
            self._drop(visitor, logged_out=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _drop_page(self, visitor: Visitor, session: str) -> None:
        visitor.closed.pop(session, None)
        visitor.reservation.change(-visitor.pages.pop(session))

    def _drop(self, visitor: Visitor, *, logged_out: bool) -> None:
        shutil.rmtree(visitor.folder, ignore_errors=True)
        visitor.reservation.release()
        if visitor.key and not logged_out:  # the login outlives the files
            visitor.files, visitor.pages, visitor.closed = {}, {}, {}
            visitor.reservation = self._memory.reserve()
        else:
            self._visitors.pop(visitor.name, None)


def plain_name(name: str) -> str:
    """Return a name for a file that has no special meaning to any system or browser."""
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "_" for letter in name)
    return kept.lstrip(".")[-MAX_NAME:] or "image"


def use_private_folder() -> None:
    """Let Gradio keep its files where no other user of this machine looks, unless the environment names a place."""
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="llava-page-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
