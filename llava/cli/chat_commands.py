"""The commands of a conversation: words that begin with a slash.

In: a typed line, and the conversation. Out: a changed conversation, and messages. A new command is one line in `COMMANDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llava.cli.image_words import split_sources
from llava.cli.program import closest
from llava.cli.terminal import Terminal
from llava.engine.request import SamplingParams
from llava.errors import InputError
from llava.images.download import ImageLimits
from llava.session import LoadedImage, Session

EXIT = "/exit"
# Other names of commands. The words without a slash are commands at a terminal only: in a pipe they may be questions.
ALIASES = {"/reset": "/clear", "/quit": EXIT, "/bye": EXIT, "/?": "/help"}
PLAIN_WORDS = {"exit": EXIT, "quit": EXIT}
# What /set changes, and the type of each value.
SETTINGS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_new_tokens": int,
}
UNSET = ("none", "default", "off")
SAMPLED_ONLY = ("top_p", "top_k", "min_p", "seed")  # without effect where decoding is greedy


class ConversationState(Protocol):
    """What commands change: the conversation of chat.py."""

    session: Session
    terminal: Terminal
    limits: ImageLimits

    def answer(self, question: str) -> None: ...

    def attach(self, sources: Sequence[str | bytes]) -> Sequence[LoadedImage]: ...


@dataclass(frozen=True)
class SlashCommand:
    run: Callable[[ConversationState, str], None]
    argument: str
    help: str


def find_command(word: str, *, interactive: bool) -> str | None:
    """Return the name of the command that a line of this first word is, or None."""
    word = PLAIN_WORDS.get(word.lower(), word) if interactive else word
    word = ALIASES.get(word, word)
    return word if word in COMMANDS else None


def unknown_command(word: str) -> InputError:
    known = list(COMMANDS)
    return InputError(f"unknown command {word!r}{closest(word, [*known, *ALIASES])} (commands: {', '.join(known)})")


def _image(chat: ConversationState, argument: str) -> None:
    sources = split_sources(argument)
    if not sources:
        raise InputError("/image needs the path or URL of at least one image")
    chat.terminal.name_images(chat.attach(sources))
    num_waiting = len(chat.session.waiting)
    chat.terminal.info(f"{num_waiting} image{'s' * (num_waiting != 1)} will go with the next question")


def _clear(chat: ConversationState, argument: str) -> None:
    chat.session.reset()
    chat.terminal.info("a new conversation, without images")


def _undo(chat: ConversationState, argument: str) -> None:
    chat.terminal.info(f"taken back: {chat.session.undo().question}")


def _retry(chat: ConversationState, argument: str) -> None:
    chat.answer(chat.session.undo().question)


def _system(chat: ConversationState, argument: str) -> None:
    if argument:
        chat.session.set_system(argument)
    chat.terminal.info(f"system text: {chat.session.system or '(none)'}")


def _set(chat: ConversationState, argument: str) -> None:
    """Show the settings, or change one: `temperature 0.2`, also with = between."""
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        width = max(map(len, SETTINGS))
        for known in SETTINGS:
            chat.terminal.info(f"{known:<{width}}  {_shown(chat.session.sampling, known)}")
        return
    if name not in SETTINGS:
        raise InputError(f"unknown setting {name!r}{closest(name, list(SETTINGS))} (settings: {', '.join(SETTINGS)})")
    if value:
        number = None if value.lower() in UNSET else _number(name, value)
        usual = next(field.default for field in dataclasses.fields(SamplingParams) if field.name == name)
        changed: dict[str, Any] = {name: usual if number is None else number}
        chat.session.sampling = dataclasses.replace(chat.session.sampling, **changed)
    waits = "; it has no effect at temperature 0" if name in SAMPLED_ONLY and chat.session.sampling.greedy else ""
    chat.terminal.info(f"{name} {_shown(chat.session.sampling, name)}{waits if value else ''}")


def _number(name: str, text: str) -> float | int:
    try:
        return SETTINGS[name](text)
    except ValueError:
        kind = "a whole number" if SETTINGS[name] is int else "a number"
        raise InputError(f"{name} is {text!r}; give {kind}, or none for the default") from None


def _shown(sampling: SamplingParams, name: str) -> str:
    value = getattr(sampling, name)
    return (
        "(the model's default)" if value is None and name != "seed" else "(random)" if value is None else f"{value:g}"
    )


def _save(chat: ConversationState, argument: str) -> None:
    if not argument:
        raise InputError("/save needs the name of a file to write")
    chat.session.save(_path(argument))
    chat.terminal.info(f"saved in {argument}")


def _load(chat: ConversationState, argument: str) -> None:
    if not argument:
        raise InputError("/load needs the name of a file that /save wrote")
    chat.session.load(_path(argument), chat.limits)
    chat.terminal.info(f"{len(chat.session.exchanges)} questions and answers taken up")


def _path(argument: str) -> str:
    """A typed path, with the tilde and a shell's quotes and escapes understood."""
    if Path(argument).exists():
        return argument
    words = split_sources(argument)
    return words[0] if len(words) == 1 else argument


def _help(chat: ConversationState, argument: str) -> None:
    width = max(len(f"{name} {command.argument}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        chat.terminal.info(f"{f'{name} {command.argument}':<{width}}  {command.help}")
    chat.terminal.info(
        'Paths of images may stand anywhere in a line, or be dragged into it. """ begins and ends several lines.'
    )
    chat.terminal.info("Tab completes commands and paths; the arrow keys recall earlier lines.")


def _exit(chat: ConversationState, argument: str) -> None:
    """The conversation ends when this has run (chat.py)."""


COMMANDS = {
    "/image": SlashCommand(_image, "PATH ...", "add images to the next question"),
    "/clear": SlashCommand(_clear, "", "start again, without history and images"),
    "/undo": SlashCommand(_undo, "", "take the last question and answer back"),
    "/retry": SlashCommand(_retry, "", "answer the last question anew"),
    "/system": SlashCommand(_system, "[TEXT]", "show the system text, or give another"),
    "/set": SlashCommand(_set, "[NAME [VALUE]]", "show the sampling settings, or change one: /set temperature 0.2"),
    "/save": SlashCommand(_save, "FILE", "write the conversation as JSON"),
    "/load": SlashCommand(_load, "FILE", "take up a conversation that was saved"),
    "/help": SlashCommand(_help, "", "show these commands"),
    EXIT: SlashCommand(_exit, "", "leave (as Ctrl-D, exit and quit do)"),
}
