"""Turn an answers file of MMBench into the table that its server takes.

python scripts/convert_mmbench_for_submission.py --annotation-file mmbench_dev_20230712.tsv --result-dir answers \
    --upload-dir answers_upload --experiment llava-v1.5-13b
"""

import sys
from argparse import Namespace
from pathlib import Path

from llava.eval.common_flags import EvalScript, ScriptFlag
from llava.eval.files import read_json_lines, read_table, write_xlsx
from llava.eval.tasks.mmbench import submission

FLAGS = (
    ScriptFlag("--annotation-file", "MMBench's table, .tsv", required=True),
    ScriptFlag("--result-dir", "folder of the answers", required=True),
    ScriptFlag("--upload-dir", "folder to write to", required=True),
    ScriptFlag("--experiment", "name of the answers file, without .jsonl", required=True),
)


def run(args: Namespace) -> None:
    rows = read_table(Path(args.annotation_file), "MMBench's table", needed=("index", "question"))
    answers = read_json_lines(Path(args.result_dir) / f"{args.experiment}.jsonl", "answers file")
    texts = {str(row["question_id"]): row["text"] for row in answers if not row.get("round_id")}
    columns, lines = submission(rows, texts)
    write_xlsx(Path(args.upload_dir) / f"{args.experiment}.xlsx", lines, columns)


SCRIPT = EvalScript("convert_mmbench_for_submission.py", "Make MMBench's upload.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
