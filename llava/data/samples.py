"""All samples of a run as one sequence: one data file, several, or a weighted mixture.

In: the value of `--data_path`: a data file, several joined by commas, or a mixture file. Out: `Samples`, which parses a
sample when it is indexed. A mixture is YAML or JSON:

    datasets:
      - path: llava_v1_5_mix665k.json      # relative to the mixture file
        image_folder: images               # without one, --image_folder
      - path: mine.jsonl
        repeat: 3                          # each sample three times an epoch; 0.5: half of the samples, chosen once
      - path: more.parquet
        weight: 0.2                        # or, in place of repeats and for all files: shares of the epoch
    epoch_size: 500000                     # with weights: samples in an epoch (otherwise as many as the files hold)
    seed: 0                                # of the choice where a repeat has a fraction

index.py reads single files; train/data.py and train/sampler.py draw, shuffle and group samples.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from llava.cli.program import closest
from llava.data.formats import Sample
from llava.data.index import DataFile
from llava.errors import InputError

_ENTRY_KEYS = ("path", "image_folder", "weight", "repeat")
_MIXTURE_KEYS = ("datasets", "epoch_size", "seed")


@dataclass(frozen=True)
class MixtureEntry:
    """One file of a mixture. Either all entries of a mixture have a weight, or none."""

    path: Path
    image_folder: str | None = None
    weight: float | None = None
    repeat: float = 1.0


@dataclass(frozen=True)
class Mixture:
    entries: tuple[MixtureEntry, ...]
    epoch_size: int | None = None
    seed: int = 0


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
        name = part.file.id(row)
        place = f" of {str(part.file.path)!r}" if len(self.parts) > 1 else ""
        return f"sample {row}{place}" + (f" (id {name!r})" if name is not None else "")

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
    mixture = _with_weights(_read_mixture(os.fspath(data_path)), weights)
    files = [DataFile(entry.path, cache=cache) for entry in mixture.entries]
    counts = _counts(mixture, [len(file) for file in files])
    parts = [
        DatasetPart(file, _rows(len(file), count, mixture.seed + number), entry.image_folder)
        for number, (file, count, entry) in enumerate(zip(files, counts, mixture.entries, strict=True))
    ]
    chosen = [part for part in parts if len(part)]
    if not chosen:
        raise InputError(f"with these weights, an epoch of {os.fspath(data_path)!r} has no samples")
    return Samples(chosen)


def data_files(data_path: str | os.PathLike[str]) -> list[Path]:
    """List the files that `--data_path` names; of a mixture, its own file first."""
    entries = [entry.path for entry in _read_mixture(os.fspath(data_path)).entries]
    mixture = Path(data_path)
    return entries if mixture in entries or not mixture.is_file() else [mixture, *entries]


def _counts(mixture: Mixture, sizes: Sequence[int]) -> list[int]:
    """The number of samples of each file in an epoch; with weights, their sum is the epoch's size exactly."""
    weights = [entry.weight for entry in mixture.entries if entry.weight is not None]
    if not weights:
        return [round(entry.repeat * size) for entry, size in zip(mixture.entries, sizes, strict=True)]
    ends = np.round(np.cumsum(weights) / sum(weights) * (mixture.epoch_size or sum(sizes))).astype(int)
    return np.diff(ends, prepend=0).tolist()


