"""Bodies of JSON: what is parsed is what `json.loads` gives, and what would cost much is refused before it is built."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import InputError
from llava.serve.http import json_body
from llava.serve.http.json_body import MAX_DEPTH, MAX_VALUES, parse_json

TEXTS = st.text(alphabet=st.sampled_from('a,[]{}":\\\né\u2028'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=30,
)


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_a_body_is_parsed_as_json_is(value: object, ascii_only: bool, indent: int | None) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()) == value


@given(VALUES)
def test_the_scan_counts_what_is_there(value: object) -> None:
    """With bounds just at a value's own depth and size it passes; below either, it is refused."""
    depth, count = measure(value)
    body = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "MAX_DEPTH", depth)
        patch.setattr(json_body, "MAX_VALUES", count)
        assert parse_json(body) == value
        if depth:
            patch.setattr(json_body, "MAX_DEPTH", depth - 1)
            with pytest.raises(InputError, match="levels deep"):
                parse_json(body)
        patch.setattr(json_body, "MAX_DEPTH", depth)
        if count:
            patch.setattr(json_body, "MAX_VALUES", count - 1)
            with pytest.raises(InputError, match="values"):
                parse_json(body)


def measure(value: object) -> tuple[int, int]:
    """The depth of lists and objects, and how many brackets and commas they are written with."""
    if not isinstance(value, (list, dict)):
        return 0, 0
    inner = [measure(one) for one in (value.values() if isinstance(value, dict) else value)]
    return 1 + max([depth for depth, _ in inner], default=0), 1 + max(0, len(inner) - 1) + sum(n for _, n in inner)


@settings(max_examples=300)
@given(st.lists(st.sampled_from([b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"a", b"1", b":"]), max_size=300))
def test_what_is_not_json_is_refused_in_a_sentence(parts: list[bytes]) -> None:
    body = b"".join(parts)
    try:
        expected: Any = json.loads(body)
    except ValueError:
        with pytest.raises(InputError):
            parse_json(body)
    else:
        assert parse_json(body) == expected


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"x":[' + b"[]," * MAX_VALUES + b"0]}", "more than 200,000 values"),
        (b'{"x":[' + b'{"":0},' * MAX_VALUES + b"0]}", "more than 200,000 values"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "100 levels deep"),
        (b"[" * 1_000_000, "100 levels deep"),
        (b"[1e999]", "1e999"),
        (b'[-1e400, "' + b"[" * 200 + b'"]', "-1e400"),
        (b"[NaN]", "NaN"),
        (b'["\\ud800"]', "not JSON"),
        (b'"' + b"[," * 300_000, "not JSON"),
        (b"[" + b"9" * 5000 + b"]", "not JSON"),
    ],
)
def test_bounds(body: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_json(body)


def test_a_text_of_brackets_is_a_text() -> None:
    for text in ("[{," * MAX_VALUES, '\\"[' * MAX_VALUES, "\\" * 999):
        assert parse_json(json.dumps({"content": text}).encode()) == {"content": text}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_no_other_encoding_hides_the_depth(encoding: str) -> None:
    """A character whose bytes have a quote among them, in a string before what is nested."""
    nested = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    for character in ("\u2230", "\u3022", "x"):
        with pytest.raises(InputError, match=r"not JSON|nested"):
            parse_json(f'{{"a":"{character}","b":{nested}}}'.encode(encoding))


@pytest.mark.parametrize("body", [b'{"a":"\xed\xa0\x80"}', b'{"\xed\xbf\xbf":1}', b'["\xff"]'])
def test_half_a_surrogate_pair_is_no_text_without_an_escape_either(body: bytes) -> None:
    with pytest.raises(InputError, match="not JSON"):
        parse_json(body)
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
