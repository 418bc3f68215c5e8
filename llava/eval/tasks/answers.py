"""Read files of answers, and find the question that each answer belongs to.

In: a file or folder of answers, in JSON lines or in a benchmark's own result format, and the task's questions. Out: a text for
each question. A missing answer counts as wrong, the last of several counts, and an answer to an unknown question is ignored;
all three are counted in `Faults`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import Faults, read_json, read_json_lines, read_table, read_text
from llava.eval.types import AnsweredQuestion, JsonRow, Question, QuestionId, QuestionKey

TEXT_FIELDS = ("text", "answer", "response", "prediction", "pred_answer", "output")
ID_FIELDS = ("question_id", "questionId", "id", "index", "data_id")
UNKNOWN_QUESTIONS = ("answers to unknown questions", "no such question in the task, so they count nowhere")


@dataclass(frozen=True)
class AnswerRecord:
    """One line of an answers file. `id` is None where the format goes by the order of the questions alone."""

    id: QuestionId | None
    text: str
    prompt: str | None = None
    round: int = 0
    category: str = ""
    file: str = ""
    number: int = 0  # which answer of its file

    @property
    def where(self) -> str:
        return f"{self.file}, answer {self.number}"


def keys_of(questions: Sequence[Question]) -> list[QuestionKey]:
    """Make a key for each question: the id alone where it is unique, with the prompt where several share it."""
    counts = Counter((str(question.id), question.round) for question in questions)
    keys = []
    for question in questions:
        is_shared = counts[str(question.id), question.round] > 1
        keys.append(QuestionKey(str(question.id), question.row_prompt if is_shared else "", question.round))
    seen: set[QuestionKey] = set()
    for key, question in zip(keys, questions, strict=True):
        if key in seen:
            raise InputError(f"question {question.id!r} occurs twice with the same prompt: give each its own id")
        seen.add(key)
    return keys


def read_answers(path: Path, faults: Faults) -> list[AnswerRecord]:
    """Read a file of answers, or all in a folder: JSON lines, a JSON list or object, or a table with predictions."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".json", ".xlsx", ".tsv", ".csv"))
        if not files:
            raise InputError(f"there are no answers in {str(path)!r}: no .jsonl, .json, .xlsx, .tsv or .csv file")
        return [answer for file in files for answer in read_answers(file, faults)]
    return list(_answers(_rows(path, faults), path, faults))


def _rows(path: Path, faults: Faults) -> list[JsonRow]:
    if path.suffix in (".xlsx", ".tsv", ".csv"):
        return list(read_table(path, "answers file", needed=("index", "prediction")))
    text = read_text(path, "answers file").strip()
    if not text:
        raise InputError(f"the answers file {str(path)!r} is empty")
    if text.startswith("[") or (text.startswith("{") and path.suffix == ".json"):
        value = read_json(path, "answers file")
        if isinstance(value, list):
            return [row if isinstance(row, dict) else {"answer": row} for row in value]
        assert isinstance(value, dict)
        if isinstance(value.get("outputs"), dict):  # ScienceQA's result file
            value = value["outputs"]
        return [{"question_id": name, "text": text} for name, text in value.items()]
    return read_json_lines(path, "answers file", faults=faults)


def _answers(rows: Iterable[JsonRow], path: Path, faults: Faults) -> Iterable[AnswerRecord]:
    for number, row in enumerate(rows, start=1):
        text = next((row[name] for name in TEXT_FIELDS if name in row), None)
        if not isinstance(text, str):
            meaning = f"none of {', '.join(TEXT_FIELDS)} is a text, so they count as missing"
            faults.add("answers without text", meaning, f"{path}, answer {number}")
            continue
        name = next((row[name] for name in ID_FIELDS if name in row), None)
        prompt = row.get("prompt", row.get("question"))
        prompt = prompt if isinstance(prompt, str) else None
        round_, category = int(row.get("round_id", 0)), str(row.get("category", ""))
        yield AnswerRecord(name, text, prompt, round_, category, str(path), number)


def pair(
    questions: Sequence[Question], answers: Sequence[AnswerRecord], faults: Faults, *, source: str
) -> list[AnsweredQuestion]:
    """Give every question its answer's text; count missing, repeated and unknown answers.

    Answers are paired by id, or in the order of the questions where none has an id. `source` is what an error calls them.

    Raises:
        InputError: no answer belongs to the task, or answers without ids are not in the order of the questions.
    """
    keys = keys_of(questions)
    if answers and all(answer.id is None for answer in answers):
        return _pair_in_order(questions, answers, faults, source)
    indexes = {key: index for index, key in enumerate(keys)}
    shared = {key.id for key in keys if key.prompt}
    texts: list[str | None] = [None] * len(questions)
    for answer in answers:
        name = str(answer.id)
        key = QuestionKey(name, answer.prompt or "" if name in shared else "", answer.round)
        index = indexes.get(key)
        if index is None and name in shared:
            index = _index_by_question(questions, name, answer)
        if index is None:
            faults.add(*UNKNOWN_QUESTIONS, repr(answer.id))
            continue
        if texts[index] is not None:
            faults.add("repeated answers", "the last answer to a question counts", repr(answer.id))
        texts[index] = answer.text
    if answers and not any(text is not None for text in texts):
        raise InputError(
            f"none of the {len(answers)} answers in {source} belongs to a question of this task (the first is to "
            f"{answers[0].id!r}, the task's first question is {questions[0].id!r}); give the answers of this task"
        )
    return _with_missing_counted(questions, texts, faults)


def _index_by_question(questions: Sequence[Question], name: str, answer: AnswerRecord) -> int | None:
    """Find the only question of a shared id whose text the answer's prompt contains; None if there are more or none."""
    fitting = [
        index
        for index, question in enumerate(questions)
        if str(question.id) == name and question.round == answer.round
        and _normalised(question.bare_prompt) in _normalised(answer.prompt or "")
    ]  # fmt: skip
    return fitting[0] if len(fitting) == 1 else None


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def _pair_in_order(
    questions: Sequence[Question], answers: Sequence[AnswerRecord], faults: Faults, source: str
) -> list[AnsweredQuestion]:
    """Pair line by line, for formats without ids; where answers repeat their question, it is compared."""
    if len(answers) > len(questions):
        raise InputError(f"{source} has {len(answers)} answers without ids, for {len(questions)} questions")
    texts: list[str | None] = [None] * len(questions)
    for index, answer in enumerate(answers):
        forms = (questions[index].bare_prompt, questions[index].prompt)
        if answer.prompt is not None and _normalised(answer.prompt) not in map(_normalised, forms):
            raise InputError(
                f"{answer.where} answers {answer.prompt!r}, where the question in that place is {forms[0]!r}; answers "
                "without ids must be in the order of the questions"
            )
        texts[index] = answer.text
    return _with_missing_counted(questions, texts, faults)


def _with_missing_counted(
    questions: Sequence[Question], texts: Sequence[str | None], faults: Faults
) -> list[AnsweredQuestion]:
    for question, text in zip(questions, texts, strict=True):
        if text is None:
            faults.add("missing answers", "they count as wrong", repr(question.id))
    return [AnsweredQuestion(question, text) for question, text in zip(questions, texts, strict=True)]
