"""A worker's registration with its controller, and the heartbeats that keep it.

In: two addresses and a function that returns the worker's status. Out: a background task for the time that a server runs.
A controller that is unreachable is asked again every few seconds; one that has been restarted and does not know the worker
gets a new registration.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import httpx

from llava.constants import WORKER_HEART_BEAT_INTERVAL
from llava.errors import shortened
from llava.serve.http.app import background
from llava.serve.router.protocol import WorkerStatus, read_start, sentence_of

logger = logging.getLogger("llava.serve")

POST_S = 5.0  # for a whole answer of the controller
MAX_ANSWER = 64 * 1024  # bytes of it
RETRY_S = 2.0  # between attempts to reach a controller that does not answer
MIN_INTERVAL_S = 0.2  # between heartbeats that report a changed queue


class Heartbeat:
    """The background task of one worker.

    `worker` is the worker's URL and its name, `key` a worker's key, which the controller shows to it from then on. `changed`
    makes the next heartbeat come sooner, as in the original.
    """

    def __init__(
        self,
        controller: str,
        worker: str,
        status: Callable[[], WorkerStatus],
        *,
        key: str | None = None,
        interval_s: float = WORKER_HEART_BEAT_INTERVAL,
    ) -> None:
        self._controller = controller.rstrip("/")
        self._worker = worker
        self._status = status
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._interval_s = interval_s
        self._changed = asyncio.Event()
        self._stopped = False

    def changed(self) -> None:
        """Report the queue soon: a request has begun or ended."""
        self._changed.set()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        try:
            async with background(self._run()):
                yield
        finally:
            await self.unregister()

    async def unregister(self) -> None:
        """Get no more requests. The original's controller lacks this route and drops the worker when heartbeats stop."""
        if self._stopped:
            return
        self._stopped = True
        with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, ValueError):
            async with self._client() as client:
                await self._post(client, "/unregister_worker", {"worker_name": self._worker})

    async def _run(self) -> None:
        registered, warned = False, False
        async with self._client() as client:
            while not self._stopped:
                try:
                    registered = await (self._beat(client) if registered else self._register(client))
                    warned = False
                    wait = self._interval_s if registered else 0.0
                except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                    if not warned:
                        reason = shortened(str(error) or type(error).__name__, 500)
                        logger.warning("the controller %s does not answer: %s", self._controller, reason)
                    warned, wait = True, RETRY_S
                await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        if seconds:
            await asyncio.sleep(min(MIN_INTERVAL_S, seconds))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, seconds - MIN_INTERVAL_S))
        self._changed.clear()

    async def _register(self, client: httpx.AsyncClient) -> bool:
        body = {"worker_name": self._worker, "check_heart_beat": True, "worker_status": self._status().as_json()}
        await self._post(client, "/register_worker", body)
        logger.info("registered with %s as %s", self._controller, self._worker)
        return True

    async def _beat(self, client: httpx.AsyncClient) -> bool:
        """Report the length of the queue; False where the controller does not know the worker."""
        body = {"worker_name": self._worker, "queue_length": self._status().queue_length}
        answer = await self._post(client, "/receive_heart_beat", body)
        if not isinstance(answer, dict) or not isinstance(answer.get("exist"), bool):
            raise ValueError("it sent something else than a controller's answer")
        return answer["exist"]

    async def _post(self, client: httpx.AsyncClient, path: str, body: Mapping[str, object]) -> object:
        """Post, and return the JSON of the answer, within a bounded time and size."""
        try:
            async with asyncio.timeout(POST_S), client.stream("POST", path, json=body) as response:
                data = await read_start(response, MAX_ANSWER)
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"it sent no whole answer within {POST_S:g} s") from error
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {sentence_of(data)}")
        try:
            return json.loads(data)
        except RecursionError:
            raise ValueError("its answer is nested too deeply") from None

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._controller, headers=self._headers, timeout=5.0, trust_env=False)
