"""The pieces of an HTTP application that all of our servers share: routes for health and metrics, the door, the documents.

In: routers and what stands behind them. Out: an ASGI application. Running it is server.py's work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware

import llava
from llava.serve.http.errors import add_error_handlers
from llava.serve.http.limits import ApiKeys
from llava.serve.http.memory_budget import Room
from llava.serve.http.metrics import CONTENT_TYPE, Metrics
from llava.serve.http.middleware import Guard
from llava.serve.openai.routes import publish

OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/docs/oauth2-redirect", "/openapi.json")


@dataclass(frozen=True)
class Door:
    """Who may come in."""

    keys: ApiKeys = field(default_factory=ApiKeys)
    max_body_bytes: int = 64 * 2**20
    hosts: tuple[str, ...] | None = None  # names that the server answers to; None: any
    origins: tuple[str, ...] = ()  # other sites whose pages may ask
    room: Room = field(default_factory=Room)  # for what all requests carry


Condition = Callable[[], Awaitable[str | None]]  # None, or what is wrong
Lifespan = Callable[[], AbstractAsyncContextManager[None]]


def make_app(
    routers: Sequence[APIRouter],
    *,
    title: str,
    metrics: Metrics,
    door: Door,
    alive: Condition,
    ready: Condition,
    lifespans: Sequence[Lifespan] = (),
    open_paths: Collection[str] = (),
) -> tuple[FastAPI, Guard]:
    """The application, to which pages may still be mounted, and the guarded form of it that is to be run."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for one in lifespans:
                await stack.enter_async_context(one())
            yield

    app = FastAPI(title=title, version=llava.__version__, lifespan=lifespan, redoc_url=None)
    add_error_handlers(app)
    for router in (*routers, _monitoring(metrics, alive, ready)):
        app.include_router(router)
    publish(app)
    if door.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(door.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    guard = Guard(
        app,
        keys=door.keys,
        max_body_bytes=door.max_body_bytes,
        room=door.room,
        metrics=metrics,
        known_paths=app.openapi()["paths"],
        open_paths=(*OPEN_PATHS, *open_paths),
        hosts=door.hosts,
        origins=door.origins,
    )
    return app, guard


def _monitoring(metrics: Metrics, alive: Condition, ready: Condition) -> APIRouter:
    router = APIRouter(tags=["monitoring"])

    @router.get("/health", responses={503: {"description": "It does not work any more."}})
    async def health() -> Any:
        """Whether this server works; one that does not should be started again."""
        return _told(await alive())

    @router.get("/ready", responses={503: {"description": "Not now."}})
    async def is_ready() -> Any:
        """Whether it takes requests now; one that is being stopped does not."""
        return _told(await ready())

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def numbers() -> Response:
        """Counters, in the text format of Prometheus."""
        return Response(metrics.page(), headers={"content-type": CONTENT_TYPE})

    return router


def _told(trouble: str | None) -> JSONResponse:
    status = {"status": "ok"} if trouble is None else {"status": trouble}
    return JSONResponse(status, 200 if trouble is None else 503)
