"""The controller's routes: those of the original for workers and clients, and those of the APIs that clients speak.

In: HTTP requests. Out: JSON, or a worker's response. The table of workers is in dispatch.py, forwarding in proxy.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request, Response

from llava.serve.anthropic import replies as anthropic
from llava.serve.apis import SCHEMAS, forwarded_routes
from llava.serve.http.app import Lifespan, background, make_app
from llava.serve.http.errors import ApiError, as_api_error
from llava.serve.http.json_body import read_json
from llava.serve.http.metrics import Gauge, Metrics
from llava.serve.http.middleware import AccessMiddleware, AccessPolicy
from llava.serve.ollama import replies as ollama
from llava.serve.ollama.requests import matches
from llava.serve.openai import schema
from llava.serve.openai.routes import error_event
from llava.serve.router import protocol
from llava.serve.router.dispatch import Dispatcher
from llava.serve.router.proxy import Proxy

logger = logging.getLogger("llava.serve")

SWEEP_S = 1.0  # between checks for workers whose heartbeats have stopped
STATUS_S = 5.0  # timeout of a request for a worker's status


class ControllerApi:
    """The routes over one dispatcher."""

    def __init__(self, dispatcher: Dispatcher, *, key: str | None = None, deadline_s: float = 600.0) -> None:
        self.dispatcher = dispatcher
        self._proxy = Proxy(dispatcher, key=key, deadline_s=deadline_s)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._created = int(time.time())

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        async with self._proxy.client, background(self._sweep()):
            yield

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for name in self.dispatcher.drop_expired():
                logger.warning("worker %s has sent no heartbeat for too long and is removed", name)

    async def liveness(self) -> str | None:
        return None

    async def readiness(self) -> str | None:
        return None if self.dispatcher.workers() else "no worker is registered"

    def gauges(self) -> dict[str, Gauge]:
        lengths = {worker.name: worker.queue_length for worker in self.dispatcher.workers()}
        return {"workers": len(lengths), "worker_queue_length": lengths}

    # The original's routes. A null in the answer is what the original sends.

    def router(self) -> APIRouter:
        router = APIRouter(tags=["original protocol"])
        dispatcher = self.dispatcher

        @router.post("/register_worker")
        async def register_worker(request: Request) -> None:
            """Register a worker; without `worker_status` it is asked for, and ignored where it does not answer."""
            registration = protocol.RegistrationBody.parse(await read_json(request))
            name = registration.worker_name
            status = registration.status or await self._ask_status(name)
            if status is not None:
                dispatcher.register(name, status, check_heart_beat=registration.check_heart_beat)
                logger.info("worker %s serves %s", name, ", ".join(status.model_names))

        @router.post("/unregister_worker")
        async def unregister_worker(request: Request) -> dict[str, bool]:
            """Send a worker no more requests."""
            return {"exist": dispatcher.unregister(protocol.text_field(await read_json(request), "worker_name"))}

        @router.post("/receive_heart_beat")
        async def receive_heart_beat(request: Request) -> dict[str, bool]:
            """Record a heartbeat; `exist` false asks the worker to register."""
            beat = protocol.HeartbeatBody.parse(await read_json(request))
            return {"exist": dispatcher.heart_beat(beat.worker_name, beat.queue_length)}

        @router.post("/refresh_all_workers")
        async def refresh_all_workers() -> None:
            """Ask every worker for its status, and remove those that do not answer."""
            for name, check_heart_beat, status in await self._statuses():
                if status is None:
                    dispatcher.unregister(name)
                else:
                    dispatcher.register(name, status, check_heart_beat=check_heart_beat)

        @router.post("/list_models")
        async def list_models() -> dict[str, list[str]]:
            """The names of all models."""
            return {"models": dispatcher.model_names()}

        @router.post("/get_worker_address")
        async def get_worker_address(request: Request) -> dict[str, str]:
            """The worker to ask for a model; an empty address where there is none."""
            return {"address": dispatcher.choose(protocol.text_field(await read_json(request), "model")) or ""}

        @router.post("/worker_get_status")
        async def worker_get_status() -> dict[str, object]:
            """The same as a worker's, over all workers that answer."""
            statuses = [status for _, _, status in await self._statuses() if status is not None]
            names = dict.fromkeys(name for status in statuses for name in status.model_names)
            queue_length = sum(status.queue_length for status in statuses)
            return protocol.WorkerStatus(tuple(names), sum(status.speed for status in statuses), queue_length).as_json()

        @router.post("/worker_generate_stream", response_class=Response)
        async def worker_generate_stream(request: Request) -> Response:
            """Forward a prompt to a worker."""
            return await self._generate(request)

        return router

    async def _generate(self, request: Request) -> Response:
        body = await self._body_of(request)
        model = body["model"]
        images = body.get("images")
        try:
            return await self._proxy.forward(
                request,
                "/worker_generate_stream",
                model=model,
                conversation=_fingerprint(model, images) if images else None,
                final_chunk=lambda error: protocol.encode_chunk(str(as_api_error(error)), protocol.WORKER_UNREACHABLE),
            )
        except ApiError as error:
            code = protocol.NO_WORKER if error.status in (404, 503) else protocol.WORKER_UNREACHABLE
            return Response(protocol.encode_chunk(str(error), code), 200 if error.status == 404 else error.status)

    async def _ask_status(self, worker: str) -> protocol.WorkerStatus | None:
        try:
            response = await self._proxy.client.post(
                worker.rstrip("/") + "/worker_get_status", headers=self._headers, timeout=STATUS_S
            )
            response.raise_for_status()
            return protocol.WorkerStatus.parse(response.json())
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            logger.warning("worker %s does not report its status: %s", worker, error or type(error).__name__)
            return None

    async def _statuses(self) -> list[tuple[str, bool, protocol.WorkerStatus | None]]:
        workers = self.dispatcher.workers()
        statuses = await asyncio.gather(*(self._ask_status(worker.name) for worker in workers))
        return [(w.name, w.check_heart_beat, status) for w, status in zip(workers, statuses, strict=True)]

    # The OpenAI-compatible routes.

    async def chat_completions(self, request: Request) -> Response:
        body = await self._body_of(request)
        return await self._forward(request, "/v1/chat/completions", body, _up_to_first_question(body.get("messages")))

    async def completions(self, request: Request) -> Response:
        body = await self._body_of(request)
        return await self._forward(request, "/v1/completions", body, None)

    async def responses(self, request: Request) -> Response:
        body = await self._body_of(request)
        given = body.get("input")
        question = _up_to_first_question(given) if isinstance(given, list) else given
        return await self._forward(request, "/v1/responses", body, question)

    # Ollama's and Anthropic's.

    async def ollama_chat(self, request: Request) -> Response:
        body = await self._ollama_body(request)
        question = _up_to_first_question(body.get("messages"))
        return await self._forward(request, "/api/chat", body, question, ollama.error_line)

    async def ollama_generate(self, request: Request) -> Response:
        body = await self._ollama_body(request)
        return await self._forward(request, "/api/generate", body, body.get("images"), ollama.error_line)

    async def messages(self, request: Request) -> Response:
        return await self._forward_messages(request, "/v1/messages")

    async def count_tokens(self, request: Request) -> Response:
        return await self._forward_messages(request, "/v1/messages/count_tokens")

    async def _forward_messages(self, request: Request, path: str) -> Response:
        body = await self._body_of(request)
        question = _up_to_first_question(body.get("messages"))
        return await self._forward(request, path, body, question, anthropic.error_event)

    async def _ollama_body(self, request: Request) -> dict[str, Any]:
        body = await self._body_of(request)
        known = (name for name in self.dispatcher.model_names() if matches(body["model"], name))
        return body | {"model": next(known, body["model"])}

    async def _body_of(self, request: Request) -> dict[str, Any]:
        body = await read_json(request)
        protocol.text_field(body, "model")
        assert isinstance(body, dict)
        return body

    async def _forward(
        self,
        request: Request,
        path: str,
        body: dict[str, Any],
        question: object,
        final_chunk: Callable[[Exception], bytes] = error_event,
    ) -> Response:
        key = body.get("prompt_cache_key") or question
        return await self._proxy.forward(
            request,
            path,
            model=body["model"],
            conversation=_fingerprint(body["model"], key) if key else None,
            final_chunk=final_chunk,
        )

    async def models(self) -> schema.ModelList:
        """List every model as one of its workers describes it, or by name alone where that worker does not."""
        workers = {name: worker.name for worker in self.dispatcher.workers() for name in worker.status.model_names}
        entries = await asyncio.gather(*(self._entry(name, worker) for name, worker in workers.items()))
        return schema.ModelList(object="list", data=list(entries))

    async def _entry(self, model: str, worker: str) -> schema.ModelEntry:
        try:
            response = await self._proxy.client.get(f"{worker}/v1/models", headers=self._headers, timeout=STATUS_S)
            response.raise_for_status()
            listed = schema.ModelList.model_validate(response.json())
            return next(entry for entry in listed.data if entry.id == model)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, StopIteration):
            return schema.ModelEntry(id=model, object="model", created=self._created, owned_by="llava")


def _up_to_first_question(messages: object) -> object:
    """Return the messages up to the first of the user, which all requests of one conversation have in common."""
    if not isinstance(messages, list):
        return None
    is_user = [isinstance(message, dict) and message.get("role") == "user" for message in messages]
    return messages[: is_user.index(True) + 1] if True in is_user else None


def _fingerprint(model: str, beginning: object) -> str:
    return hashlib.sha256(json.dumps([model, beginning]).encode()).hexdigest()


def controller_app(
    api: ControllerApi, access: AccessPolicy, *, lifespans: Sequence[Lifespan] = (), open_paths: Sequence[str] = ()
) -> tuple[FastAPI, AccessMiddleware]:
    return make_app(
        [api.router(), *forwarded_routes(api)],
        title="llava controller",
        metrics=Metrics(api.gauges),
        access=access,
        liveness=api.liveness,
        readiness=api.readiness,
        schemas=SCHEMAS,
        lifespans=[api.lifespan, *lifespans],
        open_paths=open_paths,
    )
