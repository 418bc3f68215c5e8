"""Answers on disk while a run goes on: one line each as it comes, in a form that survives being killed at any point.

In: answers in any order. Out: a file with one line for each, in which a half-written last line is the only damage that can
be; it is cut off when the file is opened again. Several shards write a file each; together they hold every answer once.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from llava.eval.tasks.answers import keys_of
from llava.eval.types import JsonRow, Question, QuestionKey

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22
_NAMESPACE = uuid.UUID("6c6c6176-6120-6576-616c-75617469006e")


def answer_row(question: Question, text: str, model_id: str) -> JsonRow:
    """An answer as the original writes it, with rounds and options where the task has them."""
    row: JsonRow = {"question_id": question.id}
    if "option_char" in question.extra:
        row["round_id"] = question.round
    row |= {"prompt": question.row_prompt, "text": text}
    if "option_char" in question.extra:
        row |= {"options": list(question.options), "option_char": question.extra["option_char"]}
    return row | {"answer_id": answer_id(question, text, model_id), "model_id": model_id, "metadata": {}}


def answer_id(question: Question, text: str, model_id: str) -> str:
    """22 letters and digits as the original's, but the same for the same answer, so that runs can be compared as files."""
    number = uuid.uuid5(_NAMESPACE, f"{model_id}\0{question.id}\0{question.round}\0{question.row_prompt}\0{text}").int
    letters = []
    for _ in range(_ID_LENGTH):
        number, place = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[place])
    return "".join(reversed(letters))


def row_key(row: JsonRow, shared: frozenset[str]) -> QuestionKey:
    """Which question a row answers; `shared` are the ids that several questions have."""
    name = str(row["question_id"])
    return QuestionKey(name, row["prompt"] if name in shared else "", row.get("round_id", 0))


class AnswerLog:
    """The answers of one task in a folder: `answers.jsonl` when all are there, `parts/` until then."""

    def __init__(self, folder: Path, questions: Sequence[Question], model_id: str) -> None:
        self.folder = folder
        self._questions = questions
        self._keys = keys_of(questions)
        self._shared = frozenset(key.id for key in self._keys if key.prompt)
        self._model_id = model_id
        self.file = folder / "answers.jsonl"
        self._parts = folder / "parts"

    def answered(self) -> dict[QuestionKey, JsonRow]:
        """The rows of all answers that are there, whoever wrote them."""
        known = set(self._keys)
        found: dict[QuestionKey, JsonRow] = {}
        for file in [self.file, *sorted(self._parts.glob("*.jsonl"))]:
            for row in whole_lines(file):
                key = row_key(row, self._shared)
                if key in known:
                    found.setdefault(key, row)
        return found

    def missing(self) -> list[tuple[int, Question]]:
        """The questions without an answer, each with its number."""
        there = self.answered()
        return [
            (number, question) for number, question in enumerate(self._questions) if self._keys[number] not in there
        ]

    def part(self, name: str) -> PartWriter:
        return PartWriter(self._parts / f"{name}.jsonl", self._questions, self._model_id)

    def merge(self) -> None:
        """Write all answers in the order of the questions; the parts go only when that file is whole."""
        there = self.answered()
        rows = [there[key] for key in self._keys if key in there]
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(self.file)
        for file in self._parts.glob("*.jsonl"):
            file.unlink()
        if self._parts.is_dir():
            self._parts.rmdir()

    def forget(self) -> None:
        """Throw the answers away, to start over."""
        for file in [self.file, *self._parts.glob("*.jsonl")]:
            file.unlink(missing_ok=True)


class PartWriter:
    """Appends answers to one file, a line each, handed to the system at once."""

    def __init__(self, file: Path, questions: Sequence[Question], model_id: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        cut_half_line(file)
        self._questions = questions
        self._model_id = model_id
        self._out: TextIO = file.open("a", encoding="utf-8")

    def write(self, number: int, text: str) -> None:
        self._out.write(
            json.dumps(answer_row(self._questions[number], text, self._model_id), ensure_ascii=False) + "\n"
        )
        self._out.flush()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._out.close()


def whole_lines(file: Path) -> list[JsonRow]:
    """The rows of a file up to where its writer was stopped."""
    if not file.is_file():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines if line.strip()]


def cut_half_line(file: Path) -> None:
    """Drop what stands after the last line break."""
    if file.is_file():
        data = file.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with file.open("r+b") as out:
                out.truncate(end)
