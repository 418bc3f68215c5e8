"""Turn an answers file of MM-Vet into the file that its evaluator reads.

python scripts/convert_mmvet_for_eval.py --src answers.jsonl --dst results.json
"""

import sys
from argparse import Namespace
from pathlib import Path

from llava.eval.common_flags import EvalScript, ScriptFlag
from llava.eval.files import read_json_lines, write_json
from llava.eval.tasks.judged import mmvet_name

FLAGS = (
    ScriptFlag("--src", "the answers, JSON lines", required=True),
    ScriptFlag("--dst", "the file to write", required=True),
)


def run(args: Namespace) -> None:
    rows = read_json_lines(Path(args.src), "answers file")
    write_json(Path(args.dst), {mmvet_name(row["question_id"]): row["text"] for row in rows})


SCRIPT = EvalScript("convert_mmvet_for_eval.py", "Make MM-Vet's file of results.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
