"""Turn ScienceQA's problems into LLaVA's training data, or into instructions as JSON lines.

python scripts/convert_sqa_to_llava.py convert_to_llava --base-dir scienceqa --split train --prompt-format QCM-LEA
python scripts/convert_sqa_to_llava.py convert_to_jsonl --base-dir scienceqa --split test
"""

import argparse
import sys
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.eval.files import write_json, write_json_lines
from llava.eval.tasks.scienceqa import conversation, read_split

FORMATS = {"convert_to_llava": "QCM-LEA", "convert_to_jsonl": "QCM-LEPA"}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="convert_sqa_to_llava.py", description="ScienceQA's problems in LLaVA's forms.")
    parser.add_argument("command", choices=list(FORMATS), help="what to make")
    # Both spellings: the original's flags were made from the names of a function's arguments.
    parser.add_argument("--base-dir", "--base_dir", type=Path, required=True, help="folder with problems.json")
    parser.add_argument("--split", required=True, help="a split of pid_splits.json")
    parser.add_argument("--prompt-format", "--prompt_format", help="such as QCM-LEA; which parts stand where")
    return parser


def run(args: argparse.Namespace) -> None:
    prompt_format = args.prompt_format or FORMATS[args.command]
    samples = [
        conversation(name, problem, prompt_format) for name, problem in read_split(args.base_dir, args.split).items()
    ]
    if args.command == "convert_to_llava":
        print(f"Number of samples: {len(samples)}")
        write_json(args.base_dir / f"llava_{args.split}_{prompt_format}.json", samples)
        return
    rows = []
    for sample in samples:
        question, answer = (turn["value"] for turn in sample["conversations"])
        image = {"image": sample["image"]} if "image" in sample else {}
        rows.append({"id": sample["id"], **image, "instruction": question, "output": answer})
    write_json_lines(args.base_dir / f"scienceqa_{args.split}_{prompt_format}.jsonl", rows)


def main() -> int:
    return build_parser().run(run)


if __name__ == "__main__":
    sys.exit(main())
