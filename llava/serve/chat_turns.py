"""What a client asks, in no protocol's form: turns of a chat with their images, rendered in the model's template.

In: turns, as each protocol parses them, and the `ModelCard`. Out: a `ParsedRequest`, which answers.py submits. Used by
serve/openai/, serve/ollama/ and serve/anthropic/. Pure functions: no HTTP, no model.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from llava.chat_template import ChatTemplate, TemplateMessage, ToolCallForm, call_id
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, answer_end, with_image_placeholders
from llava.engine.request import Detail, SamplingParams
from llava.errors import InputError
from llava.images.frames import looks_like_video
from llava.serve.backends.base import ModelCard
from llava.serve.http.limits import VideoUrl
from llava.serve.tools import PLAIN_FORM, ToolCall, ToolUse, written_calls

_CUT = "\ue002"  # a private character that ends a beginning


@dataclass(frozen=True)
class ShownImage:
    """An image that a turn shows: a data:, http(s): or file: URL, and how closely the model looks at it."""

    url: str
    detail: Detail = "auto"


def is_base64_video(text: str) -> bool:
    """Whether base64, with or without the head of a data: URL, begins like a video."""
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return looks_like_video(base64.b64decode(body[:1024] + "=" * (-len(body[:1024]) % 4)))
    except ValueError:  # what is wrong with it is said where it is decoded
        return False


def no_videos(path: str, api: str) -> InputError:
    """The error for a video in a protocol that has none."""
    return InputError(
        f"{path} is a video, and {api}'s API has none; send it to /v1/chat/completions, as a video_url part of a message"
    )


@dataclass(frozen=True)
class ChatTurn:
    """One message of a chat: of the system, the user, the assistant or a tool. `images` may be videos too.

    An assistant's turn may have `calls` of tools; a tool's result has the `call_id` and the name of its call.
    """

    role: str
    text: str
    images: tuple[ShownImage | VideoUrl, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class ParsedRequest:
    """Prompts, one request to the engine for each, their images, how tokens are sampled, and which tools may be called."""

    prompts: tuple[Conversation | str | Sequence[int], ...]
    images: tuple[ShownImage | VideoUrl, ...]
    sampling: SamplingParams
    tools: ToolUse | None = None


def sources_of(images: Sequence[ShownImage | VideoUrl]) -> list[str | VideoUrl]:
    """What is opened for images and videos."""
    return [image.url if isinstance(image, ShownImage) else image for image in images]


def details_of(images: Sequence[ShownImage | VideoUrl]) -> list[Detail]:
    """How closely the model looks at images and videos."""
    return [image.detail if isinstance(image, ShownImage) else "auto" for image in images]


def checked_turn(turn: ChatTurn, path: str) -> ChatTurn:
    """Return the turn, or raise `InputError` where it is empty or shows an image by a role other than the user."""
    if turn.role != "user" and DEFAULT_IMAGE_TOKEN in turn.text:
        raise InputError(f"{path}: {DEFAULT_IMAGE_TOKEN} stands for an image, and only the user shows images")
    if turn.role == "user" and not turn.text.strip() and not turn.images:
        raise InputError(f"{path}: the content is empty; ask something or show an image")
    return turn


def parsed_chat(
    turns: Sequence[ChatTurn],
    card: ModelCard,
    sampling: SamplingParams,
    *,
    tools: ToolUse | None = None,
    continues: bool = True,
) -> ParsedRequest:
    """Return the request for the next turn of a chat.

    Args:
        turns: In any order of roles. System texts become one; a chat that the assistant begins gets a blank question before.
        card: The model.
        sampling: How tokens are chosen, before tools.
        tools: What the answer may call.
        continues: Where the last turn is the assistant's, the answer continues it; else it is another turn.
    """
    if not turns:
        raise InputError("there is no question: messages needs one with the role user")
    *before, last = turns
    images = tuple(image for turn in turns for image in turn.images)
    beginning = ""
    if last.role == "assistant" and continues and not last.calls:
        turns, beginning = before, last.text
        sampling = replace(sampling, keep_space=bool(beginning))
    if tools is not None:
        if not card.takes_grammar:
            tools = tools.without_grammar()
        beginning += tools.beginning
        grammar = tools.grammar(sampling.json_schema)
        if (grammar is not None or tools.is_json) and sampling.regex is not None:
            raise InputError("a call of a tool obeys its schema, so there is no regex beside it; leave one of them out")
        if grammar is not None:
            sampling = replace(sampling, json_schema=None, grammar=grammar)
        elif tools.is_json:
            sampling = replace(sampling, json_schema=tools.json_schema())
        sampling = replace(sampling, stop=(*sampling.stop, *tools.stop))
    own = card.template.chat_template
    with_calls = tools is not None or any(turn.calls or turn.role == "tool" for turn in turns)
    if with_calls and own is not None and own.tool_call_form is not None:
        prompt: Conversation | str = _tool_prompt(turns, card, own, own.tool_call_form, tools) + beginning
    else:
        description = ChatTurn("system", tools.description()) if tools is not None else None
        conversation = as_conversation([*turns, *([description] if description else [])], card)
        prompt = begun(conversation, beginning) if beginning else conversation
    if isinstance(prompt, str) and not sampling.ignore_eos:
        sampling = replace(sampling, stop=(*sampling.stop, answer_end(card.template)))
    return ParsedRequest((prompt,), images, sampling, tools)


def as_conversation(turns: Sequence[ChatTurn], card: ModelCard) -> Conversation:
    """Render turns in the model's template, with the next answer open.

    Images come before the text of their turn, as in training, unless it has placeholders. Consecutive turns of one role
    become one. Calls of tools are written out, and a result is the user's.
    """
    system = [turn.text for turn in turns if turn.role == "system"]
    conversation = card.template.with_system("\n".join(system)) if system else card.template.copy()
    spoken = _spoken(turns)
    for is_answer, run in groupby(spoken, key=lambda turn: turn.role == "assistant"):
        texts = [_as_text(turn, card) for turn in run]
        conversation.append_message(conversation.roles[is_answer], "\n".join(texts))
    conversation.append_message(conversation.roles[1], None)
    return conversation


def begun(conversation: Conversation, beginning: str) -> str:
    """Render a conversation whose open answer begins with a text; the model writes what follows."""
    filled = conversation.copy()
    filled.messages[-1][1] = beginning + _CUT
    prompt, found, _ = filled.get_prompt().partition(_CUT)
    if not found or (beginning.strip() and not prompt.rstrip().endswith(beginning.strip())):
        raise InputError(
            "this model's template does not let an answer begin with a given text; end with the user's message"
        )
    return prompt


def _spoken(turns: Sequence[ChatTurn]) -> list[ChatTurn]:
    """The turns of user, assistant and tools; the first is the user's, and the assistant's are one between others."""
    spoken: list[ChatTurn] = []
    for turn in turns:
        last = spoken[-1] if spoken else None
        if last is not None and turn.role == last.role == "assistant":
            text = "\n".join(text for text in (last.text, turn.text) if text)
            spoken[-1] = ChatTurn("assistant", text, calls=last.calls + turn.calls)
        elif turn.role != "system":
            spoken.append(turn)
    if not spoken:
        raise InputError("there is no question: messages needs one with the role user")
    if spoken[0].role == "assistant":
        spoken.insert(0, ChatTurn("user", " "))
    return spoken


def _as_text(turn: ChatTurn, card: ModelCard) -> str:
    if turn.role == "user":
        return with_image_placeholders(turn.text, len(turn.images), card.image_placeholder)
    if turn.role == "tool":
        return f"<tool_response>\n{turn.text}\n</tool_response>"
    if turn.calls:
        return "\n".join([*([turn.text] if turn.text else []), written_calls(PLAIN_FORM, turn.calls)])
    return turn.text


def _tool_prompt(
    turns: Sequence[ChatTurn], card: ModelCard, template: ChatTemplate, form: ToolCallForm, tools: ToolUse | None
) -> str:
    """Render turns by a chat template that knows tools."""
    messages: list[TemplateMessage] = []
    if system := [turn.text for turn in turns if turn.role == "system"]:
        messages.append({"role": "system", "content": "\n".join(system)})
    numbers: dict[str, str] = {}  # the ids of calls in the prompt, by the client's
    for turn in _spoken(turns):
        if turn.calls:
            messages.append(form.message(turn.text, [call.given() for call in turn.calls], len(numbers)))
            numbers |= {call.call_id: call_id(len(numbers) + at) for at, call in enumerate(turn.calls)}
        elif turn.role == "tool":
            own_id = numbers.get(turn.call_id) or call_id(max(0, len(numbers) - 1))
            messages.append({"role": "tool", "content": turn.text, "tool_call_id": own_id, "name": turn.name})
        else:
            messages.append({"role": turn.role, "content": _as_text(turn, card)})
    return template.tool_prompt(messages, [tool.as_json() for tool in tools.tools] if tools is not None else [])
