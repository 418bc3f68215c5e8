"""Turn an answers file of GQA into the file that its evaluator reads.

python scripts/convert_gqa_for_eval.py --src merge.jsonl --dst testdev_balanced_predictions.json
"""

import sys
from argparse import Namespace
from pathlib import Path

from llava.eval.common_flags import EvalScript, ScriptFlag
from llava.eval.files import read_json_lines, write_json
from llava.eval.tasks.short import gqa_answer

FLAGS = (
    ScriptFlag("--src", "the answers, JSON lines", required=True),
    ScriptFlag("--dst", "the file to write", required=True),
)


def run(args: Namespace) -> None:
    rows = read_json_lines(Path(args.src), "answers file")
    predictions = [{"questionId": row["question_id"], "prediction": gqa_answer(row["text"])} for row in rows]
    write_json(Path(args.dst), predictions)


SCRIPT = EvalScript("convert_gqa_for_eval.py", "Make GQA's file of predictions.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
