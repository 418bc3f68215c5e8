"""Tools that a model may call, in no protocol's form: how they are shown, what an answer is held to, and how calls are read.

In: tools and a choice among them, as each protocol parses them; then the text of an answer as it comes. Out: the description in
the prompt, a grammar where a call is required, and `AnswerChunk`s, which separate text and calls. A model whose chat template
shows tools is asked in that form (`ChatTemplate.tool_call_form`); another one by a description in the system text.
chat_turns.py puts calls and results of earlier turns into the prompt.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llava.chat_template import ToolCallForm
from llava.conversation import Conversation
from llava.engine.grammar import JSON_STYLE
from llava.engine.request import Chunk
from llava.errors import InputError
from llava.serve.json_schema import closed
from llava.text.detokenizer import overlap

MAX_TOOLS = 128
MAX_CALLS = 8  # of one answer that must call a tool
PLAIN_FORM = ToolCallForm()
JSON_FORM = ToolCallForm(opening="", closing="", between=None)  # an answer that is a call and nothing else
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class Tool:
    """A function that a client offers. `is_strict`: its arguments obey the schema even where the model chooses to call it."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    is_strict: bool = False

    def as_json(self) -> dict[str, object]:
        """In the form that chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """A call in an answer; `arguments` is a JSON object."""

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def given(self) -> tuple[str, Mapping[str, object]]:
        """Name and arguments as values; arguments that are no JSON object, as a cut answer has them, are wrapped."""
        try:
            values = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            values = {"arguments": self.arguments}
        return self.name, values if isinstance(values, dict) else {"arguments": values}


@dataclass(frozen=True)
class ToolUse:
    """Which tools an answer may call, and whether it must.

    Args:
        tools: Those that may be called, at least one.
        form: How the model writes a call.
        is_required: The answer is a call. Otherwise the model chooses.
        is_parallel: The answer may have several calls.
        is_json: The answer is the JSON of one call, held by `json_schema`; no grammar is needed.
    """

    tools: tuple[Tool, ...]
    form: ToolCallForm = PLAIN_FORM
    is_required: bool = False
    is_parallel: bool = True
    is_json: bool = False

    def __post_init__(self) -> None:
        if not 0 < len(self.tools) <= MAX_TOOLS:
            raise InputError(f"the request has {len(self.tools)} tools; give 1 to {MAX_TOOLS}")
        names = [tool.name for tool in self.tools]
        bad = next((name for name in names if not _NAME.fullmatch(name)), None)
        if bad is not None:
            raise InputError(f"the tool name {bad[:80]!r} is not 1 to 128 letters, digits and any of _ - . :")
        for tool in self.tools:
            if tool.parameters.get("type", "object") != "object":
                raise InputError(f"the parameters of the tool {tool.name!r} are no object; a call has named arguments")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"two tools are named {twice!r}; give each a name of its own")

    def without_grammar(self) -> ToolUse:
        """Return the same use for a model behind a server that holds answers to schemas, and to no grammar."""
        if self.is_required:
            return replace(self, form=JSON_FORM, is_parallel=False, is_json=True)
        if self.is_exact:
            raise InputError(
                "this worker passes requests on to another server, which takes no grammar: a tool cannot be strict where the "
                "model chooses whether to call; leave strict out, or ask for a call by tool_choice"
            )
        return self

    @property
    def only_tool(self) -> Tool | None:
        """The tool whose call begins in the prompt: the only one, where an answer must call."""
        return self.tools[0] if self.is_required and not self.is_json and len(self.tools) == 1 else None

    @property
    def beginning(self) -> str:
        """The text that an answer begins with, as part of the prompt: all that is certain of it."""
        if not self.is_required:
            return ""
        return self.form.opening + ("" if self.only_tool is None else _head(self.form, self.only_tool.name))

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        closing = self.form.closing.strip()
        return (closing,) if closing and not self.is_parallel and not self.is_required else ()

    @property
    def is_exact(self) -> bool:
        """Whether a grammar holds each call to its tool's schema."""
        return self.is_required or any(tool.is_strict for tool in self.tools)

    def description(self) -> str:
        """The tools in words, for the system text of a model whose template does not show them."""
        shown = [json.dumps(tool.as_json()["function"], ensure_ascii=False) for tool in self.tools]
        task = "Answer by a call of one of these functions." if self.is_required else "Call a function where it helps."
        example = self.form.opening + _head(self.form, "NAME") + '{"PARAMETER": VALUE}}' + self.form.closing
        return "\n".join(
            ["Functions, with their parameters as JSON schemas:", *shown, f"{task} A call is written", example]
        )

    def grammar(self, text_schema: str | Mapping[str, object] | None = None) -> str | None:
        """The grammar of the answer after `beginning`; None where it may be anything.

        Where the model chooses, an answer in words is JSON that `text_schema` allows, if one is given.
        """
        if self.is_json or (not self.is_exact and text_schema is None):
            return None
        rules = [f"call_{number}: {_quoted(_head(self.form, tool.name))} %json {_schema(tool)} {_quoted('}')}"
                 for number, tool in enumerate(self.tools)]  # fmt: skip
        one = f"({' | '.join(f'call_{number}' for number in range(len(self.tools)))})"
        between, closing = self.form.between, _quoted(self.form.closing)
        more = f"({_quoted(between)} {one}){{0,{MAX_CALLS - 1}}}" if self.is_parallel and between else ""
        if self.is_required:
            first = one if self.only_tool is None else f"%json {_schema(self.only_tool)} {_quoted('}') if more else ''}"
            rules.append(f"start: {first} {more} {closing if more else ''}")
        elif text_schema is not None:
            schema = json.loads(text_schema) if isinstance(text_schema, str) else text_schema
            words = f"%json {json.dumps(closed(schema) | {'x-guidance': JSON_STYLE})}"
            rules.append(f"start: {_quoted(self.form.opening)} {one} {more} {closing} | {words}")
        elif mark := self.form.opening.strip():
            rest = self.form.opening[self.form.opening.index(mark) + len(mark) :]
            rules += [
                "start: marked* TEXT",
                "TEXT: /(.|\\n)*/",
                f"until[lazy]: TEXT {_quoted(mark)}",
                f"marked: until {_quoted(rest)} {one} {more} {closing}",
            ]
        else:  # a call is the whole answer, and a text begins otherwise
            rules += [f"start: {one} {more} | TEXT", "TEXT: /[^{\\[ \\n](.|\\n)*/"]
        return "%llguidance {}\n" + "\n".join(rules) + "\n"

    def json_schema(self) -> dict[str, object]:
        """The schema of an answer that is the JSON of one call."""
        calls = [self._call_schema(number, tool) for number, tool in enumerate(self.tools)]
        arguments = {f"arguments_{number}": _rebased(_arguments_schema(tool), f"#/$defs/arguments_{number}")
                     for number, tool in enumerate(self.tools)}  # fmt: skip
        return ({"anyOf": calls} if len(calls) > 1 else calls[0]) | {"$defs": arguments}

    def _call_schema(self, number: int, tool: Tool) -> dict[str, object]:
        name, arguments = self.form.name_key, self.form.arguments_key
        fields = {name: {"const": tool.name}, arguments: {"$ref": f"#/$defs/arguments_{number}"}}
        return {"type": "object", "properties": fields, "required": [name, arguments], "additionalProperties": False}


