"""What a client asks, in no protocol's form: turns of a chat with their images, rendered in the model's template.

In: turns, as each protocol parses them, and the `ModelCard`. Out: a `ParsedRequest`, which answers.py submits. Used by
serve/openai/, serve/ollama/ and serve/anthropic/. Pure functions: no HTTP, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, with_image_placeholders
from llava.engine.request import Detail, SamplingParams
from llava.errors import InputError
from llava.serve.backends.base import ModelCard


@dataclass(frozen=True)
class ShownImage:
    """An image that a turn shows: a data:, http(s): or file: URL, and how closely the model looks at it."""

    url: str
    detail: Detail = "auto"


@dataclass(frozen=True)
class ChatTurn:
    """One message of a chat."""

    role: str
    text: str
    images: tuple[ShownImage, ...] = ()


@dataclass(frozen=True)
class ParsedRequest:
    """Prompts, one request to the engine for each, their images, and how tokens are sampled."""

    prompts: tuple[Conversation | str, ...]
    images: tuple[ShownImage, ...]
    sampling: SamplingParams


def checked_turn(turn: ChatTurn, path: str) -> ChatTurn:
    """Return the turn, or raise `InputError` where it is empty or shows an image by a role other than the user."""
    if turn.role != "user" and DEFAULT_IMAGE_TOKEN in turn.text:
        raise InputError(f"{path}: {DEFAULT_IMAGE_TOKEN} stands for an image, and only the user shows images")
    if turn.role == "user" and not turn.text.strip() and not turn.images:
        raise InputError(f"{path}: the content is empty; ask something or show an image")
    return turn


def as_conversation(turns: Sequence[ChatTurn], card: ModelCard) -> Conversation:
    """Render turns in the model's template.

    Images come before the text of their turn, as in training, unless it has placeholders. Consecutive turns of one role
    become one.
    """
    system = [turn.text for turn in turns if turn.role == "system"]
    spoken = turns[len(system) :]
    if any(turn.role == "system" for turn in spoken):
        raise InputError("system messages come before all others")
    if not spoken:
        raise InputError("there is no question: messages needs one with the role user")
    if spoken[0].role != "user":
        raise InputError("the first message after the system's must be the user's")
    if spoken[-1].role != "user":
        raise InputError("the last message must be the user's: the next one is the model's answer")
    conversation = card.template.with_system("\n".join(system)) if system else card.template.copy()
    for role, run in groupby(spoken, key=lambda turn: turn.role):
        texts = [
            with_image_placeholders(turn.text, len(turn.images), card.image_placeholder)
            if role == "user"
            else turn.text
            for turn in run
        ]
        conversation.append_message(conversation.roles[role == "assistant"], "\n".join(texts))
    conversation.append_message(conversation.roles[1], None)
    return conversation
