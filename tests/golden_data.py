"""Where recorded behaviour of the original software lies, for tests.

`golden(rel)` is a path inside the copy kept beside the tests. Some recordings are too large, or not ours to pass on, and
are absent there: `require_golden(rel)` finds them in the folder that the environment variable LLAVA_GOLDEN names, and
skips the test, saying so, where that is not set.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "golden"


def golden(rel: str) -> Path:
    """Path of a recording: the copy beside the tests, or else the one in the LLAVA_GOLDEN folder."""
    local = HERE / rel
    full = os.environ.get("LLAVA_GOLDEN")
    return local if local.exists() or not full else Path(full) / rel


def require_golden(rel: str) -> Path:
    """The same, skipping the test where the recording is in neither place."""
    path = golden(rel)
    if not path.exists():
        pytest.skip(f"{rel} is not among the recordings kept here; set LLAVA_GOLDEN to the folder that holds it")
    return path


def fullest(rel: str) -> Path:
    """The complete recording in the LLAVA_GOLDEN folder where there is one, else the trimmed copy kept here."""
    full = Path(os.environ["LLAVA_GOLDEN"]) / rel if os.environ.get("LLAVA_GOLDEN") else None
    return full if full is not None and full.exists() else HERE / rel
