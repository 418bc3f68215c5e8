"""Turn an answers file of VizWiz into the file that its server takes.

python scripts/convert_vizwiz_for_submission.py --annotation-file llava_test.jsonl --result-file answers.jsonl \
    --result-upload-file upload.json
"""

import sys
from argparse import Namespace
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import EvalScript, ScriptFlag
from llava.eval.files import Faults, read_json_lines, write_json
from llava.eval.metrics.vqa import normalise

FLAGS = (
    ScriptFlag("--annotation-file", "the questions, JSON lines", required=True),
    ScriptFlag("--result-file", "the answers, JSON lines", required=True),
    ScriptFlag("--result-upload-file", "the file to write", required=True),
)


def run(args: Namespace) -> None:
    faults = Faults()
    rows = read_json_lines(Path(args.result_file), "answers file", faults=faults)
    results = {row["question_id"]: row["text"] for row in rows}
    questions = read_json_lines(Path(args.annotation_file), "file of questions")
    num_broken = sum(fault.count for fault in faults.kinds.values())
    print(f"total results: {len(results)}, total split: {len(questions)}, error_line: {num_broken}")
    missing = [row["question_id"] for row in questions if row["question_id"] not in results]
    if missing:
        raise InputError(
            f"VizWiz's server wants every question answered; {len(missing)} of {len(questions)} are not, the first is "
            f"{missing[0]!r}"
        )
    answers = [{"image": row["image"], "answer": normalise(results[row["question_id"]])} for row in questions]
    write_json(Path(args.result_upload_file), answers)


SCRIPT = EvalScript("convert_vizwiz_for_submission.py", "Make VizWiz's upload.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
