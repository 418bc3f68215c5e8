"""The web page in a real browser: what it remembers, what fails in it, what it loads, under a prefix, with a login."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from PIL import Image
from serve_kit import DEMO, make_greedy, running, worker
from starlette.types import ASGIApp, Receive, Scope, Send

import llava
from llava.files import script_json
from llava.serve.backends.in_process import EngineBackend
from llava.serve.http.keys import ApiKeys
from llava.serve.http.middleware import AccessPolicy
from llava.serve.web.client import PageTurn

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
BOX = "#question textarea"
BOT = "#chat [data-testid=bot]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def served(address: str, *, prefix: str = "", keys: tuple[str, ...] = (), log_dir: Path | None = None) -> Iterator[str]:
    """The page over a server, at /page below a prefix, as behind a proxy that says it."""
    from llava.serve.web.page import Page, mount

    access = AccessPolicy(keys=ApiKeys(keys))
    app = mount(FastAPI(), Page.over(address, access=access, log_dir=str(log_dir) if log_dir else None), "/page")
    with running(below(prefix, app) if prefix else app) as place:
        yield f"{place}{prefix}/page/"


@contextlib.contextmanager
def visit(browser: Any) -> Iterator[Any]:
    """A page of a new visitor. It must be closed before its server is, which waits for open connections."""
    context = browser.new_context()
    try:
        context.set_default_timeout(20_000)
        yield context.new_page()
    finally:
        context.close()


def below(prefix: str, app: ASGIApp) -> ASGIApp:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if not scope["path"].startswith(prefix + "/"):
                await Response("outside", 404)(scope, receive, send)
                return
            scope = {**scope, "root_path": prefix}
        await app(scope, receive, send)

    return application


def ready(page: Any) -> None:
    page.wait_for_function("document.querySelector('#model input')?.value")


def ask(page: Any, text: str, *, image: Path | None = None) -> str:
    """Ask, and return the answer when it is complete."""
    answers = page.locator(BOT).count()
    if image is not None:
        page.set_input_files("#question input[type=file]", str(image))
        page.wait_for_selector(
            "#question [data-testid='multimodal-textbox'] img, #question img, #question .thumbnail-item"
        )
    page.fill(BOX, text)
    page.press(BOX, "Enter")
    page.wait_for_function(f"document.querySelectorAll({BOT!r}).length > {answers}")
    page.wait_for_function("!document.querySelector('#chat .pending, #chat .generating')")
    page.wait_for_timeout(400)
    return page.locator(BOT).last.inner_text()


@pytest.mark.slow
def test_a_conversation_and_the_settings_survive_a_reload(address: str, browser: Any) -> None:
    with served(address) as place, visit(browser) as page:
        page.goto(place)
        ready(page)
        assert "the model in the package" in page.inner_text("#about")
        make_greedy(page)
        page.fill("#system textarea", "A chat about pictures.")
        page.locator("#system textarea").blur()
        answer = ask(page, "What colour is the star?", image=DEMO)
        assert "yellow" in answer
        page.wait_for_function("localStorage.getItem('llava-page-conversation')?.length > 1000")
        page.reload()
        ready(page)
        page.wait_for_selector(BOT)
        assert "yellow" in page.locator(BOT).inner_text()
        page.wait_for_function("[...document.querySelectorAll('#chat img')].some(image => image.naturalWidth > 100)")
        page.click("#settings button")
        assert page.locator("#system textarea").input_value() == "A chat about pictures."
        answer = ask(page, "And the circle?")  # the image is still there
        assert "red" in answer
        page.click("#clear")
        page.wait_for_function(f"document.querySelectorAll({BOT!r}).length == 0")
        page.wait_for_function("localStorage.getItem('llava-page-conversation').length < 200")
        page.reload()
        ready(page)
        page.wait_for_timeout(500)
        assert page.locator(BOT).count() == 0


@pytest.mark.slow
def test_every_failure_is_a_sentence_in_the_conversation(address: str, browser: Any, tmp_path: Path) -> None:
    """With a log: what cannot be opened is logged, too, and the page goes on."""
    broken, icon = tmp_path / "broken.png", tmp_path / "icon.png"
    broken.write_bytes(DEMO.read_bytes()[:500])
    Image.new("RGB", (16, 16)).save(icon, "ICO")
    logs = tmp_path / "logs"
    with served(address, log_dir=logs) as place, visit(browser) as page:
        page.goto(place)
        ready(page)
        for file, words in ((broken, "is a broken image"), (icon, "not decoded here")):
            answer = ask(page, "What is this?", image=file)
            assert words in answer
            assert f"'{file.name}'" in answer
            assert "/" not in answer  # no path of the server
            page.wait_for_function(f"document.querySelector('#chat').innerText.includes('{file.name}')")
        assert page.locator(".error, .toast-body.error").count() == 0
        assert "yellow" in ask(page, "What colour is the star?", image=DEMO)
        page.wait_for_timeout(300)
    (log,) = logs.glob("*-conv.json")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["type"] for row in rows] == ["chat"] * 3
    assert "broken image" in rows[0]["state"]["messages"][-1][1]


@pytest.mark.slow
def test_examples_are_shown_and_right_under_a_prefix(address: str, browser: Any) -> None:
    from llava.serve.web.page import EXAMPLES

    missing: list[str] = []
    with served(address, prefix="/some/prefix") as place, visit(browser) as page:
        page.on("response", lambda response: response.status >= 400 and missing.append(response.url))
        page.goto(place)
        ready(page)
        make_greedy(page)
        page.wait_for_function("[...document.querySelectorAll('#examples img')].length >= 3")
        page.wait_for_function("[...document.querySelectorAll('#examples img')].every(image => image.naturalWidth > 0)")
        rights = {"demo.jpg": ("star", "circle", "square"), "counting.png": ("five",), "reading.png": ("Swan",)}
        for number, (question, (name,)) in enumerate(EXAMPLES):
            page.locator("#examples .gallery-item").nth(number).click()
            page.wait_for_function(f"document.querySelector({BOX!r}).value == {json.dumps(question)}")
            page.press(BOX, "Enter")
            # An example begins a conversation.
            page.wait_for_function(f"document.querySelector('#chat')?.innerText.includes({question!r})")
            page.wait_for_function(f"document.querySelectorAll({BOT!r}).length == 1")
            page.wait_for_function("!document.querySelector('#chat .pending, #chat .generating, #inspect .generating')")
            answer = page.locator(BOT).last.inner_text()
            assert all(word in answer for word in rights[name]), (question, answer)
    assert [url for url in missing if "favicon" not in url and "manifest" not in url] == []


FORMS = [
    "![a](http://{0}/md)", "[![a](http://{0}/linked)](http://x)", "![a][r]\n\n[r]: http://{0}/ref", "<img src=http://{0}/img>",
    "`code` <img src=http://{0}/html>", "<a href=http://{0}/a ping=http://{0}/ping>x</a>", "<b style='background:url(http://{0}/css)'>x</b>",
    "<style>@import 'http://{0}/import'; body {{background: url(http://{0}/url)}}</style>",
    "<svg><image href=http://{0}/svg /></svg>",
    "<link rel=stylesheet href=http://{0}/link>", "<link rel=prefetch href=http://{0}/prefetch>", "<iframe src=http://{0}/frame></iframe>",
    "<img srcset='http://{0}/set 1x'>", "<video poster=http://{0}/poster src=http://{0}/video autoplay></video>", "<audio src=http://{0}/sound>",
    "<object data=http://{0}/object></object>", "<embed src=http://{0}/embed>", "<input type=image src=http://{0}/input>",
    "&lt;img src=http://{0}/entity&gt;", "&#60;img src=http://{0}/number&#62;", "<meta http-equiv=refresh content='0;http://{0}/refresh'>",
    "<form action=http://{0}/form><button>x</button></form>", "[x](javascript:fetch('http://{0}/script'))",
    "<script>fetch('http://{0}/fetch')</script>", "<img src=x onerror=\"fetch('http://{0}/error')\">", "```html\n<img src=http://{0}/fence>\n```",
    "`` ` <img src=x onerror=fetch('http://{0}/tick')> `` `<img src=http://{0}/tick2>", "~~~\n`\n~~~\n<b>`<img src=http://{0}/tilde>`</b>",
    "\\`<img src=http://{0}/escaped onerror=\"fetch('http://{0}/escaped2')\">\\`", "$\\includegraphics{{http://{0}/katex}}$",
    "$$\\href{{javascript:alert(1)}}{{x}}$$", "```mermaid\ngraph TD; A[\"<img src=http://{0}/mermaid>\"]\n```", "<!--><img src=http://{0}/comment>",
    "<math><mtext><img src=http://{0}/math></mtext></math>", "<table background=http://{0}/table><tr><td>x</table>", "http://{0}/bare",
]  # fmt: skip


def test_answers_load_nothing_from_other_sites(browser: Any) -> None:
    """A worker answers with everything that makes browsers load something; another site listens."""
    heard: list[str] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_response(200)
            self.send_header("access-control-allow-origin", "*")
            self.end_headers()

        do_POST = do_HEAD = do_OPTIONS = do_GET

        def log_message(self, *_: object) -> None:
            pass

    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    site = f"127.0.0.1:{other.server_port}"
    models = FastAPI()

    @models.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"data": [{"id": "m", "conv_mode": "v1"}]}

    @models.post("/get_worker_address")
    async def get_worker_address(request: Request) -> dict[str, str]:
        return {"address": str(request.base_url).rstrip("/")}

    @models.post("/worker_generate_stream")
    async def generate(request: Request) -> Response:
        text = (await request.json())["prompt"] + "\n\n".join(FORMS).format(site) + "\n\nThe end."
        return Response(json.dumps({"text": text, "error_code": 0}).encode() + b"\0")

    dialogs: list[str] = []
    asked: list[str] = []
    with running(models) as address, served(address) as place, visit(browser) as page:
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        response = page.goto(place)
        ready(page)
        answer = ask(page, "\n\n".join(FORMS[:3]).format(site))
        assert "The end." in answer
        page.wait_for_timeout(1500)
        assert page.locator("#chat a[href^='javascript']").count() == 0
        allowed = (place.partition("/page/")[0] + "/", "data:", "blob:")
        # Chromium reports what the policy stopped, too; what went out is what the other site heard.
        assert [url for url in asked if not url.startswith(allowed) and site not in url] == []
    other.shutdown()
    assert heard == []
    assert dialogs == []
    headers = response.headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_a_page_with_keys_asks_for_one(backend: EngineBackend, browser: Any) -> None:
    key = "a-key-of-the-tests"
    access = AccessPolicy(keys=ApiKeys((key,)))
    with worker(backend, access=access) as (address, _), served(address, keys=(key,)) as place, visit(browser) as page:
        page.goto(place)
        assert page.locator("#question").count() == 0
        page.fill("input[name=key]", "a-wrong-key")
        page.press("input[name=key]", "Enter")
        page.wait_for_function("document.body.innerText.includes('not a key')")
        page.fill("input[name=key]", key)
        page.press("input[name=key]", "Enter")
        ready(page)
        make_greedy(page)
        assert "yellow" in ask(page, "What colour is the star?", image=DEMO)
        page.reload()
        ready(page)  # still logged in


def test_text_in_a_report_ends_no_script(browser: Any, tmp_path: Path) -> None:
    """`<!--<script>` in the data of a page makes a browser pass over the end of the element that holds it."""
    hostile = "<!--<script> </script> --> <![CDATA[ \u2028 <img src=x onerror=alert(1)>"
    page = f"<script type='application/json' id='data'>{script_json({'text': hostile})}</script><p id='end'>end</p>"
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    with visit(browser) as tab:
        dialogs: list[str] = []
        tab.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        tab.goto(file.as_uri())
        assert tab.evaluate("JSON.parse(document.getElementById('data').textContent).text") == hostile
        assert tab.inner_text("#end") == "end"
    assert dialogs == []
    assert "<" not in script_json({"<": hostile})


def test_every_page_with_data_uses_the_same_escape() -> None:
    """Each template that holds data in a script element is filled by a module that calls `script_json`."""
    package = Path(llava.__file__).parent
    templates = [
        path for path in package.rglob("*.html") if 'type="application/json"' in path.read_text(encoding="utf-8")
    ]
    assert len(templates) >= 3
    for template in templates:
        fillers = [
            path
            for path in package.rglob("*.py")
            if re.search(rf'"{template.name}"', text := path.read_text(encoding="utf-8"))
            and ("DATA" in text or "{{" in text)
        ]
        assert fillers
        assert all("script_json(" in path.read_text(encoding="utf-8") for path in fillers), (template, fillers)


def test_what_a_browser_remembers_is_bounded_and_checked() -> None:
    from llava.serve.web.history import MAX_BYTES, copy_of, restored, stored

    copy = copy_of(Image.effect_noise((1200, 900), 80).convert("RGB"))
    turns = [PageTurn(f"{number}", (f"{number}.png",), "x" * 3000) for number in range(300)]
    rows = stored(turns, lambda path: copy)
    assert len(json.dumps(rows)) <= MAX_BYTES + 4 * len(rows)
    assert rows[-1]["images"] == [copy]
    assert rows[0]["images"] == [""]
    back = restored(json.loads(json.dumps(rows)), lambda data: f"{len(data)}")
    assert [turn.question for turn in back] == [row["question"] for row in rows]
    assert back[-1].images != ()
    hostile: list[object] = [
        None, "x", {"a": 1}, [1], [[]], [{}], [{"question": 1, "answer": "x", "images": []}],
        [{"question": "x", "answer": {}, "images": []}],
        [{"question": "x", "answer": "y", "images": "z"}],
    ]  # fmt: skip
    assert [restored(value, lambda data: "x") for value in hostile] == [[]] * len(hostile)
    assert restored(
        [{"question": "q", "answer": "a", "images": ["data:text/html,x", 3, "data:image/jpeg;base64,@@"]}],
        lambda data: "x",
    ) == [PageTurn("q", (), "a")]


@pytest.mark.slow
def test_a_video_is_shown_as_its_frames(browser: Any, tmp_path: Path) -> None:
    from video_kit import loaded, make_video

    clip = tmp_path / "clip.mp4"
    clip.write_bytes(make_video())
    backend = EngineBackend(loaded("rows"), name="tiny-video")
    try:
        with worker(backend) as (address, _), served(address) as place, visit(browser) as page:
            page.goto(place)
            ready(page)
            page.set_input_files("#question input[type=file]", str(clip))
            page.wait_for_selector("#question .thumbnail-item, #question video, #question [aria-label*=clip]")
            page.fill(BOX, "What happens?")
            page.press(BOX, "Enter")
            page.wait_for_selector("#inspect >> text=frames of a video")
            sheet = page.wait_for_selector("#chat img")
            page.wait_for_function("image => image.naturalWidth > 0", arg=sheet)
            assert sheet.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [1280, 480]
            assert page.locator("#inspect td").all_inner_texts()[:2] == ["32", "64"]
    finally:
        backend.engine.close()
