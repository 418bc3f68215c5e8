"""Answers that obey a JSON schema, a regular expression or a grammar, by llguidance (extra `constrain`).

In: a tokenizer, and a request's schema, expression or grammar. Out: a `Grammar` that says before each token which ones are
allowed.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from llava.engine.request import SamplingParams
from llava.errors import InputError, require
from llava.text.token_bytes import TokenSpelling
from llava.text.tokenization import Tokenizer

# One way to write each value. Where any blank space may stand between two tokens, a small model writes it without end.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_GRAMMAR_CHARS = 2**17
MAX_COMPILED = 32  # grammars that are kept
MAX_FORCED_CHARS = 256  # of a text that a grammar prescribes, tokenized at once
# The library counts steps, of which it takes 14 to 50 in a microsecond; a state of its lexer is 1 to 2 kB.
COMPILE_LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
}


class GrammarMaker:
    """Makes grammars for one tokenizer, from any thread but the engine's.

    A compiled grammar, or the reason why it cannot be one, is kept for requests that come again. What an untrusted grammar may
    cost is bounded: the size of its text, and the library's own counts of states and steps, both when it is compiled and at
    each token. Reading the vocabulary happens once, at the first request that needs it.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._read: Any = None
        self._compiled: OrderedDict[tuple[str, str], Any] = (
            OrderedDict()
        )  # matchers at their beginning, or `InputError`s
        self._lock = threading.Lock()  # of what is kept
        self._compiling = threading.Lock()  # one at a time: untrusted grammars take one core at most

    def __call__(self, params: SamplingParams) -> Grammar | None:
        asked = _asked(params)
        if asked is None:
            return None
        found = self._kept(asked)
        if found is None:
            with self._compiling:
                found = self._kept(asked) or self._compile(*asked)
                self._keep(asked, found)
        if isinstance(found, InputError):
            raise InputError(str(found))
        with self._lock:
            return Grammar(found.deep_copy(), lambda: self._forget(asked))

    def _kept(self, asked: tuple[str, str]) -> Any:
        with self._lock:
            if asked in self._compiled:
                self._compiled.move_to_end(asked)
            return self._compiled.get(asked)

    def _keep(self, asked: tuple[str, str], found: Any) -> None:
        with self._lock:
            self._compiled[asked] = found
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)

    def _forget(self, asked: tuple[str, str]) -> None:
        """Compile again next time: copies share their lexer, whose states may have come to their limit."""
        with self._lock:
            self._compiled.pop(asked, None)

    def _compile(self, name: str, text: str) -> Any:
        """The matcher, with its first step taken; or an `InputError`."""
        library = require("llguidance", extra="constrain")
        if self._read is None:
            self._read = self._vocabulary(library)
        try:
            grammar = _WRITERS[name](library.LLMatcher, text)
            matcher = library.LLMatcher(
                self._read, grammar, log_level=0, limits=library.LLParserLimits(**COMPILE_LIMITS)
            )
            if not matcher.is_error():
                matcher.compute_bitmask()  # where a grammar begins with a text, all of that is read here
            problem = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            problem = str(error)
        shown = f"{name} {text[:80]!r}" if name == "regex" else name
        reason = " ".join(problem.partition("\n<state>")[0].split())[:300]
        return InputError(f"{shown} is not one that answers can be held to: {reason}") if problem else matcher

    def _vocabulary(self, library: Any) -> Any:
        ends = sorted(self._end_ids)
        if not ends:
            raise InputError("answers can be constrained only where the tokenizer has an end token; this one has none")
        return library.LLTokenizer(
            library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, ends[0])),
            n_vocab=self._vocab_size,
            eos_token=ends,
        )


_WRITERS: dict[str, Callable[[Any, str], str]] = {
    "json_schema": lambda matcher, text: matcher.grammar_from_json_schema(text, overrides=JSON_STYLE),
    "regex": lambda matcher, text: matcher.grammar_from_regex(text),
    "grammar": lambda matcher, text: matcher.grammar_from_lark(text),
}


def _asked(params: SamplingParams) -> tuple[str, str] | None:
    """The field that constrains the answer and its text; None where there is none."""
    name = next((name for name in _WRITERS if getattr(params, name) is not None), None)
    if name is None:
        return None
    given = getattr(params, name)
    try:
        text = given if isinstance(given, str) else json.dumps(given)
        if name == "json_schema":
            json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}") from error
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InputError(f"{name} has {len(text):,} characters; answers can be held to {MAX_GRAMMAR_CHARS:,} at most")
    return name, text


class Grammar:
    """How far one answer has come in its grammar. `on_error` is called where the library gives up."""

    def __init__(self, matcher: Any, on_error: Callable[[], None] = lambda: None) -> None:
        self._matcher = matcher
        self._on_error = on_error

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
            self._on_error()
            reason = self._matcher.get_error().partition("\n<state>")[0]
            raise InputError(f"the answer's grammar failed: {' '.join(reason.split())[:300]}")


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of each token, and ids of a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_id
        self.bos_token_id = tokenizer.bos_token_id
        spelling = TokenSpelling(tokenizer)
        pieces = [spelling.piece(token) for token in range(vocab_size)]
        self.tokens = [piece.data for piece in pieces]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if piece.is_special]

    def __call__(self, text: str) -> list[int]:
        """Ids of a text in the middle of another: without the space that sentencepiece puts before a beginning.

        Of a long text only the beginning, which is all that the next token needs.
        """
        text = text[:MAX_FORCED_CHARS]
        before, both = (self._ids(line) for line in ("\n", "\n" + text))
        return both[len(before) :] if both[: len(before)] == before else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
