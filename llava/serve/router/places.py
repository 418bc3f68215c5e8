"""Where workers may be: a controller must not be led to send requests to any address that somebody names.

In: the URL that a registration names, and the address that it came from. Out: the URL to connect to, with a checked address in
the place of a name, or an `InputError`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from llava.errors import InputError, shortened
from llava.serve.http.connections import network_of

PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*/?", re.ASCII)
MAX_URL = 256  # characters
LOOKUP_S = 5.0

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker is: the URL to connect to, and the Host header that it expects."""

    url: str
    host_header: str


class WorkerPlaces:
    """The hosts, addresses and networks in which workers may be; without any, a worker is where it registers from."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self._hosts: set[str] = set()
        for place in allowed:
            try:
                self._networks.append(ipaddress.ip_network(place, strict=False))
            except ValueError:
                if not place or not all(part and part.replace("-", "").isalnum() for part in place.split(".")):
                    raise InputError(
                        f"--allow-worker is {place!r}; give a host, an address or a network, without scheme and port"
                    ) from None
                self._hosts.add(place.lower())

    async def check(self, url: str, peer: str | None) -> WorkerPlace:
        """Return where the worker of this URL is.

        Raises:
            InputError: The URL cannot be a worker's, or names a place in which none may be.
        """
        scheme, host, port, path = parse_worker_url(url)
        addresses = await _look_up(host, port)
        if host not in self._hosts:
            for address in addresses:
                if not self._is_allowed(address, peer):
                    raise InputError(
                        f"the worker {shortened(url)!r} is not at the address that registers it, {peer or 'a local socket'}; "
                        "where that is right, start the controller with --allow-worker"
                    )
        bracketed = f"[{host}]" if ":" in host else host
        if scheme == "https":  # whose certificate is for the name
            return WorkerPlace(url.rstrip("/"), f"{bracketed}:{port}")
        first = f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])
        return WorkerPlace(f"http://{first}:{port}{path}", f"{bracketed}:{port}")

    def _is_allowed(self, address: IPAddress, peer: str | None) -> bool:
        if self._networks or self._hosts:
            return any(address in network for network in self._networks)
        local = not peer or network_of(peer) == network_of("127.0.0.1")
        return (peer is not None and _same_host(address, peer)) or (local and _is_own(address))


def parse_worker_url(url: str) -> tuple[str, str, int, str]:
    """Return scheme, host, port and path of a worker's URL.

    Raises:
        InputError: It is not http or https with a host, and at most a port and a plain path.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        plain = (
            len(url) <= MAX_URL
            and url.isascii()
            and url.isprintable()
            and parts.scheme in ("http", "https")
            and parts.username is None
            and parts.password is None
            and PATH.fullmatch(parts.path) is not None
            and not any(character in url for character in "?#\\ %")
        )
    except ValueError:
        plain, host, port = False, None, None
    if not plain or not host or port == 0:
        raise InputError(
            f"worker_name is {shortened(url)!r}; it must be the worker's http address, as http://10.0.0.2:21002"
        )
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")


async def _look_up(host: str, port: int) -> list[IPAddress]:
    try:
        async with asyncio.timeout(LOOKUP_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError) as error:
        raise InputError(f"the worker's host {host!r} cannot be found") from error
    addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]
    # A server on localhost may listen on one of them only.
    return sorted(dict.fromkeys(addresses), key=lambda address: address.version)


def _same_host(address: IPAddress, peer: str) -> bool:
    other = ipaddress.ip_address(peer.partition("%")[0])
    mapped = getattr(other, "ipv4_mapped", None)
    return address == (mapped or other) or (address.is_loopback and other.is_loopback)


def _is_own(address: IPAddress) -> bool:
    """Whether it is an address of this machine, to which a socket can be bound."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return not address.is_unspecified
