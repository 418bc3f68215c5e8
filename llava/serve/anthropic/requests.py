"""Translate bodies of Anthropic's Messages API to turns and sampling parameters.

In: a validated body and the `ModelCard`. Out: a `ParsedRequest`. Pure functions: no HTTP, no model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llava.engine.request import SamplingParams
from llava.errors import InputError
from llava.serve.anthropic import schema
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
from llava.serve.openai.requests import chosen_tools
from llava.serve.tools import Tool, ToolCall, ToolUse


def parse_messages(body: schema.MessagesRequest, card: ModelCard) -> ParsedRequest:
    """Return the conversation of a request in the model's template, with its last answer open."""
    wanted = body.output_config.format if body.output_config is not None else None
    wanted = wanted or body.output_format
    sampling = SamplingParams.given(
        max_new_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=stop_sequences(body),
        json_schema=closed(wanted.schema_) if wanted is not None else None,
    )
    return _parsed(body, card, sampling)


def parse_count(body: schema.CountTokensRequest, card: ModelCard) -> ParsedRequest:
    """Return the request whose prompt is to be counted."""
    return _parsed(body, card, SamplingParams())


def stop_sequences(body: schema.MessagesRequest) -> tuple[str, ...]:
    for index, text in enumerate(body.stop_sequences or ()):
        if not text.strip():
            raise InputError(f"stop_sequences[{index}]: it needs a character that is not blank")
    return tuple(body.stop_sequences or ())


def _parsed(body: schema.PromptFields, card: ModelCard, sampling: SamplingParams) -> ParsedRequest:
    names: dict[str, str] = {}  # of the tools, by the ids of their calls
    turns: list[ChatTurn] = []
    if body.system:
        turns.append(ChatTurn("system", body.system if isinstance(body.system, str) else _text(body.system)))
    for index, message in enumerate(body.messages):
        turns += _turns(message, f"messages[{index}]", names)
    return parsed_chat(turns, card, sampling, tools=_tool_use(body, card))


def _tool_use(body: schema.PromptFields, card: ModelCard) -> ToolUse | None:
    """Return which tools the answer may call; None where it may call none."""
    for index, tool in enumerate(body.tools or ()):
        if tool.type not in (None, "custom"):
            raise InputError(f"tools[{index}]: {tool.type[:80]!r} is a tool that a server runs, and this one runs none")
    tools = [
        Tool(one.name, one.description or "", one.input_schema, is_strict=bool(one.strict)) for one in body.tools or ()
    ]
    choice = body.tool_choice or schema.ChosenTool(type="auto", name=None, disable_parallel_tool_use=None)
    if choice.type == "none":
        return None
    if choice.type == "tool" and choice.name is None:
        raise InputError("tool_choice: name is missing, the tool to call")
    return chosen_tools(
        tools,
        card,
        named=(choice.name,) if choice.type == "tool" and choice.name is not None else (),
        is_required=choice.type in ("any", "tool"),
        is_parallel=False if choice.disable_parallel_tool_use or choice.type == "tool" else None,
    )


def _turns(message: schema.InputTurn, path: str, names: dict[str, str]) -> list[ChatTurn]:
    """The turns of one message: the results of tools are turns of their own, before the user's words."""
    if isinstance(message.content, str):
        return [checked_turn(ChatTurn(message.role, message.content), path)]
    turns: list[ChatTurn] = []
    images: list[ShownImage] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(message.content):
        if isinstance(block, schema.VideoBlock):
            raise no_videos(f"{path}.content[{index}]", "Anthropic")
        if isinstance(block, schema.ImageBlock):
            images.append(_shown(block, path))
        elif isinstance(block, schema.ToolUseBlock):
            calls.append(ToolCall(block.name, json.dumps(block.input, ensure_ascii=False), block.id))
            names[block.id] = block.name
        elif isinstance(block, schema.ToolResultBlock):
            turns.append(_result(block, path, names))
            shown = block.content if isinstance(block.content, list) else []
            images += [_shown(part, path) for part in shown if isinstance(part, schema.ImageBlock)]
    if images and message.role != "user":
        raise InputError(f"{path}: only the user shows images")
    if calls and message.role != "assistant":
        raise InputError(f"{path}: only the assistant calls tools")
    if turns and message.role != "user":
        raise InputError(f"{path}: results of tools are the user's")
    text = _text(message.content)
    if turns and not (text.strip() or images):
        return turns
    return [*turns, checked_turn(ChatTurn(message.role, text, tuple(images), tuple(calls)), path)]


def _result(block: schema.ToolResultBlock, path: str, names: dict[str, str]) -> ChatTurn:
    name = names.get(block.tool_use_id)
    if name is None:
        raise InputError(f"{path}: there is no call {block.tool_use_id[:80]!r} before its result")
    text = block.content if isinstance(block.content, str) else _text(block.content or ())
    text = f"Error: {text}" if block.is_error else text
    return checked_turn(ChatTurn("tool", text, call_id=block.tool_use_id, name=name), path)


def _text(blocks: Sequence[object]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, schema.TextBlock))


def _shown(block: schema.ImageBlock, path: str) -> ShownImage:
    source = block.source
    if isinstance(source, schema.UrlSource):
        return ShownImage(source.url)
    if source.media_type.startswith("video/") or is_base64_video(source.data):
        raise no_videos(f"{path}: the image in base64", "Anthropic")
    return ShownImage(f"data:{source.media_type};base64,{source.data}")
