"""Argument parsing, error messages and exit statuses of all programs.

In: a function and its arguments. Out: an exit status. 0: done. 2: wrong input, described in one line on stderr that begins
with the program's name as the user called it; so are errors of the system about a path, and a full disk. 130: interrupted.
141: the reader of stdout is gone. Any other exception is a bug and keeps its traceback. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from llava.cli.waits import shown_waits
from llava.errors import InputError, describe_system_error

Flags = argparse._ActionsContainer  # a parser or a group of its flags

Defaults = Callable[[argparse.ArgumentParser, Sequence[str]], frozenset[str]]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def called_as(name: str) -> str:
    """Return the name by which the user called a program, such as `llava eval score`.

    Where a module of this package was run, it is `python -m llava.eval.harness.main score`; where a file was run, the file's
    name and `score`.
    """
    main = sys.modules.get("__main__")
    file = os.path.abspath(getattr(main, "__file__", None) or "")
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not file.startswith(package + os.sep) or file == os.path.join(package, "__main__.py"):
        return name
    spec = getattr(main, "__spec__", None)  # none when a file was run
    words = name.split()[2:] if name.startswith("llava ") else []
    return " ".join([f"python -m {spec.name}" if spec else os.path.basename(file), *words])


def run_program(function: Callable[..., int | None], *args: object, name: str) -> int:
    """Call `function`, and return its exit status or that of the exception; None counts as 0. `name` begins error lines.

    What it waits for is shown.
    """
    try:
        with shown_waits():
            status = function(*args) or 0
        sys.stdout.flush()  # here, where a closed pipe can still be handled
        return status
    except InputError as error:
        return print_error(str(error), name=name)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end, which would print a warning.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        sentence = describe_system_error(error)
        if sentence is None:
            raise
        return print_error(sentence, name=name)


def print_error(message: str, *, name: str) -> int:
    """Print an error as one line on stderr, and return the exit status for wrong input."""
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


def closest(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` where a known word is spelled like `word`, else an empty string."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def add_number(flags: Flags, name: str, default: float, unit: str, help: str) -> None:
    """Add a flag that takes a number of the default's type, which `--help` names after the help."""
    text = f"{help} (default: {default:g})"
    flags.add_argument(name, type=type(default), default=default, metavar=unit, help=text)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line, which suggest the flag that an unknown one resembles.

    Words and flags may come in any order.

    Args:
        prog: The argument of `called_as`, whose result is the program's name in `--help` and in errors.
        epilog: Examples; several lines are printed as they are.
        first: Names of flags and positionals that `--help` shows before all others.
        defaults: Changes defaults before parsing, and names what it set (config_file.py).
    """

    def __init__(
        self,
        *,
        prog: str,
        epilog: str = "",
        first: Sequence[str] = (),
        defaults: Defaults | None = None,
        **settings: Any,
    ) -> None:
        formatter = argparse.RawDescriptionHelpFormatter if "\n" in epilog else argparse.HelpFormatter
        super().__init__(prog=called_as(prog), epilog=epilog, formatter_class=formatter, **settings)
        self._first = first
        self._usage = self.usage  # argparse changes it while it parses
        self._change_defaults = defaults

    def format_help(self) -> str:
        if not self._first:
            return super().format_help()
        named = {name: action for action in self._actions for name in (*action.option_strings, action.dest)}
        first = [named[name] for name in self._first]
        formatter = self._get_formatter()
        words = " ".join(f"[{action.metavar or action.dest}]" for action in self._actions if not action.option_strings)
        usage = self._usage or f"%(prog)s [FLAGS] {words}".rstrip()
        formatter.add_usage(usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        groups = [
            (group.title, [action for action in group._group_actions if action not in first])
            for group in self._action_groups
        ]
        titles = {"options": "other"}
        # argparse's own groups, which have what belongs nowhere, come last.
        for title, actions in [("most used", first), *groups[2:], *groups[:2]]:
            formatter.start_section(titles.get(str(title), title))
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def run(self, function: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None = None) -> int:
        """Parse `argv`, else `sys.argv`, call `function` on the result, and return the exit status."""
        return run_program(function, self.parse_args(argv), name=self.prog)

    def parse_args(  # type: ignore[override]  # a namespace of another type is not used here
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else list(args)
        configured: frozenset[str] = frozenset()
        if self._change_defaults is not None and not {"-h", "--help"} & set(args):
            try:
                configured = self._change_defaults(self, args)
            except InputError as error:
                self.exit(print_error(str(error), name=self.prog))
        end = args.index("--") if "--" in args else len(args)
        args, plain = args[:end], args[end + 1 :]  # no word after "--" is a flag
        # First of all: a misspelt flag causes most other errors.
        for word in args:
            if word.startswith("--") and not self._matching_flags(word):
                self._refuse(word)
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            flags = [word for word in unknown if word.startswith("-") and word != "-"]
            self._refuse(flags[0] if flags else unknown[0])
        if plain:
            many = next((action for action in self._actions if not action.option_strings and action.nargs == "*"), None)
            if many is None:
                self.error(f"unexpected argument {plain[0]!r}")
            setattr(parsed, many.dest, [*getattr(parsed, many.dest), *plain])
        if self._change_defaults is not None:
            parsed.configured = configured  # what comes from the file
        return parsed

    def _matching_flags(self, word: str) -> list[str]:
        """Return the long flags that a word may stand for: itself, or those that it begins."""
        flag = word.partition("=")[0]
        known = self._long_flags()
        return [flag] if flag in known else [option for option in known if option.startswith(flag)]

    def _long_flags(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        flag = word.partition("=")[0]
        known = self._long_flags()
        # Hyphens and underscores are mixed up more often than letters.
        same = [option for option in known if option.replace("-", "_") == flag.replace("-", "_")]
        hint = f"; did you mean {same[0]!r}?" if same else closest(flag, known)
        self.error(f"unknown flag {flag!r}{hint}")

    def error(self, message: str) -> NoReturn:
        sentence = " ".join(message.split()).rstrip(".")
        self.exit(print_error(f"{sentence} (all flags: {self.prog} --help)", name=self.prog))
