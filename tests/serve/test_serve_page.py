"""What the web page posts, against what was recorded of the original's; its log, and its Stop button."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from golden_data import golden
from PIL import Image
from serve_kit import bind, make_greedy, running, wait_until, worker
from starlette.routing import Mount

from llava.conversation import get_template, web_conv_mode_for_model_name
from llava.serve.web.client import ConversationLog, PageClient, PageSettings, PageTurn, conversation_of, request_body

RECORDED = json.loads(golden("serving_behaviours.json").read_text())
WHITE = Image.new("RGB", (60, 40), (255, 255, 255))


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    WHITE.save(path)
    return str(path)


@pytest.mark.parametrize("row", RECORDED["gradio_http_bot"], ids=lambda row: row["model"])
def test_the_page_posts_what_the_original_s_did(row: dict[str, Any], image_file: str) -> None:
    recorded = row["posts"][-1]["json"]
    turn = PageTurn("What is it?", (image_file,) if recorded["images"] else ())
    settings = PageSettings(row["model"], 0.2, 0.7, 2000)
    body = request_body([turn], settings, get_template(web_conv_mode_for_model_name(row["model"])))
    images = body.pop("images")
    assert list(recorded) == [*body, "images"]
    assert body == {name: value for name, value in recorded.items() if name != "images"}
    assert len(images) == len(recorded["images"])
    for image in images:
        assert Image.open(io.BytesIO(base64.b64decode(image))).size == WHITE.size


def test_several_images_and_turns(image_file: str) -> None:
    """Each image has its mark before the question that it came with; failed turns are no part of the conversation."""
    turns = [
        PageTurn("One?", (image_file, image_file), "Two."),
        PageTurn("Nobody heard this.", (image_file,), "no worker", failed=True),
        PageTurn("Now?", (image_file,)),
    ]
    conversation, images = conversation_of(turns, get_template("v1"), "Pad")
    questions = [text for role, text in conversation.messages if role == "USER"]
    assert questions == ["<image>\n<image>\nOne?", "<image>\nNow?"]
    assert [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images] == [(60, 60)] * 3
    assert conversation.get_prompt().endswith("ASSISTANT: Two.</s>USER: <image>\nNow? ASSISTANT:")


def test_conversations_are_logged_where_a_folder_is_given(tmp_path: Path, image_file: str) -> None:
    turns, template = [PageTurn("One?", (image_file,), "Two.")], get_template("v1")
    ConversationLog(None).write("chat", turns, PageSettings("m"), template)
    assert list(tmp_path.iterdir()) == [Path(image_file)]
    log = ConversationLog(tmp_path)
    for kind in ("chat", "upvote"):
        log.write(kind, turns, PageSettings("m"), template, ip="127.0.0.1")
    (file,) = tmp_path.glob("*-conv.json")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["type"], second["type"]) == ("chat", "upvote")
    assert first["state"] == second["state"]
    assert first["state"]["messages"][-1] == ["ASSISTANT", "Two."]
    assert (tmp_path / "serve_images" / f"{first['images'][0]}.png").is_file()


def test_an_answer_breaks_off_when_the_page_lets_go(
    tmp_path: Path, image_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Stop does: the stream is closed, and the worker computes no more. The model ends only after many slow steps."""
    from tiny import build

    from llava.model.builder import load
    from llava.serve.backends.in_process import EngineBackend

    backend = EngineBackend(load(build(tmp_path / "model"), device="cpu"), name="endless-llava-v1")
    runner = backend.engine._worker.runner
    launch = runner.launch

    def slowly(*work: Any) -> Any:
        time.sleep(0.02)
        return launch(*work)

    monkeypatch.setattr(runner, "launch", slowly)

    async def ask_a_little(address: str) -> list[str]:
        servers = PageClient(address)
        assert await servers.models() == ["endless-llava-v1"]
        pieces = []
        stream = servers.answer([PageTurn("Go on.", (image_file,))], PageSettings("endless-llava-v1", 0.0, 1.0, 1500))
        async for piece in stream:
            assert not piece.failed, piece
            pieces.append(piece.answer)
            if len(pieces) == 5:
                await stream.aclose()
                break
        return pieces

    with worker(backend) as (address, service):
        assert len(asyncio.run(ask_a_little(address))) == 5
        wait_until(lambda: service.num_requests == 0, seconds=1)
        wait_until(lambda: backend.engine.stats().num_running == 0, seconds=1)
        stop_in_a_browser(address, service)
    backend.engine.close()


def stop_in_a_browser(address: str, service: Any) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        return  # the same without a browser has been shown above; test_serve_programs.py says what is missing
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    from llava.serve.web.page import Page, mount

    app = mount(FastAPI(), Page.over(address), "/page")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with running(app, bind("127.0.0.1", 0)[0]) as place, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        page.goto(f"{place}/page/")
        page.wait_for_function("document.querySelector('#model input')?.value == 'endless-llava-v1'")
        make_greedy(page)  # what is drawn by chance may end at once
        page.fill("#question textarea", "Go on.")
        page.press("#question textarea", "Enter")
        page.wait_for_function("document.querySelector('#chat [data-testid=bot]')?.innerText.length > 5")
        assert service.num_requests == 1
        page.click("#stop")
        wait_until(lambda: service.num_requests == 0, seconds=2)
        kept = page.locator("#chat [data-testid=bot]").inner_text()
        assert len(kept) > 5
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("checked", [True, False])
def test_no_visitor_reads_a_file_of_the_server(tmp_path: Path, checked: bool) -> None:
    """Every input of every event of the page, given a path of the server as an uploaded file has one, in each of its forms.

    The middleware of the page refuses them; without it, Gradio does.
    """
    pytest.importorskip("gradio")
    from llava.serve.web.page import EXAMPLES_FOLDER, Page, mount

    secret = tmp_path / "secret.txt"
    secret.write_text("the operator's key")
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    forms = [
        file,
        [file],
        {"text": "", "files": [file]},
        [{"role": "user", "content": [{"type": "file", "file": file}]}],
    ]
    app = mount(FastAPI(), Page.over("http://127.0.0.1:9"), "/page")
    if not checked:
        mounted = next(route for route in app.routes if isinstance(route, Mount))
        mounted.app = mounted.app._page
    with running(app) as address, httpx.Client(base_url=f"{address}/page", timeout=60) as client:
        components = {row["id"]: row for row in client.get("/config").json()["components"]}
        events = client.get("/config").json()["dependencies"]
        assert len(events) > 5
        example = client.get(f"/gradio_api/file={EXAMPLES_FOLDER / 'demo.jpg'}")
        assert example.status_code == 200
        assert client.get(f"/gradio_api/file={secret}").status_code in (403, 404)
        tried = 0
        for event in events:
            for place in range(len(event["inputs"])):
                for number, form in enumerate(forms):
                    data = [components[name].get("props", {}).get("value") for name in event["inputs"]]
                    data[place] = form
                    session = f"s{event['id']}-{place}-{number}"
                    body = {"data": data, "fn_index": event["id"], "session_hash": session}
                    joined = client.post("/gradio_api/queue/join", json=body)
                    tried += 1
                    if checked:
                        assert joined.status_code == 403
                    if joined.status_code != 200:
                        continue
                    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
                        answer = "".join(stream.iter_text())
                    for path in re.findall(r"/[^'\" ]*secret[^'\", ]*", answer):
                        assert client.get(f"/gradio_api/file={path}").text != secret.read_text(), (
                            event["id"],
                            place,
                            form,
                        )
        assert tried > 20
