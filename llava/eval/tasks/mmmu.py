"""MMMU: multiple choice and open questions from college courses of thirty subjects, with one image or several.

Reads the data set's own parquet files, `SUBJECT/validation-*.parquet`, or for scoring alone the official
`answer_dict_val.json`. Scores answers, the official file of parsed answers (`{"validation_Art_1": "B", ...}`), and the
official folders `SUBJECT/output.json`, which hold options and references.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.errors import InputError, require
from llava.eval.files import Faults, find_optional, need, read_json, read_json_object, read_json_rows, write_json
from llava.eval.metrics.choices import LETTERS, Guesser, mmmu_letter, mmmu_open_right
from llava.eval.tasks.answers import UNKNOWN_QUESTIONS
from llava.eval.tasks.task import LETTER_SUFFIX, WORD_SUFFIX, Task
from llava.eval.types import AnsweredQuestion, JsonRow, Question, Scores, ratio

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials",
        "Mechanical_Engineering",
    ),
}  # fmt: skip
SUBJECTS = sorted(subject for subjects in DOMAINS.values() for subject in subjects)
CHOICE = "multiple-choice"
NUM_IMAGES = 7


def read(folder: Path) -> list[Question]:
    files = {
        subject: found[0]
        for subject in SUBJECTS
        for below in (folder / "MMMU" / subject, folder / subject)
        if (found := sorted(below.glob("validation-*.parquet")))
    }
    if files:
        return [question for subject, file in files.items() for question in _parquet_questions(file)]
    answers = find_optional(folder, ("answer_dict_val.json", "eval/answer_dict_val.json"))
    if answers is None:
        raise InputError(
            f"MMMU is missing: neither SUBJECT/validation-*.parquet nor answer_dict_val.json in {str(folder)!r}; "
            "docs/evaluate.md says where they come from"
        )
    return [_question_of_answer(name, row) for name, row in read_json_object(answers).items()]


def _parquet_questions(file: Path) -> list[Question]:
    table = require("pyarrow.parquet", extra="eval").read_table(file)
    return [question_from_row(row) for row in table.to_pylist()]


def question_from_row(row: JsonRow) -> Question:
    """Make a question as MMMU's script asks LLaVA-1.5: images first, `<image 1>` and the like left in the text."""
    options = tuple(map(str, ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]))
    cells = (row.get(f"image_{number}") for number in range(1, NUM_IMAGES + 1))
    images = tuple(cell["bytes"] for cell in cells if cell is not None and cell.get("bytes"))
    if row["question_type"] == CHOICE:
        lines = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        prompt = f"{row['question']}\n\n{lines}\n\n{LETTER_SUFFIX}"
    else:
        prompt = f"{row['question']}\n\n{WORD_SUFFIX}"
    return _make_question(str(row["id"]), row["question_type"], row["answer"], options, prompt, images)


def _question_of_answer(name: str, row: JsonRow) -> Question:
    """Make a question from the file of answers alone, which is enough to score it."""
    return _make_question(name, need(row, "question_type", name), need(row, "ground_truth", name), (), "", ())


def _make_question(
    name: str, kind: str, answer: str | list[str], options: tuple[str, ...], prompt: str, images: tuple[bytes, ...]
) -> Question:
    if isinstance(answer, str) and answer.startswith("["):  # several right answers, written as a list
        answer = ast.literal_eval(answer)
    return Question(name, prompt, images, subject_of(name), answer, options, extra={"kind": kind, "question": prompt})


def subject_of(name: str) -> str:
    return "_".join(name.split("_")[1:-1])


def score(answered: Sequence[AnsweredQuestion]) -> Scores:
    guesser = Guesser()
    return summarise([(one.question.category, judge(one, guesser)) for one in answered], guesser)


def judge(one: AnsweredQuestion, guesser: Guesser) -> float:
    if one.text is None:
        return 0.0
    if one.question.extra["kind"] != CHOICE:
        return float(mmmu_open_right(one.text, one.question.references))
    options = dict(zip(LETTERS, one.question.options, strict=False)) or dict.fromkeys(LETTERS, "\0")
    letter = mmmu_letter(one.text, options) or guesser.guess(list(options))
    return float(letter in one.question.references)


