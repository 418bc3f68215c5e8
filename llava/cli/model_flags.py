"""The flags by which a program is told its model, the same for all of them.

In: a parser, or a group of its flags. Out: flags, and what the two for rounded weights mean. Nothing here imports torch.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def add_path_flag(flags: Any) -> None:
    flags.add_argument(
        "--model-path",
        "-m",
        metavar="FOLDER",
        help="folder or hub repository (default: the small model in the package)",
    )


def add_loading_flags(flags: Any) -> None:
    """--model-base, --device and --dtype."""
    flags.add_argument("--model-base", metavar="FOLDER", help="language model under a LoRA or projector folder")
    flags.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    flags.add_argument("--dtype", default="auto", help="auto, bf16, fp16 or fp32 (default: what suits the device)")


def add_model_flags(flags: Any, *, bits: bool = True) -> None:
    """All of the above, --conv-mode and, with `bits`, --load-8bit and --load-4bit."""
    add_path_flag(flags)
    add_loading_flags(flags)
    if bits:
        either = flags.add_mutually_exclusive_group()
        either.add_argument("--load-8bit", action="store_true", help="weights in 8 bits")
        either.add_argument("--load-4bit", action="store_true", help="weights in 4 bits")
    flags.add_argument(
        "--conv-mode", metavar="NAME", help="conversation template (default: what the model's files say)"
    )


def quantization_from(args: Namespace) -> str | None:
    """What `llava.load` calls the chosen bits."""
    return "8bit" if args.load_8bit else "4bit" if args.load_4bit else None
