"""Let a language model without eyes answer text questions, as a baseline, in the original's form.

python llava/eval/qa_baseline_gpt35.py -q question.jsonl -o answer.jsonl
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.files import need, read_json_lines
from llava.eval.harness.answer_log import answer_id, cut_half_line, whole_lines
from llava.eval.harness.judge import Judge
from llava.eval.review_program import add_judge_flags
from llava.eval.types import Question

SYSTEM = "You are a helpful assistant."


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="qa_baseline_gpt35.py", description="Answers of a language model to text questions.")
    parser.add_argument("-q", "--question", required=True, help="the questions, JSON lines")
    parser.add_argument("-o", "--output", required=True, help="the file of answers; those in it are kept")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, help="maximum number of tokens in an answer (default: 1024)"
    )
    add_judge_flags(parser, model="gpt-3.5-turbo")
    return parser


def run(args: Namespace) -> None:
    file = Path(args.output)
    file.parent.mkdir(parents=True, exist_ok=True)
    cut_half_line(file)
    there = {row["question_id"] for row in whole_lines(file)}
    judge = Judge(args.judge_url, args.judge_model)
    with file.open("a", encoding="utf-8") as out:
        for number, row in enumerate(read_json_lines(Path(args.question), "file of questions"), start=1):
            name, text = (need(row, field, f"question {number}") for field in ("question_id", "text"))
            if name in there:
                continue
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            answer = judge.reply(messages, max_tokens=args.max_tokens, temperature=0.2)
            identity = answer_id(Question(name, text), answer, args.judge_model)
            line = {"answer_id": identity, "question_id": name, "text": answer, "model_id": args.judge_model}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
