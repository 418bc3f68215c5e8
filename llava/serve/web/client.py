"""The web page's requests to servers, and its log of conversations.

In: turns with images, a model's template, addresses. Out: the bodies that the original's page posts; answers as they stream
back; lines of a log. Whatever fails is an answer of one sentence. The parts of the page are in page.py.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import io
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from llava.images.video import is_video, load_video
from llava.serve.backends.base import ServerBusyError
from llava.serve.http.limits import ServeLimits, VideoUrl
from llava.serve.http.memory_budget import MemoryBudget, Reservation
from llava.serve.router.protocol import OK, ChunkReader

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("llava.serve")

HEADERS = {"User-Agent": "LLaVA Client"}
MAX_NEW_TOKENS = 1536  # as in the original's page
CONNECT_S = 10.0
VIDEO_COPIES = 3  # of a video's bytes, in base64 and in the body of a request
MAX_CHARACTERS = 200_000  # of a conversation's questions and answers
FAILED = "the page could not answer; its operator finds the reason in the log"

OpenImage = Callable[[str], "Image.Image"]


@dataclass(frozen=True)
class PageTurn:
    """A question with its images (files that the page keeps), and the answer so far."""

    question: str
    images: tuple[str, ...] = ()
    answer: str | None = None
    failed: bool = False  # the answer is an error message
    copies: tuple[str, ...] = ()  # of the images, for the browser's memory (history.py)
    # For each image: of a video, an image of its frames, which is shown in its place; "" for other images.
    frames: tuple[str, ...] = ()


@dataclass(frozen=True)
class PageSettings:
    """The visitor's settings."""

    model: str
    temperature: float = 0.2
    top_p: float = 0.7
    max_new_tokens: int = 512
    image_mode: str = "Default"
    key: str = ""  # for the servers, where they need one
    system: str = ""  # in place of the template's own system text


def open_page_image(path: str, **options: Any) -> Image.Image:
    """Open an image that the page keeps. Messages have its name alone: where it lies is no business of a visitor.

    Further arguments are those of `load_image`.
    """
    name = repr(Path(path).name)
    try:
        data = Path(path).read_bytes()
    except OSError:
        raise InputError(f"the image {name} is not kept any more; add it again.") from None
    return load_image(data, name=name, **options)


def conversation_of(
    turns: Sequence[PageTurn], template: Conversation, image_mode: str, open_image: OpenImage = open_page_image
) -> tuple[Conversation, list[str]]:
    """Render turns, without failed ones, in a template; return the images too, in base64 and in their order.

    A video is a data: URL among them.
    """
    kept = _kept(turns)
    shown = [_video_url(path) or open_image(path) for turn in kept for path in turn.images]
    first = shown[0] if shown and not isinstance(shown[0], str) else None
    conversation = _written(kept, template, image_mode, first)
    return conversation, [
        image if isinstance(image, str) else str(conversation.process_image(image, image_mode)) for image in shown
    ]


def _video_url(path: str) -> str | None:
    """Return a video that the page keeps as a data: URL; None for an image."""
    if not is_video(path):
        return None
    return f"data:video/mp4;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def _kept(turns: Sequence[PageTurn]) -> list[PageTurn]:
    return [turn for turn in turns[:-1] if not turn.failed and turn.answer] + list(turns[-1:])


def _written(
    kept: Sequence[PageTurn], template: Conversation, image_mode: str, first_image: Image.Image | None
) -> Conversation:
    """Render turns in a template. The image matters only to code that asks the conversation for it."""
    conversation = template.copy()
    rest = kept
    if sum(len(turn.images) for turn in kept) == 1 and kept[0].images:  # the template decides where a single image goes
        question = kept[0].question
        text = question if "<image>" in question else f"{question}\n<image>"
        conversation.append_message(conversation.roles[0], (text, first_image, image_mode))
        conversation.append_message(conversation.roles[1], None)
        rest = kept[1:]
        conversation.messages[-1][1] = kept[0].answer if rest else None
    for turn in rest:
        conversation.append_message(conversation.roles[0], with_image_placeholders(turn.question, len(turn.images)))
        conversation.append_message(conversation.roles[1], turn.answer)
    conversation.messages[-1][1] = None
    return conversation


