"""The application of a server: its routes, health and metrics, the OpenAPI document, and the checks in front.

In: routers and what they are about. Out: an ASGI application. server.py runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Literal

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import llava
from llava.serve.http.docs_page import render_docs
from llava.serve.http.errors import add_error_handlers
from llava.serve.http.metrics import CONTENT_TYPE, Metrics
from llava.serve.http.middleware import AccessMiddleware, AccessPolicy

OPEN_PATHS = ("/", "/health", "/ready", "/docs", "/openapi.json")

HealthCheck = Callable[[], Awaitable[str | None]]  # None, or what is wrong
Lifespan = Callable[[], AbstractAsyncContextManager[None]]
Schemas = Mapping[type[BaseModel], Literal["validation", "serialization"]]


def make_app(
    routers: Sequence[APIRouter],
    *,
    title: str,
    metrics: Metrics,
    access: AccessPolicy,
    liveness: HealthCheck,
    readiness: HealthCheck,
    schemas: Schemas,
    lifespans: Sequence[Lifespan] = (),
    open_paths: Collection[str] = (),
    worker_paths: Collection[str] = (),
) -> tuple[FastAPI, AccessMiddleware]:
    """Build the application of a server, and the same behind its checks, which is the one to run.

    `liveness` and `readiness` are what /health and /ready report. `schemas` are bodies ("validation") and replies
    ("serialization") that routes read and write themselves. Paths in `open_paths` and `OPEN_PATHS` need no API key, those in
    `worker_paths` a worker's.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for enter in lifespans:
                await stack.enter_async_context(enter())
            yield

    app = FastAPI(title=title, version=llava.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    add_error_handlers(app)
    for router in (*routers, _monitoring(metrics, liveness, readiness)):
        app.include_router(router)
    _document(app, schemas)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_docs(app.openapi()))

    known_paths = app.openapi()["paths"]
    open_paths = (*OPEN_PATHS, *open_paths)
    checked = AccessMiddleware(
        app, access, metrics, known_paths=known_paths, open_paths=open_paths, worker_paths=worker_paths
    )
    return app, checked


@asynccontextmanager
async def background(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Run a coroutine beside the block, and cancel it at the block's end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _monitoring(metrics: Metrics, liveness: HealthCheck, readiness: HealthCheck) -> APIRouter:
    router = APIRouter(tags=["monitoring"])

    @router.get("/health", responses={503: {"description": "It does not work any more."}})
    async def health() -> JSONResponse:
        """Whether this server works; one that does not should be started again."""
        return _health_response(await liveness())

    @router.get("/ready", responses={503: {"description": "Not now."}})
    async def ready() -> JSONResponse:
        """Whether it takes requests now; one that is being stopped does not."""
        return _health_response(await readiness())

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics_page() -> Response:
        """Counters, in the text format of Prometheus."""
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    return router


def _health_response(problem: str | None) -> JSONResponse:
    return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)


def _document(app: FastAPI, schemas: Schemas) -> None:
    """Add bodies and replies to the OpenAPI document, which FastAPI knows only where it parses them itself."""

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema(list(schemas.items()), ref_template="#/components/schemas/{model}")
            components = made.setdefault("components", {}).setdefault("schemas", {})
            components.update(definitions["$defs"])
            for unused in ("HTTPValidationError", "ValidationError"):  # invalid bodies get status 400 and an ErrorReply
                components.pop(unused, None)
            for path in made["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
