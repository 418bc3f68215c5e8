"""Answer short questions about images: VQAv2, GQA, VizWiz, TextVQA, POPE, MME, SEED-Bench.

    python -m llava.eval.model_vqa_loader --model-path llava-v1.5-13b --question-file questions.jsonl \\
        --image-folder images --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.tasks.short import questions
from llava.eval.vqa_program import add_answer_flags, add_sampling_flags, answer_file, get_chunk, split_list

__all__ = ["build_parser", "get_chunk", "main", "split_list"]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="model_vqa_loader.py", description="Answer questions about images.")
    add_answer_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--max_new_tokens", type=int, default=128, help="at most so many per answer (default: 128)")
    return parser


def run(args: Namespace) -> None:
    items = questions(Path(args.question_file).expanduser(), Path(args.image_folder))
    answer_file(args, get_chunk(items, args.num_chunks, args.chunk_idx), max_new_tokens=args.max_new_tokens)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
