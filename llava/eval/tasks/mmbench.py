"""MMBench and MMBench-CN: multiple choice questions with images inside a table, asked once or in rounds.

Reads `mmbench_dev_20230712.tsv` or its Chinese counterpart (columns index, question, hint, A to D, answer, category, image in
base64). In rounds, a question is asked again with its options in another order. It is right if all its rounds are, whether
these are `round_id`s or rows of a circular table (equal `index` modulo a million). The upload has the column `prediction`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import find_file, read_table, write_xlsx
from llava.eval.metrics.accuracy import by_category, percent
from llava.eval.metrics.choices import LETTERS, find_letter
from llava.eval.tasks.task import LETTER_SUFFIX, LETTER_SUFFIX_CN, Task, unscored
from llava.eval.types import AnsweredQuestion, JsonRow, Question, Scores

FILES = {
    "en": ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "mmbench_test_20230712.tsv"),
    "cn": ("mmbench_dev_cn_20231003.tsv", "mmbench_test_cn_20231003.tsv"),
}
SUFFIXES = {"en": LETTER_SUFFIX, "cn": LETTER_SUFFIX_CN}
OPTION_LETTERS = LETTERS[:4]
EMPTY = ("", "nan", "none")
CIRCULAR_STEP = 1_000_000
LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")


def read(folder: Path, *, lang: str, circular: bool) -> list[Question]:
    file = find_file(folder, FILES[lang], "MMBench's table")
    rows = read_table(file, "MMBench's table", needed=("index", "question", "image"))
    return questions_from_table(rows, suffix=SUFFIXES[lang], all_rounds=circular)


def questions_from_table(
    rows: Sequence[Mapping[str, str]],
    *,
    suffix: str | None,
    all_rounds: bool,
    whole: Sequence[Mapping[str, str]] | None = None,
) -> list[Question]:
    """Make a question for each row, or with `all_rounds` for each row and order of its options.

    `suffix` is the last line of every prompt, which asks for the letter alone. Where `rows` are a part of the table, `whole` is
    all of it, since a row may refer to another's image.
    """
    images = {row["index"]: row["image"] for row in whole or rows}
    questions = []
    for row in rows:
        options = options_of(row)
        letters = LETTERS[: len(options)]
        image = _image(row, images)
        question = row["question"] if is_none(row.get("hint")) else f"{row['hint']}\n{row['question']}"
        for number in range(len(options) if all_rounds else 1):
            turned = options[number:] + options[:number]
            meant = letters[number:] + letters[:number]  # the table's letter of each letter shown
            lines = (f"{letter}. {option}" for letter, option in zip(letters, turned, strict=True))
            shown = "\n".join([question, *lines])
            answer = row.get("answer", "")
            questions.append(
                Question(
                    _number(row["index"]),
                    shown if suffix is None else f"{shown}\n{suffix}",
                    (image,),
                    row.get("category", ""),
                    None if is_none(answer) else letters[meant.index(answer)],
                    tuple(turned),
                    number,
                    shown,
                    {"row": row, "option_char": list(meant), "question": row["question"]},
                )
            )
    return questions


def get_options(row: Mapping[str, str], options: Sequence[str]) -> list[str]:
    """Return the texts in the columns `options`, up to the first empty one."""
    return [row[letter] for letter in takewhile(lambda letter: not is_none(row.get(letter)), options)]


def options_of(row: Mapping[str, str]) -> tuple[str, ...]:
    found = get_options(row, OPTION_LETTERS)
    if not found:
        raise InputError(f"MMBench's question {row['index']!r} has no options in the columns A to D")
    return tuple(found)


def is_none(value: object) -> bool:
    """Whether a cell is empty: None, not a number, or a text that stands for either."""
    return value is None or str(value).strip().lower() in EMPTY


def _number(index: str) -> int | str:
    try:
        return int(float(index))
    except ValueError:
        return index


def _image(row: Mapping[str, str], images: Mapping[str, str]) -> bytes:
    """Decode a row's image; a short cell is the index of the row that has it."""
    cell = row["image"]
    if cell in images and len(cell) < 64:
        cell = images[cell]
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"the image of MMBench's question {row['index']!r} is not base64") from None


def score(answered: Sequence[AnsweredQuestion]) -> Scores:
    if any(given.question.answer is None for given in answered):
        return unscored(answered, "the answers are not public: hand the submission in at opencompass.org.cn (MMBench)")
    letters = [None if given.text is None else find_letter(given.text, given.question.options) for given in answered]
    verdicts = [float(letter == given.question.answer) for letter, given in zip(letters, answered, strict=True)]
    questions: dict[int | str, list[int]] = {}
    for place, given in enumerate(answered):
        questions.setdefault(_question(given.question), []).append(place)
    right = {name: float(all(verdicts[place] for place in places)) for name, places in questions.items()}
    groups = [
        (str(row[column]), right[name])
        for name, places in questions.items()
        for column in ("l2-category", "category")
        if not is_none((row := answered[places[0]].question.extra["row"]).get(column))
    ]
    total = percent(list(right.values()))
    unread = sum(letter is None and given.text is not None for letter, given in zip(letters, answered, strict=True))
    notes = [f"{unread} answers name no option and count as wrong; the server would ask a language model about them"]
    return Scores(
        {"accuracy": total, "questions": len(right), "rounds": len(answered), "without_letter": unread},
        by_category(groups),
        verdicts,
        headline=total,
        notes=tuple(notes if unread else ()),
    )


def _question(question: Question) -> int | str:
    return question.id % CIRCULAR_STEP if isinstance(question.id, int) else question.id


def write(answered: Sequence[AnsweredQuestion], home: Path, folder: Path, *, name: str) -> Path:
    """Write the table that the server takes: without images and with predictions; of several rounds, the first."""
    given = {one.question.id: one for one in reversed(answered)}
    rows = [given[name].question.extra["row"] for name in dict.fromkeys(one.question.id for one in answered)]
    columns, lines = submission(rows, {str(name): one.text or "" for name, one in given.items()})
    file = folder / f"{name}.xlsx"
    write_xlsx(file, lines, columns)
    return file


def submission(rows: Sequence[Mapping[str, str]], texts: Mapping[str, str]) -> tuple[list[str], list[JsonRow]]:
    """Return columns and rows of an upload; `texts` are predictions by index."""
    columns = [column for column in rows[0] if column not in LEFT_OUT and column != "prediction"]
    columns.insert(6, "prediction")
    lines = [
        {
            **{column: _value(row.get(column, "")) for column in columns},
            "prediction": texts.get(str(_number(row["index"])), ""),
        }
        for row in rows
    ]
    return columns, lines


def _value(cell: str) -> int | str:
    return int(cell) if cell.isdigit() else cell


def _task(name: str, title: str, lang: str, circular: bool) -> Task:
    return Task(
        name,
        title,
        "mmbench",
        partial(read, lang=lang, circular=circular),
        score,
        headline="accuracy, circular" if circular else "accuracy",
        write=partial(write, name=name),
    )


MMBENCH = _task("mmbench", "MMBench", "en", False)
MMBENCH_CN = _task("mmbench-cn", "MMBench-CN", "cn", False)
MMBENCH_CIRCULAR = _task("mmbench-circular", "MMBench, all rounds", "en", True)
MMBENCH_CN_CIRCULAR = _task("mmbench-cn-circular", "MMBench-CN, all rounds", "cn", True)
