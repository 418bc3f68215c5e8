"""The OpenAI-compatible API over one model: chat, completions, models.

In: HTTP requests. Out: JSON, or server-sent events. What bodies may hold is schema.py, what they mean
requests.py, how answers look replies.py; the controller publishes the same routes over its workers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from llava.engine.request import Detail
from llava.serve.http.errors import ApiError, as_api_error, error_body
from llava.serve.http.streams import Stream, read_json, while_connected
from llava.serve.openai import schema
from llava.serve.openai.replies import ChatWriter, TextWriter
from llava.serve.openai.requests import Draft, chat_draft, completion_draft
from llava.serve.openai.responses_api import (
    ResponsesEvent,
    ResponsesReply,
    ResponsesRequest,
    ResponsesWriter,
    responses_draft,
)
from llava.serve.service import Asked, Service

B = TypeVar("B", bound=schema.Choosing)
EVENTS = "text/event-stream; charset=utf-8"
AnyWriter = ChatWriter | TextWriter | ResponsesWriter


class Api(Protocol):
    """What stands behind the routes: a model here, or workers elsewhere."""

    async def chat(self, request: Request) -> Response | Stream: ...

    async def complete(self, request: Request) -> Response | Stream: ...

    async def respond(self, request: Request) -> Response | Stream: ...

    async def models(self) -> schema.ModelList: ...


class ModelApi:
    """The API of one model."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def models(self) -> schema.ModelList:
        card = self._service.card
        return schema.ModelList(
            object="list",
            data=[
                schema.ModelEntry(
                    id=card.name,
                    object="model",
                    created=self._created,
                    owned_by="llava",
                    context_len=card.context_len,
                    conv_mode=card.conv_mode,
                    takes_images=card.takes_images,
                )
            ],
        )

    async def chat(self, request: Request) -> Response | Stream:
        body = parse_body(await read_json(request), schema.ChatRequest)
        self._check_model(body.model)
        draft = chat_draft(body, self._service.card)
        writer = ChatWriter(
            body.model,
            self._service.backend.model.token_text,
            with_logprobs=bool(body.logprobs),
            inspect=body.inspect,
            include_usage=_wants_usage(body),
            kind="chatcmpl",
        )
        return await self._answer(request, body, draft, writer)

    async def complete(self, request: Request) -> Response | Stream:
        body = parse_body(await read_json(request), schema.CompletionRequest)
        self._check_model(body.model)
        draft = completion_draft(body, self._service.card)
        writer = TextWriter(
            body.model,
            self._service.backend.model.token_text,
            with_logprobs=body.logprobs is not None,
            inspect=body.inspect,
            include_usage=_wants_usage(body),
            kind="cmpl",
        )
        return await self._answer(request, body, draft, writer)

    async def respond(self, request: Request) -> Response | Stream:
        body = parse_body(await read_json(request), ResponsesRequest)
        self._check_model(body.model)
        draft = responses_draft(body, self._service.card)
        return await self._answer(request, body, draft, ResponsesWriter(body, draft.sampling))

    def _check_model(self, name: str) -> None:
        known = self._service.card.name
        if name != known:
            raise unknown_model(name, [known])

    async def _answer(
        self, request: Request, body: schema.Choosing, draft: Draft, writer: AnyWriter
    ) -> Response | Stream:
        service = self._service
        deadline = asyncio.get_running_loop().time() + service.limits.deadline_s
        urls = [image.url for image in draft.images]
        details: list[Detail] = ["low" if image.detail == "low" else "auto" for image in draft.images]
        asking = service.ask(draft.prompts, draft.sampling, urls, details=details, streamed=bool(body.stream))
        if not body.stream:
            return await while_connected(request, _whole(asking, writer, deadline))
        async with asyncio.timeout_at(deadline):
            asked = await while_connected(request, asking)
        return Stream(
            _events(asked, writer),
            media_type=EVENTS,
            deadline=deadline,
            last_words=error_event,
            closed=asked.close,
        )


async def _whole(asking: Coroutine[Any, Any, Asked], writer: AnyWriter, deadline: float) -> Response:
    async with asyncio.timeout_at(deadline):
        asked = await asking
    end = "cancelled"
    try:
        async with asyncio.timeout_at(deadline):
            chunks = [chunk async for chunk in asked]
        end = "finished"
        return Response(writer.whole(chunks, asked.cost()).as_json(), media_type="application/json")
    except TimeoutError:
        end = "deadline"
        raise
    except Exception as error:
        end = "failed" if as_api_error(error).status >= 500 else "cancelled"
        raise
    finally:
        asked.close(end)


async def _events(asked: Asked, writer: AnyWriter) -> AsyncIterator[bytes]:
    for piece in writer.opening(asked.num_choices):
        yield event(piece)
    async for chunk in asked:
        yield event(writer.piece(chunk))
    for piece in writer.closing(asked.cost()):
        yield event(piece)
    yield writer.ending


