"""Answer Q-Bench's questions; each question comes back with its `response`.

    python -m llava.eval.model_vqa_qbench --model-path llava-v1.5-13b --image-folder images_llvisionqa/ \\
        --questions-file llvisionqa_dev.json --answers-file llvisionqa_dev_answers.jsonl --conv-mode llava_v1 --lang en
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.eval.files import read_json_lines, read_json_rows
from llava.eval.tasks.qbench import ASKS, question_items
from llava.eval.vqa_program import FREE_TOKENS, answer_file

FOLDER = "./playground/data/qbench"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="model_vqa_qbench.py", description="Answer Q-Bench's questions.")
    parser.add_argument(
        "--model-path", type=str, default=None, help="folder or hub repository (default: the model in the package)"
    )
    parser.add_argument("--model-base", type=str, default=None, help="language model under a LoRA or projector folder")
    parser.add_argument("--image-folder", type=str, default=f"{FOLDER}/images_llvisionqa", help="folder of the images")
    parser.add_argument("--questions-file", type=str, default=f"{FOLDER}/llvisionqa_dev.json", help="the questions")
    parser.add_argument(
        "--answers-file", type=str, default="answer.jsonl", help="the file to write (default: answer.jsonl)"
    )
    parser.add_argument("--conv-mode", type=str, default="llava_v1", help="conversation template (default: llava_v1)")
    parser.add_argument("--lang", type=str, default="en", help="en or zh (default: en)")
    parser.add_argument("--device", type=str, default="auto", help="auto, cuda, mps or cpu (default: auto)")
    return parser


def run(args: Namespace) -> None:
    if args.lang not in ASKS:
        raise InputError(f"--lang is {args.lang!r}; Q-Bench is in {' and '.join(ASKS)}")
    rows = read_json_rows(Path(args.questions_file), "file of Q-Bench's questions")
    args.temperature = 0.0
    answer_file(args, question_items(rows, Path(args.image_folder), lang=args.lang), max_new_tokens=FREE_TOKENS)
    file = Path(args.answers_file).expanduser()
    texts = {row["question_id"]: row["text"] for row in read_json_lines(file)}
    lines = [{**row, "response": texts[number]} for number, row in enumerate(rows) if number in texts]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
