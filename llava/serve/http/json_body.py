"""JSON bodies of requests: measured before they are parsed, then parsed.

In: the bytes of a body. Out: a JSON value, or `InputError`. A byte of JSON can become a hundred bytes of objects, so the number
of values and their depth are bounded first, by a scan that builds nothing and stops at the bound.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import NoReturn

from starlette.requests import Request

from llava.errors import InputError

MAX_DEPTH = 100
MAX_VALUES = 200_000  # of all lists and objects together; token ids of a prompt are some thousands
LARGE_BODY = 2**20  # bytes; a larger one is parsed in a thread
# Strings are skipped as a whole; one without an end takes the rest of the body.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)|[][{},]', re.DOTALL)


async def read_json(request: Request) -> object:
    """Parse the body as JSON, whatever the Content-Type: the original's servers ignored it too."""
    body = await request.body()
    return await asyncio.to_thread(parse_json, body) if len(body) > LARGE_BODY else parse_json(body)


def parse_json(body: bytes) -> object:
    """Return the value of a body.

    Raises:
        InputError: it is no JSON, nested too deeply, has too many values, or a number that is not finite.
    """
    _check_size(body)
    try:
        # As text: of bytes, json.loads guesses other encodings, in which a quote for `_check_size` is none, and takes halves of
        # surrogate pairs.
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in body:  # an escape may be half of a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"the body is not JSON: {reason}") from None


def _check_size(body: bytes) -> None:
    num_open = body.count(b"[") + body.count(b"{")
    if num_open <= MAX_DEPTH and num_open + body.count(b",") <= MAX_VALUES:  # brackets in strings included
        return
    depth = num_values = 0
    for found in _STRUCTURE.finditer(body):
        mark = found[0][:1]
        if mark in b"[{":
            depth += 1
            num_values += 1
            if depth > MAX_DEPTH:
                raise InputError(f"the body is nested more than {MAX_DEPTH} levels deep; this server takes no more")
        elif mark in b"]}":
            depth -= 1
        elif mark == b",":
            num_values += 1
        if num_values > MAX_VALUES:
            raise InputError(f"the body has more than {MAX_VALUES:,} values; this server takes no more")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number
