"""The backend of a remote server with the OpenAI API: SGLang, vLLM, llama.cpp, transformers, or one of ours.

In: `engine.Request`s. Out: chunks, as they arrive. A prompt of text alone goes to its completions as it is; one with images
goes to its chat, turn by turn, since only that server knows how its model takes them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from llava.cli.http_client import retry_seconds
from llava.conversation import Conversation, answer_end
from llava.engine.request import (
    MAX_COMPLETIONS,
    Chunk,
    Detail,
    Embedding,
    EmbedRequest,
    FinishReason,
    Request,
    SamplingParams,
    Score,
    ScoreRequest,
    Timings,
    Usage,
)
from llava.errors import InputError, shortened
from llava.images.frames import Video
from llava.serve.backends.base import BackendError, ModelCard, ServerBusyError, UnreachableError
from llava.serve.backends.prompt_parser import parse_prompt
from llava.text.token_bytes import TokenPiece

if TYPE_CHECKING:
    from PIL import Image

    from llava.processor import Layout

CONNECT_S = 5.0
MAX_ERROR = 64 * 1024  # bytes of an error that are read
MAX_EVENT = 4 << 20  # bytes of one event
MAX_ANSWER = 64 << 20  # bytes of all events of an answer
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class RemoteModel:
    """A model whose files are elsewhere."""

    card: ModelCard

    def plan(self, images: Sequence[Image.Image | Video], details: Sequence[Detail]) -> list[Layout]:
        return []

    def with_times(
        self, prompt: Conversation | str | Sequence[int], images: Sequence[Image.Image | Video]
    ) -> Conversation | str | Sequence[int]:
        return prompt

    def held_bytes(self, layouts: Sequence[Layout]) -> int:
        return 0  # they have been sent

    def num_tokens(self, prompt: Conversation | str | Sequence[int], layouts: Sequence[Layout]) -> int | None:
        return None

    def token_ids(self, prompt: str) -> list[int]:
        raise InputError("this worker passes text on, and does not know its tokens")

    def token_piece(self, token_id: int) -> TokenPiece:
        raise AssertionError("probabilities are refused, so no token has to be named")

    def text_of(self, token_ids: Sequence[int]) -> str:
        raise InputError("this worker passes text on, and does not know its tokens")


class RemoteBackend:
    """Passes requests on to a remote server.

    `model` is the model's name there, `card` what is published about it here, `key` an API key of the remote server. With
    `chat_only` prompts without images are parsed into turns too, for servers whose completions take no images.
    """

    def __init__(
        self, endpoint: str, *, model: str, card: ModelCard, key: str | None = None, chat_only: bool = False
    ) -> None:
        self.model = RemoteModel(card)
        self._chat_only = chat_only
        self._name = model
        self._client = httpx.AsyncClient(
            base_url=endpoint.rstrip("/").removesuffix("/v1"),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            trust_env=False,
        )

    async def start(self, request: Request, *, streamed: bool) -> RemoteRequest:
        path, body = self._translated(request)
        posted = time.perf_counter()
        try:
            response = await self._client.send(self._client.build_request("POST", path, json=body), stream=True)
        except httpx.HTTPError as error:
            reason = error or type(error).__name__
            raise UnreachableError(f"the server that answers cannot be reached: {reason}") from error
        if response.status_code != 200:
            raise await _refusal(response)
        return RemoteRequest(response, posted, keep_space=request.sampling.keep_space)

    async def score(self, request: ScoreRequest) -> Score:
        raise InputError("this worker passes requests on to another server and gives no logprobs")

    async def embed(self, request: EmbedRequest) -> Embedding:
        raise InputError("this worker passes requests on to another server and gives no embeddings")

    def gauges(self) -> Mapping[str, float]:
        return {}

    async def is_alive(self) -> bool:
        """Whether it answers /health, which most servers have, or /v1/models."""
        try:
            return any([await self._status(path) == 200 for path in ("/health", "/v1/models")])
        except (httpx.HTTPError, TimeoutError):
            return False

    async def _status(self, path: str) -> int:
        async with asyncio.timeout(CONNECT_S), self._client.stream("GET", path) as response:
            return response.status_code

    @property
    def lost(self) -> None:
        return None

    async def close(self) -> None:
        await self._client.aclose()

    def _translated(self, request: Request) -> tuple[str, dict[str, object]]:
        body = {"model": self._name, "stream": True, "stream_options": {"include_usage": True}}
        body |= _sampling(request.sampling)
        stop = list(request.sampling.stop)
        if isinstance(request.prompt, str) and not request.images and not self._chat_only:
            return "/v1/completions", body | {"prompt": request.prompt} | ({"stop": stop} if stop else {})
        if isinstance(request.prompt, str):
            conversation = parse_prompt(request.prompt, self.model.card.template)
        elif isinstance(request.prompt, Conversation):
            conversation = request.prompt
        else:
            raise InputError("this worker passes text on, and cannot pass token ids on")
        images = [image for image in request.images if not isinstance(image, Video)]
        if len(images) < len(request.images):
            raise InputError("this worker passes requests on to another server and takes no videos")
        body["messages"] = messages_of(conversation, images, self.model.card, request.details)
        # The other server's own template ends an answer, and not every server takes stop strings.
        stop = [text for text in stop if text != answer_end(self.model.card.template)]
        return "/v1/chat/completions", body | ({"stop": stop} if stop else {})


def messages_of(
    conversation: Conversation, images: Sequence[Image.Image], card: ModelCard, details: Sequence[Detail] = ()
) -> list[dict[str, object]]:
    """A conversation as chat messages. A system text that is only the template's own is left to the other server."""
    messages: list[dict[str, object]] = []
    if conversation.system and conversation.system != card.template.system:
        messages.append({"role": "system", "content": conversation.system.removeprefix("<|im_start|>system\n")})
    left = list(zip(images, details or ["auto"] * len(images), strict=True))
    for role, text in conversation.messages[conversation.offset :]:
        if role == conversation.roles[1]:
            if text is not None:
                messages.append({"role": "assistant", "content": text})
            continue
        before, *after = text.split(card.image_placeholder)
        parts: list[dict[str, object]] = [_text(before)]
        for piece in after:
            image, detail = left.pop(0)
            url = {"url": _data_url(image)} | ({"detail": detail} if detail != "auto" else {})
            parts += [{"type": "image_url", "image_url": url}, _text(piece.removeprefix("\n"))]
        shown = [part for part in parts if part.get("text") != ""]
        messages.append({"role": "user", "content": shown if after else text})
    return messages


