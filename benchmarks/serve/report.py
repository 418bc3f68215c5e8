"""The result of one part of load.py, as a Markdown table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import table


@dataclass
class PartReport:
    heading: str
    rows: Sequence[tuple[Any, ...]]
    failures: Sequence[str]
    columns: tuple[str, ...] = ("", "")

    def table(self) -> str:
        return f"## {self.heading}\n\n{table(self.columns, self.rows)}"

    def show(self) -> None:
        print("\n" + self.table())
        for failure in self.failures:
            print(f"\nFAILED: {failure}")
        sys.stdout.flush()
