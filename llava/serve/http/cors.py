"""Requests by pages of other sites (CORS): which are allowed, and the headers that tell a browser so.

In: the Origin header of a request. Out: whether it is accepted, and headers for its response, which errors need too: without
them a page sees no status and no message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import Response

from llava.errors import InputError

ANY = "*"
METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
PREFLIGHT_S = 600  # a browser asks again after so many seconds
MAX_HEADERS = 4000  # characters of a list of headers that is repeated
PORTS = {"http": 80, "https": 443}
_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@,]+")


@dataclass(frozen=True)
class CrossOrigin:
    """The sites whose pages may send requests; `*` is any."""

    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin not in (ANY, "null") and not _ORIGIN.fullmatch(origin):
                raise InputError(
                    f"--allow-origin is {origin!r}; give scheme and host of a site without a path, as https://example.org, "
                    f"or {ANY} for all"
                )

    def allow(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` may send requests to this server, which it calls `host`."""
        return origin in self.origins or ANY in self.origins or is_same_site(origin, host)

    def headers(self, origin: str) -> dict[str, str]:
        """Headers for every response to a request with this Origin header; it is empty where there was none."""
        if not self.origins:
            return {}
        headers = {"vary": "Origin"}
        if origin and (origin in self.origins or ANY in self.origins):
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = "*"
        return headers

    def preflight(self, method: str, headers: Mapping[str, str]) -> Response | None:
        """Return the answer to a browser that asks whether it may send a request; None for any other request."""
        if method != "OPTIONS" or not headers.get("origin") or not headers.get("access-control-request-method"):
            return None
        answer = {"access-control-allow-methods": METHODS, "access-control-max-age": str(PREFLIGHT_S)}
        asked = headers.get("access-control-request-headers", "")
        if asked and len(asked) <= MAX_HEADERS and _NAMES.fullmatch(asked):
            answer["access-control-allow-headers"] = asked
        if headers.get("access-control-request-private-network") == "true":
            answer["access-control-allow-private-network"] = "true"
        return Response(status_code=204, headers=answer)


def is_same_site(origin: str, host: str) -> bool:
    """Whether a page of `origin` comes from this server itself, which the request calls `host`.

    The page's scheme says which port a host without one has: a proxy that speaks https may say nothing of it.
    """
    try:
        page, own = urlsplit(origin), urlsplit(f"//{host}")
        port = page.port or PORTS.get(page.scheme)
        own_port = own.port or PORTS.get(page.scheme)
        return page.hostname is not None and (page.hostname, port) == (own.hostname, own_port)
    except ValueError:
        return False
