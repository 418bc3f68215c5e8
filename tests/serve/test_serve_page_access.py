"""What the page lets in: routes, uploads, events, logins; who sees whose files, and what is left when a visitor has gone."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from serve_kit import DEMO, running, wait_until
from starlette.routing import Mount

from llava.errors import InputError
from llava.images.download import ImageLimits
from llava.serve.backends.base import ServerBusyError
from llava.serve.http.cors import CrossOrigin
from llava.serve.http.keys import ApiKeys
from llava.serve.http.limits import ServeLimits
from llava.serve.http.memory_budget import MemoryBudget
from llava.serve.http.middleware import AccessPolicy
from llava.serve.web import middleware
from llava.serve.web.visitors import VisitorLimits, Visitors, plain_name

pytest.importorskip("gradio")
KEY = "a-key-of-the-tests"
NUM_INPUTS = 9
UPLOAD, JOIN, DATA, FILE = (f"/gradio_api/{name}" for name in ("upload", "queue/join", "queue/data", "file="))


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gradio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@contextlib.contextmanager
def page(
    keys: tuple[str, ...] = (), memory: MemoryBudget | None = None, **changes: Any
) -> Iterator[tuple[str, Visitors]]:
    """A page whose models do not answer, at an address; and its visitors."""
    from llava.serve.web.page import Page, mount

    access = AccessPolicy(keys=ApiKeys(keys), memory=memory or MemoryBudget())
    limits = ServeLimits(images=ImageLimits(max_bytes=300_000))
    embed = changes.pop("embed", False)
    app = mount(FastAPI(), Page.over("http://127.0.0.1:9", access=access, limits=limits), "/page", embed=embed)
    visitors = next(route for route in app.routes if isinstance(route, Mount)).app._visitors
    visitors.limits = VisitorLimits(max_file_bytes=300_000, **changes)
    with running(app) as address:
        yield f"{address}/page", visitors


@contextlib.contextmanager
def visit(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/").status_code in (200, 401)
        yield client


def upload(client: httpx.Client, data: bytes, name: str = "a.png") -> httpx.Response:
    return client.post(UPLOAD, files={"files": (name, data)})


def event(session: str, *data: object) -> dict[str, object]:
    """The first event of the page, which asks a question."""
    return {"data": [*data, *[None] * (NUM_INPUTS - len(data))], "fn_index": 0, "session_hash": session}


def file(path: str) -> dict[str, object]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_visitors_see_their_own_files_and_nobody_else_s(own_folder: Path) -> None:
    from llava.serve.web.page import EXAMPLES_FOLDER

    image = DEMO.read_bytes()
    with page() as (address, visitors), visit(address) as one, visit(address) as two:
        (path,) = upload(one, image).json()
        assert Path(path).is_relative_to(own_folder)
        assert (visitors.folder.stat().st_mode & 0o777) == 0o700
        assert one.get(FILE + path).content == image
        assert one.get(FILE + path).headers["content-type"] == "image/jpeg"
        assert two.get(FILE + path).status_code == 404
        assert two.post(JOIN, json=event("s2", {"text": "", "files": [file(path)]})).status_code == 403
        assert one.post(JOIN, json=event("s1", {"text": "", "files": [file(path)]})).status_code == 200
        assert two.get(DATA, params={"session_hash": "s1"}).status_code == 404
        assert two.post(JOIN, json=event("s1")).status_code == 400  # the page is the first visitor's
        for name in ("/etc/passwd", "http://127.0.0.1:9/x", f"{path}/../../x", str(own_folder), ""):
            assert one.get(FILE + name).status_code == 404
            assert one.post(JOIN, json=event("s1", [{"deep": [file(name)]}])).status_code == 403
        for name in ("a\0b", f"{EXAMPLES_FOLDER}/a\0b", f"{EXAMPLES_FOLDER}/../page.py", 7, None, {}):
            assert one.post(JOIN, json=event("s1", {"path": name})).status_code == 403
        (text,) = upload(one, b"<script>alert(1)</script>", "a.html").json()
        (drawing,) = upload(one, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "a.svg").json()
        assert [one.get(FILE + name).status_code for name in (text, drawing)] == [415, 415]
    assert list(own_folder.rglob("*")) == []


def test_only_routes_that_a_page_needs_reach_gradio() -> None:
    with page() as (address, _), visit(address) as client:
        for path in (
            "proxy=http://127.0.0.1:9/", "runs", "info", "openapi.json", "deep_link", "dev/reload", "stream/a/b/c/x.m3u8",
            "file/etc/passwd", "vibe-code/", "vibe-starter-queries/", "custom_component/a/b/c/d", "app_id", "token", "user",
        ):  # fmt: skip
            assert client.get(f"/gradio_api/{path}").status_code == 404, path
        for path in (
            "run/predict", "api/predict", "call/ask", "call/v2/ask", "component_server", "process_recording", "vibe-edit",
            "run-history/connect", "stream/x", "stream/x/close", "profiling/clear", "queue/data",
        ):  # fmt: skip
            assert client.post(f"/gradio_api/{path}", json=event("s")).status_code == 404, path
        for path in (
            "/login",
            "/logout",
            "/monitoring",
            "/monitoring/summary",
            "/pwa_icon",
            "/robots.txt",
            "/x",
            "//etc/passwd",
        ):
            assert client.get(path).status_code == 404, path
        assert client.get("/config").status_code == 200


def test_uploads_and_events_are_bounded_and_counted() -> None:
    memory = MemoryBudget(1_600_000)
    with page(memory=memory, max_files=3, max_event_bytes=5000, max_page_bytes=12_000, max_pages=2) as (
        address,
        _,
    ):
        with visit(address) as client:
            assert upload(client, bytes(300_001)).status_code == 400
            assert upload(client, bytes(1_500_000)).status_code == 413
            paths = [upload(client, bytes(1000 * number)).json()[0] for number in range(1, 6)]
            assert [Path(path).exists() for path in paths] == [False, False, True, True, True]  # the oldest are gone
            assert memory.num_bytes == 3000 + 4000 + 5000
            assert client.post(JOIN, content=b" " * 5001).status_code == 413
            assert client.post(JOIN, content=b"[" * 4000).status_code == 400
            assert client.post(JOIN, json=[1]).status_code == 400
            assert client.post(JOIN, json=event("../../x")).status_code == 400
            assert client.post(JOIN, json={"data": []}).status_code == 400
            for data, number in (
                ([], 0),
                ([None] * 10, 0),
                ({}, 0),
                ([], 999),
                ([], -1),
                ([], "0"),
                ([], True),
                (None, None),
            ):
                body = {"data": data, "fn_index": number, "session_hash": "s1"}
                assert client.post(JOIN, json=body).status_code == 400, body
            body = event("s1", "x" * 2000)
            held = 2 * len(json.dumps(body, separators=(",", ":")))
            answers = [client.post(JOIN, json=body) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 400]
            assert "load the page again" in answers[2].json()["detail"]
            assert memory.num_bytes == 12_000 + 2 * held
            assert client.post(JOIN, json=event("s2")).status_code == 200
            assert (
                client.post(JOIN, json=event("s3")).status_code == 200
            )  # the page that was heard of least recently is closed
            assert client.get(DATA, params={"session_hash": "s1"}).status_code == 404
            for _ in range(3):
                upload(client, bytes(299_000))
            with visit(address) as other:
                codes = [upload(other, bytes(299_000)).status_code for _ in range(4)]
                assert codes[-1] == 429
        assert memory.num_bytes > 0
    assert memory.num_bytes == 0


def test_a_malformed_event_is_a_line_of_the_log(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with page() as (address, _), visit(address) as client:
        config = client.get("/config").json()
        number = next(len(one["inputs"]) for one in config["dependencies"] if one["id"] == 2)
        told = []
        for session, value in (("s1", {"a": 1}), ("s2", [[[]]]), ("s3", 1e308)):
            body = {"data": [value] * number, "fn_index": 2, "session_hash": session}
            assert client.post(JOIN, json=body).status_code == 200
            lines = client.get(DATA, params={"session_hash": session}).text.splitlines()
            told += [json.loads(line[6:])["output"]["error"] for line in lines if '"process_completed"' in line]
    errors = [record for record in caplog.records if "an event of the page failed" in record.getMessage()]
    assert 0 < len(errors) == len([one for one in told if one])
    assert not any("\n" in record.getMessage() for record in errors)
    assert not any("/" in one for one in told)  # no path of the server
    assert "Traceback" not in "".join(capsys.readouterr())


def test_what_a_visitor_leaves_goes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "TIDY_S", 0.05)
    memory = MemoryBudget(2_000_000)
    with page(memory=memory, left_s=0.5) as (address, visitors):
        with visit(address) as client:
            (path,) = upload(client, DEMO.read_bytes()).json()
            with client.stream("GET", "/gradio_api/heartbeat/s1") as stream:
                parts = stream.iter_text()
                assert next(parts)
                time.sleep(1.5)  # the page is open, however long it is silent
                assert Path(path).exists()
        wait_until(lambda: not Path(path).exists())
        wait_until(lambda: memory.num_bytes == 0 and len(visitors) == 0)
        with httpx.Client(timeout=60) as client:  # without a cookie: known by the address
            (path,) = upload(httpx.Client(base_url=address), DEMO.read_bytes()).json()
            assert client.get(f"{address}{FILE}{path}").status_code == 200
        wait_until(lambda: not Path(path).exists() and len(visitors) == 0)


def test_unfinished_bodies_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(start: bytes) -> Iterator[bytes]:
        yield start
        time.sleep(2)
        yield b"}"

    with page(body_s=0.5) as (address, _), visit(address) as client:
        assert client.post(JOIN, content=half(b"{")).status_code == 408
        head = {"content-type": "multipart/form-data; boundary=x"}
        start = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc'
        assert client.post(UPLOAD, content=half(start), headers=head).status_code == 408
        assert client.post(UPLOAD, content=b"nothing", headers=head).status_code == 400


def test_with_keys_nothing_is_open_before_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "LOGIN_PAUSE_S", 0)
    with page((KEY,)) as (address, visitors), visit(address) as client:
        front = client.get("/")
        assert front.status_code == 401
        assert "API key" in front.text
        assert "gradio" not in front.text
        assert "frame-ancestors 'none'" in front.headers["content-security-policy"]
        for path in ("/config", "/assets/x.js", "/theme.css", FILE + str(DEMO), DATA, "/gradio_api/heartbeat/s"):
            assert client.get(path).status_code == 401, path
        assert upload(client, DEMO.read_bytes()).status_code == 401
        assert client.post(JOIN, json=event("s")).status_code == 401
        assert client.get("/config", cookies={"llava_page": "x" * 43}).status_code == 401
        for wrong in ("", "wrong", KEY + "x", KEY[:-1]):
            assert client.post("/login", data={"key": wrong}).status_code == 401
        assert client.post("/login", content=b"key=" + b"x" * 5000).status_code == 413
        assert len(visitors) == 0
        done = client.post("/login", data={"key": KEY})
        assert (done.status_code, done.headers["location"]) == (303, "/page/")
        cookie = done.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        assert KEY not in cookie
        assert client.get("/config").status_code == 200
        assert client.get("/").status_code == 200
        assert client.post("/logout").status_code == 303
        assert client.get("/config").status_code == 401


def test_frames_are_for_sites_that_are_named(own_folder: Path) -> None:
    from llava.serve.web.page import Page, mount

    access = AccessPolicy(cross_origin=CrossOrigin(("https://example.org",)))
    for embed, expected in ((True, "frame-ancestors 'self' https://example.org"), (False, "frame-ancestors 'none'")):
        app = mount(FastAPI(), Page.over("http://127.0.0.1:9", access=access), "/page", embed=embed)
        with running(app) as address:
            headers = httpx.get(f"{address}/page/").headers
        assert expected in headers["content-security-policy"]
        assert ("x-frame-options" in headers) is not embed


def test_the_number_of_visitors_is_bounded(tmp_path: Path) -> None:
    memory = MemoryBudget(10_000)
    visitors = Visitors(tmp_path, memory, VisitorLimits(max_visitors=2, left_s=0.2))
    first, _ = visitors.enter("a"), visitors.enter("b")
    visitors.open(first, "s", connected=True)
    kept = visitors.keep(first, "../../x/..\\y.png", b"abc")
    assert kept.name == "_.._x_.._y.png"
    assert kept.is_relative_to(visitors.folder)
    with pytest.raises(ServerBusyError, match="too many visitors"):
        visitors.enter("c")
    with pytest.raises(ServerBusyError):
        visitors.keep(first, "x", bytes(10_001 - 3))
    time.sleep(0.3)
    assert visitors.enter("c").name == "c"  # b has left, a has a page open
    assert kept.exists()
    assert visitors.find("b") is None
    with pytest.raises(InputError, match="another visitor"):
        visitors.open(visitors.enter("c"), "s")
    visitors.close()
    assert memory.num_bytes == 0
    assert not visitors.folder.exists()


@pytest.mark.parametrize("name", ["", "...", "a/b", "ü\u202e.png", "x" * 500, ".htaccess", "con\0.png"])
def test_names_of_files_are_plain(name: str) -> None:
    plain = plain_name(name)
    assert plain.isascii()
    assert 0 < len(plain) <= 80
    assert not plain.startswith(".")
    assert not set(plain) & set("/\\\0")
