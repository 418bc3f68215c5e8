"""The embedded model's held-out suite: drawn scenes, reading, yes/no questions in POPE's form, photographs.

Reads `tiny/scenes.jsonl`, `reading.jsonl`, `yes_no.jsonl` and `photos.jsonl`, which `recipes/tiny/freeze.py` makes. The first
three are in the repository; the photographs are a data set's of their own and made from one's copy of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava.errors import InputError
from llava.eval.tasks.custom import custom_task, read_rows
from llava.eval.tasks.pope import score as score_yes_no
from llava.eval.tasks.task import Task
from llava.eval.types import Question

PHOTOS_HINT = "python recipes/tiny/freeze.py --cifar CIFAR --out playground/data/eval/tiny"


def _part(name: str, title: str, metric: str) -> Task:
    return custom_task(
        f"tiny-{name}", f"{name}.jsonl", title=title, folder="tiny", metric=metric, suffix="", max_new_tokens=24
    )


def read_yes_no(folder: Path) -> list[Question]:
    questions = read_rows(folder, file="yes_no.jsonl", images="", suffix="")
    return [replace(question, answer=question.references[0].lower()) for question in questions]


def read_photos(folder: Path) -> list[Question]:
    if not has_photos(folder):
        raise InputError(f"there are no photographs in {str(folder)!r}; make them with: {PHOTOS_HINT}")
    return read_rows(folder, file="photos.jsonl", images="", suffix="")


def has_photos(folder: Path) -> bool:
    return (folder / "photos.jsonl").is_file()


SCENES = _part("scenes", "Drawn scenes", "match")
READING = _part("reading", "Reading", "exact")
YES_NO = Task(
    "tiny-yes-no", "Yes or no, in POPE's form", "tiny", read_yes_no, score_yes_no,
    headline="mean F1 of the splits", max_new_tokens=24,
)  # fmt: skip
PHOTOS = replace(_part("photos", "Photographs", "match"), read=read_photos)
