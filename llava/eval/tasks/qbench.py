"""Q-Bench, English and Chinese: questions about image quality, and quality scores computed from two logits.

Reads `llvisionqa_SPLIT.json` or its Chinese counterpart and `images_llvisionqa/`. Answers in JSON lines and official responses
are both scored; the test split's references are not public. Files of logits (`gt_score`, `logit_good`, `logit_poor` for
each image) are scored by rank and linear correlation with human opinion scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import Faults, find_file, find_optional, need, read_json_rows, read_text, write_json_lines
from llava.eval.metrics.accuracy import by_category, percent
from llava.eval.metrics.choices import LETTERS, find_letter
from llava.eval.metrics.correlation import pearson, qbench_quality, spearman
from llava.eval.tasks.answers import AnswerRecord
from llava.eval.tasks.task import Task, unscored
from llava.eval.types import AnsweredQuestion, JsonRow, Question, Scores

FILES = {
    "en": ("llvisionqa_dev.json", "llvisionqa_test.json"),
    "zh": ("质衡-问答-验证集.json", "质衡-问答-测试集.json"),
}
# Exactly as published: the Chinese one begins with a stray backslash where a line break was meant.
REQUESTS = {"en": "\nChoose between one of the options as follows:\n", "zh": "\\在下列选项中选择一个:\n"}
IMAGES = ("images_llvisionqa", "images_llviqionqa", "images")  # the guide spells the folder in two ways
LOGITS = (("logit_good", "logit_poor"), ("logit_high", "logit_low"), ("logit_excellent", "logit_poor"))
CGI_PART = 3000  # CGIQA-6K is two sets of this size, whose correlations are averaged, as in the paper


def read(folder: Path, *, lang: str) -> list[Question]:
    file = find_file(folder, FILES[lang], "file of Q-Bench's questions")
    rows = read_json_rows(file, "file of Q-Bench's questions")
    return questions_from_rows(rows, find_optional(folder, IMAGES) or folder / IMAGES[0], lang=lang)


def questions_from_rows(rows: Sequence[JsonRow], images: Path, *, lang: str) -> list[Question]:
    questions = []
    for number, row in enumerate(rows):
        where = f"Q-Bench's question {number}"
        options = tuple(map(str, need(row, "candidates", where)))
        lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        correct = row.get("correct_ans")
        if correct is not None and correct not in options:
            raise InputError(f"{where} has the right answer {correct!r}, which is none of its candidates")
        question = str(need(row, "question", where))
        questions.append(
            Question(number, f"{question}{REQUESTS[lang]}{lines}", (images / str(need(row, "img_path", where)),),
                 str(row.get("type", "")), None if correct is None else options.index(correct), options,
                 extra={"row": dict(row), "question": question})
        )  # fmt: skip
    return questions


def fit_answers(answers: Sequence[AnswerRecord], questions: Sequence[Question]) -> list[AnswerRecord]:
    """Drop the prompts of answers: official responses have no ids and are matched by order, other ids are numbers."""
    return [replace(answer, prompt=None) for answer in answers]


def score(answered: Sequence[AnsweredQuestion]) -> Scores:
    if any(one.question.answer is None for one in answered):
        return unscored(answered, "this split's answers are not public: hand the submission in as Q-Bench's page says")
    letters = [None if one.text is None else find_letter(one.text, one.question.options) for one in answered]
    chosen = [None if letter is None else LETTERS.index(letter) for letter in letters]
    verdicts = [float(index == one.question.answer) for index, one in zip(chosen, answered, strict=True)]
    groups = [
        (name, verdict)
        for one, verdict in zip(answered, verdicts, strict=True)
        for name in (f"type {one.question.category}", f"concern {one.question.extra['row'].get('concern', '?')}")
    ]
    total = percent(verdicts)
    unread = sum(letter is None and one.text is not None for letter, one in zip(letters, answered, strict=True))
    return Scores(
        {"accuracy": total, "right": int(sum(verdicts)), "questions": len(verdicts), "without_letter": unread},
        by_category(sorted(groups, key=lambda pair: pair[0])),
        verdicts,
        headline=total,
        notes=(f"{unread} answers name no option and count as wrong",) if unread else (),
    )


def score_results(path: Path, folder: Path, faults: Faults) -> Scores | None:
    """Score logits: one file, or a folder with a file for each data set."""
    files = sorted([*path.glob("*.json"), *path.glob("*.jsonl")]) if path.is_dir() else [path]
    tables = {file.stem: rows for file in files if (rows := _logit_rows(file)) is not None}
    if not tables:
        return None
    if len(tables) < len(files):
        other = next(file for file in files if file.stem not in tables)
        raise InputError(f"{str(other)!r} has no logits of Q-Bench, while other files beside it do")
    categories = {name: _correlations(name, rows, faults) for name, rows in tables.items()}
    found = categories.values()
    figures = {name: sum(one[name] for one in found) / len(found) for name in ("spearman", "pearson")}
    return Scores(figures, categories, headline=figures["spearman"] * 100)


def _logit_rows(file: Path) -> list[JsonRow] | None:
    """Read a file of logits, which may be a list, lines, or objects without separators; None for any other file."""
    if file.suffix not in (".json", ".jsonl"):
        return None
    text = read_text(file, "file of answers").strip()
    decoder, rows, place = json.JSONDecoder(), [], 0
    try:
        if text.startswith("["):
            rows = json.loads(text)
        else:
            while place < len(text):
                row, place = decoder.raw_decode(text, place)
                rows.append(row)
                place += len(text) - place - len(text[place:].lstrip(", \r\n\t"))
    except ValueError:
        return None
    is_logits = bool(rows) and all(isinstance(row, dict) for row in rows) and any("logit" in key for key in rows[0])
    return rows if is_logits else None


def _correlations(name: str, rows: Sequence[JsonRow], faults: Faults) -> dict[str, float | int]:
    known = next((pair for pair in LOGITS if all(key in rows[0] for key in pair)), None)
    if known is None:
        raise InputError(f"the logits of {name!r} are none of {', '.join('/'.join(pair) for pair in LOGITS)}")
    good, poor = known
    usable = [row for row in rows if all(key in row for key in (good, poor, "gt_score"))]
    for row in rows:
        if row not in usable:
            faults.add("images without logits", "a line needs both logits and gt_score; left out", f"{name}: {row}")
    parts = [usable[:CGI_PART], usable[CGI_PART:]] if name == "cgi" and len(usable) > CGI_PART else [usable]
    found: dict[str, float | int] = {"images": len(usable)}
    for measure, function in (("spearman", spearman), ("pearson", pearson)):
        values = []
        for part in parts:
            truth = [float(row["gt_score"]) for row in part]
            value = function(truth, [qbench_quality(float(row[good]), float(row[poor])) for row in part])
            if value is None:
                faults.add("correlations without meaning", "all values are equal, so the correlation stands as 0", name)
            values.append(value or 0.0)
        found[measure] = sum(values) / len(values)
    return found


def write(answered: Sequence[AnsweredQuestion], home: Path, folder: Path) -> Path:
    """Write each question with its response, the form in which Q-Bench takes answers."""
    file = folder / "qbench_answers.jsonl"
    write_json_lines(file, [{**one.question.extra["row"], "response": one.text or ""} for one in answered])
    return file


def _task(name: str, title: str, lang: str) -> Task:
    return Task(name, title, "qbench", partial(read, lang=lang), score, headline="accuracy", max_new_tokens=1024,
                write=write, fit_answers=fit_answers, score_results=score_results)  # fmt: skip


QBENCH = _task("qbench", "Q-Bench", "en")
QBENCH_ZH = _task("qbench-zh", "Q-Bench, Chinese", "zh")
