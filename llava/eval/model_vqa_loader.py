"""Answer short questions about images: VQAv2, GQA, VizWiz, TextVQA, POPE, MME, SEED-Bench.

    python -m llava.eval.model_vqa_loader --model-path llava-v1.5-13b --question-file questions.jsonl \\
        --image-folder images --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from llava.eval.common_flags import EvalScript, ScriptFlag, answer_flags
from llava.eval.harness.answer_file import answer_file, get_chunk, split_list
from llava.eval.tasks.short import read_questions

__all__ = ["build_parser", "eval_model", "get_chunk", "main", "split_list"]

FLAGS = (*answer_flags(), ScriptFlag("--max_new_tokens", "maximum number of tokens of an answer", 128))


def run(args: Namespace) -> None:
    questions = read_questions(Path(args.question_file).expanduser(), Path(args.image_folder))
    answer_file(args, get_chunk(questions, args.num_chunks, args.chunk_idx), max_new_tokens=args.max_new_tokens)


SCRIPT = EvalScript("model_vqa_loader.py", "Answer questions about images.", FLAGS, run)
build_parser, main, eval_model = SCRIPT.build_parser, SCRIPT.main, SCRIPT.call

if __name__ == "__main__":
    sys.exit(main())
