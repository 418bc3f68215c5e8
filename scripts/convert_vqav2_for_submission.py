"""Turn an answers file of VQAv2 into the file that its server takes.

python scripts/convert_vqav2_for_submission.py --split llava_vqav2_mscoco_test-dev2015 --ckpt llava-v1.5-13b
"""

import argparse
import sys
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.files import Faults, read_json_lines, write_json
from llava.eval.metrics.vqa import normalise


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="convert_vqav2_for_submission.py", description="Make VQAv2's upload.")
    parser.add_argument("--dir", type=str, default="./playground/data/eval/vqav2", help="VQAv2's folder")
    parser.add_argument("--ckpt", type=str, required=True, help="name of the model's folder below answers/SPLIT/")
    parser.add_argument("--split", type=str, required=True, help="name of the folder below answers/")
    return parser


def run(args: argparse.Namespace) -> None:
    folder, faults = Path(args.dir), Faults()
    source = folder / "answers" / args.split / args.ckpt / "merge.jsonl"
    results = {row["question_id"]: row["text"] for row in read_json_lines(source, "answers file", faults=faults)}
    names = [row["question_id"] for row in read_json_lines(folder / "llava_vqav2_mscoco_test2015.jsonl")]
    num_broken = sum(fault.count for fault in faults.kinds.values())
    print(f"total results: {len(results)}, total split: {len(names)}, error_line: {num_broken}")
    # The server wants all of test2015; what lies outside of the split asked gets an empty answer.
    answers = [{"question_id": name, "answer": normalise(results.get(name, ""))} for name in names]
    write_json(folder / "answers_upload" / args.split / f"{args.ckpt}.json", answers)


def main() -> int:
    return build_parser().run(run)


if __name__ == "__main__":
    sys.exit(main())
