"""Answer MMBench's questions, once or with the options in every order.

    python -m llava.eval.model_vqa_mmbench --model-path llava-v1.5-13b --question-file mmbench_dev_20230712.tsv \\
        --answers-file answers.jsonl --single-pred-prompt --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import LETTER_ALONE, EvalScript, ScriptFlag, answer_flags
from llava.eval.files import read_table
from llava.eval.harness.answer_file import FREE_TOKENS, answer_file, get_chunk, split_list
from llava.eval.tasks.mmbench import OPTION_LETTERS, SUFFIXES, get_options, is_none, questions_from_table

__all__ = ["build_parser", "eval_model", "get_chunk", "get_options", "is_none", "main", "split_list"]

all_options = list(OPTION_LETTERS)

FLAGS = (
    *answer_flags(),
    ScriptFlag("--all-rounds", "ask again with the options in every order", False),
    LETTER_ALONE,
    ScriptFlag("--lang", "en or cn: the language in which the letter is asked for", "en"),
)


def run(args: Namespace) -> None:
    if args.lang not in SUFFIXES:
        raise InputError(f"--lang is {args.lang!r}; known: {', '.join(SUFFIXES)}")
    rows = read_table(Path(args.question_file).expanduser(), "MMBench's table", needed=("index", "question", "image"))
    chunk = get_chunk(rows, args.num_chunks, args.chunk_idx)
    suffix = SUFFIXES[args.lang] if args.single_pred_prompt else None
    questions = questions_from_table(chunk, suffix=suffix, all_rounds=args.all_rounds, whole=rows)
    answer_file(args, questions, max_new_tokens=FREE_TOKENS)


SCRIPT = EvalScript("model_vqa_mmbench.py", "Answer MMBench's questions.", FLAGS, run)
build_parser, main, eval_model = SCRIPT.build_parser, SCRIPT.main, SCRIPT.call

if __name__ == "__main__":
    sys.exit(main())
