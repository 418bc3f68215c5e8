"""Downloads: from honest servers, and from those that are slow, endless, lying, or point back into this network.

Servers are real ones on the loopback address; nothing leaves the machine.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from image_kit import HERE, PNG, fails, gradient

from llava.images import download as fetch
from llava.images.download import ImageLimits
from llava.images.io import load_image


class Server:
    """A web server of this test: paths to functions that answer."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.seen.append((self.path, dict(self.headers)))
                with contextlib.suppress(OSError):  # the client had enough
                    outer.answers[self.path.partition("?")[0]](self)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.port = self.httpd.server_address[1]
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        self.answers[path] = lambda handler: reply(handler, b"", status, Location=to)


def reply(
    handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, length: int | None = -1, **headers: str
) -> None:
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(len(body) if length < 0 else length))
    for key, value in headers.items():
        handler.send_header(key.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.httpd.shutdown()
    running.httpd.server_close()


def test_download(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    server.answers["/a.png"] = lambda handler: reply(handler, PNG, Content_Type="text/html")  # headers are not believed
    server.answers["/stream"] = lambda handler: reply(handler, PNG, length=None)  # until the connection closes
    server.answers["/chunks"] = lambda handler: reply(
        handler,
        b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (PNG[:50], PNG[50:])) + b"0\r\n\r\n",
        length=None,
        Transfer_Encoding="chunked",
    )
    server.redirect("/moved", "b/../a.png?x=1", 307)
    server.redirect("/far", server.url("/moved"), 301)
    for path in ("/a.png", "/stream", "/chunks", "/moved", "/far", "/a.png?q=ä b".replace(" ", "+")):
        assert load_image(server.url(path), limits=HERE).tobytes() == gradient().tobytes()
    assert load_image(server.url("/a.png", "localhost").upper().replace("/A.PNG", "/a.png"), limits=HERE).size == (
        12,
        8,
    )
    path, headers = server.seen[0]
    assert (path, headers["Host"]) == ("/a.png", f"127.0.0.1:{server.port}")


def test_answers_that_are_no_image(server: Server) -> None:
    server.answers["/page"] = lambda handler: reply(handler, b"<html>hello</html>", Content_Type="image/png")
    server.answers["/gone"] = lambda handler: reply(handler, b"gone", 404)
    server.answers["/short"] = lambda handler: reply(handler, PNG[:60], length=len(PNG))
    server.answers["/empty"] = lambda handler: reply(handler, b"")
    server.answers["/noise"] = lambda handler: handler.wfile.write(b"\0\1\2 not http at all\r\n\r\n")
    server.answers["/hang-up"] = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    fails(server.url("/page?token=hush"), "/page", "not an image")
    fails(server.url("/gone"), "404")
    fails(server.url("/short"), "early")
    fails(server.url("/empty"), "empty")
    fails(server.url("/noise"), "cannot be downloaded")
    fails(server.url("/hang-up"), "cannot be downloaded")
    assert "hush" not in fails(server.url("/gone?token=hush#hush"), "404")


def test_too_large(server: Server) -> None:
    limits = ImageLimits(max_bytes=1000, allow_private_hosts=True, timeout_s=60)
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(65536))
            sent.append(65536)

    server.answers["/claims"] = lambda handler: reply(handler, b"", length=10**12)
    server.answers["/endless"] = endless
    fails(server.url("/claims"), "1,000,000,000,000 bytes", limits=limits)
    fails(server.url("/endless"), "1,000 bytes are allowed", limits=limits)
    assert sum(sent) < 50 * 2**20


@pytest.mark.parametrize("part", ["before", "header", "body", "chunk"])
def test_slow_servers(server: Server, part: str) -> None:
    """A byte now and then would keep a plain socket timeout happy for as long as the server likes."""
    stop = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        write = handler.wfile.write
        if part != "before":
            write(b"HTTP/1.1 200 OK\r\n")
        if part == "body":
            write(b"Content-Length: 100000\r\n\r\n")
        if part == "chunk":
            write(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(400):
            if stop.wait(0.05):
                return
            write({"before": b"", "header": b"X", "body": b"x", "chunk": b"1\r\nx\r\n"}[part])

    server.answers["/slow"] = drip
    fails(server.url("/slow"), "within 0.5 seconds", limits=ImageLimits(timeout_s=0.5, allow_private_hosts=True))
    stop.set()


def test_slow_name_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(60))
    fails("http://slow.example/a.png", "within 0.2 seconds", limits=ImageLimits(timeout_s=0.2))
    answered.set()


