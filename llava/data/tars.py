"""Read tar shards of samples, as WebDataset and Megatron-Energon write them, at any place.

In: a tar file; of an Energon data set also `.nv-meta/dataset.yaml`, which says what the members are. Out: `ScannedRecord`s, see
scan.py: the members with one name up to its first dot are a sample, and the tar is read where they lie. Nothing is written to
the disk, so names in a tar lead nowhere.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from llava.data.formats import IMAGES, VIDEOS
from llava.data.scan import FileFormat, ScannedRecord
from llava.errors import InputError

MAX_SAMPLE_BYTES = 2**30
MAX_TEXT_BYTES = 64 * 2**20
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "img", "image")
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov", "m4v")
TEXT_SUFFIXES = ("txt", "text", "caption")
UNREAD = b"unread"  # stands for a member's bytes where a tar is only scanned


@dataclass
class _Members:
    """The members of one sample."""

    key: str
    start: int
    end: int = 0
    contents: list[tuple[str, bytes]] = field(default_factory=list)  # by the name behind the first dot


def _tar_records(path: Path) -> Iterator[ScannedRecord]:
    for members in _samples(path):
        try:
            yield ScannedRecord(members.start, members.end - members.start, _record(members, path))
        except InputError as error:
            yield ScannedRecord(members.start, members.end - members.start, {"id": members.key}, str(error))


def _read_tar_record(path: Path, start: int, size: int) -> object:
    if size > MAX_SAMPLE_BYTES:
        raise InputError(f"its members have {size:,} bytes, more than the {MAX_SAMPLE_BYTES:,} allowed")
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        (members,) = _read_members(archive, lambda name: True)
    return _record(members, path)


def _samples(path: Path) -> Iterator[_Members]:
    """Stream the samples of a tar, with the contents of texts only."""
    try:
        with tarfile.open(path, "r:") as archive:
            yield from _read_members(archive, lambda suffix: suffix == "json" or suffix in TEXT_SUFFIXES)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the training data {str(path)!r}: it is no whole tar file ({error})") from error


def _read_members(archive: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[_Members]:
    """Group the files of a tar by their names up to the first dot; links and sparse files are passed over."""
    current: _Members | None = None
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # which would grow with the tar
        if not member.isreg() or member.issparse():
            continue
        folder, name = PurePosixPath(member.name).parent, PurePosixPath(member.name).name
        stem, _, suffixes = name.partition(".")
        key = stem if str(folder) == "." else f"{folder}/{stem}"
        if not stem:  # .DS_Store and other hidden files
            continue
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = _Members(key, member.offset)
        current.end = -(-(member.offset_data + member.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        suffix = suffixes.lower().rpartition(".")[2]
        content = UNREAD
        if wanted(suffix):
            if suffix in ("json", *TEXT_SUFFIXES) and member.size > MAX_TEXT_BYTES:
                raise InputError(
                    f"the member {member.name!r} has {member.size:,} bytes, which no text of a sample needs"
                )
            file = archive.extractfile(member)
            content = file.read() if file is not None else b""
        current.contents.append((suffixes.lower(), content))
    if current is not None:
        yield current


# From members to a record


def _record(members: _Members, path: Path) -> dict[str, object]:
    description = _energon_description(path.parent)
    if description is not None:
        return {"id": members.key, **_mapped(dict(members.contents), description)}
    record: dict[str, object] = {"id": members.key}
    media: dict[str, list[bytes]] = {"image": [], "video": []}
    texts: list[str] = []
    for suffixes, content in members.contents:
        suffix = suffixes.rpartition(".")[2]
        if suffix == "json":
            record |= _from_json(_parsed(content, suffixes))
        elif suffix in TEXT_SUFFIXES:
            texts.append(_text(content, suffixes))
        elif suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
            media["image" if suffix in IMAGE_SUFFIXES else "video"].append(content)
        else:
            record[f".{suffixes}"] = len(content)  # is said to be unread
    for name, names in (("image", IMAGES), ("video", VIDEOS)):
        if media[name]:  # what the description names are the paths that the members had
            record = {key: value for key, value in record.items() if key not in names} | {name: media[name]}
    if texts and not any(key in record for key in ("conversations", "messages", "texts", "question", "caption")):
        record["caption"] = texts[0]
    if record.keys() <= {"id", "image", "video"}:
        raise InputError(f"the members of {members.key!r} have no text; a sample's members must lie one after another")
    return record


def _from_json(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {"conversations": value}


def _parsed(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except RecursionError as error:
        raise InputError(f"its .{name} is nested too deep") from error
    except ValueError as error:
        raise InputError(f"its .{name} is not valid JSON: {error}") from error


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"its .{name} is no text in UTF-8: {error}") from error


# Energon's description of a data set


# By its class of samples, our field for each of its own.
_CLASSES = {
    "VQASample": {"image": "image", "context": "question", "answers": "answers"},
    "CaptioningSample": {"image": "image", "caption": "caption"},
    "OCRSample": {"image": "image", "text": "caption"},
}


@dataclass(frozen=True)
class _Description:
    """Where a sample's fields are: `jpg`, or within a member's JSON `json[0][value]`."""

    fields: tuple[tuple[str, str], ...]


@cache
def _energon_description(folder: Path) -> _Description | None:
    """What `.nv-meta/dataset.yaml` in this folder, or one of two above it, says; None without a field map."""
    import yaml

    file = next(
        (place / ".nv-meta/dataset.yaml" for place in (folder, *folder.parents[:2]) if (place / ".nv-meta").is_dir()),
        None,
    )
    if file is None or not file.is_file():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {str(file)!r}: {error}") from error
    field_map = content.get("field_map") if isinstance(content, Mapping) else None
    if not isinstance(field_map, Mapping):
        return None  # its samples are read by Python code; the members say enough where they have a known form
    kind = content.get("sample_type")
    name = str(kind.get("__class__") if isinstance(kind, Mapping) else kind)
    known = _CLASSES.get(name)
    if known is None:
        raise InputError(f"{str(file)!r} describes samples of the class {name!r}; known are {', '.join(_CLASSES)}")
    return _Description(tuple((known[key], str(place)) for key, place in field_map.items() if key in known))


def _mapped(members: Mapping[str, bytes], description: _Description) -> dict[str, object]:
    return {name: _at(members, place) for name, place in description.fields}


def _at(members: Mapping[str, bytes], place: str) -> object:
    """The member, or the value in a member's JSON, that a place names; of several joined by commas the first that is there."""
    names = [name.strip() for name in place.split(",")]
    found = next((name for name in names if name.partition("[")[0] in members), None)
    if found is None:
        raise InputError(f"it has no member {' or '.join(repr(name) for name in names)}")
    suffixes, _, _ = found.partition("[")
    content, suffix = members[suffixes], suffixes.rpartition(".")[2]
    if suffix in TEXT_SUFFIXES:
        return _text(content, suffixes)
    if suffix != "json":
        return content
    value = _parsed(content, suffixes)
    for key in re.findall(r"\[([^\]]*)\]", found):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"its .{suffixes} has nothing at {found!r}") from error
    return value


TAR = FileFormat(_tar_records, _read_tar_record)
