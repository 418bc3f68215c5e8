"""Answer Q-Bench's questions; each question comes back with its `response`.

    python -m llava.eval.model_vqa_qbench --model-path llava-v1.5-13b --image-folder images_llvisionqa/ \\
        --questions-file llvisionqa_dev.json --answers-file llvisionqa_dev_answers.jsonl --conv-mode llava_v1 --lang en
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import ANSWERS_FILE, DEVICE, MODEL_BASE, MODEL_PATH, EvalScript, ScriptFlag
from llava.eval.files import read_json_lines, read_json_rows, write_json_lines
from llava.eval.harness.answer_file import FREE_TOKENS, answer_file
from llava.eval.tasks.qbench import REQUESTS, questions_from_rows
from llava.images.io import load_image

__all__ = ["build_parser", "eval_model", "load_image", "main"]

FOLDER = "./playground/data/qbench"
FLAGS = (
    MODEL_PATH,
    MODEL_BASE,
    ScriptFlag("--image-folder", "folder of the images", f"{FOLDER}/images_llvisionqa"),
    ScriptFlag("--questions-file", "the questions", f"{FOLDER}/llvisionqa_dev.json"),
    ANSWERS_FILE,
    ScriptFlag("--conv-mode", "conversation template", "llava_v1"),
    ScriptFlag("--lang", "en or zh", "en"),
    DEVICE,
)


def run(args: Namespace) -> None:
    if args.lang not in REQUESTS:
        raise InputError(f"--lang is {args.lang!r}; Q-Bench is in {' and '.join(REQUESTS)}")
    rows = read_json_rows(Path(args.questions_file), "file of Q-Bench's questions")
    args.temperature = 0.0
    answer_file(args, questions_from_rows(rows, Path(args.image_folder), lang=args.lang), max_new_tokens=FREE_TOKENS)
    file = Path(args.answers_file).expanduser()
    texts = {row["question_id"]: row["text"] for row in read_json_lines(file)}
    write_json_lines(file, [{**row, "response": texts[n]} for n, row in enumerate(rows) if n in texts])


SCRIPT = EvalScript("model_vqa_qbench.py", "Answer Q-Bench's questions.", FLAGS, run)
build_parser, main, eval_model = SCRIPT.build_parser, SCRIPT.main, SCRIPT.call

if __name__ == "__main__":
    sys.exit(main())
