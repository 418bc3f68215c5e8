"""Index a data file: the offset of each record and its number of words and images, so that a sample is parsed when drawn.

In: a path. Out: `DataFile`, which knows the number of its samples, their words, images and ids, and reads one at a time.
The index of a large file is kept in the user's cache folder, valid for the file's path, size and time of change, and
mapped into memory: opening the file again reads nothing, and all processes of a run share its pages. Of a file that cannot
be read at any place, as a compressed one, a copy is indexed (plain_files.py). file_types.py says how records are found,
formats.py brings them to one form, samples.py makes one sequence of several files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava.data.fields import ID_NAMES
from llava.data.file_types import format_of
from llava.data.formats import ReadRecord, Sample, media_sources, num_words, read_record
from llava.data.plain_files import default_cache, plain_file
from llava.data.scan import ScannedRecord
from llava.errors import InputError

logger = logging.getLogger(__name__)

VERSION = 2
# Smaller files are indexed in memory each time they are opened, which takes less than a tenth of a second.
WORTH_KEEPING = 8 * 2**20
_ALIGNMENT = 64


@dataclass(frozen=True)
class Columns:
    """One row per sample, except `ids`: all ids as JSON, one after the other."""

    start: np.ndarray  # with size: where the record lies, see scan.ScannedRecord
    size: np.ndarray
    words: np.ndarray  # 1 for a malformed record, since samplers need a length
    images: np.ndarray
    malformed: np.ndarray  # 1 where the record's form is wrong
    id_end: np.ndarray  # where the id ends in `ids`; an absent one is empty
    ids: np.ndarray


class NoteCount(NamedTuple):
    """How many samples a note is about, and the first of them."""

    num_samples: int
    first: int


_TYPES = {
    "start": np.int64,
    "size": np.int64,
    "words": np.int32,
    "images": np.uint16,
    "malformed": np.uint8,
    "id_end": np.int64,
    "ids": np.uint8,
}


Notes = dict[str, NoteCount]
MAX_NOTES = 50  # of a file; more keys than that are no names of fields


class DataFile:
    """The samples of one file, read when they are asked for."""

    def __init__(self, path: str | os.PathLike[str], *, cache: Path | None = None) -> None:
        """`cache` is the folder for indexes; without one, `llava` in the user's cache folder."""
        self.path = Path(path)
        self.plain = self.path
        try:
            state = self.path.stat()
            self.plain = plain_file(self.path, cache)
            self._identity = {
                "version": VERSION,
                "size": state.st_size,
                "changed": state.st_mtime_ns,
                "plain": self.plain.name,
            }
            self.format = format_of(self.plain)
            self.columns, self.notes = self._open(cache)
        except InputError as error:  # which names the copy that was read
            raise InputError(str(error).replace(str(self.plain), str(self.path))) from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error
        if len(self) == 0:
            raise InputError(f"the training data {str(path)!r} holds no samples")

    def __len__(self) -> int:
        return len(self.columns.start)

    def __getitem__(self, row: int) -> Sample:
        """Parse a sample to LLaVA's form; a malformed record raises InputError here."""
        return self.read(row).sample

    def read(self, row: int) -> ReadRecord:
        """Parse a sample, and say what of its record is not read."""
        start, size = int(self.columns.start[row]), int(self.columns.size[row])
        try:
            state = self.path.stat()
            if (state.st_size, state.st_mtime_ns) != (self._identity["size"], self._identity["changed"]):
                raise InputError(f"the file {str(self.path)!r} was changed since this program opened it; start again")
            return read_record(self.format.read(self.plain, start, size))
        except OSError as error:
            raise InputError(f"cannot read the training data {str(self.path)!r}: {error}") from error
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"it is not valid JSON: {error}") from error

    def describe(self, row: int, *, with_path: bool = False) -> str:
        """Name a sample for messages: by number and id."""
        name = self.id(row)
        place = f" of {str(self.path)!r}" if with_path else ""
        return f"sample {row}{place}" + (f" (id {name!r})" if name is not None else "")

    def id(self, row: int) -> object:
        """The id that the sample has in the file, or None."""
        start = int(self.columns.id_end[row - 1]) if row else 0
        text = self.columns.ids[start : int(self.columns.id_end[row])].tobytes()
        return json.loads(text) if text else None

    def _open(self, cache: Path | None) -> tuple[Columns, Notes]:
        if self.plain.stat().st_size < WORTH_KEEPING:
            return _collect(self.format.records(self.plain))
        cache = cache or default_cache()
        # One index per path: that of an older state of the file is replaced.
        name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:32]
        kept = cache / f"{name}.index"
        found = _load(kept, self._identity)
        if found is not None:
            return found
        logger.info("reading %s for the first time; its index will be kept in %s", self.path, cache)
        collected = _collect(self.format.records(self.plain))
        try:
            _save(kept, *collected, self._identity)
        except OSError as error:
            logger.warning(
                "the index of %s cannot be kept in %s (%s), so it is made again each time", self.path, cache, error
            )
            return collected
        return _load(kept, self._identity) or collected

    def __getstate__(self) -> dict[str, object]:
        # Where loader processes are started rather than forked, they get plain arrays, not the mapping.
        columns = Columns(*(np.asarray(getattr(self.columns, item.name)) for item in fields(Columns)))
        return {**self.__dict__, "columns": columns}


