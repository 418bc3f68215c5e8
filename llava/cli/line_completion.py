"""Completion of a typed line by Tab: commands, settings and paths.

In: the line up to the cursor. Out: the words that it may go on with. Needs readline, which Windows lacks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

SPECIAL = " \t'\"()[]{}&;<>|*?$`\\!#"  # characters of a path that a backslash is typed before
DELIMITERS = " \t\n"


class LineCompleter:
    """Completes commands at a line's beginning, `arguments[command]` after them, and paths everywhere."""

    def __init__(self, commands: Sequence[str], arguments: Mapping[str, Sequence[str]]) -> None:
        self._commands = commands
        self._arguments = arguments
        self._found: list[str] = []

    def candidates(self, line: str) -> list[str]:
        """Return what may take the place of the last word of a line that ends at the cursor."""
        before, word = _split(line)
        if not before.strip():
            commands = [f"{command} " for command in self._commands if command.startswith(word)]
            if word and commands and word.startswith("/"):
                return commands
        first = before.split(maxsplit=1)[0] if before.strip() else ""
        if first in self._arguments and len(before.split()) == 1:
            return [f"{name} " for name in self._arguments[first] if name.startswith(word)]
        return _paths(word) if word else []

    def complete(self, text: str, state: int) -> str | None:
        """The function that readline calls with `state` 0, 1, ... until there is no more."""
        if state == 0:
            import readline

            line = readline.get_line_buffer()[: readline.get_endidx()]
            skipped = len(_split(line)[1]) - len(text)  # readline's word begins after an escaped space
            self._found = [word[skipped:] for word in self.candidates(line)]
        return self._found[state] if state < len(self._found) else None


def bind_tab(complete: Callable[[str, int], str | None]) -> None:
    """Let Tab complete in this process's readline, or in libedit where that stands in for it."""
    import readline

    readline.set_completer_delims(DELIMITERS)
    readline.set_completer(complete)
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")


def _split(line: str) -> tuple[str, str]:
    """Split a line before its last word; a backslash keeps a space in the word."""
    at = len(line)
    while at > 0 and not (line[at - 1] in DELIMITERS and line[at - 2 : at - 1] != "\\"):
        at -= 1
    return line[:at], line[at:]


def _paths(word: str) -> list[str]:
    """Files and folders that a typed path may go on with, as they are typed. Hidden ones need their dot."""
    plain = _unescaped(word)
    folder, name = os.path.split(plain)
    shown = word[: len(word) - len(_last_part(word))]
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    return [
        shown + _escaped(entry.name) + ("/" if entry.is_dir() else " ")
        for entry in entries
        if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith("."))
    ]


def _last_part(word: str) -> str:
    return word.rpartition("/")[2]


def _unescaped(word: str) -> str:
    text, is_escaped = "", False
    for character in word:
        if character == "\\" and not is_escaped:
            is_escaped = True
            continue
        text, is_escaped = text + character, False
    return text


def _escaped(name: str) -> str:
    return "".join(f"\\{character}" if character in SPECIAL else character for character in name)
