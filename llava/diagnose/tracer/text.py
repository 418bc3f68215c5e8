"""Render a trace as text for a terminal: every point in the order in which data flows, its checks, and timing.

In: a trace, and the terminal's colours and width. Out: text.
"""

from __future__ import annotations

import shutil
import textwrap

from llava.cli.colors import Colors
from llava.diagnose.tracer.record import Observation, Row, Stage, Trace

LABEL = 16
LONGEST = 1500  # characters of one row; the page and --json show all
BAR = 36


def as_text(record: Trace, colors: Colors, *, blocks: bool = True, width: int | None = None) -> str:
    width = width or text_width()
    lines: list[str] = []
    for number, obs in enumerate(record, 1):
        lines += ["", *_point(number, obs, record.stages, colors, blocks=blocks, width=width)]
    failed = record.failed
    checks = sum(row.tone in ("good", "bad") for obs in record for row in obs.rows)
    lines.append("")
    if failed:
        lines.append(colors(f"{len(failed)} of {checks} checks do not hold:", "red", "bold"))
        lines += [f"  {point}: {text}" for point, text in failed]
    else:
        lines.append(colors(f"all {checks} checks hold", "green"))
    return "\n".join(lines[1:])


def text_width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def _point(
    number: int, obs: Observation, stages: list[Stage], colors: Colors, *, blocks: bool, width: int
) -> list[str]:
    lines = [f"{colors(f'{number:>2} {obs.point}', 'bold', 'cyan')}  {obs.title}  {colors(obs.where, 'dim')}"]
    rows = obs.rows
    if obs.point == "cost":
        lines += _waterfall(stages, colors, blocks=blocks)
        rows = [row for row in rows if row.label == "memory"]
    return lines + show_rows(rows, colors, blocks, width)


def show_rows(rows: list[Row], colors: Colors, blocks: bool, width: int) -> list[str]:
    """Format rows, labels on the left, checks with a tick or a cross."""
    lines = []
    for row in rows:
        head = f"  {row.label:>{LABEL}}  "
        if row.tone in ("good", "bad"):
            mark = ("✓" if blocks else "ok") if row.tone == "good" else ("✗" if blocks else "NOT")
            colour = "green" if row.tone == "good" else "red"
            text = row.text if row.tone == "good" else colors(row.text, colour)
            lines.append(colors(head, "dim") + colors(f"{mark} ", colour) + text)
            continue
        text = row.text if len(row.text) <= LONGEST else row.text[:LONGEST] + " ..."
        if row.spans and colors.enabled:
            text = "".join(colors(part, "bold", "green") if marked else part for part, marked in row.spans)
            lines.append(colors(head, "dim") + text)
            continue
        # Line breaks of a prompt are kept; each line is wrapped by itself.
        wrapped = [part for line in text.split("\n") for part in _wrap(line, width - len(head))]
        lines.append(colors(head, "dim") + wrapped[0])
        lines += [" " * len(head) + part for part in wrapped[1:]]
    return lines


def _wrap(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, max(width, 40), break_long_words=False, break_on_hyphens=False) or [""]


def _waterfall(stages: list[Stage], colors: Colors, *, blocks: bool) -> list[str]:
    """Draw a bar for each stage, at the time when it ran."""
    if not stages:
        return []
    begin, end = min(stage.start for stage in stages), max(stage.start + stage.seconds for stage in stages)
    whole = max(end - begin, 1e-9)
    block = "█" if blocks else "#"
    names: dict[str, list[Stage]] = {}
    for stage in stages:
        names.setdefault(stage.name, []).append(stage)
    width = max(map(len, names)) + 5
    lines = []
    for name, own in names.items():
        cells = [" "] * BAR
        for stage in own:
            first = int((stage.start - begin) / whole * BAR)
            last = int((stage.start + stage.seconds - begin) / whole * BAR)
            for cell in range(min(first, BAR - 1), min(max(last, first + 1), BAR)):
                cells[cell] = block
        count = f" ({len(own)})" if len(own) > 1 else ""
        seconds = sum(stage.seconds for stage in own)
        lines.append(f"  {name + count:>{width}}  {colors(''.join(cells), 'yellow')}  {seconds * 1000:9.1f} ms")
    return lines
