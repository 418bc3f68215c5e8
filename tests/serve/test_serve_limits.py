"""What a server refuses: no key, too much, too long, and addresses that are not for them; docs/serving.md has the list."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from serve_kit import DEMO, data_url, wait_until, worker

from llava.__main__ import main
from llava.errors import InputError
from llava.images.download import ImageLimits
from llava.serve.backends.in_process import EngineBackend
from llava.serve.http.cors import CrossOrigin
from llava.serve.http.keys import ApiKeys, read_keys
from llava.serve.http.limits import ServeLimits
from llava.serve.http.memory_budget import MemoryBudget, MemoryBudgetError
from llava.serve.http.middleware import AccessPolicy

MODEL = "llava-v1.5-tiny"
KEY = "a-key-of-tests"
LONG = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 900, "ignore_eos": True}
CHAT = "/v1/chat/completions"


def asking(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 3} | more


def showing(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return asking() | {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "hi"}]}]}


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def message(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


# Who may come in


def test_keys_open_everything_but_health_and_documents(backend: EngineBackend) -> None:
    with worker(backend, access=AccessPolicy(keys=ApiKeys([KEY, "another-key"]))) as (address, _):
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert httpx.get(address + path).status_code == 200, path
        for method, path in [
            ("POST", CHAT), ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"),
            ("POST", "/worker_generate_stream"), ("POST", "/worker_get_status"), ("POST", "/list_models"), ("GET", "/nosuch"),
        ]:  # fmt: skip
            for headers in ({}, {"authorization": "Bearer wrong-key-here"}, {"authorization": f"Basic {KEY}"}):
                response = httpx.request(method, address + path, json=asking(), headers=headers)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
        for key in (KEY, "another-key"):
            assert (
                httpx.post(address + CHAT, json=asking(), headers={"authorization": f"Bearer {key}"}).status_code == 200
            )


def test_keys_from_files_and_variables(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst-key-1\n\n second-key \n")
    assert read_keys(str(file), "third-key, fourth-key") == ["first-key-1", "second-key", "third-key", "fourth-key"]
    assert not ApiKeys([])
    with pytest.raises(InputError, match="8 characters"):
        ApiKeys(["short"])
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(str(file), None)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(str(tmp_path / "absent"), None)


def test_pages_of_other_sites_and_tricky_names_are_kept_out(backend: EngineBackend) -> None:
    access = AccessPolicy(hosts=("127.0.0.1", "localhost"), cross_origin=CrossOrigin(("https://friend.example",)))
    with worker(backend, access=access) as (address, _):
        port = address.rpartition(":")[2]

        def status(**headers: str) -> int:
            return httpx.post(address + CHAT, json=asking(), headers=headers).status_code

        assert status(host=f"rebound.example:{port}") == 421
        assert status(host=f"localhost:{port}") == 200
        assert status(origin="https://evil.example") == 403
        assert status(origin="null") == 403
        assert status(origin=address) == 200  # the server's own page
        assert status(origin="https://friend.example") == 200
        allowed = httpx.options(
            address + CHAT, headers={"origin": "https://friend.example", "access-control-request-method": "POST"}
        )
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    with worker(backend) as (address, _):
        headers = {"origin": "https://friend.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in httpx.options(address + CHAT, headers=headers).headers


def test_logs_hold_no_images_questions_or_keys(backend: EngineBackend, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG, logger="llava"),
        worker(backend, access=AccessPolicy(keys=ApiKeys([KEY]))) as (address, _),
    ):
        headers = {"authorization": f"Bearer {KEY}"}
        body = showing(data_url()) | {"max_tokens": 2}
        assert httpx.post(f"{address}{CHAT}?secret=in-the-query", json=body, headers=headers).status_code == 200
        assert (
            httpx.post(address + CHAT, json=body, headers={"authorization": "Bearer wrong-key-here"}).status_code == 401
        )
        assert httpx.get(address + "/a-path-with-a-secret").status_code == 401
        wait_until(lambda: sum("POST" in record.getMessage() for record in caplog.records) >= 2)
    text = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("llava"))
    assert f"POST {CHAT} 200" in text
    for secret in (KEY, "wrong-key-here", "in-the-query", "a-path-with", data_url()[-40:], "hi\n"):
        assert secret not in text


# Too much


def test_bodies_are_bounded_with_and_without_their_length(backend: EngineBackend) -> None:
    with worker(backend, access=AccessPolicy(max_body_bytes=10_000)) as (address, service):
        assert httpx.post(address + CHAT, content=b" " * 10_001).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(200):
                yield b" " * 1000

        for path in (CHAT, "/worker_generate_stream"):
            response = httpx.post(address + path, content=pieces())
            assert response.status_code == 413
            assert "10,000 bytes" in message(response)
        assert httpx.post(address + CHAT, json=asking()).status_code == 200
        assert service.num_requests == 0


def test_images_are_bounded_in_number_bytes_and_pixels(backend: EngineBackend) -> None:
    limits = ServeLimits(max_images=3, images=ImageLimits(max_bytes=3_000, max_pixels=10_000))
    with worker(backend, limits) as (address, _):

        def told(*urls: str) -> str:
            response = httpx.post(address + CHAT, json=showing(*urls))
            assert response.status_code == 400
            return message(response)

        small = png(50, 50)
        assert "4 images" in told(*[small] * 4)
        assert "more than the 10,000 allowed" in told(png(200, 100))
        assert told(png(70, 70), png(70, 70), small).startswith("image 3: ")  # all images of a request together
        assert "bytes are allowed" in told("data:image/png;base64," + base64.b64encode(b"x" * 9000).decode())
        assert httpx.post(address + CHAT, json=showing(small, small, small)).status_code == 200
        chunk = httpx.post(
            f"{address}/worker_generate_stream",
            json={"prompt": "<image>" * 4, "images": [small] * 4, "max_new_tokens": 2},
        )
        assert b"4 images" in chunk.content


def test_a_full_server_says_when_to_come_again(backend: EngineBackend) -> None:
    with worker(backend, ServeLimits(max_requests=1)) as (address, service):
        with httpx.stream("POST", address + CHAT, json=LONG | {"stream": True}) as running:
            lines = running.iter_lines()
            next(lines)
            response = httpx.post(address + CHAT, json=asking())
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            chunk = httpx.post(f"{address}/worker_generate_stream", json={"prompt": "hi"})
            assert chunk.status_code == 429
            assert json.loads(chunk.content[:-1])["error_code"] == 1
            assert httpx.get(address + "/health").status_code == 200
        wait_until(lambda: service.num_requests == 0)
        assert httpx.post(address + CHAT, json=asking()).status_code == 200


def test_a_server_that_is_being_stopped_takes_nothing_new(backend: EngineBackend) -> None:
    with worker(backend) as (address, service):
        service.draining = True
        response = httpx.post(address + CHAT, json=asking())
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert httpx.get(address + "/ready").status_code == 503
        assert httpx.get(address + "/health").status_code == 200


def test_all_requests_together_hold_a_bounded_number_of_bytes(backend: EngineBackend) -> None:
    """Bodies while they are there, images before there is memory for them; all is given back."""
    memory = MemoryBudget(12_000_000)
    with worker(backend, access=AccessPolicy(memory=memory)) as (address, service):
        # 12.96 million bytes to decode it, in a body of a few thousand: that never fits
        response = httpx.post(address + CHAT, json=showing(png(900, 900)))
        assert response.status_code == 400
        assert "12,960,000 bytes of memory" in message(response)
        assert "may hold 12,000,000" in message(response)
        body = {"prompt": "<image>\nhi", "images": [png(900, 900)]}
        assert b"12,960,000 bytes" in httpx.post(f"{address}/worker_generate_stream", json=body).content
        long = httpx.post(address + CHAT, content=b" " * 6_500_000)  # twice that, with what is parsed of it
        assert long.status_code == 413
        wait_until(lambda: memory.num_bytes == 0)
        fitting = showing(png(600, 600)) | {"max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", address + CHAT, json=fitting) as running:
            lines = running.iter_lines()
            next(lines)
            held = memory.num_bytes
            assert 4 * 600 * 600 <= held < 1.1 * 4 * 600 * 600
            response = httpx.post(address + CHAT, json=showing(png(850, 850)))
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert "12,000,000 bytes" in message(response)
            body = {"prompt": "<image>\nhi", "images": [png(850, 850)]}
            assert httpx.post(f"{address}/worker_generate_stream", json=body).status_code == 429
        wait_until(lambda: service.num_requests == 0 and memory.num_bytes == 0)
        assert httpx.post(address + CHAT, json=showing(png(850, 850))).status_code == 200


def test_a_request_that_has_ended_holds_no_more() -> None:
    """A thread that still decodes its image ends later than a client that has left."""
    memory = MemoryBudget(1000)
    reservation = memory.reserve()
    reservation.change(600)
    reservation.release()
    reservation.change(-500)
    assert memory.num_bytes == 0
    with pytest.raises(MemoryBudgetError, match="ended"):
        reservation.change(10)
    assert memory.num_bytes == 0


def test_an_image_that_is_slow_to_decode_stops_nobody(backend: EngineBackend) -> None:
    buffer = io.BytesIO()
    Image.new("L", (1500, 1500)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    bomb = whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * 40_000 + b"\xff\xd9"  # each is a pass over the image
    url = "data:image/jpeg;base64," + base64.b64encode(bomb).decode()
    with worker(backend) as (address, service), ThreadPoolExecutor(1) as thread:
        slow = thread.submit(httpx.post, address + CHAT, json=showing(url), timeout=300)
        wait_until(lambda: service.num_requests == 1)
        assert httpx.get(address + "/health").status_code == 200
        assert httpx.post(address + CHAT, json=showing(png(70, 70)), timeout=300).status_code == 200
        assert not slow.done()
        assert slow.result().status_code == 400
        assert "seconds of processor time" in message(slow.result())
        wait_until(lambda: service.memory.num_bytes == 0)


def test_the_memory_budget_must_hold_one_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--no-register", "--port", "0", "--max-held-mb", "300"]) == 2
    assert "--max-held-mb is 300, and one request may hold 469" in capsys.readouterr().err


# Too long


def test_a_deadline_ends_answers_with_an_error(backend: EngineBackend) -> None:
    with worker(backend, ServeLimits(deadline_s=0.4)) as (address, service):
        response = httpx.post(address + CHAT, json=LONG)
        assert response.status_code == 504
        assert "longer than this server allows" in message(response)
        with httpx.stream("POST", address + CHAT, json=LONG | {"stream": True}) as stream:
            events = [line for line in stream.iter_lines() if line]
        assert "longer than this server allows" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
        body = {"prompt": "hi", "max_new_tokens": 900, "temperature": 1.5}
        chunks = httpx.post(f"{address}/worker_generate_stream", json=body | {"temperature": 5}).content.split(b"\0")
        assert json.loads(chunks[-2])["error_code"] in (0, 1)  # 0 where the model had ended before
        wait_until(lambda: service.num_requests == 0)
        wait_until(lambda: backend.engine.stats().num_running == 0, seconds=1)


def test_a_client_that_reads_nothing_is_let_go_at_the_deadline(backend: EngineBackend) -> None:
    with worker(backend, ServeLimits(deadline_s=1.0)) as (address, service):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sleeper:
            sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            body = json.dumps(LONG | {"stream": True, "logprobs": True, "top_logprobs": 20, "n": 8}).encode()
            sleeper.sendall(
                f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
            )
            wait_until(lambda: service.num_requests == 1)
            started = time.monotonic()
            assert httpx.post(address + CHAT, json=asking(), timeout=10).status_code in (200, 504)  # others are served
            wait_until(lambda: service.num_requests == 0, seconds=15)
            assert time.monotonic() - started < 12


# Addresses


def test_nothing_is_fetched_from_inside(backend: EngineBackend, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/image.jpg").write_bytes(DEMO.read_bytes())
    (tmp_path / "secret.jpg").write_bytes(DEMO.read_bytes())
    (tmp_path / "inside/link.jpg").symlink_to(tmp_path / "secret.jpg")
    hidden = tmp_path / "inside"
    with worker(backend, ServeLimits(image_folder=hidden)) as (address, _):

        def told(url: str) -> str:
            response = httpx.post(address + CHAT, json=showing(url))
            assert response.status_code == 400, url
            return message(response)

        port = address.rpartition(":")[2]
        for url in (
            f"http://127.0.0.1:{port}/health", f"http://localhost:{port}/", "http://169.254.169.254/latest/meta-data",
            "http://10.0.0.1/x.png", "http://[::1]/x.png", "http://0x7f000001/x.png", "http://[::ffff:127.0.0.1]/",
        ):  # fmt: skip
            assert "own network" in told(url), url
        for url in (
            f"file://{tmp_path}/secret.jpg", f"file://{hidden}/../secret.jpg", f"file://{hidden}/link.jpg",
            f"file://{hidden}/%2e%2e/secret.jpg", "file:///etc/passwd", "file://%00",
        ):  # fmt: skip
            assert "leaves the folder" in told(url), url
        for url in ("ftp://example.org/x", "gopher://x", "/etc/passwd", "javascript:1"):
            assert "must begin with" in told(url), url
        assert httpx.post(address + CHAT, json=showing(f"file://{hidden}/image.jpg")).status_code == 200
    with worker(backend, ServeLimits(allow_urls=False)) as (address, _):
        assert "downloads no images" in message(httpx.post(address + CHAT, json=showing("https://example.org/x.png")))


def test_limits_are_checked_when_they_are_made(tmp_path: Path) -> None:
    for wrong in (
        {"max_images": -1},
        {"max_requests": 0},
        {"deadline_s": 0},
        {"deadline_s": float("nan")},
        {"image_folder": tmp_path / "absent"},
    ):
        with pytest.raises(InputError):
            ServeLimits(**wrong)
