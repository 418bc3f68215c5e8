"""Compressed bodies of requests, decoded as they come, within the limit of a plain body.

In: the Content-Encoding header, and pieces of a body. Out: pieces of the plain body. A few kilobytes of gzip can hold
gigabytes, so no more is decoded than the limit allows.
"""

from __future__ import annotations

import zlib

from llava.errors import InputError

KNOWN_ENCODINGS = ("gzip", "x-gzip", "deflate")
PLAIN_ENCODINGS = ("", "identity")


class BodyTooLargeError(InputError):
    """The plain body is larger than allowed."""


class BodyDecoder:
    """Decodes one body of `KNOWN_ENCODINGS`, of at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS + 32)  # the header says whether it is gzip or zlib

    def decode(self, data: bytes, *, is_last: bool) -> bytes:
        """Decode the next piece.

        Raises:
            BodyTooLargeError: there is more than allowed.
            InputError: it is no compressed body, or ends before its end.
        """
        try:
            plain = self._inflate.decompress(data, self._left + 1)
        except zlib.error as error:
            raise InputError(f"the body is not compressed as its Content-Encoding says: {error}") from None
        self._left -= len(plain)
        if self._left < 0:
            raise BodyTooLargeError("the decompressed body is larger than this server takes")
        if is_last and not self._inflate.eof and (data or plain):
            raise InputError("the compressed body ends before its end")
        return plain
