"""The chat template (Jinja) that a model folder brings: found, read within bounds, and rendered in a sandbox.

In: a folder, or one of its files; messages ({"role": ..., "content": ...}). Out: the prompt that transformers' own
`apply_chat_template` renders for them. A template is a program of unknown origin: it cannot import or open anything, and
its own size, its loops and what it writes are limited. conversation.py makes conversations of these templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.files import read_json

if TYPE_CHECKING:
    from jinja2 import Template

# The files that may hold a chat template, the one that transformers prefers first.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
MAX_TEMPLATE_CHARS = 2**18
MAX_FILE_BYTES = 2**25  # of a file that holds a template among other things
MAX_RENDERED_CHARS = 2**23
MAX_NUMBER = 9999  # of repetitions, widths and counts in one step of a template
_WIDE_FORMAT = re.compile(r"[%{][^%{}]*\d{5,}")  # in a format string
# What the tokenizer classes of LLaMA add where the files name no special tokens.
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_PLACEHOLDER = re.compile(rf"(?:{DEFAULT_IM_START_TOKEN})?{DEFAULT_IMAGE_TOKEN}(?:{DEFAULT_IM_END_TOKEN})?")

TemplateMessage = dict[str, object]  # {"role": ..., "content": a text, or a list of parts}
_TRIED_TOOL = {
    "type": "function",
    "function": {
        "name": "one_name",
        "description": "one_text",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}


@dataclass(frozen=True)
class ToolCallForm:
    """How an answer calls tools: `opening`, a JSON object with a name and arguments, `closing`.

    Further calls follow after `between`. `arguments_as_text` says that a template takes arguments as a text of JSON.
    """

    opening: str = "<tool_call>\n"
    closing: str = "\n</tool_call>"
    between: str | None = "\n</tool_call>\n<tool_call>\n"  # None: one call in an answer
    name_key: str = "name"
    arguments_key: str = "arguments"
    arguments_as_text: bool = False

    def message(self, text: str, calls: Sequence[tuple[str, Mapping[str, object]]], number: int) -> TemplateMessage:
        """An assistant's message with calls (name, arguments), of which the first is the `number`th of the conversation."""

        def arguments(given: Mapping[str, object]) -> object:
            return json.dumps(given, ensure_ascii=False) if self.arguments_as_text else given

        named = [
            {"id": call_id(number + at), "type": "function", "function": {"name": name, "arguments": arguments(given)}}
            for at, (name, given) in enumerate(calls)
        ]
        return {"role": "assistant", "content": text, "tool_calls": named}


