"""A server as browsers and proxies reach it: pages of other sites, a prefix, forwarded headers, a unix socket, request ids."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from serve_kit import ROOT, running, wait_until
from starlette.responses import StreamingResponse

from llava.errors import InputError
from llava.serve.apis import SCHEMAS
from llava.serve.http.app import make_app
from llava.serve.http.cors import CrossOrigin, is_same_site
from llava.serve.http.errors import ApiError
from llava.serve.http.forwarded import TrustedProxies, as_sent, checked_prefix, route_path
from llava.serve.http.metrics import Metrics
from llava.serve.http.middleware import AccessPolicy, ApiKeys
from llava.serve.http.server import bind_unix

NGINX = shutil.which("nginx")
FRIEND = "https://friend.example"
STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"


def small_app(policy: AccessPolicy) -> Any:
    """A server without a model: what its client was, an answer in parts, and an error."""
    router = APIRouter()

    @router.post("/seen")
    async def seen(request: Request) -> dict[str, Any]:
        """What a route sees of a request."""
        headers = sorted(name for name in request.headers if "forwarded" in name)
        return {
            "client": request.client.host if request.client else None,
            "base": str(request.base_url),
            "url": str(request.url),
            "forwarded": headers,
        }

    @router.post("/v1/chat/completions")
    async def parts() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for number in range(3):
                yield b"data: %d\n\n" % number
                await asyncio.sleep(0.2)

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @router.post("/fails")
    async def fails() -> None:
        raise ApiError(400, "the sentence\nof the error", code="some_kind")

    @router.post("/breaks")
    async def breaks() -> None:
        raise RuntimeError("a secret of the server")

    async def well() -> None:
        return None

    app, checked = make_app(
        [router], title="small", metrics=Metrics(), access=policy, liveness=well, readiness=well, schemas=SCHEMAS
    )
    mounted = FastAPI()

    @mounted.get("/")
    async def page(request: Request) -> str:
        return str(request.url_for("page"))

    app.mount("/page", mounted)
    return checked


@contextlib.contextmanager
def served(**policy: Any) -> Iterator[str]:
    with running(small_app(AccessPolicy(**policy))) as address:
        yield address


# Pages of other sites


def test_every_response_tells_a_browser_who_may_read_it() -> None:
    access = {"keys": ApiKeys(["right-key"]), "cross_origin": CrossOrigin((FRIEND,)), "max_body_bytes": 100}
    with served(**access) as address:
        asked = {"origin": FRIEND, "access-control-request-method": "POST", "access-control-request-headers": STAINLESS}
        preflight = httpx.options(f"{address}/fails", headers=asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-headers"] == STAINLESS
        assert "POST" in preflight.headers["access-control-allow-methods"]
        key = {"authorization": "Bearer right-key"}
        for path, headers, content, status in (
            ("/fails", {}, b"", 401),
            ("/fails", key, b"", 400),
            ("/fails", key, b"x" * 101, 413),
            ("/breaks", key, b"", 500),
            ("/nothing", key, b"", 404),
            ("/seen", key, b"", 200),
        ):
            reply = httpx.post(f"{address}{path}", headers={"origin": FRIEND, **headers}, content=content)
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == FRIEND
            assert reply.headers.get_list("vary") == ["Origin"]
            assert "secret" not in reply.text
        for headers in (asked, {}):
            refused = httpx.options(f"{address}/fails", headers=headers | {"origin": "https://evil.example"})
            assert refused.status_code == 403
            assert "--allow-origin https://evil.example" in refused.json()["error"]["message"]
            assert "access-control-allow-origin" not in refused.headers
    with served(cross_origin=CrossOrigin(("*",))) as address:
        assert (
            httpx.post(f"{address}/seen", headers={"origin": "null"}).headers["access-control-allow-origin"] == "null"
        )


def test_which_pages_are_the_server_s_own() -> None:
    for origin, host in (
        ("https://a.example", "a.example"),
        ("http://a.example:8000", "A.EXAMPLE:8000"),
        ("https://a.example", "a.example:443"),
        ("http://[::1]:80", "[::1]"),
    ):
        assert is_same_site(origin, host)
    for origin, host in (
        ("http://a.example:8000", "a.example"),
        ("http://localhost:3000", "localhost:8000"),
        ("https://a.example.evil", "a.example"),
        ("https://evil@a.example.evil", "a.example"),
        ("null", "null"),
        ("https://a.example:x", "a.example"),
        ("", ""),
    ):
        assert not is_same_site(origin, host)
    for wrong in ("a.example", "https://a.example/", "https://a.example/x", "https://"):
        with pytest.raises(InputError, match="--allow-origin"):
            CrossOrigin((wrong,))


def test_a_refused_name_says_which_flag_allows_it() -> None:
    with served(hosts=("127.0.0.1",)) as address:
        refused = httpx.post(f"{address}/seen", headers={"host": "host.docker.internal:8000"})
        assert refused.status_code == 421
        assert "--allow-host host.docker.internal" in refused.json()["error"]["message"]
        long = httpx.post(f"{address}/seen", headers={"host": "x" * 5000})
        assert len(long.text) < 700


# Proxies


@contextlib.contextmanager
def proxy(target: str, prefix: str, *, removes: bool, **added: str) -> Iterator[str]:
    """A reverse proxy that treats requests as docs/serving.md sets nginx up to: a location, its prefix removed or not."""
    app = FastAPI()
    client = httpx.AsyncClient(trust_env=False)

    @app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
    async def forward(request: Request, path: str) -> Response:
        path = f"/{path}"
        assert path.startswith(f"{prefix}/")
        before = request.headers.get("x-forwarded-for")
        own = request.client.host if request.client else ""
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        headers |= {
            "host": request.headers["host"],
            "x-forwarded-host": request.headers["host"],
            "x-forwarded-proto": "https",
            "x-forwarded-for": f"{before}, {own}" if before else own,
        }
        url = target + (path.removeprefix(prefix) if removes else path)
        built = client.build_request(request.method, url, headers=headers | added, content=await request.body())
        reply = await client.send(built, stream=True)
        return StreamingResponse(reply.aiter_raw(), reply.status_code, dict(reply.headers))

    with running(app) as address:
        yield address


@pytest.mark.parametrize("removes", [True, False])
@pytest.mark.parametrize("says_prefix", [True, False])
def test_behind_a_proxy_under_a_prefix(removes: bool, says_prefix: bool) -> None:
    added = {"x-forwarded-prefix": "/llava"} if says_prefix else {}
    policy: dict[str, Any] = {
        "hosts": ("llava.example",),
        "proxies": TrustedProxies.given(["127.0.0.0/8"]),
        "root_path": "" if says_prefix else "/llava",
    }
    with served(**policy) as own, proxy(own, "/llava", removes=removes, **added) as address:
        own_page = {"host": "llava.example", "origin": "https://llava.example", "x-forwarded-for": "6.6.6.6"}
        seen = httpx.post(f"{address}/llava/seen", headers=own_page)
        assert seen.status_code == 200, seen.text
        assert seen.json() == {
            "client": "6.6.6.6",  # the proxy is trusted, and so is the address that stands before it
            "base": "https://llava.example/llava/",
            "url": "https://llava.example/llava/seen",
            "forwarded": [],
        }
        page = httpx.get(f"{address}/llava/page/", headers={"host": "llava.example"})
        assert page.json() == "https://llava.example/llava/page/"
        moved = httpx.get(f"{address}/llava/page", headers={"host": "llava.example"})
        assert moved.headers["location"] == "https://llava.example/llava/page/"
        other = httpx.post(f"{address}/llava/seen", headers={"host": "llava.example", "origin": "https://evil.example"})
        assert other.status_code == 403
        missing = httpx.post(f"{address}/llava/v1/nothing", headers={"host": "llava.example"})
        assert "'/v1/nothing'" in missing.json()["error"]["message"]


@pytest.mark.skipif(NGINX is None, reason="no nginx is installed (Debian: apt-get install nginx-light)")
def test_behind_nginx_as_documented(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8").split("```nginx\n")[1].split("```")[0]
    policy: dict[str, Any] = {"hosts": ("llava.example.org",), "proxies": TrustedProxies.given(["127.0.0.1"])}
    with served(**policy) as own:
        text = text.replace("listen 80;", f"listen 127.0.0.1:{port};").replace("http://127.0.0.1:8000", own)
        places = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
        config = tmp_path / "nginx.conf"
        config.write_text(
            f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/log; events {{}}\n"
            f"http {{ access_log off; client_body_temp_path {tmp_path}/body; {places}\n{text}}}\n"
        )
        nginx = subprocess.Popen([str(NGINX), "-c", str(config)], stderr=subprocess.DEVNULL)
        address, host = f"http://127.0.0.1:{port}", {"host": "llava.example.org"}
        try:
            wait_until(lambda: (tmp_path / "pid").exists() and is_open(port))
            seen = httpx.post(f"{address}/llava/seen", headers=host | {"origin": "https://llava.example.org"})
            assert seen.status_code == 200, seen.text
            assert seen.json()["base"] == "http://llava.example.org/llava/"
            page = httpx.get(f"{address}/llava/page/", headers=host)
            assert page.json() == "http://llava.example.org/llava/page/"
            with httpx.stream("POST", f"{address}/llava/v1/chat/completions", headers=host) as reply:
                arrived = [time.monotonic() for _ in reply.iter_raw()]
            assert len(arrived) >= 3  # parts come as they are made
            refused = httpx.post(f"{address}/llava/seen", headers={"host": "evil.example"})
            assert "--allow-host evil.example" in refused.json()["error"]["message"]
        finally:
            nginx.terminate()
            nginx.wait(30)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_forwarded_headers_of_others_are_dropped() -> None:
    forged = {
        "x-forwarded-for": "1.2.3.4",
        "x-forwarded-host": "allowed",
        "x-forwarded-prefix": "/x",
        "forwarded": "for=1",
    }
    for proxies in ([], ["10.0.0.0/8", "unix"]):
        with served(hosts=("127.0.0.1",), proxies=TrustedProxies.given(proxies)) as address:
            seen = httpx.post(f"{address}/seen", headers=forged).json()
        assert (seen["client"], seen["base"], seen["forwarded"]) == ("127.0.0.1", f"{address}/", [])


def scope_of(path: str = "/v1/models", client: Any = ("10.0.0.1", 5), **headers: str) -> Any:
    pairs = [
        (b"host", b"inner:80"),
        *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()),
    ]
    return {
        "type": "http",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "client": client,
        "headers": pairs,
    }


def test_whom_a_chain_of_proxies_names() -> None:
    proxies = TrustedProxies.given(["10.0.0.0/8", "::1"])
    for chain, client in (
        ("6.6.6.6", "6.6.6.6"),
        ("7.7.7.7, 6.6.6.6, 10.1.1.1", "6.6.6.6"),  # what stands before an untrusted address is its own word
        ("6.6.6.6:4711", "6.6.6.6"),
        ("[2001:db8::1]:80, ::1", "2001:db8::1"),
        ("::ffff:6.6.6.6", "6.6.6.6"),
        ("nonsense", "10.0.0.1"),
        ("nonsense, 10.9.9.9", "10.9.9.9"),
        ("", "10.0.0.1"),
    ):
        assert as_sent(scope_of(x_forwarded_for=chain), proxies, "")["client"][0] == client
    hosts = {
        ("a.example", ""): b"a.example",
        ("x, a.example", "8443"): b"a.example:8443",
        ("a.example:1", "8443"): b"a.example:1",
        ("[::1]", "8443"): b"[::1]:8443",
        ("a b", ""): b"inner:80",
        ("a/b", ""): b"inner:80",
    }
    for (host, port), expected in hosts.items():
        seen = as_sent(scope_of(x_forwarded_host=host, x_forwarded_port=port), proxies, "")
        assert [value for name, value in seen["headers"] if name == b"host"] == [expected]
    assert as_sent(scope_of(x_forwarded_proto="gopher"), proxies, "")["scheme"] == "http"
    assert "root_path" not in as_sent(scope_of(x_forwarded_prefix="//evil.example"), proxies, "")
    unix = TrustedProxies.given(["unix"])
    assert as_sent(scope_of(client=None, x_forwarded_for="6.6.6.6"), unix, "")["client"] == ("6.6.6.6", 0)
    with pytest.raises(InputError, match="--trusted-proxy"):
        TrustedProxies.given(["nginx"])


@given(
    st.sampled_from(["", "/llava", "/a/b"]),
    st.lists(st.text("ab./%", min_size=1, max_size=4), max_size=3).map(lambda parts: "/" + "/".join(parts)),
)
def test_the_path_below_a_prefix_is_the_path_without_it(prefix: str, path: str) -> None:
    """Whether a proxy removes the prefix or not, unless the path itself begins with it."""
    none = TrustedProxies()
    if (path + "/").startswith(prefix + "/") and prefix:
        return
    for sent in (path, prefix + path):
        assert route_path(as_sent(scope_of(sent), none, prefix)) == path


def test_prefixes() -> None:
    assert [checked_prefix(text) for text in ("", "/", "/llava/", "/a/b")] == ["", "", "/llava", "/a/b"]
    for wrong in ("llava", "//llava", "/a//b", "/a b", "/..", "http://a", "/a?b"):
        with pytest.raises(InputError, match="--root-path"):
            checked_prefix(wrong)


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "own.sock"
    path.touch()
    with pytest.raises(InputError, match="own"):
        bind_unix(path)  # another file is not replaced
    path.unlink()
    for _ in range(2):  # the second time over the socket that the first left, as a killed server does
        (listener,) = bind_unix(path)
        assert path.stat().st_mode & 0o777 == 0o660
        policy = AccessPolicy(hosts=("localhost", "llava.example"), proxies=TrustedProxies.given(["unix"]))
        with running(small_app(policy), listener):
            with pytest.raises(InputError, match="another program listens"):
                bind_unix(path)
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
                assert client.post("http://localhost/seen").json()["client"] is None
                forwarded = {
                    "x-forwarded-for": "6.6.6.6",
                    "x-forwarded-host": "llava.example",
                    "x-forwarded-proto": "https",
                }
                seen = client.post("http://localhost/seen", headers=forwarded).json()
                assert (seen["client"], seen["base"]) == ("6.6.6.6", "https://llava.example/")


def test_head_is_get_without_the_body() -> None:
    with served() as address:
        for path in ("/health", "/docs", "/openapi.json"):
            whole, head = httpx.get(f"{address}{path}"), httpx.head(f"{address}{path}")
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(whole.content))
        assert httpx.head(f"{address}/seen").status_code == 405


# Request ids and reasons


def test_a_request_is_known_by_its_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llava.serve")
    with served() as address:
        own = httpx.post(f"{address}/fails", headers={"x-request-id": "trace-17"})
        assert own.headers["x-request-id"] == own.json()["request_id"] == "trace-17"
        made = [httpx.post(f"{address}/fails").headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        for wrong in ("with space", "x" * 200, "tab\tx", ""):
            reply = httpx.post(f"{address}/fails", headers={"x-request-id": wrong})
            assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
        assert httpx.get(f"{address}/v1/messages").headers["request-id"]
        httpx.post(f"{address}/nothing/%1b[31m{'y' * 400}")
        metrics = httpx.get(f"{address}/metrics").text
    lines = [record.getMessage() for record in caplog.records if record.name == "llava.serve"]
    assert sum("POST /fails 400" in line and line.endswith(": the sentence of the error") for line in lines) == 7
    assert all("\x1b" not in line and "\n" not in line and len(line) < 500 for line in lines)
    families = {family.name: family for family in text_string_to_metric_families(metrics)}
    counts = {
        sample.labels["kind"]: sample.value for sample in families["llava_errors"].samples if "kind" in sample.labels
    }
    assert counts["some_kind"] == 7
    assert counts["unknown_url"] == 2


def test_log_lines_have_the_id_of_their_request() -> None:
    from llava.serve.http.request_record import RequestIdFilter, begin_record
    from llava.serve.process import LOG_FORMAT

    record = logging.LogRecord("llava.serve", logging.INFO, __file__, 1, "a line", (), None)
    formatter = logging.Formatter(LOG_FORMAT)

    async def inside() -> str:
        begin_record("trace-18")
        RequestIdFilter().filter(record)
        return formatter.format(record)

    assert asyncio.run(inside()).endswith("llava.serve: a line [trace-18]")
    RequestIdFilter().filter(record)
    assert formatter.format(record).endswith("llava.serve: a line")


# Documentation without other sites


def test_the_documentation_needs_no_other_site() -> None:
    from llava.serve.http.docs_page import render_docs

    with served() as address:
        page = httpx.get(f"{address}/docs")
        assert page.headers["content-type"].startswith("text/html")
        document = httpx.get(f"{address}/openapi.json").json()
    assert all(f"<code>{path}</code>" in page.text for path in document["paths"])
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page.text)
    assert "<script" not in page.text
    evil = {"title": "<script>x</script>", "version": "1"}
    assert "<script>x" not in render_docs({"info": evil, "paths": {}})
