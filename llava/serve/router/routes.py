"""The controller's routes: those of the original for workers and clients, and those of the APIs that clients speak.

In: HTTP requests. Out: JSON, or a worker's response. The table of workers is in dispatch.py, forwarding in proxy.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request, Response

from llava.errors import shortened
from llava.serve.anthropic import replies as anthropic
from llava.serve.apis import SCHEMAS, forwarded_routes
from llava.serve.http.app import Lifespan, background, make_app
from llava.serve.http.errors import ApiError, as_api_error
from llava.serve.http.forwarded import route_path
from llava.serve.http.json_body import read_json
from llava.serve.http.keys import authorization_of, bearer_key
from llava.serve.http.metrics import Gauge, Metrics
from llava.serve.http.middleware import AccessMiddleware, AccessPolicy
from llava.serve.ollama import replies as ollama
from llava.serve.ollama.requests import matches
from llava.serve.openai import schema
from llava.serve.openai.routes import error_event, unknown_response
from llava.serve.router import protocol
from llava.serve.router.dispatch import Dispatcher, Worker
from llava.serve.router.places import WorkerPlaces
from llava.serve.router.protocol import read_start
from llava.serve.router.proxy import Proxy, headers_for

logger = logging.getLogger("llava.serve")

PROBE_S = 1.0  # between questions to every worker for its status
STATUS_S = 5.0  # timeout of such a question
SILENT_AFTER = 2  # questions in a row without an answer, after which a worker counts as silent
ENTRY_S = 10.0  # for which a worker's description of its models is kept
MAX_AT_ONCE = 32  # questions to workers
MAX_STATUS = 1 << 20  # bytes of an answer to them
WORKER_PATHS = ("/register_worker", "/unregister_worker", "/receive_heart_beat")


class ControllerApi:
    """The routes over one dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        places: WorkerPlaces | None = None,
        deadline_s: float = 600.0,
        probe_s: float = PROBE_S,
    ) -> None:
        self.dispatcher = dispatcher
        self._places = places or WorkerPlaces()
        self._proxy = Proxy(dispatcher, deadline_s=deadline_s)
        self._probe_s = probe_s
        self._num_unanswered: Counter[str] = Counter()  # questions in a row, of each worker
        self._not_found: set[str] = set()  # at the last question
        self._probing: asyncio.Future[None] | None = None
        self._at_once = asyncio.Semaphore(MAX_AT_ONCE)
        self._entries: dict[str, tuple[float, list[schema.ModelEntry]]] = {}  # of each worker, and when it was asked
        self._created = int(time.time())

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        async with self._proxy.client, background(self._watch()):
            yield

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._probe_s)
            for name in self.dispatcher.drop_expired():
                logger.warning("worker %s has not been heard of for too long and is removed", name)
            await self._probe_all()

    async def _probe_all(self) -> None:
        """Ask every worker for its status; whoever calls this meanwhile waits for the same answers."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.ensure_future(self._ask_all())
        await asyncio.shield(self._probing)

    async def _ask_all(self) -> None:
        workers, self._not_found = self.dispatcher.workers(), set()
        await asyncio.gather(*(self._probe(worker) for worker in workers))
        self._num_unanswered = Counter({w.name: self._num_unanswered[w.name] for w in workers})

    async def _probe(self, worker: Worker) -> None:
        """Ask a worker for its status: one that is gone, or says that it does not work, is not chosen until it does."""
        try:
            status = await self._ask_status(worker)
        except httpx.TimeoutException:
            self._num_unanswered[worker.name] += 1
            if self._num_unanswered[worker.name] >= SILENT_AFTER:
                self._note_down(worker, "it does not answer any more", silent=True)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            if isinstance(error, httpx.ConnectError):
                self._not_found.add(worker.name)
            self._note_down(worker, str(error) or type(error).__name__)
        else:
            if worker.unreachable_since is not None:
                logger.info("worker %s answers", worker.name)
            self._num_unanswered[worker.name] = 0
            self.dispatcher.note_status(worker.name, status)

    def _note_down(self, worker: Worker, reason: str, *, silent: bool = False) -> None:
        if worker.unreachable_since is None or silent > worker.silent:
            logger.warning("worker %s is not asked for now: %s", worker.name, shortened(reason))
        self.dispatcher.mark_unreachable(worker.name, silent=silent)
        if silent:
            self._proxy.end_waits(worker.name)

    async def liveness(self) -> str | None:
        return None

    async def readiness(self) -> str | None:
        workers = self.dispatcher.workers()
        if not workers:
            return "no worker is registered"
        return None if any(self.dispatcher.is_reachable(worker) for worker in workers) else "no worker answers"

    def gauges(self) -> dict[str, Gauge]:
        workers = self.dispatcher.workers()
        return {
            "workers": sum(self.dispatcher.is_reachable(worker) for worker in workers),
            "worker_queue_length": {worker.name: worker.queue_length for worker in workers},
            "worker_failures": {worker.name: worker.num_failures for worker in workers},
        }

    # The original's routes. A null in the answer is what the original sends.

    def router(self) -> APIRouter:
        router = APIRouter(tags=["original protocol"])
        dispatcher = self.dispatcher

        @router.post("/register_worker")
        async def register_worker(request: Request) -> None:
            """Register a worker; without `worker_status` it is asked for, and ignored where it does not answer."""
            registration = protocol.RegistrationBody.parse(await read_json(request))
            name, key = registration.worker_name, bearer_key(authorization_of(request.headers))
            place = await self._places.check(name, request.client.host if request.client else None)
            status = registration.status
            if status is None:
                asked = Worker.unknown(name, url=place.url, host_header=place.host_header, key=key)
                try:
                    status = await self._ask_status(asked)
                except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                    reason = shortened(str(error) or type(error).__name__)
                    logger.warning("worker %s does not report its status: %s", name, reason)
                    return
            at = {"url": place.url, "host_header": place.host_header, "key": key}
            dispatcher.register(name, status, check_heart_beat=registration.check_heart_beat, **at)
            self._entries.pop(name, None)
            logger.info("worker %s serves %s", name, shortened(", ".join(status.model_names)))

        @router.post("/unregister_worker")
        async def unregister_worker(request: Request) -> dict[str, bool]:
            """Send a worker no more requests."""
            name = protocol.text_field(await read_json(request), "worker_name")
            return {"exist": dispatcher.unregister(name, key=bearer_key(authorization_of(request.headers)))}

        @router.post("/receive_heart_beat")
        async def receive_heart_beat(request: Request) -> dict[str, bool]:
            """Record a heartbeat; `exist` false asks the worker to register."""
            beat = protocol.HeartbeatBody.parse(await read_json(request))
            key = bearer_key(authorization_of(request.headers))
            return {"exist": dispatcher.heart_beat(beat.worker_name, beat.queue_length, key=key)}

        @router.post("/refresh_all_workers")
        async def refresh_all_workers() -> None:
            """Ask every worker for its status, and remove those to which no connection can be made."""
            await self._probe_all()
            for name in self._not_found:
                dispatcher.remove(name)

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
            """The same as a worker's, of all workers together."""
            await self._probe_all()
            workers = [worker for worker in dispatcher.workers() if dispatcher.is_reachable(worker)]
            names = dict.fromkeys(name for worker in workers for name in worker.status.model_names)
            speed, queue_length = sum(w.status.speed for w in workers), sum(w.queue_length for w in workers)
            return protocol.WorkerStatus(tuple(names), speed, queue_length).as_json()

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

    async def _ask_status(self, worker: Worker) -> protocol.WorkerStatus:
        return protocol.WorkerStatus.parse(await self._ask(worker, "POST", "/worker_get_status"))

    async def _ask(self, worker: Worker, method: str, path: str) -> object:
        """Ask a worker about itself; raises an error of httpx, or a ValueError."""
        headers = headers_for(worker)
        async with self._at_once:
            try:
                async with (
                    asyncio.timeout(STATUS_S),
                    self._proxy.client.stream(method, worker.url + path, headers=headers) as response,
                ):
                    response.raise_for_status()
                    return json.loads(await read_start(response, MAX_STATUS))
            except TimeoutError as error:
                raise httpx.ReadTimeout(f"it did not answer within {STATUS_S:g} s") from error
            except RecursionError as error:
                raise ValueError("its answer is nested too deeply") from error

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

    async def embeddings(self, request: Request) -> Response:
        return await self._forward(request, "/v1/embeddings", await self._body_of(request), None)

    async def kept_response(self, request: Request, response_id: str) -> Response:
        """Ask every worker, since only the one that gave an answer keeps it."""
        workers = [worker for worker in self.dispatcher.workers() if self.dispatcher.is_reachable(worker)]
        path = f"/v1/responses/{response_id}"
        asking = (self._ask_kept(worker, request.method, path) for worker in workers)
        found = next((answer for answer in await asyncio.gather(*asking) if answer is not None), None)
        if found is None:
            raise unknown_response(response_id)
        return Response(found, media_type="application/json")

    async def _ask_kept(self, worker: Worker, method: str, path: str) -> bytes | None:
        try:
            async with self._at_once, asyncio.timeout(STATUS_S):
                return await self._proxy.body_of(worker, method, path)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            return None  # as one that keeps nothing: it may be gone

    # Ollama's and Anthropic's.

    async def ollama_chat(self, request: Request) -> Response:
        body = await self._ollama_body(request)
        question = _up_to_first_question(body.get("messages"))
        return await self._forward(request, "/api/chat", body, question, ollama.error_line)

    async def ollama_generate(self, request: Request) -> Response:
        body = await self._ollama_body(request)
        return await self._forward(request, "/api/generate", body, body.get("images"), ollama.error_line)

    async def ollama_embed(self, request: Request) -> Response:
        path = route_path(request.scope)
        return await self._forward(request, path, await self._ollama_body(request), None, ollama.error_line)

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
        reachable = [worker for worker in self.dispatcher.workers() if self.dispatcher.is_reachable(worker)]
        workers = {name: worker for worker in reachable for name in worker.status.model_names}
        asked = {worker.name: worker for worker in workers.values()}
        described = await asyncio.gather(*(self._described(worker) for worker in asked.values()))
        entries = {(name, entry.id): entry for name, found in zip(asked, described, strict=True) for entry in found}
        rows = []
        for model in self.dispatcher.model_names():
            plain = schema.ModelEntry(id=model, object="model", created=self._created, owned_by="llava")
            rows.append(entries.get((workers[model].name, model), plain) if model in workers else plain)
        return schema.ModelList(object="list", data=rows)

    async def _described(self, worker: Worker) -> list[schema.ModelEntry]:
        """Return how a worker describes its models; asked at most every few seconds, whatever it answers."""
        now = time.monotonic()
        asked, entries = self._entries.get(worker.name, (-ENTRY_S, []))
        if now - asked < ENTRY_S:
            return entries
        try:
            entries = schema.ModelList.model_validate(await self._ask(worker, "GET", "/v1/models")).data
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            entries = []
        known = self.dispatcher.workers()
        self._entries = {w.name: self._entries[w.name] for w in known if w.name in self._entries}
        self._entries[worker.name] = (now, entries)
        return entries


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
        worker_paths=WORKER_PATHS,
    )
