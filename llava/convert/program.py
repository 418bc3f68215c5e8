"""`llava convert`: convert a checkpoint from one layout to another and verify the result.

In: a command line. Out: a new folder and a summary of what was verified, or one error and nothing written. The conversion is
in convert.py, the options' values are in options.py.
"""

from __future__ import annotations

import ctypes
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.convert.options import (
    DTYPES,
    LAYOUTS,
    NAME_VERSIONS,
    NEEDS_BASE,
    PRECISIONS,
    TOWER_PLACES,
    VERIFICATIONS,
    parse_size,
)
from llava.errors import InputError
from llava.files import refuse_existing
from llava.model.checkpoints.hub import gguf_pair
from llava.model.checkpoints.inspect import inspect

EXAMPLES = """\
examples:
  llava convert ./llava-v1.5-7b ./llava-v1.5-7b-hf --to transformers
  llava convert ./llava-1.5-7b-hf ./llava-v1.5-7b --to original
  llava convert ./llava-v1.5-7b ./gguf --to gguf --precision q8_0
  llava convert ./llava-v1.5-7b-q8_0.gguf ./llava-v1.5-7b --mmproj ./mmproj-f16.gguf --to original
  llava convert ./llava-lora ./merged --to original --base ./vicuna-7b
  llava convert ./llava-v1.5-7b ./projector --to projector
  llava convert ./llava-v1.5-7b ./small --to original --dtype bf16 --shard-size 2GB --tower in

layouts:
"""
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE_BLOCK = 4 * 2**20  # bytes


def build_parser() -> ArgumentParser:
    width = max(map(len, LAYOUTS))
    parser = ArgumentParser(
        prog="llava convert",
        description="Write a checkpoint in another layout, tensor by tensor, and verify that it is the same model.",
        epilog=EXAMPLES + "\n".join(f"  {name:<{width}}  {what}" for name, what in LAYOUTS.items()),
    )
    parser.add_argument("source", metavar="SOURCE", help="a model folder, hub repository or .gguf file")
    parser.add_argument("target", metavar="TARGET", help="a folder that does not exist yet")
    parser.add_argument("--to", required=True, choices=LAYOUTS, metavar="LAYOUT", help="the target's layout, see below")
    parser.add_argument("--base", metavar="FOLDER", help="the language model under an adapter, projector or delta")
    parser.add_argument(
        "--mmproj", metavar="FILE", help="tower and projector of a .gguf file (default: found beside it)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the target (default: each tensor keeps its own)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="bytes of a weight file at most (5GB)")
    tower = "the vision tower's weights as the source has them, in the checkpoint, or out of it in a folder beside them"
    names = "tensor names of this version of the library; 4.36 is read by all later ones and by vLLM"
    for flag, choices, help in (
        ("--tower", TOWER_PLACES, f"original layout: {tower}"),
        ("--key-names", NAME_VERSIONS, f"transformers layout: {names}"),
        ("--precision", PRECISIONS, "gguf: of matrices"),
        ("--proof", VERIFICATIONS, "compare tensors and logits, or tensors alone"),
    ):
        parser.add_argument(flag, choices=choices, default=choices[0], help=f"{help} ({choices[0]})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    shard_bytes = parse_size(args.shard_size)
    refuse_existing(Path(args.target))
    if args.to in NEEDS_BASE and args.base is None:
        raise InputError(f"--to {args.to} needs the base model's folder; give it with --base")
    if args.mmproj is not None:
        args.source = str(gguf_pair(args.source, args.mmproj))
    inspect(args.source)  # errors that headers show are raised before libraries are loaded
    from llava.convert.convert import ConversionOptions, convert

    _return_large_blocks()
    options = ConversionOptions(
        dtype=args.dtype,
        shard_bytes=shard_bytes,
        tower=args.tower,
        names=args.key_names,
        precision=args.precision,
        verification=args.proof,
    )
    print(convert(args.source, args.target, to=args.to, base=args.base, options=options).summary())


def _return_large_blocks() -> None:
    """Make glibc return every large block to the system when it is freed.

    By default it learns to keep blocks of up to 32 MB, and those of activations and weights fragment its heap by gigabytes.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


if __name__ == "__main__":
    sys.exit(main())