def _rows(size: int, count: int, seed: int) -> np.ndarray | None:
    """Rows of an epoch: whole copies of a file, then the remainder, chosen by the seed and in order."""
    if count == size:
        return None
    chosen = np.sort(np.random.default_rng(seed).permutation(size)[: count % size])
    return np.concatenate([np.tile(np.arange(size), count // size), chosen]).astype(np.int64)


# The mixture file


def _read_mixture(data_path: str) -> Mixture:
    path = Path(data_path)
    if "," in data_path and not path.exists():
        return Mixture(tuple(MixtureEntry(Path(name.strip())) for name in data_path.split(",") if name.strip()))
    if path.suffix.lower() in (".yaml", ".yml"):
        return _mixture(_parse_yaml(path), path)
    if path.suffix.lower() == ".json" and path.is_file():
        with path.open("rb") as file:
            head = file.read(4096).lstrip()
        if head.startswith(b"{") and b'"datasets"' in head:
            try:
                return _mixture(json.loads(path.read_text(encoding="utf-8")), path)
            except json.JSONDecodeError as error:
                raise InputError(f"the mixture file {data_path!r} is not valid JSON: {error}") from error
    return Mixture((MixtureEntry(path),))


def _parse_yaml(path: Path) -> object:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the mixture file {str(path)!r}: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"the mixture file {str(path)!r} is not valid YAML: {error}") from error


def _mixture(content: object, path: Path) -> Mixture:
    place = f"the mixture file {str(path)!r}"
    if not isinstance(content, Mapping) or not isinstance(content.get("datasets"), list) or not content["datasets"]:
        raise InputError(f"{place} needs a list 'datasets' of objects with a 'path'")
    _refuse_unknown(content, _MIXTURE_KEYS, place)
    entries = tuple(
        _entry(value, path.parent, f"entry {n} of {place}") for n, value in enumerate(content["datasets"], 1)
    )
    weighted = [entry.weight is not None for entry in entries]
    if any(weighted) and not all(weighted):
        raise InputError(f"{place} has weights for some datasets only; give all of them one, or use repeats")
    epoch_size = content.get("epoch_size")
    if epoch_size is not None and not (isinstance(epoch_size, int) and epoch_size > 0):
        raise InputError(f"{place} has epoch_size {epoch_size!r}; it must be a number of samples")
    if epoch_size is not None and not any(weighted):
        raise InputError(f"{place} has an epoch_size but no weights; give each dataset one")
    seed = content.get("seed", 0)
    if not isinstance(seed, int):
        raise InputError(f"{place} has seed {seed!r}; it must be a whole number")
    return Mixture(entries, epoch_size, seed)


def _entry(value: object, folder: Path, place: str) -> MixtureEntry:
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise InputError(f"{place} is neither a path nor an object with a 'path'")
    _refuse_unknown(value, _ENTRY_KEYS, place)
    if "weight" in value and "repeat" in value:
        raise InputError(f"{place} has both a weight and a repeat; give one of them")
    for key in ("weight", "repeat"):
        _positive(value.get(key, 1), f"{place} has {key}")
    images = value.get("image_folder")
    weight = value.get("weight")
    return MixtureEntry(
        folder / value["path"],
        None if images is None else str(folder / images),
        None if weight is None else float(weight),
        float(value.get("repeat", 1)),
    )


def _refuse_unknown(content: Mapping[str, object], known: Sequence[str], place: str) -> None:
    for key in content:
        if key not in known:
            raise InputError(
                f"{place} has the unknown key {key!r}{closest(str(key), known)} (known: {', '.join(known)})"
            )


def _positive(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{what} {value!r}; it must be a number above 0")
    return float(value)


def _with_weights(mixture: Mixture, weights: str | Sequence[float] | None) -> Mixture:
    """Replace a mixture's weights by those of `--data_weights`."""
    if weights is None:
        return mixture
    words = weights.split(",") if isinstance(weights, str) else list(weights)
    try:
        values = [_positive(float(word), "--data_weights has") for word in words]
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--data_weights {weights!r} must be numbers joined by commas") from error
    if len(values) != len(mixture.entries):
        raise InputError(f"--data_weights has {len(values)} numbers for {len(mixture.entries)} data files")
    entries = tuple(
        MixtureEntry(entry.path, entry.image_folder, value)
        for entry, value in zip(mixture.entries, values, strict=True)
    )
    return Mixture(entries, mixture.epoch_size, mixture.seed)
