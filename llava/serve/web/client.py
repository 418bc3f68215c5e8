"""What the web page says to servers: prompts of its conversations, requests to workers, and what it writes down.

In: turns with images, the template of a model, addresses. Out: the bodies that the original's page posts, and chunks as they
stream back. How it looks is serve/gradio_web_server.py.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from llava.conversation import (
    Conversation,
    get_template,
    web_conv_mode_for_model_name,
    web_stop_string,
    with_image_placeholders,
)
from llava.errors import InputError
from llava.images.io import load_image
from llava.serve.router.protocol import OK, ChunkReader

HEADERS = {"User-Agent": "LLaVA Client"}
MAX_NEW_TOKENS = 1536  # as the original's page asks at most
CONNECT_S = 10.0


@dataclass(frozen=True)
class Turn:
    """A question with its images (files of the page's own), and as much of the answer as there is."""

    question: str
    images: tuple[str, ...] = ()
    answer: str | None = None
    failed: bool = False  # the answer is a sentence about what went wrong


@dataclass(frozen=True)
class Settings:
    """What a visitor chose."""

    model: str
    temperature: float = 0.2
    top_p: float = 0.7
    max_new_tokens: int = 512
    image_mode: str = "Default"
    key: str = ""  # of the servers, where they want one


def conversation_of(turns: Sequence[Turn], template: Conversation, image_mode: str) -> tuple[Conversation, list[str]]:
    """The turns in a template, and their images as base64, in the order of their marks.

    Failed turns are left out: they were no part of the conversation.
    """
    conversation = template.copy()
    kept = [turn for turn in turns[:-1] if not turn.failed and turn.answer] + list(turns[-1:])
    images = [load_image(Path(path)) for turn in kept for path in turn.images]
    if len(images) == 1 and kept[0].images:  # the template knows where a lone image goes
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


def body_of(turns: Sequence[Turn], settings: Settings, template: Conversation) -> dict[str, Any]:
    """The body that the original's page posts to a worker."""
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
class Piece:
    """The answer so far; at the end perhaps what it cost; or a sentence about what went wrong."""

    answer: str
    failed: bool = False
    cost: dict[str, Any] | None = None


class Servers:
    """A controller, or a server that answers a controller's questions about itself."""

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._templates: dict[str, str] = {}

    async def models(self, key: str = "") -> list[str]:
        """The names of the models there are. An original controller is asked in the original's way."""
        async with self._client(key) as client:
            try:
                response = await client.get(f"{self._address}/v1/models")
                if response.status_code == 404:
                    await client.post(f"{self._address}/refresh_all_workers")
                    response = await client.post(f"{self._address}/list_models")
                    response.raise_for_status()
                    return sorted(response.json()["models"])
                if response.status_code == 401:
                    raise InputError("the server wants an API key; write it into the settings")
                response.raise_for_status()
                entries = response.json()["data"]
            except (httpx.HTTPError, ValueError, KeyError) as error:
                raise InputError(f"the controller {self._address} does not answer: {error or type(error)}") from error
        self._templates.update({row["id"]: row["conv_mode"] for row in entries if row.get("conv_mode")})
        return sorted(row["id"] for row in entries)

    def template(self, model: str) -> Conversation:
        """The template that the worker told, else the one that the model's name suggests."""
        return get_template(self._templates.get(model) or web_conv_mode_for_model_name(model))

    async def answer(self, turns: Sequence[Turn], settings: Settings) -> AsyncIterator[Piece]:
        """Ask a worker about the last turn. What goes wrong comes as a piece, in words."""
        try:
            async with self._client(settings.key) as client:
                worker = await self._worker(client, settings.model)
                body = body_of(turns, settings, self.template(settings.model))
                url = f"{worker}/worker_generate_stream"
                async with client.stream("POST", url, json={**body, "inspect": True}) as response:
                    async for piece in _pieces(response, body["prompt"]):
                        yield piece
        except InputError as error:
            yield Piece(str(error), failed=True)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            yield Piece(f"the connection to the worker was lost: {error or type(error).__name__}", failed=True)

    async def _worker(self, client: httpx.AsyncClient, model: str) -> str:
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


async def _pieces(response: httpx.Response, prompt: str) -> AsyncIterator[Piece]:
    reader, came = ChunkReader(), False
    async for data in response.aiter_raw():
        for chunk in reader.feed(data):
            came = True
            if chunk["error_code"] != OK:
                yield Piece(f"{chunk['text']} (error_code: {chunk['error_code']})", failed=True)
                return
            cost: dict[str, Any] = {name: chunk[name] for name in ("usage", "inspect") if name in chunk}
            yield Piece(chunk["text"][len(prompt) :].strip(), cost=cost or None)
    if not came:
        raise InputError(f"the worker answered with status {response.status_code} and nothing else")


class ConversationLog:
    """Conversations and votes as lines of JSON in `<day>-conv.json`, and images once each, as the original keeps them.

    Without a folder nothing is written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def write(self, kind: str, turns: Sequence[Turn], settings: Settings, template: Conversation, **more: Any) -> None:
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
        """The name of an image by its content; the file is written once."""
        assert self._folder is not None
        data = Path(path).read_bytes()
        name = hashlib.md5(data, usedforsecurity=False).hexdigest()
        kept = self._folder / "serve_images" / f"{name}{Path(path).suffix.lower()}"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
        return name
