"""Read JSON documents whose samples are not simply a list: COCO captions, VQA questions and answers, lists under a key.

In: the path of a file that holds one JSON object. Out: records of forms that formats.py knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava.data.fields import Fields
from llava.data.formats import FORMS
from llava.errors import InputError

MAX_BYTES = 2 * 2**30  # of a document, which is parsed as a whole
LISTS = ("data", "samples", "train", "rows", "items", "dataset", "instances")

Document = Mapping[str, Any]


def document_records(path: Path) -> Iterator[dict[str, object]]:
    """Yield the records of a document.

    Raises:
        InputError: it is no JSON, or of no known form.
    """
    document = _load(path)
    if isinstance(document.get("annotations"), list) and isinstance(document.get("images"), list):
        return _captions(document, path)
    if isinstance(document.get("questions"), list):
        return _questions(document, path)
    if isinstance(document.get("annotations"), list) and any(
        "answers" in _mapping(entry) for entry in document["annotations"][:1]
    ):
        raise InputError(
            f"the training data {str(path)!r} holds answers without their questions; name the file of the questions, with this "
            "one beside it"
        )
    for name in (*LISTS, *document):
        entries = document.get(name)
        if (
            isinstance(entries, list)
            and entries
            and isinstance(entries[0], dict)
            and name not in ("conversations", "messages")
        ):
            return iter(entries)
    if any(form.fits(Fields(document)) for form in FORMS):
        return iter([dict(document)])
    if document and all(isinstance(value, dict) for value in document.values()):
        return iter([{"id": key, **value} for key, value in document.items()])
    keys = ", ".join(repr(key) for key in list(document)[:8])
    raise InputError(
        f"the training data {str(path)!r} must be a JSON list of samples, or an object with one under 'data'; it has the keys "
        f"{keys}"
    )


def partner_of(path: Path) -> Path | None:
    """The file of answers beside a file of VQA questions, by its name; None without one."""
    name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    partner = path.with_name(name)
    return partner if name != path.name and partner.is_file() else None


def _captions(document: Document, path: Path) -> Iterator[dict[str, object]]:
    """COCO's: each annotation has a caption for the image of its number."""
    files = {entry.get("id"): entry.get("file_name") for entry in map(_mapping, document["images"])}
    for number, entry in enumerate(map(_mapping, document["annotations"])):
        if "caption" not in entry:
            raise InputError(
                f"annotation {number} of {str(path)!r} has no 'caption' (keys: {', '.join(entry)}); of COCO's files those of "
                "captions are read"
            )
        image = files.get(entry.get("image_id"))
        if image is None:
            raise InputError(
                f"annotation {number} of {str(path)!r} is about the image {entry.get('image_id')!r}, which the file lacks"
            )
        yield {"id": entry.get("id", number), "image": image, "caption": entry["caption"]}


def _questions(document: Document, path: Path) -> Iterator[dict[str, object]]:
    """VQA's: questions, and in the same or another file their answers, by number."""
    partner = partner_of(path)
    annotations = document.get("annotations")
    if annotations is None and partner is not None:
        annotations = _load(partner).get("annotations")
    answers = {
        entry.get("question_id"): entry for entry in map(_mapping, annotations if isinstance(annotations, list) else [])
    }
    part = document.get("data_subtype")
    for entry in map(_mapping, document["questions"]):
        answer = {**entry, **answers.get(entry.get("question_id"), {})}
        if not any(answer.get(name) for name in ("multiple_choice_answer", "answer", "answers")):
            raise InputError(
                f"the question {entry.get('question_id')!r} of {str(path)!r} has no answer; put the file of the answers beside "
                f"it, as {path.name.replace('OpenEnded_', '').replace('questions', 'annotations')!r}"
            )
        record: dict[str, object] = {"id": entry.get("question_id"), "question": entry.get("question")}
        image = entry.get("image") or entry.get("file_name")
        if not image and isinstance(entry.get("image_id"), int) and part:  # as COCO names its files
            image = f"COCO_{part}_{entry['image_id']:012}.jpg"
        record["image"] = image or str(entry.get("image_id"))
        record["answer"] = answer.get("multiple_choice_answer") or answer.get("answer") or answer.get("answers")
        yield record


def _load(path: Path) -> Document:
    if path.stat().st_size > MAX_BYTES:
        raise InputError(
            f"the training data {str(path)!r} is one JSON object of {path.stat().st_size / 2**30:.1f} GiB; write its samples "
            "as a list, or as lines (.jsonl)"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"the training data {str(path)!r} is nested too deep to be samples") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"the training data {str(path)!r} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except ValueError as error:
        raise InputError(f"cannot read the training data {str(path)!r}: {error}") from error
    return _mapping(document)


def _mapping(value: object) -> Document:
    if not isinstance(value, Mapping):
        raise InputError(f"a JSON document of training data has {str(value)[:40]!r} where an object is expected")
    return value
