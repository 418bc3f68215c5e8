"""Turn an answers file of MM-Vet into the file that its evaluator reads.

python scripts/convert_mmvet_for_eval.py --src answers.jsonl --dst results.json
"""

import argparse
import sys
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.files import read_json_lines, write_json
from llava.eval.tasks.judged import mmvet_name


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="convert_mmvet_for_eval.py", description="Make MM-Vet's file of results.")
    parser.add_argument("--src", type=str, required=True, help="the answers, JSON lines")
    parser.add_argument("--dst", type=str, required=True, help="the file to write")
    return parser


def run(args: argparse.Namespace) -> None:
    rows = read_json_lines(Path(args.src), "answers file")
    write_json(Path(args.dst), {mmvet_name(row["question_id"]): row["text"] for row in rows})


def main() -> int:
    return build_parser().run(run)


if __name__ == "__main__":
    sys.exit(main())
