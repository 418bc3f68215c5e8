"""Read the rows of questions that people write themselves, in any of the usual files and forms.

In: JSON lines, a JSON list, or a table (.tsv, .csv, .xlsx, .parquet), as VLMEvalKit and data sets of the hub have them.
Out: each row's question, images, options and answers, or an `InputError` that names file, row and remedy. A field of another
form is refused, not guessed at. What becomes of the rows is in custom.py.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import InputError, require
from llava.eval.files import read_json_rows, read_table
from llava.eval.metrics.choices import LETTERS
from llava.eval.types import JsonRow
from llava.images.io import decode_base64

WHAT = "file of the task's rows"
TABLES = (".tsv", ".csv", ".xlsx", ".parquet")
FILES = (".jsonl", ".json", *TABLES)
# The names of each field, of which the first that a row has is taken.
QUESTION_FIELDS = ("question", "text")
IMAGE_FIELDS = ("images", "image", "image_path")
OPTION_FIELDS = ("options", "choices")
ANSWER_FIELDS = ("answers", "answer")
ID_FIELDS = ("question_id", "index", "id")
NUMBERED_IMAGE = re.compile(r"image_(\d+)")  # as MMMU has them
OTHER_IMAGE = re.compile("image|img|picture|photo", re.IGNORECASE)
MIN_BASE64 = 64  # characters; a shorter text in a column of images is the index of the row that has the image
BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
MAX_SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True)
class OwnRow:
    """One row: what is asked, and what is right. `options` are those after the letters A, B, ..."""

    id: str | int
    question: str
    images: tuple[Path | bytes, ...]
    options: tuple[str, ...]
    answers: tuple[str, ...]
    category: str


def read_own_rows(path: Path, images: Path) -> list[OwnRow]:
    """Read a file of rows; the images that they name are relative to the folder `images`."""
    rows = _read_file(path)
    if not rows:
        raise InputError(f"the {WHAT} {str(path)!r} is empty")
    by_index = {str(row["index"]): row["image"] for row in rows if "index" in row and "image" in row}
    return [
        _read_row(row, number, f"{path}, row {number}", images, by_index) for number, row in enumerate(rows, start=1)
    ]


def has_option_columns(path: Path) -> bool:
    """Whether a file is a table with columns of options, so that its answers are letters."""
    if path.suffix.lower() not in TABLES or not path.is_file():
        return False
    columns = _columns(path)
    return {"A", "B"} <= columns or not columns.isdisjoint(OPTION_FIELDS)


def _columns(path: Path) -> set[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return set(_parquet(path, "read_schema").names)
    if suffix == ".xlsx":
        return set(next(iter(read_table(path, WHAT)), {}))
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return set(next(csv.reader(file, delimiter="," if suffix == ".csv" else "\t"), []))


def _read_file(path: Path) -> list[JsonRow]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows: list[JsonRow] = _parquet(path, "read_table").to_pylist()
        return rows
    if suffix not in TABLES:
        return read_json_rows(path, WHAT)
    # Missing cells are absent fields; pandas writes them as "nan".
    table = read_table(path, WHAT)
    return [{name: _cell(text) for name, text in row.items() if name and _is_filled(text)} for row in table]


def _parquet(path: Path, function: str) -> Any:
    parquet = require("pyarrow.parquet", extra="eval")
    try:
        return getattr(parquet, function)(path)
    except FileNotFoundError:
        raise InputError(f"there is no {WHAT} {str(path)!r}") from None
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise InputError(f"the {WHAT} {str(path)!r} is not a .parquet file that can be read: {error}") from error


def _is_filled(text: object) -> bool:
    return isinstance(text, str) and text.strip() not in ("", "nan")


def _cell(text: str) -> object:
    """Read a cell; a list or an object in one is written as JSON, or as Python writes it."""
    if text.strip()[:1] not in ("[", "{"):
        return text
    value = _parsed(text)
    return text if value is None else value


def _parsed(text: str) -> object:
    """Read a text that is a list or an object; None for any other."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, (list, tuple, dict)):
            return value
    return None


# --- fields -----------------------------------------------------------------------------------------------------------


def _read_row(row: JsonRow, number: int, where: str, folder: Path, by_index: Mapping[str, object]) -> OwnRow:
    question = _first(row, QUESTION_FIELDS)
    if not isinstance(question, str) or not question.strip():
        raise _wrong(where, row, QUESTION_FIELDS, "the text of the question")
    hint = row.get("hint")
    if isinstance(hint, str) and hint.strip():
        question = f"{hint}\n{question}"
    options = _options(row, where)
    name = _first(row, ID_FIELDS)
    category = row.get("category")
    return OwnRow(
        name if isinstance(name, (str, int)) else number,
        question,
        _images(row, where, folder, by_index),
        options,
        _answers(row, where, options),
        "" if category is None else str(category),
    )


