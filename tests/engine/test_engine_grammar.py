"""Untrusted grammars: what they may cost, what is kept of them, and that a prescribed text comes out whole."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from engine_kit import loaded

from llava.engine.engine import Engine
from llava.engine.grammar import MAX_COMPILED, MAX_FORCED_CHARS, GrammarMaker, _Vocabulary
from llava.engine.request import Request, SamplingParams
from llava.errors import InputError


@pytest.fixture(scope="module")
def maker() -> GrammarMaker:
    model = loaded("llama")
    size = model.model.get_input_embeddings().weight.shape[0]
    return GrammarMaker(model.tokenizer, vocab_size=size, end_ids=frozenset([model.tokenizer.eos_token_id]))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "params",
    [
        {"regex": "(" * 4000 + ")" * 4000},
        {"regex": "a" * 200_000},
        {"json_schema": nested(200)},
        {"json_schema": {"enum": list(range(200_000))}},
        {"json_schema": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}},
        {"json_schema": {"type": "string", "allOf": [{"pattern": f"^.*{chr(97 + n)}.*$"} for n in range(20)]}},
        {"json_schema": {"$ref": "file:///etc/passwd"}},
        {"grammar": "start: nothing"},
    ],
    ids=lambda params: str(params)[:40],
)
def test_what_costs_too_much_is_refused_before_it_runs(maker: GrammarMaker, params: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(params))):
        maker(SamplingParams(**params))


@pytest.mark.parametrize("regex", ["(a{1000}){1000}", "a{1000000}", "x(a{1000}){1000}", "(ab){3000}"])
def test_of_a_prescribed_text_the_tokenizer_reads_the_beginning(
    maker: GrammarMaker, regex: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    read_ids = _Vocabulary._ids

    def counted(self: _Vocabulary, text: str) -> list[int]:
        lengths.append(len(text))
        return read_ids(self, text)

    monkeypatch.setattr(_Vocabulary, "_ids", counted)
    grammar = maker(SamplingParams(regex=regex))
    assert grammar is not None
    size = maker._vocab_size
    with contextlib.suppress(InputError):  # it may be found too large on its way
        for _ in range(5):
            first, *_ = np.flatnonzero(grammar.allowed(size))
            assert maker._tokenizer.convert_ids_to_tokens(int(first)).strip("▁") in ("a", "b", "x")
            grammar.accept(int(first))
    assert lengths
    assert max(lengths) <= MAX_FORCED_CHARS + 1


def test_a_grammar_is_compiled_once(maker: GrammarMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one = GrammarMaker._compile

    def counted(self: GrammarMaker, name: str, text: str) -> Any:
        compiled.append(text)
        return compile_one(self, name, text)

    monkeypatch.setattr(GrammarMaker, "_compile", counted)
    for _ in range(3):
        assert maker(SamplingParams(regex="[ab]+c")) is not None
        with pytest.raises(InputError):
            maker(SamplingParams(regex="["))
    assert compiled == ["[ab]+c", "["]
    for number in range(MAX_COMPILED):
        maker(SamplingParams(regex=f"x{number}"))
    maker(SamplingParams(regex="[ab]+c"))  # the oldest have been dropped
    assert compiled.count("[ab]+c") == 2


def test_one_that_fails_on_its_way_is_not_kept(maker: GrammarMaker) -> None:
    asked = SamplingParams(regex="[ab]x")
    grammar = maker(asked)
    assert grammar is not None
    before = maker._kept(("regex", "[ab]x"))
    with pytest.raises(InputError, match="grammar failed"):
        grammar.accept(maker._tokenizer.convert_tokens_to_ids("z") or 3)
    assert maker._kept(("regex", "[ab]x")) is None
    maker(asked)
    assert maker._kept(("regex", "[ab]x")) is not before


def test_a_long_prescribed_text_comes_out_whole() -> None:
    """Only the beginning of what is prescribed is tokenized at each step; the answer has all of it."""
    text = "".join(f"{number} bottles; " for number in range(80))
    assert len(text) > 3 * MAX_FORCED_CHARS
    with Engine.from_loaded(loaded("llama")) as engine:
        length = engine.context_len - 20
        asked = SamplingParams(regex=text[: length // 2], max_new_tokens=length)
        assert engine.generate(Request("Sing.", sampling=asked)).text == text[: length // 2]
        schema = {"type": "object", "properties": {"song": {"const": text[:40]}}, "required": ["song"]}
        asked = SamplingParams(json_schema=schema, max_new_tokens=length)
        assert json.loads(engine.generate(Request("Sing.", sampling=asked)).text) == {"song": text[:40]}
