"""Translate bodies of the OpenAI-compatible API to prompts and sampling parameters.

In: a validated body and the `ModelCard`. Out: a `ParsedRequest` (serve/chat_turns.py): prompts, image URLs, sampling
parameters. Replies are made in replies.py. Pure functions: no HTTP, no model.
"""

from __future__ import annotations

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import check_placeholders
from llava.engine.request import SamplingParams
from llava.errors import InputError
from llava.serve.backends.base import ModelCard
from llava.serve.chat_turns import ChatTurn, ParsedRequest, ShownImage, checked_turn, parsed_chat
from llava.serve.openai import schema

DEFAULT_NEW_TOKENS = 512
# Fields that `SamplingParams` calls by the same name.
SAME_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "ignore_eos", "n", "regex",
)  # fmt: skip
ANY_OBJECT: dict[str, object] = {"type": "object"}


def parse_chat(body: schema.ChatRequest, card: ModelCard) -> ParsedRequest:
    """Return the conversation of a chat request in the model's template, with its last answer open."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InputError("max_tokens and max_completion_tokens are two names of one number; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        raise InputError("top_logprobs has no effect without logprobs: true; give both")
    json_schema: dict[str, object] | None = None
    if isinstance(body.response_format, schema.JsonObjectFormat):
        json_schema = ANY_OBJECT
    elif isinstance(body.response_format, schema.JsonSchemaFormat):
        json_schema = body.response_format.json_schema.schema_
    turns = [_turn(message, index) for index, message in enumerate(body.messages)]
    sampling = sampling_of(
        body,
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        json_schema=json_schema,
    )
    return parsed_chat(turns, card, sampling)


def parse_completion(body: schema.CompletionRequest, card: ModelCard) -> ParsedRequest:
    """Return the prompts of a completion request as they are."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    images = tuple(_shown(image) for image in body.images or ())
    if images and len(prompts) > 1:
        raise InputError("images go with a single prompt; send a request for each prompt that has images")
    for prompt in prompts:
        check_placeholders(prompt.count(DEFAULT_IMAGE_TOKEN), len(images))
    sampling = sampling_of(body, max_new_tokens=body.max_tokens, logprobs=body.logprobs)
    filled = tuple(prompt.replace(DEFAULT_IMAGE_TOKEN, card.image_placeholder) for prompt in prompts)
    return ParsedRequest(filled, images, sampling)


def sampling_of(
    body: schema.SamplingFields,
    *,
    max_new_tokens: int | None,
    logprobs: int | None = None,
    json_schema: dict[str, object] | None = None,
) -> SamplingParams:
    """Translate the sampling fields that a body has."""
    fields = dict(body)
    stop = fields.get("stop") or ()
    return SamplingParams.given(
        max_new_tokens=max_new_tokens or DEFAULT_NEW_TOKENS,
        min_new_tokens=body.min_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        logit_bias={int(token): bias for token, bias in (fields.get("logit_bias") or {}).items()},
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        json_schema=json_schema,
        **{name: fields.get(name) for name in SAME_NAMES},
    )


def _turn(message: schema.SystemMessage | schema.UserMessage | schema.AssistantMessage, index: int) -> ChatTurn:
    role = "system" if isinstance(message, schema.SystemMessage) else message.role
    if isinstance(message.content, str):
        text = message.content
        images: tuple[ShownImage, ...] = ()
    else:
        texts = [part.text for part in message.content if not isinstance(part, schema.ImagePart)]
        images = tuple(_shown(part.image_url) for part in message.content if isinstance(part, schema.ImagePart))
        text = "\n".join(texts)
    return checked_turn(ChatTurn(role, text, images), f"messages[{index}]")


def _shown(image: schema.ImageURL) -> ShownImage:
    return ShownImage(image.url, "low" if image.detail == "low" else "auto")
