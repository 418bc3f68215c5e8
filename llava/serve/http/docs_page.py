"""The page /docs: the OpenAPI document of a server as plain HTML, which needs no script and nothing from other sites.

In: the document. Out: HTML.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

STYLE = """
:root {color-scheme: light dark}
body {font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem}
h2 {margin-top: 2.5rem; border-bottom: 1px solid; padding-bottom: .2rem}
details {border: 1px solid #8886; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem}
summary {cursor: pointer}
code, pre {font: .9em ui-monospace, monospace}
.method {display: inline-block; min-width: 3.6rem; font-weight: bold}
.about {color: #777}
table {border-collapse: collapse; width: 100%; margin: .5rem 0; font-size: .92em}
th, td {text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-top: 1px solid #8884}
td:first-child, td:nth-child(2) {white-space: nowrap}
@media (max-width: 40rem) {td {display: block; border: 0; padding: 0} td:first-child {border-top: 1px solid #8884}}
"""
MAX_TYPE = 60  # characters of a type


def render_docs(document: dict[str, Any]) -> str:
    """Return the page. Its links are relative, so that it works under any prefix."""
    schemas = document.get("components", {}).get("schemas", {})
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            group = (operation.get("tags") or ["other"])[0]
            groups.setdefault(group, []).append(_operation(method.upper(), path, operation, schemas))
    title = escape(document["info"]["title"])
    routes = "\n".join(f"<h2>{escape(group)}</h2>\n" + "\n".join(parts) for group, parts in groups.items())
    bodies = "\n".join(_schema(name, schema) for name, schema in sorted(schemas.items()))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"<p>Version {escape(document['info']['version'])}. The same for programs: "
        f'<a href="openapi.json">openapi.json</a>. Where the server has API keys, send the header '
        f"<code>Authorization: Bearer KEY</code>.</p>\n{routes}\n<h2>Bodies</h2>\n{bodies}\n</body>\n</html>\n"
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    about = operation.get("description") or operation.get("summary") or ""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    parts = []
    if body:
        parts.append(f"<p>Body: {_type(body)}</p>")
        name = body.get("$ref", "").rpartition("/")[2]
        if name in schemas:
            parts.append(_fields(schemas[name]))
    rows = "".join(
        f"<tr><td>{escape(status)}</td><td>{_reply(response)}</td><td>{escape(response.get('description', ''))}</td></tr>"
        for status, response in operation.get("responses", {}).items()
    )
    parts.append(f"<table><tr><th>status</th><th>reply</th><th></th></tr>{rows}</table>")
    first = escape(about.partition("\n")[0])
    return (
        f'<details><summary><span class="method">{escape(method)}</span> <code>{escape(path)}</code> '
        f'<span class="about">{first}</span></summary>{"".join(parts)}</details>'
    )


def _reply(response: dict[str, Any]) -> str:
    shown = (content.get("schema", {}) for content in response.get("content", {}).values())
    return " or ".join(dict.fromkeys(_type(schema) for schema in shown if schema))


def _schema(name: str, schema: dict[str, Any]) -> str:
    about = escape(schema.get("description", "").partition("\n")[0])
    return (
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code> <span class="about">{about}</span></summary>'
        f"{_fields(schema)}</details>"
    )


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}</td><td>{_type(field)}</td>"
        f"<td>{escape(_about(field))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    if not rows:
        return f"<p><code>{_type(schema)}</code></p>"
    return f"<table><tr><th>field (* required)</th><th>type</th><th></th></tr>{rows}</table>"


def _about(field: dict[str, Any]) -> str:
    """What is said of a field: its description, its default, and its bounds."""
    parts = [field["description"]] if field.get("description") else []
    if field.get("default") is not None:
        parts.append(f"default {json.dumps(field['default'])}")
    bounds = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "maxItems": "at most",
        "maxLength": "at most",
    }
    for option in (field, *field.get("anyOf", ())):
        found = [f"{word} {option[key]:g}" for key, word in bounds.items() if isinstance(option.get(key), (int, float))]
        if found:
            parts.append(" ".join(found))
    return "; ".join(parts)


def _type(schema: dict[str, Any]) -> str:
    """A type in words, with a link where it has a name."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            names = [_type(option) for option in schema[key] if option.get("type") != "null"]
            return " or ".join(dict.fromkeys(names)) or "null"
    if "const" in schema or "enum" in schema:
        values = " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
        return escape(values if len(values) <= MAX_TYPE else values[:MAX_TYPE] + "...")
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any")))
