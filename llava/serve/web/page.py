"""The parts of the web page and their event handlers, in Gradio.

In: Gradio's events. Out: new values of the page's parts. The state of a conversation is a list of `PageTurn`s, from which all
that is shown is derived. Requests to servers are in client.py.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from llava.errors import InputError
from llava.serve.web.client import AnswerStats, ConversationLog, PageClient, PageSettings, PageTurn

EXAMPLES_FOLDER = Path(__file__).parent / "examples"
EXAMPLES = [
    ("What do you see in this picture?", ["demo.jpg"]),
    ("How many shapes are there?", ["counting.png"]),
    ("What is written here?", ["reading.png"]),
]
IMAGE_MODES = ["Default", "Pad", "Resize", "Crop"]
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1280px !important; margin: auto !important}
#chat img {max-height: 150px; width: auto; object-fit: contain}
#examples img {max-height: 56px; width: auto}
#chat [aria-label="Share"], #chat [title="Share"] {display: none}
#question textarea {font-size: 1rem}
#inspect table {width: 100%}
#inspect th, #inspect td {padding: 4px 8px; white-space: nowrap; word-break: normal}
@media (max-width: 640px) {
  .gradio-container, .gradio-container > main {padding: 8px !important}
  #chat {height: 62vh !important}
}
"""
KEPT_S = (3600, 86_400)  # every hour, delete visitors' images that are a day old
NO_STATS = "Nothing yet."
INTRODUCTION = "Ask about images: drop or paste one or several into the box, write a question, press Enter."

Value = str | float | None  # of one of the settings
Update = tuple[object, object, object, object]  # question, conversation, turns, statistics


@dataclass(frozen=True)
class Page:
    """What a page needs: the servers and the log."""

    servers: PageClient
    log: ConversationLog
    reload_models: bool = True

    @classmethod
    def over(cls, address: str, *, log_dir: str | None = None, reload_models: bool = True) -> Page:
        folder = Path(log_dir) if log_dir else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return cls(PageClient(address), ConversationLog(folder), reload_models)


def mount(app: FastAPI, page: Page, path: str, *, embed: bool = False, concurrency: int = 16) -> FastAPI:
    """Add the page to an application, and return the application."""
    blocks = build_page(page, embed=embed)
    blocks.queue(default_concurrency_limit=concurrency, api_open=False)
    system = ["system-ui", "sans-serif"]
    app = gr.mount_gradio_app(
        app,
        blocks,
        path=path,
        allowed_paths=[str(EXAMPLES_FOLDER)],  # besides what visitors have uploaded
        css=CSS,
        theme=gr.themes.Soft(font=system, font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        show_error=False,
        max_file_size="20mb",
        ssr_mode=False,
        enable_monitoring=False,
    )
    # Gradio checks the paths in a visitor's data only once this is set, and only launch() sets it: without it, any file that
    # the server can read is copied to where a visitor can fetch it.
    blocks.has_launched = True
    return app


def build_page(page: Page, *, embed: bool = False) -> gr.Blocks:
    with gr.Blocks(title="LLaVA", analytics_enabled=False, fill_height=True, delete_cache=KEPT_S) as blocks:
        turns = gr.State([])
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
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"],
                    placeholder="Ask, and add images",
                    show_label=False,
                    autofocus=not embed,
                )
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop", size="sm", min_width=80)
                    regenerate = gr.Button("Regenerate", elem_id="regenerate", size="sm", min_width=80)
                    clear = gr.Button("Clear", elem_id="clear", size="sm", min_width=80)
                gr.Examples(
                    [
                        [{"text": text, "files": [str(EXAMPLES_FOLDER / name) for name in names]}]
                        for text, names in EXAMPLES
                    ],
                    [question],
                    label="Examples",
                    elem_id="examples",
                )
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown([], label="Model", elem_id="model", interactive=True)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    temperature = gr.Slider(0.0, 2.0, value=0.2, step=0.05, label="Temperature", info="0: greedy")
                    top_p = gr.Slider(0.05, 1.0, value=0.7, step=0.05, label="Top P")
                    max_new_tokens = gr.Slider(16, 1536, value=512, step=16, label="Max output tokens")
                    image_mode = gr.Radio(IMAGE_MODES, value="Default", label="Images that are not square")
                    key = gr.Textbox(label="API key", type="password", info="only where the server needs one", value="")
                with gr.Accordion("What the model saw", open=True, elem_id="inspect-panel"):
                    inspect = gr.Markdown(NO_STATS, elem_id="inspect")

        chosen = [model, temperature, top_p, max_new_tokens, image_mode, key]
        shown = [question, chat, turns, inspect]

        async def ask(
            request: gr.Request, message: dict[str, Any], past: list[PageTurn], *values: Value
        ) -> AsyncIterator[Update]:
            text, files = (message["text"] or "").strip(), tuple(message["files"] or ())
            if not text and not files:
                gr.Info("Write a question, or drop an image.")
                yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
                return
            async for state in _answer(page, [*past, PageTurn(text, files)], _settings(values), request):
                yield state

        async def again(request: gr.Request, past: list[PageTurn], *values: Value) -> AsyncIterator[Update]:
            if not past:
                gr.Info("There is nothing to answer again yet.")
                yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
                return
            turn = replace(past[-1], answer=None, failed=False)
            async for state in _answer(page, [*past[:-1], turn], _settings(values), request):
                yield state

        async def edit(
            request: gr.Request, edited: gr.EditData, past: list[PageTurn], *values: Value
        ) -> AsyncIterator[Update]:
            number = _turn_at(past, edited.index)
            turn = replace(past[number], question=html.unescape(str(edited.value)), answer=None, failed=False)
            async for state in _answer(page, [*past[:number], turn], _settings(values), request):
                yield state

        async def retry(
            request: gr.Request, at: gr.RetryData, past: list[PageTurn], *values: Value
        ) -> AsyncIterator[Update]:
            number = _turn_at(past, at.index)
            async for state in again(request, past[: number + 1], *values):
                yield state

        def vote(request: gr.Request, data: gr.LikeData, past: list[PageTurn], *values: Value) -> None:
            kind = {True: "upvote", False: "downvote", "Report": "flag"}.get(data.liked)
            if kind is not None:
                settings, voted = _settings(values), past[: _turn_at(past, data.index) + 1]
                page.log.write(kind, voted, settings, page.servers.template(settings.model), ip=_address(request))
                gr.Info("Thank you for your vote.")

        async def load(value: str = "") -> gr.Dropdown:
            return await _models(page, value)

        running: list[Any] = [
            question.submit(ask, [question, turns, *chosen], shown),
            regenerate.click(again, [turns, *chosen], shown),
            chat.edit(edit, [turns, *chosen], shown),
            chat.retry(retry, [turns, *chosen], shown),
        ]
        stop.click(None, None, None, cancels=running)
        gr.on([clear.click, chat.clear], lambda: (None, [], [], NO_STATS), None, shown, cancels=running)
        chat.like(vote, [turns, *chosen], None)
        key.submit(load, [key], [model])
        key.blur(load, [key], [model])
        blocks.load(load, None, [model])
    return blocks