def summarise(judged: Sequence[tuple[str, float]], guesser: Guesser) -> Scores:
    groups: dict[str, list[float]] = {}
    for subject, verdict in judged:
        groups.setdefault(subject, []).append(verdict)
    categories: dict[str, dict[str, float | int]] = {}
    for domain, subjects in DOMAINS.items():
        present = {subject: groups[subject] for subject in subjects if subject in groups}
        if present:
            categories[f"Overall-{domain}"] = _accuracy([verdict for found in present.values() for verdict in found])
            categories |= {subject: _accuracy(found) for subject, found in present.items()}
    verdicts = [verdict for _, verdict in judged]
    total = ratio(sum(verdicts), len(verdicts))
    guesses = guesser.num_guesses
    note = f"{guesses} answers named no choice, so that a random one was taken, drawn as the official script draws them"
    return Scores(
        {"accuracy": total, "right": int(sum(verdicts)), "questions": len(verdicts), "guessed": guesses},
        categories,
        verdicts,
        headline=total * 100,
        notes=(note,) if guesses else (),
    )


def _accuracy(found: Sequence[float]) -> dict[str, float | int]:
    return {"accuracy": sum(found) / len(found), "questions": len(found)}


def score_results(path: Path, folder: Path, faults: Faults) -> Scores | None:
    files = [file for subject in SUBJECTS if (file := path / subject / "output.json").is_file()]
    if files:
        rows = [row for file in files for row in read_json_rows(file, "output of MMMU")]
        return _score_rows(rows)
    if path.suffix != ".json":
        return None
    value = read_json(path, "output of MMMU")
    if isinstance(value, list) and value and "question_type" in value[0]:
        return _score_rows(value)
    if not isinstance(value, dict) or not all(isinstance(text, (str, list)) for text in value.values()):
        return None
    return _score_parsed(value, {str(question.id): question for question in read(folder)}, faults)


def _score_rows(rows: Sequence[JsonRow]) -> Scores:
    guesser = Guesser()
    judged = []
    for row in rows:
        name = str(need(row, "id", "a row of MMMU's output"))
        options = tuple(row.get("index2ans", {}).values())
        question = _make_question(name, row["question_type"], need(row, "answer", name), options, "", ())
        judged.append((question.category, judge(AnsweredQuestion(question, str(need(row, "response", name))), guesser)))
    return summarise(judged, guesser)


def _score_parsed(texts: JsonRow, questions: Mapping[str, Question], faults: Faults) -> Scores:
    """Score the official file of answers already parsed: a choice must be the letter itself."""
    for name in texts:
        if name not in questions:
            faults.add(*UNKNOWN_QUESTIONS, repr(name))
    judged = []
    for name, question in questions.items():
        text = texts.get(name)
        if text is None:
            faults.add("missing answers", "they count as wrong", repr(name))
            verdict = 0.0
        elif question.extra["kind"] == CHOICE:
            verdict = float(text in question.references)
        else:
            verdict = float(mmmu_open_right(text if isinstance(text, str) else json.dumps(text), question.references))
        judged.append((question.category, verdict))
    return summarise(judged, Guesser())


def write(answered: Sequence[AnsweredQuestion], home: Path, folder: Path) -> Path:
    """Write the file of parsed answers that the test split's server takes."""
    guesser = Guesser()
    parsed = {}
    for one in answered:
        options = dict(zip(LETTERS, one.question.options, strict=False))
        text = one.text or ""
        is_choice = one.question.extra["kind"] == CHOICE and options
        if is_choice:
            text = mmmu_letter(text, options) or guesser.guess(list(options))
        parsed[str(one.question.id)] = text
    file = folder / "mmmu.json"
    write_json(file, parsed)
    return file


MMMU = Task("mmmu", "MMMU, validation", "mmmu", read, score, "accuracy", write=write, score_results=score_results)
