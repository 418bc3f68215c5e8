"""OpenAI's newer API, /v1/responses, over the same model: its bodies, what they mean, and how its answers look.

In: a body with `input`, text or a list of messages. Out: a `Draft` as for a chat, and a writer for the answer. Only what a
model that sees and talks can do is here: no tools, no stored conversations. Routes are routes.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llava.engine.request import Chunk, SamplingParams
from llava.errors import InputError
from llava.serve.backends.base import ModelCard
from llava.serve.openai.replies import Cost, Writer, inspection_of, joined
from llava.serve.openai.requests import ANY_OBJECT, Draft, Said, as_conversation, checked_text, sampling_of
from llava.serve.openai.schema import Body, Choosing, ImageURL, Inspection, Nothing, Reply


class InputText(Body):
    type: Literal["input_text"]
    text: str


class InputImage(Body):
    type: Literal["input_image"]
    image_url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = "auto"


class OutputText(Body):
    """A piece of an earlier answer, as it was given."""

    type: Literal["output_text"]
    text: str
    annotations: Nothing = None
    logprobs: Nothing = None


InputPart = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: str | None = None


class ResponsesRequest(Choosing):
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    # Asking for nothing.
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    include: Nothing = None
    previous_response_id: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: None = None


class CachedTokens(Reply):
    cached_tokens: int
    image_tokens: int
    text_tokens: int


class ReasoningTokens(Reply):
    reasoning_tokens: int


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class TextContent(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[TextContent]


class Incomplete(Reply):
    reason: Literal["max_output_tokens"]


class ResponsesReply(Reply):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
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
    inspect: Inspection | None = None


class ResponsesEvent(Reply):
    """One event of a stream; which fields there are depends on its type."""

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


def responses_draft(body: ResponsesRequest, card: ModelCard) -> Draft:
    """The conversation of a request, with its last answer open."""
    messages = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    turns = [_turn(message, place) for place, message in enumerate(messages)]
    if body.instructions is not None:
        turns.insert(0, Said("system", body.instructions))
    form = body.text.format if body.text is not None else None
    json_schema = form.schema_ if isinstance(form, SchemaFormat) else None
    if isinstance(form, PlainFormat) and form.type == "json_object":
        json_schema = ANY_OBJECT
    sampling = sampling_of(body, max_new_tokens=body.max_output_tokens, json_schema=json_schema)
    images = tuple(image for turn in turns for image in turn.images)
    return Draft((as_conversation(turns, card),), images, sampling)


def _turn(message: InputMessage, place: int) -> Said:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return checked_text(Said(role, message.content), f"input[{place}]")
    images = tuple(
        ImageURL(url=part.image_url, detail=part.detail) for part in message.content if isinstance(part, InputImage)
    )
    if images and role != "user":
        raise InputError(f"input[{place}]: only the user shows images")
    text = "\n".join(part.text for part in message.content if not isinstance(part, InputImage))
    return checked_text(Said(role, text, images), f"input[{place}]")


class ResponsesWriter(Writer):
    """The answer as one message with one text."""

    ending = b""

    def __init__(self, body: ResponsesRequest, sampling: SamplingParams) -> None:
        super().__init__(body.model, token_text=str, inspect=body.inspect, kind="resp")
        self.id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._instructions, self._metadata = body.instructions, body.metadata or {}
        self._sampling = sampling
        self._number = 0
        self._text, self._is_cut = "", False

    def opening(self, num_choices: int) -> Iterable[ResponsesEvent]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", [], None))
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._about("response.content_part.added", part=self._content(""))

    def piece(self, chunk: Chunk) -> ResponsesEvent:
        self._text += chunk.text
        self._is_cut = chunk.finish_reason == "length"
        return self._about("response.output_text.delta", delta=chunk.text, logprobs=[])

    def closing(self, cost: Cost) -> Iterable[ResponsesEvent]:
        whole = self._whole(cost)
        yield self._about("response.output_text.done", text=self._text, logprobs=[])
        yield self._about("response.content_part.done", part=self._content(self._text))
        yield self._event("response.output_item.done", output_index=0, item=whole.output[0])
        yield self._event(f"response.{whole.status}", response=whole)

    def whole(self, chunks: Sequence[Chunk], cost: Cost) -> ResponsesReply:
        ((_, self._text, _, reason),) = joined(chunks)
        self._is_cut = reason == "length"
        return self._whole(cost)

    def _whole(self, cost: Cost) -> ResponsesReply:
        status: Literal["completed", "incomplete"] = "incomplete" if self._is_cut else "completed"
        response = self._response(status, [self._item(status, [self._content(self._text)])], cost)
        if self.inspect:
            response.inspect = inspection_of(cost)
        return response

    def _response(self, status: Any, output: list[OutputMessage], cost: Cost | None) -> ResponsesReply:
        return ResponsesReply(
            id=self.id,
            object="response",
            created_at=self.created,
            status=status,
            model=self.model,
            output=output,
            usage=_usage(cost) if cost is not None else None,
            error=None,
            incomplete_details=Incomplete(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=self._instructions,
            metadata=self._metadata,
            parallel_tool_calls=False,
            temperature=self._sampling.temperature,
            tool_choice="none",
            tools=[],
            top_p=self._sampling.top_p,
        )

    def _item(self, status: Any, content: list[TextContent]) -> OutputMessage:
        return OutputMessage(id=self._item_id, type="message", role="assistant", status=status, content=content)

    def _content(self, text: str) -> TextContent:
        return TextContent(type="output_text", text=text, annotations=[], logprobs=[])

    def _about(self, kind: str, **fields: Any) -> ResponsesEvent:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> ResponsesEvent:
        event = ResponsesEvent(type=kind, sequence_number=self._number, **fields)
        self._number += 1
        return event


def _usage(cost: Cost) -> ResponseUsage:
    usage = cost.usage
    return ResponseUsage(
        input_tokens=usage.num_prompt_tokens,
        input_tokens_details=CachedTokens(
            cached_tokens=usage.num_cached_tokens,
            image_tokens=usage.num_image_tokens,
            text_tokens=usage.num_text_tokens,
        ),
        output_tokens=usage.num_new_tokens,
        output_tokens_details=ReasoningTokens(reasoning_tokens=0),
        total_tokens=usage.num_prompt_tokens + usage.num_new_tokens,
    )
