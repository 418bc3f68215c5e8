"""Turn an answers file of VQAv2 into the file that its server takes.

python scripts/convert_vqav2_for_submission.py --split llava_vqav2_mscoco_test-dev2015 --ckpt llava-v1.5-13b
"""

import sys
from argparse import Namespace
from pathlib import Path

from llava.eval.common_flags import EvalScript, ScriptFlag
from llava.eval.files import Faults, read_json_lines, write_json
from llava.eval.metrics.vqa import normalise

FLAGS = (
    ScriptFlag("--dir", "VQAv2's folder", "./playground/data/eval/vqav2"),
    ScriptFlag("--ckpt", "name of the model's folder below answers/SPLIT/", required=True),
    ScriptFlag("--split", "name of the folder below answers/", required=True),
)


def run(args: Namespace) -> None:
    folder, faults = Path(args.dir), Faults()
    source = folder / "answers" / args.split / args.ckpt / "merge.jsonl"
    results = {row["question_id"]: row["text"] for row in read_json_lines(source, "answers file", faults=faults)}
    names = [row["question_id"] for row in read_json_lines(folder / "llava_vqav2_mscoco_test2015.jsonl")]
    num_broken = sum(fault.count for fault in faults.kinds.values())
    print(f"total results: {len(results)}, total split: {len(names)}, error_line: {num_broken}")
    # The server wants all of test2015; what lies outside of the split asked gets an empty answer.
    answers = [{"question_id": name, "answer": normalise(results.get(name, ""))} for name in names]
    write_json(folder / "answers_upload" / args.split / f"{args.ckpt}.json", answers)


SCRIPT = EvalScript("convert_vqav2_for_submission.py", "Make VQAv2's upload.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
