"""A conversation template as the Jinja text that other programs render prompts with.

In: the name of a template and what stands for one image. Out: Jinja whose result for a list of messages is, to the
character, what `Conversation.get_prompt` gives for the same turns. A message's content is a string, or a list of parts of
type `image` and `text`; images stand first, each on a line of its own.
"""

from __future__ import annotations

import json
import re

from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.errors import InputError

_HEAD = """\
{%- set first = messages[0] if messages else none -%}
{%- if first and first['role'] == 'system' -%}
{%- set turns = messages[1:] -%}
{%- if first['content'] is string -%}
{%- set said = first['content'] -%}
{%- else -%}
{%- set said = first['content'][0]['text'] -%}
{%- endif -%}
{%- set system = SYSTEM_OF_SAID -%}
{%- else -%}
{%- set turns = messages -%}
{%- set system = SYSTEM -%}
{%- endif -%}
{{- OPENING -}}
{%- for message in turns -%}
{{- BEFORE -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] != 'text' -%}{{- PLACEHOLDER -}}{%- endif -%}
{%- endfor -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'text' -%}{{- content['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- AFTER -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ASKING -}}{%- endif -%}
"""


def chat_template(conv_mode: str, image_placeholder: str) -> str:
    """The Jinja text of a template; `image_placeholder` is what stands for one image, usually `<image>`."""
    conv = get_template(conv_mode)
    if "mmtag" in conv.version:
        raise InputError(
            f"the template {conv_mode!r} answers an image before the question, which a chat template cannot express"
        )
    parts = {
        **_PARTS[conv.sep_style](conv),
        "PLACEHOLDER": _text(image_placeholder + "\n"),
        "SYSTEM": _text(conv.system),
    }
    return re.sub(r"\b[A-Z_]{4,}\b", lambda match: parts[match[0]], _HEAD)


def _text(value: str) -> str:
    return json.dumps(value)


def _by_role(conv: Conversation, question: str, answer: str) -> str:
    return f"({_text(question)} if message['role'] == 'user' else {_text(answer)})"


def _named(conv: Conversation) -> dict[str, str]:
    """SINGLE and TWO: `USER: question sep ASSISTANT: answer sep2`."""
    end = conv.sep if conv.sep_style == SeparatorStyle.SINGLE else conv.sep2 or ""
    opening = "".join(span.text for span in conv.spans()).removeprefix(conv.system)
    return {
        "SYSTEM_OF_SAID": "said",
        "OPENING": f"system + {_text(opening)}",  # with the turns that the template brings along
        "BEFORE": _by_role(conv, f"{conv.roles[0]}: ", f"{conv.roles[1]}: "),
        "AFTER": _by_role(conv, conv.sep, end),
        "ASKING": _text(f"{conv.roles[1]}:"),
    }


def _mpt(conv: Conversation) -> dict[str, str]:
    return {
        "SYSTEM_OF_SAID": _text("<|im_start|>system\n") + " + said",
        "OPENING": f"system + {_text(conv.sep)}",
        "BEFORE": _by_role(conv, *conv.roles),
        "AFTER": _text(conv.sep),
        "ASKING": _text(conv.roles[1]),
    }


def _chatml(conv: Conversation) -> dict[str, str]:
    return {
        "SYSTEM_OF_SAID": _text("<|im_start|>system\n") + " + said",
        "OPENING": f"(system + {_text(conv.sep + chr(10))} if system else '')",
        "BEFORE": _by_role(conv, f"{conv.roles[0]}\n", f"{conv.roles[1]}\n"),
        "AFTER": _text(conv.sep + "\n"),
        "ASKING": _text(f"{conv.roles[1]}\n"),
    }


def _llama_2(conv: Conversation) -> dict[str, str]:
    opening = f"({_text('<<SYS>>' + chr(10))} + system + {_text(chr(10) + '<</SYS>>' + chr(10) * 2)} if system else '')"
    question = f"({_text('[INST] ')} + {opening} if loop.first else {_text(conv.sep + '[INST] ')})"
    return {
        "SYSTEM_OF_SAID": "said",
        "OPENING": "''",
        "BEFORE": f"({question} if message['role'] == 'user' else ' ')",
        "AFTER": _by_role(conv, " [/INST]", f" {conv.sep2 or ''}"),
        "ASKING": "''",
    }


def _plain(conv: Conversation) -> dict[str, str]:
    return {
        "SYSTEM_OF_SAID": "said",
        "OPENING": "system",
        "BEFORE": "''",
        "AFTER": _by_role(conv, conv.sep, conv.sep if conv.sep2 is None else conv.sep2),
        "ASKING": "''",
    }


_PARTS = {
    SeparatorStyle.SINGLE: _named,
    SeparatorStyle.TWO: _named,
    SeparatorStyle.MPT: _mpt,
    SeparatorStyle.PLAIN: _plain,
    SeparatorStyle.LLAMA_2: _llama_2,
    SeparatorStyle.CHATML: _chatml,
}