def call_id(number: int) -> str:
    """The id of a call in a prompt; Mistral's templates want nine letters and digits."""
    return f"call{number:05d}"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may name. It is tried once when it is first rendered."""

    path: str  # the file that holds it
    source: str
    special_tokens: Mapping[str, str]

    def prompt(self, turns: Sequence[tuple[str, str]], *, system: str = "", is_open: bool) -> str:
        """Render turns (role, text), a text with `<image>` where images belong; `is_open` where an answer follows.

        Raises:
            InputError: The template refuses these turns, or cannot be rendered.
        """
        messages: list[TemplateMessage] = [{"role": role, "content": self._content(text)} for role, text in turns]
        if system:
            messages.insert(0, {"role": "system", "content": self._content(system)})
        text = self.render(messages, add_generation_prompt=is_open)
        if system.strip() not in text:
            raise InputError(
                f"the chat template in {self.path} leaves system text out; give none, or give --conv-mode the name of a "
                "template"
            )
        return self._with_placeholders(text, [turn for _, turn in turns])

    def tool_prompt(self, messages: Sequence[TemplateMessage], tools: Sequence[Mapping[str, object]]) -> str:
        """Render messages whose contents are texts with `<image>`, calls and results of tools, and these tools.

        Raises:
            InputError: The template refuses them, or cannot be rendered.
        """
        texts = [str(message["content"]) for message in messages]
        given = [message | {"content": self._content(text)} for message, text in zip(messages, texts, strict=True)]
        return self._with_placeholders(self.render(given, tools=tools, add_generation_prompt=True), texts)

    def _with_placeholders(self, text: str, turns: Sequence[str]) -> str:
        """Put `<image>`, in the form that the turns have it, in the place of the template's own image tokens."""
        if self._image_mark is not None:
            text = text.replace(self._image_mark, DEFAULT_IMAGE_TOKEN)
        forms = {found for turn in turns for found in _PLACEHOLDER.findall(turn)}
        return text.replace(DEFAULT_IMAGE_TOKEN, forms.pop()) if len(forms) == 1 and self.takes_images else text

    def render(
        self,
        messages: Sequence[TemplateMessage],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """Render messages as they are, with images in the template's own form."""
        try:
            parts, size = [], 0
            for part in _compile(self.source).generate(
                messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            ):  # fmt: skip
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise ValueError(f"it writes more than {MAX_RENDERED_CHARS} characters")
                parts.append(part)
        except Exception as error:  # it is a program, which may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"the chat template in {self.path} cannot render this conversation: {reason}; mend that file, or give "
                "--conv-mode the name of a template"
            ) from error
        return "".join(parts)

    @cached_property
    def turn_end(self) -> str:
        """The text that ends an answer: what follows it both at the end and before the next question, else eos_token."""
        asked, answered = ("user", "one"), ("assistant", "two")
        last = self.prompt([asked, answered], is_open=False).rpartition("two")[2]
        try:
            between = self.prompt([asked, answered, ("user", "three")], is_open=True).partition("two")[2]
        except InputError:  # of a template for one question
            between = last
        common = re.sub(r"<[^>]*$", "", _common_start(last, between))
        return common.strip() or self.special_tokens.get("eos_token", "") or "\n"

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes before an answer still to come."""
        asked = [("user", "one")]
        closed, opened = self.prompt(asked, is_open=False), self.prompt(asked, is_open=True)
        return opened[len(_common_start(closed, opened)) :] if len(opened) > len(closed) else ""

    @cached_property
    def tool_call_form(self) -> ToolCallForm | None:
        """How an answer calls tools in this template; None where it does not show tools, calls and results."""
        for as_text in (False, True):
            try:
                if (form := self._try_tools(ToolCallForm(arguments_as_text=as_text))) is not None:
                    return form
            except InputError:
                continue
        return None

    def _try_tools(self, form: ToolCallForm) -> ToolCallForm | None:
        tried = ("one_name", {"key": "value"})
        asked: TemplateMessage = {"role": "user", "content": self._content("one")}
        result: TemplateMessage = {"role": "tool", "name": "one_name", "tool_call_id": call_id(0)}
        call = form.message("", [tried], 0)
        opened = self.render([asked], tools=[_TRIED_TOOL], add_generation_prompt=True)
        answered = self.render([asked, call], tools=[_TRIED_TOOL], add_generation_prompt=False)
        given = [asked, call, result | {"content": self._content("one_result")}]
        found = _find_call(answered, len(_common_start(opened, answered)))
        if "one_text" not in opened or found is None:
            return None
        if "one_result" not in self.render(given, tools=[_TRIED_TOOL], add_generation_prompt=True):
            return None
        start, stop, name_key, arguments_key = found
        try:
            twice = self.render(
                [asked, form.message("", [tried, tried], 0)], tools=[_TRIED_TOOL], add_generation_prompt=False
            )
            second = _find_call(twice, stop)
        except InputError:  # of a template for one call
            second = None
        return replace(
            form,
            opening=answered[len(_common_start(opened, answered)) : start],
            closing=answered[stop:].partition(self.turn_end)[0].rstrip(),
            between=None if second is None else twice[stop : second[0]],
            name_key=name_key,
            arguments_key=arguments_key,
        )

    # The form of a message that the template reads

    @property
    def takes_parts(self) -> bool:
        """Whether the contents of messages are lists of parts rather than texts."""
        return self._form[0]

    @property
    def takes_images(self) -> bool:
        """Whether images are parts of their own; otherwise `<image>` is text like any other."""
        return self._form[1]

    @property
    def _image_mark(self) -> str | None:
        return self._form[2]

    @cached_property
    def _form(self) -> tuple[bool, bool, str | None]:
        """Whether contents are lists of parts, whether images are parts, and the text to replace by `<image>`."""
        text = [{"type": "text", "text": "one"}]
        plain, error = self._try(text)
        if plain is None:
            as_string, error = self._try("one")
            if as_string is None:
                raise error or InputError(
                    f"the chat template in {self.path} leaves the user's text out; mend that file"
                )
            return False, False, None
        with_image, _ = self._try([{"type": "image"}, *text])
        if with_image is None or with_image == plain:
            return self._try("one")[0] is None, False, None
        start = len(_common_start(plain, with_image))
        end = len(_common_start(plain[start:][::-1], with_image[start:][::-1]))
        written = with_image[start : len(with_image) - end]
        if DEFAULT_IMAGE_TOKEN in with_image or not written.strip():
            return True, DEFAULT_IMAGE_TOKEN in with_image, None
        token = self.special_tokens.get("image_token")
        return True, True, token if token and token in with_image else written.strip()

    def _try(self, content: object) -> tuple[str | None, InputError | None]:
        """Render one question; None where its text is lost or shown as Python writes a list."""
        try:
            text = self.render([{"role": "user", "content": content}], add_generation_prompt=True)
        except InputError as error:
            return None, error
        return (text if "one" in text and "'type'" not in text else None), None

    def _content(self, text: str) -> object:
        as_parts, takes_images, _ = self._form
        if not as_parts:
            return text
        if not takes_images:
            return [{"type": "text", "text": text}]
        first, *others = _PLACEHOLDER.split(text)
        parts: list[object] = [{"type": "text", "text": first}] if first else []
        for other in others:
            parts.append({"type": "image"})
            if written := other.removeprefix("\n"):
                parts.append({"type": "text", "text": written})
        return parts or [{"type": "text", "text": ""}]


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """Read the chat template of a folder; None where it has none."""
    found = (read_chat_template(folder / name) for name in TEMPLATE_FILES if (folder / name).is_file())
    return next((template for template in found if template is not None), None)


def read_chat_template(file: Path) -> ChatTemplate | None:
    """Read the chat template in a file of `TEMPLATE_FILES`, or any `.jinja` file; None where it holds none.

    Raises:
        InputError: The file is damaged or too large, or its template cannot be compiled.
    """
    if file.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{file} has more than {MAX_FILE_BYTES} bytes, too many for a chat template; fetch it again")
    if file.suffix == ".jinja":
        source: object = file.read_text(encoding="utf-8", errors="replace")
    else:
        source = read_json(file).get("chat_template")
    if isinstance(source, list):  # several by name
        named = {str(row.get("name")): row.get("template") for row in source if isinstance(row, dict)}
        source = named.get("default")
    return None if source is None else checked_template(source, _special_tokens(file.parent), place=str(file))


def checked_template(source: object, special_tokens: Mapping[str, str], *, place: str) -> ChatTemplate:
    """Make a chat template of its text; `place` is the file or address that it comes from, for messages.

    Raises:
        InputError: It is no text, too long, or cannot be compiled.
    """
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARS:
        wrong = f"longer than {MAX_TEMPLATE_CHARS} characters" if isinstance(source, str) else "no text"
        raise InputError(f"the chat template in {place} is {wrong}; mend that file or remove the template")
    try:
        _compile(source)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the chat template in {place} is no valid Jinja: {reason}; mend that file or remove the template"
        ) from error
    return ChatTemplate(place, source, special_tokens)


def _special_tokens(folder: Path) -> dict[str, str]:
    files = ("processor_config.json", "special_tokens_map.json", "tokenizer_config.json")
    values: dict[str, object] = {}
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        values |= _LLAMA_TOKENS
    for file in (folder / name for name in files if (folder / name).is_file()):
        read = read_json(file)
        extra = read.get("extra_special_tokens")
        values |= {**read, **(extra if isinstance(extra, dict) else {})}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}


def adds_begin_token(folder: Path, begin: str) -> bool:
    """Whether the tokenizer in a folder puts its begin token before every text, by its files."""
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    declared = read_json(config).get("add_bos_token") if config.is_file() else None
    if file.is_file() and not (folder / "tokenizer.model").is_file():
        after = json.dumps(read_json(file).get("post_processor"), ensure_ascii=False)
        return json.dumps(begin, ensure_ascii=False) in after or declared is True
    return declared is not False and (folder / "tokenizer.model").is_file()


def _find_call(text: str, start: int) -> tuple[int, int, str, str] | None:
    """The first call of `one_name` after `start`: where its object begins and ends, and its keys of name and arguments."""
    at = text.find("{", start)
    while at >= 0:
        try:
            value, stop = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            value, stop = None, at
        names = {json.dumps(part): key for key, part in value.items()} if isinstance(value, dict) else {}
        arguments = names.get('{"key": "value"}')
        if '"one_name"' in names and arguments is not None:
            return at, stop, names['"one_name"'], arguments
        at = text.find("{", at + 1)
    return None


def _common_start(first: str, second: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if length is None else length]


# The sandbox


@lru_cache(maxsize=32)
def _compile(source: str) -> Template:
    """Compile a template in a sandbox with the names and settings that transformers gives it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class GenerationBlocks(Extension):
        """`{% generation %}` marks answers for transformers; here its text is rendered alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        """A sandbox that also refuses what takes all memory in one step: wide padding and large products."""

        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
            sizes = [len(value) if isinstance(value, (str, list, tuple)) else value for value in (left, right)]
            if operator == "%" and isinstance(left, str):
                _refuse_wide(left)
            elif operator == "**" or (operator == "*" and any(_is_large(size) for size in sizes)):
                raise SecurityError(f"it computes {operator} of values that are too large")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Context, called: object, *args: object, **options: object) -> object:
            _refuse_wide(getattr(called, "__self__", None), *args, *options.values())
            return super().call(context, called, *args, **options)

    def bounded(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            _refuse_wide(*args, *options.values())
            return function(*args, **options)

        return call

    def _is_large(value: object) -> bool:
        return isinstance(value, int) and abs(value) > MAX_NUMBER

    def _refuse_wide(*values: object) -> None:
        if any(_is_large(value) or (isinstance(value, str) and _WIDE_FORMAT.search(value)) for value in values):
            raise SecurityError(f"it uses a width or count of more than {MAX_NUMBER}")

    def fail(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        _refuse_wide(indent)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols])
    names: dict[str, Callable[..., object]] = {
        "raise_exception": fail,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    environment.globals.update(names)
    environment.globals.pop("lipsum")
    environment.filters["tojson"] = to_json
    for name in ("center", "indent", "format", "wordwrap"):
        environment.filters[name] = bounded(environment.filters[name])
    return environment.from_string(source)
