"""Download one file from a stranger's address without being led astray. In: a URL and limits. Out: bytes.

The name is looked up once, every address it has must be public, and the connection goes to the address that was
checked, so a name that changes its address in between (DNS rebinding) gains nothing. Redirects start over. One clock
runs for all of it, down to the last byte. Proxies of the environment are not used, for they would do the looking up.
What the bytes are is for the caller to find out by decoding; headers are not believed. The caller is io.py.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from dataclasses import dataclass
from typing import Any

from llava.errors import InputError
from llava.images.image_limits import ImageLimits, too_large

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 64 * 1024
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
V4_TRANSLATED = ipaddress.IPv6Network("::ffff:0:0:0/96")
SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")


class _OutOfTimeError(Exception):
    """The clock of this download has run out."""


@dataclass(frozen=True)
class Target:
    """Where one hop goes, taken apart and found well-formed."""

    scheme: str
    host: str
    port: int
    path: str  # with the query
    name: str  # for messages: no user, no password, no query

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def fetch(url: str, limits: ImageLimits) -> bytes:
    """The content at an http or https URL, or an `InputError` that says which hop failed and why."""
    deadline = time.monotonic() + limits.timeout_s
    for _ in range(limits.max_redirects + 1):
        target = parse(url)
        try:
            content, location = _visit(target, limits, deadline)
        except (_OutOfTimeError, TimeoutError):
            raise InputError(f"{target.name!r} did not send its image within {limits.timeout_s:g} seconds.") from None
        except ssl.SSLCertVerificationError as error:
            raise InputError(f"{target.name!r} has no valid certificate: {error.verify_message}.") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise InputError(f"{target.name!r} cannot be downloaded: {reason}.") from error
        if location is None:
            return content
        try:
            url = urllib.parse.urljoin(url, location)
        except ValueError:
            raise InputError(f"{target.name!r} redirects to something that is not a URL.") from None
    raise InputError(f"{public_name(url)!r} was reached after more than {limits.max_redirects} redirects; gave up.")


def parse(url: str) -> Target:
    """Take a URL apart; whatever would let two readers disagree about its host is refused."""
    name = public_name(url)
    if any(ord(character) <= 32 or ord(character) == 127 for character in url) or "\\" in url:
        raise InputError(f"{name!r} is not a URL: it holds a space, a backslash or a control character.")
    try:
        parts = urllib.parse.urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise InputError(f"{name!r} is not a URL: {error}.") from None
    if parts.scheme not in PORTS:
        raise InputError(f"{name!r} is not an http or https address, and no other is downloaded.")
    if not host or "%" in host:
        raise InputError(f"{name!r} names no host.")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"{name!r} holds a user name or password; download the image yourself and name the file.")
    try:
        host = host.encode("idna").decode("ascii") if not host.isascii() else host
    except UnicodeError:
        raise InputError(f"{name!r} names a host that cannot exist.") from None
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return Target(parts.scheme, host, port or PORTS[parts.scheme], f"{path}?{query}" if query else path, name)


def public_name(url: str) -> str:
    """A URL as messages may show it: no user, password, query or fragment, and not endless."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        name = f"{parts.scheme}://{host}{parts.path}"
    except ValueError:
        name = url.split("?", 1)[0].split("#", 1)[0].rpartition("@")[2]
    return name if len(name) <= 200 else name[:200] + "..."


def is_public_address(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and any(ip in network for network in (NAT64, V4_COMPATIBLE, V4_TRANSLATED)):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(str(inner))
        if ip in SITE_LOCAL:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _visit(target: Target, limits: ImageLimits, deadline: float) -> tuple[bytes, str | None]:
    """One hop: the content, or else where it redirects to."""
    connection = http.client.HTTPConnection(target.host, target.port)
    raw = _connect(target, limits, deadline)
    try:
        if target.scheme == "https":
            raw.settimeout(_left(deadline))
            # The certificate is checked for the name in the URL, though the connection went to an address.
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=target.host.rstrip("."))
        connection.sock = _TimedSocket(raw, deadline)  # type: ignore[assignment]
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        headers = {"Host": target.host_header, "User-Agent": "llava", "Accept": "image/*", "Connection": "close"}
        for key, value in {**headers, "Accept-Encoding": "identity"}.items():
            connection.putheader(key, value)
        connection.endheaders()
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in REDIRECTS and location:
            return b"", location
        if response.status != 200:
            raise InputError(f"{target.name!r} answered with status {response.status}, not with an image.")
        return _body(response, target, limits), None
    finally:
        raw.close()


def _body(response: http.client.HTTPResponse, target: Target, limits: ImageLimits) -> bytes:

    if response.length is not None and response.length > limits.max_bytes:
        raise too_large(repr(target.name), response.length, limits)
    content = bytearray()
    while chunk := response.read(CHUNK):
        content += chunk
        if len(content) > limits.max_bytes:
            raise too_large(repr(target.name), None, limits)
    if response.length:  # what the header promised and the body did not bring
        raise InputError(f"{target.name!r} ended {response.length:,} bytes early; try again.")
    return bytes(content)


def _connect(target: Target, limits: ImageLimits, deadline: float) -> socket.socket:
    """A connection to the first checked address that answers."""
    addresses = _resolve(target, deadline)
    for address in addresses:
        if not limits.allow_private_hosts and not is_public_address(address[4][0]):
            raise InputError(
                f"{target.name!r} points inside this machine's own network, and images are not downloaded from there."
            )
    failure: OSError = OSError("no address")
    for tried, (family, kind, protocol, _, place) in enumerate(addresses):
        attempt = socket.socket(family, kind, protocol)
        try:
            attempt.settimeout(_left(deadline) / (len(addresses) - tried))  # a silent address leaves time for the next
            attempt.connect(place)
        except OSError as error:
            attempt.close()
            failure = error
        except _OutOfTimeError:
            attempt.close()
            raise
        else:
            return attempt
    raise failure


def _resolve(target: Target, deadline: float) -> list[Any]:
    """Look a name up, in a thread because the system's resolver knows no clock."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=look_up, daemon=True, name="llava-resolve").start()
    try:
        answer = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise _OutOfTimeError from None
    if isinstance(answer, Exception):
        raise InputError(f"{target.name!r} names a host that cannot be found: {target.host}.") from answer
    return list(answer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _OutOfTimeError
    return left


class _TimedSocket:
    """What http.client needs of a socket, with every read and write cut off at one common time.

    A plain socket timeout starts again with every byte that drips in; this one does not.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_left(self._deadline))
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._deadline))

    def close(self) -> None:
        """Left to the owner of the socket: http.client closes early, while the body is still to be read."""


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)
