"""Replies of the OpenAI-compatible API, made from the engine's chunks.

In: `Chunk`s as they come, and at the end what the request took. Out: replies of schema.py, one for each chunk of a stream, else
one for all. The finish reason comes once, in the last chunk of a choice.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llava.engine.request import Chunk, TokenLogprob, Usage
from llava.serve.openai import schema
from llava.serve.service import RequestStats, merged

TokenText = Callable[[int], str]


@dataclass
class ReplyWriter:
    """Write the replies to one request, with the same id and time in all of them."""

    id_prefix: ClassVar[str]

    model: str
    token_text: TokenText
    with_logprobs: bool = False
    inspect: bool = False
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self._offsets: dict[int, int] = {}  # characters of each choice so far, for the logprobs of completions

    @property
    def _head(self) -> dict[str, Any]:
        """The fields that all replies to the request share."""
        return {"id": self.id, "created": self.created, "model": self.model}

    def _end(self, stats: RequestStats) -> dict[str, Any]:
        """Return the fields of a last reply: usage, and `inspect` where the request asked for it."""
        return {"usage": usage_of(stats.usage)} | ({"inspect": inspection_of(stats)} if self.inspect else {})

    def _extra(self, end: dict[str, Any]) -> dict[str, Any]:
        """Return the same fields for a chunk: null until the end, where the request asked for usage."""
        return end or ({"usage": None} if self.include_usage else {})


class ChatWriter(ReplyWriter):
    id_prefix = "chatcmpl-"

    def opening(self, num_choices: int) -> Iterable[schema.ChatChunk]:
        """Return the first chunks of a stream, with the role."""
        delta = schema.Delta(role="assistant", content="")
        for index in range(num_choices):
            choice = schema.ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
            yield self._chunk([choice])

    def deltas(self, chunk: Chunk) -> Iterable[schema.ChatChunk]:
        delta = schema.Delta(content=chunk.text) if chunk.text or not chunk.finish_reason else schema.Delta()
        logprobs, reason = self._logprobs(chunk.logprobs), finish_reason(chunk)
        choice = schema.ChatChunkChoice(index=chunk.index, delta=delta, logprobs=logprobs, finish_reason=reason)
        yield self._chunk([choice])

    def closing(self, stats: RequestStats) -> Iterable[schema.ChatChunk]:
        """Return the last chunks of a stream: usage, without choices, where the request asked for it."""
        if self.include_usage or self.inspect:
            yield self._chunk([], **self._end(stats))

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> schema.ChatReply:
        choices = [
            schema.ChatChoice(
                index=chunk.index,
                message=schema.AssistantReply(role="assistant", content=chunk.text, refusal=None),
                logprobs=self._logprobs(chunk.logprobs),
                finish_reason=finish_reason(chunk) or "stop",
            )
            for chunk in in_order(chunks)
        ]
        return schema.ChatReply(object="chat.completion", choices=choices, **self._head, **self._end(stats))

    def _chunk(self, choices: list[schema.ChatChunkChoice], **end: Any) -> schema.ChatChunk:
        return schema.ChatChunk(object="chat.completion.chunk", choices=choices, **self._head, **self._extra(end))

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> schema.ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        return schema.ChatLogprobs(
            content=[
                schema.TokenLogprobBody(
                    **self._token(token.token_id, token.logprob),
                    top_logprobs=[schema.TopLogprob(**self._token(*alternative)) for alternative in token.top],
                )
                for token in tokens
            ],
            refusal=None,
        )

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class TextWriter(ReplyWriter):
    """Write the replies of completions. The index of a chunk's choice counts through all prompts."""

    id_prefix = "cmpl-"

    def opening(self, num_choices: int) -> Iterable[schema.TextReply]:
        return ()

    def deltas(self, chunk: Chunk) -> Iterable[schema.TextReply]:
        yield self._reply([self._choice(chunk)])

    def closing(self, stats: RequestStats) -> Iterable[schema.TextReply]:
        if self.include_usage or self.inspect:
            yield self._reply([], **self._end(stats))

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> schema.TextReply:
        return self._reply([self._choice(chunk) for chunk in in_order(chunks)], **self._end(stats))

    def _reply(self, choices: list[schema.TextChoice], **end: Any) -> schema.TextReply:
        return schema.TextReply(object="text_completion", choices=choices, **self._head, **self._extra(end))

    def _choice(self, chunk: Chunk) -> schema.TextChoice:
        return schema.TextChoice(
            index=chunk.index,
            text=chunk.text,
            logprobs=self._logprobs(chunk.index, chunk.logprobs),
            finish_reason=finish_reason(chunk),
        )

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> schema.TextLogprobs | None:
        if not self.with_logprobs:
            return None
        texts = [self.token_text(token.token_id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(text)
        tops = [{self.token_text(other): value for other, value in token.top} for token in tokens]
        return schema.TextLogprobs(
            tokens=texts,
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=tops if any(tops) else None,
            text_offset=offsets,
        )


def in_order(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Join the chunks of each choice, and sort them by choice."""
    return sorted(merged(chunks), key=lambda chunk: chunk.index)


def finish_reason(chunk: Chunk) -> schema.FinishReason | None:
    return "length" if chunk.finish_reason == "length" else "stop" if chunk.finish_reason else None


def usage_of(usage: Usage) -> schema.UsageBody:
    return schema.UsageBody(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_new_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_new_tokens,
        prompt_tokens_details=prompt_details_of(usage),
    )


def prompt_details_of(usage: Usage) -> schema.PromptDetails:
    return schema.PromptDetails(
        cached_tokens=usage.num_cached_tokens, image_tokens=usage.num_image_tokens, text_tokens=usage.num_text_tokens
    )


def stats_as_json(stats: RequestStats) -> dict[str, object]:
    """Return usage and inspection as JSON, for the last chunk of the original's protocol."""
    return {"usage": usage_of(stats.usage).model_dump(), "inspect": inspection_of(stats).model_dump()}


def inspection_of(stats: RequestStats) -> schema.Inspection:
    return schema.Inspection(
        images=[
            schema.SeenImage(
                width=layout.size.width,
                height=layout.size.height,
                tiles=layout.num_tiles,
                grid=list(layout.tile_grid) if layout.tile_grid else None,
                tokens=layout.num_features,
            )
            for layout in stats.layouts
        ],
        queued_s=round(stats.timings.queued_s, 6),
        first_token_s=None if stats.timings.first_token_s is None else round(stats.timings.first_token_s, 6),
        total_s=round(stats.timings.total_s, 6),
    )
