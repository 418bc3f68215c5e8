"""Tasks made from a file of questions: rows with questions, images and answers, and the name of a metric.

A row has `image` (or `images`), `question` (or `text`) and `answer` (or `answers`), and may have `question_id`, `category`
and `options`; own_rows.py reads files and fields. `llava eval mine.jsonl` runs it as it is; `mine.yaml` says what differs from
the defaults; in Python, `TASKS["mine"] = custom_task("mine", "mine.jsonl")` adds it to the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import find_file, read_text
from llava.eval.metrics.choices import LETTERS, find_letter
from llava.eval.metrics.vqa import anls, exact_accuracy, soft_accuracy
from llava.eval.metrics.yes_no import pope_answer
from llava.eval.tasks.own_rows import WHAT, has_option_columns, read_own_rows
from llava.eval.tasks.task import LETTER_SUFFIX, WORD_SUFFIX, Task, accuracy
from llava.eval.types import AnsweredQuestion, Question, Scores

KEYS = {"name", "title", "file", "images", "metric", "suffix", "max_new_tokens"}


def _letter(text: str, answers: Sequence[str], options: Sequence[str]) -> float:
    letter = find_letter(text, options)
    right = {LETTERS[options.index(answer)] if answer in options else answer for answer in answers}
    return float(letter in right)


# From an answer's text, the right answers and the options to a score from 0 to 1.
METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "match": lambda text, answers, options: exact_accuracy(text, answers),
    "exact": lambda text, answers, options: float(text.strip() in answers),
    "contains": lambda text, answers, options: float(any(answer.lower() in text.lower() for answer in answers)),
    "vqa": lambda text, answers, options: soft_accuracy(text, answers),
    "anls": lambda text, answers, options: anls(text, answers),
    "yes_no": lambda text, answers, options: float(pope_answer(text) in [answer.lower() for answer in answers]),
    "choice": _letter,
}
SUFFIXES = {"choice": LETTER_SUFFIX, "contains": ""}


def custom_task(
    name: str,
    file: str | Path,
    *,
    title: str | None = None,
    folder: str = "",
    images: str | Path = "",
    metric: str | None = None,
    suffix: str | None = None,
    max_new_tokens: int = 128,
) -> Task:
    """Make a task from a file of rows.

    Args:
        name: the task's name, as `llava eval` takes it.
        file: the rows, relative to `folder` unless absolute.
        title: the name in reports (default: `name`).
        folder: the task's folder in the data folder.
        images: what the rows' images are relative to, itself relative to `folder` unless absolute.
        metric: a name of `METRICS`; `InputError` if it is none. None: "choice" for a table with options, else "match".
        suffix: the last line of every prompt; None asks for a word, or for a letter where the metric is "choice".
        max_new_tokens: of an answer, at most.
    """
    if metric is None:
        metric = "choice" if has_option_columns(Path(folder) / file) else "match"
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r} of the task {name!r}; known: {', '.join(METRICS)}")
    ending = SUFFIXES.get(metric, WORD_SUFFIX) if suffix is None else suffix
    return Task(
        name,
        title or name,
        folder,
        partial(read_rows, file=str(file), images=str(images), suffix=ending, metric=metric),
        partial(_score, metric=metric),
        headline=metric,
        max_new_tokens=max_new_tokens,
    )


def task_from_file(path: Path) -> Task:
    """Make the task that a file of rows, or a YAML file about one, describes. Paths in it are relative to that file."""
    folder = path.resolve().parent
    if path.suffix not in (".yaml", ".yml"):
        return custom_task(path.stem, path.name, folder=str(folder))
    import yaml

    try:
        values = yaml.safe_load(read_text(path, "description of a task"))
    except yaml.YAMLError as error:
        raise InputError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or "file" not in values:
        raise InputError(f"{str(path)!r} must have keys and values, among them `file`, the rows of the task")
    unknown = sorted(set(values) - KEYS)
    if unknown:
        raise InputError(f"{str(path)!r} has the unknown key {unknown[0]!r}; known: {', '.join(sorted(KEYS))}")
    for key, value in values.items():
        if not isinstance(value, int if key == "max_new_tokens" else str) or value in (True, False, ""):
            needed = "a number" if key == "max_new_tokens" else "a text"
            raise InputError(f"{str(path)!r} has {key}: {value!r}; it must be {needed}")
    name = str(values.pop("name", path.stem))
    file, images = values.pop("file"), values.pop("images", "")
    return custom_task(name, str(file), folder=str(folder), images=str(images), **values)


def read_rows(folder: Path, *, file: str, images: str, suffix: str, metric: str = "match") -> list[Question]:
    """Read the questions of a file of rows."""
    path = find_file(folder, (file,), WHAT)
    questions = []
    for number, row in enumerate(read_own_rows(path, folder / images), start=1):
        if metric == "choice" and not {*row.answers} & {*row.options, *LETTERS[: len(row.options)]}:
            options = ", ".join(map(repr, row.options)) or "none"
            raise InputError(
                f"{path}, row {number}: the metric is choice, but the answer {row.answers[0]!r} is no letter and no text of "
                f"the row's options ({options}); give them, or another metric"
            )
        lines = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, row.options, strict=False))
        prompt = f"{row.question}{lines}" + (f"\n{suffix}" if suffix else "")
        extra = {"question": row.question}
        questions.append(
            Question(row.id, prompt, row.images, row.category, list(row.answers), row.options, extra=extra)
        )
    return questions


def _score(answered: Sequence[AnsweredQuestion], *, metric: str) -> Scores:
    judge = METRICS[metric]
    verdicts = [
        0.0 if one.text is None else float(judge(one.text, one.question.references, one.question.options))
        for one in answered
    ]
    return accuracy(answered, verdicts)
