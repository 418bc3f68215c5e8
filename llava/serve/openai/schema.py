"""Request and reply bodies of the OpenAI-compatible API, as pydantic models.

Requests are strict: a wrong type or an unknown field is refused, and `describe_error` says which and where. Fields for
features that this server does not have are accepted at the value that asks for nothing. requests.py translates
bodies; routes are in routes.py. The OpenAPI document is made from these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llava.cli.program import closest
from llava.engine.request import MAX_COMPLETIONS, MAX_LOGPROBS, MAX_SEED

MAX_STOPS = 16


class Body(BaseModel):
    """Part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Reply(BaseModel):
    """Part of a reply; fields that were not set are left out."""

    def as_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


# Messages


class ImageURL(Body):
    url: str = Field(description="an http(s) or data: URL", min_length=1)
    detail: Literal["auto", "low", "high"] = Field("auto", description="low: one tile; else the model's own tiling")


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageURL


Nothing = Annotated[list[object], Field(max_length=0)] | None


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | list[TextPart]
    name: str | None = None
    # What the official client sends back of an answer.
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


# Requests


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="accepted and ignored")


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1)]


class SamplingFields(Body):
    """Sampling and other fields that all three kinds of request have."""

    model: str
    temperature: float | None = Field(None, ge=0, le=100, description="default: 0, greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    user: str | None = None
    # Not OpenAI's; named as vLLM and others name them.
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="sample from so many most probable tokens; 0: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MAX_STOPS)
    regex: str | None = Field(None, description="the answer matches this expression as a whole", max_length=10_000)
    inspect: bool = Field(False, description="add `inspect` to the reply: tiles and tokens of the images, and times")
    # Accepted and ignored.
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    store: bool | None = None


class GenerationFields(SamplingFields):
    """Further fields that chat and completions have."""

    max_tokens: int | None = Field(None, ge=1, description="of each answer")
    n: int | None = Field(None, ge=1, le=MAX_COMPLETIONS)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias] | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    # Accepted at these values only.
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class CompletionRequest(GenerationFields):
    prompt: str | Annotated[list[str], Field(min_length=1)]
    images: list[ImageURL] | None = Field(None, description="one for each `<image>` of a single prompt")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # Accepted at these values only.
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


# Replies


class PromptDetails(Reply):
    cached_tokens: int
    image_tokens: int
    text_tokens: int


class UsageBody(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class SeenImage(Reply):
    """The tiles and tokens of one image."""

    width: int
    height: int
    tiles: int
    grid: list[int] | None  # (rows, columns) of tiles beside the overview; None for a single tile
    tokens: int


class Inspection(Reply):
    images: list[SeenImage]
    queued_s: float
    first_token_s: float | None
    total_s: float


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobBody(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprobBody]
    refusal: None = None


class AssistantReply(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(Reply):
    index: int
    message: AssistantReply
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    inspect: Inspection | None = None


class Delta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None
    inspect: Inspection | None = None


class TextLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextReply(Reply):
    """Also each chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody | None = None
    inspect: Inspection | None = None


class ModelEntry(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    # Not OpenAI's.
    context_len: int | None = None
    conv_mode: str | None = None
    chat_template: dict[str, str | dict[str, str]] | None = (
        None  # in place of conv_mode, where the model's folder has its own
    )
    takes_images: bool | None = None
    architecture: str | None = None
    num_parameters: int | None = None
    dtype: str | None = None


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelEntry]


class ErrorBody(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorBody
    request_id: str | None = None


def describe_error(error: ValidationError, body: object) -> tuple[str, str | None]:
    """Return what is wrong with a body, in one sentence, and the name of the field."""
    problems = [(_path(item["loc"], body), item) for item in error.errors(include_url=False, include_context=False)]
    # Of the alternatives of a union, the one that got furthest is the one that was meant.
    path, worst = max(problems, key=lambda pair: len(pair[0]))
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    if worst["type"] == "extra_forbidden":
        fields = ChatRequest.model_fields | CompletionRequest.model_fields
        known = [field.alias or key for key, field in fields.items()]
        hint = closest(str(path[-1]), known) if len(path) == 1 else ""
        return f"unknown field {name!r}{hint}", name
    message = worst["msg"][:1].lower() + worst["msg"][1:]
    return (f"{name}: {message}" if name else f"the body is not valid: {message}"), name or None


def _path(loc: tuple[int | str, ...], body: Any) -> list[int | str]:
    """Return the steps of an error's location that are in the body; pydantic adds names of types."""
    steps: list[int | str] = []
    for position, step in enumerate(loc):
        inside = isinstance(body, dict) and step in body
        if inside or (isinstance(body, list) and isinstance(step, int) and step < len(body)):
            body = body[step]
        elif not (isinstance(body, dict) and position == len(loc) - 1):
            continue
        steps.append(step)
    return steps
