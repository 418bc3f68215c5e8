"""The parts of the web page and their event handlers, in Gradio.

In: Gradio's events. Out: new values of the page's parts. The state of a conversation is a list of `PageTurn`s, from which all
that is shown is derived; the browser remembers it (history.py). Requests to servers are in client.py, what protects the page in
middleware.py.
"""

from __future__ import annotations

import asyncio
import html
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.routing import Mount

from llava.assets import EMBEDDED_INTRODUCTION, EMBEDDED_MODEL
from llava.conversation import Conversation, get_template
from llava.errors import InputError
from llava.images.video import is_video
from llava.serve.backends.base import ServerBusyError
from llava.serve.http.app import background
from llava.serve.http.limits import ServeLimits
from llava.serve.http.middleware import AccessPolicy
from llava.serve.web.blocks import PageBlocks
from llava.serve.web.client import (
    MAX_NEW_TOKENS,
    AnswerStats,
    ConversationLog,
    PageClient,
    PageSettings,
    PageTurn,
)
from llava.serve.web.history import copy_of, restored, stored
from llava.serve.web.middleware import PageMiddleware, visitor_of
from llava.serve.web.visitors import VisitorLimits, Visitors

EXAMPLES_FOLDER = Path(__file__).parent / "examples"
EXAMPLES = [
    ("What do you see in this picture?", ["demo.jpg"]),
    ("How many hearts are there?", ["counting.png"]),
    ("What is written here?", ["reading.png"]),
]
EXAMPLE_VALUES = [{"text": text, "files": [str(EXAMPLES_FOLDER / name) for name in names]} for text, names in EXAMPLES]
IMAGE_MODES = ["Default", "Pad", "Resize", "Crop"]
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1280px !important; margin: auto !important}
#chat img {max-height: 150px; width: auto; object-fit: contain}
#examples img {max-height: 56px; width: auto}
#chat [aria-label="Share"], #chat [title="Share"] {display: none}
#question textarea {font-size: 1rem}
#about {opacity: 0.7; font-size: 0.85rem}
#inspect table {width: 100%}
#inspect th, #inspect td {padding: 4px 8px; white-space: nowrap; word-break: normal}
@media (max-width: 640px) {
  .gradio-container, .gradio-container > main {padding: 8px !important}
  #chat {height: 62vh !important}
}
"""
NO_STATS = "Nothing yet."
INTRODUCTION = "Ask about images and videos: drop or paste one or several into the box, write a question, press Enter."
MAX_SYSTEM = 20_000  # characters
MAX_WAITING = 512  # events that wait for their turn
STORAGE = "llava-page"  # the browser's memory; Gradio scrambles it with this word, which is no secret

Value = str | float | None  # of one of the settings
Update = tuple[
    object, object, object, object, object
]  # question, conversation, turns, statistics, the browser's memory
UNCHANGED: Update = (gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip())


@dataclass(frozen=True)
class Page:
    """What a page needs: the servers, the log, and who may see it within which limits."""

    servers: PageClient
    log: ConversationLog
    reload_models: bool = True  # ask for the models at each visit, not once
    access: AccessPolicy = field(default_factory=AccessPolicy)
    limits: ServeLimits = field(default_factory=ServeLimits)

    @classmethod
    def over(
        cls,
        address: str,
        *,
        log_dir: str | None = None,
        reload_models: bool = True,
        access: AccessPolicy | None = None,
        limits: ServeLimits | None = None,
        uds: str | None = None,
    ) -> Page:
        folder = Path(log_dir) if log_dir else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        access, limits = access or AccessPolicy(), limits or ServeLimits()
        client = PageClient(address, limits, access.memory, uds=uds)
        return cls(client, ConversationLog(folder), reload_models, access, limits)


def mount(app: FastAPI, page: Page, path: str, *, embed: bool = False, concurrency: int = 16) -> FastAPI:
    """Add the page to an application, and return the application. Other sites may show it in a frame where `embed`
    says so and the access policy names them."""
    max_file_bytes = max(page.limits.images.max_bytes, page.limits.videos.max_bytes)
    visitor_limits = VisitorLimits(max_file_bytes=max_file_bytes)
    visitors = Visitors(Path(get_upload_folder()), page.access.memory, visitor_limits)
    gr.set_static_paths([EXAMPLES_FOLDER])  # served from where they are, and not copied
    blocks = build_page(page, visitors, embed=embed)
    blocks.queue(default_concurrency_limit=concurrency, api_open=False, max_size=MAX_WAITING)
    system = ["system-ui", "sans-serif"]
    gr.mount_gradio_app(
        app,
        blocks,
        path=path,
        css=CSS,
        theme=gr.themes.Soft(font=system, font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        show_error=False,
        max_file_size=max_file_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
    )
    # Gradio checks the paths in a visitor's data only once this is set, and only launch() sets it: without it, any file that
    # the server can read is copied to where a visitor can fetch it.
    blocks.has_launched = True
    mounted = next(route for route in app.routes if isinstance(route, Mount) and route.path == path.rstrip("/"))

    def end_session(session: str) -> None:
        """Drop what Gradio keeps of a page that is closed."""
        blocks.state_holder.session_data.pop(session, None)
        blocks.state_holder.time_last_used.pop(session, None)
        blocks._queue.pending_messages_per_session.pop(session, None)

    mounted.app = middleware = PageMiddleware(
        mounted.app,
        visitors,
        page.access.keys,
        examples=EXAMPLES_FOLDER,
        num_inputs={number: len(event.inputs) for number, event in blocks.fns.items()},
        framed_by=page.access.cross_origin.origins if embed else (),
        end_session=end_session,
    )
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with inner(app), background(middleware.tidy()):
            try:
                yield
            finally:
                visitors.close()
                page.limits.decoder.close()

    app.router.lifespan_context = lifespan
    return app


def build_page(page: Page, visitors: Visitors, *, embed: bool = False) -> gr.Blocks:
    with PageBlocks(title="LLaVA", analytics_enabled=False, fill_height=True) as blocks:
        turns = gr.State([])
        memory = gr.BrowserState([], storage_key=f"{STORAGE}-conversation", secret=STORAGE)
        remembered = gr.BrowserState([], storage_key=f"{STORAGE}-settings", secret=STORAGE)
        if not embed:
            gr.Markdown(f"# LLaVA\n{INTRODUCTION}")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(
                    elem_id="chat",
                    label="Conversation",
                    height="58vh",
                    editable="user",
                    group_consecutive_messages=False,  # Gradio cannot edit a question that is grouped with its image
                    buttons=["copy"],
                    feedback_options=["Like", "Dislike", "Report"],
                    placeholder="Your conversation will be here.",
                )
                question = gr.MultimodalTextbox(
                    elem_id="question",
                    file_types=["image", "video"],
                    file_count="multiple",
                    sources=["upload"],
                    placeholder="Ask, and add images or a video",
                    show_label=False,
                    autofocus=not embed,
                )
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop", size="sm", min_width=80)
                    regenerate = gr.Button("Regenerate", elem_id="regenerate", size="sm", min_width=80)
                    clear = gr.Button("Clear", elem_id="clear", size="sm", min_width=80)
                examples = gr.Dataset(
                    components=[question],
                    samples=[[value] for value in EXAMPLE_VALUES],
                    type="index",
                    label="Examples",
                    elem_id="examples",
                )
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown([], label="Model", elem_id="model", interactive=True)
                about = gr.Markdown("", elem_id="about", visible=False)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    temperature = gr.Slider(0.0, 2.0, value=0.2, step=0.05, label="Temperature", info="0: greedy")
                    top_p = gr.Slider(0.05, 1.0, value=0.7, step=0.05, label="Top P")
                    max_new_tokens = gr.Slider(16, 1536, value=512, step=16, label="Max output tokens")
                    image_mode = gr.Radio(IMAGE_MODES, value="Default", label="Images that are not square")
                    system = gr.Textbox(
                        label="System", lines=2, placeholder="the model's own", elem_id="system", max_length=MAX_SYSTEM
                    )
                    key = gr.Textbox(
                        label="API key",
                        type="password",
                        info="only where the server needs one",
                        value="",
                        visible=not page.access.keys,  # else visitors have logged in with theirs
                    )
                with gr.Accordion("What the model saw", open=True, elem_id="inspect-panel"):
                    inspect = gr.Markdown(NO_STATS, elem_id="inspect")

        chosen = [model, temperature, top_p, max_new_tokens, image_mode, key, system]
        kept = [temperature, top_p, max_new_tokens, image_mode, system, model]
        shown = [question, chat, turns, inspect, memory]

        async def frames_of(request: gr.Request, files: Sequence[str]) -> tuple[str, ...]:
            """Keep an image of the frames of each video, and return their paths."""
            visitor, kept = visitor_of(request.request), list[str]()
            for file in files:
                overview = await asyncio.to_thread(page.servers.overview, file)
                try:
                    path = visitors.keep(visitor, "frames.jpg", overview) if visitor and overview else ""
                except (InputError, ServerBusyError):
                    path = ""
                kept.append(str(path))
            return tuple(kept)

        async def ask(
            request: gr.Request, message: dict[str, Any], past: list[PageTurn], *values: Value
        ) -> AsyncIterator[Update]:
            text, files = (message["text"] or "").strip(), tuple(message["files"] or ())
            if not text and not files:
                gr.Info("Write a question, or drop an image.")
                yield UNCHANGED
                return
            if any(Path(file).parent == EXAMPLES_FOLDER for file in files):
                past = []  # an example is about its image alone
            turn = PageTurn(text, files, frames=await frames_of(request, files))
            async for state in _answer(page, [*past, turn], _settings(values, request), request):
                yield state

        async def again(request: gr.Request, past: list[PageTurn], *values: Value) -> AsyncIterator[Update]:
            if not past:
                gr.Info("There is nothing to answer again yet.")
                yield UNCHANGED
                return
            turn = replace(past[-1], answer=None, failed=False)
            async for state in _answer(page, [*past[:-1], turn], _settings(values, request), request):
                yield state

        async def edit(
            request: gr.Request, edited: gr.EditData, past: list[PageTurn], *values: Value
        ) -> AsyncIterator[Update]:
            number = _turn_at(past, edited.index)
            if number is None:
                yield UNCHANGED
                return
            turn = replace(past[number], question=html.unescape(str(edited.value)), answer=None, failed=False)
            async for state in _answer(page, [*past[:number], turn], _settings(values, request), request):
                yield state

        async def retry(
            request: gr.Request, at: gr.RetryData, past: list[PageTurn], *values: Value
        ) -> AsyncIterator[Update]:
            number = _turn_at(past, at.index)
            async for state in again(request, past[: (number or 0) + 1], *values):
                yield state

        def vote(request: gr.Request, data: gr.LikeData, past: list[PageTurn], *values: Value) -> None:
            kind = {True: "upvote", False: "downvote", "Report": "flag"}.get(data.liked)
            number = _turn_at(past, data.index)
            if kind is not None and number is not None:
                settings = _settings(values, request)
                page.log.write(kind, past[: number + 1], settings, _template(page, settings), ip=_address(request))
                gr.Info("Thank you for your vote.")

        async def enter(request: gr.Request, conversation: object, settings: object) -> tuple[object, ...]:
            """Begin a visit: the models, and what the browser remembers."""
            visitor = visitor_of(request.request)

            def keep(data: bytes) -> str:
                if visitor is None:
                    raise InputError("there is no visitor")
                return str(visitors.keep(visitor, "image.jpg", data))

            try:
                past = restored(conversation, keep)
            except ServerBusyError:
                past = []
            chosen_before = _remembered(settings)
            models, introduction = await _models(page, visitor.key if visitor else "", chosen_before[-1])
            return models, introduction, _messages(past), past, *chosen_before[:-1]

        async def load(request: gr.Request, value: str, name: str | None) -> tuple[object, object]:
            visitor = visitor_of(request.request)
            return await _models(page, value or (visitor.key if visitor else ""), name)

        running: list[Any] = [
            question.submit(ask, [question, turns, *chosen], shown),
            regenerate.click(again, [turns, *chosen], shown),
            chat.edit(edit, [turns, *chosen], shown),
            chat.retry(retry, [turns, *chosen], shown),
        ]
        # gr.Examples would do this with addresses that lack the prefix of the page.
        examples.click(lambda number: EXAMPLE_VALUES[number], [examples], [question], show_progress="hidden")
        stop.click(None, None, None, cancels=running)
        gr.on([clear.click, chat.clear], lambda: (None, [], [], NO_STATS, []), None, shown, cancels=running)
        chat.like(vote, [turns, *chosen], None)
        gr.on([key.submit, key.blur], load, [key, model], [model, about])
        model.input(lambda name: _introduction(name), [model], [about])
        changes = [
            temperature.release,
            top_p.release,
            max_new_tokens.release,
            image_mode.input,
            system.blur,
            model.input,
        ]
        gr.on([*changes, question.submit], None, kept, remembered, js="(...values) => [values]")
        blocks.load(enter, [memory, remembered], [model, about, chat, turns, *kept[:-1]])
    return blocks


async def _answer(
    page: Page, turns: list[PageTurn], settings: PageSettings, request: gr.Request
) -> AsyncIterator[Update]:
    """Yield updates of the page while the last turn is answered."""
    started = time.time()
    yield None, _messages(turns), turns, gr.skip(), gr.skip()
    stats: object = gr.skip()
    async for partial in page.servers.answer(turns, settings):
        turns = [*turns[:-1], replace(turns[-1], answer=partial.answer, failed=partial.failed)]
        if partial.stats:
            stats = describe(partial.stats)
        yield gr.skip(), _messages(turns), turns, stats, gr.skip()
    turns = await asyncio.to_thread(_with_copies, page, turns)
    urls = {path: url for turn in turns for path, url in zip(turn.images, turn.copies, strict=False)}
    shown = _messages(turns) if "" in urls.values() else gr.skip()
    yield gr.skip(), shown, turns, gr.skip(), stored(turns, lambda path: urls.get(path, ""))
    times = {"start": round(started, 4), "finish": round(time.time(), 4)}
    page.log.write("chat", turns, settings, _template(page, settings), **times, ip=_address(request))


def _with_copies(page: Page, turns: Sequence[PageTurn]) -> list[PageTurn]:
    """Make the copies of images that the browser will remember; an image that cannot be opened has an empty one."""

    def copy(path: str) -> str:
        if is_video(path):
            return ""
        reservation = page.access.memory.reserve()
        try:
            return copy_of(page.servers.open_image(path, reservation))
        except (InputError, ServerBusyError):
            return ""
        finally:
            reservation.release()

    return [
        turn
        if len(turn.copies) == len(turn.images)
        else replace(turn, copies=tuple(copy(path) for path in turn.images))
        for turn in turns
    ]


def _template(page: Page, settings: PageSettings) -> Conversation:
    """Return the template of the model for the log, and a plain one where the server names none that is known."""
    try:
        return page.servers.template(settings.model)
    except InputError:
        return get_template("v1")


def _settings(values: Sequence[Value], request: gr.Request) -> PageSettings:
    model, temperature, top_p, max_new_tokens, image_mode, key, system = values
    visitor = visitor_of(request.request)
    numbers = float(temperature or 0), float(top_p or 1), int(max_new_tokens or 0)
    used_key = str(key or "") or (visitor.key if visitor else "")
    return PageSettings(str(model or ""), *numbers, str(image_mode), used_key, str(system or ""))


def _remembered(values: object) -> list[object]:
    """Return updates of the settings from what a browser remembers: five parts, and the name of the model."""
    checks: list[Callable[[object], bool]] = [
        lambda value: isinstance(value, (int, float)) and 0 <= value <= 2,
        lambda value: isinstance(value, (int, float)) and 0.05 <= value <= 1,
        lambda value: isinstance(value, (int, float)) and 16 <= value <= MAX_NEW_TOKENS,
        lambda value: value in IMAGE_MODES,
        lambda value: isinstance(value, str) and len(value) <= MAX_SYSTEM,
        lambda value: isinstance(value, str),
    ]
    given = values if isinstance(values, list) and len(values) == len(checks) else [None] * len(checks)
    found = [value if check(value) else None for value, check in zip(given, checks, strict=True)]
    return [gr.skip() if value is None else gr.update(value=value) for value in found[:-1]] + [found[-1]]


async def _models(page: Page, key: str, name: object) -> tuple[object, object]:
    """Return the choice of models, of which the one named is kept where it is there, and its introduction."""
    try:
        names = await page.servers.models(key, again=page.reload_models)
    except InputError as error:
        gr.Warning(str(error))
        names = []
    chosen = name if name in names else names[0] if names else None
    return gr.Dropdown(choices=names, value=chosen), _introduction(chosen)


def _introduction(name: object) -> object:
    text = EMBEDDED_INTRODUCTION.format(command="serve")
    return gr.update(value=text[:1].upper() + text[1:], visible=name == EMBEDDED_MODEL)


def _messages(turns: Sequence[PageTurn]) -> list[dict[str, Any]]:
    """Return the conversation as Gradio's messages."""
    rows: list[dict[str, Any]] = []
    for turn in turns:
        copies = turn.copies or ("unknown",) * len(turn.images)
        frames = turn.frames or ("",) * len(turn.images)
        rows += [
            {"role": "user", "content": _shown_image(frame or path, is_image=bool(frame or copy))}
            for path, copy, frame in zip(turn.images, copies, frames, strict=False)
        ]
        if turn.question:
            rows.append({"role": "user", "content": _without_tags(turn.question)})
        if turn.answer is not None:
            answer = _without_tags(turn.answer)
            rows.append({"role": "assistant", "content": f"⚠️ {answer}" if turn.failed else answer})
    return rows


