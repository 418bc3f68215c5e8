"""Limits for images (and, derived from these, for videos) from outside, and the download of one file from an untrusted host.

In: a URL and `ImageLimits`. Out: bytes. The host name is resolved once, all of its addresses must be public, and the
connection goes to an address that was checked, so that a name whose address changes in between (DNS rebinding) is no
danger. Every redirect is checked like the first URL. One deadline holds for everything, down to the last byte. Proxies
of the environment are not used, since they would resolve the name. Content types are ignored: io.py decodes the bytes.
"""

from __future__ import annotations

import io
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llava.errors import InputError
from llava.images.addresses import is_public_address

if TYPE_CHECKING:
    import http.client

    from _typeshed import WriteableBuffer

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 64 * 1024


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost. The defaults suit a program for its own user and a public server alike."""

    max_bytes: int = 50 * 2**20  # of the file, on disk, in a URL or downloaded
    max_pixels: int = 89_478_485  # width x height, checked before decoding; from here on Pillow warns
    timeout_s: float = 20.0  # for a whole download: name lookup, redirects and the last byte included
    max_redirects: int = 5
    allow_private_hosts: bool = False  # download from this machine and its own network too

    # What messages call the thing.
    what: ClassVar[str] = "image"
    an: ClassVar[str] = "an image"
    opened: ClassVar[str] = "a Pillow image"

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "timeout_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"the {self.what} limit {name} is {getattr(self, name)!r}; it must be above 0.")
        if self.max_redirects < 0:
            raise InputError(f"the {self.what} limit max_redirects is {self.max_redirects!r}; it must be 0 or more.")


DEFAULT_LIMITS = ImageLimits()


def too_large(name: str, size: int | None, limits: ImageLimits) -> InputError:
    """The error for a file of more bytes than allowed; `size` is None where it is not known."""
    found = f"has {size:,} bytes" if size else "goes on"
    return InputError(f"{name} {found}, and at most {limits.max_bytes:,} bytes are allowed.")


class _DeadlineError(Exception):
    """The time for this download is over."""


@dataclass(frozen=True)
class DownloadTarget:
    """One checked URL: the first one, or that of a redirect."""

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
    """Download the content of an http or https URL.

    Raises:
        InputError: which URL of a chain of redirects failed, and why.
    """
    import http.client  # with ssl 25 ms, which programs without downloads save
    import ssl

    deadline = time.monotonic() + limits.timeout_s
    for _ in range(limits.max_redirects + 1):
        target = parse(url)
        try:
            content, location = _visit(target, limits, deadline)
        except (_DeadlineError, TimeoutError):
            raise InputError(
                f"{target.name!r} did not send its {limits.what} within {limits.timeout_s:g} seconds."
            ) from None
        except ssl.SSLCertVerificationError as error:
            raise InputError(f"{target.name!r} has no valid certificate: {error.verify_message}.") from error
        except InputError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:  # a ValueError for chunks of negative size
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise InputError(f"{target.name!r} cannot be downloaded: {reason}.") from error
        if location is None:
            return content
        try:
            url = urllib.parse.urljoin(url, location)
        except ValueError:
            raise InputError(f"{target.name!r} redirects to something that is not a URL.") from None
    raise InputError(f"{public_name(url)!r} was reached after more than {limits.max_redirects} redirects; gave up.")


def parse(url: str) -> DownloadTarget:
    """Split a URL; refuse whatever two parsers could read as different hosts."""
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
        raise InputError(f"{name!r} holds a user name or password; download the file yourself and name the file.")
    try:
        host = host.encode("idna").decode("ascii") if not host.isascii() else host
    except UnicodeError:
        raise InputError(f"{name!r} names a host that cannot exist.") from None
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return DownloadTarget(parts.scheme, host, port or PORTS[parts.scheme], f"{path}?{query}" if query else path, name)


def public_name(url: str) -> str:
    """A URL as messages may show it: without user, password, query and fragment, and shortened."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        name = f"{parts.scheme}://{host}{parts.path}"
    except ValueError:
        name = url.split("?", 1)[0].split("#", 1)[0].rpartition("@")[2]
    return name if len(name) <= 200 else name[:200] + "..."


def _visit(target: DownloadTarget, limits: ImageLimits, deadline: float) -> tuple[bytes, str | None]:
    """Request one URL: its content, or the location that it redirects to."""
    import http.client
    import ssl

    connection = http.client.HTTPConnection(target.host, target.port)
    raw: socket.socket = _connect(target, limits, deadline)
    try:
        if target.scheme == "https":
            raw.settimeout(_left(deadline))
            # The certificate is checked for the name in the URL, though the connection went to an address.
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=target.host.rstrip("."))
        connection.sock = _TimedSocket(raw, deadline)  # type: ignore[assignment]
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        headers = {
            "Host": target.host_header,
            "User-Agent": "llava",
            "Accept": f"{limits.what}/*",
            "Connection": "close",
        }
        for key, value in {**headers, "Accept-Encoding": "identity"}.items():
            connection.putheader(key, value)
        connection.endheaders()
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in REDIRECTS and location:
            return b"", location
        if response.status != 200:
            raise InputError(f"{target.name!r} answered with status {response.status}, not with {limits.an}.")
        return _body(response, target, limits), None
    finally:
        raw.close()


def _body(response: http.client.HTTPResponse, target: DownloadTarget, limits: ImageLimits) -> bytes:
    if response.length is not None and response.length > limits.max_bytes:
        raise too_large(repr(target.name), response.length, limits)
    content = bytearray()
    while chunk := response.read(CHUNK):
        content += chunk
        if len(content) > limits.max_bytes:
            raise too_large(repr(target.name), None, limits)
    if response.length:  # bytes that the header announced and that did not come
        raise InputError(f"{target.name!r} ended {response.length:,} bytes early; try again.")
    return bytes(content)


def _connect(target: DownloadTarget, limits: ImageLimits, deadline: float) -> socket.socket:
    """Connect to the first checked address that answers."""
    addresses = _resolve(target, deadline)
    for *_, address in addresses:
        if not limits.allow_private_hosts and not is_public_address(str(address[0])):
            raise InputError(
                f"{target.name!r} points inside this machine's own network, and {limits.what}s are not downloaded from there."
            )
    failure: OSError = OSError("no address")
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        attempt = socket.socket(family, kind, protocol)
        try:
            attempt.settimeout(_left(deadline) / (len(addresses) - tried))  # a silent address leaves time for the next
            attempt.connect(address)
        except OSError as error:
            attempt.close()
            failure = error
        except _DeadlineError:
            attempt.close()
            raise
        else:
            return attempt
    raise failure


def _resolve(target: DownloadTarget, deadline: float) -> Sequence[tuple[Any, ...]]:
    """Look a name up, as `getaddrinfo` does, in a thread, since the system's resolver takes no timeout."""
    answers: queue.SimpleQueue[Sequence[tuple[Any, ...]] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=look_up, daemon=True, name="llava-resolve").start()
    try:
        answer = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise _DeadlineError from None
    if isinstance(answer, Exception):
        raise InputError(f"{target.name!r} names a host that cannot be found: {target.host}.") from answer
    return answer


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise _DeadlineError
    return left


class _TimedSocket:
    """What http.client needs of a socket, with one deadline for all reads and writes.

    A plain socket timeout starts again with every byte that comes in.
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

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)
