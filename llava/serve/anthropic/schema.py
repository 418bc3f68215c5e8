"""Request and reply bodies of Anthropic's Messages API, as pydantic models.

requests.py translates bodies, replies.py writes replies; routes are in routes.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llava.serve.bodies import Body
from llava.serve.openai.schema import Nothing, Reply

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


class ThinkingBlock(Body):
    """What another model thought in an earlier answer; it is not shown to this one."""

    type: Literal["thinking", "redacted_thinking"]
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None


ContentBlock = Annotated[TextBlock | ImageBlock | ThinkingBlock, Field(discriminator="type")]


class InputTurn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


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
    tools: Nothing = None
    tool_choice: Ignored = None
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


StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


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
    content: list[AnswerText]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageDelta(Reply):
    """What a delta adds: text, or how the answer ended."""

    type: Literal["text_delta"] | None = None
    text: str | None = None
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class MessagesEvent(Reply):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    message: MessagesReply | None = None
    index: int | None = None
    content_block: AnswerText | None = None
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
