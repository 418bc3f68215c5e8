"""Read what the sentencepiece library does not tell: the type of a model, and the type of each piece.

In: a `tokenizer.model`. Out: `SentencePieceFile`. The file is in protobuf's wire format, of which five fields are read here
without a dependency.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llava.errors import InputError
from llava.model.checkpoints.gguf.tokenizer import NORMAL, UNIGRAM


class ScoredPiece(NamedTuple):
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceFile:
    kind: int
    pieces: tuple[ScoredPiece, ...]


def read_sentencepiece(file: Path) -> SentencePieceFile:
    """Read the type of a sentencepiece model, and its pieces; a file that is none is an `InputError`."""
    pieces, kind = [], UNIGRAM
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):  # the trainer's settings
                kind = next((inner for key, inner in _fields(value) if key == 3 and isinstance(inner, int)), UNIGRAM)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a sentencepiece model (damaged or cut short); fetch the file again") from error
    return SentencePieceFile(kind, tuple(pieces))


def _piece(message: bytes) -> ScoredPiece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return ScoredPiece(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the numbered fields of a message: varints as integers, all others as bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        length = {1: 8, 2: -1, 5: 4}[key & 7]
        length = number() if length < 0 else length
        yield key >> 3, message[at : at + length]
        at += length
