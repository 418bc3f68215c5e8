"""Print POPE's figures for an answers file as the original does.

    python llava/eval/eval_pope.py --annotation-dir coco --question-file llava_pope_test.jsonl --result-file answers.jsonl

Answers belong to questions by id, so their order does not matter; splits are printed in a fixed order. The metric is
in eval/metrics/yes_no.py, and `llava eval score pope` gives the same figures.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.errors import InputError
from llava.eval.common_flags import EvalScript, ScriptFlag, report_faults
from llava.eval.files import Faults, read_json_lines
from llava.eval.metrics.yes_no import YesNoCounts, pope_answer
from llava.eval.tasks.answers import pair, read_answers
from llava.eval.tasks.pope import label_questions, read_labels
from llava.eval.types import JsonRow

FLAGS = (
    ScriptFlag("--annotation-dir", "folder with coco_pope_SPLIT.json", required=True),
    ScriptFlag("--question-file", "llava_pope_test.jsonl", required=True),
    ScriptFlag("--result-file", "answers, JSON lines", required=True),
)


def run(args: Namespace) -> None:
    labels = read_labels(Path(args.annotation_dir))
    questions = label_questions(read_json_lines(Path(args.question_file), "file of questions"), labels, Path())
    faults = Faults()
    answered = pair(questions, read_answers(Path(args.result_file), faults), faults, source=repr(args.result_file))
    for split in labels:
        of_split = [one for one in answered if one.question.category == split]
        print(f"Category: {split}, # samples: {len(of_split)}")
        counts = YesNoCounts.count(
            (None if one.text is None else pope_answer(one.text), one.question.reference) for one in of_split
        )
        print_figures(counts)
        print("====================================")
        for name in counts.undefined():
            faults.add("figures with nothing to divide by", "they stand as 0", f"{name} of {split}")
    report_faults(faults)


def print_figures(counts: YesNoCounts) -> None:
    found = counts.figures()
    print("TP\tFP\tTN\tFN\t\n{TP}\t{FP}\t{TN}\t{FN}".format(**found))
    print("Accuracy: {accuracy}\nPrecision: {precision}\nRecall: {recall}\nF1 score: {f1}".format(**found))
    print("Yes ratio: {yes_ratio}".format(**found))
    print("{f1:.3f}, {accuracy:.3f}, {precision:.3f}, {recall:.3f}, {yes_ratio:.3f}".format(**found))


def eval_pope(answers: Sequence[JsonRow], label_file: str | Path) -> None:
    """Print the figures of one split, whose answers stand in the order of the labels."""
    labels = read_json_lines(Path(label_file), "file of labels")
    if len(answers) != len(labels):
        raise InputError(f"{str(label_file)!r} has {len(labels)} labels for {len(answers)} answers; they go by order")
    pairs = zip(answers, labels, strict=True)
    print_figures(YesNoCounts.count((pope_answer(answer["text"]), label["label"]) for answer, label in pairs))


SCRIPT = EvalScript("eval_pope.py", "POPE's figures for each split.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
