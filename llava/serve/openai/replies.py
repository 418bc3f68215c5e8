"""Replies of the OpenAI-compatible API, made from the engine's chunks.

In: `Chunk`s as they come, and at the end what the request took. Out: replies of schema.py, one for each chunk of a stream, else
one for all. The finish reason comes once, in the last chunk of a choice.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from llava.engine.request import Chunk, Score, TokenLogprob, Usage
from llava.images.layout import ImageLayout
from llava.images.video_layout import VideoLayout
from llava.serve.openai import schema
from llava.serve.service import RequestStats
from llava.serve.tools import AnswerChunk, CallDelta, calls_of
from llava.text.token_bytes import TokenPiece

PieceOf = Callable[[int], TokenPiece]


@dataclass
class ReplyWriter:
    """Write the replies to one request, with the same id and time in all of them."""

    id_prefix: ClassVar[str]

    model: str
    piece_of: PieceOf
    with_logprobs: bool = False
    inspect: bool = False
    include_usage: bool = False
    with_tools: bool = False  # the answer may be a call, without a text
    legacy_functions: bool = False  # calls in the older form of OpenAI's API
    num_prompt_tokens: int | None = None  # where each chunk has the usage so far
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self._has_calls: set[int] = set()  # choices that call tools
        self._num_new = 0  # tokens so far

    @property
    def _head(self) -> dict[str, Any]:
        """The fields that all replies to the request share."""
        return {"id": self.id, "created": self.created, "model": self.model}

    def _end(self, stats: RequestStats) -> dict[str, Any]:
        """Return the fields of a last reply: usage, and `inspect` where the request asked for it."""
        return {"usage": usage_of(stats.usage)} | ({"inspect": inspection_of(stats)} if self.inspect else {})

    def _extra(self, end: dict[str, Any]) -> dict[str, Any]:
        """Return the same fields for a chunk: the usage so far or null until the end, where the request asked for usage."""
        if end or not (self.include_usage or self.num_prompt_tokens is not None):
            return end
        if self.num_prompt_tokens is None:
            return {"usage": None}
        read, written = self.num_prompt_tokens, self._num_new
        return {"usage": schema.UsageBody(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)}


class ChatWriter(ReplyWriter):
    id_prefix = "chatcmpl-"

    def opening(self, num_choices: int) -> Iterable[schema.ChatChunk]:
        """Return the first chunks of a stream, with the role."""
        delta = schema.Delta(role="assistant", content=None if self.with_tools else "")
        for index in range(num_choices):
            choice = schema.ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
            yield self._chunk([choice])

    def deltas(self, chunk: Chunk) -> Iterable[schema.ChatChunk]:
        self._num_new += len(chunk.token_ids)
        calls = chunk.calls if isinstance(chunk, AnswerChunk) else ()
        if isinstance(chunk, AnswerChunk) and not (chunk.text or calls or chunk.finish_reason or self.with_logprobs):
            return  # held back until it is known whether it is a call
        fields: dict[str, Any] = {"content": chunk.text} if chunk.text or not (chunk.finish_reason or calls) else {}
        if calls:
            self._has_calls.add(chunk.index)
            deltas = [_call_delta(call) for call in calls]
            if self.legacy_functions:
                parts = [delta.function for delta in deltas]
                written = {"arguments": "".join(part.arguments or "" for part in parts)}
                if calls[0].name is not None:
                    written["name"] = calls[0].name
                fields["function_call"] = schema.FunctionDelta(**written)
            else:
                fields["tool_calls"] = deltas
        logprobs, reason = self._logprobs(chunk.logprobs), self._finish_reason(chunk)
        delta = schema.Delta(**fields)
        choice = schema.ChatChunkChoice(index=chunk.index, delta=delta, logprobs=logprobs, finish_reason=reason)
        yield self._chunk([choice])

    def _finish_reason(self, chunk: Chunk) -> schema.FinishReason | None:
        reason = finish_reason(chunk)
        if reason == "stop" and chunk.index in self._has_calls:
            return "function_call" if self.legacy_functions else "tool_calls"
        return reason

    def closing(self, stats: RequestStats) -> Iterable[schema.ChatChunk]:
        """Return the last chunks of a stream: usage, without choices, where the request asked for it."""
        if self.include_usage or self.inspect:
            yield self._chunk([], **self._end(stats))

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> schema.ChatReply:
        choices = [self._choice(chunk) for chunk in sorted(chunks, key=lambda chunk: chunk.index)]
        return schema.ChatReply(object="chat.completion", choices=choices, **self._head, **self._end(stats))

    def _choice(self, chunk: Chunk) -> schema.ChatChoice:
        message = schema.AssistantReply(role="assistant", content=chunk.text, refusal=None)
        calls = [
            schema.ToolCallReply(
                id=call.call_id,
                type="function",
                function=schema.FunctionReply(name=call.name, arguments=call.arguments),
            )
            for call in calls_of([chunk])
        ]
        if calls:
            self._has_calls.add(chunk.index)
            message.content = chunk.text or None
            if self.legacy_functions:
                message.function_call = calls[0].function
            else:
                message.tool_calls = calls
        return schema.ChatChoice(
            index=chunk.index,
            message=message,
            logprobs=self._logprobs(chunk.logprobs),
            finish_reason=self._finish_reason(chunk) or "stop",
        )

    def _chunk(self, choices: list[schema.ChatChunkChoice], **end: Any) -> schema.ChatChunk:
        return schema.ChatChunk(object="chat.completion.chunk", choices=choices, **self._head, **self._extra(end))

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> schema.ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        return schema.ChatLogprobs(content=token_logprobs(tokens, self.piece_of), refusal=None)


def token_logprobs(tokens: Sequence[TokenLogprob], piece_of: PieceOf) -> list[schema.TokenLogprobBody]:
    """Return tokens with their log probabilities and alternatives, as chats and responses have them."""

    def named(token_id: int, logprob: float) -> dict[str, Any]:
        data = piece_of(token_id).data
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return [
        schema.TokenLogprobBody(
            **named(token.token_id, token.logprob),
            top_logprobs=[schema.TopLogprob(**named(*other)) for other in token.top],
        )
        for token in tokens
    ]


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt that the answers to it begin with. `score` has the probabilities of all its tokens but the first."""

    text: str
    token_ids: Sequence[int]
    score: Score | None = None


