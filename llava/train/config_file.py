"""Read and write a training run as YAML: `llava train CONFIG.yaml [key=value | --key value ...]`.

In: an argument list that begins with a file. Out: the same run as flags, for arguments.py to parse; and the reverse, flags
as YAML, for `--print-config`. Keys are the names of the flags, bare or in groups (`model:`, `data:`, `training:`) that only
help the reader. `extends: other.yaml` inherits from another file. Paths are relative to the working directory, as in
flags; only `extends` is relative to its file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llava.cli.program import closest
from llava.errors import InputError
from llava.train.legacy_flags import KEPT_WITHOUT_MEANING, RENAMED, REWRITTEN, WITHOUT_MEANING, Flag, parse_flags

GROUPS = ("model", "data", "training")
EXTENDS = "extends"
UNSET = ("", "~", "null")
OLD_NAMES = frozenset({*RENAMED, *WITHOUT_MEANING, *REWRITTEN, *KEPT_WITHOUT_MEANING})


def expand_config(argv: Sequence[str], known: Collection[str], lists: Collection[str] = ()) -> list[str]:
    """Turn `CONFIG.yaml key=value --key value` into flags; return an argument list without a file as it is.

    Assignments after the file take precedence over it. `known` are the names of all flags, `lists` those that take several
    values.
    """
    if not argv or argv[0].startswith("-"):
        return list(argv)
    file, *rest = argv
    before = [file, *rest]
    given = parse_flags(
        [f"--{word}" if _is_assignment(word, known, before[i]) else word for i, word in enumerate(rest)]
    )
    overridden = {_current_name(flag.name) for flag in given}
    flags = [
        flag for flag in _flags_of(Path(file), frozenset(known), lists) if _current_name(flag.name) not in overridden
    ]
    for flag in given:
        if len(flag.values) == 1 and flag.values[0] in UNSET:  # resets to the default, as in a file
            flags = [other for other in flags if _current_name(other.name) != _current_name(flag.name)]
        else:
            flags.append(flag)
    return [word for flag in flags for word in flag.as_argv()]


def _is_assignment(word: str, known: Collection[str], before: str) -> bool:
    """Whether a word is an assignment such as `lora_r=8`, and not a flag, nor a value with `=` of the flag `before` it."""
    name, equals, _ = word.partition("=")
    if not equals or not name.isidentifier():
        return False
    if name in known or name in OLD_NAMES:
        return True
    if before.startswith("--") and "=" not in before:
        return False
    raise InputError(f"unknown key {name!r}{closest_key(name, known)}")


def _current_name(name: str) -> str:
    return {"warmup_ratio": "warmup_steps", "gradient_checkpointing": "activation_checkpointing", **RENAMED}.get(
        name, name
    )


def _flags_of(file: Path, known: frozenset[str], lists: Collection[str], seen: tuple[Path, ...] = ()) -> list[Flag]:
    """Read the flags of a file and of those that it extends."""
    if file.resolve() in seen:
        raise InputError(f"{file} extends itself")
    strings, typed = _read(file)
    flags: dict[str, Flag] = {}
    if strings.get(EXTENDS):
        parent = file.parent / strings[EXTENDS]
        flags = {_current_name(flag.name): flag for flag in _flags_of(parent, known, lists, (*seen, file.resolve()))}
    own: set[str] = set()
    for where, key, text, value in _settings(strings, typed):
        if key not in known and key not in OLD_NAMES:
            raise InputError(f"{file}: unknown key {where + key!r}{closest_key(key, known)}")
        if _current_name(key) in own:
            raise InputError(f"{file}: {key!r} is given twice; keep one of them")
        own.add(_current_name(key))
        flags.pop(_current_name(key), None)
        if text is None or text not in UNSET:  # an empty value resets to the default
            flags[_current_name(key)] = Flag(key, _words(text, value, several=key in lists))
    return list(flags.values())


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the file twice: with every scalar as text (`no`, `2e-5` and `1_000` are taken literally), and with YAML types."""
    try:
        text = file.read_text(encoding="utf-8")
        strings, typed = yaml.load(text, Loader=yaml.BaseLoader), yaml.safe_load(text)
    except OSError as error:
        hint = "" if file.exists() else "; llava examples writes those that come with this package here"
        raise InputError(f"cannot read the configuration {str(file)!r}: {error.strerror}{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(strings, dict):
        raise InputError(f"{file} holds no settings; it needs lines like 'learning_rate: 2e-5'")
    return strings, typed


def _settings(strings: Mapping[str, Any], typed: Mapping[str, Any]) -> list[tuple[str, str, str | None, object]]:
    """Flatten the groups into (group, key, text of a scalar, value of anything else) per setting."""
    found: list[tuple[str, str, str | None, object]] = []
    for (key, text), value in zip(strings.items(), typed.values(), strict=True):
        if key == EXTENDS:
            continue
        if key in GROUPS and isinstance(text, dict):
            inner = zip(text.items(), value.values(), strict=True)
            found += [(f"{key}.", name, t if isinstance(t, str) else None, v) for (name, t), v in inner]
        elif not (key in GROUPS and text in UNSET):
            found.append(("", key, text if isinstance(text, str) else None, value))
    return found


def _words(text: str | None, value: object, *, several: bool) -> tuple[str, ...]:
    if text is not None:
        return (text,)
    if isinstance(value, list) and not any(isinstance(entry, (list, dict)) for entry in value):
        entries = tuple(str(entry) for entry in value)
        return entries if several else (",".join(entries),)
    return (json.dumps(value),)


def closest_key(name: str, known: Collection[str]) -> str:
    return closest(name, sorted(known)) or "; llava train --help lists every name"


def as_yaml(flags: Sequence[Flag], groups: Mapping[str, Mapping[str, tuple[object, str]]]) -> str:
    """Format flags as a configuration file; settings that were not given follow as comments, with default and help.

    `groups` has, for `model`, `data` and `training`, the (default, help) of each setting to list there.
    """
    given = {flag.name: flag for flag in flags}
    group_of = {name: group for group, settings in groups.items() for name in settings}
    lines: list[str] = []
    for group in GROUPS:
        lines.append(f"{group}:")
        own = [flag for name, flag in given.items() if group_of.get(name, GROUPS[-1]) == group]
        lines += [f"  {flag.name}: {_scalar(flag)}" for flag in own]
        for name, (default, meaning) in groups[group].items():
            if name not in given and name not in KEPT_WITHOUT_MEANING:
                lines.append(f"  # {name}: {'null' if default in (None, '') else default}  ({meaning})")
    return "\n".join(lines) + "\n"


def _scalar(flag: Flag) -> str:
    """Format the value so that reading it gives the same words."""
    if len(flag.values) > 1:
        return json.dumps(list(flag.values))
    text = flag.values[0] if flag.values else "True"
    plain = yaml.load(text, Loader=yaml.BaseLoader) if text and not text.startswith(("%", "@", "`")) else None
    return text if plain == text and ": " not in text and " #" not in text else json.dumps(text)
