"""ScienceQA with GPT-4 as the judge between its own answer and ours, in the original's words.

    python llava/eval/eval_science_qa_gpt4_requery.py --base-dir scienceqa --gpt4-result gpt4.json \\
        --requery-result requery.jsonl --our-result answers.jsonl --output-result result.json
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
from llava.eval.eval_science_qa import FAILED, add_split_flags, choice_index, read_predictions
from llava.eval.eval_science_qa_gpt4 import read_gpt4
from llava.eval.files import Faults, write_json
from llava.eval.metrics.choices import told_letter
from llava.eval.tasks.scienceqa import read_split

LINES = (
    ("Our-Correct", "our_correct", "Accuracy"),
    ("GPT-4-Correct", "gpt4_correct", "Accuracy"),
    ("GPT-4 NO-ANS (RANDOM)", "gpt4_failed", "Percentage"),
    ("GPT-4-OursVisual-Correct", "gpt4_ourvisual_correct", "Accuracy"),
    ("Requery-Correct", "requery_correct", "Accuracy"),
    ("Correct upper", "correct_upperbound", "Accuracy"),
)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="eval_science_qa_gpt4_requery.py", description="ScienceQA with GPT-4 asked again.")
    add_split_flags(parser)
    parser.add_argument("--gpt4-result", type=str, required=True, help="GPT-4's answers, JSON with `outputs`")
    parser.add_argument("--requery-result", type=str, required=True, help="GPT-4's choices, JSON lines")
    parser.add_argument("--our-result", type=str, required=True, help="our answers, JSON lines")
    parser.add_argument("--output-result", type=str, required=True, help="where the chosen answers go")
    return parser


def run(args: Namespace) -> None:
    problems = read_split(Path(args.base_dir), args.split)
    faults = Faults()
    ours, gpt4 = read_predictions(args.our_result, faults), read_gpt4(args.gpt4_result)
    requery = read_predictions(args.requery_result, faults)
    counts: Counter[str] = Counter()
    results = {}
    for name, problem in problems.items():
        if name not in ours or name not in gpt4:
            raise InputError(f"the problem {name!r} is not answered in both --our-result and --gpt4-result")
        if name not in requery:
            faults.add("problems not asked again", "our answer counts for them", repr(name))
        texts = (ours[name]["text"], gpt4[name], requery.get(name, {}).get("text", "MISSING"))
        our_letter, gpt4_letter, requery_letter = map(told_letter, texts)
        our_right, gpt4_right, requery_right = (
            choice_index(letter, problem, args.options) == problem["answer"]
            for letter in (our_letter, gpt4_letter, requery_letter)
        )
        chosen = our_letter if requery_letter is None else requery_letter
        results[name] = choice_index(chosen, problem, args.options)
        counts["total"] += 1
        counts["our_correct"] += our_right
        counts["gpt4_failed"] += gpt4_letter is None
        counts["gpt4_correct"] += gpt4_right
        counts["gpt4_ourvisual_correct"] += our_right if gpt4_letter is None else gpt4_right
        counts["requery_correct"] += results[name] == problem["answer"]
        counts["correct_upperbound"] += our_right or gpt4_right
        if requery_letter is not None and not requery_right:
            print(f"\nQuestion ({args.options[problem['answer']]}): {ours[name].get('prompt', '')}")
            for who, letter, text in zip(
                ("Our", "GPT-4", "Requery"), (our_letter, gpt4_letter, requery_letter), texts, strict=True
            ):
                print(f"{who} ({letter or FAILED}): {text}")
            print("=====================================")
    total = counts["total"]
    if not total:
        raise InputError(f"the split {args.split!r} has no problems, so there is nothing to score")
    for label, key, measure in LINES:
        print(f"Total: {total}, {label}: {counts[key]}, {measure}: {counts[key] / total * 100:.2f}%")
    correct = counts["requery_correct"]
    write_json(
        Path(args.output_result), {"results": results, "acc": correct / total * 100, "correct": correct, "count": total}
    )
    report_faults(faults)


def main(argv: Sequence[str] | None = None) -> int:
    return build_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
