"""`llava merge`: merge a LoRA adapter into its base model, for a checkpoint that loads by itself.

In: a LoRA folder and its base model. Out: a folder in the original layout, tokenizer and projector included. It is
`llava convert --to original` with the original's flags; sums are computed in float32 (model/checkpoints/lora.py) and
rounded once, to the dtype that the result is stored in.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.convert.options import DTYPES
from llava.errors import InputError


def merge_lora(model_path: str, model_base: str | None, save_model_path: str, dtype: str | None = None) -> Path:
    """Merge an adapter into its base model and return the folder that was written, which must not exist before.

    Args:
        model_path: The folder that a LoRA run wrote.
        model_base: The base model; None takes the one that the adapter's files name.
        dtype: fp16, bf16 or fp32; None keeps the dtype of the base's files.

    Raises:
        InputError: `model_path` holds no LoRA adapter, or the adapter does not fit its base.
    """
    from llava.convert.convert import ConversionOptions, convert
    from llava.model.checkpoints.inspect import inspect

    info = inspect(model_path)
    if info.kind != "lora":
        raise InputError(
            f"{model_path} holds no LoRA adapter, so there is nothing to merge (it is of kind {info.kind!r})"
        )
    report = convert(
        model_path, save_model_path, to="original", base=model_base, options=ConversionOptions(dtype=dtype)
    )
    print(report.summary())
    return report.target


def build_parser(prog: str = "llava merge") -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description="Merge a LoRA adapter into its base model.")
    parser.add_argument("--model-path", required=True, metavar="FOLDER", help="folder that a LoRA run wrote")
    parser.add_argument(
        "--model-base", metavar="FOLDER", help="its base model (default: what the adapter's files name)"
    )
    parser.add_argument("--save-model-path", required=True, metavar="FOLDER", help="where the whole model goes")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the result (default: the base's own)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


def run(args: Namespace) -> None:
    folder = merge_lora(args.model_path, args.model_base, args.save_model_path, args.dtype)
    print(f"merged into {folder}; try: llava chat -m {folder} IMAGE QUESTION")


if __name__ == "__main__":
    sys.exit(main())
