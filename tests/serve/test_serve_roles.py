"""Who may register workers, where workers may be, and which keys go where."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serve_kit import controller, wait_until, worker

from llava.errors import InputError
from llava.serve.backends.in_process import EngineBackend
from llava.serve.controller import build_parser
from llava.serve.http.flags import listen_address_from
from llava.serve.http.keys import ApiKeys, client_name
from llava.serve.http.middleware import AccessPolicy
from llava.serve.router.dispatch import MAX_MODELS, MAX_WORKERS, Dispatcher
from llava.serve.router.places import WorkerPlaces, parse_worker_url
from llava.serve.router.protocol import MAX_NAMES, WorkerStatus

MODEL = "llava-v1.5-tiny"
CHAT = "/v1/chat/completions"
CLIENT, WORKER = "key-of-a-client", "key-of-a-worker"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
STATUS = {"model_names": [MODEL], "speed": 1, "queue_length": 0}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Recorder(http.server.BaseHTTPRequestHandler):
    """A worker that keeps what it is sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append((self.path, self.headers.get("authorization"), body))  # type: ignore[attr-defined]
        answer = json.dumps(STATUS if "status" in self.path else {"taken": True}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *given: Any) -> None: ...


@pytest.fixture
def recorder() -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.seen = []  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("worker_keys", [[], [WORKER]])
def test_a_key_of_a_client_does_nothing_that_is_a_worker_s(recorder: Any, worker_keys: list[str]) -> None:
    access = AccessPolicy(keys=ApiKeys([CLIENT]), worker_keys=ApiKeys(worker_keys))
    with controller(access=access) as (address, dispatcher):
        dispatcher.register("http://127.0.0.1:9", WorkerStatus((MODEL,), 1, 0), check_heart_beat=True, key=WORKER)
        for headers in ({}, bearer(CLIENT), {"x-api-key": CLIENT}):
            for path, body in (
                ("/register_worker", {"worker_name": recorder.url, "check_heart_beat": False}),
                ("/register_worker", {"worker_name": recorder.url, "check_heart_beat": False, "worker_status": STATUS}),
                ("/receive_heart_beat", {"worker_name": "http://127.0.0.1:9", "queue_length": 10**6}),
                ("/unregister_worker", {"worker_name": "http://127.0.0.1:9"}),
            ):
                assert httpx.post(address + path, json=body, headers=headers).status_code in (401, 403)
        assert [known.name for known in dispatcher.workers()] == ["http://127.0.0.1:9"]
        if worker_keys:  # and a worker's key asks no questions
            assert httpx.post(address + CHAT, json=BODY, headers=bearer(WORKER)).status_code == 401
    assert recorder.seen == []


def test_a_worker_gets_its_own_key_and_no_other(recorder: Any) -> None:
    access = AccessPolicy(keys=ApiKeys([CLIENT]), worker_keys=ApiKeys([WORKER, "key-of-another-one"]))
    with controller(access=access) as (address, dispatcher):
        body = {"worker_name": recorder.url, "check_heart_beat": False}
        assert httpx.post(f"{address}/register_worker", json=body, headers=bearer(WORKER)).status_code == 200
        assert httpx.post(address + CHAT, json=BODY, headers=bearer(CLIENT)).json() == {"taken": True}
        httpx.get(f"{address}/v1/models", headers=bearer(CLIENT))
        assert {path for path, _, _ in recorder.seen} >= {"/worker_get_status", CHAT, "/v1/models"}
        assert {authorization for _, authorization, _ in recorder.seen} == {f"Bearer {WORKER}"}
        # Another worker's key neither takes its place nor sends it away.
        other = bearer("key-of-another-one")
        assert (
            httpx.post(f"{address}/register_worker", json=body | {"worker_status": STATUS}, headers=other).status_code
            == 400
        )
        gone = httpx.post(f"{address}/unregister_worker", json=body, headers=other)
        assert gone.json() == {"exist": False}
        assert len(dispatcher.workers()) == 1
    with controller() as (address, _):  # open to all: what a client shows stays here
        assert httpx.post(f"{address}/register_worker", json=body).status_code == 200
        recorder.seen.clear()
        httpx.post(address + CHAT, json=BODY, headers=bearer(CLIENT))
        assert [authorization for path, authorization, _ in recorder.seen if path == CHAT] == [None]


