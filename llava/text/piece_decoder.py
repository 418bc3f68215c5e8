"""Ids one after another to text, for vocabularies in which every token stands for a text, or bytes, of its own.

In: a table of what tokens stand for. Out: the text that decoding all of them together gives, as soon as it is certain, with
no token decoded twice. The table of a tokenizer is made where the tokenizer is (sentencepiece_tokenizer.py); detokenizer.py
serves those without one.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet one


class Alone(str):
    """The text of a token that stands between spaces, whatever is around it."""


# Characters, a part of one, or nothing at all: a token that is left out as if it were not there.
Entry = str | bytes | Alone | None


class PieceDecoder:
    """`opening` gives the text of the first tokens of a run between tokens that stand alone, which differs from what they
    are elsewhere: spaces are lost there. While it is empty, more of them are waited for."""

    def __init__(self, entries: Mapping[int, Entry], opening: Callable[[list[int]], str]) -> None:
        self._entries = entries
        self._opening_text = opening
        self._opening: list[int] | None = []  # the first tokens of a run that has no text yet
        self._bytes = _Utf8(_EACH_BYTE)
        self._gap = ""  # what comes before the text of this run, if it has any
        self._said = False
        self._ready = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these make certain. What ends in a broken character waits for the rest of it."""
        for token in token_ids:
            entry = self._entries[token]
            if type(entry) is str and self._opening is None and not self._bytes.buffer:
                self._ready += entry
            elif entry is not None:
                self._take(token, entry)
        text = self._ready
        if not text or text[-1] == REPLACEMENT or self._bytes.buffer:
            return ""
        self._ready = ""
        return text

    def finish(self) -> str:
        self._end_bytes()
        text, self._ready = self._ready, ""
        return text

    def _take(self, token: int, entry: str | bytes) -> None:
        if isinstance(entry, bytes):
            self._open()
            self._ready += self._bytes.decode(entry)
            return
        self._end_bytes()
        if isinstance(entry, Alone):
            self._ready += (" " if self._said else "") + entry
            self._opening, self._gap, self._said = [], " ", True
        elif self._opening is None:
            self._ready += entry
        else:
            self._opening.append(token)
            text = self._opening_text(self._opening)
            if text:
                self._open()
                self._ready += text

    def _open(self) -> None:
        """This run has text from here on."""
        if self._opening is not None:
            self._ready += self._gap
            self._opening, self._gap, self._said = None, "", True

    def _end_bytes(self) -> None:
        """What comes next is no byte: those that wait for others will stay what they are."""
        if self._bytes.buffer:
            self._ready += self._bytes.decode(b"", True)


class _Utf8(codecs.BufferedIncrementalDecoder):
    """Python's incremental decoder, whose `buffer` holds the bytes of a character that is not complete."""

    buffer: bytes

    def _buffer_decode(self, data: Any, errors: str, final: bool) -> tuple[str, int]:
        return codecs.utf_8_decode(data, errors, final)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """As sentencepiece has it, every byte that belongs to no character is shown."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


_EACH_BYTE = "llava-each-byte"
codecs.register_error(_EACH_BYTE, _each_byte)
