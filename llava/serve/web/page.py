"""How the web page looks and what its parts do, in Gradio.

In: clicks and typing, as Gradio's events. Out: the states of the page. What it asks of servers is client.py; the state of a
conversation is a list of `Turn`s, of which all that is shown is made anew each time.
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

from llava.errors import InputError
from llava.serve.web.client import ConversationLog, Servers, Settings, Turn

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
KEPT_S = (3600, 86_400)  # every hour, visitors' images that are a day old are deleted
NOTHING_SEEN = "Nothing yet."
INTRODUCTION = "Ask about images: drop or paste one or several into the box, write a question, press Enter."


@dataclass(frozen=True)
class Page:
    """What a page stands on."""

    servers: Servers
    log: ConversationLog
    reload_models: bool = True

    @classmethod
    def over(cls, address: str, *, log_dir: str | None = None, reload_models: bool = True) -> Page:
        folder = Path(log_dir) if log_dir else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return cls(Servers(address), ConversationLog(folder), reload_models)


def mount(app: Any, page: Page, path: str, *, embed: bool = False, concurrency: int = 16) -> Any:
    """Add the page to an application."""
    blocks = build_page(page, embed=embed)
    blocks.queue(default_concurrency_limit=concurrency, api_open=False)
    system = ["system-ui", "sans-serif"]
    return gr.mount_gradio_app(
        app,
        blocks,
        path=path,
        css=CSS,
        theme=gr.themes.Soft(font=system, font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        show_error=False,
        max_file_size="20mb",
        ssr_mode=False,
        enable_monitoring=False,
    )


def build_page(page: Page, *, embed: bool = False) -> Any:
    examples = Path(__file__).parent / "examples"
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
                    [[{"text": text, "files": [str(examples / name) for name in names]}] for text, names in EXAMPLES],
                    [question],
                    label="Examples",
                    elem_id="examples",
                )
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown([], label="Model", elem_id="model", interactive=True)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    temperature = gr.Slider(
                        0.0, 2.0, value=0.2, step=0.05, label="Temperature", info="0: always the likeliest"
                    )
                    top_p = gr.Slider(0.05, 1.0, value=0.7, step=0.05, label="Top P")
                    max_new_tokens = gr.Slider(16, 1536, value=512, step=16, label="Max output tokens")
                    image_mode = gr.Radio(IMAGE_MODES, value="Default", label="Images that are not square")
                    key = gr.Textbox(label="API key", type="password", info="only where the server wants one", value="")
                with gr.Accordion("What the model saw", open=True, elem_id="inspect-panel"):
                    inspect = gr.Markdown(NOTHING_SEEN, elem_id="inspect")

        chosen = [model, temperature, top_p, max_new_tokens, image_mode, key]
        shown = [question, chat, turns, inspect]

        async def ask(request: gr.Request, message: dict[str, Any], past: list[Turn], *values: Any) -> Any:
            text, files = (message["text"] or "").strip(), tuple(message["files"] or ())
            if not text and not files:
                gr.Info("Write a question, or drop an image.")
                yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
                return
            async for state in _answer(page, [*past, Turn(text, files)], _settings(values), request):
                yield state

        async def again(request: gr.Request, past: list[Turn], *values: Any) -> Any:
            if not past:
                gr.Info("There is nothing to answer again yet.")
                yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
                return
            turn = replace(past[-1], answer=None, failed=False)
            async for state in _answer(page, [*past[:-1], turn], _settings(values), request):
                yield state

        async def edit(request: gr.Request, edited: gr.EditData, past: list[Turn], *values: Any) -> Any:
            number = _turn_at(past, edited.index)
            turn = replace(past[number], question=html.unescape(str(edited.value)), answer=None, failed=False)
            async for state in _answer(page, [*past[:number], turn], _settings(values), request):
                yield state

        async def retry(request: gr.Request, at: gr.RetryData, past: list[Turn], *values: Any) -> Any:
            number = _turn_at(past, at.index)
            async for state in again(request, past[: number + 1], *values):
                yield state

        def vote(request: gr.Request, data: gr.LikeData, past: list[Turn], *values: Any) -> None:
            kind = {True: "upvote", False: "downvote", "Report": "flag"}.get(data.liked)
            if kind is not None:
                settings = _settings(values)
                number = _turn_at(past, data.index)
                page.log.write(
                    kind, past[: number + 1], settings, page.servers.template(settings.model), ip=_address(request)
                )
                gr.Info("Thank you for your vote.")

        async def load() -> Any:
            return await _models(page, "")

        async def reload(value: str) -> Any:
            return await _models(page, value)

        running: list[Any] = [
            question.submit(ask, [question, turns, *chosen], shown),
            regenerate.click(again, [turns, *chosen], shown),
            chat.edit(edit, [turns, *chosen], shown),
            chat.retry(retry, [turns, *chosen], shown),
        ]
        stop.click(None, None, None, cancels=running)
        gr.on([clear.click, chat.clear], lambda: (None, [], [], NOTHING_SEEN), None, shown, cancels=running)
        chat.like(vote, [turns, *chosen], None)
        key.submit(reload, [key], [model])
        key.blur(reload, [key], [model])
        blocks.load(load, None, [model])
    return blocks


async def _answer(page: Page, turns: list[Turn], settings: Settings, request: Any) -> AsyncIterator[Any]:
    """The states of the page while the last turn is being answered: box, conversation, turns, inspection."""
    started = time.time()
    yield None, _messages(turns), turns, gr.skip()
    inspection: Any = gr.skip()
    async for piece in page.servers.answer(turns, settings):
        turns = [*turns[:-1], replace(turns[-1], answer=piece.answer, failed=piece.failed)]
        if piece.cost:
            inspection = describe(piece.cost)
        yield gr.skip(), _messages(turns), turns, inspection
    page.log.write(
        "chat",
        turns,
        settings,
        page.servers.template(settings.model),
        start=round(started, 4),
        finish=round(time.time(), 4),
        ip=_address(request),
    )


def _settings(values: Sequence[Any]) -> Settings:
    model, temperature, top_p, max_new_tokens, image_mode, key = values
    return Settings(str(model or ""), float(temperature), float(top_p), int(max_new_tokens), image_mode, key or "")


async def _models(page: Page, key: str) -> Any:
    try:
        names = await page.servers.models(key)
    except InputError as error:
        gr.Warning(str(error))
        names = []
    return gr.Dropdown(choices=names, value=names[0] if names else None)


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The conversation as Gradio shows it."""
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
    """Markdown in which a < is a character and begins no tag: `<image>` would be taken for an image. Code is left alone."""
    parts = re.split(r"(```.*?(?:```|$)|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def _turn_at(turns: Sequence[Turn], index: Any) -> int:
    """The turn that a message shown at `index` belongs to."""
    index = index[0] if isinstance(index, (list, tuple)) else int(index)
    for number in range(len(turns)):
        if index < len(_messages(turns[: number + 1])):
            return number
    raise InputError("that message is not there any more")


def _address(request: Any) -> str | None:
    return request.client.host if request is not None and request.client else None


def describe(cost: dict[str, Any]) -> str:
    """What an answer cost, as a table of its images and a few lines."""
    usage, seen = cost["usage"], cost["inspect"]
    details = usage["prompt_tokens_details"]
    lines = []
    if seen["images"]:
        lines = ["| image | tiles | tokens |", "| --- | --- | ---: |"]
        for image in seen["images"]:
            grid = f"1 + {image['grid'][0]} × {image['grid'][1]}" if image["grid"] else str(image["tiles"])
            lines.append(f"| {image['width']} × {image['height']} | {grid} | {image['tokens']} |")
        lines.append("")
    first, total = seen["first_token_s"], seen["total_s"]
    read = (
        f"{usage['prompt_tokens']} tokens read: {details['text_tokens']} of text, {details['image_tokens']} of images"
    )
    lines.append(f"- {read}; {details['cached_tokens']} were in the cache")
    lines.append(f"- {usage['completion_tokens']} tokens written in {total:.2f} s")
    if first is not None:
        lines.append(f"- the first after {first:.2f} s")
        if total > first:
            lines.append(f"- then {(usage['completion_tokens'] - 1) / (total - first):.1f} tokens per second")
    return "\n".join(lines)
