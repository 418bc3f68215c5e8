"""Defaults of flags from the user's configuration file, ~/.config/llava.toml or the one that --config names.

In: a parser and the name of its table. Out: changed defaults. The file has a table for each program that reads it, `[chat]` and
`[serve]`; its keys are names of flags, `temperature = 0.2`, `api-key-file = "~/keys"`. The command line comes before it.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava.cli.program import ArgumentParser, closest
from llava.errors import InputError
from llava.files import config_folder

FLAG = "--config"
TABLES = ("chat", "serve")
NAME = "llava.toml"
KINDS: dict[object, str] = {int: "a whole number", float: "a number", None: "a text"}


def configured_parser(table: str, **settings: Any) -> ArgumentParser:
    """Return a parser whose flags have defaults in a table of the user's file, with the flag that names another file."""
    parser = ArgumentParser(defaults=partial(apply_config, table), **settings)
    parser.add_argument(FLAG, metavar="FILE", help=f"defaults of these flags (default: ~/.config/{NAME}, if it exists)")
    return parser


def apply_config(table: str, parser: argparse.ArgumentParser, words: Sequence[str]) -> frozenset[str]:
    """Take the values of a table as the parser's defaults, and return the names of what they set.

    A flag that excludes one of the command line is left out.
    """
    file = _file_of(words)
    if file is None:
        return frozenset()
    values = _read_table(file, table)
    known = {name: action for action in parser._actions for name in _names(action)}
    typed = {
        known[name]
        for name in (word.partition("=")[0].lstrip("-") for word in words if word.startswith("-"))
        if name in known
    }
    set_names = set()
    for key, value in values.items():
        place = f"{file}: [{table}] {key}"
        action = known.get(key.replace("_", "-"))
        if action is None or action.nargs == "*" or isinstance(action, argparse._HelpAction):
            raise InputError(f"{place} is no flag of this program{closest(key, list(known))}")
        if not _is_excluded(action, typed, parser):
            parser.set_defaults(**{action.dest: _value(action, value, place)})
            set_names.add(action.dest)
    return frozenset(set_names)


def _file_of(words: Sequence[str]) -> Path | None:
    """The file that the command line names, else the user's where there is one."""
    for number, word in enumerate(words):
        name, found, value = word.partition("=")
        if name == FLAG:
            given = value if found else words[number + 1] if number + 1 < len(words) else ""
            file = Path(given).expanduser()
            if not file.is_file():
                raise InputError(f"{FLAG}: there is no file {given!r}")
            return file
    try:
        file = config_folder() / NAME
    except InputError:  # a user without a home
        return None
    return file if file.is_file() else None


def _read_table(file: Path, table: str) -> dict[str, object]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the configuration {str(file)!r} cannot be read: {reason}") from error
    for name, value in content.items():
        if not isinstance(value, dict):
            raise InputError(f"{file}: {name} stands outside of a table; put it below [{'] or ['.join(TABLES)}]")
        if name not in TABLES:
            raise InputError(f"{file}: there is no table [{name}]{closest(name, TABLES)} (tables: {', '.join(TABLES)})")
    return dict(content.get(table, {}))


def _names(action: argparse.Action) -> list[str]:
    """Names of a flag without hyphens before it; those of a positional too."""
    return [option.lstrip("-") for option in action.option_strings] or [action.dest.replace("_", "-")]


def _is_excluded(action: argparse.Action, typed: Collection[argparse.Action], parser: argparse.ArgumentParser) -> bool:
    groups = [group._group_actions for group in parser._mutually_exclusive_groups if action in group._group_actions]
    return any(other in typed and other is not action for group in groups for other in group)


def _value(action: argparse.Action, value: object, place: str) -> object:
    if isinstance(action, argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise InputError(f"{place} is {value!r}; give true or false")
        return value
    if isinstance(action, argparse._AppendAction):
        many = value if isinstance(value, list) else [value]
        return [_one(action, one, place) for one in many]
    return _one(action, value, place)


def _one(action: argparse.Action, value: object, place: str) -> object:
    kind = action.type if action.type in (int, float) else None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind or str) or isinstance(value, bool):  # type: ignore[arg-type]
        raise InputError(f"{place} is {value!r}; give {KINDS[kind]}")
    if action.choices is not None and value not in action.choices:
        raise InputError(f"{place} is {value!r}; give one of {', '.join(map(str, action.choices))}")
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value