def _images(row: JsonRow, where: str, folder: Path, by_index: Mapping[str, object]) -> tuple[Path | bytes, ...]:
    value = _first(row, IMAGE_FIELDS)
    if not any(name in row for name in IMAGE_FIELDS):
        numbered = sorted((int(match[1]), name) for name in row if (match := NUMBERED_IMAGE.fullmatch(name)))
        value = [row[name] for _, name in numbered if row[name] is not None]
        other = next(
            (name for name in row if OTHER_IMAGE.search(name) and isinstance(row[name], (str, bytes, list))), None
        )
        if other is not None and not numbered:
            raise InputError(
                f"{where} has the field {other!r}, which is not read; call it 'image' if it holds the image"
            )
    if isinstance(value, str) and len(value) < MIN_BASE64 and value != by_index.get(value, value):
        value = by_index[value]
    if value is None or value == "":
        return ()
    given = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_image(one, f"{where}, image {place}", folder) for place, one in enumerate(given, start=1))


def _image(value: object, where: str, folder: Path) -> Path | bytes:
    """Read one image: a file, base64 with or without a data URI before it, bytes, or a cell of a data set of the hub."""
    if isinstance(value, Mapping):  # {"bytes": ..., "path": ...}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} is {_shown(value)}; give a file, or the image in base64")
    if value.startswith("data:"):
        head, found, content = value.partition(",")
        if not found or not head.endswith(";base64"):
            raise InputError(
                f"{where} is {_shown(value)}, a data: URL without base64; give a file, or the image in base64"
            )
        return decode_base64(content, where)
    if value.startswith(("http://", "https://")):
        raise InputError(f"{where} is {_shown(value)}; nothing is downloaded: give a file, or the image in base64")
    path = folder / value
    if _is_file(path) or len(value) < MIN_BASE64:
        return path
    if BASE64.fullmatch(value):
        return decode_base64(value, where)
    if len(value) > MIN_BASE64 and not Path(value).suffix:
        raise InputError(f"{where} is {_shown(value)}, neither a file nor base64; give one of them")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a character that no name has
        return False


def _options(row: JsonRow, where: str) -> tuple[str, ...]:
    value = _first(row, OPTION_FIELDS)
    if isinstance(value, str) and value.strip():
        value = _parsed(value)
        if value is None:
            raise _wrong(
                where, row, OPTION_FIELDS, "a list of texts, or an object with the letters A, B, ... and texts"
            )
    if value is None or value == "":
        letters = [letter for letter in LETTERS if row.get(letter) is not None]
        value = {letter: row[letter] for letter in letters} if letters[:2] == ["A", "B"] else []
    if isinstance(value, Mapping):
        texts = {str(key).strip().upper(): text for key, text in value.items()}
        # A data set's struct has all keys, with null where a row has fewer options.
        texts = {key: text for key, text in texts.items() if text is not None}
        letters = list(LETTERS[: len(texts)])
        if sorted(texts) != letters:
            raise _wrong(where, row, OPTION_FIELDS, "an object with the letters A, B, ... in a row, or a list of texts")
        value = [texts[letter] for letter in letters]
    if not isinstance(value, (list, tuple)) or not all(_is_plain(text) for text in value):
        raise _wrong(where, row, OPTION_FIELDS, "a list of texts, or an object with the letters A, B, ... and texts")
    if len(value) > len(LETTERS):
        raise InputError(f"{where} has {len(value)} options; at most {len(LETTERS)} have a letter")
    return tuple(map(_plain, value))


def _answers(row: JsonRow, where: str, options: Sequence[str]) -> tuple[str, ...]:
    """Read the right answers. Where one is the letter of an option, the option's text is right too."""
    value = _first(row, ANSWER_FIELDS)
    if isinstance(value, str) and value.strip()[:1] == "[":
        parsed = _parsed(value)
        value = value if parsed is None else parsed
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    # People's answers in the form of VQA: [{"answer": "red", ...}, ...]
    given = [one["answer"] if isinstance(one, Mapping) and "answer" in one else one for one in given]
    if not given or not all(_is_plain(one) and str(one).strip() for one in given):
        raise _wrong(where, row, ANSWER_FIELDS, "the right answer, or a list of right ones")
    for one in given:
        if options and not isinstance(one, str) and _plain(one) not in options:
            raise InputError(f"{where} has the answer {one!r}, which is no option; give the option's letter or text")
    texts = [_plain(one) for one in given]
    letters = dict(zip(LETTERS, options, strict=False))
    named = [letters[text.strip()] for text in texts if text not in options and text.strip() in letters]
    return (*texts, *(text for text in named if text not in texts))  # several people may have given the same answer


def _first(row: JsonRow, names: Sequence[str]) -> object:
    """Return the first of some fields that a row has with a value."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float)) and value == value  # which NaN is not


def _plain(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _wrong(where: str, row: JsonRow, names: Sequence[str], needed: str) -> InputError:
    name = next((name for name in names if name in row), None)
    if name is None:
        fields = ", ".join(map(str, row)) or "none"
        return InputError(f"{where} has no field {names[0]!r} with {needed}; its fields: {fields}")
    return InputError(f"{where} has the {name} {_shown(row[name])}; give {needed}")


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
