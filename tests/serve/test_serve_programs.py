"""The servers as a user starts them: what they print, how they stop, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cli_kit import environment
from serve_kit import ROOT, Program, data_url, make_greedy, wait_until

from llava.__main__ import main

MODEL = "llava-v1.5-tiny"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conversations")


@pytest.fixture(scope="module")
def house(log_folder: Path) -> Iterator[Program]:
    with Program("serve", "--port", "0", "--device", "cpu", "--log-dir", str(log_folder)) as program:
        program.line("try ")
        yield program


def test_serve_prints_addresses_that_answer_and_a_command_that_works(house: Program) -> None:
    assert httpx.get(house.line("API ") + "/models").json()["data"][0]["id"] == MODEL
    assert "/v1/chat/completions" in httpx.get(house.line("docs ")).text
    assert httpx.get(house.line("API ").removesuffix("/v1"), follow_redirects=True).status_code == 200
    command = house.line("try ")
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=180)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"], done.stderr


def test_the_original_s_test_client_prints_an_answer(house: Program) -> None:
    address = house.line("API ").removesuffix("/v1")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llava.serve.test_message"),
            *("--controller-address", address, "--model-name", MODEL, "--message", "Who are you?"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Who are you?\n")
    assert len(done.stdout) > 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "./absent"], "./absent"),
        (["serve", "--api-key-file", "/absent/keys"], "the file of API keys '/absent/keys' cannot be read"),
        (["serve", "--max-images", "-1"], "max_images is -1"),
        (["serve", "--conv-mode", "nonsense"], "unknown conversation mode 'nonsense'"),
        (["controller", "--host", "no.such.host.invalid"], "no address of this machine"),
        (["web", "--share"], "--share is a flag of the original that this page does not offer"),
        (["worker", "--stream-interval", "0", "--no-register"], "--stream-interval is 0"),
    ],
)
def test_wrong_flags_give_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--port", "0"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"llava {arguments[0]}: error: ")
    assert words in complaint
    assert complaint.count("\n") == 1


def test_a_port_that_is_taken_is_named(house: Program) -> None:
    port = house.line("API ").removesuffix("/v1").rpartition(":")[2]
    with Program("controller", "--port", port) as program:
        assert program.stop(0) == 2
    assert f"cannot listen on localhost port {port}" in program.complaints[-1]


# The page in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright (extra dev)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, house: Program) -> Iterator[Any]:
    address = house.line("page ")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url) if not is_own(request.url, address) else None)
    page.goto(address)
    page.wait_for_function(f"document.querySelector('#model input')?.value == '{MODEL}'")
    yield page
    assert elsewhere == []  # nothing is loaded from other places, and nobody is told of the visit
    page.close()


def is_own(url: str, address: str) -> bool:
    return url.startswith((address.rpartition("/page/")[0], "data:", "blob:"))


def send(page: Any, text: str, *files: str) -> None:
    if files:
        page.set_input_files("#question input[type=file]", [str(ROOT / "images" / name) for name in files])
        page.wait_for_function(f"document.querySelectorAll('#question img').length == {len(files)}")
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")


def answers(page: Any, number: int) -> list[str]:
    """The texts of the model's messages, once there are so many and nothing is being computed."""
    page.wait_for_function(f"document.querySelectorAll('#chat [data-testid=bot]').length == {number}", timeout=120_000)
    page.wait_for_function("!document.querySelector('#chat .generating, #inspect .generating')", timeout=120_000)
    return [text.strip() for text in page.locator("#chat [data-testid=bot]").all_inner_texts()]


