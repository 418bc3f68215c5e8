"""Answers that obey a JSON schema or a regular expression, by llguidance (extra `constrain`).

In: a tokenizer, and a request's schema or expression. Out: a `Grammar` that says before each token which ones are allowed.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llava.engine.request import SamplingParams
from llava.errors import InputError, require
from llava.text.tokenization import Tokenizer

# One way to write each value. Where any blank space may stand between two tokens, a small model writes it without end.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarMaker:
    """Makes grammars for one tokenizer. Reading its vocabulary happens once, at the first request that needs it."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._read: Any = None

    def __call__(self, params: SamplingParams) -> Grammar | None:
        if params.json_schema is None and params.regex is None:
            return None
        library = require("llguidance", extra="constrain")
        if self._read is None:
            self._read = self._vocabulary(library)
        name, grammar = self._grammar(library, params)
        wrong = library.LLMatcher.validate_grammar(grammar, self._read)
        if wrong:
            raise InputError(f"{name} is not one that answers can be held to: {' '.join(str(wrong).split())[:300]}")
        return Grammar(library.LLMatcher(self._read, grammar))

    def _grammar(self, library: Any, params: SamplingParams) -> tuple[str, str]:
        if params.regex is not None:
            return f"regex {params.regex!r}", library.LLMatcher.grammar_from_regex(params.regex)
        schema = params.json_schema
        if not isinstance(schema, str):
            schema = json.dumps(schema)
        try:
            json.loads(schema)
        except ValueError as error:
            raise InputError(f"json_schema is not JSON: {error}") from error
        return "json_schema", library.LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)

    def _vocabulary(self, library: Any) -> Any:
        ends = sorted(self._end_ids)
        if not ends:
            raise InputError("answers can be constrained only where the tokenizer has an end token; this one has none")
        return library.LLTokenizer(
            library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, ends[0])),
            n_vocab=self._vocab_size,
            eos_token=ends,
        )


class Grammar:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Which tokens may follow (V,), as booleans."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little", count=vocab_size).astype(bool)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_over(self) -> bool:
        """Nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the answer's grammar failed: {' '.join(self._matcher.get_error().split())[:300]}")


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of each token, and ids of a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_id
        self.bos_token_id = tokenizer.bos_token_id
        special = set(tokenizer.all_special_ids)
        names = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
        spell = _byte_level_spelling() if _is_byte_level(names) else None
        self.tokens = [_bytes_of(name, spell, is_special=token in special) for token, name in enumerate(names)] + [
            b""
        ] * (vocab_size - len(names))
        self.special_token_ids = sorted(special | set(range(len(names), vocab_size)))

    def __call__(self, text: str) -> list[int]:
        """Ids of a text in the middle of another: without the space that sentencepiece puts before a beginning."""
        before, both = (self._ids(line) for line in ("\n", "\n" + text))
        return both[len(before) :] if both[: len(before)] == before else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _is_byte_level(names: list[str]) -> bool:
    """Whether tokens are spelled in the alphabet of GPT-2, which writes a space as "Ġ"; sentencepiece writes "▁"."""
    return any("Ġ" in name for name in names) and not any(name.startswith("▁") for name in names)


def _byte_level_spelling() -> dict[str, int]:
    """The byte that each character of GPT-2's alphabet stands for: itself where it can be printed, else the next free."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _bytes_of(name: str, spell: dict[str, int] | None, *, is_special: bool) -> bytes:
    if is_special:
        return name.encode()
    if spell is not None:
        return bytes(spell[char] for char in name) if all(char in spell for char in name) else name.encode()
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()
