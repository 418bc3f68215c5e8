"""Print a summary of GPT-4's reviews as the original does: relative and absolute scores by category.

    python llava/eval/summarize_gpt_review.py -f reviews/llava-v1.5-7b.jsonl
    python llava/eval/summarize_gpt_review.py -d reviews

Means are rounded to three places before the other figures are computed, as in published scores.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import EvalScript, ScriptFlag, report_faults
from llava.eval.files import Faults, read_json_lines
from llava.eval.metrics.gpt_review import NO_SCORE, by_category, pair_of, summary_line

STARTS = ("gpt4_text_", "reviews_", "review_")

FLAGS = (
    ScriptFlag("--dir", "folder of the review files", short="-d"),
    ScriptFlag("--version", "0613 or 0314: only files of that version of the judge", short="-v"),
    ScriptFlag("--select", "only files with all of these in their names", short="-s", nargs="*"),
    ScriptFlag("--files", "the files themselves", [], short="-f", nargs="*"),
    ScriptFlag("--ignore", "question ids to leave out", [], short="-i", nargs="*"),
    ScriptFlag("--count-failed", "count reviews without scores as -1, as the original does", False),
)


def run(args: Namespace) -> None:
    if args.files:
        files = [Path(args.dir or "") / name for name in args.files]
    elif args.dir is not None:
        found = Path(args.dir).glob("*.jsonl")
        files = [file for file in found if file.name.startswith(STARTS) or "review" in args.dir]
    else:
        raise InputError("give --files or --dir")
    if not files:
        raise InputError(f"there are no review files in {args.dir!r}")
    for file in sorted(files):
        name = file.name.replace("gpt4_text_", "").replace(".jsonl", "")
        version = "0613" if "0613" in name else "0314"
        if all(part in name for part in args.select or ()) and args.version in (None, version):
            summarise(file, name, set(map(str, args.ignore)), args.count_failed)


def summarise(file: Path, name: str, ignored: set[str], count_failed: bool = False) -> None:
    faults = Faults()
    rows = []
    for row in read_json_lines(file, "file of reviews", faults=faults):
        if str(row.get("question_id")) in ignored:
            continue
        if pair_of(row) == NO_SCORE:
            meaning = "they count as -1" if count_failed else "they are left out"
            faults.add("reviews without scores", meaning, repr(row.get("question_id")))
            if not count_failed:
                continue
        rows.append(row)
    print(name)
    for category, pairs in by_category(rows).items():
        print(category, *summary_line(pairs))
    print("=================================")
    report_faults(faults)


SCRIPT = EvalScript("summarize_gpt_review.py", "Summarise files of reviews.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
