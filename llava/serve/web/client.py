"""The web page's requests to servers, and its log of conversations.

In: turns with images, a model's template, addresses. Out: the bodies that the original's page posts; answers as they stream
back; lines of a log. The parts of the page are in page.py.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from llava.chat_template import checked_template
from llava.conversation import (
    Conversation,
    conv_templates,
    conversation_from,
    get_template,
    web_conv_mode_for_model_name,
    web_stop_string,
    with_image_placeholders,
)
from llava.errors import InputError
from llava.images.io import load_image
from llava.serve.router.protocol import OK, ChunkReader

HEADERS = {"User-Agent": "LLaVA Client"}
MAX_NEW_TOKENS = 1536  # as in the original's page
CONNECT_S = 10.0


@dataclass(frozen=True)
class PageTurn:
    """A question with its images (files that the page keeps), and the answer so far."""

    question: str
    images: tuple[str, ...] = ()
    answer: str | None = None
    failed: bool = False  # the answer is an error message


@dataclass(frozen=True)
class PageSettings:
    """The visitor's settings."""

    model: str
    temperature: float = 0.2
    top_p: float = 0.7
    max_new_tokens: int = 512
    image_mode: str = "Default"
    key: str = ""  # for the servers, where they need one


def conversation_of(
    turns: Sequence[PageTurn], template: Conversation, image_mode: str
) -> tuple[Conversation, list[str]]:
    """Render turns, without failed ones, in a template; return the images too, in base64 and in their order."""
    conversation = template.copy()
    kept = [turn for turn in turns[:-1] if not turn.failed and turn.answer] + list(turns[-1:])
    images = [load_image(Path(path)) for turn in kept for path in turn.images]
    if len(images) == 1 and kept[0].images:  # the template decides where a single image goes
        question = kept[0].question
        text = question if "<image>" in question else f"{question}\n<image>"
        conversation.append_message(conversation.roles[0], (text, images[0], image_mode))
        conversation.append_message(conversation.roles[1], None)
        rest = kept[1:]
        conversation.messages[-1][1] = kept[0].answer if rest else None
    else:
        rest = kept
    for turn in rest:
        conversation.append_message(conversation.roles[0], with_image_placeholders(turn.question, len(turn.images)))
        conversation.append_message(conversation.roles[1], turn.answer)
    conversation.messages[-1][1] = None
    return conversation, [conversation.process_image(image, image_mode) for image in images]


def request_body(turns: Sequence[PageTurn], settings: PageSettings, template: Conversation) -> dict[str, Any]:
    """Return the body that the original's page posts to a worker."""
    conversation, images = conversation_of(turns, template, settings.image_mode)
    return {
        "model": settings.model,
        "prompt": conversation.get_prompt(),
        "temperature": float(settings.temperature),
        "top_p": float(settings.top_p),
        "max_new_tokens": min(int(settings.max_new_tokens), MAX_NEW_TOKENS),
        "stop": web_stop_string(conversation),
        "images": images,
    }


@dataclass(frozen=True)
class PartialAnswer:
    """The answer so far, or an error message; at the end what the answer took, where the worker reports it."""

    answer: str
    failed: bool = False
    stats: AnswerStats | None = None


AnswerStats = Mapping[str, Mapping[str, Any]]  # "usage" and "inspect", as in serve/openai/schema.py


