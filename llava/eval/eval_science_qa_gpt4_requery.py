"""Print ScienceQA's accuracy where GPT-4 chooses between its own answer and ours, as the original does.

    python llava/eval/eval_science_qa_gpt4_requery.py --base-dir scienceqa --gpt4-result gpt4.json \\
        --requery-result requery.jsonl --our-result answers.jsonl --output-result result.json
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import EvalScript, ScriptFlag, report_faults
from llava.eval.eval_science_qa import FAILED, convert_caps, get_pred_idx, read_predictions
from llava.eval.eval_science_qa_gpt4 import FLAGS as GPT4_FLAGS
from llava.eval.eval_science_qa_gpt4 import count_correct, print_counts, read_gpt4
from llava.eval.files import Faults, write_json
from llava.eval.metrics.choices import stated_letter
from llava.eval.tasks.scienceqa import read_split

__all__ = ["build_parser", "convert_caps", "get_pred_idx", "main"]

FLAGS = (
    *GPT4_FLAGS,
    ScriptFlag("--requery-result", "GPT-4's choices, JSON lines", required=True),
    ScriptFlag("--output-result", "where the chosen answers go", required=True),
)
LINES = (
    ("Our-Correct", "ours", "Accuracy"),
    ("GPT-4-Correct", "gpt4", "Accuracy"),
    ("GPT-4 NO-ANS (RANDOM)", "gpt4_failed", "Percentage"),
    ("GPT-4-OursVisual-Correct", "combined", "Accuracy"),
    ("Requery-Correct", "requery", "Accuracy"),
    ("Correct upper", "either", "Accuracy"),
)


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
        asked_again = requery.get(name, {}).get("text", "MISSING")
        texts = {"Our": ours[name]["text"], "GPT-4": gpt4[name], "Requery": asked_again}
        count_correct(counts, problem, texts["Our"], texts["GPT-4"], args.options)
        letter = stated_letter(texts["Requery"])
        results[name] = get_pred_idx(letter or stated_letter(texts["Our"]), problem["choices"], args.options)
        is_right = results[name] == problem["answer"]
        counts["requery"] += is_right
        if letter is not None and not is_right:
            print(f"\nQuestion ({args.options[problem['answer']]}): {ours[name].get('prompt', '')}")
            for who, text in texts.items():
                print(f"{who} ({stated_letter(text) or FAILED}): {text}")
            print("=====================================")
    total, correct = counts["total"], counts["requery"]
    if not total:
        raise InputError(f"the split {args.split!r} has no problems, so there is nothing to score")
    print_counts(counts, LINES)
    summary = {"results": results, "acc": correct / total * 100, "correct": correct, "count": total}
    write_json(Path(args.output_result), summary)
    report_faults(faults)


SCRIPT = EvalScript("eval_science_qa_gpt4_requery.py", "ScienceQA with GPT-4 asked again.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
