"""An index of a data file: where each record lies and what samplers ask about it, so that nothing is parsed until drawn.

In: a path. Out: `DataFile`, which knows its number of samples, their words, images and ids, and reads one at a time. The
index of a large file is kept in the user's cache folder under the file's path, size and time of change, and mapped into
memory: opening it again reads nothing, and all processes of a run share its pages. Records are found by scan.py and
brought to one form by formats.py; several files become one set in samples.py.
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
from typing import Any

import numpy as np

from llava.data.formats import Sample, image_sources, num_words, to_sample
from llava.data.scan import Found, format_of
from llava.errors import InputError

logger = logging.getLogger(__name__)

VERSION = 1
# Smaller files are indexed in memory each time they are opened, which takes less than a tenth of a second.
WORTH_KEEPING = 8 * 2**20
_ALIGNMENT = 64


@dataclass(frozen=True)
class Columns:
    """One row per sample, except `ids`: all ids as JSON, one after the other."""

    start: np.ndarray  # place of the record, see scan.Found
    size: np.ndarray
    words: np.ndarray  # 1 for a malformed record, so that samplers can place it
    images: np.ndarray
    malformed: np.ndarray  # 1 where the record's form is wrong
    id_end: np.ndarray  # where the id ends in `ids`; an absent one takes no room
    ids: np.ndarray


_TYPES = {
    "start": np.int64,
    "size": np.int64,
    "words": np.int32,
    "images": np.uint16,
    "malformed": np.uint8,
    "id_end": np.int64,
    "ids": np.uint8,
}


class DataFile:
    """The samples of one file, read when they are asked for."""

    def __init__(self, path: str | os.PathLike[str], *, cache: Path | None = None) -> None:
        """`cache` is the folder for indexes; without one, `llava` in the user's cache folder."""
        self.path = Path(path)
        try:
            state = self.path.stat()
            self._identity = {"version": VERSION, "size": state.st_size, "changed": state.st_mtime_ns}
            self.format = format_of(self.path)
            self.columns = self._open(cache)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error
        if len(self) == 0:
            raise InputError(f"the training data {str(path)!r} holds no samples")

    def __len__(self) -> int:
        return len(self.columns.start)

    def __getitem__(self, row: int) -> Sample:
        """The sample in LLaVA's form. What is wrong with a record's form is said when it is asked for."""
        start, size = int(self.columns.start[row]), int(self.columns.size[row])
        try:
            state = self.path.stat()
            if (state.st_size, state.st_mtime_ns) != (self._identity["size"], self._identity["changed"]):
                raise InputError(f"the file {str(self.path)!r} was changed since this program opened it; start again")
            return to_sample(self.format.read(self.path, start, size))
        except OSError as error:
            raise InputError(f"cannot read the training data {str(self.path)!r}: {error}") from error
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"it is not valid JSON: {error}") from error

    def id(self, row: int) -> Any:
        """The id that the sample has in the file, or None."""
        start = int(self.columns.id_end[row - 1]) if row else 0
        text = self.columns.ids[start : int(self.columns.id_end[row])].tobytes()
        return json.loads(text) if text else None

    def _open(self, cache: Path | None) -> Columns:
        if self._identity["size"] < WORTH_KEEPING:
            return _collect(self.format.records(self.path))
        cache = cache or user_cache()
        # One index per path: that of an older state of the file is replaced, not kept.
        name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:32]
        kept = cache / f"{name}.index"
        found = _load(kept, self._identity)
        if found is not None:
            return found
        logger.info("reading %s for the first time; its index will be kept in %s", self.path, cache)
        columns = _collect(self.format.records(self.path))
        try:
            _save(kept, columns, self._identity)
        except OSError as error:
            logger.warning(
                "the index of %s cannot be kept in %s (%s), so it is made anew each time", self.path, cache, error
            )
            return columns
        return _load(kept, self._identity) or columns

    def __getstate__(self) -> dict[str, Any]:
        # Where loader processes are started rather than forked, they get plain arrays, not the mapping.
        columns = Columns(*(np.asarray(getattr(self.columns, item.name)) for item in fields(Columns)))
        return {**self.__dict__, "columns": columns}


def user_cache() -> Path:
    """Where this user's programs keep what they can make anew; on machines without a home, a temporary place."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "llava-cache"


def _collect(found: Iterator[Found]) -> Columns:
    """Read all records once."""
    start, size, words, images, malformed, id_end = (array("q") for _ in range(6))
    ids = bytearray()
    for entry in found:
        start.append(entry.start)
        size.append(entry.size)
        try:
            if entry.fault is not None:
                raise InputError(entry.fault)
            sample = to_sample(entry.record)
            counts = (num_words(sample), min(len(image_sources(sample)), 65535), 0)
        except InputError:
            counts = (1, 0, 1)
        words.append(counts[0])
        images.append(counts[1])
        malformed.append(counts[2])
        if isinstance(entry.record, dict) and entry.record.get("id") is not None:
            ids += json.dumps(entry.record["id"], default=str).encode()
        id_end.append(len(ids))
    lists: dict[str, Any] = {
        "start": start,
        "size": size,
        "words": words,
        "images": images,
        "malformed": malformed,
        "id_end": id_end,
        "ids": np.frombuffer(bytes(ids), dtype=np.uint8),
    }
    return Columns(**{name: np.asarray(values, dtype=_TYPES[name]) for name, values in lists.items()})


# The file: one line of JSON that says what follows, then the columns, each at a multiple of 64 bytes.


def _save(path: Path, columns: Columns, identity: dict[str, int]) -> None:
    """Written beside its place and moved there, so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(getattr(columns, name)) for name in _TYPES}
    header = {**identity, "lengths": {name: len(array) for name, array in arrays.items()}}
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


def _load(path: Path, identity: dict[str, int]) -> Columns | None:
    """The columns, mapped; or nothing where the file is absent, damaged, or of another state of the data."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            place = file.tell()
        lengths = header.pop("lengths")
        if header != identity or lengths.keys() != _TYPES.keys():
            return None
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    arrays = {}
    for name, kind in _TYPES.items():
        place += -place % _ALIGNMENT
        end = place + lengths[name] * np.dtype(kind).itemsize
        if end > len(mapped):
            return None
        arrays[name] = mapped[place:end].view(kind)
        place = end
    return Columns(**arrays)
