"""JSON schemas as answers are held to them.

In: a schema from a client. Out: the same, closed: objects have no properties but the listed ones, unless the schema says that
they may. Clients make schemas so, Ollama reads them so, and other properties would keep a small model from an end. What obeys
the closed schema obeys the open one.
"""

from __future__ import annotations

from typing import Any

# Where a schema has schemas inside. Those of allOf describe one object together, so that none may close it.
SCHEMAS_BY_NAME = {"properties", "$defs", "definitions"}
SCHEMA_LISTS = {"anyOf", "oneOf", "prefixItems"}
CLOSED_BY = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf"}


def closed(schema: object) -> Any:
    """Return a schema whose objects are closed."""
    if not isinstance(schema, dict):
        return schema
    copy = dict(schema)
    for key in SCHEMAS_BY_NAME & copy.keys():
        if isinstance(copy[key], dict):
            copy[key] = {name: closed(value) for name, value in copy[key].items()}
    for key in SCHEMA_LISTS & copy.keys():
        if isinstance(copy[key], list):
            copy[key] = [closed(value) for value in copy[key]]
    if "items" in copy:
        copy["items"] = closed(copy["items"])
    if copy.get("properties") and not CLOSED_BY & copy.keys():
        copy["additionalProperties"] = False
    return copy
