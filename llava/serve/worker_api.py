"""The original worker protocol over one model: its two routes.

In: what clients of the original post. Out: chunks that end in zero bytes (serve/router/protocol.py). A refusal is a
chunk too, in words, with an HTTP status that says whether another worker may be asked instead.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.engine.request import PromptTooLongError
from llava.serve.http.errors import as_api_error
from llava.serve.http.limits import decode_images
from llava.serve.http.streams import Stream, read_json, while_connected
from llava.serve.model_worker import generate_stream
from llava.serve.router.protocol import NO_ROOM, OK, WORKER_FAILED, GenerateBody, encode_chunk, text_field
from llava.serve.service import Asked, Service

CHUNKS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Chunks of JSON, `text` and `error_code`, each ended by a zero byte."}
}


class WorkerApi:
    """`stream_interval`: how many tokens go into one chunk."""

    def __init__(self, service: Service, stream_interval: int = 1) -> None:
        self._service = service
        self._stream_interval = stream_interval

    def router(self) -> APIRouter:
        router = APIRouter(tags=["original protocol"])

        @router.post("/worker_generate_stream", response_class=Response, responses=CHUNKS)
        async def worker_generate_stream(request: Request) -> Any:
            """Answer a prompt; each chunk has the prompt and the answer so far."""
            return await self._generate(request, await read_json(request))

        @router.post("/worker_get_status")
        async def worker_get_status() -> dict[str, Any]:
            """The names of the models, the speed, and the number of requests on their way."""
            return self._service.status().as_json()

        return router

    async def _generate(self, request: Request, values: Any) -> Response | Stream:
        deadline = asyncio.get_running_loop().time() + self._service.limits.deadline_s
        prompt = ""
        try:
            body = GenerateBody.parse(values)
            prompt = body.prompt
            if body.sampling is None:
                return one_chunk(prompt + NO_ROOM)
            async with asyncio.timeout_at(deadline):
                asked = await while_connected(request, self._ask(body))
        except ClientDisconnect:
            raise
        except PromptTooLongError:
            return one_chunk(prompt + NO_ROOM)
        except Exception as error:
            told = as_api_error(error)
            return one_chunk(str(told), WORKER_FAILED, told.status if told.status in (429, 503) else 200)
        return Stream(
            generate_stream(asked, body, self._stream_interval),
            media_type=None,
            deadline=deadline,
            last_words=lambda error: encode_chunk(str(as_api_error(error)), WORKER_FAILED),
            closed=asked.close,
        )

    async def _ask(self, body: GenerateBody) -> Asked:
        assert body.sampling is not None
        prompt = body.prompt.replace(DEFAULT_IMAGE_TOKEN, self._service.card.image_placeholder)
        return await self._service.ask([prompt], body.sampling, body.images, opener=decode_images)


def one_chunk(text: str, error_code: int = OK, status: int = 200) -> Response:
    return Response(encode_chunk(text, error_code), status)


def own_controller(service: Service) -> APIRouter:
    """A controller's answers, for the page and for the original's clients, where this worker is all there is."""
    router = APIRouter(tags=["original protocol"])
    name = service.card.name

    @router.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        """The name of the model."""
        return {"models": [name]}

    @router.post("/get_worker_address")
    async def get_worker_address(request: Request) -> dict[str, str]:
        """This server's own address, as the client wrote it; an empty one for another model."""
        own = str(request.base_url).rstrip("/")
        return {"address": own if text_field(await read_json(request), "model") == name else ""}

    @router.post("/refresh_all_workers")
    async def refresh_all_workers() -> None:
        """There is nothing to refresh."""

    return router