@dataclass
class TextWriter(ReplyWriter):
    """Write the replies of completions. The index of a chunk's choice counts through all prompts.

    `echoes` has each prompt where answers begin with theirs; with `only_prompts` that is all.
    """

    id_prefix = "cmpl-"

    echoes: Sequence[EchoedPrompt] = ()
    only_prompts: bool = False
    num_choices: int = 1  # of each prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lengths: dict[int, _TextLength] = {}

    def opening(self, num_choices: int) -> Iterable[schema.TextReply]:
        return ()

    def deltas(self, chunk: Chunk) -> Iterable[schema.TextReply]:
        self._num_new += 0 if self.only_prompts else len(chunk.token_ids)
        yield self._reply([self._choice(chunk)])

    def closing(self, stats: RequestStats) -> Iterable[schema.TextReply]:
        if self.include_usage or self.inspect:
            yield self._reply([], **self._end(stats))

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> schema.TextReply:
        choices = [self._choice(chunk) for chunk in sorted(chunks, key=lambda chunk: chunk.index)]
        return self._reply(choices, **self._end(stats))

    def _end(self, stats: RequestStats) -> dict[str, Any]:
        if self.only_prompts:
            stats = replace(stats, usage=replace(stats.usage, num_new_tokens=0))
        return super()._end(stats)

    def _reply(self, choices: list[schema.TextChoice], **end: Any) -> schema.TextReply:
        return schema.TextReply(object="text_completion", choices=choices, **self._head, **self._extra(end))

    def _choice(self, chunk: Chunk) -> schema.TextChoice:
        text, tokens, echo = chunk.text, chunk.logprobs, None
        if self.only_prompts:
            text, tokens = "", ()
        if chunk.index not in self._lengths:
            self._lengths[chunk.index] = _TextLength()
            if self.echoes:
                echo = self.echoes[chunk.index // self.num_choices]
                text = echo.text + text
        return schema.TextChoice(
            index=chunk.index,
            text=text,
            logprobs=self._logprobs(self._lengths[chunk.index], tokens, echo) if self.with_logprobs else None,
            finish_reason="length" if self.only_prompts and chunk.finish_reason else finish_reason(chunk),
        )

    def _logprobs(
        self, length: _TextLength, tokens: Sequence[TokenLogprob], echo: EchoedPrompt | None
    ) -> schema.TextLogprobs:
        pieces = [self.piece_of(token.token_id) for token in tokens]
        values: list[float | None] = [token.logprob for token in tokens]
        tops: list[dict[str, float] | None] = [self._top(token.top) for token in tokens]
        if echo is not None:
            score = echo.score
            pieces = [*self._echoed_pieces(echo), *pieces]
            values = [*([None] if echo.token_ids else []), *(score.logprobs if score is not None else ()), *values]
            tops = [None, *(self._top(top) for top in (score.tops if score is not None else ())), *tops]
        return schema.TextLogprobs(
            tokens=[_token_name(piece) for piece in pieces],
            token_logprobs=values,
            top_logprobs=tops if any(tops) else None,
            text_offset=[length.add(piece) for piece in pieces],
        )

    def _echoed_pieces(self, echo: EchoedPrompt) -> list[TokenPiece]:
        """The prompt's tokens; a space that sentencepiece puts before the first word is not part of the text."""
        pieces = [self.piece_of(token) for token in echo.token_ids]
        first = next((at for at, piece in enumerate(pieces) if not piece.is_special), None)
        if first is not None and pieces[first].data.startswith(b" ") and not echo.text.startswith(" "):
            pieces[first] = TokenPiece(pieces[first].data[1:])
        return pieces

    def _top(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        return {_token_name(self.piece_of(token)): value for token, value in top}


class _TextLength:
    """Counts the characters of a text whose tokens come one after another."""

    def __init__(self) -> None:
        self._num = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, piece: TokenPiece) -> int:
        """Return where a token begins; special ones have no text."""
        begin = self._num
        if not piece.is_special:
            self._num += len(self._decoder.decode(piece.data))
        return begin


def _token_name(piece: TokenPiece) -> str:
    """A token as text, or as OpenAI's older API names bytes that are no text, `bytes:\\xe2`: no two tokens are alike."""
    try:
        return piece.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece.data)


def _call_delta(call: CallDelta) -> schema.ToolCallDelta:
    """A part of a call; id and type come with its name, once."""
    if call.name is None:
        return schema.ToolCallDelta(index=call.number, function=schema.FunctionDelta(arguments=call.arguments))
    function = schema.FunctionDelta(name=call.name, arguments=call.arguments)
    return schema.ToolCallDelta(index=call.number, id=call.call_id, type="function", function=function)


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
    videos = [
        schema.SeenVideo(frames=layout.num_frames, grid=list(layout.grid), tokens=layout.num_features)
        for layout in stats.layouts
        if isinstance(layout, VideoLayout)
    ]
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
            if isinstance(layout, ImageLayout)
        ],
        **({"videos": videos} if videos else {}),
        queued_s=round(stats.timings.queued_s, 6),
        first_token_s=None if stats.timings.first_token_s is None else round(stats.timings.first_token_s, 6),
        total_s=round(stats.timings.total_s, 6),
    )
