"""The program `llava data`: `check FILE` validates training data (check.py), `show FILE` prints one sample (show.py).

In: a command line. Out: an exit status. What the programs do is imported when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence

from llava.cli.program import ArgumentParser, called_as, run_program
from llava.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in PROGRAMS:
        return PROGRAMS[words[0]](words[1:])
    name = called_as("llava data")
    return run_program(_choose, words, name, name=name)


def _choose(words: Sequence[str], name: str) -> None:
    """Print the list of programs, or refuse an unknown one."""
    if words and words[0] not in ("-h", "--help"):
        raise InputError(f"unknown command {words[0]!r} (known: {', '.join(PROGRAMS)})")
    print(f"usage: {name} check FILE ...   list the faults of a file's samples")
    print(f"       {name} show FILE ...    print one sample as training reads it")
    print(f"\n  {name} check --help, {name} show --help: their flags")


def check_program(argv: Sequence[str]) -> int:
    return check_parser().run(_check, argv)


def show_program(argv: Sequence[str]) -> int:
    return show_parser().run(_show, argv)


def _check(options: Namespace) -> int:
    from llava.data import check

    return check.run(options)


def _show(options: Namespace) -> None:
    from llava.data import show

    show.run(options)


PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {"check": check_program, "show": show_program}


def check_parser() -> ArgumentParser:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = ArgumentParser(prog="llava data check", description="List the faults of a training set, by id.")
    parser.add_argument("file", metavar="FILE", help="as --data_path: a file, folder, pattern, hub name, or a mixture")
    parser.add_argument("--image-folder", help="the folder that the samples' images are relative to")
    parser.add_argument("--image-urls", action="store_true", help="download images that are named by http(s) addresses")
    parser.add_argument("--no-images", action="store_true", help="do not open the images")
    parser.add_argument("--model-path", help="count tokens with this model's tokenizer, and judge lengths by its limit")
    parser.add_argument("--max-length", type=_positive, help="judge lengths by this limit instead")
    parser.add_argument("--conv-mode", help="conversation template; the model's own if absent")
    parser.add_argument("--workers", type=_positive, default=cores, help="processes (default: one per core)")
    parser.add_argument("--show", type=_positive, default=10, help="faults to print of each kind (default: 10)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def show_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="llava data show", description="Print a training sample as training reads it.")
    parser.add_argument("file", metavar="FILE", help="as --data_path: a file, folder, pattern, hub name, or a mixture")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, default=0, help="the sample's number, from 0 (default: the first)")
    which.add_argument("--id", help="the sample's id")
    parser.add_argument("--image-folder", help="the folder that the samples' images are relative to")
    parser.add_argument(
        "--model-path", help="the model whose tokenizer and template to use (default: the embedded one)"
    )
    parser.add_argument("--conv-mode", help="conversation template; the model's own if absent")
    parser.add_argument("--max-length", type=int, help="the length limit in tokens; the model's own if absent")
    return parser


if __name__ == "__main__":
    sys.exit(main())