def asked_directly(house: Program, text: str, *names: str) -> str:
    images = [{"type": "image_url", "image_url": {"url": data_url(ROOT / "images" / name)}} for name in names]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    body = {"model": MODEL, "messages": messages}
    return httpx.post(house.line("API ") + "/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_a_visitor_asks_edits_votes_and_begins_anew(page: Any, house: Program, log_folder: Path) -> None:
    make_greedy(page)
    send(page, "What do you see?", "demo.jpg", "counting.png")
    first = answers(page, 1)
    assert first == [asked_directly(house, "What do you see?", "demo.jpg", "counting.png")]
    assert "128 of images" in page.locator("#inspect").inner_text()
    assert page.locator("#inspect table tbody tr").count() == 2
    send(page, "Who are you?")
    second = answers(page, 2)
    assert second[0] == first[0]
    num_answered = len(logged(log_folder))
    page.click("#regenerate")
    wait_until(lambda: len(logged(log_folder)) > num_answered)
    assert answers(page, 2) == second
    # An edited question is answered anew, and what came after it is gone.
    page.locator("#chat [aria-label='Edit']").first.click()
    page.locator("#chat textarea").first.fill("How many shapes are there?")
    num_answered = len(logged(log_folder))
    page.locator("#chat [aria-label='Submit']").first.click()
    wait_until(lambda: len(logged(log_folder)) > num_answered)
    edited = answers(page, 1)
    assert edited == [asked_directly(house, "How many shapes are there?", "demo.jpg", "counting.png")]
    page.locator("#chat [aria-label='dislike'], #chat [aria-label='Dislike']").first.click()
    rows = wait_until(lambda: [row for row in logged(log_folder) if row["type"] == "downvote"])
    assert rows[-1]["state"]["messages"][-1] == ["ASSISTANT", edited[0]]
    assert len(rows[-1]["images"]) == 2
    assert (log_folder / "serve_images" / f"{rows[-1]['images'][0]}.jpg").is_file()
    chats = [row for row in logged(log_folder) if row["type"] == "chat"]
    assert {"tstamp", "type", "model", "start", "finish", "state", "images", "ip"} <= set(chats[0])
    page.click("#clear")
    page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length == 0")
    send(page, "Who are you?")
    assert answers(page, 1) == [asked_directly(house, "Who are you?")]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.glob("*-conv.json") for line in file.read_text().splitlines()]


def test_errors_are_shown_as_messages(page: Any) -> None:
    send(page, "Where is the <image>?")
    (told,) = answers(page, 1)
    assert "1 <image> placeholder for 0 images" in told
    send(page, "word " * 1500)
    assert "Please start a new conversation" in answers(page, 2)[1]


def test_an_example_is_asked_by_click_and_keyboard(page: Any, house: Program) -> None:
    make_greedy(page)
    page.locator("#examples button, #examples [role=button], #examples .gallery-item").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value != ''")
    page.locator("#question textarea").focus()
    page.keyboard.press("Enter")
    assert answers(page, 1) == [asked_directly(house, "What do you see in this picture?", "demo.jpg")]


def test_the_page_fits_a_phone(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    send(page, "What do you see in this picture?", "demo.jpg")
    answers(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#question textarea").bounding_box()
    assert box is not None
    assert box["width"] > 150
    page.screenshot(path=str(tmp_path / "phone.png"), full_page=True)


# At the end, since it ends the server


def test_on_sigterm_running_answers_are_finished(house: Program) -> None:
    url = house.line("API ") + "/chat/completions"
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "ignore_eos": True}
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=180) as response:
        lines = response.iter_lines()
        next(lines)
        house.process.send_signal(signal.SIGTERM)
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    with pytest.raises(httpx.ConnectError):
        httpx.post(url, json=body)
    assert house.stop() == 0


@pytest.mark.slow
def test_a_supervisor_restarts_its_workers_and_stops_them() -> None:
    with Program("serve", "--num-workers", "2", "--port", "0", "--device", "cpu", "--no-page") as program:
        program.line("try ")
        address = program.line("API ").removesuffix("/v1")

        def workers() -> set[str]:
            page = httpx.get(f"{address}/metrics").text
            return set(re.findall(r'llava_worker_queue_length{worker="([^"]+)"}', page))

        def answer() -> str:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 5}
            return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=180).json()["choices"][0]["message"][
                "content"
            ]

        first = wait_until(lambda: len(workers()) == 2 and workers(), seconds=120)
        told = answer()
        children = psutil.Process(program.process.pid).children()
        assert len(children) == 2
        children[0].kill()
        assert answer() == told
        wait_until(lambda: len(workers() - first) == 1, seconds=120)
        assert answer() == told
        assert program.stop(seconds=60) == 0
    assert not [child for child in children if child.is_running()]
