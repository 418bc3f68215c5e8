"""Requests of programs to other servers: one function with one set of rules, whatever the other side sends.

In: a URL, a body, a key. Out: a reply of bounded size within a bounded time, or an `HttpFailureError` of one phrase. No
redirect is followed, so that a key never goes to another place than the one it was given for. Servers use httpx, which follows
none either (serve/backends/remote.py), and untrusted images are fetched by images/download.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from typing import IO
from urllib.parse import urlsplit

from llava.errors import shortened

MAX_REPLY = 16 << 20  # bytes
CHUNK = 64 * 1024
MAX_RETRY_AFTER_S = 120.0


class HttpFailureError(Exception):
    """There is no reply; the message is a phrase, as `it sent no answer within 5 s`."""


@dataclass(frozen=True)
class HttpReply:
    """A reply, with any status."""

    status: int
    reason: str
    body: bytes
    retry_after_s: float | None = None  # what the server asks for, bounded

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> object:
        """Parse the body; raises `HttpFailureError` where it is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            start = shortened(" ".join(self.text.split()), 80)
            raise HttpFailureError(f"its reply is not JSON: {start!r}") from None


def send(
    url: str,
    content: object = None,
    *,
    key: str | None = None,
    timeout_s: float,
    max_bytes: int = MAX_REPLY,
) -> HttpReply:
    """Send a request, POST with JSON where there is content, and return the whole reply.

    Args:
        url: An http or https URL.
        content: What is sent as JSON.
        key: Sent as a bearer token, to this URL alone.
        timeout_s: For everything, from the name's lookup to the last byte.
        max_bytes: A reply that is larger is refused.

    Raises:
        HttpFailureError: There is no reply within the limits.
    """
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("it is no http or https address")
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(url, data, headers)
    except ValueError as error:
        raise HttpFailureError(f"{shortened(url)!r} cannot be asked: {error}") from None
    # In a thread, since a timeout of a socket begins anew with every byte.
    replies: queue.SimpleQueue[HttpReply | HttpFailureError] = queue.SimpleQueue()
    over = threading.Event()

    def work() -> None:
        try:
            replies.put(_exchange(request, timeout_s, max_bytes, over.is_set))
        except HttpFailureError as error:
            replies.put(error)
        except TimeoutError:
            replies.put(HttpFailureError(f"it sent no whole answer within {timeout_s:g} s"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            replies.put(HttpFailureError(shortened(" ".join(str(reason).split())) or type(error).__name__))

    threading.Thread(target=work, name="llava-request", daemon=True).start()
    try:
        reply = replies.get(timeout=timeout_s)
    except queue.Empty:
        reply = HttpFailureError(f"it sent no whole answer within {timeout_s:g} s")
    finally:
        over.set()
    if isinstance(reply, HttpFailureError):
        raise reply
    return reply


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Answers with a redirect are replies like any other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _exchange(
    request: urllib.request.Request, timeout_s: float, max_bytes: int, is_over: Callable[[], bool]
) -> HttpReply:
    opener = urllib.request.build_opener(_NoRedirects())
    deadline = time.monotonic() + timeout_s
    try:
        response = opener.open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        response = error
    with contextlib.closing(response):
        if 300 <= response.status < 400:
            place = shortened(urlsplit(response.headers.get("Location") or "").netloc) or "nowhere"
            raise HttpFailureError(
                f"it redirects to {place}, and a redirect is not followed; give that address instead"
            )
        body = bytearray()
        while not is_over() and time.monotonic() < deadline:
            part = response.read1(CHUNK)
            if not part:
                break
            body += part
            if len(body) > max_bytes:
                raise HttpFailureError(f"its reply is larger than {max_bytes:,} bytes")
        else:
            raise TimeoutError
        missing = getattr(response, "length", None) or 0
        if missing:
            raise HttpFailureError(f"its reply ended {missing:,} bytes early")
        retry = retry_seconds(response.headers.get("Retry-After"))
        return HttpReply(response.status, response.reason or "", bytes(body), retry)


def retry_seconds(header: str | None) -> float | None:
    """The seconds of a Retry-After header; a date is not read."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return min(seconds, MAX_RETRY_AFTER_S) if seconds >= 0 else None
