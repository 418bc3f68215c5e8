"""The routes of Anthropic's Messages API: messages, the tokens of a prompt, models.

In: HTTP requests. Out: JSON, or server-sent events. Bodies are in schema.py, what they mean in requests.py, how answers look in
replies.py. The controller publishes the same routes (serve/router/routes.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope

from llava.errors import InputError
from llava.serve.answers import answer
from llava.serve.anthropic import replies, schema
from llava.serve.anthropic.requests import parse_count, parse_messages, stop_sequences
from llava.serve.bodies import read_body
from llava.serve.chat_turns import sources_of
from llava.serve.http.streams import cancel_on_disconnect
from llava.serve.openai.routes import unknown_model
from llava.serve.openai.schema import ModelList, Reply
from llava.serve.service import AdmittedRequest, Service

B = TypeVar("B", bound=schema.PromptFields)


class AnthropicApi(Protocol):
    """What answers the routes: a model here, or workers elsewhere."""

    async def messages(self, request: Request) -> Response: ...

    async def count_tokens(self, request: Request) -> Response: ...

    async def models(self) -> ModelList: ...


class ModelAnthropicApi:
    """The API of one model, which `models` lists."""

    def __init__(self, service: Service, models: Callable[[], Awaitable[ModelList]]) -> None:
        self._service = service
        self._models = models

    async def models(self) -> ModelList:
        return await self._models()

    async def messages(self, request: Request) -> Response:
        service = self._service
        body = await self._body(request, schema.MessagesRequest)
        parsed = parse_messages(body, service.card)
        writer = replies.MessageWriter(body.model, stop_sequences(body))

        async def count_prompt(admitted: AdmittedRequest) -> None:
            writer.num_prompt_tokens = await service.num_tokens(parsed.prompts[0], admitted.layouts) or 0

        streamed = bool(body.stream)
        return await answer(
            request,
            service,
            parsed,
            writer,
            replies.STREAM,
            model=body.model,
            streamed=streamed,
            on_admitted=count_prompt if streamed else None,
        )

    async def count_tokens(self, request: Request) -> Response:
        body = await self._body(request, schema.CountTokensRequest)
        parsed = parse_count(body, self._service.card)
        counting = self._service.count_tokens(parsed.prompts[0], sources_of(parsed.images))
        async with asyncio.timeout(self._service.limits.deadline_s):
            num_tokens = await cancel_on_disconnect(counting, request.receive)
        if num_tokens is None:
            raise InputError("the tokens of a prompt are known to the server behind this one only")
        return _json(schema.TokenCount(input_tokens=num_tokens))

    async def _body(self, request: Request, kind: type[B]) -> B:
        body = await read_body(request, kind, strict=self._service.limits.strict)
        if body.model not in self._service.card.model_names:
            raise unknown_model(body.model, self._service.card.model_names)
        return body


class AnthropicRoute(APIRoute):
    """A route for Anthropic's clients at a path that others use too."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if not any(name == b"anthropic-version" for name, _ in scope.get("headers", ())):
            return Match.NONE, {}
        return super().matches(scope)


def _json(reply: Reply) -> Response:
    return Response(reply.as_json(), media_type="application/json")


def anthropic_routes(api: AnthropicApi) -> APIRouter:
    """The routes; they come before those of the OpenAI-compatible API, with which they share /v1/models."""
    router = APIRouter(tags=["Anthropic's Messages API"])

    @router.post("/v1/messages", response_class=Response)
    async def messages(request: Request) -> Response:
        """Answer a conversation, which may show images; with `stream` as server-sent events."""
        return await api.messages(request)

    @router.post("/v1/messages/count_tokens", response_model=schema.TokenCount)
    async def count_tokens(request: Request) -> Response:
        """The number of tokens of a prompt with its images."""
        return await api.count_tokens(request)

    async def models() -> Response:
        return _json(replies.models_of(await api.models()))

    async def model(model: str) -> Response:
        entries = replies.models_of(await api.models()).data
        for entry in entries:
            if entry.id == model:
                return _json(entry)
        raise unknown_model(model, [entry.id for entry in entries])

    for path, endpoint in (("/v1/models", models), ("/v1/models/{model:path}", model)):
        router.routes.append(AnthropicRoute(path, endpoint, methods=["GET"], include_in_schema=False))
    return router