def test_a_worker_answers_its_controller_and_its_own_clients(backend: EngineBackend) -> None:
    own = AccessPolicy(keys=ApiKeys(["client-of-the-worker"]), worker_keys=ApiKeys([WORKER]), is_worker=True)
    access = AccessPolicy(keys=ApiKeys([CLIENT]), worker_keys=ApiKeys([WORKER]))
    with (
        controller(access=access) as (address, dispatcher),
        worker(backend, access=own, controller=address, key=WORKER) as (place, _),
    ):
        wait_until(dispatcher.workers)
        assert httpx.post(address + CHAT, json=BODY, headers=bearer(CLIENT)).status_code == 200
        assert httpx.post(place + CHAT, json=BODY, headers=bearer("client-of-the-worker")).status_code == 200
        for headers in ({}, bearer(CLIENT)):
            assert httpx.post(place + CHAT, json=BODY, headers=headers).status_code == 401


def test_who_asks_is_told_to_the_worker_by_its_controller_alone(
    backend: EngineBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    start = backend.start

    async def noting(request: Any, *, streamed: bool) -> Any:
        seen.append(request.client)
        return await start(request, streamed=streamed)

    monkeypatch.setattr(backend, "start", noting)
    own = AccessPolicy(keys=ApiKeys(["client-of-the-worker"]), worker_keys=ApiKeys([WORKER]), is_worker=True)
    access = AccessPolicy(keys=ApiKeys([CLIENT, "key-of-client-2"]), worker_keys=ApiKeys([WORKER]))
    with (
        controller(access=access) as (address, dispatcher),
        worker(backend, access=own, controller=address, key=WORKER) as (place, _),
    ):
        wait_until(dispatcher.workers)
        for key in (CLIENT, "key-of-client-2"):
            httpx.post(address + CHAT, json=BODY, headers=bearer(key))
        forged = bearer("client-of-the-worker") | {"x-llava-client": "somebody else"}
        httpx.post(place + CHAT, json=BODY, headers=forged)
    names = [client_name(f"Bearer {key}", "") for key in (CLIENT, "key-of-client-2", "client-of-the-worker")]
    assert seen == names
    assert len(set(names)) == 3
    assert not any(key in name for name in names for key in (CLIENT, WORKER))


# Where workers may be


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1", "http://", "http://user@127.0.0.1:80", "http://127.0.0.1:80@10.0.0.1", "http://127.0.0.1:99999",
        "http://127.0.0.1:0", "http://127.0.0.1/?a", "http://127.0.0.1/#a", "http://127.0.0.1\\@10.0.0.1", "http://[::1",
        "http://127.0.0.1/../x y", "http://127.0.0.1:80\r\nx: y", "http://h\u00f6st", "http://" + "a" * 300, "http://127.0.0.1//x",
    ],
)  # fmt: skip
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="http address"):
        parse_worker_url(url)


def checked(places: WorkerPlaces, url: str, peer: str | None) -> str | None:
    try:
        return asyncio.run(places.check(url, peer)).url
    except InputError:
        return None


