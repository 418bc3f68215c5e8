"""Print ScienceQA's accuracy for an answers file as the original does, and write its two output files.

    python llava/eval/eval_science_qa.py --base-dir scienceqa --result-file answers.jsonl --output-file analysis.json \\
        --output-result result.json

`llava eval score scienceqa` gives the same figures.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.common_flags import EvalScript, ScriptFlag, report_faults
from llava.eval.files import Faults, need, read_json_lines, write_json
from llava.eval.metrics.choices import science_qa_letter
from llava.eval.tasks.scienceqa import OPTIONS, read_split
from llava.eval.types import JsonRow, ratio

FAILED = "FAILED"

SPLIT_FLAGS = (
    ScriptFlag("--base-dir", "folder with problems.json and pid_splits.json", required=True),
    ScriptFlag("--split", "a split of pid_splits.json", "test"),
    ScriptFlag("--options", "the letters", list(OPTIONS)),
)
FLAGS = (
    *SPLIT_FLAGS,
    ScriptFlag("--result-file", "answers, JSON lines", required=True),
    ScriptFlag("--output-file", "where each answer's analysis goes", required=True),
    ScriptFlag("--output-result", "where the answers as indices go", required=True),
)


def read_predictions(file: str, faults: Faults) -> dict[str, JsonRow]:
    """Read answer rows by question; the last of several counts."""
    found: dict[str, JsonRow] = {}
    for number, row in enumerate(read_json_lines(Path(file), "answers file", faults=faults), start=1):
        name = str(need(row, "question_id", f"answer {number} of {file!r}"))
        if name in found:
            faults.add("repeated answers", "the last answer to a question counts", repr(name))
        found[name] = row
    return found


def get_pred_idx(prediction: str | None, choices: Sequence[str], options: Sequence[str]) -> int:
    """Return the index of a letter among those of a problem's choices, or -1."""
    letters = list(options[: len(choices)])
    return letters.index(prediction) if prediction in letters else -1


def convert_caps(results: Sequence[JsonRow]) -> list[JsonRow]:
    """Write answers as captions, in the form of COCO's results."""
    return [{"image_id": int(row["question_id"]), "caption": row["text"]} for row in results]


def run(args: Namespace) -> None:
    problems = read_split(Path(args.base_dir), args.split)
    faults = Faults()
    predictions = read_predictions(args.result_file, faults)
    groups: dict[str, list[JsonRow]] = {"correct": [], "incorrect": []}
    results, outputs = {}, {}
    for name, problem in problems.items():
        row = predictions.get(name)
        if row is None:
            faults.add("missing answers", "they count as wrong", repr(name))
            row = {"text": FAILED, "prompt": "Unknown"}
        text = row["text"]
        letter = science_qa_letter(text, args.options)
        results[name], outputs[name] = get_pred_idx(letter, problem["choices"], args.options), text
        analysis = {
            "question_id": name,
            "parsed_ans": letter or FAILED,
            "ground_truth": args.options[problem["answer"]],
            "question": row.get("prompt", ""),
            "pred": text,
            "is_multimodal": DEFAULT_IMAGE_TOKEN in row.get("prompt", ""),
        }
        groups["correct" if results[name] == problem["answer"] else "incorrect"].append(analysis)
    for name in predictions.keys() - problems.keys():
        faults.add("answers to unknown questions", "they count nowhere", repr(name))
    correct, total = len(groups["correct"]), len(problems)
    with_image = {name: [row for row in rows if row["is_multimodal"]] for name, rows in groups.items()}
    num_with_image = sum(map(len, with_image.values()))
    if num_with_image:
        image_accuracy = f"{len(with_image['correct']) / num_with_image * 100:.2f}%"
    else:
        image_accuracy = "none (no question has an image)"
    print(
        f"Total: {total}, Correct: {correct}, Accuracy: {ratio(correct, total) * 100:.2f}%, IMG-Accuracy: {image_accuracy}"
    )
    write_json(Path(args.output_file), groups)
    summary = {"acc": ratio(correct, total) * 100, "correct": correct, "count": total}
    write_json(Path(args.output_result), {**summary, "results": results, "outputs": outputs})
    report_faults(faults)


SCRIPT = EvalScript("eval_science_qa.py", "ScienceQA's accuracy.", FLAGS, run)
build_parser, main = SCRIPT.build_parser, SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