def _text(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sampling(params: SamplingParams) -> dict[str, object]:
    """The fields that were given; the last five are not OpenAI's."""
    if params.logprobs is not None:
        raise InputError("this worker passes requests on to another server and gives no logprobs")
    if params.regex is not None:
        raise InputError("this worker passes requests on to another server and takes no regex")
    if params.grammar is not None:
        raise InputError("this worker passes requests on to another server and takes no grammar")
    ours, usual = params, SamplingParams()
    names = (
        "top_p", "seed", "presence_penalty", "frequency_penalty", "n",
        "top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos",
    )  # fmt: skip
    body = {name: getattr(ours, name) for name in names if getattr(ours, name) != getattr(usual, name)}
    body |= {"temperature": ours.temperature, "max_tokens": ours.max_new_tokens}
    if ours.min_new_tokens:
        body["min_tokens"] = ours.min_new_tokens
    if ours.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in ours.logit_bias.items()}
    if ours.json_schema is not None:
        schema = json.loads(ours.json_schema) if isinstance(ours.json_schema, str) else ours.json_schema
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return body


async def _refusal(response: httpx.Response) -> Exception:
    """Return the error for a response that is no answer; of its body, a start is read for a while."""
    data = b""
    try:
        async with asyncio.timeout(CONNECT_S):
            async for part in response.aiter_bytes():
                data += part
                if len(data) > MAX_ERROR:
                    break
    except (httpx.HTTPError, TimeoutError):
        pass
    finally:
        await response.aclose()
    retry_after_s = retry_seconds(response.headers.get("retry-after"))
    return _refused(response.status_code, data[:MAX_ERROR].decode(errors="replace"), retry_after_s)


