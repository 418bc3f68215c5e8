"""Translate bodies of Ollama's API to turns and sampling parameters.

In: a validated body and the `ModelCard`. Out: a `ParsedRequest`. Pure functions: no HTTP, no model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import check_placeholders, with_image_placeholders
from llava.engine.request import SamplingParams
from llava.errors import InputError
from llava.serve.backends.base import ModelCard
from llava.serve.chat_turns import (
    ChatTurn,
    ParsedRequest,
    ShownImage,
    checked_turn,
    is_base64_video,
    no_videos,
    parsed_chat,
)
from llava.serve.json_schema import closed
from llava.serve.ollama import schema
from llava.serve.openai.requests import chosen_tools
from llava.serve.tools import Tool, ToolCall

DEFAULT_TAG = ":latest"
ANY_OBJECT: dict[str, object] = {"type": "object"}
UNKNOWN_CONTEXT = 8192  # new tokens at most where only the server elsewhere knows the context


def parse_ollama_chat(body: schema.OllamaChatRequest, card: ModelCard) -> ParsedRequest:
    """Return the conversation of a chat request in the model's template, with its last answer open."""
    turns = [_turn(message, index) for index, message in enumerate(body.messages)]
    functions = [tool.function for tool in body.tools or ()]
    tools = [Tool(one.name, one.description or "", one.parameters or {}) for one in functions]
    use = chosen_tools(tools, card, is_required=False, is_parallel=None)
    return parsed_chat(turns, card, sampling_of(body, card), tools=use)


def parse_generate(body: schema.GenerateRequest, card: ModelCard) -> ParsedRequest:
    """Return one question in the model's template, or with `raw` the prompt as it is, after its images."""
    images = _shown(body.images)
    sampling = sampling_of(body, card)
    if not body.raw:
        turns = [checked_turn(ChatTurn("user", body.prompt, images), "prompt")]
        if body.system:
            turns.insert(0, ChatTurn("system", body.system))
        return parsed_chat(turns, card, sampling)
    if body.system:
        raise InputError("system has no effect with raw: true, where the prompt is complete; give one of them")
    if DEFAULT_IMAGE_TOKEN in body.prompt:
        check_placeholders(body.prompt.count(DEFAULT_IMAGE_TOKEN), len(images))
        prompt = body.prompt.replace(DEFAULT_IMAGE_TOKEN, card.image_placeholder)
    else:
        prompt = with_image_placeholders(body.prompt, len(images), card.image_placeholder)
    return ParsedRequest((prompt,), images, sampling)


def _turn(message: schema.ChatMessage, index: int) -> ChatTurn:
    path, text = f"messages[{index}]", message.content or ""
    if message.images and message.role != "user":
        raise InputError(f"{path}: only the user shows images")
    if message.role == "tool":
        return checked_turn(
            ChatTurn("tool", text, call_id=message.tool_call_id or "", name=message.tool_name or ""), path
        )
    calls = tuple(_call(one.function, one.id) for one in message.tool_calls or ())
    return checked_turn(ChatTurn(message.role, text, _shown(message.images), calls), path)


def _call(function: schema.PastFunction, call_id: str | None) -> ToolCall:
    given = function.arguments or {}
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return ToolCall(function.name, arguments, call_id) if call_id else ToolCall(function.name, arguments)


def sampling_of(body: schema.AskingFields, card: ModelCard) -> SamplingParams:
    """Translate the options. What is not given is this server's default, which is not Ollama's."""
    if body.think:
        raise InputError(f"think: {card.name} is no model that thinks before it answers; send false or leave it out")
    options = body.options or schema.Options.model_validate({})
    stop = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
    unlimited = options.num_predict is None or options.num_predict <= 0
    most = card.context_len or UNKNOWN_CONTEXT
    keep_one = options.top_p == 0
    return SamplingParams.given(
        temperature=options.temperature,
        top_p=None if keep_one else options.top_p,
        top_k=1 if keep_one else options.top_k,
        min_p=options.min_p,
        seed=None if options.seed is None or options.seed < 0 else options.seed,
        max_new_tokens=most if unlimited else options.num_predict,
        stop=tuple(text for text in stop if text),
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        json_schema=ANY_OBJECT if body.format == "json" else closed(body.format) if body.format else None,
    )


def matches(asked: str, name: str) -> bool:
    """Whether a client that asks for `asked` means the model `name`: without a tag, Ollama adds `:latest`."""
    return asked in (name, name + DEFAULT_TAG)


def _shown(images: Sequence[str] | None) -> tuple[ShownImage, ...]:
    """Images in base64, which Ollama's clients send without the head of a data: URL."""
    for index, image in enumerate(images or ()):
        if is_base64_video(image):
            raise no_videos(f"images[{index}]", "Ollama")
    return tuple(ShownImage(image if image.startswith("data:") else f"data:;base64,{image}") for image in images or ())
