"""Make files that can be read at any place of those that cannot: compressed ones, UTF-16, and JSON documents.

In: the path of a data file. Out: the same path, or that of a copy in the user's cache folder, which is made once for a state of
the file. documents.py makes the samples of a document; scan.py and tables.py read the copy. A copy that would fill the disk, or
is far larger than its file, is refused.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Protocol

from llava.data.documents import document_records, partner_of
from llava.data.scan import holds_document
from llava.errors import InputError, require
from llava.files import cache_folder

CHUNK = 2**20
MAX_RATIO = 200  # of a copy to its compressed file; text of samples has 5 to 30
ALWAYS_ALLOWED = 64 * 2**20  # whatever the ratio
SPARE = 2**30  # bytes of the cache's disk that copies leave free
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson")


class ByteStream(Protocol):
    """A file that is decompressed while it is read."""

    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


def plain_file(path: Path, cache: Path | None = None) -> Path:
    """Return a file with the samples of `path` that can be read at any place.

    Raises:
        InputError: it is broken, or its copy would be too large.
    """
    folder = (cache or default_cache()) / "plain"
    for step in (_decompressed, _in_utf8, _as_lines):
        path = step(path, folder)
    return path


def default_cache() -> Path:
    """The user's cache folder, or for a user without a home, one among the temporary files."""
    try:
        return cache_folder()
    except InputError:
        return Path(tempfile.gettempdir()) / "llava-cache"


def _gzip(path: Path) -> ByteStream:
    return gzip.open(path, "rb")


def _bzip2(path: Path) -> ByteStream:
    return bz2.open(path, "rb")


def _xz(path: Path) -> ByteStream:
    return lzma.open(path, "rb")


def _zstandard(path: Path) -> ByteStream:
    arrow = require("pyarrow", extra="train")
    return arrow.CompressedInputStream(arrow.OSFile(str(path)), "zstd")


COMPRESSIONS: dict[str, Callable[[Path], ByteStream]] = {
    ".gz": _gzip,
    ".tgz": _gzip,
    ".bz2": _bzip2,
    ".xz": _xz,
    ".zst": _zstandard,
    ".zstd": _zstandard,
}


def _decompressed(path: Path, folder: Path) -> Path:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path
    suffix = ".tar" if path.suffix.lower() == ".tgz" else Path(path.stem).suffix.lower()
    most = max(ALWAYS_ALLOWED, MAX_RATIO * path.stat().st_size)

    def chunks() -> Iterator[bytes]:
        size = 0
        try:
            with closing(compression(path)) as file:
                while data := file.read(CHUNK):
                    size += len(data)
                    if size > most:
                        raise InputError(
                            f"the training data {str(path)!r} is more than {most // 2**20:,} MiB when it is decompressed, "
                            f"over {MAX_RATIO} times its size; decompress it yourself if that is right"
                        )
                    yield data
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot decompress the training data {str(path)!r}: {error}") from error

    return kept_copy(path, folder, suffix, chunks)


def _in_utf8(path: Path, folder: Path) -> Path:
    """Excel and PowerShell write UTF-16, with its mark at the beginning."""
    if path.suffix.lower() not in TEXT_SUFFIXES:
        return path
    with path.open("rb") as file:
        if file.read(2) not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return path

    def chunks() -> Iterator[bytes]:
        try:
            with path.open(encoding="utf-16") as file:
                while text := file.read(CHUNK):
                    yield text.encode()
        except UnicodeError as error:
            raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error

    return kept_copy(path, folder, path.suffix.lower(), chunks)


def _as_lines(path: Path, folder: Path) -> Path:
    """Write the samples of a JSON object that holds them as lines."""
    if path.suffix.lower() not in TEXT_SUFFIXES or not holds_document(path):
        return path

    def chunks() -> Iterator[bytes]:
        for record in document_records(path):
            yield json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"

    partner = partner_of(path)
    return kept_copy(path, folder, ".jsonl", chunks, other=() if partner is None else (partner,))


def kept_copy(
    path: Path, folder: Path, suffix: str, chunks: Callable[[], Iterator[bytes]], *, other: tuple[Path, ...] = ()
) -> Path:
    """The copy of a file in `folder`, written now if it is not there. Its name is that of the state of `path` and `other`."""
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in (path, *other)]
    target = folder / f"{hashlib.sha256(repr(states).encode()).hexdigest()[:32]}{suffix}"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=target.stem)
    except OSError as error:
        raise InputError(
            f"the training data {str(path)!r} has to be unpacked into {str(folder)!r}, which cannot be written: "
            f"{error.strerror}; name another cache folder with XDG_CACHE_HOME"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            written = 0
            for data in chunks():
                if written % (64 * CHUNK) < len(data):
                    check_room(path, folder, len(data))
                written += file.write(data)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return target


def check_room(path: Path, folder: Path, num_bytes: int) -> None:
    """Raise where so many bytes of a copy of `path` would fill the disk."""
    free = shutil.disk_usage(folder).free
    if free - num_bytes < SPARE:
        raise InputError(
            f"the training data {str(path)!r} has to be unpacked into {str(folder)!r}, whose disk has {free / 2**30:.1f} GiB "
            "free; make room, or name another cache folder with XDG_CACHE_HOME"
        )
