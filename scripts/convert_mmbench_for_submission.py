"""Turn an answers file of MMBench into the table that its server takes.

python scripts/convert_mmbench_for_submission.py --annotation-file mmbench_dev_20230712.tsv --result-dir answers \
    --upload-dir answers_upload --experiment llava-v1.5-13b
"""

import argparse
import sys
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.files import read_json_lines, read_table, write_xlsx
from llava.eval.tasks.mmbench import submission


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="convert_mmbench_for_submission.py", description="Make MMBench's upload.")
    parser.add_argument("--annotation-file", type=str, required=True, help="MMBench's table, .tsv")
    parser.add_argument("--result-dir", type=str, required=True, help="folder of the answers")
    parser.add_argument("--upload-dir", type=str, required=True, help="folder to write to")
    parser.add_argument("--experiment", type=str, required=True, help="name of the answers file, without .jsonl")
    return parser


def run(args: argparse.Namespace) -> None:
    rows = read_table(Path(args.annotation_file), "MMBench's table", needed=("index", "question"))
    answers = read_json_lines(Path(args.result_dir) / f"{args.experiment}.jsonl", "answers file")
    texts = {str(row["question_id"]): row["text"] for row in answers if not row.get("round_id")}
    columns, lines = submission(rows, texts)
    write_xlsx(Path(args.upload_dir) / f"{args.experiment}.xlsx", lines, columns)


def main() -> int:
    return build_parser().run(run)


if __name__ == "__main__":
    sys.exit(main())
