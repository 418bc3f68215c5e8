"""The routes of Ollama's API: chat, generate, and what clients ask of the models.

In: HTTP requests. Out: JSON, or a line of JSON for each part of an answer. Bodies are in schema.py, what they mean in
requests.py, how answers look in replies.py. The controller publishes the same routes (serve/router/routes.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request, Response

import llava
from llava.engine.request import EmbedRequest
from llava.errors import InputError
from llava.serve.answers import answer
from llava.serve.bodies import read_body
from llava.serve.chat_turns import ParsedRequest
from llava.serve.http.errors import ApiError
from llava.serve.http.forwarded import route_path
from llava.serve.http.streams import cancel_on_disconnect
from llava.serve.ollama import replies, schema
from llava.serve.ollama.requests import matches, parse_generate, parse_ollama_chat
from llava.serve.openai.embeddings import check_dimensions
from llava.serve.openai.schema import ModelEntry, ModelList, Reply
from llava.serve.service import Service

B = TypeVar("B", bound=schema.AskingFields | schema.EmbedBody)
OLD_EMBEDDINGS = "/api/embeddings"  # one text, whose vector is not scaled
FIXED = "the models of this server are those that it was started with; they cannot be {0} by this API"
CHANGES = (
    ("POST", "/api/create", "created"),
    ("POST", "/api/copy", "copied"),
    ("POST", "/api/push", "pushed"),
    ("DELETE", "/api/delete", "deleted"),
)


class OllamaApi(Protocol):
    """What answers the routes: a model here, or workers elsewhere."""

    async def ollama_chat(self, request: Request) -> Response: ...

    async def ollama_generate(self, request: Request) -> Response: ...

    async def ollama_embed(self, request: Request) -> Response: ...

    async def models(self) -> ModelList: ...


class ModelOllamaApi:
    """The API of one model, which `models` lists."""

    def __init__(self, service: Service, models: Callable[[], Awaitable[ModelList]]) -> None:
        self._service = service
        self._models = models

    async def models(self) -> ModelList:
        return await self._models()

    async def ollama_chat(self, request: Request) -> Response:
        body = await self._body(request, schema.OllamaChatRequest)
        writer = replies.OllamaWriter(body.model, as_message=True)
        if not body.messages:
            return _loaded(body, writer)
        parsed = parse_ollama_chat(body, self._service.card)
        return await self._answer(request, body, parsed, writer)

    async def ollama_generate(self, request: Request) -> Response:
        body = await self._body(request, schema.GenerateRequest)
        writer = replies.OllamaWriter(body.model, as_message=False)
        if not body.prompt and not body.images:
            return _loaded(body, writer)
        parsed = parse_generate(body, self._service.card)
        return await self._answer(request, body, parsed, writer)

    async def ollama_embed(self, request: Request) -> Response:
        started = time.perf_counter_ns()
        body = await self._body(request, schema.EmbedBody)
        is_old = route_path(request.scope) == OLD_EMBEDDINGS
        given = body.prompt if is_old else body.input
        if given is None or (body.input if is_old else body.prompt) is not None:
            raise InputError("give prompt, and no input" if is_old else "give input, and no prompt")
        texts = [given] if isinstance(given, str) else given
        adapter = self._service.card.adapter_of(self._served(body))
        make_request = partial(EmbedRequest, normalize=not is_old, adapter=adapter)
        embedded = self._service.embed(texts, make_request)
        async with asyncio.timeout(self._service.limits.deadline_s):
            embeddings = await cancel_on_disconnect(embedded, request.receive)
        check_dimensions(body.dimensions, embeddings)
        vectors: list[list[float]] = [embedding.vectors[0].tolist() for embedding in embeddings]
        if is_old:
            return _json(schema.EmbedReply.model_construct(embedding=vectors[0]))
        return _json(
            schema.EmbedReply.model_construct(
                model=body.model,
                embeddings=vectors,
                total_duration=time.perf_counter_ns() - started,
                prompt_eval_count=sum(embedding.usage.num_prompt_tokens for embedding in embeddings),
            )
        )

    async def _body(self, request: Request, kind: type[B]) -> B:
        body = await read_body(request, kind, strict=self._service.limits.strict)
        self._served(body)
        return body

    async def _answer(
        self, request: Request, body: schema.AskingFields, parsed: ParsedRequest, writer: replies.OllamaWriter
    ) -> Response:
        how: dict[str, Any] = {"model": self._served(body), "streamed": body.stream is not False}
        return await answer(request, self._service, parsed, writer, replies.STREAM, **how)

    def _served(self, body: schema.AskingFields | schema.EmbedBody) -> str:
        """The name of the model, or of an adapter over it, that a request means."""
        name = next((name for name in self._service.card.model_names if matches(body.model, name)), None)
        if name is None:
            raise _unknown(body.model)
        return name


def _loaded(body: schema.AskingFields, writer: replies.OllamaWriter) -> Response:
    return _json(writer.nothing("unload" if body.keep_alive in (0, "0") else "load"))


def _json(reply: Reply) -> Response:
    return Response(reply.as_json(), media_type="application/json")


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"model {name[:200]!r} not found; GET /api/tags lists the models", code="model_not_found")


def _refusing(message: str) -> Callable[[], Awaitable[Response]]:
    async def refuse() -> Response:
        raise InputError(message)

    return refuse


def ollama_routes(api: OllamaApi) -> APIRouter:
    router = APIRouter(tags=["Ollama's API"])

    async def entry_of(request: Request) -> ModelEntry:
        body = await read_body(request, schema.ModelRequest)
        name = body.model or body.name
        if not name:
            raise InputError("model is missing: the name of a model")
        entry = next((entry for entry in (await api.models()).data if matches(name, entry.id)), None)
        if entry is None:
            raise _unknown(name)
        return entry

    @router.post("/api/chat", response_class=Response)
    async def chat(request: Request) -> Response:
        """Answer a conversation, which may show images; a stream of lines of JSON unless `stream` is false."""
        return await api.ollama_chat(request)

    @router.post("/api/generate", response_class=Response)
    async def generate(request: Request) -> Response:
        """Answer one question, or continue a raw prompt."""
        return await api.ollama_generate(request)

    @router.post("/api/embed", response_model=schema.EmbedReply)
    async def embed(request: Request) -> Response:
        """The vectors of texts."""
        return await api.ollama_embed(request)

    @router.post(OLD_EMBEDDINGS, response_model=schema.EmbedReply)
    async def embeddings(request: Request) -> Response:
        """The vector of one text, in the older form."""
        return await api.ollama_embed(request)

    @router.get("/api/tags", response_model=schema.Tags)
    async def tags() -> Response:
        """The models of this server."""
        return _json(schema.Tags(models=[replies.listed(entry) for entry in (await api.models()).data]))

    @router.get("/api/ps", response_model=schema.RunningModels)
    async def ps() -> Response:
        """The models that are loaded, which are all."""
        return _json(schema.RunningModels(models=[replies.running(entry) for entry in (await api.models()).data]))

    @router.post("/api/show", response_model=schema.ShownModel)
    async def show(request: Request) -> Response:
        """One of the models."""
        return _json(replies.shown(await entry_of(request)))

    @router.get("/api/version", response_model=schema.Version)
    async def version() -> Response:
        """The version of this package."""
        return _json(schema.Version(version=llava.__version__))

    @router.post("/api/pull", response_model=schema.Status)
    async def pull(request: Request) -> Response:
        """Nothing is downloaded: a model of this server is there, and no other can be fetched."""
        await entry_of(request)
        return Response(schema.Status(status="success").as_json() + "\n", media_type=replies.LINES)

    refused = [(method, path, FIXED.format(what)) for method, path, what in CHANGES]
    for method, path, message in refused:
        router.add_api_route(path, _refusing(message), methods=[method], include_in_schema=False)
    return router
