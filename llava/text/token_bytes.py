"""The bytes that each token of a vocabulary stands for inside a text.

In: a tokenizer. Out: bytes by token id: half a character where a token is half a character, and the space that a token begins
with. Decoding a single token gives neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from llava.text.tokenization import Tokenizer


class TokenPiece(NamedTuple):
    """A token as bytes; a special one, such as `</s>`, is its name and no part of a text."""

    data: bytes
    is_special: bool = False


class TokenSpelling:
    """How a vocabulary spells its tokens: as sentencepiece, with "▁" for a space and <0xE2> for a byte, or as GPT-2."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)

    def piece(self, token_id: int) -> TokenPiece:
        """The piece of a token; an empty one for an id that pads the vocabulary."""
        if not 0 <= token_id < len(self._tokenizer):
            return TokenPiece(b"", is_special=True)
        name: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None or token_id in self._special:
            return TokenPiece((name or "").encode(), is_special=True)
        letters = self._letters
        if letters is not None:
            if all(letter in letters for letter in name):
                return TokenPiece(bytes(letters[letter] for letter in name))
            return TokenPiece(name.encode())
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return TokenPiece(bytes([int(name[3:5], 16)]))
        return TokenPiece(name.replace("▁", " ").encode())

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, from the beginning of a text on: without the space that sentencepiece puts before it."""
        pieces = [piece.data for piece in map(self.piece, token_ids) if not piece.is_special]
        text = b"".join(pieces).decode(errors="replace")
        return text.removeprefix(" ") if self._letters is None else text

    @cached_property
    def _letters(self) -> dict[str, int] | None:
        """The byte of each letter of GPT-2's alphabet, which writes a space as "Ġ"; None for sentencepiece's spelling."""
        names = [str(name) for name in self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))]
        is_byte_level = any("Ġ" in name for name in names) and not any(name.startswith("▁") for name in names)
        return _byte_letters() if is_byte_level else None


def _byte_letters() -> dict[str, int]:
    """The byte that each character of GPT-2's alphabet stands for: itself where it can be printed, else the next free."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}
