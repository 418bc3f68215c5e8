"""Replies of Ollama's API: answers from the engine's chunks, and descriptions of models.

In: `Chunk`s as they come and what the request took; model entries. Out: replies of schema.py. A stream is a line of JSON for
each reply.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Literal

from llava.engine.request import Chunk
from llava.serve.answers import ReplyBody, StreamEncoding
from llava.serve.http.errors import as_api_error, error_body, ollama_form
from llava.serve.ollama import schema
from llava.serve.ollama.requests import DEFAULT_TAG
from llava.serve.openai.schema import ModelEntry
from llava.serve.service import RequestStats
from llava.serve.tools import AnswerChunk, ToolCall, calls_of

LINES = "application/x-ndjson"
NEVER = "2318-01-01T00:00:00Z"  # when a model that stays loaded is unloaded; far away, as Ollama's servers say it
QUANTIZATION = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class OllamaWriter:
    """Write the answer to a chat, or with `as_message` false to generate."""

    def __init__(self, model: str, *, as_message: bool) -> None:
        self._model = model
        self._as_message = as_message
        self._is_cut = False
        self._with_calls: list[AnswerChunk] = []

    def opening(self, num_choices: int) -> Iterable[schema.Answer]:
        return ()

    def deltas(self, chunk: Chunk) -> Iterable[schema.Answer]:
        self._is_cut = chunk.finish_reason == "length"
        if isinstance(chunk, AnswerChunk) and chunk.calls:
            self._with_calls.append(chunk)
        if chunk.text:
            yield self._answer(chunk.text)

    def closing(self, stats: RequestStats) -> Iterable[schema.Answer]:
        if self._with_calls:
            yield self._answer("", calls_of(self._with_calls))
        yield self._last(self._answer(""), stats)

    def whole(self, chunks: Sequence[Chunk], stats: RequestStats) -> schema.Answer:
        self._is_cut = chunks[-1].finish_reason == "length"
        text = "".join(chunk.text for chunk in chunks)
        return self._last(self._answer(text, calls_of(chunks)), stats)

    def nothing(self, reason: Literal["load", "unload"]) -> schema.Answer:
        """The answer to a request without a question, which loads or unloads a model."""
        answer = self._answer("")
        answer.done, answer.done_reason = True, reason
        return answer

    def _answer(self, text: str, calls: Sequence[ToolCall] = ()) -> schema.Answer:
        answer = schema.Answer(model=self._model, created_at=rfc3339(datetime.now(UTC)), done=False)
        if self._as_message:
            answer.message = schema.AnswerMessage(role="assistant", content=text)
            if calls:
                answer.message.tool_calls = [_call(call, index) for index, call in enumerate(calls)]
        else:
            answer.response = text
        return answer

    def _last(self, answer: schema.Answer, stats: RequestStats) -> schema.Answer:
        timings = stats.timings
        first_token_s = timings.total_s if timings.first_token_s is None else timings.first_token_s
        answer.done, answer.done_reason = True, "length" if self._is_cut else "stop"
        answer.total_duration = _nanoseconds(timings.total_s)
        answer.load_duration = 0
        answer.prompt_eval_count = stats.usage.num_prompt_tokens
        answer.prompt_eval_duration = _nanoseconds(first_token_s - timings.queued_s)
        answer.eval_count = stats.usage.num_new_tokens
        answer.eval_duration = _nanoseconds(timings.total_s - first_token_s)
        return answer


def _call(call: ToolCall, index: int) -> schema.CallReply:
    name, arguments = call.given()
    function = schema.CalledFunctionReply(name=name, arguments=dict(arguments), index=index)
    return schema.CallReply(id=call.call_id, function=function)


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def line(reply: ReplyBody) -> bytes:
    return reply.as_json().encode() + b"\n"


def error_line(error: Exception) -> bytes:
    """The last line of a stream that failed, which clients raise."""
    return json.dumps(error_body(as_api_error(error), ollama_form)).encode() + b"\n"


STREAM = StreamEncoding(LINES, line, error_line)


# Models


def listed(entry: ModelEntry) -> schema.ListedModel:
    """Describe a model as /api/tags does."""
    name = tagged(entry.id)
    return schema.ListedModel(
        name=name,
        model=name,
        modified_at=_created(entry),
        size=_size(entry),
        digest=hashlib.sha256(f"{entry.id} {entry.num_parameters} {entry.dtype}".encode()).hexdigest(),
        details=_details(entry),
    )


def running(entry: ModelEntry) -> schema.RunningModel:
    """Describe a model as /api/ps does. Every model of this server is loaded, and stays so."""
    size = _size(entry)
    return schema.RunningModel(
        **listed(entry).model_dump(), expires_at=NEVER, size_vram=size, context_length=entry.context_len or 0
    )


def shown(entry: ModelEntry) -> schema.ShownModel:
    """Describe a model as /api/show does."""
    family = _family(entry)
    info: dict[str, object] = {"general.architecture": family, "general.basename": entry.id}
    if entry.num_parameters is not None:
        info["general.parameter_count"] = entry.num_parameters
    if entry.context_len is not None:
        info[f"{family}.context_length"] = entry.context_len
    source = entry.chat_template["source"] if entry.chat_template is not None else entry.conv_mode or ""
    return schema.ShownModel(
        license="",
        modelfile=f"FROM {entry.id}\n",
        parameters="",
        template=str(source),
        details=_details(entry),
        model_info=info,
        capabilities=["completion", "tools", *(["vision"] if entry.takes_images else [])],
        modified_at=_created(entry),
    )


def tagged(name: str) -> str:
    """The name with a tag, which clients of Ollama expect of every name."""
    return name if ":" in name.rpartition("/")[2] else name + DEFAULT_TAG


def _details(entry: ModelEntry) -> schema.Details:
    family, number = _family(entry), entry.num_parameters
    size = "" if number is None else f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"
    return schema.Details(
        parent_model="",
        format="safetensors",
        family=family,
        families=[family, "clip"] if entry.takes_images else [family],
        parameter_size=size,
        quantization_level=QUANTIZATION.get(entry.dtype or "", entry.dtype or ""),
    )


def _family(entry: ModelEntry) -> str:
    return entry.architecture or "llava"


def _size(entry: ModelEntry) -> int:
    """Bytes of the weights, as far as they are known."""
    bits = {"float32": 32, "int8": 8, "int4": 4}.get(entry.dtype or "", 16)
    return (entry.num_parameters or 0) * bits // 8


def _created(entry: ModelEntry) -> str:
    return rfc3339(datetime.fromtimestamp(entry.created, UTC))


def rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
