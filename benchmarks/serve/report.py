"""What one part of benchmarks/serve/load.py found, as a Markdown table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Part:
    heading: str
    rows: Sequence[tuple[Any, ...]]
    broken: Sequence[str]
    columns: tuple[str, ...] = ("", "")

    def table(self) -> str:
        head = ["| " + " | ".join(self.columns) + " |", "| --- |" + " ---: |" * (len(self.columns) - 1)]
        return "\n".join(
            [f"## {self.heading}", "", *head, *("| " + " | ".join(map(str, row)) + " |" for row in self.rows)]
        )

    def show(self) -> None:
        print("\n" + self.table())
        for promise in self.broken:
            print(f"\nBROKEN: {promise}")
        sys.stdout.flush()
