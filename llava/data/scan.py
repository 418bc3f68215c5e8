"""Where each record of a data file lies: JSON lists, JSON lines and parquet, read once from end to end in little memory.

In: a path. Out: a stream of `Found` (place, record or fault), and `read_record` to fetch one again later. JSON records
are found by byte offsets, rows of parquet by row group and row. index.py keeps what is learnt from the stream.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava.errors import InputError, require

CHUNK = 4 * 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Found(NamedTuple):
    """A record and its place: first byte and number of bytes in a text file, row group and row in a parquet file."""

    start: int
    size: int
    record: Any
    fault: str | None = None  # why the record cannot be read; then there is none


@dataclass(frozen=True)
class Format:
    """How a kind of file is read. `records` streams all of it, `read` fetches the record at a place."""

    records: Callable[[Path], Iterator[Found]]
    read: Callable[[Path, int, int], Any]


def format_of(path: Path) -> Format:
    """By the ending of the name; a `.json` file that holds one object per line is read as lines."""
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
    """A stretch of a file as text of one character per byte, so that places in it are places in the file."""

    def __init__(self, file: BinaryIO, *, start: int = 0) -> None:
        self.file = file
        self.file.seek(start)
        self.base = start  # place of the text's first character
        self.text = ""
        self.at = 0
        self.ended = False

    def more(self) -> bool:
        """Read on, more at once the longer the unread text is; false at the end of the file."""
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

    def value(self) -> tuple[Any, int, str]:
        """The JSON value here: parsed from the bytes as they are, its place, and the bytes."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                place = self.base + error.pos
                if self.ended or not self.more():
                    raise _Broken(error.msg, place) from error
                continue
            if end < len(self.text) or not self.more():  # a number at the end of the window may go on behind it
                source, start = self.text[self.at : end], self.base + self.at
                self.at = end
                return value, start, source


class _Broken(Exception):
    """Not JSON, from this byte of the file on."""

    def __init__(self, reason: str, place: int) -> None:
        self.reason, self.place = reason, place


def _list_records(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        # Some editors put a mark before UTF-8.
        window = _Window(file, start=3 if file.read(3) == b"\xef\xbb\xbf" else 0)
        try:
            yield from _elements(window, path)
        except _Broken as broken:
            line, column = _line_and_column(path, broken.place)
            raise InputError(
                f"the training data {str(path)!r} is not valid JSON: {broken.reason} at line {line}, column {column}"
            ) from broken


def _elements(window: _Window, path: Path) -> Iterator[Found]:
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
        yield Found(start, len(source), value)
        mark = window.peek()
        window.at += 1
        if mark == "]":
            if window.peek():
                raise _Broken("Extra data", window.base + window.at)
            return
        if mark != ",":
            raise _Broken("Expecting ',' delimiter", window.base + window.at - 1)


def _line_and_column(path: Path, place: int) -> tuple[int, int]:
    with path.open("rb") as file:
        before = file.read(place)
    return before.count(b"\n") + 1, len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1


def _utf8(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error


def _read_text_record(path: Path, start: int, size: int) -> Any:
    with path.open("rb") as file:
        file.seek(start)
        return json.loads(file.read(size))


# One object per line


def _line_records(path: Path) -> Iterator[Found]:
    start = 0
    with path.open("rb") as file:
        for line in file:
            begin, start = start, start + len(line)
            if begin == 0 and line.startswith(b"\xef\xbb\xbf"):
                line, begin = line[3:], 3
            if not line.strip():
                continue
            try:
                yield Found(begin, len(line), json.loads(line))
            except ValueError as error:
                yield Found(begin, len(line), None, f"it is not valid JSON: {error}")


# Parquet, images inside or beside


@lru_cache(maxsize=64)
def _parquet_file(path: Path, changed: int, process: int) -> Any:
    """The open file; `process` keeps a loader process from using a handle that it inherited."""
    parquet = require("pyarrow.parquet", extra="train")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error


def _parquet(path: Path) -> Any:
    return _parquet_file(path, path.stat().st_mtime_ns, os.getpid())


def _parquet_records(path: Path) -> Iterator[Found]:
    """Rows; of images stored inside, only that they are there, where the file lets that be seen without reading them."""
    table = _parquet(path)
    leaves = [table.schema.column(index).path for index in range(len(table.schema))]
    unread = {leaf for leaf in leaves if leaf.endswith(".bytes") and leaf.removesuffix("bytes") + "path" in leaves}
    columns = [leaf for leaf in leaves if leaf not in unread]
    images = {leaf.partition(".")[0] for leaf in unread}
    for group in range(table.num_row_groups):
        for row, record in enumerate(table.read_row_group(group, columns=columns, use_threads=False).to_pylist()):
            for name in images & record.keys():
                record[name] = _as_if_read(record[name])
            yield Found(group, row, record)


def _as_if_read(image: Any) -> Any:
    if isinstance(image, list):
        return [_as_if_read(entry) for entry in image]
    return image and (image if image.get("path") else {"bytes": b"unread"})


def _read_parquet_record(path: Path, group: int, row: int) -> Any:
    return _parquet(path).read_row_group(group, use_threads=False).slice(row, 1).to_pylist()[0]


FORMATS = {
    "list": Format(_list_records, _read_text_record),
    "lines": Format(_line_records, _read_text_record),
    "parquet": Format(_parquet_records, _read_parquet_record),
}
