"""Translate bodies of Anthropic's Messages API to turns and sampling parameters.

In: a validated body and the `ModelCard`. Out: a `ParsedRequest`. Pure functions: no HTTP, no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from llava.conversation import Conversation
from llava.engine.request import SamplingParams
from llava.errors import InputError
from llava.serve.anthropic import schema
from llava.serve.backends.base import ModelCard
from llava.serve.chat_turns import ChatTurn, ParsedRequest, ShownImage, as_conversation, checked_turn


def parse_messages(body: schema.MessagesRequest, card: ModelCard) -> ParsedRequest:
    """Return the conversation of a request in the model's template, with its last answer open."""
    conversation, images = parse_prompt_fields(body, card)
    wanted = body.output_config.format if body.output_config is not None else None
    wanted = wanted or body.output_format
    sampling = SamplingParams.given(
        max_new_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=stop_sequences(body),
        json_schema=wanted.schema_ if wanted is not None else None,
    )
    return ParsedRequest((conversation,), images, sampling)


def stop_sequences(body: schema.MessagesRequest) -> tuple[str, ...]:
    for index, text in enumerate(body.stop_sequences or ()):
        if not text.strip():
            raise InputError(f"stop_sequences[{index}]: it needs a character that is not blank")
    return tuple(body.stop_sequences or ())


def parse_prompt_fields(body: schema.PromptFields, card: ModelCard) -> tuple[Conversation, tuple[ShownImage, ...]]:
    """Return the conversation and its images."""
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(body.messages)]
    if body.system:
        text = body.system if isinstance(body.system, str) else _text(body.system)
        turns.insert(0, ChatTurn("system", text))
    return as_conversation(turns, card), tuple(image for turn in turns for image in turn.images)


def _turn(message: schema.InputTurn, path: str) -> ChatTurn:
    if isinstance(message.content, str):
        return checked_turn(ChatTurn(message.role, message.content), path)
    images = tuple(_shown(block) for block in message.content if isinstance(block, schema.ImageBlock))
    if images and message.role != "user":
        raise InputError(f"{path}: only the user shows images")
    return checked_turn(ChatTurn(message.role, _text(message.content), images), path)


def _text(blocks: Sequence[object]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, schema.TextBlock))


def _shown(block: schema.ImageBlock) -> ShownImage:
    source = block.source
    if isinstance(source, schema.UrlSource):
        return ShownImage(source.url)
    return ShownImage(f"data:{source.media_type};base64,{source.data}")
