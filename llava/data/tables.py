"""Read tables: parquet, and Arrow files as `datasets.save_to_disk` writes them. Images may be inside or in files.

In: a path. Out: `ScannedRecord`s and single rows, see scan.py. A parquet file is compressed in groups of rows, of which one
cannot be decoded alone; so a group is unpacked into the user's cache folder when its first row is read, and mapped into memory
from then on. Where the disk has no room for that, the last group is kept in memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.plain_files import SPARE, default_cache
from llava.data.scan import FileFormat, ScannedRecord
from llava.errors import InputError, require

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

SMALL_GROUP = 2**20  # bytes; a group of no more is decoded each time
UNREAD = b"unread"  # stands for an image's bytes where a file is only scanned


# Parquet


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
    return {"bytes": UNREAD}


def _read_parquet_row(path: Path, group: int, row: int) -> object:
    size = _parquet(path).metadata.row_group(group).total_byte_size
    table = (
        _parquet(path).read_row_group(group, use_threads=False) if size <= SMALL_GROUP else _unpacked(path, group, size)
    )
    return _row(table, row)


def _unpacked(path: Path, group: int, size: int) -> pa.Table:
    state = path.stat()
    name = hashlib.sha256(repr((str(path.resolve()), state.st_size, state.st_mtime_ns)).encode()).hexdigest()[:32]
    copy = default_cache() / "rows" / name / f"{group}.arrow"
    if not copy.is_file() and not _unpack(path, group, size, copy):
        return _group_in_memory(path, group, state.st_mtime_ns)
    return _table(copy)


def _unpack(path: Path, group: int, size: int, copy: Path) -> bool:
    """Write a group as an Arrow file; false where there is no room."""
    arrow = require("pyarrow", extra="train")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(copy.parent).free - size < SPARE:
            raise OSError("its disk is full")
        handle, temporary = tempfile.mkstemp(dir=copy.parent, prefix=copy.stem)
        os.close(handle)
        try:
            table = _parquet(path).read_row_group(group, use_threads=False)
            with arrow.OSFile(temporary, "wb") as sink, arrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            os.replace(temporary, copy)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        _warn_of_no_copy(str(copy.parents[1]), str(error.strerror or error))
        return False
    return True


@cache
def _warn_of_no_copy(folder: str, reason: str) -> None:
    logger.warning(
        "rows of parquet files cannot be unpacked into %s (%s), so reading one decodes its whole group; name another cache "
        "folder with XDG_CACHE_HOME",
        folder, reason,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _group_in_memory(path: Path, group: int, changed: int) -> pa.Table:
    return _parquet(path).read_row_group(group, use_threads=False)


# Arrow


def _table(path: Path) -> pa.Table:
    """A table whose bytes stay on the disk until they are read."""
    return _mapped(path, path.stat().st_mtime_ns, os.getpid())


@lru_cache(maxsize=256)
def _mapped(path: Path, changed: int, process: int) -> pa.Table:
    arrow = require("pyarrow", extra="train")
    source = arrow.memory_map(str(path))
    try:
        try:
            return arrow.ipc.open_file(source).read_all()
        except ValueError:
            source.seek(0)
            return arrow.ipc.open_stream(source).read_all()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error


def _arrow_records(path: Path) -> Iterator[ScannedRecord]:
    row = 0
    for batch in _table(path).to_batches(max_chunksize=1024):
        columns = {name: _without_bytes(batch.column(name)).to_pylist() for name in batch.schema.names}
        for values in zip(*columns.values(), strict=True):
            yield ScannedRecord(row, 0, _cleaned(dict(zip(columns, values, strict=True))))
            row += 1


def _without_bytes(values: Any) -> Any:
    """Replace the bytes of images in a column, also in lists of them, so that they are not read."""
    arrow = require("pyarrow", extra="train")
    compute = require("pyarrow.compute", extra="train")
    kind = values.type
    if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        there = compute.is_valid(compute.struct_field(values, "bytes"))
        names = [kind.field(index).name for index in range(kind.num_fields) if kind.field(index).name != "bytes"]
        marks = compute.if_else(there, arrow.scalar(UNREAD), arrow.scalar(None, arrow.binary()))
        others = [compute.struct_field(values, name) for name in names]
        return arrow.StructArray.from_arrays([marks, *others], ["bytes", *names])
    if _is_list(kind) and arrow.types.is_struct(kind.value_type) and kind.value_type.get_field_index("bytes") >= 0:
        mask = values.is_null() if values.null_count else None
        return type(values).from_arrays(values.offsets, _without_bytes(values.values), mask=mask)
    return values


def _is_list(kind: Any) -> bool:
    types = require("pyarrow", extra="train").types
    return bool(types.is_list(kind) or types.is_large_list(kind))


def _read_arrow_row(path: Path, row: int, _: int) -> object:
    return _row(_table(path), row)


def _row(table: pa.Table, row: int) -> dict[str, object]:
    return _cleaned(table.slice(row, 1).to_pylist()[0])


def _cleaned(record: dict[str, object]) -> dict[str, object]:
    """An image of neither bytes nor path is none: so tables write rows without an image."""
    for name, value in record.items():
        if isinstance(value, dict) and "bytes" in value and not any(value.values()):
            record[name] = None
    return record


TABLES = {
    "parquet": FileFormat(_parquet_records, _read_parquet_row),
    "arrow": FileFormat(_arrow_records, _read_arrow_row),
}
