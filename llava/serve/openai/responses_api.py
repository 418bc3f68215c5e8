"""OpenAI's newer API, /v1/responses: its bodies, their translation, its replies.

In: a body with `input`, text or a list of messages. Out: a `ParsedRequest` as for a chat, and a writer of replies. There are no
tools and no stored conversations. Routes are in routes.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llava.engine.request import Chunk, SamplingParams
from llava.errors import InputError
from llava.serve.backends.base import ModelCard
from llava.serve.chat_turns import ChatTurn, ParsedRequest, ShownImage, checked_turn, parsed_chat
from llava.serve.openai import schema
from llava.serve.openai.replies import ReplyWriter, in_order, inspection_of, prompt_details_of
from llava.serve.openai.requests import ANY_OBJECT, sampling_of
from llava.serve.service import RequestStats

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(schema.Body):
    type: Literal["input_text"]
    text: str


class InputImage(schema.Body):
    type: Literal["input_image"]
    image_url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = "auto"


class OutputText(schema.Body):
    """A part of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: schema.Nothing = None
    logprobs: schema.Nothing = None


InputPart = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]


class InputMessage(schema.Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class PlainFormat(schema.Body):
    type: Literal["text", "json_object"]


class SchemaFormat(schema.JsonSchema):
    type: Literal["json_schema"]


class TextOptions(schema.Body):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: str | None = None


class ResponsesRequest(schema.SamplingFields):
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    # Accepted at these values only.
    tools: schema.Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    include: schema.Nothing = None
    previous_response_id: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: None = None


class OutputTokenDetails(schema.Reply):
    reasoning_tokens: int


class ResponseUsage(schema.Reply):
    input_tokens: int
    input_tokens_details: schema.PromptDetails
    output_tokens: int
    output_tokens_details: OutputTokenDetails
    total_tokens: int


class TextContent(schema.Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(schema.Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[TextContent]


class Incomplete(schema.Reply):
    reason: Literal["max_output_tokens"]


class ResponsesReply(schema.Reply):
    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    tool_choice: Literal["none"]
    tools: list[Any]
    top_p: float
    inspect: schema.Inspection | None = None


class ResponsesEvent(schema.Reply):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponsesReply | None = None
    item: OutputMessage | None = None
    part: TextContent | None = None
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[Any] | None = None


def parse_responses(body: ResponsesRequest, card: ModelCard) -> ParsedRequest:
    """Return the conversation of a request in the model's template, with its last answer open."""
    messages = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    turns = [_turn(message, index) for index, message in enumerate(messages)]
    if body.instructions is not None:
        turns.insert(0, ChatTurn("system", body.instructions))
    text_format = body.text.format if body.text is not None else None
    json_schema = text_format.schema_ if isinstance(text_format, SchemaFormat) else None
    if isinstance(text_format, PlainFormat) and text_format.type == "json_object":
        json_schema = ANY_OBJECT
    sampling = sampling_of(body, max_new_tokens=body.max_output_tokens, json_schema=json_schema)
    return parsed_chat(turns, card, sampling)


def _turn(message: InputMessage, index: int) -> ChatTurn:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return checked_turn(ChatTurn(role, message.content), f"input[{index}]")
    shown = [part for part in message.content if isinstance(part, InputImage)]
    images = tuple(ShownImage(part.image_url, "low" if part.detail == "low" else "auto") for part in shown)
    if images and role != "user":
        raise InputError(f"input[{index}]: only the user shows images")
    text = "\n".join(part.text for part in message.content if not isinstance(part, InputImage))
    return checked_turn(ChatTurn(role, text, images), f"input[{index}]")


class ResponsesWriter(ReplyWriter):
    """Write the answer as one message with one text."""

    id_prefix = "resp_"

    def __init__(self, body: ResponsesRequest, sampling: SamplingParams) -> None:
        super().__init__(body.model, token_text=str, inspect=body.inspect)
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._instructions, self._metadata = body.instructions, body.metadata or {}
        self._sampling = sampling
        self._number = 0
        self._text, self._is_cut = "", False

    def opening(self, num_choices: int) -> Iterable[ResponsesEvent]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", [], None))
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._text_event("response.content_part.added", part=self._content(""))

    def deltas(self, chunk: Chunk) -> Iterable[ResponsesEvent]:
        self._text += chunk.text
        self._is_cut = chunk.finish_reason == "length"
        yield self._text_event("response.output_text.delta", delta=chunk.text, logprobs=[])

    def closing(self, stats: RequestStats) -> Iterable[ResponsesEvent]:
        whole = self._whole(stats)
        yield self._text_event("response.output_text.done", text=self._text, logprobs=[])
        yield self._text_event("response.content_part.done", part=self._content(self._text))
        yield self._event("response.output_item.done", output_index=0, item=whole.output[0])
        yield self._event(f"response.{whole.status}", response=whole)

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> ResponsesReply:
        (chunk,) = in_order(chunks)
        self._text, self._is_cut = chunk.text, chunk.finish_reason == "length"
        return self._whole(stats)

    def _whole(self, stats: RequestStats) -> ResponsesReply:
        status: Status = "incomplete" if self._is_cut else "completed"
        response = self._response(status, [self._item(status, [self._content(self._text)])], stats)
        if self.inspect:
            response.inspect = inspection_of(stats)
        return response

    def _response(self, status: Status, output: list[OutputMessage], stats: RequestStats | None) -> ResponsesReply:
        return ResponsesReply(
            id=self.id,
            object="response",
            created_at=self.created,
            status=status,
            model=self.model,
            output=output,
            usage=_usage(stats) if stats is not None else None,
            error=None,
            incomplete_details=Incomplete(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=self._instructions,
            metadata=self._metadata,
            parallel_tool_calls=False,
            temperature=self._sampling.temperature,
            tool_choice="none",
            tools=[],
            top_p=1.0 if self._sampling.top_p is None else self._sampling.top_p,
        )

    def _item(self, status: Status, content: list[TextContent]) -> OutputMessage:
        return OutputMessage(id=self._item_id, type="message", role="assistant", status=status, content=content)

    def _content(self, text: str) -> TextContent:
        return TextContent(type="output_text", text=text, annotations=[], logprobs=[])

    def _text_event(self, kind: str, **fields: Any) -> ResponsesEvent:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> ResponsesEvent:
        event = ResponsesEvent(type=kind, sequence_number=self._number, **fields)
        self._number += 1
        return event


def _usage(stats: RequestStats) -> ResponseUsage:
    usage = stats.usage
    return ResponseUsage(
        input_tokens=usage.num_prompt_tokens,
        input_tokens_details=prompt_details_of(usage),
        output_tokens=usage.num_new_tokens,
        output_tokens_details=OutputTokenDetails(reasoning_tokens=0),
        total_tokens=usage.num_prompt_tokens + usage.num_new_tokens,
    )
