"""Read the turns of a sample in any of the spellings that data sets use.

In: `[{"from", "value"}]`, `[{"role", "content": text or parts}]`, `[{"user", "assistant"}]` or pairs of texts. Out: `Turns`:
LLaVA's own `[{"from": "human" | "gpt" | "system", "value"}]` with one placeholder for each image or video, those that stood
in the turns, and what was not read. A turn that is not to be trained has `"loss": False`. Forms of whole records are in
formats.py; labels are made in text/labels.py, which refuses unknown speakers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.fields import Fields, parse_json
from llava.data.media import MediaSource, read_media, read_videos
from llava.errors import InputError, shortened

Turn = dict[str, object]

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
# What speakers are called; a name that is not here is kept, and refused where labels are made.
SPEAKERS = {
    "human": HUMAN, "user": HUMAN, "question": HUMAN, "instruction": HUMAN,
    "gpt": GPT, "assistant": GPT, "model": GPT, "bot": GPT, "chatgpt": GPT, "answer": GPT,
    "system": SYSTEM, "developer": SYSTEM,
    "function_call": "call", "function-call": "call", "tool_call": "call",
    "observation": "result", "tool": "result", "function": "result", "tool_response": "result", "function_response": "result",
}  # fmt: skip
VIDEO_TOKEN = "<video>"
# How calls of tools and their results are written, by servers too (serve/tools.py).
_CALL, _RESULT = ("<tool_call>", "</tool_call>"), ("<tool_response>", "</tool_response>")
JOINED = "questions that follow each other are joined"


@dataclass
class Turns:
    """Turns read so far."""

    turns: list[Turn] = field(default_factory=list)
    media: list[MediaSource] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, speaker: str, text: str, *, is_trained: bool = True) -> None:
        """Append a turn; a question or a result of a tool that follows another joins it."""
        name, text = _written(speaker, text)
        last = self.turns[-1] if self.turns else None
        if last is not None and name == HUMAN == last["from"]:
            last["value"] = f"{last['value']}\n{text}"
            self.notes.append(JOINED)
            return
        self.turns.append({"from": name, "value": text} | ({} if is_trained or name != GPT else {"loss": False}))

    def ask(self, question: str, answer: str) -> None:
        self.add(HUMAN, question)
        self.add(GPT, answer)

    def begin_with_system(self, text: str) -> None:
        """Put a system text that stands beside the turns before them."""
        if not text:
            return
        if self.turns and self.turns[0]["from"] == SYSTEM:
            if self.turns[0]["value"] != text:
                raise InputError("it has a system text both in its turns and beside them; use one of the two places")
            return
        self.turns.insert(0, {"from": SYSTEM, "value": text})

    def extend(self, value: object, what: str) -> None:
        """Read a list of turns; `what` is the field's name, for messages."""
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise InputError(f"{what!r} is not a list of turns, but {shortened(repr(value), 60)}")
        for number, turn in enumerate(value):
            self._read(turn, number)

    def _read(self, turn: object, number: int) -> None:
        if isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            self.ask(*turn)
            return
        if not isinstance(turn, Mapping):
            raise InputError(f"turn {number} is not an object with 'from' and 'value' (or 'role' and 'content')")
        fields = Fields(turn)
        if fields.has("user", "assistant"):
            if fields.has("system"):
                self.begin_with_system(fields.text("system"))
            self.ask(fields.text("user"), fields.text("assistant"))
        else:
            self._read_one(fields, number)
        self.notes += [f"the key {name!r} of turns is not read" for name in fields.unread()]

    def _read_one(self, fields: Fields, number: int) -> None:
        name = fields.first("from", "role", "speaker")
        if name is None:
            raise InputError(f"turn {number} does not say who speaks: it has neither 'from' nor 'role'")
        speaker = SPEAKERS.get(str(name).lower(), str(name))
        content = fields.given("value", "content", "text")
        calls = fields.parsed("tool_calls", "function_call")
        if content is None and calls is None:
            raise InputError(f"turn {number} has no text: it has neither 'value' nor 'content'")
        text, media = _content(content, number)
        thought = fields.text("reasoning_content", "reasoning", "thinking")
        if thought:
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        if calls is not None:
            text = "\n".join([text] * bool(text) + _calls(calls, number))
        self.media += media
        self.add(speaker, text, is_trained=_is_trained(fields, number))


def _written(speaker: str, text: str) -> tuple[str, str]:
    """Who says a text in a prompt: an assistant calls tools, and the user has their results."""
    if speaker not in ("call", "result"):
        return speaker, text
    begin, end = _CALL if speaker == "call" else _RESULT
    return GPT if speaker == "call" else HUMAN, text if begin in text else f"{begin}\n{text}\n{end}"


def _calls(calls: object, number: int) -> list[str]:
    """Write calls in OpenAI's form: objects with a function's name and arguments."""
    texts = []
    for call in calls if isinstance(calls, Sequence) and not isinstance(calls, str) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"turn {number} has a call of a tool without a name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = parse_json(arguments, "arguments")
        call = {"name": function["name"], "arguments": arguments}
        texts.append(f"{_CALL[0]}\n{json.dumps(call, ensure_ascii=False)}\n{_CALL[1]}")
    return texts


def _is_trained(fields: Fields, number: int) -> bool:
    """What the marks of a turn say: `loss`, `train` or `weight`, true or false, 1 or 0."""
    mark = fields.given("loss", "train", "weight", "loss_weight", "loss_scale")
    if mark is None or mark in (0, 1):
        return mark is None or bool(mark)
    raise InputError(f"turn {number} has the weight {shortened(repr(mark), 40)}; a turn is trained (1) or not (0)")


def _content(content: object, number: int) -> tuple[str, list[MediaSource]]:
    """A text, or parts of text, images and videos."""
    if content is None or isinstance(content, str):
        return content or "", []
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(f"the text of turn {number} is neither a text nor a list of parts")
    texts: list[str] = []
    media: list[MediaSource] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        reader = _PARTS.get(str(kind))
        if reader is None or not isinstance(part, Mapping):
            raise InputError(f"turn {number} has a part of type {kind!r}; known parts are {', '.join(_PARTS)}")
        text, found = reader(part, number)
        texts.append(text)
        media += found
    return "\n".join(texts), media


def _text_part(part: Mapping[str, object], number: int) -> tuple[str, list[MediaSource]]:
    text = part.get("text", part.get("content"))
    if not isinstance(text, str):
        raise InputError(f"turn {number} has a part of text without a text")
    return text, []


def _image_part(part: Mapping[str, object], number: int) -> tuple[str, list[MediaSource]]:
    value = next(
        (part[name] for name in ("image_url", "image", "url", "path", "base64", "data") if part.get(name)), None
    )
    # Without one it is one of the record's own images.
    return DEFAULT_IMAGE_TOKEN, [] if value is None else [*read_media(value, "image_url")]


def _video_part(part: Mapping[str, object], number: int) -> tuple[str, list[MediaSource]]:
    value = next((part[name] for name in ("video_url", "video", "url", "path") if part.get(name)), None)
    return VIDEO_TOKEN, [] if value is None else [*read_videos([value], "video_url")]


_PARTS: dict[str, Callable[[Mapping[str, object], int], tuple[str, list[MediaSource]]]] = {
    "text": _text_part,
    "image_url": _image_part,
    "image": _image_part,
    "video_url": _video_part,
    "video": _video_part,
}
