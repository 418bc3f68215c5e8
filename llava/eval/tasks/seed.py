"""SEED-Bench: multiple choice questions about images and about frames of videos.

Reads `llava-seed-bench.jsonl` and `SEED-Bench.json` (question types, data types, answers). An answer is right if it is the
right letter and nothing else, as in the original's converter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import find_file, find_optional, need, read_json_object, write_json_lines
from llava.eval.metrics.accuracy import by_category
from llava.eval.tasks.short import read_questions
from llava.eval.tasks.task import LETTER_SUFFIX, Task, accuracy, refuse_gaps
from llava.eval.types import AnsweredQuestion, JsonRow, Question, Scores


def read(folder: Path) -> list[Question]:
    truths = read_truths(find_file(folder, ("SEED-Bench.json",), "file of SEED-Bench's answers"))
    file = find_optional(folder, ("llava-seed-bench.jsonl",))
    asked = [_question(folder, row) for row in truths.values()] if file is None else read_questions(file, folder)
    questions = []
    for question in asked:
        row = truths.get(str(question.id))
        if row is None:
            raise InputError(f"SEED-Bench's question {question.id!r} is not in SEED-Bench.json")
        extra = {"kind": row["data_type"], "question_id": row["question_id"]}
        questions.append(replace(question, category=row["type"], answer=row["answer"], extra=extra))
    return questions


def _question(folder: Path, row: JsonRow) -> Question:
    """Make a question from a row of SEED-Bench.json, with the prompt of LLaVA's file."""
    options = [f"{letter.upper()}. {row[key]}" for letter in "abcd" if (key := f"choice_{letter}") in row]
    prompt = "\n".join([str(row.get("question", "")), *options, LETTER_SUFFIX])
    if row["data_type"] == "image":
        return Question(row["question_id"], prompt, (folder / "SEED-Bench-image" / str(row.get("data_id", "")),))
    return Question(row["question_id"], prompt, (folder / "SEED-Bench-video-image" / f"{row['question_id']}.png",))


def read_truths(file: Path) -> dict[str, JsonRow]:
    """Read the questions of SEED-Bench.json by id, each with the name of its type."""
    data = read_json_object(file, "file of SEED-Bench's answers")
    names = {number: name for name, number in need(data, "question_type", str(file)).items()}
    rows = need(data, "questions", str(file))
    return {str(row["question_id"]): {**row, "type": names[row["question_type_id"]]} for row in rows}


def type_order(truths: Mapping[str, JsonRow]) -> list[str]:
    return [name for _, name in sorted({(row["question_type_id"], row["type"]) for row in truths.values()})]


def score(answered: Sequence[AnsweredQuestion]) -> Scores:
    verdicts = [float(one.text == one.question.answer) for one in answered]
    scores = accuracy(answered, verdicts)
    kinds = by_category((one.question.extra["kind"], verdict) for one, verdict in zip(answered, verdicts, strict=True))
    figures = {**scores.figures, **{f"{kind}_accuracy": found["accuracy"] for kind, found in kinds.items()}}
    longer = sum(one.text is not None and len(one.text.strip()) > 1 for one in answered)
    notes = (f"{longer} answers are more than a letter and count as wrong",) if longer else ()
    return replace(scores, figures=figures, notes=notes)


def write(answered: Sequence[AnsweredQuestion], home: Path, folder: Path) -> Path:
    refuse_gaps(answered, "SEED-Bench")
    file = folder / "seed.jsonl"
    pairs = ((one.question.extra["question_id"], one.text or "") for one in answered)
    write_json_lines(file, [{"question_id": name, "prediction": text} for name, text in pairs])
    return file


SEED = Task("seed", "SEED-Bench", "seed_bench", read, score, headline="accuracy", write=write)
