"""Request and reply bodies of Anthropic's Messages API, as pydantic models.

requests.py translates bodies, replies.py writes replies; routes are in routes.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llava.serve.bodies import Body
from llava.serve.openai.schema import Nothing, Reply
from llava.serve.tools import MAX_TOOLS

MAX_STOPS = 16
Ignored = object | None  # accepted without effect


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: Ignored = None
    citations: Ignored = None


class Base64Source(Body):
    type: Literal["base64"]
    media_type: str
    data: str = Field(min_length=1)


class UrlSource(Body):
    type: Literal["url"]
    url: str = Field(min_length=1)


class ImageBlock(Body):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]
    cache_control: Ignored = None


class VideoBlock(Body):
    """Not of this API, and refused in a sentence."""

    type: Literal["video", "video_url"]


class ThinkingBlock(Body):
    """What another model thought in an earlier answer; it is not shown to this one."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None


class ToolUseBlock(Body):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]
    cache_control: Ignored = None
    caller: Ignored = None


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]] | None = None
    is_error: bool | None = None
    cache_control: Ignored = None


ContentBlock = Annotated[
    TextBlock | ImageBlock | VideoBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class InputTurn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class ToolDefinition(Body):
    name: str
    description: str | None = None
    input_schema: dict[str, object] = Field(default_factory=dict)
    strict: bool | None = None
    type: str | None = Field(None, description="custom, the only kind: this server runs no tools itself")
    cache_control: Ignored = None
    eager_input_streaming: Ignored = None
    input_examples: Ignored = None
    defer_loading: Ignored = None
    allowed_callers: Ignored = None


class ChosenTool(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")


class OutputConfig(Body):
    format: JsonFormat | None = None
    effort: Ignored = None
    task_budget: Ignored = None


class PromptFields(Body):
    """What makes a prompt."""

    model: str
    messages: list[InputTurn] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ChosenTool | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = Field(None, description="the earlier name of output_config.format")
    # Accepted and ignored.
    thinking: Ignored = None
    cache_control: Ignored = None
    context_management: Ignored = None
    mcp_servers: Nothing = None


class MessagesRequest(PromptFields):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100, description="default: 0, greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    # Accepted and ignored.
    metadata: Ignored = None
    service_tier: str | None = None
    container: Ignored = None
    inference_geo: str | None = None


class CountTokensRequest(PromptFields):
    pass


class AnswerText(Reply):
    type: Literal["text"]
    text: str


class AnswerCall(Reply):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, object]


AnswerBlock = AnswerText | AnswerCall
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(Reply):
    """Tokens; of the prompt, those from the cache are counted apart from the others."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessagesReply(Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageDelta(Reply):
    """What a delta adds: text, a part of a call's arguments, or how the answer ended."""

    type: Literal["text_delta", "input_json_delta"] | None = None
    text: str | None = None
    partial_json: str | None = None
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class MessagesEvent(Reply):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    message: MessagesReply | None = None
    index: int | None = None
    content_block: AnswerBlock | None = None
    delta: MessageDelta | None = None
    usage: MessageUsage | None = None


class TokenCount(Reply):
    input_tokens: int


class MessagesModel(Reply):
    type: Literal["model"]
    id: str
    display_name: str
    created_at: str


class MessagesModelList(Reply):
    data: list[MessagesModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class AnthropicErrorBody(Reply):
    type: str
    message: str


class AnthropicError(Reply):
    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str | None = None