def _head(form: ToolCallForm, name: str) -> str:
    """What stands before the arguments of a call."""
    return f'{{"{form.name_key}": {json.dumps(name, ensure_ascii=False)}, "{form.arguments_key}": '


def written_calls(form: ToolCallForm, calls: Sequence[ToolCall]) -> str:
    """Calls as a model writes them."""
    given = [call.given() for call in calls]
    bodies = [_head(form, name) + json.dumps(arguments, ensure_ascii=False) + "}" for name, arguments in given]
    return form.opening + (form.between or "\n").join(bodies) + form.closing


def form_of(template: Conversation) -> ToolCallForm:
    """How a model with this template writes calls."""
    own = None if template.chat_template is None else template.chat_template.tool_call_form
    return own or PLAIN_FORM


def _schema(tool: Tool) -> str:
    """The schema of a tool's arguments as a grammar takes it."""
    return json.dumps(_arguments_schema(tool) | {"x-guidance": JSON_STYLE | {"lenient": not tool.is_strict}})


def _arguments_schema(tool: Tool) -> dict[str, object]:
    """The schema of a tool's arguments, which are an object."""
    schema = closed(dict(tool.parameters))
    if not {"$ref", "anyOf", "oneOf", "allOf"} & set(schema):
        schema = {"type": "object", "properties": {}} | schema
    if schema.get("properties") == {}:
        schema.setdefault("additionalProperties", False)
    return dict(schema)


