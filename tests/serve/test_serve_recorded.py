"""Every request that was recorded against the original's servers, sent to ours.

Structure, error codes, statuses and echoed prompts are compared; generated text is not (the original's was in half precision).
Where we differ on purpose, the recording's own note is looked up in DIFFERENT, and what we do instead is checked.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import httpx
import pytest
from golden_data import golden
from serve_kit import controller, running, wait_until, worker

from llava.engine.config import EngineConfig
from llava.model.builder import load
from llava.serve.backends.in_process import EngineBackend
from llava.serve.http.middleware import AccessPolicy
from llava.serve.http.server import bind
from llava.serve.router.dispatch import Dispatcher
from llava.serve.router.protocol import CONTEXT_FULL, read_chunks, server_error_msg
from llava.serve.router.routes import ControllerApi, controller_app

RECORDED = json.loads(golden("serving.json").read_text())["transcripts"]
NAMES = ("llava-v1.5-tiny-vicuna", "llava-v1-tiny-linear")


def in_words(row: dict[str, Any], chunks: list[dict[str, Any]]) -> None:
    """An error as the recording says, but with the reason in the place of NETWORK ERROR."""
    assert [chunk["error_code"] for chunk in chunks] == [1]
    assert chunks[0]["text"] != server_error_msg
    assert len(chunks[0]["text"]) > 20


def answers(row: dict[str, Any], chunks: list[dict[str, Any]]) -> None:
    """An answer where the original failed, or cut away what it should not have."""
    assert {chunk["error_code"] for chunk in chunks} == {0}
    assert all(chunk["text"].startswith(row["request"]["prompt"]) for chunk in chunks)
    assert len(chunks[-1]["text"]) > len(row["request"]["prompt"])


def no_worker(row: dict[str, Any], chunks: list[dict[str, Any]]) -> None:
    assert [chunk["error_code"] for chunk in chunks] == [2]  # the original says 2, then goes on to fail with 3
    assert "'nope'" in chunks[0]["text"]


DIFFERENT: dict[str, Callable[[dict[str, Any], list[dict[str, Any]]], None]] = {
    "mode-1 image with pad": answers,
    "more images than tags": in_words,
    "image but no tag": in_words,
    "tag but empty images list": in_words,
    "tag but no images key": in_words,
    "tag but no images: generate() dies in its thread, the streamer times out after 15 s, then error_code 1": in_words,
    "bad base64": in_words,
    "not an image": in_words,
    "bad max_new_tokens": in_words,
    "no stop key": answers,
    "empty stop string": answers,
    "no prompt": in_words,
    "proxied, unknown model": no_worker,
}
STARTS = {"stop string": answers}  # notes that begin so: the original cuts the stop string out, and goes on


def recorded_backend(checkpoint: str, name: str | None = None, **options: Any) -> EngineBackend:
    """A recorded checkpoint on an engine. Its tower is named relative to the folder of all recordings."""
    with contextlib.chdir(golden(".")):
        return EngineBackend(
            load(golden(f"checkpoints/{checkpoint}"), device="cpu"), name=name or checkpoint, **options
        )


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """A controller and the two recorded models' workers, by the names that the recording has for them."""
    backends = [recorded_backend(name) for name in NAMES]
    with (
        controller() as (address, dispatcher),
        worker(backends[0], controller=address) as (first, _),
        worker(backends[1], controller=address) as (second, _),
    ):
        wait_until(lambda: len(dispatcher.workers()) == 2)
        yield {
            "controller(shortest_queue)": address,
            f"worker({NAMES[0]})": first,
            f"worker({NAMES[1]})": second,
        }
    for backend in backends:
        backend.engine.close()


def sent(address: str, row: dict[str, Any], addresses: dict[str, str]) -> httpx.Response:
    request = row["request"]
    if isinstance(request, dict) and set(request) == {"raw"}:
        content: Any = request["raw"]
    else:
        content = json.dumps(request)
        for recorded, ours in addresses.items():
            content = content.replace(recorded, ours)
    return httpx.request(
        row["method"], address + row["path"], content=content if request is not None else None, timeout=180
    )


def compare_json(row: dict[str, Any], response: httpx.Response, addresses: dict[str, str]) -> None:
    if row["status"] == 500:  # what the client gave was wrong, and now that is said
        assert response.status_code == 400, row
        assert response.json()["error"]["message"]
        return
    assert response.status_code == row["status"], (row, response.text)
    assert response.headers["content-type"] == row["content_type"]
    expected = json.dumps(row["response"])
    for recorded, ours in addresses.items():
        expected = expected.replace(recorded, ours)
    assert in_any_order(response.json()) == in_any_order(json.loads(expected)), row


def in_any_order(value: Any) -> Any:
    """The order of models is that of registration here; the original's is a set's."""
    if isinstance(value, dict):
        return {key: sorted(item) if isinstance(item, list) else item for key, item in value.items()}
    return value


def prompt_of(row: dict[str, Any]) -> Any:
    """Long prompts are stored as what is repeated."""
    prompt = row["request"].get("prompt")
    if isinstance(prompt, dict):
        prompt = prompt["head"] + "word " * prompt["times"] + prompt["tail"]
        row["request"]["prompt"] = prompt
    return prompt


