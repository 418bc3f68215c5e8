"""Answer text questions with a language model on a server, as a baseline without images.

python llava/eval/qa_baseline_gpt35.py -q question.jsonl -o answer.jsonl
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from llava.eval.common_flags import MAX_TOKENS, EvalScript, ScriptFlag
from llava.eval.files import need, read_json_lines
from llava.eval.harness.answer_log import RowWriter, answer_id, whole_lines
from llava.eval.harness.judge import Judge
from llava.eval.types import Question

SYSTEM = "You are a helpful assistant."
FLAGS = (
    ScriptFlag("--question", "the questions, JSON lines", short="-q", required=True),
    ScriptFlag("--output", "the file of answers; those in it are kept", short="-o", required=True),
    MAX_TOKENS,
)


def run(args: Namespace) -> None:
    known = {row["question_id"] for row in whole_lines(Path(args.output))}
    model = Judge(args.judge_url, args.judge_model)
    with RowWriter(Path(args.output)) as out:
        for number, row in enumerate(read_json_lines(Path(args.question), "file of questions"), start=1):
            name, text = (need(row, field, f"question {number}") for field in ("question_id", "text"))
            if name in known:
                continue
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            answer = model.reply(messages, max_tokens=args.max_tokens, temperature=0.2)
            identity = answer_id(Question(name, text), answer, model.model)
            out.write({"answer_id": identity, "question_id": name, "text": answer, "model_id": model.model})


SCRIPT = EvalScript(
    "qa_baseline_gpt35.py", "Answers of a language model to text questions.", FLAGS, run, judge="gpt-3.5-turbo"
)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
