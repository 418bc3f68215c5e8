"""`llava rm`: remove the copy of a model that was downloaded.

In: a name, or a repository of the hub. Out: the hub library's cache without that repository; nothing else is touched, neither
other repositories nor folders of the user.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.cli.waits import size_text
from llava.errors import InputError
from llava.model.checkpoints.catalog import EMBEDDED, did_you_mean, repository_of
from llava.model.checkpoints.hub import cache_of, looks_like_repository

EXAMPLES = """\
examples:
  llava rm llava-1.5-7b              asks before it removes
  llava rm llava-1.5-7b --yes        for scripts
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava rm", description="Remove the copy of a model that was downloaded.", epilog=EXAMPLES
    )
    parser.add_argument("name", metavar="NAME", help="a name that llava models lists, or a hub repository")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> int:
    repository = _repository(args.name)
    folder = cache_of(repository)
    if not folder.is_dir():
        raise InputError(f"{args.name} is not downloaded ({folder} does not exist); llava models says what is")
    size = size_text(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()))
    if not args.yes:
        if not sys.stdin.isatty():
            raise InputError(f"removing {args.name} ({size}) needs --yes where nobody can be asked")
        if input(f"remove {repository}, {size}, from {folder.parent}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 0
    shutil.rmtree(folder)
    shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)
    print(f"removed {repository}, {size}")
    return 0


def _repository(name: str) -> str:
    if name == EMBEDDED:
        raise InputError(f"{EMBEDDED!r} comes with the package and is not removed")
    found = repository_of(name)
    if found is not None:
        return found
    if Path(name).expanduser().exists() or not looks_like_repository(name):
        meant = did_you_mean(name) or "; see llava models"
        raise InputError(f"{name!r} is no name or repository of a downloaded model{meant}")
    return name


if __name__ == "__main__":
    sys.exit(main())
