"""Add a base model's weights to a published difference.

python -m llava.model.apply_delta --base-model-path ./llama-7b --target-model-path ./llava-7b --delta-path ./llava-7b-delta
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.convert.convert import convert
from llava.convert.options import describe


def apply_delta(base_model_path: str, target_model_path: str, delta_path: str) -> None:
    """Write `delta + base` to `target_model_path`."""
    print("Applying delta")
    report = convert(delta_path, target_model_path, to="from-delta", base=base_model_path)
    print("\n".join(describe(report)))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m llava.model.apply_delta", description="Add a base model's weights.")
    parser.add_argument("--base-model-path", required=True, metavar="FOLDER", help="the base model")
    parser.add_argument("--target-model-path", required=True, metavar="FOLDER", help="where the whole model goes")
    parser.add_argument("--delta-path", required=True, metavar="FOLDER", help="the published difference")
    return parser


def run(args: Namespace) -> None:
    apply_delta(args.base_model_path, args.target_model_path, args.delta_path)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
