"""What every program of this package does alike: parse flags, run, and end with one sentence and the right exit status.

In: a function and its arguments. Out: an exit status. 0: done. 2: the user gave something that cannot work, told in one
sentence on stderr, which begins with the name by which the user called the program. 130: interrupted. 141: the reader of
our output went away. Any other exception is our own fault and keeps its traceback. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from llava.errors import InputError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def called_as(name: str) -> str:
    """The name by which the user called a program: `name`, unless Python itself was told to run a module of this package.

    `name` is that of the `llava` command (`llava eval score`), or of a program that has no command. Run as a module or as a
    file, the former is `python -m llava.eval.harness.main score` or `eval/harness/main.py score`.
    """
    main = sys.modules.get("__main__")
    file = os.path.abspath(getattr(main, "__file__", None) or "")
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not file.startswith(package + os.sep) or file == os.path.join(package, "__main__.py"):
        return name
    spec = getattr(main, "__spec__", None)  # none when a file was run
    words = name.split()[2:] if name.startswith("llava ") else []
    return " ".join([f"python -m {spec.name}" if spec else os.path.basename(file), *words])


def run_program(function: Callable[..., int | None], *args: Any, name: str) -> int:
    """Call `function` and turn what ends it into an exit status; None counts as 0. `name` begins what is said on stderr."""
    try:
        status = function(*args) or 0
        sys.stdout.flush()  # here, where a closed pipe can still be met quietly
        return status
    except InputError as error:
        return print_error(str(error), name=name)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def print_error(sentence: str, *, name: str) -> int:
    """Write the one line that a user reads about what they gave, whatever line breaks it came with."""
    print(f"{name}: error: {' '.join(sentence.split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


def closest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` when something known is spelled like `word`, else nothing."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence, with the known flag that an unknown one resembles.

    Words and flags may come in any order. `prog` is what `called_as` takes, and the name in every line of `--help` and of
    errors, those of the run included.
    """

    def __init__(self, *, prog: str, **settings: Any) -> None:
        super().__init__(prog=called_as(prog), **settings)

    def run(self, function: Callable[[Any], int | None], argv: Sequence[str] | None = None) -> int:
        """Call `function` on the parsed words (`sys.argv` without any) and turn what ends it into an exit status."""
        return run_program(function, self.parse_args(argv), name=self.prog)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        words_only = (
            args.index("--") if "--" in args else len(args)
        )  # what follows "--" is no flag, whatever it looks like
        args, plain = args[:words_only], args[words_only + 1 :]
        # Before anything else: a misspelt flag is the reason for most other complaints.
        for word in args:
            if word.startswith("--") and not self._flags_meant(word):
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
        return parsed

    def _flags_meant(self, word: str) -> list[str]:
        """The long flags that a word may mean: itself, or those that it begins."""
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
        # People mix up hyphens and underlines more than letters.
        same = [option for option in known if option.replace("-", "_") == flag.replace("-", "_")]
        hint = f"; did you mean {same[0]!r}?" if same else closest(flag, known)
        self.error(f"unknown flag {flag!r}{hint}")

    def error(self, message: str) -> NoReturn:
        sentence = " ".join(message.split()).rstrip(".")
        self.exit(print_error(f"{sentence} (all flags: {self.prog} --help)", name=self.prog))
