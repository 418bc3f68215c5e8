"""Answer a parsed request over HTTP, whole or streamed, in the form of its protocol.

In: a `ParsedRequest`, and the writer of the protocol's replies. Out: a response. Each protocol (serve/openai/, serve/ollama/,
serve/anthropic/) has writers of its own; admission, deadlines and disconnected clients are handled here for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request, Response

from llava.engine.request import Chunk
from llava.serve.chat_turns import ParsedRequest, details_of, sources_of
from llava.serve.http.errors import as_api_error
from llava.serve.http.streams import StreamedResponse, cancel_on_disconnect
from llava.serve.service import AdmittedRequest, RequestStats, Service, merged
from llava.serve.tools import ToolCallReader


class ReplyBody(Protocol):
    """A reply, or a part of a streamed one."""

    def as_json(self) -> str: ...


class AnswerWriter(Protocol):
    """Writes the replies to one request from the engine's chunks."""

    def opening(self, num_choices: int) -> Iterable[ReplyBody]:
        """The first replies of a stream."""

    def deltas(self, chunk: Chunk) -> Iterable[ReplyBody]:
        """The replies to a chunk; where tools may be called it is an `AnswerChunk`."""

    def closing(self, stats: RequestStats) -> Iterable[ReplyBody]:
        """The last replies of a stream."""

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> ReplyBody:
        """The one reply to a request without a stream, from one chunk for each choice."""


@dataclass(frozen=True)
class StreamEncoding:
    """How replies become bytes of a stream. `ending` follows the last reply, `final_chunk` ends a stream that failed."""

    media_type: str
    encode: Callable[[ReplyBody], bytes]
    final_chunk: Callable[[Exception], bytes]
    ending: bytes = b""


async def answer(
    request: Request,
    service: Service,
    parsed: ParsedRequest,
    writer: AnswerWriter,
    encoding: StreamEncoding,
    *,
    model: str,
    streamed: bool,
    on_admitted: Callable[[AdmittedRequest], Awaitable[None]] | None = None,
) -> Response:
    """Submit a request to the model, and respond with its answer.

    `model` is one of the card's names. `on_admitted` is awaited before a stream begins.
    """
    deadline = asyncio.get_running_loop().time() + service.limits.deadline_s
    adapter = service.card.adapter_of(model)
    submitted = service.submit(
        parsed.prompts,
        parsed.sampling,
        sources_of(parsed.images),
        details=details_of(parsed.images),
        streamed=streamed,
        adapter=adapter,
    )
    async with asyncio.timeout_at(deadline):
        admitted = await cancel_on_disconnect(submitted, request.receive)
    reader = None if parsed.tools is None else ToolCallReader(parsed.tools)
    if not streamed:
        return await cancel_on_disconnect(_whole(admitted, writer, reader, deadline), request.receive)
    return StreamedResponse(
        _encoded(admitted, writer, reader, encoding, on_admitted),
        media_type=encoding.media_type,
        deadline=deadline,
        final_chunk=encoding.final_chunk,
        on_close=admitted.close,
    )


async def _whole(
    admitted: AdmittedRequest, writer: AnswerWriter, reader: ToolCallReader | None, deadline: float
) -> Response:
    end = "cancelled"
    try:
        async with asyncio.timeout_at(deadline):
            chunks = merged([chunk async for chunk in admitted])
        if reader is not None:
            chunks = [reader.read(chunk) for chunk in chunks]
        end = "finished"
        return Response(writer.whole(chunks, admitted.stats()).as_json(), media_type="application/json")
    except TimeoutError:
        end = "deadline"
        raise
    except Exception as error:
        end = "failed" if as_api_error(error).status >= 500 else "cancelled"
        raise
    finally:
        admitted.close(end)


async def _encoded(
    admitted: AdmittedRequest,
    writer: AnswerWriter,
    reader: ToolCallReader | None,
    encoding: StreamEncoding,
    on_admitted: Callable[[AdmittedRequest], Awaitable[None]] | None,
) -> AsyncIterator[bytes]:
    if on_admitted is not None:
        await on_admitted(admitted)
    for reply in writer.opening(admitted.num_choices):
        yield encoding.encode(reply)
    async for chunk in admitted:
        for reply in writer.deltas(chunk if reader is None else reader.read(chunk)):
            yield encoding.encode(reply)
    for reply in writer.closing(admitted.stats()):
        yield encoding.encode(reply)
    if encoding.ending:
        yield encoding.ending
