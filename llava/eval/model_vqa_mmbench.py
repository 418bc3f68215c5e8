"""Answer MMBench's questions, once or with the options in every order.

    python -m llava.eval.model_vqa_mmbench --model-path llava-v1.5-13b --question-file mmbench_dev_20230712.tsv \\
        --answers-file answers.jsonl --single-pred-prompt --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.eval.files import read_table
from llava.eval.tasks.mmbench import SUFFIXES, table_items
from llava.eval.vqa_program import (
    FREE_TOKENS,
    add_answer_flags,
    add_sampling_flags,
    answer_file,
    get_chunk,
    split_list,
)

__all__ = ["build_parser", "get_chunk", "main", "split_list"]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="model_vqa_mmbench.py", description="Answer MMBench's questions.")
    add_answer_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--all-rounds", action="store_true", help="ask again with the options in every order")
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    parser.add_argument("--lang", type=str, default="en", help="en or cn: the language of that request (default: en)")
    return parser


def run(args: Namespace) -> None:
    if args.lang not in SUFFIXES:
        raise InputError(f"--lang is {args.lang!r}; known: {', '.join(SUFFIXES)}")
    rows = read_table(Path(args.question_file).expanduser(), "MMBench's table", needed=("index", "question", "image"))
    chunk = get_chunk(rows, args.num_chunks, args.chunk_idx)
    suffix = SUFFIXES[args.lang] if args.single_pred_prompt else None
    items = table_items(chunk, suffix=suffix, all_rounds=args.all_rounds, whole=rows)
    answer_file(args, items, max_new_tokens=FREE_TOKENS)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
