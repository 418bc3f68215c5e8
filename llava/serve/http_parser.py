"""The fast HTTP parser, where it is installed, with the limits of the slow one.

In: uvicorn's protocol over httptools. Out: the same, which like h11 keeps no more than MAX_HEAD_BYTES of a head, of trailers or
of chunk sizes that do not end, wants one Host and no transfer coding but chunked, ignores trailers, reads the body of a
request that offers another protocol, and never answers garbage before the request that came ahead of it.
"""

from __future__ import annotations

from typing import Any

MAX_HEAD_BYTES = 16 * 1024  # of what is not complete, as with h11
MAX_PIPELINED = 64  # requests of one connection that wait for an earlier answer


def http_protocol() -> Any:
    """What uvicorn is to parse HTTP with."""
    try:
        import httptools
    except ImportError:
        return "h11"
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class CarefulHttpTools(HttpToolsProtocol):
        _num_useless = 0  # bytes since the last that were of use
        _was_useful = False
        _in_head = False
        _in_body = False
        _is_refused = False

        def data_received(self, data: bytes) -> None:
            if self._is_refused:
                return
            self._was_useful = False
            self._unset_keepalive_if_required()
            try:
                self._feed(data)
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            self._num_useless = 0 if self._was_useful else self._num_useless + len(data)
            if self._num_useless > MAX_HEAD_BYTES:
                self.send_400_response("The head of this HTTP request is too long.")

        def _feed(self, data: bytes) -> None:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
                    return
                # The parser believes that another protocol follows, and would lose the body: without that header it reads on.
                lines = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
                version = self.parser.get_http_version().encode()
                head = b"%s %s HTTP/%s\r\n%s\r\n" % (self.parser.get_method(), self.url, version, b"".join(lines))
                self.parser = httptools.HttpRequestParser(self)
                self._feed(head + data[upgrade.args[0] :])

        def send_400_response(self, msg: str) -> None:
            self._is_refused = True
            cycle = self.cycle
            is_free = cycle is None or cycle.response_complete
            is_asking = self._in_body and not self.pipeline and not cycle.response_started
            if is_free or is_asking:
                super().send_400_response(msg)
            else:  # in the midst of another answer it would be taken for a part of that
                self.transport.close()

        def on_message_begin(self) -> None:
            self._in_head = True
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._in_head:  # later ones are trailers, which nobody has checked
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_head, self._was_useful = False, True
            hosts = [value for name, value in self.headers if name == b"host"]
            codings = [value for name, value in self.headers if name == b"transfer-encoding"]
            if len(hosts) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
                raise ValueError("a request has one Host")
            if codings and [coding.lower() for coding in codings] != [b"chunked"]:
                raise ValueError("the only transfer coding is chunked")
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            if len(self.pipeline) >= MAX_PIPELINED:
                raise ValueError("too many requests that nobody waits for")
            if not self.parser.should_upgrade() or self._should_upgrade():
                super().on_headers_complete()
                self._in_body = True

        def on_body(self, body: bytes) -> None:
            self._was_useful = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._was_useful = True
            if self._in_body:
                super().on_message_complete()
            self._in_body = False

    return CarefulHttpTools