def compare_chunks(row: dict[str, Any], response: httpx.Response) -> None:
    assert response.status_code == 200
    assert response.headers.get("content-type") == row["content_type"]
    assert response.content.endswith(b"\0")
    chunks = list(read_chunks([response.content]))
    assert all(list(chunk) == ["text", "error_code"] for chunk in chunks)
    note = row["note"] or ""
    different = DIFFERENT.get(note) or next((check for start, check in STARTS.items() if note.startswith(start)), None)
    if different is not None:
        different(row, chunks)
        return
    prompt, last = row["request"]["prompt"], row["chunks"][-1]
    if isinstance(last["text"], dict):
        assert last["text"]["prompt_and"] == CONTEXT_FULL
        assert chunks == [{"text": prompt + CONTEXT_FULL, "error_code": last["error_code"]}]
        return
    if last["text"].endswith(CONTEXT_FULL):
        assert chunks == row["chunks"]
        return
    assert {chunk["error_code"] for chunk in chunks} == {0}
    assert 1 <= len(chunks) <= row["n_chunks"]
    grown = [prompt, *(chunk["text"] for chunk in chunks)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(grown))


SHARED = [row for row in RECORDED if not row["server"].startswith("controller(lottery)")]
# The last part of the recording has a worker of its own, which was told not to register: see below.
UNREGISTERED = next(i for i, row in enumerate(SHARED) if (row["note"] or "").endswith("with --no-register"))


def test_the_recorded_conversation_with_controller_and_workers(servers: dict[str, str]) -> None:
    recorded_names = {"http://127.0.0.1:21103": servers[f"worker({NAMES[0]})"]}
    compared = 0
    for row in SHARED[:UNREGISTERED] + [
        row for row in SHARED[UNREGISTERED:] if row["path"] == "/worker_generate_stream"
    ]:
        if row["path"] == "/worker_generate_stream" and "prompt" in (row["request"] or {}):
            prompt_of(row)
        if row["path"] == "/get_worker_address" and row["status"] == 200 and row["note"] is None:
            recorded_names[row["response"]["address"]] = servers[f"worker({row['request']['model']})"]
        response = sent(servers[row["server"]], row, recorded_names)
        if "chunks" in row:
            compare_chunks(row, response)
        else:
            compare_json(row, response, recorded_names)
        compared += 1
    assert compared >= 50


def test_the_recorded_registrations() -> None:
    with controller(Dispatcher("lottery")) as (address, _):
        rows = [row for row in RECORDED if row["server"].startswith("controller(lottery)")]
        assert len(rows) == 3
        for row in rows:
            compare_json(row, sent(address, row, {}), {})


def test_a_worker_that_shall_not_register_does_not(servers: dict[str, str]) -> None:
    """The original's registered itself with its first request."""
    backend = recorded_backend(NAMES[0], "quiet")
    with worker(backend) as (address, _):
        row = next(row for row in SHARED if row["note"] == "text only, greedy")
        compare_chunks(row, sent(address, row, {}))
        assert "quiet" not in httpx.post(f"{servers['controller(shortest_queue)']}/list_models").json()["models"]
    backend.engine.close()


def test_the_queue_is_all_unfinished_requests(servers: dict[str, str]) -> None:
    """As recorded: three requests at a worker that answers one at a time are a queue of three, two, one."""
    recorded = json.loads(golden("serving.json").read_text())["concurrency"]["sequence"]
    backend = recorded_backend(NAMES[0], "one", config=EngineConfig(max_running=1))
    with worker(backend) as (address, service):
        seen: list[int] = []
        service.changed = lambda: seen.append(service.num_requests)
        body = {"prompt": "hi", "max_new_tokens": 200, "temperature": 0}
        post = lambda: httpx.post(f"{address}/worker_generate_stream", json=body, timeout=180)  # noqa: E731
        threads = [Thread(target=post) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    backend.engine.close()
    peak = seen.index(max(seen))
    assert seen[peak:] == [*recorded, 0]


@pytest.mark.slow
def test_silent_workers_expire_and_a_new_controller_is_told_again(servers: dict[str, str]) -> None:
    with controller(Dispatcher(expiration_s=0.5)) as (address, dispatcher):
        for name, checked in (("http://127.0.0.1:9/a", True), ("http://127.0.0.1:9/b", False)):
            status = {"model_names": [name[-1]], "speed": 1, "queue_length": 0}
            body = {"worker_name": name, "check_heart_beat": checked, "worker_status": status}
            assert httpx.post(f"{address}/register_worker", json=body).json() is None
        wait_until(lambda: httpx.post(f"{address}/list_models").json() == {"models": ["b"]})
    # A controller that is started anew under the same address knows nobody; heart-beats tell it.
    backend = recorded_backend(NAMES[0], "faithful")

    (listener,) = bind("127.0.0.1", 0)
    place = listener.getsockname()
    address = f"http://127.0.0.1:{place[1]}"
    with worker(backend, controller=address) as (_, service):
        for _ in range(2):
            dispatcher = Dispatcher()
            _, app = controller_app(ControllerApi(dispatcher), AccessPolicy())
            with running(app, listener):
                wait_until(lambda: service.changed() or dispatcher.model_names() == ["faithful"])  # noqa: B023
            (listener,) = bind("127.0.0.1", place[1])
        listener.close()
    backend.engine.close()
