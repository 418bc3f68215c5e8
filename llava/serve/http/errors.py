"""Errors as HTTP says them: a status and one sentence, in the form that OpenAI's clients read.

In: exceptions of handlers. Out: responses. The original protocol has error codes of its own (serve/router/protocol.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llava.errors import InputError
from llava.serve.backends.base import BackendError, ServerBusyError, UnreachableError

logger = logging.getLogger("llava.serve")

RETRY_AFTER_S = 2  # what a full server asks for


class ApiError(Exception):
    """A refusal with its status. `param` names the field that is to blame."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": _kind(status), "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    headers = dict(headers or {})
    if status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER_S)
    return JSONResponse(error_body(status, message, code=code, param=param), status, headers)


def _kind(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def as_api_error(error: Exception) -> ApiError:
    """What a failed request is told. Faults of our own are logged with their traceback and told without it."""
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
    async def answer(request: Request, error: Exception) -> JSONResponse:
        told = as_api_error(error)
        return error_response(told.status, str(told), code=told.code, param=told.param)

    async def answer_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405):  # as the original's servers say it, for its clients
            return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    app.add_exception_handler(HTTPException, answer_http)
    for kind in (ApiError, InputError, ServerBusyError, BackendError, TimeoutError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)
