"""Translate exceptions to HTTP: a status and one sentence, in the form of OpenAI's errors.

In: exceptions of routes. Out: responses. The original protocol has its own error codes (serve/router/protocol.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llava.errors import InputError
from llava.serve.backends.base import BackendError, ServerBusyError, UnreachableError

logger = logging.getLogger("llava.serve")

RETRY_AFTER_S = 2
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its HTTP status. `param` names the field of the body that caused it."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, object]:
        """The error as JSON, in OpenAI's form."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    headers = dict(headers or {})
    if error.status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER_S)
    return JSONResponse(error.body(), error.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """Return the error for the client. An unexpected one is logged with its traceback and reported without."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, ServerBusyError):
        code = "server_stopping" if error.stopping else "server_full"
        return ApiError(503 if error.stopping else 429, str(error), code=code)
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
        return error_response(as_api_error(error))

    async def respond_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405):  # in the form of the original's servers, for its clients
            return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
        return error_response(ApiError(error.status_code, str(error.detail)), error.headers)

    app.add_exception_handler(HTTPException, respond_http)
    for kind in (ApiError, InputError, ServerBusyError, BackendError, TimeoutError):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(Exception, respond)
