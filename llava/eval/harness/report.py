"""Write the HTML report of a run: scores beside published ones, a radar plot, bars, and answers with their images.

In: a run's folder. Out: report.html, which needs no other file and no network. The template is eval/webpage/report.html, the
charts are from charts.py.
"""

from __future__ import annotations

import base64
import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.eval.harness.charts import bars, radar
from llava.eval.harness.reference_scores import SOURCES, reference_scores
from llava.eval.harness.results import read_results, read_verdicts, remarks
from llava.eval.tasks import TASKS
from llava.eval.tasks.task import LETTER_SUFFIX, LETTER_SUFFIX_CN, WORD_SUFFIX
from llava.eval.types import JsonRow
from llava.files import script_json

PAGE = Path(__file__).resolve().parents[1] / "webpage" / "report.html"
NUM_WRONG, NUM_RIGHT = 36, 24  # answers of each task that the gallery shows
THUMBNAIL = 176
COMPARED = ("1.5-7B", "1.5-13B", "1.6-Vicuna-7B")
MAX_BARS = 40
# The figure of a category that its bar shows: the first of these that it has.
BAR_FIGURES = ("f1", "accuracy", "score", "relative", "spearman")
SUFFIXES = (WORD_SUFFIX, LETTER_SUFFIX, LETTER_SUFFIX_CN)
SHARES = ("f1", "spearman", "accuracy")  # figures that may be given as a share of 1


def write_report(folder: Path, results: JsonRow) -> Path:
    """Make report.html from the results and verdicts in a run's folder."""
    images = _Thumbnails()
    gallery = [card for task in results["tasks"] for card in gallery_cards(folder, task, images)]
    page = PAGE.read_text(encoding="utf-8")
    data = script_json({"cards": gallery, "images": images.urls})
    parts = {
        "TITLE": escape(f"{results['model']}: evaluation"),
        "MODEL": escape(str(results["model"])),
        "ABOUT": about(results["manifest"]),
        "SUMMARY": summary(results["tasks"], str(results["model"])),
        "RADAR": overview(results["tasks"], str(results["model"])),
        "TASKS": "".join(section(task) for task in results["tasks"]),
        "DATA": data,
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file


def about(manifest: JsonRow) -> str:
    settings = manifest["settings"]
    rows = {
        "template": manifest.get("template") or settings["model"]["conv_mode"],
        "sampling": ", ".join(f"{name} {value}" for name, value in settings["sampling"].items() if value is not None),
        "model hash": settings["model"]["hash"][:16],
        "versions": ", ".join(f"{name} {value}" for name, value in manifest["versions"].items()),
        "revision": manifest.get("git_revision") or "not in a repository",
        "date": manifest["date"],
    }
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items())
    return f"<dl>{cells}</dl>"


def summary(tasks: Sequence[JsonRow], model: str) -> str:
    """Format the headline figures beside published ones."""
    has_published = any(reference_scores(task["task"]) for task in tasks)
    others = COMPARED if has_published else ()
    head = "".join(f"<th>LLaVA-{escape(name)}</th>" for name in others)
    rows = []
    for task in tasks:
        headline, known = task["headline"], reference_scores(task["task"])
        own = "see below" if headline["value"] is None else f"{headline['value']:.2f}"
        cells = "".join(f"<td>{known[name]:g}</td>" if name in known else "<td></td>" for name in others)
        what = escape(f"{headline['name']}, {headline['unit']}")
        rows.append(
            f'<tr><th><a href="#{escape(task["task"])}">{escape(task["title"])}</a></th><td class="what">{what}</td>'
            f'<td class="own">{own}</td>{cells}</tr>'
        )
    sources = "".join(f"<li>{escape(name)}: {escape(text)}</li>" for name, text in SOURCES.items())
    note = f"<details><summary>Sources of the published figures</summary><ul>{sources}</ul></details>" if others else ""
    head = f'<tr><th></th><th class="what">figure</th><th>{escape(model)}</th>{head}</tr>'
    table = f"<table>{head}{''.join(rows)}</table>"
    return table + note


