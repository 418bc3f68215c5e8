"""What stands between visitors and Gradio: the login, the routes that the page needs, its files and events within limits.

In: requests for the page. Out: Gradio's answers with headers that bind the browser, or a refusal of one sentence. Gradio has
many more routes than a page needs, among them some that fetch addresses and files; only those of `ROUTES` reach it. Uploads are
taken and files are served here. An event may name only files that its visitor has uploaded, and the page's examples.
"""

from __future__ import annotations

import asyncio
import html
import secrets
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from starlette.datastructures import MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.errors import InputError
from llava.images.formats import FORMATS
from llava.serve.backends.base import ServerBusyError
from llava.serve.http.forwarded import route_path
from llava.serve.http.json_body import parse_json
from llava.serve.http.keys import ApiKeys
from llava.serve.web.visitors import Visitor, Visitors

COOKIE = "llava_page"
VISITOR = "llava.visitor"  # in the scope of a request
API = "/gradio_api"
FILE = f"{API}/file="
# Method and path of what Gradio answers; one that ends in / stands for all below it.
ROUTES = (
    ("GET", "/"),
    ("GET", "/config"),
    ("GET", "/theme.css"),
    ("GET", "/manifest.json"),
    ("GET", "/favicon.ico"),
    ("GET", "/assets/"),
    ("GET", "/static/"),
    ("GET", f"{API}/theme.css"),
    ("GET", f"{API}/heartbeat/"),
    ("GET", f"{API}/queue/data"),
    ("GET", f"{API}/startup-events"),
    ("POST", f"{API}/queue/join"),
    ("POST", f"{API}/cancel"),
    ("POST", f"{API}/reset"),
)
MAX_LOGIN_BYTES = 4096
LOGIN_PAUSE_S = 1.0  # after a wrong key
TIDY_S = 10.0
MAX_SESSION = 64  # characters
# An answer may hold anything; whatever a browser makes of it, it loads nothing from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; media-src 'self' data: blob:; "
    "worker-src 'self' blob:; manifest-src 'self'; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors {}"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-dns-prefetch-control": "off",  # the names of links are not looked up before somebody follows them
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
}
LOGIN_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>LLaVA</title><style>
body {{font: 1rem system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh; color-scheme: light dark}}
form {{display: grid; gap: 0.75rem; width: min(20rem, 90vw)}}
input, button {{font: inherit; padding: 0.6rem}}
</style></head><body><form method="post" action="{action}">
<h1>LLaVA</h1><label for="key">{message}</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Open</button></form></body></html>
"""


class PageMiddleware:
    """The page behind its checks.

    `num_inputs` has the number of values that each event of the page takes. `end_session` is told of the sessions whose page is
    closed for good.
    """

    def __init__(
        self,
        page: ASGIApp,
        visitors: Visitors,
        keys: ApiKeys,
        *,
        examples: Path,
        num_inputs: Mapping[int, int],
        framed_by: tuple[str, ...] = (),
        end_session: Callable[[str], None] = lambda session: None,
    ) -> None:
        self._page = page
        self._visitors = visitors
        self._keys = keys
        self._examples = examples.resolve()
        self._num_inputs = num_inputs
        self._end_session = end_session
        self._policy = POLICY.format(" ".join(("'self'", *framed_by)) if framed_by else "'none'")
        self._is_framed = bool(framed_by)

    async def tidy(self) -> None:
        """Delete what visitors left, from time to time."""
        while True:
            await asyncio.sleep(TIDY_S)
            for session in self._visitors.tidy():
                self._end_session(session)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._page(scope, receive, send)
            return
        request = Request(scope, receive)
        path = route_path(scope) or "/"
        cookie = _cookie(request)

        async def send_bound(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update({**HEADERS, "content-security-policy": self._policy})
                if not self._is_framed:
                    headers["x-frame-options"] = "DENY"
                if not cookie and not self._keys and path == "/":
                    headers.append("set-cookie", self._set_cookie(request, secrets.token_urlsafe(32)))
            await send(message)

        try:
            answer = await self._answer(request, path, cookie)
        except ServerBusyError as error:
            answer = _refusal(str(error), 429)
        except InputError as error:
            answer = _refusal(str(error), 400)
        except TimeoutError:
            answer = _refusal("the data of this request did not arrive in time", 408)
        except HTTPException as error:
            answer = _refusal(str(error.detail), error.status_code)
        await answer(scope, receive, send_bound)

    async def _answer(self, request: Request, path: str, cookie: str) -> ASGIApp:
        """Return what answers a request: a response of this page, or Gradio."""
        method = request.method
        if self._keys:
            if (method, path) == ("POST", "/login"):
                return await self._log_in(request)
            visitor = self._visitors.find(cookie) if cookie else None
            if visitor is None or not visitor.key:
                return self._login_page(request) if path == "/" else _refusal("log in first: load the page", 401)
            if (method, path) == ("POST", "/logout"):
                self._visitors.leave(cookie)
                return RedirectResponse(self._root(request), 303)
        else:
            client = request.client.host if request.client else ""
            visitor_name = cookie or f"address {client}"
            visitor = self._visitors.find(visitor_name)
        if path.startswith(FILE) and method in ("GET", "HEAD"):
            return self._file(visitor, path[len(FILE) :])
        if not any(_fits(method, path, route) for route in (*ROUTES, ("POST", f"{API}/upload"))):
            return _refusal("there is nothing here", 404)
        if not path.startswith(f"{API}/") or path.endswith((".css", "/startup-events")):
            return self._page
        if visitor is None:
            visitor = self._visitors.enter(visitor_name)
        request.scope[VISITOR] = visitor
        if path == f"{API}/upload":
            return await self._upload(request, visitor)
        if path.startswith(f"{API}/heartbeat/"):
            return self._connected(visitor, _session(path.rpartition("/")[2]))
        if path == f"{API}/queue/data":
            if request.query_params.get("session_hash") not in visitor.pages:
                return _refusal("this page is closed; load it again", 404)
            return self._page
        return await self._event(request, visitor, is_asked=path == f"{API}/queue/join")

    # Login

    def _login_page(self, request: Request, message: str = "API key of this server", status: int = 401) -> Response:
        action = html.escape(f"{self._root(request)}login")
        return HTMLResponse(LOGIN_PAGE.format(action=action, message=html.escape(message)), status)

    async def _log_in(self, request: Request) -> Response:
        async with asyncio.timeout(self._visitors.limits.body_s):
            body = await _body(request, MAX_LOGIN_BYTES)
        key = urllib.parse.parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0].strip()
        if not self._keys.allow(f"Bearer {key}"):
            await asyncio.sleep(LOGIN_PAUSE_S)
            return self._login_page(request, "This is not a key of this server. API key:")
        name = secrets.token_urlsafe(32)
        self._visitors.enter(name, key=key)
        answer = RedirectResponse(self._root(request), 303)
        answer.headers["set-cookie"] = self._set_cookie(request, name)
        return answer

    def _root(self, request: Request) -> str:
        return f"{request.scope.get('root_path', '').rstrip('/')}/"

    def _set_cookie(self, request: Request, value: str) -> str:
        secure = "; Secure" if request.url.scheme == "https" else ""
        # In a frame of another site a browser keeps no other cookie.
        same_site = "None; Partitioned" if secure and self._is_framed else "Lax"
        age = int(self._visitors.limits.login_s)
        return f"{COOKIE}={value}; Path={self._root(request)}; Max-Age={age}; HttpOnly; SameSite={same_site}{secure}"

    # Files

    async def _upload(self, request: Request, visitor: Visitor) -> Response:
        limits = self._visitors.limits
        received, most = 0, limits.max_file_bytes + 2**20  # and what multipart adds

        async def receive() -> Message:
            nonlocal received
            message = await request.receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(
                    413, f"an upload has at most {limits.max_file_bytes:,} bytes; send images one by one"
                )
            return message

        try:
            async with (
                asyncio.timeout(limits.body_s),
                Request(request.scope, receive).form(max_files=8, max_fields=8) as form,
            ):
                files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
                kept = [self._visitors.keep(visitor, file.filename or "image", await file.read()) for file in files]
        except MultiPartException as error:
            raise InputError(f"this is not an upload: {error.message}") from None
        return JSONResponse([str(path) for path in kept])

    def _file(self, visitor: Visitor | None, name: str) -> Response:
        """Serve an example, or a file of the visitor; as an image, or not at all where it is none."""
        path = Path(name)
        if not ((visitor is not None and visitor.owns(path)) or self._is_example(path)):
            return _refusal("there is no such file", 404)
        try:
            with path.open("rb") as file:
                start = file.read(64)
        except OSError:
            return _refusal("there is no such file", 404)
        kind = next((item.name.lower() for item in FORMATS if item.start.match(start)), None)
        if kind is None:
            return Response(status_code=415)
        return FileResponse(path, media_type=f"image/{kind}", headers={"cache-control": "private, max-age=3600"})

    def _is_example(self, path: Path) -> bool:
        return path.parent == self._examples and path.is_file()

    # Events

    def _connected(self, visitor: Visitor, session: str) -> ASGIApp:
        self._visitors.open(visitor, session, connected=True)

        async def stay(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await self._page(scope, receive, send)
            finally:
                self._visitors.close_page(visitor, session)

        return stay

    async def _event(self, request: Request, visitor: Visitor, *, is_asked: bool) -> ASGIApp:
        """Check the data of an event, and pass it on."""
        limits = self._visitors.limits
        async with asyncio.timeout(limits.body_s):
            body = await _body(request, limits.max_event_bytes)
        data = await asyncio.to_thread(parse_json, body)
        if not isinstance(data, dict):
            raise InputError("the data of an event is a JSON object")
        session = _session(data.get("session_hash"))
        for path in _paths(data):
            if not isinstance(path, str) or not (visitor.owns(Path(path)) or self._is_example(Path(path))):
                raise HTTPException(403, "an image of this conversation is not kept any more; add it again")
        if is_asked:
            values, number = data.get("data"), data.get("fn_index")
            known = self._num_inputs.get(number) if isinstance(number, int) and not isinstance(number, bool) else None
            if not isinstance(values, list) or len(values) != known:
                raise InputError("this page has no such event; load it again")
            self._visitors.open(visitor, session)
            self._visitors.hold(visitor, session, 2 * len(body))
        elif session not in visitor.pages:
            raise HTTPException(404, "this page is closed; load it again")
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return waiting.pop() if waiting else await request.receive()

        async def forward(scope: Scope, _: Receive, send: Send) -> None:
            await self._page(scope, receive, send)

        return forward


def visitor_of(request: Request | None) -> Visitor | None:
    """Return who sent the request of an event."""
    return request.scope.get(VISITOR) if request is not None else None


def _refusal(message: str, status: int) -> Response:
    return JSONResponse({"detail": message}, status)


def _fits(method: str, path: str, route: tuple[str, str]) -> bool:
    if method == "HEAD":
        method = "GET"
    name = route[1]
    return method == route[0] and (path == name or (name != "/" and name.endswith("/") and path.startswith(name)))


def _cookie(request: Request) -> str:
    cookies: SimpleCookie = SimpleCookie()
    with suppress(CookieError):
        cookies.load(request.headers.get("cookie", ""))
    return cookies[COOKIE].value if COOKIE in cookies else ""


def _session(value: object) -> str:
    if not (
        isinstance(value, str) and value.isascii() and value.replace("-", "").isalnum() and len(value) <= MAX_SESSION
    ):
        raise InputError("session_hash is a short name of letters and digits")
    return value


async def _body(request: Request, most: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise HTTPException(413, f"this is more than the {most:,} bytes that an event of this page may have")
    return bytes(body)


def _paths(value: object) -> Iterator[object]:
    """Yield what the files in the data of an event name: Gradio takes any object with a path for one."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)
