"""POPE: yes/no questions about objects in an image. Its three splits differ in which absent objects are asked for.

Reads `llava_pope_test.jsonl` (questions with their split as `category`) and `coco/coco_pope_SPLIT.json` (labels, in the same
order), or the latter alone. Scored by the official rule for yes and no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import find_optional, need, read_json_lines
from llava.eval.metrics.yes_no import YesNoCounts, pope_answer
from llava.eval.tasks.answers import AnswerRecord
from llava.eval.tasks.task import WORD_SUFFIX, Task
from llava.eval.types import AnsweredQuestion, JsonRow, Question, Scores

SPLITS = ("random", "popular", "adversarial")
IMAGES = ("val2014", "coco/val2014", "images")


def read(folder: Path) -> list[Question]:
    labels = read_labels(folder)
    images = find_optional(folder, IMAGES) or folder / IMAGES[0]
    questions = find_optional(folder, ("llava_pope_test.jsonl",))
    if questions is None:
        return [
            Question(
                f"{split}/{row['question_id']}", f"{row['text']}\n{WORD_SUFFIX}", (images / row["image"],), split,
                row["label"], extra={"question": row["text"]},
            )
            for split, rows in labels.items()
            for row in rows
        ]  # fmt: skip
    return label_questions(read_json_lines(questions, "file of POPE's questions"), labels, images)


def read_labels(folder: Path) -> dict[str, list[JsonRow]]:
    """Read the rows of each split's official file."""
    names = [file for place in (folder, folder / "coco") for file in sorted(place.glob("coco_pope_*.json"))]
    files = {file.stem.removeprefix("coco_pope_"): file for file in names}
    order = [split for split in SPLITS if split in files] + [split for split in files if split not in SPLITS]
    found = {split: read_json_lines(files[split], "file of POPE's labels") for split in order}
    if not found:
        raise InputError(
            f"POPE's labels are missing: no coco/coco_pope_SPLIT.json in {str(folder)!r}; docs/evaluate.md says where "
            "they come from"
        )
    return found


def label_questions(rows: Sequence[JsonRow], labels: dict[str, list[JsonRow]], images: Path) -> list[Question]:
    """Give questions their labels. The two files are matched by order within a split, since their ids differ."""
    questions = []
    taken = dict.fromkeys(labels, 0)
    for number, row in enumerate(rows, start=1):
        split = str(need(row, "category", f"POPE's question {number}"))
        if split not in labels:
            continue
        if taken[split] >= len(labels[split]):
            raise InputError(f"POPE has more questions of the split {split!r} than labels ({len(labels[split])})")
        label = labels[split][taken[split]]
        taken[split] += 1
        where = f"POPE's question {row.get('question_id', number)!r}"
        if "text" in label and not str(need(row, "text", where)).startswith(label["text"]):
            raise InputError(
                f"{where} asks {row['text']!r} where the label's file asks {label['text']!r}; they must be in one order"
            )
        name, prompt, image = (need(row, field, where) for field in ("question_id", "text", "image"))
        answer = need(label, "label", f"a label of {split!r}")
        questions.append(Question(name, prompt, (images / image,), split, answer))
    short = [split for split, number in taken.items() if number < len(labels[split])]
    if short:
        raise InputError(
            f"POPE has fewer questions of the split {short[0]!r} ({taken[short[0]]}) than labels ({len(labels[short[0]])})"
        )
    return questions


def fit_answers(answers: Sequence[AnswerRecord], questions: Sequence[Question]) -> list[AnswerRecord]:
    """Add the split to answers' ids, where only the official files are there, whose splits count from 1 each.

    The split is in an answer's row or in its file's name. POPE's own result files have no ids and are matched by order.
    """
    if not any("/" in str(question.id) for question in questions):
        return list(answers)
    taken = dict.fromkeys(SPLITS, 0)
    fitted = []
    for answer in answers:
        split = next((split for split in SPLITS if split in (answer.category or Path(answer.file).name)), None)
        if split is not None and "/" not in str(answer.id):
            taken[split] += 1
            answer = replace(answer, id=f"{split}/{taken[split] if answer.id is None else answer.id}")
        fitted.append(answer)
    return fitted


def score(answered: Sequence[AnsweredQuestion]) -> Scores:
    parsed = [None if given.text is None else pope_answer(given.text) for given in answered]
    truths = [given.question.reference for given in answered]
    splits = list(dict.fromkeys(given.question.category for given in answered))
    places = {split: [n for n, given in enumerate(answered) if given.question.category == split] for split in splits}
    unanswered = [split for split in splits if all(parsed[n] is None for n in places[split])]
    scored = [split for split in splits if split not in unanswered] or splits
    counts = {split: YesNoCounts.count((parsed[n], truths[n]) for n in places[split]) for split in scored}
    categories = {split: found.figures() for split, found in counts.items()}
    means = {
        name: sum(found[name] for found in categories.values()) / len(categories)
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")
    }
    notes = [f"{split}: no answers at all, so this split is left out" for split in unanswered if split not in scored]
    notes += [
        f"{split}: {' and '.join(names)} had nothing to divide by and stand as 0"
        for split, found in counts.items()
        if (names := found.undefined())
    ]
    verdicts = [float(found == truth) for found, truth in zip(parsed, truths, strict=True)]
    return Scores(means, categories, verdicts, headline=means["f1"] * 100, notes=tuple(notes))


POPE = Task("pope", "POPE", "pope", read, score, headline="mean F1 of the splits", fit_answers=fit_answers)
