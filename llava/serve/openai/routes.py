"""The routes of the OpenAI-compatible API: chat, completions, responses, models.

In: HTTP requests. Out: JSON, or server-sent events. Bodies are in schema.py, what they mean in requests.py, how answers look in
replies.py. The controller publishes the same routes over its workers (serve/router/routes.py).
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from llava.engine.request import ScoreRequest
from llava.serve.answers import ReplyBody, StreamEncoding, answer
from llava.serve.bodies import read_body
from llava.serve.chat_turns import ParsedRequest, details_of, sources_of
from llava.serve.http.app import Schemas
from llava.serve.http.errors import ApiError, as_api_error, error_body, openai_form
from llava.serve.http.keys import current_client, owner_of
from llava.serve.http.streams import cancel_on_disconnect
from llava.serve.openai import schema
from llava.serve.openai.embeddings import EmbeddingsReply, EmbeddingsRequest, embeddings_reply, parse_embeddings
from llava.serve.openai.replies import ChatWriter, EchoedPrompt, TextWriter
from llava.serve.openai.requests import parse_chat, parse_completion
from llava.serve.openai.response_store import ResponseStore
from llava.serve.openai.responses_api import ResponsesWriter, parse_responses
from llava.serve.openai.responses_schema import ResponsesEvent, ResponsesReply, ResponsesRequest
from llava.serve.service import AdmittedRequest, Service

B = TypeVar("B", bound=schema.SamplingFields | EmbeddingsRequest)
W = TypeVar("W", ChatWriter, TextWriter)
EVENTS = "text/event-stream; charset=utf-8"
RESPONSE_ID = re.compile(r"resp_[0-9a-zA-Z]{1,64}")
AnyWriter = ChatWriter | TextWriter | ResponsesWriter
Endpoint = Callable[[Request], Awaitable[Response]]


class OpenAIApi(Protocol):
    """What answers the routes: a model here, or workers elsewhere."""

    async def chat_completions(self, request: Request) -> Response: ...

    async def completions(self, request: Request) -> Response: ...

    async def responses(self, request: Request) -> Response: ...

    async def embeddings(self, request: Request) -> Response: ...

    async def kept_response(self, request: Request, response_id: str) -> Response: ...

    async def models(self) -> schema.ModelList: ...


class ModelApi:
    """The API of one model."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = ResponseStore()
        self._created = int(time.time())

    async def models(self) -> schema.ModelList:
        card = self._service.card
        own = card.template.chat_template
        described = schema.ModelEntry(
            id=card.name,
            object="model",
            created=self._created,
            owned_by="llava",
            context_len=card.context_len,
            conv_mode=None if own is not None else card.conv_mode,
            chat_template=None if own is None else {"source": own.source, "special_tokens": dict(own.special_tokens)},
            takes_images=card.takes_images,
            takes_videos=card.takes_videos,
            architecture=card.architecture,
            num_parameters=card.num_parameters,
            dtype=card.dtype,
        )
        entries = [described.model_copy(update={"id": name}) for name in card.model_names]
        return schema.ModelList(object="list", data=entries)

    async def chat_completions(self, request: Request) -> Response:
        body = await self._body(request, schema.ChatRequest)
        writer = self._writer(ChatWriter, body, with_logprobs=bool(body.logprobs))
        parsed = parse_chat(body, self._service.card)
        writer.with_tools, writer.legacy_functions = parsed.tools is not None, body.functions is not None
        return await self._answer(request, body, parsed, writer)

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, schema.CompletionRequest)
        parsed = parse_completion(body, self._service.card)
        writer = self._writer(TextWriter, body, with_logprobs=body.logprobs is not None)
        writer.num_choices, writer.only_prompts = parsed.sampling.n, body.max_tokens == 0
        if body.echo:
            adapter = self._service.card.adapter_of(body.model)
            async with asyncio.timeout(self._service.limits.deadline_s):
                echoes = await cancel_on_disconnect(self._echoes(parsed, body.logprobs, adapter), request.receive)
            parsed = replace(parsed, prompts=tuple(echo.token_ids for echo in echoes))
            writer.echoes = echoes
        return await self._answer(request, body, parsed, writer)

    async def _echoes(self, parsed: ParsedRequest, num_top: int | None, adapter: str | None) -> list[EchoedPrompt]:
        """Return the prompts with their tokens, and the probabilities of these unless `num_top` is None."""
        service, echoes = self._service, list[EchoedPrompt]()
        for prompt in parsed.prompts:
            if isinstance(prompt, str):
                echoes.append(EchoedPrompt(prompt, await service.token_ids(prompt)))
            else:
                ids = cast("Sequence[int]", prompt)
                echoes.append(EchoedPrompt(service.backend.model.text_of(ids), ids))
        if num_top is None:
            return echoes
        asked = [echo for echo in echoes if len(echo.token_ids) > 1]
        requests = [
            ScoreRequest(echo.token_ids[:1], echo.token_ids[1:], num_top=num_top, adapter=adapter) for echo in asked
        ]
        scores = iter(await service.score(requests))
        return [replace(echo, score=next(scores)) if len(echo.token_ids) > 1 else echo for echo in echoes]

    async def responses(self, request: Request) -> Response:
        body = await self._body(request, ResponsesRequest)
        card, piece_of = self._service.card, self._service.backend.model.token_piece
        parsed, turns = parse_responses(body, card, self._store)
        writer = ResponsesWriter(body, parsed, turns, card, piece_of, self._store)
        return await self._answer(request, body, parsed, writer)

    async def embeddings(self, request: Request) -> Response:
        body = await self._body(request, EmbeddingsRequest)
        parsed = parse_embeddings(body, self._service.card)
        urls, details = sources_of(parsed.images), details_of(parsed.images)
        make_request = partial(parsed.make_request, adapter=self._service.card.adapter_of(body.model))
        embedded = self._service.embed(parsed.prompts, make_request, urls, details=details)
        async with asyncio.timeout(self._service.limits.deadline_s):
            embeddings = await cancel_on_disconnect(embedded, request.receive)
        return Response(embeddings_reply(body, embeddings).as_json(), media_type="application/json")

    async def kept_response(self, request: Request, response_id: str) -> Response:
        owner = owner_of(current_client.get())
        if request.method == "DELETE":
            found = deleted(response_id) if self._store.remove(response_id, owner=owner) else None
        else:
            found = self._store.reply(response_id, owner=owner)
        if found is None:
            raise unknown_response(response_id)
        return Response(found, media_type="application/json")

    async def _body(self, request: Request, kind: type[B]) -> B:
        body = await read_body(request, kind, strict=self._service.limits.strict)
        if body.model not in self._service.card.model_names:
            raise unknown_model(body.model, self._service.card.model_names)
        return body

    def _writer(self, kind: type[W], body: schema.GenerationFields, *, with_logprobs: bool) -> W:
        return kind(
            body.model,
            self._service.backend.model.token_piece,
            with_logprobs=with_logprobs,
            inspect=body.inspect,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )

    async def _answer(
        self, request: Request, body: schema.SamplingFields, parsed: ParsedRequest, writer: AnyWriter
    ) -> Response:
        options = body.stream_options if isinstance(body, schema.GenerationFields) else None

        async def count_prompts(admitted: AdmittedRequest) -> None:
            if options is not None and options.continuous_usage_stats:
                counting = (self._service.num_tokens(prompt, admitted.layouts) for prompt in admitted.prompts)
                counts = await asyncio.gather(*counting)
                known = [count for count in counts if count is not None]
                writer.num_prompt_tokens = sum(known) if len(known) == len(counts) else None

        encoding = RESPONSES_STREAM if isinstance(writer, ResponsesWriter) else STREAM
        streamed = bool(body.stream)
        return await answer(
            request,
            self._service,
            parsed,
            writer,
            encoding,
            model=body.model,
            streamed=streamed,
            on_admitted=count_prompts,
        )


