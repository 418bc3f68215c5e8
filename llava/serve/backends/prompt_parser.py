"""Parse a rendered prompt back into its turns.

In: a prompt as the original's clients render it, and the template. Out: the same conversation, turn by turn, for servers that
render prompts themselves. A prompt that does not render to itself again is refused.
"""

from __future__ import annotations

import re

from llava.conversation import Conversation, SeparatorStyle
from llava.errors import InputError

_LLAMA_2_SYSTEM = re.compile(r"<<SYS>>\n(.*?)\n<</SYS>>\n\n", re.DOTALL)


def parse_prompt(prompt: str, template: Conversation) -> Conversation:
    """The conversation that renders to `prompt` in this template; its last answer may be open."""
    take_apart = _llama_2 if template.sep_style == SeparatorStyle.LLAMA_2 else _by_heads
    found = take_apart(prompt, template)
    # The separator that ends a prompt on its way is not always there.
    if found is None or found.get_prompt().rstrip() != prompt.rstrip():
        raise InputError(
            f"the prompt is not one of the template {template.version!r}, so it cannot be taken apart for the server that "
            "answers; start this worker with the --conv-mode that its clients use"
        )
    return found


def _by_heads(prompt: str, template: Conversation) -> Conversation | None:
    """Where every turn begins with its role's name."""
    user, assistant = template.roles
    if user == assistant:
        return None
    named = template.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO)
    heads = (f"{user}:", f"{assistant}:") if named else template.roles
    if template.sep_style == SeparatorStyle.LLAMA_3:
        heads = (_llama_3_head(user), _llama_3_head(assistant))
    separators = (template.sep, template.sep2 if template.sep_style == SeparatorStyle.TWO else template.sep)
    system, *texts = _split_in_turns(prompt, heads)
    if not texts:
        return None
    conversation = template.copy()
    conversation.messages, conversation.offset = [], 0
    conversation.system = _without_end(system.removesuffix("\n"), template.sep).removeprefix(_llama_3_head("system"))
    for number, text in enumerate(texts):
        text = text.removeprefix(" " if named else "\n" if template.sep_style == SeparatorStyle.CHATML else "")
        is_open = number == len(texts) - 1 and number % 2 == 1 and not text.strip()
        text = text.removesuffix("\n") if template.sep_style == SeparatorStyle.CHATML else text
        ended = None if is_open else _without_end(text, separators[number % 2] or "")
        conversation.append_message(template.roles[number % 2], ended)
    return conversation


def _llama_3_head(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _split_in_turns(prompt: str, heads: tuple[str, str]) -> list[str]:
    """The text before the first head, and the text after each; heads of the two roles must take turns."""
    parts: list[str] = []
    rest, number = prompt, 0
    while True:
        before, head, after = rest.partition(heads[number % 2])
        if not head:
            return [*parts, rest]
        parts.append(before)
        rest, number = after, number + 1


def _without_end(text: str, end: str) -> str:
    return text.removesuffix(end) if end else text


def _llama_2(prompt: str, template: Conversation) -> Conversation | None:
    conversation = template.copy()
    conversation.messages, conversation.offset, conversation.system = [], 0, ""
    for number, part in enumerate(prompt.split("[INST] ")[1:]):
        question, closed, answer = part.partition(" [/INST]")
        if not closed:
            return None
        if number == 0 and (system := _LLAMA_2_SYSTEM.match(question)):
            conversation.system, question = system[1], question[system.end() :]
        conversation.append_message(template.roles[0], question)
        answer = _without_end(answer, template.sep).removeprefix(" ")
        text = _without_end(answer, f" {template.sep2 or ''}") if answer else None
        conversation.append_message(template.roles[1], text)
    return conversation
