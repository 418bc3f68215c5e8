"""Read the fields of a record and remember which, so that what is not read can be said.

In: an object of a data file. Out: `Fields`: values by one of several names, JSON in a text parsed, and the names that nobody
asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping

from llava.errors import InputError, shortened

# What a record is called. Nobody expects it to be trained.
ID_NAMES = ("id", "question_id", "sample_id", "idx", "uid", "index")


class Fields:
    """The fields of one object; a field without a value (None, "", [], {}) is as absent."""

    def __init__(self, record: Mapping[str, object]) -> None:
        self.record = record
        self._read: set[str] = set()

    def has(self, *names: str) -> bool:
        """Whether one of these fields has a value; it is not read by that."""
        return any(not is_nothing(self.record.get(name)) for name in names)

    def first(self, *names: str) -> object:
        """The value of the first of these fields that has one, or None. All of them count as read if they are equal."""
        found = next((self.record[name] for name in names if self.has(name)), None)
        self._read.update(name for name in names if self.record.get(name) == found)
        return found

    def given(self, *names: str) -> object:
        """The same, with values that are nothing elsewhere: an answer may be an empty text."""
        name = next((name for name in names if self.record.get(name) is not None), None)
        self._read.update(names if name is None else [name])
        return None if name is None else self.record[name]

    def text(self, *names: str) -> str:
        """A text, or "" without one. A number is taken as its digits.

        Raises:
            InputError: the value is something else.
        """
        found = self.first(*names)
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            return str(found)
        if found is not None and not isinstance(found, str):
            name = next(name for name in names if self.has(name))
            raise InputError(f"{name!r} is {shortened(repr(found), 60)} where a text is expected")
        return found or ""

    def parsed(self, *names: str) -> object:
        """The first value; a text that is JSON, as columns of tables hold it, is parsed."""
        found = self.first(*names)
        if not isinstance(found, str) or not found.lstrip().startswith(("[", "{")):
            return found
        return parse_json(found, names[0])

    def unread(self, ignored: Collection[str] = ()) -> Iterator[str]:
        """The names of fields that have a value and were not asked for."""
        for name, value in self.record.items():
            if name not in self._read and name not in ignored and not is_nothing(value):
                yield str(name)


def parse_json(text: str, name: str) -> object:
    """Parse JSON that stands in a text; the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{name!r} holds JSON that is nested too deep") from error
    except ValueError:
        return text


def is_nothing(value: object) -> bool:
    """Whether a field with this value is as absent."""
    return value is None or (isinstance(value, (str, bytes, list, dict)) and not value)
