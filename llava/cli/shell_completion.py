"""`llava completion SHELL`: print a script by which bash, zsh or fish completes commands, flags and their values.

In: the parsers of all commands (commands.py). Out: a script, which starts no Python when Tab is pressed. Its words are those of
the version that printed it.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from llava.cli.commands import COMMANDS, Command
from llava.cli.program import ArgumentParser
from llava.cli.terminal import quiet_bitsandbytes

EXAMPLES = """\
examples:
  llava completion bash > ~/.local/share/bash-completion/completions/llava
  llava completion zsh > ~/.zfunc/_llava              with fpath+=~/.zfunc before compinit in ~/.zshrc
  llava completion fish > ~/.config/fish/completions/llava.fish
"""


@dataclass(frozen=True)
class KnownFlag:
    """A flag: its spellings, whether a value follows, which ones there are, and its help."""

    names: tuple[str, ...]
    takes_value: bool
    choices: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class KnownProgram:
    """The words of a command, `chat`, or of a program within one, `data check`."""

    words: str
    about: str
    flags: tuple[KnownFlag, ...]
    programs: tuple[str, ...] = ()  # within this command


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava completion", description="Print a completion script for a shell.", epilog=EXAMPLES
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="which shell")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    print(SCRIPTS[args.shell](find_programs()), end="")


def find_programs() -> list[KnownProgram]:
    """The words of all commands, from their parsers."""
    quiet_bitsandbytes()  # which the parser of training imports
    return [program for name, command in COMMANDS.items() for program in _programs(name, command)]


def _programs(name: str, command: Command) -> list[KnownProgram]:
    parsers = command.parsers or {"": f"{command.module}:build_parser"}
    within = tuple(inner for inner in parsers if inner)
    found = [] if "" in parsers else [KnownProgram(name, command.help, (), within)]
    for inner, place in parsers.items():
        module, _, function = place.partition(":")
        parser = getattr(import_module(module), function)()
        flags = tuple(_flag(action) for action in parser._actions if action.option_strings)
        words = tuple(
            str(one) for action in parser._actions if not action.option_strings for one in action.choices or ()
        )
        own = (*(within if not inner else ()), *words)
        found.append(KnownProgram(f"{name} {inner}".strip(), _one_line(parser.description or command.help), flags, own))
    return found


def _flag(action: argparse.Action) -> KnownFlag:
    choices = tuple(str(choice) for choice in action.choices or ())
    takes_value = action.nargs != 0
    return KnownFlag(tuple(action.option_strings), takes_value, choices, _one_line(action.help or ""))


def _one_line(text: str) -> str:
    """Help without argparse's fields, in printable characters."""
    plain = re.sub(r"\s*\(default: [^)]*%\(default\)[^)]*\)", "", text)
    return " ".join(plain.replace("%%", "%").split())


def _bash(programs: Sequence[KnownProgram]) -> str:
    flags = ""
    for one in programs:
        words = [*(name for flag in one.flags for name in flag.names), *one.programs]
        flags += f"    {shlex.quote(one.words)}) words={shlex.quote(' '.join(words))} ;;\n"
    values = "".join(
        f"    {_patterns(one, [flag])}) words={shlex.quote(' '.join(flag.choices))} ;;\n"
        for one in programs
        for flag in one.flags
        if flag.choices
    )
    plain = "".join(
        f"    {_patterns(one, [flag for flag in one.flags if flag.takes_value])}) files=1 ;;\n"
        for one in programs
        if any(flag.takes_value for flag in one.flags)
    )
    inner = " ".join(one.words.replace(" ", ":") for one in programs if " " in one.words)
    return f"""\
# bash completion of llava; written by `llava completion bash`.
_llava() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words="" files="" program
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=( $(compgen -W {shlex.quote(" ".join(COMMANDS))} -- "$current") )
    return
  fi
  program="${{COMP_WORDS[1]}}"
  if (( COMP_CWORD > 2 )) && [[ " {inner} " == *" $program:${{COMP_WORDS[2]}} "* ]]; then
    program="$program ${{COMP_WORDS[2]}}"
  fi
  case "$program $previous" in
{values}{plain}  esac
  if [[ -z "$words" && -z "$files" && ( "$current" == -* || $COMP_CWORD -eq 2 ) ]]; then
    case "$program" in
{flags}    esac
    [[ "$current" != -* ]] && words="$(printf '%s\\n' $words | grep -v '^-')"
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F _llava llava
"""


def _patterns(program: KnownProgram, flags: Sequence[KnownFlag]) -> str:
    """A pattern of `case` for a program's words and one of the flags."""
    return "|".join(shlex.quote(f"{program.words} {name}") for flag in flags for name in flag.names)


def _zsh(programs: Sequence[KnownProgram]) -> str:
    def described(pairs: Sequence[tuple[str, str]]) -> str:
        return " ".join(shlex.quote(name.replace(":", r"\:") + ":" + about) for name, about in pairs)

    cases = ""
    for one in programs:
        pairs = [(name, flag.about) for flag in one.flags for name in flag.names]
        inner = [(word, f"llava {one.words} {word}") for word in one.programs]
        cases += f"    {shlex.quote(one.words)}) flags=({described(pairs)}); inner=({described(inner)}) ;;\n"
    values = "".join(
        f"    {_patterns(one, [flag])}) compadd -- {' '.join(map(shlex.quote, flag.choices))}; return ;;\n"
        for one in programs
        for flag in one.flags
        if flag.choices
    )
    within = " ".join(shlex.quote(one.words) for one in programs if " " in one.words)
    return f"""\
#compdef llava
# zsh completion of llava; written by `llava completion zsh`.
_llava() {{
  local -a commands flags inner within
  local program
  commands=({described([(name, command.help) for name, command in COMMANDS.items()])})
  within=({within})
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  program="$words[2]"
  if (( CURRENT > 3 )) && (( $within[(Ie)$program $words[3]] )); then
    program="$program $words[3]"
  fi
  case "$program $words[CURRENT-1]" in
{values}  esac
  case "$program" in
{cases}  esac
  if [[ "$words[CURRENT]" == -* ]]; then
    _describe flag flags
  else
    (( CURRENT == 3 && $#inner )) && _describe program inner
    _files
  fi
}}
if [[ "$funcstack[1]" == _llava ]]; then _llava "$@"; else compdef _llava llava; fi
"""


def _fish(programs: Sequence[KnownProgram]) -> str:
    lines = ["# fish completion of llava; written by `llava completion fish`."]
    for name, command in COMMANDS.items():
        lines.append(f"complete -c llava -n __fish_use_subcommand -f -a {name} -d {_in_fish(command.help)}")
    for one in programs:
        first, _, second = one.words.partition(" ")
        seen = f"__fish_seen_subcommand_from {first}" + (
            f"; and __fish_seen_subcommand_from {second}" if second else ""
        )
        for word in one.programs:
            lines.append(f"complete -c llava -n {_in_fish(seen)} -a {word} -d {_in_fish(f'llava {one.words} {word}')}")
        for flag in one.flags:
            spelled = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names]
            value = f" -x -a {_in_fish(' '.join(flag.choices))}" if flag.choices else " -r" if flag.takes_value else ""
            lines.append(f"complete -c llava -n {_in_fish(seen)} {' '.join(spelled)}{value} -d {_in_fish(flag.about)}")
    return "\n".join(lines) + "\n"


def _in_fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}


if __name__ == "__main__":
    sys.exit(main())
