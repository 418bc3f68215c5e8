"""Scan a data file once in little memory, and read single records of it: JSON lists, JSON lines and parquet.

In: a path. Out: a `FileFormat`, which streams `ScannedRecord`s (position, record or fault) and reads one of them again.
A JSON record's position is its byte offset and size, a parquet row's its row group and row. index.py stores positions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from llava.errors import InputError, require

if TYPE_CHECKING:
    import pyarrow.parquet as pq

CHUNK = 4 * 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class ScannedRecord(NamedTuple):
    """A record and its position: byte offset and size in a text file, row group and row in a parquet file."""

    start: int
    size: int
    record: object
    fault: str | None = None  # why the record cannot be read; then there is none


@dataclass(frozen=True)
class FileFormat:
    """How a kind of file is read. `records` streams all records, `read` reads the one at a position."""

    records: Callable[[Path], Iterator[ScannedRecord]]
    read: Callable[[Path, int, int], object]


def format_of(path: Path) -> FileFormat:
    """Choose by the suffix of the name; a `.json` file that holds one object per line is read as lines."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return FORMATS["lines"]
    if suffix in (".parquet", ".pq"):
        return FORMATS["parquet"]
    return FORMATS["lines" if _holds_lines(path) else "list"]


def _holds_lines(path: Path) -> bool:
    """True if the first line is a whole object and more follows."""
    with path.open("rb") as file:
        # A list may be one line of a gigabyte: look at its first character before reading a line.
        while (head := file.read(1)).isspace():
            pass
        if head != b"{":
            return False
        first = head + file.readline()
        if not any(line.strip() for line in file):
            return False
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


# One JSON list


class _Window:
    """A part of a file as text of one character per byte, so that offsets in it are offsets in the file."""

    def __init__(self, file: BinaryIO, *, start: int = 0) -> None:
        self.file = file
        self.file.seek(start)
        self.base = start  # offset of the text's first character
        self.text = ""
        self.at = 0
        self.ended = False

    def more(self) -> bool:
        """Read on, at least as much as the unread text; false at the end of the file."""
        rest = self.text[self.at :]
        data = self.file.read(max(CHUNK, len(rest)))
        self.base, self.text, self.at = self.base + self.at, rest + data.decode("latin-1"), 0
        self.ended = not data
        return bool(data)

    def peek(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> tuple[object, int, str]:
        """Parse the next JSON value: the value, its offset, and its bytes as text."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                offset = self.base + error.pos
                if self.ended or not self.more():
                    raise _InvalidJsonError(error.msg, offset) from error
                continue
            if end < len(self.text) or not self.more():  # a number at the end of the window may go on behind it
                source, start = self.text[self.at : end], self.base + self.at
                self.at = end
                return value, start, source


class _InvalidJsonError(Exception):
    """Not JSON, from this byte of the file on."""

    def __init__(self, reason: str, offset: int) -> None:
        self.reason, self.offset = reason, offset


def _list_records(path: Path) -> Iterator[ScannedRecord]:
    with path.open("rb") as file:
        # Some editors write a byte order mark before UTF-8.
        window = _Window(file, start=3 if file.read(3) == b"\xef\xbb\xbf" else 0)
        try:
            yield from _elements(window, path)
        except _InvalidJsonError as broken:
            line, column = _line_and_column(path, broken.offset)
            raise InputError(
                f"the training data {str(path)!r} is not valid JSON: {broken.reason} at line {line}, column {column}"
            ) from broken


def _elements(window: _Window, path: Path) -> Iterator[ScannedRecord]:
    if window.peek() != "[":
        value, _, _ = window.value()
        raise InputError(
            f"the training data {str(path)!r} must be a JSON list of samples, not a {type(value).__name__}"
        )
    window.at += 1
    if window.peek() == "]":
        return
    while True:
        value, start, source = window.value()
        if not source.isascii():
            value = json.loads(_utf8(source.encode("latin-1"), path))
        yield ScannedRecord(start, len(source), value)
        character = window.peek()
        window.at += 1
        if character == "]":
            if window.peek():
                raise _InvalidJsonError("Extra data", window.base + window.at)
            return
        if character != ",":
            raise _InvalidJsonError("Expecting ',' delimiter", window.base + window.at - 1)


def _line_and_column(path: Path, offset: int) -> tuple[int, int]:
    with path.open("rb") as file:
        before = file.read(offset)
    return before.count(b"\n") + 1, len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1


def _utf8(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error


def _read_text_record(path: Path, start: int, size: int) -> object:
    with path.open("rb") as file:
        file.seek(start)
        return json.loads(file.read(size))


# One object per line


def _line_records(path: Path) -> Iterator[ScannedRecord]:
    start = 0
    with path.open("rb") as file:
        for line in file:
            begin, start = start, start + len(line)
            if begin == 0 and line.startswith(b"\xef\xbb\xbf"):
                line, begin = line[3:], 3
            if not line.strip():
                continue
            try:
                yield ScannedRecord(begin, len(line), json.loads(line))
            except ValueError as error:
                yield ScannedRecord(begin, len(line), None, f"it is not valid JSON: {error}")


# Parquet, with images inside or in files


@lru_cache(maxsize=64)
def _parquet_file(path: Path, changed: int, process: int) -> pq.ParquetFile:
    """Open a file; `process` keeps a loader process from using a handle that it inherited."""
    parquet = require("pyarrow.parquet", extra="train")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error


def _parquet(path: Path) -> pq.ParquetFile:
    return _parquet_file(path, path.stat().st_mtime_ns, os.getpid())


def _parquet_records(path: Path) -> Iterator[ScannedRecord]:
    """Stream rows. Bytes of images are not read where the file has a path beside them; whether there is one is known."""
    table = _parquet(path)
    leaves = [table.schema.column(index).path for index in range(len(table.schema))]
    unread = {leaf for leaf in leaves if leaf.endswith(".bytes") and leaf.removesuffix("bytes") + "path" in leaves}
    columns = [leaf for leaf in leaves if leaf not in unread]
    images = {leaf.partition(".")[0] for leaf in unread}
    for group in range(table.num_row_groups):
        for row, record in enumerate(table.read_row_group(group, columns=columns, use_threads=False).to_pylist()):
            for name in images & record.keys():
                record[name] = _as_if_read(record[name])
            yield ScannedRecord(group, row, record)


def _as_if_read(image: object) -> object:
    if isinstance(image, list):
        return [_as_if_read(entry) for entry in image]
    if not isinstance(image, dict) or image.get("path"):
        return image
    return {"bytes": b"unread"}


def _read_parquet_record(path: Path, group: int, row: int) -> object:
    return _parquet(path).read_row_group(group, use_threads=False).slice(row, 1).to_pylist()[0]


FORMATS = {
    "list": FileFormat(_list_records, _read_text_record),
    "lines": FileFormat(_line_records, _read_text_record),
    "parquet": FileFormat(_parquet_records, _read_parquet_record),
}
