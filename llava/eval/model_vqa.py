"""Answer questions about images with long answers: LLaVA-Bench, MM-Vet, and other files of questions.

    python -m llava.eval.model_vqa --model-path llava-v1.5-13b --question-file questions.jsonl --image-folder images \\
        --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from llava.eval.common_flags import EvalScript, answer_flags
from llava.eval.harness.answer_file import FREE_TOKENS, answer_file, get_chunk, split_list
from llava.eval.tasks.short import read_questions

__all__ = ["build_parser", "eval_model", "get_chunk", "main", "split_list"]


def run(args: Namespace) -> None:
    questions = read_questions(Path(args.question_file).expanduser(), Path(args.image_folder))
    answer_file(args, get_chunk(questions, args.num_chunks, args.chunk_idx), max_new_tokens=FREE_TOKENS)


SCRIPT = EvalScript("model_vqa.py", "Answer questions about images at length.", answer_flags(), run)
build_parser, main, eval_model = SCRIPT.build_parser, SCRIPT.main, SCRIPT.call

if __name__ == "__main__":
    sys.exit(main())
