"""Read the value of `--data_path`: data files, or a mixture file that says how much of each is in an epoch.

In: a data file, a pattern, a folder or a hub name; several joined by commas; or a mixture, YAML or JSON:

    datasets:
      - path: llava_v1_5_mix665k.json      # relative to the mixture file
        image_folder: images               # without one, --image_folder
      - path: mine.jsonl
        repeat: 3                          # each sample three times an epoch; 0.5: half of the samples, chosen once
      - json_path: next.json               # LLaVA-NeXT's names
        sampling_strategy: first:10%       # or end:500, random:25%, all
      - path: more.parquet
        weight: 0.2                        # or, in place of repeats and for all files: shares of the epoch
    epoch_size: 500000                     # with weights: samples in an epoch (otherwise as many as the files hold)
    seed: 0                                # of the choice of samples

Out: a `Mixture`. samples.py opens its files.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from llava.cli.program import closest
from llava.data.file_types import is_data_file
from llava.data.sources import HUB_NAME, expand_braces
from llava.errors import InputError

_ENTRY_KEYS = ("path", "json_path", "image_folder", "weight", "repeat", "sampling_strategy")
_MIXTURE_KEYS = ("datasets", "epoch_size", "seed")
_STRATEGY = re.compile(r"(first|end|random)\s*:\s*(\d+(?:\.\d+)?)\s*(%?)")


@dataclass(frozen=True)
class SamplingStrategy:
    """The samples of a data set that are used: some from its beginning or end, or drawn."""

    place: str  # first, end, random
    number: Fraction
    is_percent: bool = False

    def rows(self, size: int, rng: random.Random) -> np.ndarray:
        """The rows of a data set of `size` samples; drawn ones in the order in which they were drawn."""
        count = math.ceil(self.number * size / 100) if self.is_percent else int(self.number)
        count = min(count, size)
        if self.place == "first":
            return np.arange(count, dtype=np.int64)
        if self.place == "end":
            return np.arange(size - count, size, dtype=np.int64)
        rows = list(range(size))
        rng.shuffle(rows)
        return np.array(rows[:count], dtype=np.int64)


@dataclass(frozen=True)
class MixtureEntry:
    """One data set of a mixture, of one file or several. Either all entries of a mixture have a weight, or none."""

    path: str
    image_folder: str | None = None
    weight: float | None = None
    repeat: float = 1.0
    strategy: SamplingStrategy | None = None


@dataclass(frozen=True)
class Mixture:
    entries: tuple[MixtureEntry, ...]
    epoch_size: int | None = None
    seed: int = 0


def read_mixture(data_path: str) -> Mixture:
    """Read what `--data_path` says."""
    path = Path(data_path)
    if "," in data_path and not path.exists():
        names = _split(data_path)
        if len(names) > 1:
            return Mixture(tuple(MixtureEntry(name) for name in names))
    if path.suffix.lower() in (".yaml", ".yml"):
        return _mixture(_parse_yaml(path), path)
    if path.suffix.lower() == ".json" and path.is_file():
        with path.open("rb") as file:
            head = file.read(4096).lstrip()
        if head.startswith(b"{") and b'"datasets"' in head:
            try:
                return _mixture(json.loads(path.read_text(encoding="utf-8")), path)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"the mixture file {data_path!r} is not valid JSON: {error}") from error
    return Mixture((MixtureEntry(data_path),))


def with_weights(mixture: Mixture, weights: str | Sequence[float] | None) -> Mixture:
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
    if any(entry.strategy is not None for entry in mixture.entries):
        raise InputError(
            "--data_weights gives shares, and the mixture file has a sampling_strategy; use one of the two"
        )
    entries = tuple(
        replace(entry, weight=value, repeat=1.0) for entry, value in zip(mixture.entries, values, strict=True)
    )
    return replace(mixture, entries=entries)


def _split(text: str) -> list[str]:
    """The names between commas that are not in braces."""
    return [name.strip() for name in re.split(r",(?![^{}]*\})", text) if name.strip()]


def _parse_yaml(path: Path) -> object:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the mixture file {str(path)!r}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
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
    if not isinstance(value, Mapping) or not isinstance(value.get("path", value.get("json_path")), str):
        raise InputError(f"{place} is neither a path nor an object with a 'path'")
    _refuse_unknown(value, _ENTRY_KEYS, place)
    if "path" in value and "json_path" in value:
        raise InputError(f"{place} has both a path and a json_path; give one of them")
    given = [key for key in ("weight", "repeat", "sampling_strategy") if key in value]
    if len(given) > 1:
        raise InputError(f"{place} has both a {given[0]} and a {given[1]}; give one of them")
    for key in ("weight", "repeat"):
        _positive(value.get(key, 1), f"{place} has {key}")
    images = value.get("image_folder")
    weight = value.get("weight")
    return MixtureEntry(
        _path_of(value, folder),
        None if images is None else str(folder / images),
        None if weight is None else float(weight),
        float(value.get("repeat", 1)),
        _strategy(value.get("sampling_strategy", "all"), place),
    )


def _path_of(value: Mapping[str, str], folder: Path) -> str:
    """A path relative to the mixture file. LLaVA-NeXT's may be relative to the working folder; others may be hub names."""
    name = value.get("path") or value["json_path"]
    beside = str(folder / name)
    if any(sign in name for sign in "*?[") or any(Path(path).exists() for path in expand_braces(beside)):
        return beside
    is_hub_name = HUB_NAME.fullmatch(name) is not None and not is_data_file(Path(name))
    return name if "json_path" in value or is_hub_name else beside


def _strategy(value: object, place: str) -> SamplingStrategy | None:
    text = str(value).strip()
    if text == "all":
        return None
    match = _STRATEGY.fullmatch(text)
    if match is None:
        raise InputError(
            f"{place} has the sampling_strategy {text!r}; known are all, first:N, end:N and random:N, N a number of samples or "
            "a share such as 10%"
        )
    number, is_percent = Fraction(match[2]), bool(match[3])
    if is_percent and number > 100:
        raise InputError(f"{place} has the sampling_strategy {text!r}; a share is at most 100%, for more use repeat")
    if not is_percent and number.denominator != 1:
        raise InputError(
            f"{place} has the sampling_strategy {text!r}; a number of samples is whole, for a share write {text}%"
        )
    return SamplingStrategy(match[1], number, is_percent)


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