def server_sent_event(reply: ReplyBody) -> bytes:
    """Encode one event of a stream; those of /v1/responses are named by their type."""
    name = f"event: {reply.type}\n" if isinstance(reply, ResponsesEvent) else ""
    return f"{name}data: {reply.as_json()}\n\n".encode()


def error_event(error: Exception) -> bytes:
    """Encode the last event of a stream that failed, which clients raise."""
    return f"event: error\ndata: {json.dumps(error_body(as_api_error(error), openai_form))}\n\n".encode()


RESPONSES_STREAM = StreamEncoding(EVENTS, server_sent_event, error_event)
STREAM = StreamEncoding(EVENTS, server_sent_event, error_event, b"data: [DONE]\n\n")


def unknown_model(name: str, known: list[str]) -> ApiError:
    available = ", ".join(known) if known else "none at the moment"
    return ApiError(404, f"there is no model {name!r}; models: {available}", code="model_not_found", param="model")


def unknown_response(response_id: str) -> ApiError:
    message = f"this server keeps no response {response_id!r}: it keeps some of the latest of each key, in memory"
    return ApiError(404, message, code="response_not_found", param="response_id")


def deleted(response_id: str) -> str:
    return schema.DeletedResponse(id=response_id, object="response", deleted=True).as_json()