async def _answer(
    page: Page, turns: list[PageTurn], settings: PageSettings, request: gr.Request
) -> AsyncIterator[Update]:
    """Yield updates of the page while the last turn is answered."""
    started = time.time()
    yield None, _messages(turns), turns, gr.skip()
    stats: object = gr.skip()
    async for partial in page.servers.answer(turns, settings):
        turns = [*turns[:-1], replace(turns[-1], answer=partial.answer, failed=partial.failed)]
        if partial.stats:
            stats = describe(partial.stats)
        yield gr.skip(), _messages(turns), turns, stats
    template, times = (
        page.servers.template(settings.model),
        {"start": round(started, 4), "finish": round(time.time(), 4)},
    )
    page.log.write("chat", turns, settings, template, **times, ip=_address(request))


def _settings(values: Sequence[Value]) -> PageSettings:
    model, temperature, top_p, max_new_tokens, image_mode, key = values
    numbers = float(temperature or 0), float(top_p or 1), int(max_new_tokens or 0)
    return PageSettings(str(model or ""), *numbers, str(image_mode), str(key or ""))


async def _models(page: Page, key: str) -> gr.Dropdown:
    try:
        names = await page.servers.models(key)
    except InputError as error:
        gr.Warning(str(error))
        names = []
    return gr.Dropdown(choices=names, value=names[0] if names else None)


def _messages(turns: Sequence[PageTurn]) -> list[dict[str, Any]]:
    """Return the conversation as Gradio's messages."""
    rows: list[dict[str, Any]] = []
    for turn in turns:
        rows += [{"role": "user", "content": {"path": path}} for path in turn.images]
        if turn.question:
            rows.append({"role": "user", "content": _without_tags(turn.question)})
        if turn.answer is not None:
            answer = _without_tags(turn.answer)
            rows.append({"role": "assistant", "content": f"⚠️ {answer}" if turn.failed else answer})
    return rows


def _without_tags(text: str) -> str:
    """Escape < outside of code, so that Markdown does not take `<image>` for a tag."""
    parts = re.split(r"(```.*?(?:```|$)|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def _turn_at(turns: Sequence[PageTurn], index: int | Sequence[int]) -> int:
    """Return the number of the turn whose message is shown at `index`."""
    index = index[0] if isinstance(index, Sequence) else index
    for number in range(len(turns)):
        if index < len(_messages(turns[: number + 1])):
            return number
    raise InputError("that message is not there any more")


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
    first, total = seen["first_token_s"], seen["total_s"]
    kinds = f"{details['text_tokens']} of text, {details['image_tokens']} of images"
    lines.append(f"- {usage['prompt_tokens']} tokens read: {kinds}; {details['cached_tokens']} were in the cache")
    lines.append(f"- {usage['completion_tokens']} tokens written in {total:.2f} s")
    if first is not None:
        lines.append(f"- the first after {first:.2f} s")
        if total > first:
            lines.append(f"- then {(usage['completion_tokens'] - 1) / (total - first):.1f} tokens per second")
    return "\n".join(lines)
