"""Replies of Anthropic's Messages API, made from the engine's chunks.

In: `Chunk`s as they come, and at the end what the request took. Out: replies of schema.py. A stream has an event for the
message, one for each of its content blocks, one for each delta, and one for each end.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from llava.engine.request import Chunk, Usage
from llava.serve.answers import ReplyBody, StreamEncoding
from llava.serve.anthropic import schema
from llava.serve.http.errors import anthropic_form, as_api_error, error_body
from llava.serve.openai.schema import ModelList
from llava.serve.service import RequestStats
from llava.serve.tools import AnswerChunk, calls_of

EVENTS = "text/event-stream; charset=utf-8"


class MessageWriter:
    """Write the answer as one message, with a block for its text and one for each call of a tool."""

    def __init__(self, model: str, stop_sequences: Sequence[str]) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._stop_sequences = stop_sequences
        self.num_prompt_tokens = 0  # for a stream's start, before the engine says it
        self._end: tuple[schema.StopReason, str | None] = ("end_turn", None)
        self._num_blocks = 0
        self._open: str | None = None  # the block being written: "text", or the id of a call

    def opening(self, num_choices: int) -> Iterable[schema.MessagesEvent]:
        usage = usage_of(Usage(self.num_prompt_tokens, 0, 0, 0))
        yield schema.MessagesEvent(type="message_start", message=self._message([], None, None, usage))
        yield schema.MessagesEvent(type="ping")

    def deltas(self, chunk: Chunk) -> Iterable[schema.MessagesEvent]:
        self._note_end(chunk)
        if chunk.text and not (self._open != "text" and self._num_blocks and not chunk.text.strip()):
            yield from self._begin("text", schema.AnswerText(type="text", text=""))
            yield self._delta(schema.MessageDelta(type="text_delta", text=chunk.text))
        for call in chunk.calls if isinstance(chunk, AnswerChunk) else ():
            if call.name is not None:
                block = schema.AnswerCall(type="tool_use", id=call.call_id, name=call.name, input={})
                yield from self._begin(call.call_id, block)
            if call.arguments:
                yield self._delta(schema.MessageDelta(type="input_json_delta", partial_json=call.arguments))

    def closing(self, stats: RequestStats) -> Iterable[schema.MessagesEvent]:
        yield from self._close()
        reason, text = self._end
        delta = schema.MessageDelta(stop_reason=reason, stop_sequence=text)
        yield schema.MessagesEvent(type="message_delta", delta=delta, usage=usage_of(stats.usage))
        yield schema.MessagesEvent(type="message_stop")

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> schema.MessagesReply:
        for chunk in chunks:
            self._note_end(chunk)
        text = "".join(chunk.text for chunk in chunks)
        content: list[schema.AnswerBlock] = [schema.AnswerText(type="text", text=text)] if text.strip() else []
        for call in calls_of(chunks):
            name, arguments = call.given()
            content.append(schema.AnswerCall(type="tool_use", id=call.call_id, name=name, input=dict(arguments)))
        return self._message(content, *self._end, usage_of(stats.usage))

    def _begin(self, name: str, block: schema.AnswerBlock) -> Iterable[schema.MessagesEvent]:
        """Open a block, unless it is the open one."""
        if self._open != name:
            yield from self._close()
            self._open = name
            yield schema.MessagesEvent(type="content_block_start", index=self._num_blocks, content_block=block)

    def _close(self) -> Iterable[schema.MessagesEvent]:
        if self._open is not None:
            yield schema.MessagesEvent(type="content_block_stop", index=self._num_blocks)
            self._num_blocks, self._open = self._num_blocks + 1, None

    def _delta(self, delta: schema.MessageDelta) -> schema.MessagesEvent:
        return schema.MessagesEvent(type="content_block_delta", index=self._num_blocks, delta=delta)

    def _note_end(self, chunk: Chunk) -> None:
        if isinstance(chunk, AnswerChunk) and chunk.calls:
            self._end = ("tool_use", None)
        if chunk.finish_reason == "length":
            self._end = ("max_tokens", None)
        elif chunk.stop_string in self._stop_sequences:  # the template's own stop strings are no sequence of the client
            self._end = ("stop_sequence", chunk.stop_string)

    def _message(
        self,
        content: list[schema.AnswerBlock],
        reason: schema.StopReason | None,
        text: str | None,
        usage: schema.MessageUsage,
    ) -> schema.MessagesReply:
        return schema.MessagesReply(
            id=self._id,
            type="message",
            role="assistant",
            model=self._model,
            content=content,
            stop_reason=reason,
            stop_sequence=text,
            usage=usage,
        )


def usage_of(usage: Usage) -> schema.MessageUsage:
    return schema.MessageUsage(
        input_tokens=usage.num_prompt_tokens - usage.num_cached_tokens,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=usage.num_cached_tokens,
        output_tokens=usage.num_new_tokens,
    )


def models_of(models: ModelList) -> schema.MessagesModelList:
    entries = [
        schema.MessagesModel(
            type="model",
            id=entry.id,
            display_name=entry.id,
            created_at=datetime.fromtimestamp(entry.created, UTC).isoformat().replace("+00:00", "Z"),
        )
        for entry in models.data
    ]
    names: list[Any] = [entry.id for entry in entries] or [None]
    return schema.MessagesModelList(data=entries, has_more=False, first_id=names[0], last_id=names[-1])


def event(reply: ReplyBody) -> bytes:
    """Encode one event of a stream, named by its type."""
    assert isinstance(reply, schema.MessagesEvent)
    return f"event: {reply.type}\ndata: {reply.as_json()}\n\n".encode()


def error_event(error: Exception) -> bytes:
    """Encode the last event of a stream that failed, which clients raise."""
    return f"event: error\ndata: {json.dumps(error_body(as_api_error(error), anthropic_form))}\n\n".encode()


STREAM = StreamEncoding(EVENTS, event, error_event)
