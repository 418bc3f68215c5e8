"""Request and reply bodies of Ollama's API, as pydantic models.

requests.py translates bodies, replies.py writes replies; routes are in routes.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llava.engine.request import MAX_SEED, MAX_TOP_K
from llava.serve.bodies import Body
from llava.serve.openai.schema import Nothing, Reply, ToolBody
from llava.serve.tools import MAX_TOOLS

MAX_STOPS = 16
Ignored = object | None  # accepted without effect


class Options(Body):
    """How tokens are sampled. Runner settings that Ollama has and this server decides itself are accepted."""

    temperature: float | None = Field(None, ge=0, le=100, description="default: 0, greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="0 keeps the most probable token alone")
    top_k: int | None = Field(None, ge=0, le=MAX_TOP_K, description="0: all")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, le=MAX_SEED, description="below 0: a new one each time")
    num_predict: int | None = Field(None, ge=-2, description="new tokens; -1 and -2: as many as the context holds")
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    repeat_penalty: float | None = Field(None, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    num_ctx: int | None = Field(
        None, ge=0, description="accepted; the context is the one that the model was served with"
    )
    # Accepted and ignored.
    repeat_last_n: Ignored = None
    typical_p: Ignored = None
    tfs_z: Ignored = None
    mirostat: Ignored = None
    mirostat_eta: Ignored = None
    mirostat_tau: Ignored = None
    penalize_newline: Ignored = None
    num_keep: Ignored = None
    num_batch: Ignored = None
    num_gpu: Ignored = None
    main_gpu: Ignored = None
    num_thread: Ignored = None
    numa: Ignored = None
    low_vram: Ignored = None
    f16_kv: Ignored = None
    logits_all: Ignored = None
    vocab_only: Ignored = None
    use_mmap: Ignored = None
    use_mlock: Ignored = None
    embedding_only: Ignored = None


class AskingFields(Body):
    """Fields that chat and generate have."""

    model: str
    stream: bool | None = Field(None, description="default: true")
    format: Literal["", "json"] | dict[str, object] | None = Field(None, description="json, or a JSON schema")
    options: Options | None = None
    keep_alive: str | float | None = Field(None, description="accepted; the model stays loaded")
    think: bool | str | None = Field(None, description="false only: this server has no models that think")
    # Accepted at these values only.
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    truncate: Ignored = None
    shift: Ignored = None


class PastFunction(Body):
    name: str
    arguments: dict[str, object] | str | None = None
    index: Ignored = None
    description: Ignored = None


class CallBody(Body):
    function: PastFunction
    type: Ignored = None
    id: str | None = None


class ChatMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    images: list[str] | None = Field(None, description="in base64")
    thinking: Ignored = None
    tool_calls: list[CallBody] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChatRequest(AskingFields):
    messages: list[ChatMessage] = Field(default_factory=list, description="without any, the model is only loaded")
    tools: list[ToolBody] | None = Field(None, max_length=MAX_TOOLS)


class GenerateRequest(AskingFields):
    prompt: str = ""
    system: str | None = None
    images: list[str] | None = Field(None, description="in base64")
    raw: bool = Field(False, description="the prompt is complete: no template is applied")
    # Accepted at these values only.
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: Nothing = None


class EmbedBody(Body):
    """Texts to embed, in the field of /api/embed or in that of the older /api/embeddings."""

    model: str
    input: str | Annotated[list[str], Field(min_length=1)] | None = None
    prompt: str | None = Field(None, description="of /api/embeddings")
    dimensions: int | None = Field(None, ge=1, description="of the vectors; another number than the model's is refused")
    options: Options | None = Field(None, description="accepted; nothing is sampled")
    keep_alive: str | float | None = Field(None, description="accepted; the model stays loaded")
    truncate: Literal[False] | None = Field(None, description="false only: a text that is too long is refused")


class ModelRequest(Body):
    """The name of a model, in both of the fields that it has had."""

    model: str | None = None
    name: str | None = None
    verbose: Ignored = None
    stream: bool | None = None
    insecure: Ignored = None
    options: Ignored = None
    system: Ignored = None
    template: Ignored = None
    keep_alive: Ignored = None


class CalledFunctionReply(Reply):
    name: str
    arguments: dict[str, object]
    index: int


class CallReply(Reply):
    id: str
    function: CalledFunctionReply


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str
    tool_calls: list[CallReply] | None = None


class Answer(Reply):
    """A part of an answer, or all of it; the last one has `done` true and what the answer took, in nanoseconds."""

    model: str
    created_at: str
    message: AnswerMessage | None = None
    response: str | None = None
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class Details(Reply):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ListedModel(Reply):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class RunningModel(ListedModel):
    expires_at: str
    size_vram: int
    context_length: int


class Tags(Reply):
    models: list[ListedModel]


class RunningModels(Reply):
    models: list[RunningModel]


class ShownModel(Reply):
    license: str
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, object]
    capabilities: list[str]
    modified_at: str


class Version(Reply):
    version: str


class Status(Reply):
    status: str


class OllamaError(Reply):
    error: str
    request_id: str | None = None


class EmbedReply(Reply):
    """The vectors of /api/embed, or the one of /api/embeddings."""

    model: str
    embeddings: list[list[float]]
    embedding: list[float]
    total_duration: int
    prompt_eval_count: int
