"""The routes of a worker in the original's protocol.

In: what clients of the original post. Out: chunks that end in zero bytes (protocol.py). An error is a chunk too, with a message
and an HTTP status that says whether another worker may be asked instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.engine.request import PromptTooLongError
from llava.serve.http.errors import as_api_error
from llava.serve.http.json_body import read_json
from llava.serve.http.limits import VideoUrl, decode_images
from llava.serve.http.streams import StreamedResponse, cancel_on_disconnect
from llava.serve.openai.replies import stats_as_json
from llava.serve.router import protocol
from llava.serve.service import AdmittedRequest, Service

CHUNKS: dict[int | str, dict[str, object]] = {
    200: {"description": "Chunks of JSON, `text` and `error_code`, each ended by a zero byte."}
}


class WorkerApi:
    """The original's routes over one model; `stream_interval` is the number of tokens in a chunk."""

    def __init__(self, service: Service, stream_interval: int = 1) -> None:
        self._service = service
        self._stream_interval = stream_interval

    def router(self) -> APIRouter:
        router = APIRouter(tags=["original protocol"])
        stream = router.post("/worker_generate_stream", response_class=Response, responses=CHUNKS)
        stream(self.worker_generate_stream)
        router.post("/worker_get_status")(self.worker_get_status)
        return router

    def status(self) -> protocol.WorkerStatus:
        """Return what a controller needs. As in the original, the queue is all requests that are not finished."""
        return protocol.WorkerStatus(tuple(self._service.card.model_names), 1, self._service.num_answers)

    async def worker_get_status(self) -> Response:
        """The names of the models, the speed, and the number of unfinished requests; status 503 where the model is gone."""
        problem = await self._service.readiness()
        return JSONResponse(self.status().as_json(), 503 if problem else 200)

    async def worker_generate_stream(self, request: Request) -> Response:
        """Answer a prompt; each chunk has the prompt and the answer so far."""
        values = await read_json(request)
        service = self._service
        deadline = asyncio.get_running_loop().time() + service.limits.deadline_s
        try:
            body = protocol.GenerateBody.parse(values)
            if body.sampling is None:
                return _one_chunk(body.prompt + protocol.CONTEXT_FULL)
            prompt = body.prompt.replace(DEFAULT_IMAGE_TOKEN, service.card.image_placeholder)
            named = body.model if body.model in service.card.model_names else service.card.name
            adapter = service.card.adapter_of(named)
            # Not of the original: a video, by the type of its data: URL.
            shown = [VideoUrl(image) if image.startswith("data:video/") else image for image in body.images]
            submitted = service.submit([prompt], body.sampling, shown, opener=decode_images, adapter=adapter)
            async with asyncio.timeout_at(deadline):
                admitted = await cancel_on_disconnect(submitted, request.receive)
        except ClientDisconnect:
            raise
        except PromptTooLongError:
            return _one_chunk(body.prompt + protocol.CONTEXT_FULL)
        except Exception as error:
            problem = as_api_error(error)
            status = problem.status if problem.status == 429 or problem.status >= 500 else 200
            return _one_chunk(str(problem), protocol.WORKER_FAILED, status)
        return StreamedResponse(
            generate_stream(admitted, body, self._stream_interval),
            media_type=None,
            deadline=deadline,
            final_chunk=lambda error: protocol.encode_chunk(str(as_api_error(error)), protocol.WORKER_FAILED),
            on_close=admitted.close,
        )


async def generate_stream(
    admitted: AdmittedRequest, body: protocol.GenerateBody, stream_interval: int
) -> AsyncIterator[bytes]:
    """Yield the chunks of one answer: the prompt as it was posted, and the answer so far."""
    text, sent, num_tokens = body.prompt, None, 0
    async for chunk in admitted:
        text += chunk.text
        num_tokens += len(chunk.token_ids) or 1  # a remote server gives text alone
        if sent is None or (text != sent and num_tokens >= stream_interval):
            yield protocol.encode_chunk(text)
            sent, num_tokens = text, 0
    if body.inspect:
        yield protocol.encode_chunk(text, protocol.OK, **stats_as_json(admitted.stats()))
    elif text != sent:
        yield protocol.encode_chunk(text)


def _one_chunk(text: str, error_code: int = protocol.OK, status: int = 200) -> Response:
    return Response(protocol.encode_chunk(text, error_code), status)


def single_worker_routes(service: Service) -> APIRouter:
    """The answers of a controller, for the page and the original's clients, where this worker has no controller."""
    router = APIRouter(tags=["original protocol"])
    names = service.card.model_names

    @router.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        """The names of the model and of its adapters."""
        return {"models": names}

    @router.post("/get_worker_address")
    async def get_worker_address(request: Request) -> dict[str, str]:
        """This server's own address, as the client wrote it; an empty one for another model."""
        own = str(request.base_url).rstrip("/")
        return {"address": own if protocol.text_field(await read_json(request), "model") in names else ""}

    @router.post("/refresh_all_workers")
    async def refresh_all_workers() -> None:
        """There is nothing to refresh."""

    return router
