"""Conversations, and the templates that render them as prompts.

In: turns (role, text), a text possibly with an image. Out: the prompt as one string (`get_prompt`), or the same text as
spans that say which characters a model is trained to produce (`spans`).

The templates are data in conversation_templates.py; text/labels.py turns spans into ids and labels. This file imports
neither torch nor an image library; only the methods for web pages handle images.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from llava.chat_template import TEMPLATE_FILES, ChatTemplate, read_chat_template
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation_templates import DEFAULT_NAME, NAMES, TEMPLATES
from llava.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    Message: TypeAlias = str | tuple[str, Image, str] | None

_PAD_COLOUR = (122, 116, 104)  # the mean colour of CLIP's training images


class SeparatorStyle(IntEnum):
    """How a template joins system text, roles, messages and separators."""

    SINGLE = 1  # one separator after every turn
    TWO = 2  # one separator after a question, another after an answer
    MPT = 3  # roles carry their own markup
    PLAIN = 4  # no roles: an image and its caption
    LLAMA_2 = 5  # [INST] ... [/INST]
    CHATML = 6  # <|im_start|>role, each turn on lines of its own
    LLAMA_3 = 7  # <|start_header_id|>role<|end_header_id|>
    GEMMA = 8  # roles carry their own markup; system text opens the first question
    JINJA = 9  # the chat template of a model folder


# Styles of newer language models: every turn ends by a mark, and one turn may have several images.
MARKED_STYLES = (SeparatorStyle.CHATML, SeparatorStyle.LLAMA_3, SeparatorStyle.GEMMA, SeparatorStyle.JINJA)


class Span(NamedTuple):
    """A part of the prompt; `trained` says whether the model learns to write it."""

    text: str
    trained: bool


class PromptTurn(NamedTuple):
    """A message as the text that a template renders."""

    role: str
    text: str | None  # None: not answered yet
    is_answer: bool


@dataclass
class Conversation:
    """Turns of a dialogue and the template that renders them.

    A message is a text, None for an answer still to come, or a tuple (text, image, image process mode).
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]]
    offset: int  # number of messages that belong to the template; web pages do not show them
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False
    chat_template: ChatTemplate | None = None  # of the style JINJA

    def append_message(self, role: str, message: Message) -> None:
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        """Render the dialogue as the text that the model reads; it ends where the next answer begins."""
        return "".join(span.text for span in self.spans())

    def spans(self, *, keep_empty_answers: bool = False) -> list[Span]:
        """Render the prompt as spans; answers and the separators that end them are trained.

        With `keep_empty_answers` an answer of "" is an answer without text, with the separator that ends it, and a question
        too where turns have marks. Otherwise it renders like None, an answer not given yet, since outside code opens a turn
        with either.
        """
        keeps_questions = self.sep_style in MARKED_STYLES
        turns = [
            turn._replace(text=None)
            if turn.text == "" and not (keep_empty_answers and (turn.is_answer or keeps_questions))
            else turn
            for turn in self._turns()
        ]
        return [span for span in _STYLES[self.sep_style].render(self, turns) if span.text]

    def _turns(self) -> list[PromptTurn]:
        """Messages as plain text, with an image placeholder in the first one where it has an image."""
        messages = [(role, message) for role, message in self.messages]
        if messages and isinstance(messages[0][1], tuple):
            role, (text, *_) = messages[0]
            text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            if "mmtag" in self.version:
                messages[0] = (role, text)
                messages.insert(0, (self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"))
                messages.insert(1, (self.roles[1], "Received."))
            else:
                messages[0] = (role, f"{DEFAULT_IMAGE_TOKEN}\n{text}")
        if self.sep_style == SeparatorStyle.CHATML:  # later images too, as LLaVA-NeXT writes them
            messages = [(role, _with_own_images(message)) for role, message in messages]
        same_roles = self.roles[0] == self.roles[1]
        return [
            PromptTurn(role, _text_of(message), index % 2 == 1 if same_roles else role == self.roles[1])
            for index, (role, message) in enumerate(messages)
        ]

    def with_system(self, text: str) -> Conversation:
        """Copy with another system text; markup that the template puts before its own stays."""
        copy = self.copy()
        copy.system = text
        if markup := self.system_markup:
            head, found, _ = self.system.partition(markup)
            copy.system = f"{head if found else ''}{markup}{text}"
        return copy

    @property
    def system_markup(self) -> str:
        """The markup that a field `system` with its own markup begins with: `<|im_start|>system`, a line break."""
        if self.sep_style not in (SeparatorStyle.MPT, SeparatorStyle.CHATML):
            return ""
        return self.roles[0].replace("user", "system") + "\n" * (self.sep_style == SeparatorStyle.CHATML)

    def copy(self) -> Conversation:
        return dataclasses.replace(self, messages=[[role, message] for role, message in self.messages])

    def dict(self) -> dict[str, object]:
        """The fields of the template and the messages, as web pages post them.

        Images are left out, unless the user's turns have none: then the template's own messages stay as they are.
        """
        shows_image = any(isinstance(message, tuple) for _, message in self._questions())
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text_of(message) if shows_image else message] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    # Images, for web pages

    def get_images(self, return_pil: bool = False) -> list[str | Image]:
        """Prepare the images of the user's turns as their messages ask: PNG in base64, or PIL images."""
        return [
            self.process_image(message[1], message[2], return_pil=return_pil)
            for _, message in self._questions()
            if isinstance(message, tuple)
        ]

    def _questions(self) -> list[list[Any]]:
        return self.messages[self.offset :: 2]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """List [question, answer] for a chat window; an image becomes an HTML tag before its question."""
        rows: list[list[str | None]] = []
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2 == 1:
                rows[-1][-1] = message
                continue
            if isinstance(message, tuple):
                text, image, _ = message
                jpeg = self.process_image(image, "Default", image_format="JPEG")
                tag = f'<img src="data:image/jpeg;base64,{jpeg}" alt="user upload image" />'
                message = tag + text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            rows.append([message, None])
        return rows

    def process_image(
        self,
        image: Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> str | Image:
        """Prepare an image for sending: base64 of `image_format` ("PNG" or "JPEG"), or a PIL image.

        Args:
            image_process_mode: "Pad" pads to a square, "Resize" stretches to 336 x 336; "Default" and "Crop" keep it.
            max_len: pixels of the long side above which the image is reduced.
            min_len: pixels of the short side that it is reduced to, at most.

        Raises:
            InputError: the mode is unknown, or the image too thin to be reduced.
        """
        if image_process_mode not in _IMAGE_MODES:
            known = ", ".join(_IMAGE_MODES)
            raise InputError(f"Invalid image_process_mode: {image_process_mode}; known modes are {known}.")
        image = _reduce(_IMAGE_MODES[image_process_mode](image), max_len, min_len)
        if return_pil:
            return image
        buffer = BytesIO()
        if image_format == "JPEG" and image.mode not in ("RGB", "L"):  # the format has no transparency
            image = image.convert("RGB")
        image.save(buffer, format=image_format)
        return base64.b64encode(buffer.getvalue()).decode()


def _text_of(message: Message) -> str | None:
    return message[0] if isinstance(message, tuple) else message


def _with_own_images(message: Message) -> str | None:
    """The text of a message, with a placeholder for each of its images before it."""
    if not isinstance(message, tuple):
        return message
    images = message[1] if isinstance(message[1], (list, tuple)) else [message[1]]
    return DEFAULT_IMAGE_TOKEN * len(images) + message[0].replace(DEFAULT_IMAGE_TOKEN, "")


# Rendering: one function per style, from turns to spans.


def _render_named(conv: Conversation, turns: list[PromptTurn]) -> list[Span]:
    separators = (conv.sep, conv.sep if conv.sep_style == SeparatorStyle.SINGLE else conv.sep2 or "")
    spans = [Span(conv.system + conv.sep, False)]
    for index, (role, text, is_answer) in enumerate(turns):
        spans.append(Span(f"{role}:", False))
        if text is not None:
            # The space belongs to the answer, since tokenizers join it to the first word.
            spans.append(Span(f" {text}{separators[index % 2]}", is_answer))
    return spans


def _render_mpt(conv: Conversation, turns: list[PromptTurn]) -> list[Span]:
    spans = [Span(conv.system + conv.sep, False)] if conv.system else []
    for role, text, is_answer in turns:
        spans.append(Span(role, False))
        if text is not None:
            spans.append(Span(text + conv.sep, is_answer))
    return spans


def _render_chatml(conv: Conversation, turns: list[PromptTurn]) -> list[Span]:
    spans = [Span(f"{conv.system}{conv.sep}\n", False)] if conv.system else []
    for role, text, is_answer in turns:
        spans.append(Span(f"{role}\n", False))
        if text is not None:
            spans += [Span(text + conv.sep, is_answer), Span("\n", False)]
    return spans


def _render_llama_3(conv: Conversation, turns: list[PromptTurn]) -> list[Span]:
    def head(role: str) -> Span:
        return Span(f"<|start_header_id|>{role}<|end_header_id|>\n\n", False)

    spans = [head("system"), Span(conv.system + conv.sep, False)] if conv.system else []
    for index, (role, text, is_answer) in enumerate(turns):
        if text is not None:
            spans += [head(role), Span(text.strip() + conv.sep, is_answer)]
        elif index == len(turns) - 1:
            spans.append(head(role))
    return spans


def _render_gemma(conv: Conversation, turns: list[PromptTurn]) -> list[Span]:
    spans: list[Span] = []
    for index, (role, text, is_answer) in enumerate(turns):
        spans.append(Span(role + (f"{conv.system}\n\n" if conv.system and index == 0 else ""), False))
        if text is not None:
            spans.append(Span(text + conv.sep, is_answer))
    return spans


def _render_jinja(conv: Conversation, turns: list[PromptTurn]) -> list[Span]:
    """Render the chat template, and find the answers by rendering it again with marks in their places."""
    template = conv.chat_template
    assert template is not None
    is_open = bool(turns) and turns[-1].is_answer and turns[-1].text is None
    said = [("assistant" if turn.is_answer else "user", turn.text or "") for turn in turns[: len(turns) - is_open]]
    prompt = template.prompt(said, system=conv.system, is_open=is_open)
    answers = [text for role, text in said if role == "assistant"]
    if not answers:
        return [Span(prompt, False)]
    marks = iter([f"\ue000{number}\ue001" for number in range(len(answers))])
    marked = [(role, next(marks) if role == "assistant" else text) for role, text in said]
    around = re.split("\ue000\\d+\ue001", template.prompt(marked, system=conv.system, is_open=is_open))
    for written in (answers, [text.strip() for text in answers]):
        if len(around) == len(written) + 1 and prompt == around[0] + "".join(
            text + after for text, after in zip(written, around[1:], strict=True)
        ):
            opened = [
                _opened(template, said[:at], conv.system) for at, (role, _) in enumerate(said) if role == "assistant"
            ]
            return _around_answers(around, written, conv.sep, opened)
    return [Span(prompt, False)]  # a template that rewrites answers: nothing of it can be trained on


def _opened(template: ChatTemplate, said: list[tuple[str, str]], system: str) -> str | None:
    """The prompt that asks for the next answer; None where the template refuses so few turns."""
    try:
        return template.prompt(said, system=system, is_open=True)
    except InputError:
        return None


def _around_answers(around: list[str], answers: list[str], end: str, opened: list[str | None]) -> list[Span]:
    """Spans of the text around answers and of the answers, from where the model begins to write to the mark that ends them.

    `opened` holds the prompt that each answer is asked for with, where it can be rendered: what stands between its end and the
    answer is the model's to write too, as the space in "ASSISTANT: answer" or a block of thoughts before an answer.
    """
    spans = [Span(around[0], False)]
    for text, after, asked in zip(answers, around[1:], opened, strict=True):
        before = spans.pop().text
        done = sum(len(span.text) for span in spans)
        whole = "".join(span.text for span in spans) + before
        if asked is not None and whole.startswith(asked) and len(asked) >= done:
            before, text = before[: len(asked) - done], before[len(asked) - done :] + text
        ended = after[: len(after) - len(after.removeprefix(end))]
        spans += [Span(before, False), Span(text + ended, True), Span(after[len(ended) :], False)]
    return spans


def _render_llama_2(conv: Conversation, turns: list[PromptTurn]) -> list[Span]:
    if turns and turns[0].role != conv.roles[0]:
        raise InputError(
            f"first message should come from user: this template starts with {conv.roles[0]!r}, not {turns[0].role!r}."
        )
    if turns and turns[0].text is None:
        raise InputError("first message should not be none: this template needs a question before an answer.")
    system = f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n" if conv.system else ""
    spans: list[Span] = []
    for index, (_, text, is_answer) in enumerate(turns):
        if text is None:
            continue
        if index % 2 == 0:
            opening = f"[INST] {system}" if index == 0 else f"{conv.sep}[INST] "
            spans.append(Span(f"{opening}{text} [/INST]", False))
        else:
            spans.append(Span(f" {text} {conv.sep2 or ''}", is_answer))
    return spans


def _render_plain(conv: Conversation, turns: list[PromptTurn]) -> list[Span]:
    spans = [Span(conv.system, False)]
    for index, (_, text, is_answer) in enumerate(turns):
        if text is not None:
            end = conv.sep if index % 2 == 0 or conv.sep2 is None else conv.sep2
            spans.append(Span(text + end, is_answer))
    return spans


class _Style(NamedTuple):
    render: Callable[[Conversation, list[PromptTurn]], list[Span]]
    cli_stop: str  # name of the field whose text ends an answer, by the rule of the command line
    web_stop: str  # ... by the rule of the web server
    answer_end: str  # ... as the template really renders it


_STYLES: dict[SeparatorStyle, _Style] = {
    SeparatorStyle.SINGLE: _Style(_render_named, "sep", "sep", "sep"),
    SeparatorStyle.TWO: _Style(_render_named, "sep2", "sep2", "sep2"),
    SeparatorStyle.MPT: _Style(_render_mpt, "sep", "sep", "sep"),
    SeparatorStyle.PLAIN: _Style(_render_plain, "sep", "sep2", "sep"),
    SeparatorStyle.LLAMA_2: _Style(_render_llama_2, "sep", "sep2", "sep2"),
    SeparatorStyle.CHATML: _Style(_render_chatml, "sep", "sep", "sep"),
    SeparatorStyle.LLAMA_3: _Style(_render_llama_3, "sep", "sep", "sep"),
    SeparatorStyle.GEMMA: _Style(_render_gemma, "sep", "sep", "sep"),
    SeparatorStyle.JINJA: _Style(_render_jinja, "sep", "sep", "sep"),
}


def stop_string(conv: Conversation) -> str:
    """The stop string that command-line programs pass to `KeywordsStoppingCriteria`."""
    return getattr(conv, _STYLES[conv.sep_style].cli_stop)


def web_stop_string(conv: Conversation) -> str | None:
    """The stop string that the web server posts to a worker."""
    return getattr(conv, _STYLES[conv.sep_style].web_stop)


def answer_end(conv: Conversation) -> str:
    """The text that ends an answer in this template, which generation stops at; never empty."""
    end: str = getattr(conv, _STYLES[conv.sep_style].answer_end)
    return end.rstrip("\n") or end


def with_answer_end(conv: Conversation, end: str) -> Conversation:
    """Copy a template with another text that ends an answer."""
    copy, name = conv.copy(), _STYLES[conv.sep_style].answer_end
    own: str = getattr(conv, name)
    setattr(copy, name, end + own[len(own.rstrip("\n")) :])
    return copy


# Image placeholders


def image_placeholder(use_im_start_end: bool) -> str:
    """The text that stands for one image in a prompt: `<image>`, between its start and end tokens where a model has them."""
    if use_im_start_end:
        return f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
    return DEFAULT_IMAGE_TOKEN


def with_image_placeholders(question: str, num_images: int, placeholder: str = DEFAULT_IMAGE_TOKEN) -> str:
    """Put one `placeholder` per image into a question: where it says `<image>`, else each on a line before it.

    Raises:
        InputError: the question says `<image>`, but not once for each image.
    """
    check_question(question, num_images)
    if DEFAULT_IMAGE_TOKEN in question:
        return question.replace(DEFAULT_IMAGE_TOKEN, placeholder)
    return f"{placeholder}\n" * num_images + question


def check_question(question: str, num_images: int) -> None:
    """Raise where a question says `<image>`, but not once for each image."""
    if DEFAULT_IMAGE_TOKEN in question:
        check_placeholders(question.count(DEFAULT_IMAGE_TOKEN), num_images)


def check_placeholders(num_placeholders: int, num_images: int) -> None:
    """Raise where a prompt has more or fewer image placeholders than images."""
    if num_placeholders != num_images:
        placeholders = f"{num_placeholders} <image> placeholder{'s' * (num_placeholders != 1)}"
        images = f"{num_images} image{'s' * (num_images != 1)}"
        remedy = (
            "give as many images as placeholders"
            if num_placeholders > num_images
            else "give a placeholder for each image, or none at all"
        )
        raise InputError(f"the prompt has {placeholders} for {images}; {remedy}")


# Images


def _pad_to_square(image: Image) -> Image:
    from PIL.Image import new

    if image.mode not in ("RGB", "RGBA"):
        image = image.convert("RGB")
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = new(image.mode, (side, side), _PAD_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


_IMAGE_MODES: dict[str, Callable[[Image], Image]] = {
    "Pad": _pad_to_square,
    "Default": lambda image: image,
    "Crop": lambda image: image,
    "Resize": lambda image: image.resize((336, 336)),
}


def _reduce(image: Image, max_len: int, min_len: int) -> Image:
    """Scale an image down so that its short side is at most `min_len` and its long side at most `max_len`."""
    width, height = image.size
    if max(width, height) <= max_len:
        return image
    ratio = max(width, height) / min(width, height)
    short = int(min(max_len / ratio, min_len, min(width, height)))
    long = int(short * ratio)
    if short < 1:
        raise InputError(
            f"height and width must be > 0: a {width} x {height} image is too thin to be reduced to {max_len} pixels."
        )
    return image.resize((short, long) if height > width else (long, short))


# Templates by name


@dataclass(frozen=True)
class _NameRule:
    """The template for model names that hold every word of `words` and none of `without`."""

    template: str
    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def _matching(rules: tuple[_NameRule, ...], model_name: str) -> str:
    name = model_name.lower()
    return next(
        rule.template
        for rule in rules
        if all(word in name for word in rule.words) and not any(word in name for word in rule.without)
    )


_NAME_RULES = (
    _NameRule("qwen_1_5", ("qwen",)),
    _NameRule("llava_llama_2", ("llama-2",)),
    _NameRule("mistral_instruct", ("mistral",)),
    _NameRule("chatml_direct", ("v1.6-34b",)),
    _NameRule("llava_v1", ("v1",)),
    _NameRule("mpt", ("mpt",)),
    _NameRule("llava_v0"),
)

# The web server has more rules. The original names two templates that never existed; ChatML replaces them, the format of
# those models (OpenOrca's Mistral and MPT's chat model).
_WEB_NAME_RULES = (
    _NameRule("qwen_1_5", ("qwen",)),
    _NameRule("llava_llama_2", ("llava", "llama-2")),
    _NameRule("chatml_direct", ("llava", "mistral", "orca")),
    _NameRule("chatml_direct", ("llava", "mistral", "hermes")),
    _NameRule("chatml_direct", ("llava", "mixtral", "hermes")),
    _NameRule("mistral_instruct", ("llava", "mistral")),
    _NameRule("mistral_instruct", ("llava", "mixtral")),
    _NameRule("chatml_direct", ("llava-v1.6-34b",)),
    _NameRule("v1_mmtag", ("llava", "v1", "mmtag")),
    _NameRule("v1_mmtag", ("llava", "v1", "plain"), without=("finetune",)),
    _NameRule("llava_v1", ("llava", "v1")),
    _NameRule("mpt", ("llava", "mpt")),
    _NameRule("v0_mmtag", ("llava", "mmtag")),
    _NameRule("v0_mmtag", ("llava", "plain"), without=("finetune",)),
    _NameRule("llava_v0", ("llava",)),
    _NameRule("mpt", ("mpt",)),
    _NameRule("llama_2", ("llama-2",)),
    _NameRule("vicuna_v1"),
)


def conv_mode_for_model_name(name: str) -> str:
    """Name the template that command-line programs choose for a model of this name."""
    return _matching(_NAME_RULES, name)


def web_conv_mode_for_model_name(name: str) -> str:
    """Name the template that the web server chooses for a model of this name."""
    return _matching(_WEB_NAME_RULES, name)


def get_model_name_from_path(model_path: str) -> str:
    """Return the last folder of a path, for a training checkpoint with that of its run: `run_checkpoint-100`."""
    parts = model_path.strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


def _build(entry: dict[str, Any]) -> Conversation:
    fields = {key: value for key, value in entry.items() if key not in ("style", "messages")}
    messages = [[role, text] for role, text in entry.get("messages", ())]
    return Conversation(sep_style=SeparatorStyle[entry["style"]], messages=messages, offset=len(messages), **fields)


_BY_ENTRY = {name: _build(entry) for name, entry in TEMPLATES.items()}


class _TemplatesByName(dict[str, Conversation]):
    """The templates of this package by name, and under the path of its file the chat template of a model folder.

    A name may be followed by a colon and another text to end answers with: `v1:<|eot_id|>`.
    """

    def __missing__(self, name: str) -> Conversation:
        file = Path(name)
        if file.name in TEMPLATE_FILES or file.suffix == ".jinja":
            if not file.is_file():
                raise InputError(f"there is no chat template {name!r}; give a file, or one of {', '.join(self)}.")
            chat_template = read_chat_template(file)
            if chat_template is None:
                raise InputError(f"{name} holds no chat template; give a file that does, or one of {', '.join(self)}.")
            return conversation_from(chat_template)
        base, _, end = name.partition(":")
        if end and base in self:
            return with_answer_end(self[base], end)
        raise KeyError(name)


def conversation_from(chat_template: ChatTemplate) -> Conversation:
    """Make an empty conversation that a folder's chat template renders."""
    return Conversation(
        system="",
        roles=("user", "assistant"),
        messages=[],
        offset=0,
        sep_style=SeparatorStyle.JINJA,
        sep=chat_template.turn_end,
        version="chat_template",
        chat_template=chat_template,
    )


conv_templates: dict[str, Conversation] = _TemplatesByName({name: _BY_ENTRY[entry] for name, entry in NAMES.items()})
default_conversation = conv_templates[DEFAULT_NAME]

# The templates under the names of the variables that outside code imports.
conv_vicuna_v0, conv_vicuna_v1 = conv_templates["v0"], conv_templates["v1"]
conv_llava_v0, conv_llava_v0_mmtag = conv_templates["llava_v0"], conv_templates["v0_mmtag"]
conv_llava_v1, conv_llava_v1_mmtag = conv_templates["llava_v1"], conv_templates["v1_mmtag"]
conv_llama_2, conv_llava_llama_2 = conv_templates["llama_2"], conv_templates["llava_llama_2"]
conv_llava_plain, conv_mpt = conv_templates["plain"], conv_templates["mpt"]
conv_mistral_instruct, conv_chatml_direct = conv_templates["mistral_instruct"], conv_templates["chatml_direct"]


OWN_TEMPLATE = "chat_template"  # as `conv_mode` of a config: the chat template in the tokenizer's folder


def is_template(name: str) -> bool:
    """Whether a config's `conv_mode` names a template of this package, also with another end, or the folder's own."""
    return name == OWN_TEMPLATE or name in conv_templates or name.partition(":")[0] in conv_templates


def get_template(name: str) -> Conversation:
    """Copy a template, by its name or by the file of a folder's chat template.

    Raises:
        InputError: The name is unknown, or the file holds no usable chat template.
    """
    try:
        return conv_templates[name].copy()
    except KeyError:
        known = ", ".join(conv_templates)
        raise InputError(f"unknown conversation mode {name!r}; known modes are {known}.") from None
