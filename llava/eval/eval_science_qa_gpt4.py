"""Print ScienceQA's accuracy for GPT-4's answers, with ours where GPT-4 gives none, as the original does.

    python llava/eval/eval_science_qa_gpt4.py --base-dir scienceqa --gpt4-result gpt4.json --our-result answers.jsonl

Only problems with both answers count. An answer of ours without a letter counts as wrong; the original guessed at random.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import EvalScript, ScriptFlag, report_faults
from llava.eval.eval_science_qa import SPLIT_FLAGS, convert_caps, get_pred_idx, read_predictions
from llava.eval.files import Faults, need, read_json_object
from llava.eval.metrics.choices import stated_letter
from llava.eval.tasks.scienceqa import read_split
from llava.eval.types import JsonRow

__all__ = ["build_parser", "convert_caps", "get_pred_idx", "main"]

FLAGS = (
    *SPLIT_FLAGS,
    ScriptFlag("--gpt4-result", "GPT-4's answers, JSON with `outputs`", required=True),
    ScriptFlag("--our-result", "our answers, JSON lines", required=True),
)
LINES = (
    ("Correct", "combined", "Accuracy"),
    ("Correct (upper)", "either", "Accuracy"),
    ("GPT-4 NO-ANS (RANDOM)", "gpt4_failed", "Percentage"),
)


def read_gpt4(file: str) -> dict[str, str]:
    return need(read_json_object(Path(file), "file of GPT-4's answers"), "outputs", repr(file))


def count_correct(counts: Counter[str], problem: JsonRow, ours: str, gpt4: str, options: Sequence[str]) -> None:
    """Count which of two answers to a problem are right: ours, GPT-4's, and GPT-4's with ours where it has no letter."""
    letters = stated_letter(ours), stated_letter(gpt4)
    indices = [get_pred_idx(letter, problem["choices"], options) for letter in letters]
    our_right, gpt4_right = (index == problem["answer"] for index in indices)
    counts["total"] += 1
    counts["ours"] += our_right
    counts["gpt4"] += gpt4_right
    counts["gpt4_failed"] += letters[1] is None
    counts["combined"] += our_right if letters[1] is None else gpt4_right
    counts["either"] += our_right or gpt4_right


def print_counts(counts: Counter[str], lines: Sequence[tuple[str, str, str]]) -> None:
    total = counts["total"]
    for label, name, measure in lines:
        print(f"Total: {total}, {label}: {counts[name]}, {measure}: {counts[name] / total * 100:.2f}%")


def run(args: Namespace) -> None:
    problems = read_split(Path(args.base_dir), args.split)
    faults = Faults()
    ours, gpt4 = read_predictions(args.our_result, faults), read_gpt4(args.gpt4_result)
    counts: Counter[str] = Counter()
    for name, problem in problems.items():
        if name in ours and name in gpt4:
            count_correct(counts, problem, ours[name]["text"], gpt4[name], args.options)
        else:
            faults.add("problems without both answers", "they are left out", repr(name))
    if not counts["total"]:
        raise InputError("no problem has an answer in both files, so there is nothing to score")
    print_counts(counts, LINES)
    report_faults(faults)


SCRIPT = EvalScript("eval_science_qa_gpt4.py", "ScienceQA by GPT-4, with our answers as a fallback.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