def overview(tasks: Sequence[JsonRow], model: str) -> str:
    """Draw a radar plot of three tasks or more, bars of fewer."""
    scored = [task for task in tasks if task["headline"]["value"] is not None]
    highest = {task["task"]: TASKS[task["task"]].highest if task["task"] in TASKS else 100.0 for task in scored}
    if len(scored) < 3:
        each = ((task["title"], task["headline"]["value"], highest[task["task"]]) for task in scored)
        return "".join(bars({title: value}, highest=top) for title, value, top in each)
    series: dict[str, list[float | None]] = {model: [_share(task, highest) for task in scored]}
    for name in COMPARED:
        values = [reference_scores(task["task"]).get(name) for task in scored]
        if sum(value is not None for value in values) >= 3:
            pairs = zip(values, [highest[task["task"]] for task in scored], strict=True)
            series[f"LLaVA-{name}"] = [None if value is None else value / top for value, top in pairs]
    return radar([task["title"] for task in scored], series)


def _share(task: JsonRow, highest: Mapping[str, float]) -> float:
    return max(0.0, min(1.0, task["headline"]["value"] / highest[task["task"]]))


def section(task: JsonRow) -> str:
    """Format one task: its figures, its categories as bars, and its notes."""
    headline = task["headline"]
    value = "" if headline["value"] is None else f'<span class="headline">{headline["value"]:.2f}</span>'
    figures = "".join(
        f"<dt>{escape(name)}</dt><dd>{value if isinstance(value, int) else f'{value:.4f}'}</dd>"
        for name, value in task["figures"].items()
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in remarks(task))
    return (
        f'<section id="{escape(task["task"])}"><h2>{escape(task["title"])} {value}</h2>'
        f'<dl class="figures">{figures}</dl>{category_bars(task["categories"])}'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</section>"
    )


def category_bars(categories: Mapping[str, Mapping[str, float]]) -> str:
    first = next(iter(categories.values()), {})
    figure = next((name for name in BAR_FIGURES if name in first), None)
    if figure is None:
        return ""
    values = {name: found[figure] for name, found in list(categories.items())[:MAX_BARS] if figure in found}
    largest = max(values.values(), default=0.0)
    highest = 1.0 if largest <= 1.0 and figure in SHARES else 200.0 if "accuracy_plus" in first else max(100.0, largest)
    return f"<h3>{escape(figure)} by category</h3>{bars(values, highest=highest)}"


def gallery_cards(folder: Path, task: JsonRow, images: _Thumbnails) -> list[JsonRow]:
    """Choose some wrong and some right answers of a task, spread evenly over it."""
    rows = [row for row in read_verdicts(folder, task["task"]) if row["score"] is not None]
    wrong, right = ([row for row in rows if (row["score"] >= 1) is good] for good in (False, True))
    chosen = [*_spread(wrong, NUM_WRONG), *_spread(right, NUM_RIGHT)]
    return [
        {
            "task": task["task"],
            "title": task["title"],
            "category": row["category"],
            "id": str(row["question_id"]),
            "question": _question(row["prompt"]),
            "reference": _reference(row),
            "answer": row["text"],
            "score": row["score"],
            "images": [number for source in row["images"][:4] if (number := images.number(source)) is not None],
        }
        for row in chosen
    ]


def _question(prompt: str) -> str:
    """Return a prompt without the last line that asks for a short answer, which is the same in every card."""
    for suffix in SUFFIXES:
        prompt = prompt.removesuffix(suffix).rstrip()
    return prompt


def _reference(row: JsonRow) -> str:
    """Return the right answer in words; of several answers the most frequent ones."""
    reference, options = row["reference"], row["options"]
    if isinstance(reference, int) and options:
        return str(options[reference])
    if isinstance(reference, list):
        counts = {text: reference.count(text) for text in dict.fromkeys(reference)}
        return ", ".join(sorted(counts, key=lambda text: -counts[text])[:3])
    return "" if reference is None else str(reference)


def _spread(rows: Sequence[JsonRow], count: int) -> list[JsonRow]:
    return [rows[len(rows) * number // count] for number in range(count)] if len(rows) > count else list(rows)


class _Thumbnails:
    """Small copies of images as data: URLs, each once."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self._numbers: dict[str, int | None] = {}

    def number(self, source: str | None) -> int | None:
        if source is None:
            return None
        if source not in self._numbers:
            url = _thumbnail(Path(source))
            self._numbers[source] = None if url is None else len(self.urls)
            self.urls += [] if url is None else [url]
        return self._numbers[source]


def _thumbnail(file: Path) -> str | None:
    from llava.images.io import load_image

    try:
        image = load_image(file)
    except InputError:
        return None  # the card says that there is no image; the run counted it where it mattered
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="llava eval report", description="Write the HTML report of a finished run again.")
    parser.add_argument("run", type=Path, metavar="FOLDER", help="the run's folder")
    return parser


def run(args: Namespace) -> None:
    print(write_report(args.run, read_results(args.run)))
