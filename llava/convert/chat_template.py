"""A conversation template as the Jinja chat template from which other programs render prompts.

In: the name of a template and the placeholder of one image. Out: Jinja text whose result for a list of messages equals
`Conversation.get_prompt` for the same turns, to the character. A message's content is a string, or a list of parts of type
`image` and `text`; images come first, each on a line of its own.
"""

from __future__ import annotations

import json
import re

from llava.chat_template import ChatTemplate
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.errors import InputError

# The content of a message as `body`: images become placeholders before the text.
_BODY_OF_MESSAGE = """\
{%- set body -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] != 'text' -%}{{- PLACEHOLDER_OF_CONTENT -}}{%- endif -%}
{%- endfor -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'text' -%}{{- content['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endset -%}
"""

_TEMPLATE = (
    """\
{%- set first = messages[0] if messages else none -%}
{%- if first and first['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- if first['content'] is string -%}
{%- set system_message = first['content'] -%}
{%- else -%}
{%- set system_message = first['content'][0]['text'] -%}
{%- endif -%}
{%- set system = SYSTEM_OF_MESSAGE -%}
{%- else -%}
{%- set turns = messages -%}
{%- set system = SYSTEM -%}
{%- endif -%}
{{- OPENING -}}
{%- for message in turns -%}
{{- PREFIX -}}
"""
    + _BODY_OF_MESSAGE
    + """\
{{- BODY -}}
{{- SUFFIX -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- GENERATION_PROMPT -}}{%- endif -%}
"""
)


def chat_template(conv_mode: str, image_placeholder: str, video_placeholder: str | None = None) -> str:
    """Build the Jinja text of a conversation template.

    `image_placeholder` stands for one image, and for a video too where that has no placeholder of its own.

    Raises:
        InputError: The template cannot be expressed as a chat template.
    """
    conv = get_template(conv_mode)
    if "mmtag" in conv.version:
        raise InputError(
            f"the template {conv_mode!r} answers an image before the question, which a chat template cannot express"
        )
    if conv.chat_template is not None:
        template = conv.chat_template
        return template.source if template.takes_images else _with_texts(template, image_placeholder + "\n")
    placeholder = _text(image_placeholder + "\n")
    if video_placeholder is not None:
        placeholder = f"({_text(video_placeholder + chr(10))} if content['type'] == 'video' else {placeholder})"
    parts = {
        "SYSTEM_OF_MESSAGE": "system_message",  # of most styles, as the next
        "GENERATION_PROMPT": "''",
        **_PARTS[conv.sep_style](conv),
        "BODY": "body | trim" if conv.sep_style == SeparatorStyle.LLAMA_3 else "body",
        "PLACEHOLDER_OF_CONTENT": placeholder,
        "SYSTEM": _text(conv.system),
    }
    return re.sub(r"\b[A-Z_]{4,}\b", lambda match: parts[match[0]], _TEMPLATE)


# Before a chat template that takes texts: images become placeholders, each on a line of its own before the text.
_TEXTS = (
    """\
{%- set given = namespace(messages=[]) -%}
{%- for message in messages -%}
"""
    + _BODY_OF_MESSAGE
    + """\
{%- set given.messages = given.messages + [dict(message, content=CONTENT)] -%}
{%- endfor -%}
{%- set messages = given.messages -%}
"""
)


def _with_texts(template: ChatTemplate, placeholder: str) -> str:
    """The source of a chat template that takes texts, for messages whose contents have images as parts."""
    content = "[{'type': 'text', 'text': body | string}]" if template.takes_parts else "body | string"
    return _TEXTS.replace("PLACEHOLDER_OF_CONTENT", _text(placeholder)).replace("CONTENT", content) + template.source


_text = json.dumps  # a string in Jinja


def _by_role(question: str, answer: str) -> str:
    return f"({_text(question)} if message['role'] == 'user' else {_text(answer)})"


def _named(conv: Conversation) -> dict[str, str]:
    """SINGLE and TWO: `USER: question sep ASSISTANT: answer sep2`."""
    end = conv.sep if conv.sep_style == SeparatorStyle.SINGLE else conv.sep2 or ""
    opening = "".join(span.text for span in conv.spans()).removeprefix(conv.system)
    return {
        "OPENING": f"system + {_text(opening)}",  # with the turns that the template brings along
        "PREFIX": _by_role(f"{conv.roles[0]}: ", f"{conv.roles[1]}: "),
        "SUFFIX": _by_role(conv.sep, end),
        "GENERATION_PROMPT": _text(f"{conv.roles[1]}:"),
    }


def _mpt(conv: Conversation) -> dict[str, str]:
    return {
        "SYSTEM_OF_MESSAGE": _text(conv.system_markup) + " + system_message",
        "OPENING": f"(system + {_text(conv.sep)} if system else '')",
        "PREFIX": _by_role(*conv.roles),
        "SUFFIX": _text(conv.sep),
        "GENERATION_PROMPT": _text(conv.roles[1]),
    }


def _chatml(conv: Conversation) -> dict[str, str]:
    return {
        "SYSTEM_OF_MESSAGE": _text(conv.system_markup) + " + system_message",
        "OPENING": f"(system + {_text(conv.sep + chr(10))} if system else '')",
        "PREFIX": _by_role(f"{conv.roles[0]}\n", f"{conv.roles[1]}\n"),
        "SUFFIX": _text(conv.sep + "\n"),
        "GENERATION_PROMPT": _text(f"{conv.roles[1]}\n"),
    }


def _llama_3(conv: Conversation) -> dict[str, str]:
    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return {
        "OPENING": f"({_text(head('system'))} + system + {_text(conv.sep)} if system else '')",
        "PREFIX": _by_role(*map(head, conv.roles)),
        "SUFFIX": _text(conv.sep),
        "GENERATION_PROMPT": _text(head(conv.roles[1])),
    }


def _gemma(conv: Conversation) -> dict[str, str]:
    question = f"{_text(conv.roles[0])} + (system + {_text(chr(10) * 2)} if system and loop.first else '')"
    return {
        "OPENING": "''",
        "PREFIX": f"({question} if message['role'] == 'user' else {_text(conv.roles[1])})",
        "SUFFIX": _text(conv.sep),
        "GENERATION_PROMPT": _text(conv.roles[1]),
    }


def _llama_2(conv: Conversation) -> dict[str, str]:
    opening = f"({_text('<<SYS>>' + chr(10))} + system + {_text(chr(10) + '<</SYS>>' + chr(10) * 2)} if system else '')"
    question = f"({_text('[INST] ')} + {opening} if loop.first else {_text(conv.sep + '[INST] ')})"
    return {
        "OPENING": "''",
        "PREFIX": f"({question} if message['role'] == 'user' else ' ')",
        "SUFFIX": _by_role(" [/INST]", f" {conv.sep2 or ''}"),
    }


def _plain(conv: Conversation) -> dict[str, str]:
    return {
        "OPENING": "system",
        "PREFIX": "''",
        "SUFFIX": _by_role(conv.sep, conv.sep if conv.sep2 is None else conv.sep2),
    }


_PARTS = {
    SeparatorStyle.SINGLE: _named,
    SeparatorStyle.TWO: _named,
    SeparatorStyle.MPT: _mpt,
    SeparatorStyle.PLAIN: _plain,
    SeparatorStyle.LLAMA_2: _llama_2,
    SeparatorStyle.CHATML: _chatml,
    SeparatorStyle.LLAMA_3: _llama_3,
    SeparatorStyle.GEMMA: _gemma,
}
