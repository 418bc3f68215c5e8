"""Turn an answers file of GQA into the file that its evaluator reads.

python scripts/convert_gqa_for_eval.py --src merge.jsonl --dst testdev_balanced_predictions.json
"""

import argparse
import sys
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.files import read_json_lines, write_json
from llava.eval.tasks.short import gqa_answer


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="convert_gqa_for_eval.py", description="Make GQA's file of predictions.")
    parser.add_argument("--src", type=str, required=True, help="the answers, JSON lines")
    parser.add_argument("--dst", type=str, required=True, help="the file to write")
    return parser


def run(args: argparse.Namespace) -> None:
    rows = read_json_lines(Path(args.src), "answers file")
    predictions = [{"questionId": row["question_id"], "prediction": gqa_answer(row["text"])} for row in rows]
    write_json(Path(args.dst), predictions)


def main() -> int:
    return build_parser().run(run)


if __name__ == "__main__":
    sys.exit(main())
