"""Train a LLaVA: `python -m llava.train.train --model_name_or_path ... --data_path ... --output_dir ...`.

In: a command line (arguments.py). Out: a folder that `load_pretrained_model` reads (run.py), and an exit status. torch and
transformers are imported when a run begins. Names that outside code imports from here are defined in other modules and
imported at first use.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.cli.program import run_program
from llava.cli.startup import quick_imports
from llava.cli.terminal import quiet_bitsandbytes
from llava.errors import InputError
from llava.train.distributed import barrier_and_destroy_process_group, program_name
from llava.train.short_help import short_help
from llava.utils import is_first_process, lazy_exports, rank0_print

if TYPE_CHECKING:
    from llava.train.llava_trainer import LLaVATrainer

# Names that outside code imports from here, by the module that defines them.
EXPORTS = {
    "llava.train.arguments": ("DataArguments", "ModelArguments", "TrainingArguments"),
    "llava.train.data": ("DataCollatorForSupervisedDataset", "LazySupervisedDataset", "make_supervised_data_module"),
    "llava.train.llava_trainer": ("LLaVATrainer",),
    "llava.train.lora": ("find_all_linear_names",),
    "llava.train.run_folder.save": (
        "get_mm_adapter_state_maybe_zero_3",
        "get_peft_state_maybe_zero_3",
        "get_peft_state_non_lora_maybe_zero_3",
        "maybe_zero_3",
        "safe_save_model_for_hf_trainer",
        "smart_tokenizer_and_embedding_resize",
    ),
    "llava.text.first_generation": ("_add_speaker_and_signal", "_mask_targets", "_tokenize_fn"),
    "llava.text.labels": (
        "preprocess",
        "preprocess_gemma",
        "preprocess_llama3",
        "preprocess_llama_2",
        "preprocess_mpt",
        "preprocess_multimodal",
        "preprocess_plain",
        "preprocess_qwen",
        "preprocess_v1",
    ),
    "llava.train.run": ("run",),
}
__all__ = ["main", "rank0_print", "train", *(name for names in EXPORTS.values() for name in names)]

__getattr__, __dir__ = lazy_exports(__name__, EXPORTS)


def train(attn_implementation: str | None = None, argv: Sequence[str] | None = None) -> LLaVATrainer:
    """Train as the command line (by default `sys.argv`) says, and save the result."""
    from llava.train.arguments import parse_train_args
    from llava.train.run import run

    model_args, data_args, training_args = parse_train_args(argv)
    return run(model_args, data_args, training_args, attn_implementation=attn_implementation)


def main(argv: Sequence[str] | None = None, attn_implementation: str | None = None) -> int:
    """Run the program; an error of the user's is one sentence and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    quiet_bitsandbytes()
    logging.getLogger("llava").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(short_help(program_name()), end="")
        return 0
    words = ["--help" if word == "--help-all" else word for word in words]
    return run_program(_program, words, attn_implementation, name=program_name())


def _program(argv: Sequence[str], attn_implementation: str | None) -> int:
    with quick_imports():
        import torch

        if not torch.accelerator.is_available():  # DeepSpeed, which transformers imports, warns otherwise
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import transformers

        import llava.train.run  # noqa: F401  # with what a run needs
    if not sys.stderr.isatty():  # a bar would fill a file with lines
        transformers.utils.logging.disable_progress_bar()
    try:
        status = _train_to_status(argv, attn_implementation)
    except InputError as error:
        # An error of a data loader's worker is wrapped in that process's traceback, with the message at its end.
        raise InputError(str(error).strip().rsplit("InputError: ", 1)[-1]) from error
    barrier_and_destroy_process_group()
    return status


def _train_to_status(argv: Sequence[str] | None, attn_implementation: str | None) -> int:
    """Train and return the exit status. A function of its own, so that its end drops the trainer."""
    from llava.train.callbacks import Stopped

    try:
        train(attn_implementation=attn_implementation, argv=argv)
    except Stopped as stopped:
        if is_first_process():
            print(f"{program_name()}: {stopped}", file=sys.stderr)
        return stopped.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
