"""Answer ScienceQA's questions, with and without images.

    python -m llava.eval.model_vqa_science --model-path llava-v1.5-13b --question-file llava_test_CQM-A.json \\
        --image-folder images/test --answers-file answers.jsonl --single-pred-prompt --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.files import read_json_rows
from llava.eval.tasks.scienceqa import sample_items
from llava.eval.vqa_program import FREE_TOKENS, add_answer_flags, answer_file, get_chunk, split_list

__all__ = ["build_parser", "get_chunk", "main", "split_list"]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="model_vqa_science.py", description="Answer ScienceQA's questions.")
    add_answer_flags(parser, questions="tables/question.json", conv_mode="llava_v0")
    parser.add_argument(
        "--answer-prompter", action="store_true", help="accepted for old scripts; changes nothing, as in the original"
    )
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    return parser


def run(args: Namespace) -> None:
    rows = read_json_rows(Path(args.question_file).expanduser(), "file of questions")
    items = sample_items(rows, Path(args.image_folder), letter=args.single_pred_prompt)
    answer_file(args, get_chunk(items, args.num_chunks, args.chunk_idx), max_new_tokens=FREE_TOKENS)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
