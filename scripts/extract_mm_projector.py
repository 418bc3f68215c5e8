"""Write the projector's tensors of a checkpoint, .bin or safetensors, into one file.

    python scripts/extract_mm_projector.py --model-path ./llava-v1.5-7b --output ./mm_projector.bin

What it does is in llava/convert/layouts/projector.py; `llava convert --to projector` writes a folder that loads beside a base.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.convert.layouts.projector import extract_mm_projector


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="extract_mm_projector.py", description="Extract the projector of a checkpoint.")
    parser.add_argument("--model-path", required=True, metavar="FOLDER", help="the checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, which does not exist yet")
    return parser


def run(args: Namespace) -> None:
    proof = extract_mm_projector(args.model_path, args.output)
    print(f"wrote {args.output}: {proof.num_tensors} tensors, largest difference {proof.largest:.3g}")


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
