"""Score an answers file of SEED-Bench by question type, and turn it into the file that its leaderboard takes.

python scripts/convert_seed_for_submission.py --annotation-file SEED-Bench.json --result-file merge.jsonl \
    --result-upload-file upload.jsonl
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.common_flags import EvalScript, ScriptFlag
from llava.eval.files import read_json_lines, write_json_lines
from llava.eval.metrics.accuracy import by_category
from llava.eval.tasks.seed import read_truths, type_order

FLAGS = (
    ScriptFlag("--annotation-file", "SEED-Bench.json", required=True),
    ScriptFlag("--result-file", "the answers, JSON lines", required=True),
    ScriptFlag("--result-upload-file", "the file to write", required=True),
)


def run(args: Namespace) -> None:
    truths = read_truths(Path(args.annotation_file))
    results = {str(row["question_id"]): row["text"] for row in read_json_lines(Path(args.result_file), "answers file")}
    verdicts = [(name, float(results.get(name) == row["answer"])) for name, row in truths.items()]
    by_type = by_category((truths[name]["type"], verdict) for name, verdict in verdicts)
    for name in type_order(truths):
        print(f"{name}: {by_type[name]['accuracy']:.2f}%")
    print(f"Total accuracy: {by_category(('all', verdict) for _, verdict in verdicts)['all']['accuracy']:.2f}%")
    by_kind = by_category((truths[name]["data_type"], verdict) for name, verdict in verdicts)
    for kind in ("image", "video"):
        if kind in by_kind:
            print(f"{kind} accuracy: {by_kind[kind]['accuracy']:.2f}%")
    write_upload(Path(args.result_upload_file), truths, results)


def write_upload(file: Path, truths: Mapping[str, Mapping[str, Any]], results: Mapping[str, str]) -> None:
    """Every answer that is there; the leaderboard wants them all, so a missing one is an error after the rest is written."""
    rows = [
        {"question_id": row["question_id"], "prediction": results[name]}
        for name, row in truths.items()
        if name in results
    ]
    write_json_lines(file, rows)
    missing = [row["question_id"] for name, row in truths.items() if name not in results]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(truths)} questions have no answer (the first is {missing[0]!r}): they count as "
            f"wrong above and are missing in {str(file)!r}, which the leaderboard would not take"
        )


SCRIPT = EvalScript("convert_seed_for_submission.py", "Score SEED-Bench and make its upload.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
