"""Request and reply bodies of OpenAI's newer API, /v1/responses.

Input is a text, or a list of items: messages, calls of tools and what they gave, and references to items of earlier answers.
responses_api.py translates them and writes replies.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from llava.engine.request import MAX_LOGPROBS
from llava.serve.openai import schema
from llava.serve.tools import MAX_TOOLS

Status = Literal["in_progress", "completed", "incomplete"]
TOKEN_LOGPROBS = "message.output_text.logprobs"  # in `include`


class InputText(schema.Body):
    type: Literal["input_text"]
    text: str


class InputImage(schema.Body):
    type: Literal["input_image"]
    image_url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high", "original"] | None = None


class OutputText(schema.Body):
    """A part of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: object = None
    logprobs: object = None


InputPart = Annotated[InputText | InputImage | OutputText | schema.RefusalPart, Field(discriminator="type")]


class InputMessage(schema.Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(schema.Body):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(schema.Body):
    """What a function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Annotated[InputText | OutputText, Field(discriminator="type")]]
    id: str | None = None
    status: str | None = None


class InputReasoning(schema.Body):
    """What another model thought; it is left out."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: object = None
    content: object = None
    encrypted_content: object = None
    status: object = None


class ItemReference(schema.Body):
    """An item of an earlier answer, by its id."""

    type: Literal["item_reference"] | None = "item_reference"
    id: str


def _kind_of(item: object) -> str | None:
    """The type of an item; messages and references may leave it out."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    if kind is None and isinstance(item, dict):
        return "message" if "role" in item or "id" not in item else "item_reference"
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind_of),
]


class PlainFormat(schema.Body):
    type: Literal["text", "json_object"]


class SchemaFormat(schema.JsonSchema):
    type: Literal["json_schema"]


class TextOptions(schema.Body):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: str | None = None


class FunctionTool(schema.FunctionBody):
    type: Literal["function"]


class NamedFunction(schema.Body):
    type: Literal["function"]
    name: str


class AllowedFunctions(schema.Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction] = Field(min_length=1)


FunctionChoice = (
    Literal["none", "auto", "required"] | Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")]
)


class ResponsesRequest(schema.SamplingFields):
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: FunctionChoice | None = Field(None, description="default: auto")
    parallel_tool_calls: bool | None = Field(
        None, description="several calls in an answer; by default only where the model chooses to call"
    )
    previous_response_id: str | None = Field(None, description="the conversation goes on from this answer")
    include: list[str] | None = Field(None, description=f"known: {TOKEN_LOGPROBS}")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="-1: another one each time")
    # Accepted at these values only.
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    # Accepted and ignored.
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: object = None
    stream_options: object = None


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
    logprobs: list[schema.TokenLogprobBody]


class OutputMessage(schema.Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[TextContent]


class OutputCall(schema.Reply):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputCall


class Incomplete(schema.Reply):
    reason: Literal["max_output_tokens"]


class ResponsesReply(schema.Reply):
    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    inspect: schema.Inspection | None = None


class ResponsesEvent(schema.Reply):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponsesReply | None = None
    item: OutputItem | None = None
    part: TextContent | None = None
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[schema.TokenLogprobBody] | None = None
