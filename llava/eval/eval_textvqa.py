"""Print TextVQA's accuracy for an answers file, or for each in a folder, as the original does.

    python llava/eval/eval_textvqa.py --annotation-file TextVQA_0.5.1_val.json --result-file answers.jsonl

The question is taken out of the answer's prompt. `llava eval score textvqa` gives the same figure.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import EvalScript, ScriptFlag, report_faults
from llava.eval.files import Faults, need, read_json_lines
from llava.eval.metrics.vqa import mean_score, soft_accuracy
from llava.eval.tasks.short import prompt_processor, textvqa_annotations

__all__ = ["build_parser", "eval_single", "main", "prompt_processor"]

FLAGS = (
    ScriptFlag("--annotation-file", "TextVQA_0.5.1_val.json", required=True),
    ScriptFlag("--result-file", "answers, JSON lines"),
    ScriptFlag("--result-dir", "or a folder with several such files"),
)


def run(args: Namespace) -> None:
    if args.result_file is None and args.result_dir is None:
        raise InputError("give --result-file or --result-dir")
    annotations = textvqa_annotations(Path(args.annotation_file))
    if args.result_file is not None:
        score(Path(args.result_file), annotations)
    for file in sorted(Path(args.result_dir).glob("*.jsonl")) if args.result_dir is not None else ():
        score(file, annotations)


def score(file: Path, annotations: Mapping[tuple[str, str], list[str]]) -> None:
    faults = Faults()
    rows = read_json_lines(file, "answers file", faults=faults)
    pairs = []
    seen = set()
    for number, row in enumerate(rows, start=1):
        where = f"answer {number} of {str(file)!r}"
        name, text = str(need(row, "question_id", where)), str(need(row, "text", where))
        question = prompt_processor(str(need(row, "prompt", where)))
        if (name, question) not in annotations:
            faults.add("answers to unknown questions", "they count nowhere", f"{question!r} about {name!r}")
            continue
        if (name, question) in seen:
            faults.add("repeated answers", "each of them counts, as in the original", f"{question!r} about {name!r}")
        seen.add((name, question))
        pairs.append((text, annotations[name, question]))
    if not pairs:
        raise InputError(f"{str(file)!r} answers no question of the annotation file, so there is nothing to score")
    print(file.stem)
    print(f"Samples: {len(pairs)}\nAccuracy: {100.0 * mean_score(pairs, soft_accuracy):.2f}%\n")
    report_faults(faults)


def eval_single(annotation_file: str | Path, result_file: str | Path) -> None:
    """Print the accuracy of one answers file."""
    score(Path(result_file), textvqa_annotations(Path(annotation_file)))


SCRIPT = EvalScript("eval_textvqa.py", "TextVQA's accuracy.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
