"""Atomic folders, JSON files, the cache folder.

`atomic_folder` gives a new folder its name when every byte of it has reached the disk, so that no incomplete folder has
the final name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import InputError, is_disk_full

MAX_JSON_BYTES = 2**28  # of any JSON file that belongs to a model; parsed, it takes some ten times as much

STAGING, TRASH = "incomplete-", "deleted-"  # prefixes of folders that are being written or deleted

# A folder with none of these has no tokenizer; transformers would make an empty one without a warning.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tiktoken.model",
    "sentencepiece.bpe.model",
)


@contextmanager
def atomic_folder(target: Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """Create a folder to write into. It gets the name `target` when the block ends, and is deleted when the block raises.

    Args:
        target: a name that does not exist, in a folder that does.
        num_bytes: about how much will be written; a disk with less space is refused at once.

    Raises:
        InputError: the target exists, its parent does not, or the disk is full.
    """
    refuse_existing(target)
    parent = target.absolute().parent
    if not parent.is_dir():
        raise InputError(f"there is no folder {str(parent)!r} to write {target.name!r} into; make it first")
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise InputError(
            f"{str(target)!r} takes {num_bytes / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free; make room or "
            "name a target on another disk"
        )
    staging = parent / f"{STAGING}{target.name}"
    shutil.rmtree(staging, ignore_errors=True)  # of a conversion that was killed
    try:
        staging.mkdir()
        yield staging
        flush_tree(staging)
        os.rename(staging, target)
        flush(parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.filename == str(staging):
            error.filename = str(target)  # the name that the user gave
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(parent).free
        raise InputError(
            f"cannot write {str(target)!r}: its disk is full or limited ({free / 2**30:.2f} GiB are free, without what was "
            "begun); nothing was left there; make room or name a target on another disk"
        ) from error


def write_whole(file: Path, text: str) -> None:
    """Write a small file so that a reader finds the old content or the new one, never a part."""
    begun = file.with_name(f"{STAGING}{file.name}")
    begun.write_text(text, encoding="utf-8")
    os.replace(begun, file)


def refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise InputError(f"the target {str(target)!r} exists; name a new folder, or remove this one first")


def flush_tree(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            flush(path)


def flush(path: Path) -> None:
    if os.name == "nt":  # Windows flushes no file that is open for reading, and no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object; anything else is an `InputError` that names the file."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{file} has more than {MAX_JSON_BYTES} bytes, which no such file of a model needs")
        values = json.loads(file.read_text(encoding="utf-8"))
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{file} is nested deeper than any such file of a model; fetch it again") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); write or fetch it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} must hold a JSON object, found {type(values).__name__}")
    return values


def script_json(value: object) -> str:
    """Return JSON for a script element of an HTML page, which no text in it can end.

    A browser reads `<!--<script>` in such an element as the start of another one, and then passes over the element's end; so no
    `<` is left.
    """
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def cache_folder() -> Path:
    """The folder `llava` in the user's cache folder.

    Raises:
        InputError: the user has no home, and the environment names no cache folder.
    """
    return _user_folder("XDG_CACHE_HOME", ".cache") / "llava"


def config_folder() -> Path:
    """The folder of the user's configuration files; raises as `cache_folder` does."""
    return _user_folder("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path:
    """The folder `llava` for what is kept between runs; raises as `cache_folder` does."""
    return _user_folder("XDG_STATE_HOME", ".local/state") / "llava"


def _user_folder(variable: str, default: str) -> Path:
    try:
        return Path(os.environ.get(variable) or Path.home() / default)
    except RuntimeError as error:
        raise InputError(f"this user has no home folder; set the variable HOME or {variable} to a folder") from error
