"""Translate exceptions to HTTP: a status and one sentence, in the form of errors of the protocol that was asked.

In: exceptions of routes, and the path. Out: responses. The original protocol has its own error codes
(serve/router/protocol.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llava.errors import InputError, shortened
from llava.serve.backends.base import BackendError, ServerBusyError, UnreachableError
from llava.serve.http.forwarded import route_path
from llava.serve.http.request_record import current_id, note_error

logger = logging.getLogger("llava.serve")

RETRY_AFTER_S = 2
MAX_SHOWN_PATH = 100
WITHOUT_V1 = (
    "/chat/",
    "/completions",
    "/responses",
    "/models",
    "/embeddings",
    "/messages",
)  # of clients that forget it
API_PATHS = ("/v1/", "/api/", *WITHOUT_V1)
# Parts of the APIs that this server does not have, by the beginning of the path.
ABSENT = {
    "/v1/images": "generation of images",
    "/v1/audio": "audio",
    "/v1/moderations": "moderation",
    "/v1/files": "files",
    "/v1/batches": "batches",
    "/v1/messages/batches": "batches",
    "/v1/fine_tuning": "fine-tuning",
    "/v1/assistants": "assistants",
    "/v1/threads": "assistants",
    "/v1/rerank": "reranking",
    "/v1/score": "scoring",
    "/v1/realtime": "realtime sessions",
    "/v1/vector_stores": "vector stores",
}
CLIENT_LEFT = 499  # in logs and metrics: the client left before it had sent its request
MAX_MESSAGE = 1000  # characters
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = ERROR_TYPES | {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}


class ApiError(Exception):
    """An error with its HTTP status.

    `param` names the field of the body that caused it, `retry_after_s` says when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(shortened(message, MAX_MESSAGE))  # it may repeat a value of any length
        self.status, self.code, self.retry_after_s = status, code, retry_after_s
        self.param = None if param is None else shortened(param)

    @property
    def type(self) -> str:
        """Its type in OpenAI's form."""
        return ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def kind(self) -> str:
        """What it is counted as."""
        return self.code or self.type


ErrorForm = Callable[[ApiError], dict[str, object]]


def openai_form(error: ApiError) -> dict[str, object]:
    return {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.code}}


def ollama_form(error: ApiError) -> dict[str, object]:
    return {"error": str(error)}


def anthropic_form(error: ApiError) -> dict[str, object]:
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


# By the beginning of the path; all others have OpenAI's.
ERROR_FORMS: tuple[tuple[str, ErrorForm], ...] = (("/api/", ollama_form), ("/v1/messages", anthropic_form))


def form_of(path: str) -> ErrorForm:
    """Return the form of errors of the protocol that a path belongs to."""
    return next((form for beginning, form in ERROR_FORMS if path.startswith(beginning)), openai_form)


def error_response(
    error: ApiError, path: str, headers: Mapping[str, str] | None = None, **further: object
) -> JSONResponse:
    """Return the response for an error, in the form of the path's protocol; `further` fields are added to its body."""
    headers = dict(headers or {})
    if error.status in (429, 503):
        seconds = RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(math.ceil(seconds))
    note_error(error.kind, str(error))
    return JSONResponse(error_body(error, form_of(path)) | further, error.status, headers)


def error_body(error: ApiError, form: ErrorForm) -> dict[str, object]:
    """Return an error as JSON, with the id of the request, by which its log lines are found."""
    number = current_id()
    return form(error) | ({} if number is None else {"request_id": number})


def as_api_error(error: Exception) -> ApiError:
    """Return the error for the client, and note it. An unexpected one is logged with its traceback and reported without."""
    found = _as_api_error(error)
    note_error(found.kind, str(found))
    return found


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, ServerBusyError):
        code = "server_stopping" if error.stopping else "server_full"
        return ApiError(503 if error.stopping else 429, str(error), code=code, retry_after_s=error.retry_after_s)
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took longer than this server allows", code="deadline_exceeded")
    if isinstance(error, UnreachableError):
        return ApiError(503, str(error), code="backend_unreachable")
    if isinstance(error, BackendError):
        return ApiError(502, str(error), code="backend_failed")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    async def respond(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error), route_path(request.scope))

    async def respond_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        path = route_path(request.scope)
        if error.status_code not in (404, 405):
            return error_response(ApiError(error.status_code, str(error.detail)), path, error.headers)
        missing = _no_route(error.status_code, request.method, path)
        if path.startswith(API_PATHS):
            return error_response(missing, path, error.headers)
        note_error(missing.kind, str(missing))
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)  # as the original's servers

    async def respond_to_nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    app.add_exception_handler(HTTPException, respond_http)
    app.add_exception_handler(ClientDisconnect, respond_to_nobody)
    for kind in (ApiError, InputError, ServerBusyError, BackendError, TimeoutError):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(Exception, respond)


def _no_route(status: int, method: str, path: str) -> ApiError:
    shown = repr(path if len(path) <= MAX_SHOWN_PATH else path[:MAX_SHOWN_PATH] + "...")
    if status == 405:
        return ApiError(405, f"{shown} does not take {method[:20]}; /docs lists what this server has")
    if path.startswith(WITHOUT_V1):
        return ApiError(404, f"there is no {shown} here; the address of this API ends in /v1", code="unknown_url")
    absent = next((what for beginning, what in ABSENT.items() if path.startswith(beginning)), None)
    if absent is not None:
        return ApiError(404, f"this server has no {absent}; /docs lists what it has", code="not_supported")
    return ApiError(404, f"there is no {shown} here; /docs lists what this server has", code="unknown_url")
