"""API keys and their roles: keys of clients, and keys of workers.

In: files and environment variables with keys; the Authorization header of a request. Out: whether a key is accepted, and who
the client is, without the key itself. A worker's key registers workers at a controller, which shows it to them.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path

from llava.errors import InputError

MIN_KEY_LENGTH = 8
KEY_CLIENT = "key-"  # how the name of a client with a key begins

# Who sent the request that is being answered: a digest of its key, else its address. Requests of different clients are queued
# fairly (engine/fair_queue.py). Set by middleware.py for the task of a request.
current_client: ContextVar[str] = ContextVar("current_client", default="")


def read_keys(path: str | None, variable: str | None) -> list[str]:
    """Read API keys: from a file, one on a line, with # for comments; then from an environment variable, with commas."""
    keys = []
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the file of API keys {path!r} cannot be read: {error}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"the file of API keys {path!r} holds no key; put one on a line")
    return keys + [key.strip() for key in (variable or "").split(",") if key.strip()]


class ApiKeys:
    """The accepted API keys. Without any, the server needs none."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = []
        for key in keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or any(character.isspace() for character in key):
                raise InputError(f"an API key needs {MIN_KEY_LENGTH} characters or more, ASCII without spaces")
            self._digests.append(_digest(key))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: str | None) -> bool:
        """Return whether an Authorization header has one of the keys. The time does not depend on how much of it matches."""
        if not self._digests:
            return True
        key = bearer_key(authorization)
        given = _digest(key or "")
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and key is not None

    def overlap(self, other: ApiKeys) -> bool:
        return not set(self._digests).isdisjoint(other._digests)


def authorization_of(headers: Mapping[str, str]) -> str:
    """Return the Authorization header. Anthropic's clients send the key in a header of its own."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else "")


def bearer_key(authorization: str | None) -> str | None:
    """Return the key of an Authorization header, if it has one."""
    kind, _, key = (authorization or "").partition(" ")
    return key.strip() or None if kind.lower() == "bearer" else None


def same_key(one: str | None, other: str | None) -> bool:
    """Compare two keys in a time that does not depend on how much of them matches. None stands for no key."""
    return (one is None) == (other is None) and hmac.compare_digest(_digest(one or ""), _digest(other or ""))


def client_name(authorization: str | None, address: str) -> str:
    """Return a name for who sent a request: a digest of its key, or its address."""
    key = bearer_key(authorization)
    digest = hashlib.sha256(f"client {key}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{KEY_CLIENT}{digest}" if key else address


def owner_of(client: str) -> str:
    """Return whose things a client sees that a server keeps: those of its key. Clients without one see the same."""
    return client if client.startswith(KEY_CLIENT) else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
