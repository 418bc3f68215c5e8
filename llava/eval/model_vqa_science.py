"""Answer ScienceQA's questions, with and without images.

    python -m llava.eval.model_vqa_science --model-path llava-v1.5-13b --question-file llava_test_CQM-A.json \\
        --image-folder images/test --answers-file answers.jsonl --single-pred-prompt --temperature 0 --conv-mode vicuna_v1
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from llava.eval.common_flags import LETTER_ALONE, SAMPLING_FLAGS, EvalScript, ScriptFlag, answer_flags
from llava.eval.files import read_json_rows
from llava.eval.harness.answer_file import FREE_TOKENS, answer_file, get_chunk, split_list
from llava.eval.tasks.scienceqa import questions_from_samples

__all__ = ["build_parser", "eval_model", "get_chunk", "main", "split_list"]

FLAGS = (
    *answer_flags(questions="tables/question.json", conv_mode="llava_v0", sampling=SAMPLING_FLAGS[:1]),
    ScriptFlag("--answer-prompter", "accepted for old scripts; changes nothing, as in the original", False),
    LETTER_ALONE,
)


def run(args: Namespace) -> None:
    rows = read_json_rows(Path(args.question_file).expanduser(), "file of questions")
    questions = questions_from_samples(rows, Path(args.image_folder), letter=args.single_pred_prompt)
    answer_file(args, get_chunk(questions, args.num_chunks, args.chunk_idx), max_new_tokens=FREE_TOKENS)


SCRIPT = EvalScript("model_vqa_science.py", "Answer ScienceQA's questions.", FLAGS, run)
build_parser, main, eval_model = SCRIPT.build_parser, SCRIPT.main, SCRIPT.call

if __name__ == "__main__":
    sys.exit(main())
