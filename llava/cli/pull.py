"""`llava pull`: download a model and all that it needs.

In: a name, or a repository of the hub. Out: its copy in the hub library's cache, with its base model and its vision tower where
they are repositories of their own. What is there already is not fetched again.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.cli.waits import size_text
from llava.errors import InputError
from llava.model.checkpoints.catalog import EMBEDDED, repository_of
from llava.model.checkpoints.hub import HubOptions, looks_like_repository, resolve_checkpoint, resolve_vision_tower
from llava.model.config import OWN_FOLDER

EXAMPLES = """\
examples:
  llava pull llava-1.5-7b
  llava pull liuhaotian/llava-v1.5-7b        any repository, with its vision tower
"""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="llava pull", description="Download a model and all that it needs.", epilog=EXAMPLES)
    parser.add_argument("name", metavar="NAME", help="a name that llava models lists, or a hub repository")
    parser.add_argument("--revision", metavar="REVISION", help="a branch, tag or commit (default: main)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    if args.name == EMBEDDED or Path(args.name).expanduser().exists():
        raise InputError(f"{args.name!r} is on this disk already; there is nothing to download")
    folder = resolve_checkpoint(args.name, hub=HubOptions(revision=args.revision))
    pull_parts(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{args.name} is here: {folder} ({size_text(size)})")
    known = repository_of(args.name) is not None or looks_like_repository(args.name)
    print(f"ask it: llava chat -m {args.name if known and args.revision is None else folder} IMAGE")


def pull_parts(folder: Path) -> None:
    """Download the base model and the vision tower that a model's files name."""
    from llava.model.checkpoints.base_model import inspect_with_base, original_config

    info, base = inspect_with_base(folder)
    stored = info.tower_in_checkpoint or (base is not None and base.tower_in_checkpoint)
    tower = original_config(info).get("mm_vision_tower") if info.is_multimodal else None
    if tower is not None and tower != OWN_FOLDER and not stored:
        resolve_vision_tower(str(tower), checkpoint_folder=folder)


if __name__ == "__main__":
    sys.exit(main())
