"""One JSON file of a model folder: an object, or one sentence that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava.errors import InputError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} must hold a JSON object, found {type(values).__name__}")
    return values