# Routes and the OpenAPI document


def openai_routes(api: OpenAIApi) -> APIRouter:
    router = APIRouter(tags=["OpenAI-compatible"])

    def add(path: str, endpoint: Endpoint, description: str, *bodies: type[BaseModel]) -> None:
        about = {"description": description, **_described(*bodies)}
        router.add_api_route(path, endpoint, methods=["POST"], response_class=Response, **about)

    chat = (schema.ChatRequest, schema.ChatReply, schema.ChatChunk)
    add("/v1/chat/completions", api.chat_completions, "Answer a conversation, which may show images.", *chat)
    text = (schema.CompletionRequest, schema.TextReply, schema.TextReply)
    add("/v1/completions", api.completions, "Continue a finished prompt.", *text)
    same = "The same as a chat, in OpenAI's newer form; the latest answers are kept in memory for a while."
    add("/v1/responses", api.responses, same, ResponsesRequest, ResponsesReply, ResponsesEvent)

    vectors = (EmbeddingsRequest, EmbeddingsReply)
    add("/v1/embeddings", api.embeddings, "The vectors of texts, or of a chat that may show images.", *vectors)

    async def kept_response(request: Request, response_id: str) -> Response:
        """An answer of /v1/responses that is kept, as it was given."""
        if request.query_params.get("stream", "false") not in ("false", "0"):
            raise ApiError(400, "an answer that is kept is given as a whole; leave out stream", param="stream")
        if not RESPONSE_ID.fullmatch(response_id):
            raise unknown_response(response_id)
        return await api.kept_response(request, response_id)

    async def forget_response(request: Request, response_id: str) -> Response:
        """Forget an answer of /v1/responses."""
        if not RESPONSE_ID.fullmatch(response_id):
            raise unknown_response(response_id)
        return await api.kept_response(request, response_id)

    place, failures = "/v1/responses/{response_id}", _errors(400, 401, 403, 404, 421)
    router.add_api_route(place, kept_response, methods=["GET"], responses=failures, response_model=ResponsesReply)
    router.add_api_route(
        place, forget_response, methods=["DELETE"], responses=failures, response_model=schema.DeletedResponse
    )

    @router.get("/v1/models", responses=_errors(401, 403, 421), response_model=schema.ModelList)
    async def models() -> Response:
        """The models of this server."""
        return Response((await api.models()).as_json(), media_type="application/json")

    @router.get("/v1/models/{model:path}", responses=_errors(401, 403, 404, 421), response_model=schema.ModelEntry)
    async def model(model: str) -> Response:
        """One of them."""
        entries = (await api.models()).data
        for entry in entries:
            if entry.id == model:
                return Response(entry.as_json(), media_type="application/json")
        raise unknown_model(model, [entry.id for entry in entries])

    return router


def _described(body: type[BaseModel], reply: type[BaseModel], chunk: type[BaseModel] | None = None) -> dict[str, Any]:
    """The entry in the OpenAPI document of a route that parses its own body."""
    content: dict[str, object] = {"application/json": {"schema": _ref(reply)}}
    if chunk is not None:
        events = {"schema": {"description": f"server-sent events, the data of each a {chunk.__name__}"}}
        content[EVENTS.partition(";")[0]] = events
    streamed = "; with `stream` it comes in chunks, as server-sent events" if chunk is not None else ""
    ok = {"description": f"The answer{streamed}.", "content": content}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}}},
        "responses": {200: ok, **_errors(400, 401, 403, 404, 413, 415, 421, 429, 500, 502, 503, 504)},
    }


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": _ref(schema.ErrorReply)}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


_MEANINGS = {
    400: "The request cannot be answered; the message says why.",
    401: "An API key is missing or wrong.",
    403: "Sent by a page of another site.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is compressed in a way that this server does not know.",
    421: "This server does not answer to the name in the Host header.",
    429: "The server is full; Retry-After says when to try again.",
    500: "The server failed.",
    502: "The server behind this one failed.",
    503: "There is no worker for this model; Retry-After says when to try again.",
    504: "The answer took too long.",
}
SCHEMAS: Schemas = {
    schema.ChatRequest: "validation",
    schema.ChatReply: "serialization",
    schema.ChatChunk: "serialization",
    schema.CompletionRequest: "validation",
    schema.TextReply: "serialization",
    EmbeddingsRequest: "validation",
    EmbeddingsReply: "serialization",
    ResponsesRequest: "validation",
    ResponsesReply: "serialization",
    ResponsesEvent: "serialization",
    schema.ErrorReply: "serialization",
}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