def _refused(status: int, text: str, retry_after_s: float | None = None) -> Exception:
    if 300 <= status < 400:
        return BackendError("the server that answers redirects to another address; give that as the endpoint")
    try:
        message = _message(json.loads(text)) or text[:300]
    except (ValueError, RecursionError):
        message = text[:300] or f"status {status}"
    if status in (429, 503):
        return ServerBusyError(message, retry_after_s=retry_after_s)
    if status in (400, 413, 422):
        return InputError(message)
    return BackendError(f"the server that answers failed with status {status}: {message}")


def _message(values: object) -> str | None:
    """The sentence in an error's body, in one of the forms that servers have for it."""
    error = values.get("error", values.get("detail")) if isinstance(values, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return str(found) if found else None


async def _lines(response: httpx.Response) -> AsyncGenerator[str, None]:
    """Yield the lines of a response, each and all together of bounded size."""
    begun, num_bytes = b"", 0
    async for part in response.aiter_bytes():
        num_bytes += len(part)
        *lines, begun = (begun + part).split(b"\n")
        if len(begun) > MAX_EVENT or num_bytes > MAX_ANSWER:
            raise BackendError("the server that answers sends more than an answer can have")
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")
    if begun:
        yield begun.decode(errors="replace")


def _checked_event(event: object) -> dict[str, Any]:
    """Return an event whose fields have the types that are read of it; raises `BackendError` for any other."""

    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise BackendError(f"the server that answers sent an event whose {what}")

    if not isinstance(event, dict):
        raise BackendError("the server that answers sent an event that is no object")
    choices, usage = event.get("choices"), event.get("usage")
    expect(isinstance(choices, list | None), "choices are no list")
    for choice in choices or ():
        expect(isinstance(choice, dict), "choice is no object")
        index, delta = choice.get("index", 0), choice.get("delta")
        expect(type(index) is int and 0 <= index < MAX_COMPLETIONS, "choice has no proper index")
        expect(isinstance(delta, dict | None), "delta is no object")
        for text in (choice.get("text"), (delta or {}).get("content"), choice.get("finish_reason")):
            expect(isinstance(text, str | None), "text is none")
    expect(isinstance(usage, dict | None), "usage is no object")
    details = (usage or {}).get("prompt_tokens_details")
    expect(isinstance(details, dict | None), "usage is wrong")
    counts = [(usage or {}).get(name) for name in ("prompt_tokens", "completion_tokens")]
    counts += [(details or {}).get(name) for name in ("image_tokens", "cached_tokens")]
    expect(all(count is None or (type(count) is int and 0 <= count < 1 << 40) for count in counts), "usage is wrong")
    return event


class RemoteRequest:
    """A request of the remote server. A task reads the events, so that `abort` can end it from anywhere."""

    def __init__(self, response: httpx.Response, posted: float, *, keep_space: bool = False) -> None:
        self._response = response
        self._keep_space = keep_space
        self._posted = posted
        self._first: float | None = None
        self._ended = posted
        self._usage: dict[str, Any] = {}
        self._usage_is_alone = False  # in an event without choices
        self._num_new: int | None = None  # tokens, as the server counted them
        self._num_pieces = 0
        self._begun: set[int] = set()  # choices that have a text
        self._chunks: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._read())

    async def batches(self, pause: Callable[[], float]) -> AsyncIterator[Sequence[Chunk]]:
        while (chunk := await self._chunks.get()) is not None:
            if isinstance(chunk, Exception):
                raise chunk
            chunks = [chunk]
            while not self._chunks.empty() and isinstance(chunk := self._chunks.get_nowait(), Chunk):
                chunks.append(chunk)
            yield chunks
            if not isinstance(chunk, Chunk):
                self._chunks.put_nowait(chunk)
            elif (seconds := pause()) > 0 and not self._task.done():
                await asyncio.wait([self._task], timeout=seconds)

    def abort(self) -> None:
        self._task.cancel()

    @property
    def usage(self) -> Usage:
        """As the server counted; the split of the prompt is known where it gives it."""
        details = self._usage.get("prompt_tokens_details") or {}
        num_image_tokens = details.get("image_tokens") or 0
        return Usage(
            num_text_tokens=max(0, (self._usage.get("prompt_tokens") or 0) - num_image_tokens),
            num_image_tokens=num_image_tokens,
            num_cached_tokens=details.get("cached_tokens") or 0,
            num_new_tokens=self._num_pieces if self._num_new is None else self._num_new,
        )

    @property
    def timings(self) -> Timings:
        first = None if self._first is None else self._first - self._posted
        return Timings(queued_s=0.0, first_token_s=first, total_s=self._ended - self._posted)

    async def _read(self) -> None:
        open_choices: set[int] = set()
        try:
            is_empty = True
            async with contextlib.aclosing(_lines(self._response)) as lines:
                async for line in lines:
                    if not line.startswith("data:") or line.strip() == "data: [DONE]":
                        continue
                    is_empty = False
                    event = _checked_event(json.loads(line.removeprefix("data:")))
                    if "error" in event:
                        reason = shortened(_message(event) or "it does not say why", 500)
                        raise BackendError(f"the server that answers failed: {reason}")
                    if event.get("usage"):
                        self._note_usage(event["usage"], alone=not event.get("choices"))
                    for choice in event.get("choices") or ():
                        self._take(choice, open_choices)
            if is_empty:
                raise BackendError(
                    "the server that answers sent something else than events; is it an API of OpenAI's form?"
                )
            if open_choices:
                raise BackendError("the server that answers ended its answer without saying that it is finished")
            self._chunks.put_nowait(None)
        except InputError as error:
            self._chunks.put_nowait(error)
        except (httpx.HTTPError, ValueError, RecursionError) as error:
            reason = shortened(str(error)) or type(error).__name__
            self._chunks.put_nowait(BackendError(f"the server that answers was lost in the middle: {reason}"))
        except BackendError as error:
            self._chunks.put_nowait(error)
        finally:
            self._ended = time.perf_counter()
            await self._response.aclose()

    def _note_usage(self, usage: dict[str, Any], *, alone: bool) -> None:
        """What comes with choices is a sum so far; llama.cpp sends the usage of each choice in an event of its own."""
        before = self._num_new if alone and self._usage_is_alone else None
        if usage.get("completion_tokens") is not None:
            self._num_new = usage["completion_tokens"] + (before or 0)
        self._usage, self._usage_is_alone = usage, alone

    def _take(self, choice: dict[str, Any], open_choices: set[int]) -> None:
        index = choice.get("index", 0)
        text = choice["text"] if "text" in choice else (choice.get("delta") or {}).get("content")
        reason = choice.get("finish_reason")
        if text and index not in self._begun:  # some begin an answer with a blank; ours do not
            text = text if self._keep_space else text.lstrip()
            if text:
                self._begun.add(index)
        if text and self._first is None:
            self._first = time.perf_counter()
        self._num_pieces += bool(text)
        (open_choices.discard if reason else open_choices.add)(index)
        if text or reason:
            end = REASONS.get(reason, "stop") if reason else None
            stop = choice.get("stop_reason")  # vLLM names the stop string
            stop = stop if end and isinstance(stop, str) else None
            self._chunks.put_nowait(Chunk(index, text or "", finish_reason=end, stop_string=stop))
