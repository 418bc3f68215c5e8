"""The kinds of data files, by the endings of their names.

In: the path of a plain file (plain_files.py). Out: the `FileFormat` that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llava.data.plain_files import COMPRESSIONS
from llava.data.scan import FileFormat, text_format
from llava.data.tables import TABLES
from llava.data.tars import TAR
from llava.errors import InputError

FORMATS: dict[str, Callable[[Path], FileFormat]] = {
    ".json": text_format,
    ".jsonl": text_format,
    ".ndjson": text_format,
    ".parquet": lambda path: TABLES["parquet"],
    ".pq": lambda path: TABLES["parquet"],
    ".arrow": lambda path: TABLES["arrow"],
    ".tar": lambda path: TAR,
}
UNKNOWN = (".txt", ".csv", ".tsv", ".xml", ".zip", ".pdf", ".pkl", ".pickle", ".bin", ".npy", ".md", ".xlsx")


def format_of(path: Path) -> FileFormat:
    """Choose by the ending; a file of an unknown one is read as JSON.

    Raises:
        InputError: it is known not to be.
    """
    suffix = path.suffix.lower()
    if suffix in UNKNOWN:
        raise InputError(
            f"the training data {str(path)!r} has the ending {suffix}; known are {', '.join(known_suffixes())}"
        )
    return FORMATS.get(suffix, text_format)(path)


def known_suffixes() -> list[str]:
    return [*FORMATS, *COMPRESSIONS]


def is_data_file(path: Path) -> bool:
    """Whether a name says that a file holds samples."""
    suffix = path.suffix.lower()
    return (
        suffix in FORMATS or suffix == ".tgz" or (suffix in COMPRESSIONS and Path(path.stem).suffix.lower() in FORMATS)
    )