def _shown_image(path: str, *, is_image: bool) -> dict[str, str] | str:
    """Return what shows an image, or the name of one that nothing can show."""
    if is_image and Path(path).is_file() and not is_video(path):
        return {"path": path}
    return f"*{Path(path).name}*" if Path(path).is_file() else f"*{Path(path).name}, which is not kept any more*"


def _without_tags(text: str) -> str:
    """Escape what Markdown takes for tags, as `<image>`, and for images of other sites, outside of code."""
    parts = re.split(r"(```.*?(?:```|$)|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(
        part if number % 2 else part.replace("<", "&lt;").replace("![", "!\\[") for number, part in enumerate(parts)
    )


def _turn_at(turns: Sequence[PageTurn], index: int | Sequence[int]) -> int | None:
    """Return the number of the turn whose message is shown at `index`; None: it is not there any more."""
    index = index[0] if isinstance(index, Sequence) else index
    for number in range(len(turns)):
        if index < len(_messages(turns[: number + 1])):
            return number
    gr.Info("That message is not there any more.")
    return None


def _address(request: gr.Request) -> str | None:
    return request.client.host if request is not None and request.client else None


def describe(stats: AnswerStats) -> str:
    """Return what an answer took, as a Markdown table of its images and a few lines."""
    usage, seen = stats["usage"], stats["inspect"]
    details = usage["prompt_tokens_details"]
    lines = []
    if seen["images"]:
        lines = ["| image | tiles | tokens |", "| --- | --- | ---: |"]
        for image in seen["images"]:
            grid = f"1 + {image['grid'][0]} × {image['grid'][1]}" if image["grid"] else str(image["tiles"])
            lines.append(f"| {image['width']} × {image['height']} | {grid} | {image['tokens']} |")
        lines.append("")
    if seen.get("videos"):
        lines += ["| frames of a video | tokens |", "| --- | ---: |"]
        lines += [f"| {video['frames']} | {video['tokens']} |" for video in seen["videos"]] + [""]
    first, total = seen["first_token_s"], seen["total_s"]
    kinds = f"{details['text_tokens']} of text, {details['image_tokens']} of images"
    lines.append(f"- {usage['prompt_tokens']} tokens read: {kinds}; {details['cached_tokens']} were in the cache")
    lines.append(f"- {usage['completion_tokens']} tokens written in {total:.2f} s")
    if first is not None:
        lines.append(f"- the first after {first:.2f} s")
        if total > first:
            lines.append(f"- then {(usage['completion_tokens'] - 1) / (total - first):.1f} tokens per second")
    return "\n".join(lines)
