"""ScienceQA with GPT-4's answers, ours where GPT-4 gives none, in the original's words.

    python llava/eval/eval_science_qa_gpt4.py --base-dir scienceqa --gpt4-result gpt4.json --our-result answers.jsonl

Only problems that both answered count. An answer of ours without a letter counts as wrong; the original guessed at random.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.eval.common_flags import report_faults
from llava.eval.eval_science_qa import add_split_flags, choice_index, read_predictions
from llava.eval.files import Faults, need, read_json_object
from llava.eval.metrics.choices import told_letter
from llava.eval.tasks.scienceqa import read_split


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="eval_science_qa_gpt4.py", description="ScienceQA by GPT-4, with our answers as a fallback."
    )
    add_split_flags(parser)
    parser.add_argument("--gpt4-result", type=str, required=True, help="GPT-4's answers, JSON with `outputs`")
    parser.add_argument("--our-result", type=str, required=True, help="our answers, JSON lines")
    return parser


def read_gpt4(file: str) -> dict[str, str]:
    return need(read_json_object(Path(file), "file of GPT-4's answers"), "outputs", repr(file))


def run(args: Namespace) -> None:
    problems = read_split(Path(args.base_dir), args.split)
    faults = Faults()
    ours, gpt4 = read_predictions(args.our_result, faults), read_gpt4(args.gpt4_result)
    counts: Counter[str] = Counter()
    for name, problem in problems.items():
        if name not in ours or name not in gpt4:
            faults.add("problems without both answers", "they are left out", repr(name))
            continue
        our_index = choice_index(told_letter(ours[name]["text"]), problem, args.options)
        gpt4_letter = told_letter(gpt4[name])
        index = our_index if gpt4_letter is None else choice_index(gpt4_letter, problem, args.options)
        counts["total"] += 1
        counts["gpt4_failed"] += gpt4_letter is None
        counts["correct"] += index == problem["answer"]
        counts["upper"] += problem["answer"] in (index, our_index)
    total = counts["total"]
    if not total:
        raise InputError("no problem has an answer in both files, so there is nothing to score")
    for label, name, measure in (
        ("Correct", "correct", "Accuracy"),
        ("Correct (upper)", "upper", "Accuracy"),
        ("GPT-4 NO-ANS (RANDOM)", "gpt4_failed", "Percentage"),
    ):
        print(f"Total: {total}, {label}: {counts[name]}, {measure}: {counts[name] / total * 100:.2f}%")
    report_faults(faults)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
