"""The flags that choose a model and say how it samples, the same in all programs, and what they mean.

In: a parser, or a group of its flags; what was parsed. Out: flags; the path to load; the quantization; the sampling
parameters. Nothing here imports torch. Loading itself is model/builder.py.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from llava.cli.program import Flags
from llava.engine.request import SamplingParams
from llava.errors import InputError
from llava.model.checkpoints.catalog import EMBEDDED
from llava.model.checkpoints.hub import gguf_pair, is_gguf, looks_like_repository, resolve_checkpoint
from llava.model.checkpoints.inspect import inspect


def add_path_flag(flags: Flags) -> None:
    where = "name (llava models), folder, hub repository or .gguf file (default: tiny, in the package)"
    flags.add_argument("--model-path", "-m", metavar="MODEL", help=where)


def add_loading_flags(flags: Flags) -> None:
    """--mmproj, --model-base, --device and --dtype."""
    flags.add_argument("--mmproj", metavar="FILE", help="tower and projector of a GGUF file (default: found beside it)")
    flags.add_argument("--model-base", metavar="FOLDER", help="language model under a LoRA or projector folder")
    flags.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    flags.add_argument("--dtype", default="auto", help="auto, bf16, fp16 or fp32 (default: what suits the device)")


def add_model_flags(flags: Flags, *, bits: bool = True) -> None:
    """All of the above, --conv-mode and, with `bits`, --load-8bit and --load-4bit."""
    add_path_flag(flags)
    add_loading_flags(flags)
    if bits:
        either = flags.add_mutually_exclusive_group()
        either.add_argument("--load-8bit", action="store_true", help="weights in 8 bits")
        either.add_argument("--load-4bit", action="store_true", help="weights in 4 bits")
    flags.add_argument("--conv-mode", metavar="NAME", help="conversation template (default: as the model's files say)")


def quantization_from(args: Namespace) -> str | None:
    """Translate --load-8bit and --load-4bit to the `quantization` argument of `llava.load`."""
    return "8bit" if args.load_8bit else "4bit" if args.load_4bit else None


def sampling_from(args: Namespace) -> SamplingParams:
    """Build the sampling parameters of the flags that have their names.

    A flag that the program does not have, or that was left out, is not given: the model's default holds.
    """
    for name in ("top_p", "top_k"):
        if getattr(args, name, None) is not None and args.temperature == 0:
            raise InputError(f"--{name.replace('_', '-')} has no effect at temperature 0; give --temperature as well")
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "num_beams", "max_new_tokens")
    return SamplingParams.given(**{name: getattr(args, name, None) for name in names})


def find_model(path: str | None, mmproj: str | None = None) -> str:
    """Return the folder or hub repository to load, checked without torch.

    Args:
        path: A folder, hub repository or GGUF file; None is the model in the package.
        mmproj: For a GGUF file, the one with its tower and projector.

    Raises:
        InputError: the model's files show that it cannot be loaded.
    """
    if mmproj is not None:
        return str(gguf_pair(path, mmproj))
    if path is None:
        from llava.assets import embedded_model_path

        return str(embedded_model_path())
    if is_gguf(path) or path == EMBEDDED:
        path = str(resolve_checkpoint(path))
    if Path(path).expanduser().exists() or not looks_like_repository(path):
        inspect(path)
    return path


def choose_conv_mode(given: str | None, inferred: str) -> str:
    """Return the given template, else the one that the model implies; warn where they differ."""
    if given is not None and given != inferred:
        differ = f"the auto inferred conversation mode is {inferred}, while `--conv-mode` is {given}"
        print(f"[WARNING] {differ}, using {given}")
    return given or inferred
