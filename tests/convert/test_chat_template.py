"""The chat template that conversion writes renders the prompts of conversation.py, to the character."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava.conversation import Conversation, conv_templates
from llava.convert.chat_template import chat_template
from llava.errors import InputError

NAMES = [name for name, conv in conv_templates.items() if "mmtag" not in conv.version]
QUESTION, ANSWER = 'What\'s "this"?  {{ x }}\n{% y %}', "  Two {red} circles – ■.\n\n"


def ours(conv: Conversation, turns: list[tuple[int, str, str | None]]) -> str:
    for num_images, question, answer in turns:
        conv.append_message(conv.roles[0], "<image>\n" * num_images + question)
        conv.append_message(conv.roles[1], answer)
    return conv.get_prompt()


def messages(turns: list[tuple[int, str, str | None]], system: str | None, as_parts: bool) -> list[dict[str, Any]]:
    def content(num_images: int, text: str) -> Any:
        if not as_parts:
            return "<image>\n" * num_images + text
        # Images may stand behind the text: the prompt has them in front all the same.
        return [{"type": "text", "text": text}, *({"type": "image"} for _ in range(num_images))]

    result = [] if system is None else [{"role": "system", "content": content(0, system)}]
    for num_images, question, answer in turns:
        result.append({"role": "user", "content": content(num_images, question)})
        if answer is not None:
            result.append({"role": "assistant", "content": content(0, answer)})
    return result


DIALOGUES: dict[str, list[tuple[int, str, str | None]]] = {
    "one question": [(1, QUESTION, None)],
    "no image": [(0, QUESTION, None)],
    "two images": [(2, QUESTION, None)],
    "a third question": [(1, QUESTION, ANSWER), (0, "and?", "nothing"), (1, "now?", None)],
    "finished": [(1, QUESTION, ANSWER), (0, "and?", "nothing")],
}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_equal_to_the_character(name: str) -> None:
    template = chat_template(name, "<image>")
    for turns, system, as_parts in itertools.product(DIALOGUES.values(), (None, "Be brief."), (False, True)):
        conv = conv_templates[name].copy()
        asking = turns[-1][2] is None
        expected = ours(conv if system is None else conv.with_system(system), turns)
        rendered, _ = render_jinja_template(
            conversations=[messages(turns, system, as_parts)], chat_template=template, add_generation_prompt=asking
        )
        assert rendered == [expected]


def test_tokens_around_images() -> None:
    rendered, _ = render_jinja_template(
        conversations=[messages([(1, "what?", None)], None, True)],
        chat_template=chat_template("llava_v1", "<im_start><image><im_end>"),
        add_generation_prompt=True,
    )
    assert rendered[0].endswith(" USER: <im_start><image><im_end>\nwhat? ASSISTANT:")


def test_a_template_that_answers_images_first() -> None:
    with pytest.raises(InputError, match="v1_mmtag"):
        chat_template("v1_mmtag", "<image>")
