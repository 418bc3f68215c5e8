"""Keep a run's answers on disk, one JSON line each, so that a killed run loses at most a half-written line.

In: answers in any order. Out: a file with one line for each. A half-written last line is cut off when the file is opened
again. Several shards write a file each; together they hold every answer once.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TextIO

from llava.eval.tasks.answers import keys_of
from llava.eval.types import JsonRow, Question, QuestionKey

_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22
_NAMESPACE = uuid.UUID("6c6c6176-6120-6576-616c-75617469006e")


def answer_row(question: Question, text: str, model_id: str) -> JsonRow:
    """Return an answer as the original writes it, with rounds and options where the task has them."""
    row: JsonRow = {"question_id": question.id}
    if "option_char" in question.extra:
        row["round_id"] = question.round
    row |= {"prompt": question.row_prompt, "text": text}
    if "option_char" in question.extra:
        row |= {"options": list(question.options), "option_char": question.extra["option_char"]}
    return row | {"answer_id": answer_id(question, text, model_id), "model_id": model_id, "metadata": {}}


def answer_id(question: Question, text: str, model_id: str) -> str:
    """Make an id of 22 letters and digits. Unlike the original's it depends on the answer alone, so runs compare as files."""
    number = uuid.uuid5(_NAMESPACE, f"{model_id}\0{question.id}\0{question.round}\0{question.row_prompt}\0{text}").int
    letters = []
    for _ in range(_ID_LENGTH):
        number, place = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[place])
    return "".join(reversed(letters))


def row_key(row: JsonRow, shared: frozenset[str]) -> QuestionKey:
    """Return the key of the question that a row answers; `shared` are the ids of several questions."""
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
        """Read the rows of all answers, of this and of earlier runs, by question."""
        known = set(self._keys)
        found: dict[QuestionKey, JsonRow] = {}
        for file in [self.file, *sorted(self._parts.glob("*.jsonl"))]:
            for row in whole_lines(file):
                key = row_key(row, self._shared)
                if key in known:
                    found.setdefault(key, row)
        return found

    def missing(self) -> list[tuple[int, Question]]:
        """Return the questions without an answer, each with its number."""
        known = self.answered()
        pairs = enumerate(zip(self._questions, self._keys, strict=True))
        return [(number, question) for number, (question, key) in pairs if key not in known]

    def part(self, name: str) -> PartWriter:
        """Open the file of one shard's answers."""
        return PartWriter(self._parts / f"{name}.jsonl", self._questions, self._model_id)

    def merge(self) -> None:
        """Write all answers in the order of the questions, and delete the parts once that file is complete."""
        known = self.answered()
        rows = [known[key] for key in self._keys if key in known]
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(self.file)
        for file in self._parts.glob("*.jsonl"):
            file.unlink()
        if self._parts.is_dir():
            self._parts.rmdir()

    def clear(self) -> None:
        """Delete all answers."""
        for file in [self.file, *self._parts.glob("*.jsonl")]:
            file.unlink(missing_ok=True)


class RowWriter:
    """Appends JSON rows to a file, a line each, flushed at once."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        cut_half_line(file)
        self._out: TextIO = file.open("a", encoding="utf-8")

    def write(self, row: JsonRow) -> None:
        self._out.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._out.close()


class PartWriter(RowWriter):
    """Appends answers to the file of one shard."""

    def __init__(self, file: Path, questions: Sequence[Question], model_id: str) -> None:
        super().__init__(file)
        self._questions = questions
        self._model_id = model_id

    def write_answer(self, number: int, text: str) -> None:
        self.write(answer_row(self._questions[number], text, self._model_id))


def whole_lines(file: Path) -> list[JsonRow]:
    """Read the rows of a file, without a half-written last line."""
    if not file.is_file():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines if line.strip()]


def cut_half_line(file: Path) -> None:
    """Cut off a half-written last line."""
    if file.is_file():
        data = file.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with file.open("r+b") as out:
                out.truncate(end)
