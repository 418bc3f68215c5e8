"""Read and write the files of benchmarks and of answers: JSON, JSON lines, and tables (.tsv, .csv, .xlsx).

In: paths. Out: plain values, or an `InputError` that names file, line and remedy. Faults that leave the rest of a file
usable are counted in `Faults`, which reports the number and the first case of each kind.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava.errors import InputError, require
from llava.eval.types import JsonRow

MAX_XLSX_CHARACTERS = 32_767  # of one cell; openpyxl cuts longer text without a warning
_FORBIDDEN_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


@dataclass
class FaultCount:
    """One kind of fault: what it means for the score, its number, and the place of the first."""

    meaning: str
    count: int
    first: str

    def sentence(self, kind: str) -> str:
        return f"{self.count} {kind} (first: {self.first}): {self.meaning}"


@dataclass
class Faults:
    """Counts faults by kind, in the order of first appearance."""

    kinds: dict[str, FaultCount] = field(default_factory=dict)

    def add(self, kind: str, meaning: str, where: str) -> None:
        known = self.kinds.setdefault(kind, FaultCount(meaning, 0, where))
        known.count += 1

    def sentences(self) -> list[str]:
        return [fault.sentence(kind) for kind, fault in self.kinds.items()]

    def as_dict(self) -> dict[str, JsonRow]:
        return {kind: asdict(fault) for kind, fault in self.kinds.items()}


def read_text(path: Path, what: str = "file") -> str:
    """Read a text file in UTF-8; `what` is what an error calls it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"there is no {what} {str(path)!r}") from None
    except IsADirectoryError:
        raise InputError(f"{str(path)!r} is a folder, where a {what} is needed") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} {str(path)!r} is not text in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise InputError(f"the {what} {str(path)!r} cannot be read: {error.strerror}") from error


def read_json(path: Path, what: str = "file") -> object:
    try:
        return json.loads(read_text(path, what))
    except ValueError as error:
        raise InputError(f"the {what} {str(path)!r} is not valid JSON: {error}") from error


def read_json_object(path: Path, what: str = "file") -> JsonRow:
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise InputError(f"the {what} {str(path)!r} must hold a JSON object, found {type(value).__name__}")
    return value


def read_json_lines(path: Path, what: str = "file", *, faults: Faults | None = None) -> list[JsonRow]:
    """Read the objects of a JSON lines file; count lines that are none in `faults`, without which the first is an error."""
    rows = []
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a JSON object is needed, found {type(row).__name__}")
        except ValueError as error:
            where = f"{path}:{number}"
            if faults is None:
                raise InputError(f"{where} is not a line of JSON: {error}") from error
            faults.add("broken lines", "no JSON objects, so whatever they held is not scored", where)
        else:
            rows.append(row)
    return rows


def read_json_rows(path: Path, what: str = "file", *, faults: Faults | None = None) -> list[JsonRow]:
    """Read objects from a JSON list or from JSON lines, whichever the file holds."""
    text = read_text(path, what).lstrip()
    if not text.startswith("["):
        return read_json_lines(path, what, faults=faults)
    rows = read_json(path, what)
    assert isinstance(rows, list)
    bad = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if bad is not None:
        raise InputError(f"entry {bad} of the {what} {str(path)!r} is not a JSON object")
    return rows


def read_table(path: Path, what: str = "table", *, needed: Sequence[str] = ()) -> list[dict[str, str]]:
    """Read the rows of a .tsv, .csv or .xlsx table with a header, and the columns `needed`. Missing cells are empty strings."""
    if path.suffix.lower() == ".xlsx":
        rows = read_xlsx(path)
    else:
        csv.field_size_limit(sys.maxsize)  # images are cells of some benchmarks' tables
        source = io.StringIO(read_text(path, what), newline="")
        rows = list(csv.DictReader(source, delimiter="," if path.suffix.lower() == ".csv" else "\t", restval=""))
    if not rows:
        raise InputError(f"the {what} {str(path)!r} has no rows")
    for column in needed:
        if column not in rows[0]:
            columns = ", ".join(map(str, rows[0]))
            raise InputError(f"the {what} {str(path)!r} has no column {column!r}; its columns: {columns}")
    return rows


def read_xlsx(path: Path) -> list[dict[str, str]]:
    """Read the first sheet's rows by the names in its first row; empty cells are empty strings."""
    openpyxl = require("openpyxl", extra="eval")
    try:
        sheet = openpyxl.load_workbook(path, data_only=True).worksheets[0]
    except FileNotFoundError:
        raise InputError(f"there is no table {str(path)!r}") from None
    except (zipfile.BadZipFile, KeyError, ValueError, SyntaxError, IndexError) as error:  # what broken files raise
        raise InputError(f"{str(path)!r} is not an .xlsx table that can be read: {error}") from error
    header, *lines = [["" if cell is None else str(cell) for cell in row] for row in sheet.values] or [[]]
    return [{name: cell for name, cell in zip(header, line, strict=True) if name} for line in lines]


def write_xlsx(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write one sheet with a header. Text stays text, whatever a spreadsheet would make of it (a formula, an error).

    Raises:
        InputError: a text is longer than an .xlsx cell can hold; no file is written.
    """
    book = require("openpyxl", extra="eval").Workbook()
    for number, line in enumerate([columns, *([row.get(name, "") for name in columns] for row in rows)], start=1):
        for place, value in enumerate(line, start=1):
            if isinstance(value, str):
                value = _FORBIDDEN_IN_XML.sub("", value)
                if len(value) > MAX_XLSX_CHARACTERS:
                    raise InputError(
                        f"row {number}, column {columns[place - 1]!r} of {str(path)!r} has {len(value):,} characters, "
                        f"more than the {MAX_XLSX_CHARACTERS:,} of an .xlsx cell; shorten the text, or write the rows "
                        "as .tsv or .csv"
                    )
            cell = book.active.cell(number, place, value)
            if isinstance(value, str):
                cell.data_type = "s"
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def need(row: Mapping[str, Any], field_name: str, where: str) -> Any:
    """Return a field that a row must have; `where` is what an error calls the row."""
    if field_name not in row:
        raise InputError(f"{where} has no field {field_name!r}; its fields: {', '.join(map(str, row)) or 'none'}")
    return row[field_name]


def find_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """Return the first of some paths below a folder that exists, or raise an `InputError` that names them all."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    places = ", ".join(repr(str(folder / name)) for name in names)
    raise InputError(f"the {what} is missing: looked for {places}; docs/evaluate.md says where it comes from")


def find_optional(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first of some paths below a folder that exists."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_json_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
