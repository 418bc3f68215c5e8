"""What is noted of the request in progress: its id, the error that it ended with, and headers of its response.

In: a request's headers; errors as they are made. Out: the id for log lines, responses and errors; headers. The record travels
in a context variable, so that functions which know no request can note an error.
"""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

REQUEST_ID = "x-request-id"
_ACCEPTED = re.compile(r"[\x21-\x7e]{1,100}")


@dataclass
class NotedError:
    kind: str
    sentence: str


@dataclass
class RequestRecord:
    id: str
    error: NotedError | None = None
    headers: dict[str, str] = field(default_factory=dict)  # to add to the response


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def begin_record(given_id: str) -> RequestRecord:
    """Begin the record of a request. The client's own id is taken where it is short and printable."""
    record = RequestRecord(given_id if _ACCEPTED.fullmatch(given_id) else uuid.uuid4().hex)
    _current.set(record)
    return record


def note_error(kind: str, message: str) -> None:
    """Note how the request in progress failed. The sentence is for the log: one line, printable, not long."""
    record = _current.get()
    if record is not None:
        words = " ".join(message.split())
        shown = "".join(character if character.isprintable() else "?" for character in words)
        record.error = NotedError(kind, shown if len(shown) <= 300 else shown[:300] + "...")


def note_header(name: str, text: str) -> None:
    """Add a header, in printable ASCII, to the response to the request in progress."""
    record = _current.get()
    if record is not None:
        record.headers[name] = text


def current_id() -> str | None:
    """Return the id of the request in progress."""
    record = _current.get()
    return record.id if record is not None else None


class RequestIdFilter(logging.Filter):
    """Gives every log record a field `request`: the id of the request in progress, in brackets after a space, or nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        number = current_id()
        record.request = f" [{number}]" if number is not None else ""
        return True