def _rebased(schema: Any, place: str) -> Any:
    """Return a schema whose references to itself hold where it stands at a place of another one."""
    if isinstance(schema, list):
        return [_rebased(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    rebased = {key: _rebased(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    return rebased | {"$ref": place + reference[1:]} if isinstance(reference, str) and reference[:1] == "#" else rebased


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


# Reading answers


@dataclass(frozen=True)
class CallDelta:
    """A part of a call: the first part has its name, further ones more of its arguments."""

    number: int  # of the call in its answer
    call_id: str
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class AnswerChunk(Chunk):
    """A chunk whose `text` is what stands beside calls."""

    calls: tuple[CallDelta, ...] = ()


def calls_of(chunks: Iterable[Chunk]) -> list[ToolCall]:
    """The calls of one answer, joined from their parts."""
    names: dict[str, str] = {}
    arguments: dict[str, str] = {}
    for chunk in chunks:
        for delta in chunk.calls if isinstance(chunk, AnswerChunk) else ():
            if delta.name is not None:
                names[delta.call_id] = delta.name
            arguments[delta.call_id] = arguments.get(delta.call_id, "") + delta.arguments
    return [ToolCall(name, arguments[call], call) for call, name in names.items()]


class ToolCallReader:
    """Separates the text and the calls of a request's answers, as their chunks come. One reader for all of its choices."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._answers: dict[int, _AnswerReader] = {}

    def read(self, chunk: Chunk) -> AnswerChunk:
        answer = self._answers.setdefault(chunk.index, _AnswerReader(self._use))
        text, calls = answer.read(chunk.text, is_end=chunk.finish_reason is not None)
        return AnswerChunk(**vars(chunk) | {"text": text, "calls": tuple(calls)})


_State = Callable[[list[CallDelta], bool], str]  # reads on, and returns text


class _AnswerReader:
    """One answer. What may be part of a call is held back until it is known; calls that a grammar holds come in parts."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._mark = use.form.opening.strip()
        self._names = {tool.name for tool in use.tools}
        self._held = ""
        self._is_first = True  # nothing but blank space has come
        self._state: _State = self._in_call if use.is_required else self._in_text
        self._opened = ""  # what has been taken of the text for a call that is not known yet
        self._number = 0
        self._call_id: str | None = None  # of a call whose arguments are coming
        self._end = _JsonEnd()
        self._read_to = 0  # of `_held`, by `_end`
        self._begun = use.only_tool  # whose call the prompt begins

    def read(self, text: str, *, is_end: bool) -> tuple[str, list[CallDelta]]:
        """Return the text that stands beside calls, and parts of calls."""
        self._held += text
        written, calls = "", list[CallDelta]()
        if self._begun is not None:
            self._call_id = ToolCall(self._begun.name, "").call_id
            calls.append(CallDelta(self._number, self._call_id, self._begun.name))
            self._begun = None
        before = None
        while before != (self._held, self._state):
            before = (self._held, self._state)
            written += self._state(calls, is_end)
        return written, calls

    def _in_text(self, calls: list[CallDelta], is_end: bool) -> str:
        if self._is_first and (begun := self._held.lstrip()):
            if self._mark.startswith(begun) and begun != self._mark and not is_end:
                return ""
            self._is_first = False
            if begun[0] in "{[" and not (self._mark and begun.startswith(self._mark)):  # maybe a call without its mark
                self._state, self._opened = self._in_call, self._held[: -len(begun)]
                self._held = begun
                return ""
        at = self._held.find(self._mark) if self._mark else -1
        if at >= 0:
            written, self._held = self._held[:at].rstrip(), self._held[at + len(self._mark) :]
            self._state, self._opened = self._in_call, self._mark
            return written
        keep = overlap(self._held, self._mark) if self._mark and not is_end else 0
        ready = self._held[: len(self._held) - keep]
        ready = ready if is_end else ready.rstrip()  # blank space before a call is not written
        self._held = self._held[len(ready) :]
        return ready

    def _in_call(self, calls: list[CallDelta], is_end: bool) -> str:
        if self._call_id is not None:
            return self._in_arguments(calls, is_end)
        if self._is_held_to_schema and (head := self._head()) is not None:
            name, length = head
            self._call_id = ToolCall(name, "").call_id
            calls.append(CallDelta(self._number, self._call_id, name))
            self._opened, self._held = "", self._held[length:]
            self._end, self._read_to = _JsonEnd(), 0
            return self._in_arguments(calls, is_end)
        blank = len(self._held) - len(self._held.lstrip(" \n\t[,"))
        end = self._end.find(self._held, max(self._read_to, blank))
        self._read_to = max(len(self._held), blank)
        if self._held[blank:] and self._held[blank] != "{":
            end = blank  # no object: it was a text that looks like a call
        if end is None and not is_end:
            return ""
        call = self._parsed(self._held[blank:end])
        if call is None:
            written = self._opened + self._held[: blank if end == blank else end]
            self._forget_call(len(self._held[: blank if end == blank else end]), self._in_text)
            return written
        calls.append(CallDelta(self._number, call.call_id, call.name, call.arguments))
        self._number += 1
        assert end is not None or is_end
        self._forget_call(len(self._held) if end is None else end, self._after_call)
        return ""

    def _forget_call(self, length: int, state: _State) -> None:
        self._held, self._state = self._held[length:], state
        self._opened, self._end, self._read_to = "", _JsonEnd(), 0

    def _in_arguments(self, calls: list[CallDelta], is_end: bool) -> str:
        assert self._call_id is not None
        end = self._end.find(self._held, 0)
        part = self._held[:end]
        if part:
            calls.append(CallDelta(self._number, self._call_id, None, part))
        self._held = self._held[len(part) :]
        if end is not None:
            self._call_id = None
            self._number += 1
            self._held = self._held.removeprefix("}")
            self._forget_call(0, self._after_call)
        return ""

    def _after_call(self, calls: list[CallDelta], is_end: bool) -> str:
        """Between calls, or after the last one: the marks there are no text."""
        rest = self._held.lstrip(" \n\t}],")
        for mark in (self._use.form.closing.strip(" \n\t}],"), self._mark):
            if mark and rest.startswith(mark):
                after = rest.removeprefix(mark)
                self._held, self._state = after, (self._in_call if mark == self._mark else self._after_call)
                self._opened = self._mark if mark == self._mark else ""
                return ""
            if mark and mark.startswith(rest):  # the beginning of a mark, or nothing yet
                self._held = "" if is_end else self._held
                return ""
        if rest.startswith("{"):
            self._held, self._state = rest, self._in_call
        elif rest or is_end:
            self._held, self._state = rest, self._in_text
        return ""

    @property
    def _is_held_to_schema(self) -> bool:
        """Whether the grammar holds what comes now, so that its parts may go out before its end is known."""
        return self._use.is_required or (self._use.is_exact and self._opened == self._mark)

    def _head(self) -> tuple[str, int] | None:
        """The name of a call that has begun, and how far its arguments are; None while that is not known."""
        for name in self._names:
            head = _head(self._use.form, name)
            at = self._held.find(head)
            if at >= 0 and not self._held[:at].strip(" \n\t[,"):
                return name, at + len(head)
        return None

    def _parsed(self, text: str) -> ToolCall | None:
        """The call that a JSON object is; None where it is none of the offered tools."""
        form = self._use.form
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        name = value.get(form.name_key, value.get("name"))
        arguments = value.get(form.arguments_key, value.get("arguments", value.get("parameters")))
        if isinstance(arguments, str):  # JSON within JSON, as the protocols have it
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments or {}, dict):
            return None
        return ToolCall(name, json.dumps(arguments or {}))


class _JsonEnd:
    """Finds the end of an object in text that comes in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False

    def find(self, text: str, start: int) -> int | None:
        """Read on from `start`; return the position behind the object's last brace, None where it has not come."""
        for at in range(start, len(text)):
            character = text[at]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None