def event(piece: schema.Reply) -> bytes:
    """A server-sent event; those of /v1/responses are named by their type."""
    name = f"event: {piece.type}\n" if isinstance(piece, ResponsesEvent) else ""
    return f"{name}data: {piece.as_json()}\n\n".encode()


def error_event(error: Exception) -> bytes:
    """What a stream ends with when it cannot go on: clients raise it."""
    told = as_api_error(error)
    return f"event: error\ndata: {json.dumps(error_body(told.status, str(told), code=told.code))}\n\n".encode()


def parse_body(values: Any, kind: type[B]) -> B:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        message, param = schema.sentence(error, values)
        raise ApiError(400, message, param=param) from None


def unknown_model(name: str, known: list[str]) -> ApiError:
    there = ", ".join(known) if known else "none at the moment"
    return ApiError(404, f"there is no model {name!r}; models: {there}", code="model_not_found", param="model")


def _wants_usage(body: schema.Generating) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


# Routes and the published document


def openai_routes(api: Api) -> APIRouter:
    router = APIRouter(tags=["OpenAI-compatible"])

    @router.post("/v1/chat/completions", **_described(schema.ChatRequest, schema.ChatReply, schema.ChatChunk))
    async def chat_completions(request: Request) -> Any:
        """Answer a conversation, which may show images."""
        return await api.chat(request)

    @router.post("/v1/completions", **_described(schema.CompletionRequest, schema.TextReply, schema.TextReply))
    async def completions(request: Request) -> Any:
        """Go on from a finished prompt."""
        return await api.complete(request)

    @router.post("/v1/responses", **_described(ResponsesRequest, ResponsesReply, ResponsesEvent))
    async def responses(request: Request) -> Any:
        """The same as a chat, in OpenAI's newer form; nothing is stored."""
        return await api.respond(request)

    @router.get("/v1/models", responses=_errors(401, 403, 421), response_model=schema.ModelList)
    async def models() -> Any:
        """The models that can be asked."""
        return Response((await api.models()).as_json(), media_type="application/json")

    @router.get("/v1/models/{model}", responses=_errors(401, 403, 404, 421), response_model=schema.ModelEntry)
    async def model(model: str) -> Any:
        """One of them."""
        entries = (await api.models()).data
        for entry in entries:
            if entry.id == model:
                return Response(entry.as_json(), media_type="application/json")
        raise unknown_model(model, [entry.id for entry in entries])

    return router


def _described(body: type[BaseModel], reply: type[BaseModel], piece: type[BaseModel]) -> dict[str, Any]:
    """What the published document says of a route whose body we read ourselves."""
    ok = {
        "description": "The answer; with `stream` it comes piece by piece as server-sent events.",
        "content": {
            "application/json": {"schema": _ref(reply)},
            EVENTS.partition(";")[0]: {"schema": {"type": "string", "description": f"events of {piece.__name__}"}},
        },
    }
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}}},
        "responses": {200: ok, **_errors(400, 401, 403, 404, 413, 421, 429, 500, 502, 503, 504)},
        "response_class": Response,
    }


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": _ref(schema.ErrorReply)}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


_MEANINGS = {
    400: "The body cannot be answered; the message says why.",
    401: "An API key is missing or wrong.",
    403: "Asked by a page of another site.",
    404: "There is no such model.",
    413: "The body is too large.",
    421: "This server does not answer to the name in the Host header.",
    429: "The server is full; Retry-After says when to come again.",
    500: "The server failed.",
    502: "The server behind this one failed.",
    503: "No worker is there for this model; Retry-After says when to come again.",
    504: "The answer took too long.",
}
_PUBLISHED = (
    schema.ChatRequest,
    schema.ChatReply,
    schema.ChatChunk,
    schema.CompletionRequest,
    schema.TextReply,
    ResponsesRequest,
    ResponsesReply,
    ResponsesEvent,
    schema.ErrorReply,
)


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def publish(app: FastAPI) -> None:
    """Make the OpenAPI document hold what our routes take and give; FastAPI knows only what it parses itself."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            requests = [(model, "validation") for model in _PUBLISHED if issubclass(model, schema.Body)]
            replies = [(model, "serialization") for model in _PUBLISHED if not issubclass(model, schema.Body)]
            _, both = models_json_schema([*requests, *replies], ref_template="#/components/schemas/{model}")  # type: ignore[list-item]
            components = made.setdefault("components", {}).setdefault("schemas", {})
            components.update(both["$defs"])
            for unused in ("HTTPValidationError", "ValidationError"):  # we answer 400, by ErrorReply
                components.pop(unused, None)
            for path in made["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
