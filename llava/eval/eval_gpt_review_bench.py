"""Let GPT-4 compare two answers of LLaVA-Bench, whose images it reads as a caption, in the original's form.

    python llava/eval/eval_gpt_review_bench.py -q questions.jsonl -c context.jsonl -a answers_gpt4.jsonl answers.jsonl \\
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
    return review_parser("eval_gpt_review_bench.py", context=True)


def run(args: Namespace) -> None:
    contexts = read_contexts(args.context)

    def caption(question: Mapping[str, Any]) -> str:
        text = described(contexts, question)["caption"]
        return "\n".join(text) if isinstance(text, list) else text

    run_review(args, lambda question: f"llava_bench_{question['category']}", caption, None)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