def request_body(
    turns: Sequence[PageTurn], settings: PageSettings, template: Conversation, open_image: OpenImage = open_page_image
) -> dict[str, Any]:
    """Return the body that the original's page posts to a worker."""
    if settings.system.strip():
        template = template.with_system(settings.system.strip())
    conversation, images = conversation_of(turns, template, settings.image_mode, open_image)
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
    """Requests to a controller, or to a single server that has a controller's routes, within the limits of one.

    `uds` is the unix socket where the server listens, if it is one.
    """

    def __init__(
        self,
        address: str,
        limits: ServeLimits | None = None,
        memory: MemoryBudget | None = None,
        *,
        uds: str | None = None,
    ) -> None:
        self._address = address.rstrip("/")
        self._uds = uds
        self._limits = limits or ServeLimits()
        self._memory = memory or MemoryBudget()
        self._entries: dict[str, Mapping[str, object]] = {}

    async def models(self, key: str = "", *, again: bool = True) -> list[str]:
        """Return the names of the models; those found before, unless `again`.

        A controller of the original is asked by its own routes.
        """
        if self._entries and not again:
            return sorted(self._entries)
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
            except InputError:
                raise
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                logger.warning("the controller %s does not answer: %r", self._address, error)
                raise InputError("the server of the models does not answer; try again in a moment") from error
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
        reservation = self._memory.reserve()
        try:
            self._check(turns, settings)
            async with asyncio.timeout(self._limits.deadline_s), self._client(settings.key) as client:
                worker = await self._worker(client, settings.model)
                body = await asyncio.to_thread(self._body, turns, settings, reservation)
                url = f"{worker}/worker_generate_stream"
                async with client.stream("POST", url, json={**body, "inspect": True}) as response:
                    async for partial in _partial_answers(response, body["prompt"]):
                        yield partial
        except (InputError, ServerBusyError) as error:
            yield PartialAnswer(str(error), failed=True)
        except TimeoutError:
            yield PartialAnswer(f"the answer took longer than {self._limits.deadline_s:g} seconds", failed=True)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            yield PartialAnswer(f"the connection to the worker was lost: {error or type(error).__name__}", failed=True)
        except Exception:  # a visitor reads a sentence, whatever went wrong
            logger.exception("a question on the page failed")
            yield PartialAnswer(FAILED, failed=True)
        finally:
            reservation.release()

    def _check(self, turns: Sequence[PageTurn], settings: PageSettings) -> None:
        if not settings.model:
            raise InputError("there is no model at the moment; load the page again in a moment")
        if sum(len(turn.question) + len(turn.answer or "") for turn in turns) + len(settings.system) > MAX_CHARACTERS:
            raise InputError(
                f"this conversation is longer than {MAX_CHARACTERS:,} characters; clear it, and begin anew"
            )
        self._limits.check_count(sum(len(turn.images) for turn in turns))

    def _body(self, turns: Sequence[PageTurn], settings: PageSettings, reservation: Reservation) -> dict[str, Any]:
        def open_image(path: str) -> Image.Image:
            return self.open_image(path, reservation)

        for turn in turns:  # videos are passed on as they are
            for path in turn.images:
                if is_video(path):
                    reservation.change(VIDEO_COPIES * Path(path).stat().st_size)
        return request_body(turns, settings, self.template(settings.model), open_image)

    def open_image(self, path: str, reservation: Reservation) -> Image.Image:
        """Open an image that the page keeps, in a process of its own, and count its memory."""
        limits = self._limits
        return open_page_image(path, limits=limits.images, decoder=limits.decoder, reserve=reservation.change)

    def overview(self, path: str) -> bytes | None:
        """Return the frames of a video that a model sees, as one JPEG image; None for an image, or where it cannot be decoded.

        What is wrong with a video, the answer says.
        """
        if not is_video(path):
            return None
        limits, reservation = self._limits, self._memory.reserve()
        sampling = VideoUrl("").allowed_by(limits.videos)
        try:
            video = load_video(path, sampling, limits.videos, decoder=limits.decoder, reserve=reservation.change)
        except (InputError, ServerBusyError):
            return None
        finally:
            reservation.release()
        buffer = io.BytesIO()
        video.overview().save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

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
        transport = None if self._uds is None else httpx.AsyncHTTPTransport(uds=self._uds)
        return httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=False, transport=transport)


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
    if not received and response.status_code == 413:
        raise InputError("the server of the model takes no request so large; show a smaller video, or fewer images")
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
        """Write a line. An answer is never lost to a log that cannot be written: that is a message of the server."""
        if self._folder is None or not turns:
            return
        conversation = _written(_kept(turns), template, settings.image_mode, None)
        conversation.messages[-1][1] = turns[-1].answer
        state = conversation.dict() | {"model_name": settings.model}
        now = datetime.datetime.now()
        try:
            images = [self._keep(path) for turn in turns for path in turn.images]
            row = {"tstamp": round(now.timestamp(), 4), "type": kind, "model": settings.model, "state": state}
            line = json.dumps(row | {"images": images} | more, ensure_ascii=False) + "\n"
            with self._lock, (self._folder / f"{now:%Y-%m-%d}-conv.json").open("ab", buffering=0) as file:
                end = file.tell()
                data = line.encode("utf-8", "replace")
                if file.write(data) != len(data):  # a full disk takes a part of it
                    file.truncate(end)
                    raise OSError("the disk is full")
        except OSError as error:
            logger.error("the conversation was not logged: %s", error)

    def _keep(self, path: str) -> str | None:
        """Return the name of an image, which is a hash of its content, and write the file once; None: it is gone."""
        assert self._folder is not None
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        name = hashlib.md5(data, usedforsecurity=False).hexdigest()
        kept = self._folder / "serve_images" / f"{name}{Path(path).suffix.lower()}"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
        return name
