"""Scan a data file once in little memory, and read single records of it: JSON lists and JSON lines.

In: a path. Out: a `FileFormat`, which streams `ScannedRecord`s (position, record or fault) and reads one of them again.
A record's position is its byte offset and size; index.py stores it. Tables are read in tables.py, tar files in tars.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llava.errors import InputError

CHUNK = 4 * 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class ScannedRecord(NamedTuple):
    """A record and its position: in a text or tar file byte offset and size, in a table group and row."""

    start: int
    size: int
    record: object
    fault: str | None = None  # why the record cannot be read; then there is none


@dataclass(frozen=True)
class FileFormat:
    """How a kind of file is read. `records` streams all records, `read` reads the one at a position."""

    records: Callable[[Path], Iterator[ScannedRecord]]
    read: Callable[[Path, int, int], object]


def text_format(path: Path) -> FileFormat:
    """Whether a JSON file is a list, or has one object per line, whatever its name says."""
    return LINES if path.suffix.lower() in (".jsonl", ".ndjson") or _first_object(path) is not None else LIST


def holds_document(path: Path) -> bool:
    """Whether a file is one JSON object, of whatever lines; a single sample as a line is not."""
    with path.open("rb") as file:
        begins = _begin(file) == b"{"
    if not begins or path.suffix.lower() in (".jsonl", ".ndjson"):
        return False
    return _first_object(path) is None


def _first_object(path: Path) -> object:
    """The object on the first line where it is whole there and more follows, else None."""
    with path.open("rb") as file:
        if _begin(file) != b"{":  # a list may be one line of a gigabyte
            return None
        first = b"{" + file.readline()
        if not any(line.strip() for line in file):
            return None
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _begin(file: BinaryIO) -> bytes:
    """The first byte that is no space, behind the byte order mark that some editors write."""
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    while (head := file.read(1)).isspace():
        pass
    return head


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
            except RecursionError as error:
                raise _InvalidJsonError("It is nested too deep", self.base + self.at) from error
            except ValueError as error:  # a number of thousands of digits
                raise _InvalidJsonError(str(error), self.base + self.at) from error
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
            except RecursionError:
                yield ScannedRecord(begin, len(line), None, "its JSON is nested too deep")
            except ValueError as error:
                yield ScannedRecord(begin, len(line), None, f"it is not valid JSON: {error}")


LIST = FileFormat(_list_records, _read_text_record)
LINES = FileFormat(_line_records, _read_text_record)
