"""Compare the pages of docs/ with their Chinese translations, and warn where one has a heading more than the other.

`make lint` runs it. A missing translation is a warning that names both files and the heading after which they part; it does
not fail, so that a change in one language can land first. Code, tables and references are compared by tests.
"""

from __future__ import annotations

import re
import sys
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    for english in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if ".zh-CN." not in english.name and english.is_file():
            chinese = english.with_suffix(".zh-CN.md")
            if chinese.is_file() and (difference := compare(english.read_text("utf-8"), chinese.read_text("utf-8"))):
                print(f"warning: {name(english)} and {name(chinese)} differ {difference}")
    return 0


def compare(english: str, chinese: str) -> str | None:
    """Say where the headings of two pages part, or None where their levels agree."""
    pairs = zip_longest(headings(english), headings(chinese))
    last = "at the beginning"
    for first, second in pairs:
        if first is None or second is None or first[0] != second[0]:
            shown = " and ".join(repr(heading[1]) if heading else "no heading" for heading in (first, second))
            return f"{last}: {shown}"
        last = f"after {first[1]!r}"
    return None


def headings(page: str) -> list[tuple[int, str]]:
    """Return level and text of every heading outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return [(len(marks), text) for marks, text in re.findall(r"^(#+) (.+)$", prose, flags=re.MULTILINE)]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