def _collect(found: Iterator[ScannedRecord]) -> tuple[Columns, Notes]:
    """Read all records once."""
    rows, ids = array("q"), bytearray()
    notes: Notes = {}
    for number, entry in enumerate(found):
        try:
            if entry.fault is not None:
                raise InputError(entry.fault)
            sample, about = read_record(entry.record)
            counts = (num_words(sample), min(len(media_sources(sample)), 65535), 0)
        except InputError:
            about, counts = (), (1, 0, 1)
        for note in about:
            known = notes.get(note, NoteCount(0, number))
            if known.num_samples or len(notes) < MAX_NOTES:
                notes[note] = known._replace(num_samples=known.num_samples + 1)
        name = _id_of(entry.record)
        if name is not None:
            ids += json.dumps(name, default=str).encode()
        rows.extend((entry.start, entry.size, *counts, len(ids)))
    *names, _ = _TYPES  # without the ids
    table = np.asarray(rows).reshape(-1, len(names))
    columns = {name: np.ascontiguousarray(table[:, at], dtype=_TYPES[name]) for at, name in enumerate(names)}
    return Columns(**columns, ids=np.frombuffer(bytes(ids), dtype=np.uint8)), notes


def _id_of(record: object) -> object:
    return (
        next((record[name] for name in ID_NAMES if record.get(name) is not None), None)
        if isinstance(record, dict)
        else None
    )


# The index file: a header line of JSON, then the columns, each at a multiple of 64 bytes.


def _save(path: Path, columns: Columns, notes: Notes, identity: dict[str, object]) -> None:
    """Write an index under another name and rename it, so that no reader sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(getattr(columns, name)) for name in _TYPES}
    header = {**identity, "notes": notes, "lengths": {name: len(array) for name, array in arrays.items()}}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            for array in arrays.values():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                file.write(array.data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _load(path: Path, identity: dict[str, object]) -> tuple[Columns, Notes] | None:
    """Map the columns into memory; None where the file is absent, damaged, or of another state of the data."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            offset = file.tell()
        lengths = header.pop("lengths")
        notes = {note: NoteCount(*count) for note, count in header.pop("notes").items()}
        if header != identity or lengths.keys() != _TYPES.keys():
            return None
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    arrays = {}
    for name, kind in _TYPES.items():
        offset += -offset % _ALIGNMENT
        end = offset + lengths[name] * np.dtype(kind).itemsize
        if end > len(mapped):
            return None
        arrays[name] = mapped[offset:end].view(kind)
        offset = end
    return Columns(**arrays), notes