@pytest.mark.parametrize(
    ("allowed", "url", "peer", "connected"),
    [
        ([], "http://10.0.0.7:21002", "10.0.0.7", "http://10.0.0.7:21002"),
        ([], "http://10.0.0.7:21002", "::ffff:10.0.0.7", "http://10.0.0.7:21002"),
        ([], "http://10.0.0.8:21002", "10.0.0.7", None),
        ([], "http://127.0.0.1:22", "10.0.0.7", None),
        ([], "http://169.254.169.254/latest", "10.0.0.7", None),
        ([], "http://169.254.169.254", "127.0.0.1", None),
        ([], "http://localhost:21002", "127.0.0.1", "http://127.0.0.1:21002"),
        ([], "http://localhost:21002", "::1", "http://127.0.0.1:21002"),
        ([], "http://127.0.0.1:9/a", "127.0.0.1", "http://127.0.0.1:9/a"),
        ([], "http://0.0.0.0:22", "127.0.0.1", None),
        ([], "https://localhost:443", "127.0.0.1", "https://localhost:443"),
        (["10.0.0.0/24"], "http://10.0.0.8:1", "192.168.1.1", "http://10.0.0.8:1"),
        (["10.0.0.0/24"], "http://192.168.1.1:1", "192.168.1.1", None),
        (["10.0.0.8"], "http://10.0.0.8:1", "10.0.0.7", "http://10.0.0.8:1"),
        (["localhost"], "http://localhost:1", "10.0.0.7", "http://127.0.0.1:1"),
        (["localhost"], "http://127.0.0.1:1", "127.0.0.1", None),
    ],
)
def test_workers_are_where_they_register_from_or_where_the_operator_allows(
    allowed: list[str], url: str, peer: str, connected: str | None
) -> None:
    assert checked(WorkerPlaces(allowed), url, peer) == connected


def test_places_that_are_none_are_refused_at_the_start() -> None:
    for place in ("http://10.0.0.1", "10.0.0.1:80", "", "a b"):
        with pytest.raises(InputError, match="--allow-worker"):
            WorkerPlaces([place])


def test_the_table_is_bounded() -> None:
    now = 0.0
    dispatcher = Dispatcher(clock=lambda: now)
    for number in range(MAX_WORKERS):
        names = tuple(f"m{number}-{index}" for index in range(MAX_MODELS // MAX_WORKERS))
        dispatcher.register(f"http://{number}", WorkerStatus(names, 1, 0), check_heart_beat=False)
    with pytest.raises(InputError, match="no more are taken"):
        dispatcher.register("http://more", WorkerStatus(("m0-0",), 1, 0), check_heart_beat=False)
    dispatcher.unregister("http://0")
    with pytest.raises(InputError, match="models"):
        dispatcher.register("http://more", WorkerStatus(("a", "b", "c", "d", "e"), 1, 0), check_heart_beat=False)
    assert dispatcher.choose("m1-0") == "http://1"
    with pytest.raises(InputError, match="at most"):
        WorkerStatus.parse(STATUS | {"model_names": ["m"] * (MAX_NAMES + 1)})
    with pytest.raises(InputError, match="at most"):
        WorkerStatus.parse(STATUS | {"model_names": ["m" * 10_000]})
    now = 1000.0  # none was heard of, though none promised heartbeats
    assert len(dispatcher.drop_expired()) == MAX_WORKERS - 1
    assert dispatcher.model_names() == []


def test_keys_of_both_kinds_differ_and_are_read_by_their_flags(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in (("clients", CLIENT), ("workers", WORKER)):
        (tmp_path / name).write_text(key + "\n")

    def words(workers: str) -> Any:
        files = ["--api-key-file", str(tmp_path / "clients"), "--worker-key-file", str(tmp_path / workers)]
        return build_parser().parse_args(["--port", "0", *files])

    address = listen_address_from(words("workers"))
    assert address.worker_key == WORKER
    assert address.access.worker_keys.allow(f"Bearer {WORKER}")
    assert not address.access.keys.allow(f"Bearer {WORKER}")
    for listener in address.listeners:
        listener.close()
    with pytest.raises(InputError, match="different ones"):
        listen_address_from(words("clients"))
    monkeypatch.setenv("LLAVA_WORKER_KEYS", CLIENT)
    with pytest.raises(InputError, match="different ones"):
        listen_address_from(words("workers"))


def test_workers_that_are_gone_are_not_ready_and_their_models_are_listed() -> None:
    with controller(probe_s=0.1) as (address, dispatcher):
        for number in range(3):
            status = WorkerStatus((f"m{number}",), 1, 0)
            dispatcher.register(f"http://127.0.0.1:{9 + number}", status, check_heart_beat=False)
        wait_until(lambda: all(known.num_failures for known in dispatcher.workers()), seconds=10)
        assert httpx.get(f"{address}/ready").status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
        assert [row["id"] for row in httpx.get(f"{address}/v1/models").json()["data"]] == ["m0", "m1", "m2"]
