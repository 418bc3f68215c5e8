"""Request and reply bodies of the OpenAI-compatible API, as pydantic models.

A wrong type is refused (serve/bodies.py). Fields that would change the answer, of features that this server does not have, are
accepted at the value that asks for nothing. requests.py translates bodies; routes are in routes.py. The OpenAPI document is
made from these classes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from llava.engine.request import MAX_COMPLETIONS, MAX_LOGPROBS
from llava.serve.bodies import Body
from llava.serve.tools import MAX_TOOLS

MAX_STOPS = 16


class Reply(BaseModel):
    """Part of a reply; fields that were not set are left out."""

    def as_json(self) -> str:
        return self.model_dump_json(exclude_unset=True)


# Messages


class ImageURL(Body):
    url: str = Field(description="an http(s) or data: URL", min_length=1)
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="low: one tile; else the model's own tiling"
    )


class VideoURL(Body):
    """A video, of which the model sees some frames: 32 with equal distances where nothing else is said."""

    url: str = Field(description="an http(s) or data: URL", min_length=1)
    num_frames: int | None = Field(None, ge=1, description="so many frames with equal distances, or with fps at most")
    fps: float | None = Field(None, gt=0, le=1000, description="frames for each second of the video")
    start: float | None = Field(None, ge=0, description="seconds; the frames before are not seen")
    end: float | None = Field(None, gt=0, description="seconds; the frames after are not seen")
    time_instruction: bool | None = Field(
        None, description="whether the prompt says when the frames are (default: as the model was trained)"
    )


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageURL


class VideoPart(Body):
    """Not OpenAI's; in the form of vLLM and others."""

    type: Literal["video_url"]
    video_url: VideoURL


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


Nothing = Annotated[list[object], Field(max_length=0)] | None


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]]
    name: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str = Field(description="a JSON object")


class CallOfTool(Body):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    tool_calls: list[CallOfTool] | None = None
    function_call: CalledFunction | None = Field(None, description="the older form of tool_calls")
    name: str | None = None
    # What clients send back of an answer.
    refusal: object = None
    annotations: object = None
    audio: object = None
    parsed: object = None
    reasoning: object = None
    reasoning_content: object = None


class ToolMessage(Body):
    """What a tool gave."""

    role: Literal["tool"]
    content: str | list[TextPart] | None
    tool_call_id: str = ""
    name: str | None = None


class FunctionMessage(Body):
    """What a function gave, in the older form."""

    role: Literal["function"]
    content: str | None
    name: str


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")
]


# Requests


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="each chunk has the usage so far")
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
    top_p: float | None = Field(None, ge=0, le=1, description="0: greedy")
    stream: bool | None = None
    user: str | None = None
    # Not OpenAI's; named as vLLM and others name them.
    top_k: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="sample from so many most probable tokens; 0 or -1: all"
    )
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

    max_tokens: int | None = Field(None, ge=0, description="of each answer")
    n: int | None = Field(None, ge=1, le=MAX_COMPLETIONS)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="-1: another one each time")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias] | None = None
    stream_options: StreamOptions | None = None


class FunctionBody(Body):
    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = Field(
        None, description="hold the arguments to the schema also where the model chooses to call"
    )


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedToolChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedToolChoice, Field(discriminator="type")]


class ChatRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[ToolBody] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = Field(None, description="default: auto")
    parallel_tool_calls: bool | None = Field(
        None, description="several calls in an answer; by default only where the model chooses to call"
    )
    functions: list[FunctionBody] | None = Field(None, max_length=MAX_TOOLS, description="the older form of tools")
    function_call: Literal["none", "auto"] | FunctionName | None = None
    # Not OpenAI's; named as vLLM names them.
    continue_final_message: bool | None = Field(
        None, description="go on with the assistant's last message (the default); false: answer it by another turn"
    )
    add_generation_prompt: bool | None = None
    # Accepted at these values only.
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    # Accepted and ignored.
    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: object = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    prompt: str | Prompts = Field(description="one or several, as text or as token ids")
    images: list[ImageURL] | None = Field(None, description="one for each `<image>` of a single prompt")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = Field(None, description="the answer begins with the prompt, and its log probabilities")
    best_of: int | None = Field(None, ge=1, le=MAX_COMPLETIONS, description="accepted where it is n")
    # Accepted at these values only.
    suffix: Literal[""] | None = None


# Replies


class PromptDetails(Reply):
    cached_tokens: int
    image_tokens: int
    text_tokens: int


class UsageBody(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None  # known at the end


class SeenImage(Reply):
    """The tiles and tokens of one image."""

    width: int
    height: int
    tiles: int
    grid: list[int] | None  # (rows, columns) of tiles beside the overview; None for a single tile
    tokens: int


class SeenVideo(Reply):
    """The frames and tokens of one video."""

    frames: int
    grid: list[int]  # (rows, columns) of the tokens of a frame
    tokens: int


class Inspection(Reply):
    images: list[SeenImage]
    videos: list[SeenVideo] | None = None  # where the request has some
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


class FunctionReply(Reply):
    name: str
    arguments: str


class ToolCallReply(Reply):
    id: str
    type: Literal["function"]
    function: FunctionReply


class AssistantReply(Reply):
    role: Literal["assistant"]
    content: str | None  # None where there are only calls
    refusal: None = None
    tool_calls: list[ToolCallReply] | None = None
    function_call: FunctionReply | None = None


FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


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


class FunctionDelta(Reply):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Reply):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionDelta | None = None


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
    token_logprobs: list[float | None]  # None for the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None] | None
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
    takes_videos: bool | None = None
    architecture: str | None = None
    num_parameters: int | None = None
    dtype: str | None = None


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelEntry]


class DeletedResponse(Reply):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ErrorBody(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorBody
    request_id: str | None = None
