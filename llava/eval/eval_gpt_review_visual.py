"""Let GPT-4 compare two answers about images that it reads as captions and boxes, in the original's form.

    python llava/eval/eval_gpt_review_visual.py -q questions.jsonl -c caps_boxes.jsonl -a first.jsonl second.jsonl \\
        -r llava/eval/table/rule.json -o reviews.jsonl
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from llava.cli.program import ArgumentParser
from llava.eval.review_program import described, read_contexts, review_parser, run_review


def build_parser() -> ArgumentParser:
    return review_parser("eval_gpt_review_visual.py", context=True)


def run(args: Namespace) -> None:
    contexts = read_contexts(args.context)

    def captions_and_boxes(question: Mapping[str, Any]) -> str:
        row = described(contexts, question)
        captions = "\n".join(row["captions"])
        boxes = "\n".join(f"{thing['category']}: {thing['bbox']}" for thing in row["instances"])
        return f"{captions}\n\n{boxes}"

    run_review(args, lambda question: question["category"], captions_and_boxes, None)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
