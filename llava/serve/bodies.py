"""Bodies of requests as pydantic models, for all protocols: how they are checked, and what becomes of unknown fields.

In: the JSON of a request and its model. Out: the model, or an error that names the field. Types are strict. A field that no
model knows asks for nothing that this server does: it is accepted, logged, and named in the header `x-ignored-fields` of the
response, or refused where the server was started with --strict.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from llava.cli.program import closest
from llava.serve.http.errors import ApiError
from llava.serve.http.json_body import read_json
from llava.serve.http.request_record import note_header

logger = logging.getLogger("llava.serve")

IGNORED_HEADER = "x-ignored-fields"
MAX_NAMED = 20  # fields that the header and the log name
MAX_NAME = 80  # characters of each
MISSING = ("missing", "union_tag_not_found")


class Body(BaseModel):
    """A request, or a part of one."""

    model_config = ConfigDict(extra="allow", strict=True)


B = TypeVar("B", bound=Body)


async def read_body(request: Request, kind: type[B], *, strict: bool = False) -> B:
    """Return the body of a request as its model.

    Raises:
        InputError: it is no JSON.
        ApiError: it is not valid; or with `strict`, it has fields that are not known.
    """
    values = await read_json(request)
    try:
        body = kind.model_validate(values)
    except ValidationError as error:
        message, param = describe_error(error, values)
        raise ApiError(400, message, param=param) from None
    unknown = list(_unknown_fields(body, ""))
    if unknown and strict:
        name, known = unknown[0]
        hint = closest(name.rpartition(".")[2], known)
        raise ApiError(400, f"unknown field {_shown(name)!r}{hint}", param=_shown(name))
    if unknown:
        named = ", ".join(_shown(name) for name, _ in unknown[:MAX_NAMED])
        more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
        logger.info("%s: ignored fields: %s%s", request.url.path, named, more)
        note_header(IGNORED_HEADER, named + more)
    return body


def _unknown_fields(value: object, path: str) -> Iterator[tuple[str, Sequence[str]]]:
    """The names of fields in a body that its models do not have, each with those that stand beside it."""
    if isinstance(value, Body):
        fields = type(value).model_fields
        known = [field.alias or name for name, field in fields.items()]
        for name in value.model_extra or ():
            yield f"{path}.{name}".lstrip("."), known
        for name, field in fields.items():
            yield from _unknown_fields(getattr(value, name), f"{path}.{field.alias or name}")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _unknown_fields(one, f"{path}[{index}]")


def _shown(name: str) -> str:
    """A client's name, short and in printable ASCII."""
    short = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
    return short.encode("unicode_escape").decode()


def describe_error(error: ValidationError, body: object) -> tuple[str, str | None]:
    """Return what is wrong with a body, in one sentence, and the name of the field."""
    problems = [(_path(item, body), item) for item in error.errors(include_url=False, include_context=False)]
    # Of the alternatives of a union, the one that got furthest is the one that was meant; a wrong type says least.
    path, worst = max(problems, key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")))
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    message = worst["msg"][:1].lower() + worst["msg"][1:]
    if worst["type"] == "missing":
        return f"{_shown(name)} is missing", _shown(name)
    shown = _shown(name)
    return (f"{shown}: {message}" if name else f"the body is not valid: {message}"), shown or None


def _path(error: Any, body: object) -> list[int | str]:
    """Return the steps of an error's location that are in the body; pydantic adds names of types and of alternatives."""
    loc = error["loc"]
    found = _resolved(loc, body, is_missing=error["type"] in MISSING)
    return found if found is not None else [step for step in loc[:1] if isinstance(body, dict) and step in body]


def _resolved(loc: Sequence[int | str], value: Any, *, is_missing: bool) -> list[int | str] | None:
    """The steps into a body that a location describes, with as few left out as possible; None where it leads nowhere."""
    if not loc:
        return []
    step, rest = loc[0], loc[1:]
    if isinstance(value, dict) and is_missing and not rest and step not in value:
        return [step]
    is_inside = (isinstance(value, dict) and step in value) or (
        isinstance(value, list) and isinstance(step, int) and step < len(value)
    )
    if is_inside:
        below = _resolved(rest, value[step], is_missing=is_missing)
        if below is not None:
            return [step, *below]
    if isinstance(step, int) and isinstance(value, list):
        return None
    # The name of a type, or the last step of a location that ends at a value and names what it should have been.
    return _resolved(rest, value, is_missing=is_missing) if rest or not isinstance(value, dict) else None
