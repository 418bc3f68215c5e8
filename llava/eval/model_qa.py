"""Answer text questions with a language model, or with a LLaVA without images.

python llava/eval/model_qa.py --model-name ./vicuna-7b --question-file table/question.jsonl --answers-file answer.jsonl
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from llava.eval.common_flags import ANSWERS_FILE, DEVICE, MODEL_PATH, EvalScript, ScriptFlag
from llava.eval.harness.answer_file import FREE_TOKENS, answer_file
from llava.eval.tasks.short import read_questions

FLAGS = (
    replace(MODEL_PATH, name="--model-name"),
    ScriptFlag("--question-file", "the questions, JSON lines", "tables/question.jsonl"),
    ANSWERS_FILE,
    DEVICE,
)


def run(args: Namespace) -> None:
    questions = read_questions(Path(args.question_file).expanduser(), Path())
    fixed = {"model_path": args.model_name, "model_base": None, "conv_mode": None, "temperature": 0.2}
    answer_file(Namespace(**vars(args), **fixed), questions, max_new_tokens=FREE_TOKENS)


SCRIPT = EvalScript("model_qa.py", "Answer text questions.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main


def eval_model(model_name: str, questions_file: str, answers_file: str) -> None:
    """Run the program as outside code calls it."""
    SCRIPT.call(Namespace(model_name=model_name, question_file=questions_file, answers_file=answers_file))


if __name__ == "__main__":
    sys.exit(main())