def test_redirects_end(server: Server) -> None:
    server.redirect("/loop", "/loop")
    server.redirect("/file", "file:///etc/passwd")
    server.redirect("/bad", "http://[broken")
    server.redirect("/login", f"http://me:hush@127.0.0.1:{server.port}/a.png")
    server.answers["/nowhere"] = lambda handler: reply(handler, b"", 302)
    fails(server.url("/loop"), "more than 5 redirects")
    assert len(server.seen) == 6
    fails(server.url("/file"), "not an http or https address")
    fails(server.url("/bad"), "not a URL")
    assert "hush" not in fails(server.url("/login"), "user name")
    fails(server.url("/nowhere"), "302")
    fails(server.url("/loop"), "more than 0 redirects", limits=ImageLimits(max_redirects=0, allow_private_hosts=True))


PRIVATE = [
    *("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "127.0.0.1."),
    *("0.0.0.0", "0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.2.1"),
    *("224.0.0.1", "255.255.255.255", "240.0.0.1", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[::127.0.0.1]", "[fe80::1]", "[fc00::1]", "[fec0::1]", "[ff02::1]", "[2001:db8::1]", "[64:ff9b::7f00:1]"),
    *("[2002:7f00:1::]", "[::ffff:0:127.0.0.1]", "[64:ff9b:1::1]", "①②⑦.0.0.1", "127。0。0。1"),
]


@pytest.mark.parametrize("host", PRIVATE)
def test_this_network_is_not_asked(server: Server, host: str) -> None:
    server.answers["/a.png"] = lambda handler: reply(handler, PNG)
    message = fails(server.url("/a.png", host), limits=ImageLimits(timeout_s=60))
    assert "own network" in message or "cannot be found" in message or "names a host" in message
    assert not server.seen


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8", "1.1.1.1"])
def test_public_addresses(address: str) -> None:
    assert fetch.is_public_address(address)


def test_redirect_into_this_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fetch.is_public_address
    monkeypatch.setattr(fetch, "is_public_address", lambda address: address == "127.0.0.1" or honest(address))
    server.answers["/a.png"] = lambda handler: reply(handler, PNG)
    server.redirect("/fine", "/a.png")
    limits = ImageLimits(timeout_s=60)
    assert load_image(server.url("/fine"), limits=limits).size == (12, 8)
    for target in ("http://169.254.169.254/latest/meta-data", "http://[::1]/", "http://10.0.0.1:8080/?key=hush"):
        server.redirect("/trap", target)
        assert "hush" not in fails(server.url("/trap"), "own network", limits=limits)


def test_name_that_changes_its_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one connected to: a second lookup, with another answer, never happens."""
    server.answers["/a.png"] = lambda handler: reply(handler, PNG)
    lookups, real = [], socket.getaddrinfo

    def look_up(host: str, port: int, **options: object) -> list:
        lookups.append(host)
        return real("127.0.0.1" if len(lookups) == 1 else "127.0.0.99", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert load_image(server.url("/a.png", "rebind.example"), limits=HERE).size == (12, 8)
    assert lookups == ["rebind.example"]
    assert server.seen[0][1]["Host"] == f"rebind.example:{server.port}"


def test_one_private_address_among_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "192.168.0.5")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
    fails("http://mixed.example/a.png", "own network", limits=ImageLimits(timeout_s=60))


def test_second_address_is_tried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/a.png"] = lambda handler: reply(handler, PNG)
    real = socket.getaddrinfo
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        closed = taken.getsockname()[1]
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda _, port, **options: real("127.0.0.1", closed, **options) + real("127.0.0.1", port, **options),
        )
        assert load_image(server.url("/a.png", "two.example"), limits=HERE).size == (12, 8)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a.png",
        "http://host:99999/a.png",
        "http://user:hush@host.example/a.png",
        "http://hush@host.example/a.png",
        "http://ho st.example/a.png",
        "http://host.example\\@127.0.0.1/a.png",
        "http://host.example/a\r\nX-Header: hush",
        "http://[::1%25eth0]/a.png",
        "http://[::1/a.png",
        "http://a..b.é/x",
        "https://" + "é" * 100 + ".example/",
    ],
)
def test_urls_that_are_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    message = fails(url)
    assert "hush@" not in message
    assert ":hush" not in message


def test_refused_and_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        fails(f"http://127.0.0.1:{taken.getsockname()[1]}/a.png", "refused")

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    fails("http://nobody.example/a.png", "cannot be found", "nobody.example")


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for "localhost" that signs itself, with its key in the same file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    subprocess.run([*command, *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    return both


def test_certificates_are_checked_by_name(server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    asked: list[str] = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    server.httpd.socket = context.wrap_socket(server.httpd.socket, server_side=True)
    server.answers["/a.png"] = lambda handler: reply(handler, PNG)
    url = server.url("/a.png", "localhost", "https")

    fails(url, "no valid certificate")  # nobody vouches for it
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert load_image(url, limits=HERE).tobytes() == gradient().tobytes()
    assert asked[-1] == "localhost"  # the name, though the connection went to the address
    fails(server.url("/a.png", "127.0.0.1", "https"), "no valid certificate")  # vouched for, but for another name
    fails(server.url("/a.png", "localhost", "http"), "cannot be downloaded")
