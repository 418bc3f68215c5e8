"""Answer text questions with a language model, or with a LLaVA that is shown nothing.

python llava/eval/model_qa.py --model-name ./vicuna-7b --question-file table/question.jsonl --answers-file answer.jsonl
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.tasks.short import questions
from llava.eval.vqa_program import FREE_TOKENS, answer_file


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="model_qa.py", description="Answer text questions.")
    parser.add_argument(
        "--model-name", type=str, default=None, help="folder or hub repository (default: the model in the package)"
    )
    parser.add_argument("--question-file", type=str, default="tables/question.jsonl", help="the questions, JSON lines")
    parser.add_argument(
        "--answers-file", type=str, default="answer.jsonl", help="the file to write (default: answer.jsonl)"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu (default: auto)")
    return parser


def run(args: Namespace) -> None:
    items = questions(Path(args.question_file).expanduser(), Path())
    settings = Namespace(
        model_path=args.model_name, model_base=None, device=args.device, conv_mode=None, temperature=0.2,
        answers_file=args.answers_file,
    )  # fmt: skip
    answer_file(settings, items, max_new_tokens=FREE_TOKENS)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
