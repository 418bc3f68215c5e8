"""Convert training samples of either form to LLaVA's own.

In: a record of a file: LLaVA's `{"id", "image", "conversations": [{"from", "value"}]}`, or OpenAI-style
`{"messages": [{"role", "content": text or parts}]}`. Out: the former, or an `InputError` about the record's form.
train/data.py and validate.py check its text and images; index.py finds records in files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError

Sample = dict[str, Any]
ImageSource = str | bytes  # a path inside the image folder or a data: URL; or the bytes of an image's file

# OpenAI's names of speakers and LLaVA's. Other names are kept here; text/labels.py refuses unknown ones.
_SPEAKERS = {"user": "human", "assistant": "gpt"}


def to_sample(record: object) -> Sample:
    """Convert a record to LLaVA's form; one that has it is returned as it is."""
    if isinstance(record, dict) and "conversations" not in record and isinstance(record.get("messages"), Sequence):
        return _from_messages(record)
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise InputError("it is not an object with a list 'conversations' (or 'messages')")
    if not record["conversations"]:
        raise InputError("it has no turns")
    for number, turn in enumerate(record["conversations"]):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise InputError(f"turn {number} is not an object with 'from' and a text 'value'")
    key = "images" if record.get("images") and "image" not in record else "image"
    image = record.get(key)
    if not image or (key == "image" and _is_plain(image)):
        return record
    return {**record, "image": _images(image, key)}


def image_sources(sample: Sample) -> list[ImageSource]:
    """List the images of a sample in LLaVA's form."""
    image = sample.get("image")
    if not image:
        return []
    return [image] if isinstance(image, (str, bytes)) else list(image)


def num_words(sample: Sample) -> int:
    """Count the words of all turns, as samplers do."""
    return sum(len(turn["value"].split()) for turn in sample["conversations"])


def _is_plain(image: object) -> bool:
    entries = image if isinstance(image, list) else [image]
    return all(isinstance(entry, (str, bytes)) for entry in entries)


def _images(value: object, key: str) -> list[ImageSource]:
    return [_image(entry, key) for entry in (value if isinstance(value, list) else [value])]


def _image(entry: object, key: str) -> ImageSource:
    """Read one image: its path, its bytes, or an object that holds either, like image columns and content parts."""
    if isinstance(entry, Mapping):
        entry = next((entry[name] for name in ("bytes", "path", "url") if entry.get(name)), None)
    if isinstance(entry, (str, bytes)) and entry:
        return entry.removeprefix("file://") if isinstance(entry, str) else entry
    raise InputError(f"{key!r} is neither a path nor a list of paths (nor holds the bytes of images)")


def _from_messages(record: Sample) -> Sample:
    """Convert messages to turns: an image part becomes a placeholder, and its image joins the sample's images."""
    if not record["messages"]:
        raise InputError("it has no turns")
    listed = record.get("images") or record.get("image")
    images: list[ImageSource] = _images(listed, "images") if listed else []
    in_parts: list[ImageSource] = []
    turns = []
    for number, message in enumerate(record["messages"]):
        if not isinstance(message, Mapping) or "role" not in message:
            raise InputError(f"message {number} is not an object with 'role' and 'content'")
        role = str(message["role"])
        text, found = _content(message.get("content"), number)
        in_parts += found
        turns.append({"from": _SPEAKERS.get(role, role), "value": text})
    if images and in_parts:
        raise InputError("it names images both in its messages and beside them; use one of the two places")
    sample: Sample = {"conversations": turns}
    if "id" in record:
        sample["id"] = record["id"]
    if images or in_parts:
        sample["image"] = images or in_parts
    return sample


def _content(content: object, number: int) -> tuple[str, list[ImageSource]]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence):
        raise InputError(f"the content of message {number} is neither a text nor a list of parts")
    texts: list[str] = []
    images: list[ImageSource] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "image"):
            texts.append(DEFAULT_IMAGE_TOKEN)
            image = next((part[name] for name in ("image_url", "image", "url", "path") if part.get(name)), None)
            if image is not None:  # otherwise it is one of the record's own images
                images.append(_image(image, str(kind)))
        else:
            raise InputError(f"message {number} has a part of type {kind!r}; known parts are text and image_url")
    return "\n".join(texts), images
