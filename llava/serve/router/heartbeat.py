"""A worker's membership with its controller: registration, heart-beats, and leave.

In: two addresses and a function that tells the worker's status. Out: a background task for the time that a server runs.
A controller that is away, or was started anew and knows nobody, is told again as soon as it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from llava.constants import WORKER_HEART_BEAT_INTERVAL
from llava.serve.router.protocol import WorkerStatus

logger = logging.getLogger("llava.serve")

RETRY_S = 2.0  # between attempts to reach a controller that does not answer
GAP_S = 0.2  # heart-beats that tell of a changed queue come no faster than this


class Membership:
    """`changed` brings the next heart-beat forward, as the original does whenever a request begins or ends."""

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
        self._left = False

    def changed(self) -> None:
        self._changed.set()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._stay())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self.leave()

    async def leave(self) -> None:
        """Ask for no more requests. The original's controller does not know this and forgets us in its own time."""
        if self._left:
            return
        self._left = True
        with contextlib.suppress(httpx.HTTPError):
            async with self._client() as client:
                await client.post("/unregister_worker", json={"worker_name": self._worker})

    async def _stay(self) -> None:
        known, complained = False, False
        async with self._client() as client:
            while not self._left:
                try:
                    known = await (self._beat(client) if known else self._register(client))
                    complained = False
                    wait = self._interval_s if known else 0.0
                except (httpx.HTTPError, ValueError) as error:
                    if not complained:
                        logger.warning("the controller %s does not answer: %s", self._controller, error or type(error))
                    complained, wait = True, RETRY_S
                await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        if seconds:
            await asyncio.sleep(min(GAP_S, seconds))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, seconds - GAP_S))
        self._changed.clear()

    async def _register(self, client: httpx.AsyncClient) -> bool:
        body = {"worker_name": self._worker, "check_heart_beat": True, "worker_status": self._status().as_json()}
        await self._post(client, "/register_worker", body)
        logger.info("registered with %s as %s", self._controller, self._worker)
        return True

    async def _beat(self, client: httpx.AsyncClient) -> bool:
        """Tell the length of the queue; False where the controller does not know us."""
        body = {"worker_name": self._worker, "queue_length": self._status().queue_length}
        return (await self._post(client, "/receive_heart_beat", body))["exist"]

    async def _post(self, client: httpx.AsyncClient, path: str, body: Any) -> Any:
        response = await client.post(path, json=body)
        response.raise_for_status()
        return response.json()

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._controller, headers=self._headers, timeout=5.0, trust_env=False)
