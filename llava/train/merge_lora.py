"""`llava merge`: lay a trained adapter into its base model, for a checkpoint that loads by itself.

In: a LoRA folder and its base model. Out: a folder in the published layout, tokenizer and projector included. The sums are
made in float32 (model/lora.py) and rounded once, to the precision that the result is stored in.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.errors import InputError
from llava.model.builder import load
from llava.model.checkpoint import CheckpointInfo, inspect
from llava.program import ArgumentParser, run_program

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# The same by the names that weight files use; what a base is stored in besides (integers) is no precision to store into.
STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def merge_lora(model_path: str, model_base: str | None, save_model_path: str, dtype: str | None = None) -> Path:
    """Merge the adapter in `model_path` and save the model; without a base, the one that the adapter's files name.

    Without `dtype` the result is stored in the precision of the base's own files.
    """
    info = inspect(model_path)
    if info.kind != "lora":
        raise InputError(
            f"{model_path} holds no LoRA adapter, so there is nothing to merge (it is of kind {info.kind!r})"
        )
    target = Path(save_model_path)
    if target.exists() and any(target.samefile(folder) for folder in (model_path, model_base) if folder):
        raise InputError(f"--save-model-path {save_model_path!r} is one of the folders to be merged; name another")
    base = model_base or info.base_hint
    if base is None:
        raise InputError(f"the files of {model_path} name no base model; give it with --model-base")
    # float32 until the end, so that the projector's trained numbers are rounded no more often than the merged ones.
    loaded = load(model_path, base=model_base, device="cpu", dtype=torch.float32)
    loaded.model.to(DTYPES[dtype] if dtype else stored_dtype(inspect(base)))
    loaded.save(target)
    return target


def stored_dtype(info: CheckpointInfo) -> torch.dtype:
    """The precision that most of a checkpoint's numbers are stored in."""
    counts = Counter(dict.fromkeys(STORED, 0))
    for header in info.tensors.values():
        counts[header.dtype] += header.num_elements
    return STORED[max(STORED, key=lambda name: counts[name])]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="llava merge", description="Merge a LoRA adapter into its base model.")
    parser.add_argument("--model-path", required=True, metavar="FOLDER", help="folder that a LoRA run wrote")
    parser.add_argument(
        "--model-base", metavar="FOLDER", help="its base model (default: what the adapter's files name)"
    )
    parser.add_argument("--save-model-path", required=True, metavar="FOLDER", help="where the whole model goes")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="precision of the result (default: the base's own)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(_program, build_parser().parse_args(argv), name="llava merge")


def _program(args: Namespace) -> None:
    folder = merge_lora(args.model_path, args.model_base, args.save_model_path, args.dtype)
    print(f"merged into {folder}; try: llava chat -m {folder} PICTURE QUESTION")


if __name__ == "__main__":
    sys.exit(main())
