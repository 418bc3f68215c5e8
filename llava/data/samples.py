"""All samples of a run as one sequence: those of one data file, of several, or of a mixture.

In: the value of `--data_path`, which mixture.py reads. Out: `Samples`, which parses a sample when it is indexed. index.py reads
single files; train/data.py and train/sampler.py draw, shuffle and group samples.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from llava.data.formats import Sample
from llava.data.index import DataFile
from llava.data.mixture import Mixture, MixtureEntry, read_mixture, with_weights
from llava.data.sources import find_sources
from llava.errors import InputError


@dataclass(frozen=True)
class DatasetPart:
    """A file and the rows of it that are in an epoch; None means each once, in order."""

    file: DataFile
    rows: np.ndarray | None
    image_folder: str | None

    def __len__(self) -> int:
        return len(self.file) if self.rows is None else len(self.rows)

    def column(self, name: str) -> np.ndarray:
        values = getattr(self.file.columns, name)
        return values if self.rows is None else values[self.rows]


class Samples(Sequence[Sample]):
    """The samples of an epoch in the order of their files. Each access parses the sample again, so changes are lost."""

    def __init__(self, parts: Sequence[DatasetPart]) -> None:
        self.parts = tuple(parts)
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        part, row = self.locate(index)
        return part.file[row]

    def locate(self, index: int) -> tuple[DatasetPart, int]:
        """The part that a sample belongs to, and its row in that part's file."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self.ends, position, side="right"))
        part = self.parts[number]
        row = position - (self.ends[number - 1] if number else 0)
        return part, row if part.rows is None else int(part.rows[row])

    def id(self, index: int) -> object:
        part, row = self.locate(index)
        return part.file.id(row)

    def describe(self, index: int) -> str:
        """Name a sample for messages: by number and id, and by file where there are several."""
        part, row = self.locate(index)
        return part.file.describe(row, with_path=len(self.parts) > 1)

    def notes(self) -> list[str]:
        """A sentence for each thing that is not read as it stands in a file: how many samples have it, and the first one."""
        return [
            f"{str(file.path)!r}: {note} ({found.num_samples:,} of {len(file):,} samples, first {file.describe(found.first)})"
            for file in dict.fromkeys(part.file for part in self.parts)
            for note, found in file.notes.items()
        ]

    def column(self, name: str) -> np.ndarray:
        """`words`, `images` or `malformed` of all samples."""
        return np.concatenate([part.column(name) for part in self.parts])

    def distinct(self) -> Samples:
        """Every row of every file once, however often an epoch has it."""
        return Samples([DatasetPart(part.file, None, part.image_folder) for part in self.parts])

    def malformed(self) -> Iterator[int]:
        """Indices of malformed samples."""
        yield from np.flatnonzero(self.column("malformed")).tolist()


def open_samples(
    data_path: str | os.PathLike[str] | None, *, weights: str | Sequence[float] | None = None, cache: Path | None = None
) -> Samples:
    """Open the samples of a run; malformed ones are among them, and raise when they are indexed.

    Args:
        data_path: the value of `--data_path`.
        weights: the value of `--data_weights`: shares of the epoch, one for each file.
        cache: folder for the indexes of large files; None means the user's cache folder.
    """
    if not data_path:
        raise InputError("no training data: name its file with --data_path")
    mixture = with_weights(read_mixture(os.fspath(data_path)), weights)
    opened = [_open(entry, cache) for entry in mixture.entries]
    sizes = [sum(len(part) for part in parts) for parts in opened]
    rng = random.Random(mixture.seed)
    parts = [
        part
        for number, (whole, count, entry) in enumerate(
            zip(opened, _counts(mixture, sizes), mixture.entries, strict=True)
        )
        for part in _chosen(whole, _rows(entry, sum(map(len, whole)), count, mixture.seed + number, rng))
    ]
    chosen = [part for part in parts if len(part)]
    if not chosen:
        raise InputError(f"with these weights, an epoch of {os.fspath(data_path)!r} has no samples")
    return Samples(chosen)


def _open(entry: MixtureEntry, cache: Path | None) -> list[DatasetPart]:
    return [
        DatasetPart(DataFile(source.path, cache=cache), None, entry.image_folder or source.image_folder)
        for source in find_sources(entry.path)
    ]


def data_files(data_path: str | os.PathLike[str]) -> list[Path]:
    """List the files that `--data_path` names; of a mixture, its own file first."""
    entries = [
        source.path for entry in read_mixture(os.fspath(data_path)).entries for source in find_sources(entry.path)
    ]
    mixture = Path(data_path)
    return entries if mixture in entries or not mixture.is_file() else [mixture, *entries]


def _counts(mixture: Mixture, sizes: Sequence[int]) -> list[int]:
    """The number of samples of each file in an epoch; with weights, their sum is the epoch's size exactly."""
    weights = [entry.weight for entry in mixture.entries if entry.weight is not None]
    if not weights:
        return [round(entry.repeat * size) for entry, size in zip(mixture.entries, sizes, strict=True)]
    ends = np.round(np.cumsum(weights) / sum(weights) * (mixture.epoch_size or sum(sizes))).astype(int)
    return np.diff(ends, prepend=0).tolist()


def _rows(entry: MixtureEntry, size: int, count: int, seed: int, rng: random.Random) -> np.ndarray | None:
    """Rows of an epoch: those of the entry's strategy, or whole copies of the data set, then some more, chosen and in order."""
    if entry.strategy is not None:
        return entry.strategy.rows(size, rng)
    if count == size:
        return None
    chosen = np.sort(np.random.default_rng(seed).permutation(size)[: count % size])
    return np.concatenate([np.tile(np.arange(size), count // size), chosen]).astype(np.int64)


def _chosen(parts: Sequence[DatasetPart], rows: np.ndarray | None) -> list[DatasetPart]:
    """The rows of a data set as rows of its files, file after file."""
    if rows is None or len(parts) == 1:
        return [DatasetPart(part.file, rows, part.image_folder) for part in parts]
    ends = np.cumsum([len(part) for part in parts])
    file = np.searchsorted(ends, rows, side="right")
    return [
        DatasetPart(part.file, rows[file == number] - (ends[number] - len(part)), part.image_folder)
        for number, part in enumerate(parts)
    ]
