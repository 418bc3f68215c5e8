"""Bring a checkpoint of several shards, or of an old layout, into one weight file.

python -m llava.model.consolidate --src ./llava-7b --dst ./llava-7b-consolidated
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.convert.convert import ConversionOptions, convert
from llava.model.utils import auto_upgrade


def consolidate_ckpt(src_path: str, dst_path: str) -> None:
    """Write the checkpoint at `src_path` anew, as one file in the original layout."""
    print("Loading model")
    auto_upgrade(src_path)
    convert(src_path, dst_path, to="original", options=ConversionOptions(shard_bytes=10**15))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m llava.model.consolidate", description="Write a checkpoint as one file.")
    parser.add_argument("--src", required=True, metavar="FOLDER", help="the checkpoint")
    parser.add_argument("--dst", required=True, metavar="FOLDER", help="where the result goes; does not exist yet")
    return parser


def run(args: Namespace) -> None:
    consolidate_ckpt(args.src, args.dst)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
