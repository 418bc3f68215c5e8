"""Let GPT-4 compare two answers to text questions, in the original's form.

python llava/eval/eval_gpt_review.py -q question.jsonl -a answer_a.jsonl answer_b.jsonl -r rule.json -o review.jsonl
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from llava.cli.program import ArgumentParser
from llava.eval.review_program import review_parser, run_review


def build_parser() -> ArgumentParser:
    return review_parser("eval_gpt_review.py", context=False)


def run(args: Namespace) -> None:
    run_review(args, lambda question: question["category"], lambda question: None, "default")


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
