"""Where a request was sent to, as the client sees it: behind a proxy that has another name, another scheme and a prefix.

In: an ASGI scope, and which proxies are trusted. Out: a scope with the client's address, the scheme, the host and the path that
the client used. Headers of senders that are not trusted are removed, so that nothing further in believes them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from starlette.types import Scope

from llava.errors import InputError

UNIX = "unix"  # stands for whoever connects to a unix socket
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_FORWARDED = (b"forwarded", b"x-real-ip")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class TrustedProxies:
    """Senders whose X-Forwarded headers are believed."""

    networks: tuple[Network, ...] = ()
    unix: bool = False

    @classmethod
    def given(cls, words: Sequence[str]) -> TrustedProxies:
        """Read addresses and networks of the command line; `unix` is whoever connects to the unix socket."""
        networks = []
        for word in words:
            try:
                if word != UNIX:
                    networks.append(ipaddress.ip_network(word, strict=False))
            except ValueError:
                raise InputError(
                    f"--trusted-proxy is {word!r}; give the address of a proxy (127.0.0.1), a network (10.0.0.0/8), or {UNIX}"
                ) from None
        return cls(tuple(networks), UNIX in words)

    def trust(self, address: str | None) -> bool:
        """Whether a sender is trusted; None is one at a unix socket."""
        if address is None:
            return self.unix
        found = _address(address)
        return found is not None and any(found in network for network in self.networks)


def checked_prefix(prefix: str) -> str:
    """Return the prefix that the server is published under, `/llava`; none is the empty text."""
    prefix = prefix.rstrip("/")
    if prefix and not (_PREFIX.fullmatch(prefix) and not {".", ".."} & set(prefix.split("/"))):
        raise InputError(f"--root-path is {prefix!r}; give the beginning of a path, as /llava")
    return prefix


def as_sent(scope: Scope, proxies: TrustedProxies, prefix: str) -> Scope:
    """Return the scope of a request as its client sent it, below `prefix` or the one that a trusted proxy names.

    A proxy may remove the prefix from the path or leave it there.
    """
    client = scope.get("client")
    values = dict(_last_values(scope["headers"]))
    headers = [(name, value) for name, value in scope["headers"] if not _is_forwarded(name)]
    scope = dict(scope, headers=headers)
    if values and proxies.trust(client[0] if client else None):
        prefix = _apply(scope, values, proxies, prefix)
    if prefix:
        path, raw = scope["path"], scope.get("raw_path")
        scope["root_path"] = prefix
        if not (path + "/").startswith(prefix + "/"):
            scope["path"] = prefix + path
            scope["raw_path"] = prefix.encode() + raw if raw is not None else None
        elif path == prefix:
            scope["path"], scope["raw_path"] = path + "/", prefix.encode() + b"/"
    return scope


def route_path(scope: Scope) -> str:
    """Return the path of a request without the prefix."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(prefix) :] if prefix and (path + "/").startswith(prefix + "/") else path


def _apply(scope: Scope, values: dict[str, str], proxies: TrustedProxies, prefix: str) -> str:
    """Take what a trusted proxy says into the scope, and return the prefix."""
    senders = [word.strip() for word in values.get("for", "").split(",") if word.strip()]
    # Each proxy adds whom it heard from at the end; the first that is no proxy of ours is the client.
    for sender in reversed(senders):
        found = _address(sender)
        if found is None:
            break
        scope["client"] = (str(found), 0)
        if not proxies.trust(str(found)):
            break
    scheme = _last(values.get("proto", "")).lower()
    if scheme in ("http", "https"):
        scope["scheme"] = scheme
    host, port = _last(values.get("host", "")), _last(values.get("port", ""))
    if _HOST.fullmatch(host):
        usual = "443" if scope["scheme"] == "https" else "80"
        has_port = host.rpartition("]")[2].count(":") == 1
        if port.isdecimal() and len(port) <= 5 and port != usual and not has_port:
            host = f"{host}:{port}"
        rest = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [(b"host", host.encode()), *rest]
    try:
        return checked_prefix(_last(values.get("prefix", ""))) or prefix
    except InputError:
        return prefix


def _last_values(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[str, str]]:
    """The X-Forwarded headers by the rest of their names. Several of one name count as one list."""
    joined: dict[str, list[str]] = {}
    for name, value in headers:
        if name.startswith(b"x-forwarded-"):
            rest = name.removeprefix(b"x-forwarded-").decode("latin-1")
            joined.setdefault(rest, []).append(value.decode("latin-1"))
    return ((name, ",".join(values)) for name, values in joined.items())


def _is_forwarded(name: bytes) -> bool:
    return name.startswith(b"x-forwarded-") or name in _FORWARDED


def _last(value: str) -> str:
    """The last of a list, which the nearest proxy wrote."""
    return value.rpartition(",")[2].strip()


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an address, which may have a port; an IPv4 address in IPv6 form is the IPv4 address."""
    bare = text.strip()
    if bare.startswith("["):
        bare = bare[1:].partition("]")[0]
    elif bare.count(":") == 1:
        bare = bare.partition(":")[0]
    try:
        found = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