class PageClient:
    """Requests to a controller, or to a single server that has a controller's routes."""

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._entries: dict[str, Mapping[str, object]] = {}

    async def models(self, key: str = "") -> list[str]:
        """Return the names of the models. A controller of the original is asked by its own routes."""
        async with self._client(key) as client:
            try:
                response = await client.get(f"{self._address}/v1/models")
                if response.status_code == 404:
                    await client.post(f"{self._address}/refresh_all_workers")
                    response = await client.post(f"{self._address}/list_models")
                    response.raise_for_status()
                    return sorted(response.json()["models"])
                if response.status_code == 401:
                    raise InputError("the server needs an API key; enter it in the settings")
                response.raise_for_status()
                entries = response.json()["data"]
            except (httpx.HTTPError, ValueError, KeyError) as error:
                raise InputError(f"the controller {self._address} does not answer: {error or type(error)}") from error
        self._entries.update({row["id"]: row for row in entries})
        return sorted(row["id"] for row in entries)

    def template(self, model: str) -> Conversation:
        """Return the template that the worker reported, else the one that the model's name implies."""
        entry = self._entries.get(model, {})
        own = entry.get("chat_template")
        if isinstance(own, Mapping):  # of the model's folder, which lies elsewhere
            tokens = own.get("special_tokens")
            names = {str(key): str(value) for key, value in tokens.items()} if isinstance(tokens, Mapping) else {}
            return conversation_from(checked_template(own.get("source"), names, place=self._address))
        name = entry.get("conv_mode") or web_conv_mode_for_model_name(model)
        if name not in conv_templates:  # a file's name is refused too
            raise InputError(f"{self._address} names the template {name!r} for {model!r}, which is not known here")
        return get_template(str(name))

    async def answer(self, turns: Sequence[PageTurn], settings: PageSettings) -> AsyncIterator[PartialAnswer]:
        """Send the last turn to a worker, and yield the answer as it grows. Errors are yielded as messages."""
        try:
            async with self._client(settings.key) as client:
                worker = await self._worker(client, settings.model)
                body = request_body(turns, settings, self.template(settings.model))
                url = f"{worker}/worker_generate_stream"
                async with client.stream("POST", url, json={**body, "inspect": True}) as response:
                    async for partial in _partial_answers(response, body["prompt"]):
                        yield partial
        except InputError as error:
            yield PartialAnswer(str(error), failed=True)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            yield PartialAnswer(f"the connection to the worker was lost: {error or type(error).__name__}", failed=True)

    async def _worker(self, client: httpx.AsyncClient, model: str) -> str:
        """Return whom to ask: the controller, which forwards to its workers, or the worker that an original one names."""
        if model in self._entries:
            return self._address
        response = await client.post(f"{self._address}/get_worker_address", json={"model": model})
        response.raise_for_status()
        address = response.json()["address"]
        if not address:
            raise InputError(f"no worker serves {model!r} at the moment; pick another model or try again later")
        return address

    def _client(self, key: str) -> httpx.AsyncClient:
        headers = HEADERS | ({"authorization": f"Bearer {key}"} if key else {})
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        return httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=False)


async def _partial_answers(response: httpx.Response, prompt: str) -> AsyncIterator[PartialAnswer]:
    reader, received = ChunkReader(), False
    async for data in response.aiter_raw():
        for chunk in reader.feed(data):
            received = True
            if chunk["error_code"] != OK:
                yield PartialAnswer(f"{chunk['text']} (error_code: {chunk['error_code']})", failed=True)
                return
            stats: AnswerStats = {name: chunk[name] for name in ("usage", "inspect") if name in chunk}
            yield PartialAnswer(chunk["text"][len(prompt) :].strip(), stats=stats or None)
    if not received:
        raise InputError(f"the worker answered with status {response.status_code} and nothing else")


class ConversationLog:
    """The original's log: conversations and votes as JSON lines in `<day>-conv.json`, each image once, if there is a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def write(
        self, kind: str, turns: Sequence[PageTurn], settings: PageSettings, template: Conversation, **more: object
    ) -> None:
        if self._folder is None or not turns:
            return
        conversation, _ = conversation_of(turns, template, settings.image_mode)
        conversation.messages[-1][1] = turns[-1].answer
        state = conversation.dict() | {"model_name": settings.model}
        images = [self._keep(path) for turn in turns for path in turn.images]
        now = datetime.datetime.now()
        row = {"tstamp": round(now.timestamp(), 4), "type": kind, "model": settings.model, "state": state}
        line = json.dumps(row | {"images": images} | more, ensure_ascii=False)
        with self._lock, (self._folder / f"{now:%Y-%m-%d}-conv.json").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _keep(self, path: str) -> str:
        """Return the name of an image, which is a hash of its content; the file is written once."""
        assert self._folder is not None
        data = Path(path).read_bytes()
        name = hashlib.md5(data, usedforsecurity=False).hexdigest()
        kept = self._folder / "serve_images" / f"{name}{Path(path).suffix.lower()}"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
        return name
