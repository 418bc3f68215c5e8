"""Answers of the OpenAI-compatible API, put together from the engine's chunks.

In: `Chunk`s as they come, and at the end what they cost. Out: replies of schema.py, for a stream one by one, else all
in one. Joined, the pieces of a stream are the text of the whole; the reason for the end comes once, in a choice's last piece.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llava.engine.request import Chunk, Timings, Usage
from llava.engine.request import TokenLogprob as EngineLogprob
from llava.images.layout import ImageLayout
from llava.serve.openai import schema

TokenText = Callable[[int], str]


@dataclass(frozen=True)
class Cost:
    """What an answer took, known at its end."""

    usage: Usage
    timings: Timings
    layouts: Sequence[ImageLayout] = ()

    def as_json(self) -> dict[str, Any]:
        return {"usage": usage_of(self.usage).model_dump(), "inspect": inspection_of(self).model_dump()}


@dataclass
class Writer:
    """Makes the replies to one request; `id` and time are the same in all of them. A stream closes with `ending`."""

    ending: ClassVar[bytes] = b"data: [DONE]\n\n"

    model: str
    token_text: TokenText
    with_logprobs: bool = False
    inspect: bool = False
    include_usage: bool = False
    kind: str = "chatcmpl"
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.kind}-{uuid.uuid4().hex}"
        self._offsets: dict[int, int] = {}  # characters of each choice so far, for the logprobs of plain completions

    def _end(self, cost: Cost) -> dict[str, Any]:
        """The fields that come with an end: usage, and what was asked to be seen."""
        return {"usage": usage_of(cost.usage)} | ({"inspect": inspection_of(cost)} if self.inspect else {})


class ChatWriter(Writer):
    def opening(self, num_choices: int) -> Iterable[schema.ChatChunk]:
        """What a stream begins with: whose words these are."""
        for index in range(num_choices):
            yield self._piece(index, schema.Delta(role="assistant", content=""), None, None)

    def piece(self, chunk: Chunk) -> schema.ChatChunk:
        delta = schema.Delta(content=chunk.text) if chunk.text or not chunk.finish_reason else schema.Delta()
        return self._piece(chunk.index, delta, self._logprobs(chunk.logprobs), finish_reason(chunk))

    def closing(self, cost: Cost) -> Iterable[schema.ChatChunk]:
        """What a stream ends with, where it was asked for: the usage, without choices."""
        if self.include_usage or self.inspect:
            yield self._chunk([], **self._end(cost))

    def whole(self, chunks: Sequence[Chunk], cost: Cost) -> schema.ChatReply:
        choices = [
            schema.ChatChoice(
                index=index,
                message=schema.AssistantReply(role="assistant", content=text, refusal=None),
                logprobs=self._logprobs(logprobs),
                finish_reason=reason or "stop",
            )
            for index, text, logprobs, reason in joined(chunks)
        ]
        return schema.ChatReply(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=choices,
            **self._end(cost),
        )

    def _piece(
        self,
        index: int,
        delta: schema.Delta,
        logprobs: schema.ChatLogprobs | None,
        reason: schema.FinishReason | None,
    ) -> schema.ChatChunk:
        return self._chunk([schema.ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)])

    def _chunk(self, choices: list[schema.ChatChunkChoice], **end: Any) -> schema.ChatChunk:
        extra = end or ({"usage": None} if self.include_usage else {})
        return schema.ChatChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            **extra,
        )

    def _logprobs(self, tokens: Sequence[EngineLogprob]) -> schema.ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        return schema.ChatLogprobs(
            content=[
                schema.TokenLogprob(
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


class TextWriter(Writer):
    """For plain completions. Choices of several prompts are numbered through by `piece`'s callers."""

    def opening(self, num_choices: int) -> Iterable[schema.TextReply]:
        return ()

    def piece(self, chunk: Chunk) -> schema.TextReply:
        return self._reply([self._choice(chunk.index, chunk.text, chunk.logprobs, finish_reason(chunk))])

    def closing(self, cost: Cost) -> Iterable[schema.TextReply]:
        if self.include_usage or self.inspect:
            yield self._reply([], **self._end(cost))

    def whole(self, chunks: Sequence[Chunk], cost: Cost) -> schema.TextReply:
        return self._reply([self._choice(*parts) for parts in joined(chunks)], **self._end(cost))

    def _reply(self, choices: list[schema.TextChoice], **end: Any) -> schema.TextReply:
        extra = end or ({"usage": None} if self.include_usage else {})
        return schema.TextReply(
            id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices, **extra
        )

    def _choice(
        self, index: int, text: str, tokens: Sequence[EngineLogprob], reason: schema.FinishReason | None
    ) -> schema.TextChoice:
        return schema.TextChoice(index=index, text=text, logprobs=self._logprobs(index, tokens), finish_reason=reason)

    def _logprobs(self, index: int, tokens: Sequence[EngineLogprob]) -> schema.TextLogprobs | None:
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


def joined(
    chunks: Sequence[Chunk],
) -> Iterable[tuple[int, str, list[EngineLogprob], schema.FinishReason | None]]:
    """The chunks of each choice as one, in the order of the choices."""
    for index in sorted({chunk.index for chunk in chunks}):
        own = [chunk for chunk in chunks if chunk.index == index]
        logprobs = [token for chunk in own for token in chunk.logprobs]
        yield index, "".join(chunk.text for chunk in own), logprobs, finish_reason(own[-1])


def finish_reason(chunk: Chunk) -> schema.FinishReason | None:
    return "length" if chunk.finish_reason == "length" else "stop" if chunk.finish_reason else None


def usage_of(usage: Usage) -> schema.Usage:
    return schema.Usage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_new_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_new_tokens,
        prompt_tokens_details=schema.PromptDetails(
            cached_tokens=usage.num_cached_tokens,
            image_tokens=usage.num_image_tokens,
            text_tokens=usage.num_text_tokens,
        ),
    )


def inspection_of(cost: Cost) -> schema.Inspection:
    return schema.Inspection(
        images=[
            schema.SeenImage(
                width=layout.size.width,
                height=layout.size.height,
                tiles=layout.num_tiles,
                grid=list(layout.tile_grid) if layout.tile_grid else None,
                tokens=layout.num_features,
            )
            for layout in cost.layouts
        ],
        queued_s=round(cost.timings.queued_s, 6),
        first_token_s=None if cost.timings.first_token_s is None else round(cost.timings.first_token_s, 6),
        total_s=round(cost.timings.total_s, 6),
    )
