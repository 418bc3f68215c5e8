"""Write and read a run's results: results.json, a Markdown table beside published figures, verdicts for comparison.

In: the reports of all tasks, and the manifest. Out: files in the run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import FaultCount, read_json_lines, read_json_object, write_json, write_json_lines
from llava.eval.harness.reference_scores import MODELS, SOURCES, reference_scores
from llava.eval.harness.scoring import TaskReport, shown
from llava.eval.types import AnsweredQuestion, Figures, JsonRow

RESULTS, MANIFEST, TABLE, VERDICTS = "results.json", "manifest.json", "results.md", "verdicts.jsonl"


def write_results(folder: Path, reports: Sequence[TaskReport], manifest: JsonRow) -> JsonRow:
    """Write results.json, results.md and every task's verdicts; return the results without the manifest."""
    results = {"model": manifest["settings"]["model"]["name"], "tasks": [report.as_dict() for report in reports]}
    write_json(folder / RESULTS, results | {"manifest": dict(manifest)})
    for report in reports:
        write_json_lines(
            folder / report.task.name / VERDICTS,
            [verdict_row(one, score) for one, score in zip(report.answered, report.scores.verdicts, strict=True)],
        )
    (folder / TABLE).write_text(markdown(results["tasks"], str(results["model"])), encoding="utf-8")
    return results


def verdict_row(one: AnsweredQuestion, score: float | None) -> JsonRow:
    """Return a question with its answer and verdict, and all that a comparison or the gallery shows."""
    question = one.question
    images = [str(image.resolve()) if isinstance(image, Path) else None for image in question.images]
    return {
        "question_id": question.id,
        "round_id": question.round,
        "category": question.category,
        "prompt": question.prompt,
        "images": images,
        "reference": question.answer,
        "options": list(question.options),
        "text": one.text,
        "score": score,
    }


def markdown(tasks: Sequence[JsonRow], model: str) -> str:
    """Format headline figures beside published ones, then each task's categories, as Markdown."""
    lines = [f"| task | figure | {model} | {' | '.join(MODELS)} |", "|---|---|---:" + "|---:" * len(MODELS) + "|"]
    for task in tasks:
        others = reference_scores(task["task"])
        headline = task["headline"]
        own = "see notes" if headline["value"] is None else f"{headline['value']:.2f}"
        cells = [task["title"], f"{headline['name']}, {headline['unit']}", own]
        cells += [f"{others[name]:g}" if name in others else "" for name in MODELS]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Published figures are of LLaVA with the size named, from:", ""]
    lines += [f"- {name}: {source}" for name, source in SOURCES.items()]
    for task in tasks:
        lines += ["", f"## {task['title']}", ""]
        lines += _figures({"all": task["figures"]})
        if task["categories"]:
            lines += ["", *_figures(task["categories"])]
        notes = remarks(task)
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def remarks(task: JsonRow) -> list[str]:
    """Return the notes and the counted faults of a task of results.json, a sentence each."""
    faults = (FaultCount(**fault).sentence(kind) for kind, fault in task["faults"].items())
    return [*task["notes"], *faults]


def _figures(rows: Mapping[str, Figures]) -> list[str]:
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    lines = [f"| | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    return lines + [
        f"| {row} | {' | '.join(shown(figures.get(name)) for name in names)} |" for row, figures in rows.items()
    ]


def read_results(folder: Path) -> JsonRow:
    if not (folder / RESULTS).is_file():
        raise InputError(f"{str(folder)!r} has no {RESULTS}; give the folder of a run that `llava eval` finished")
    return read_json_object(folder / RESULTS, "file of results")


def read_verdicts(folder: Path, task: str) -> list[JsonRow]:
    file = folder / task / VERDICTS
    return read_json_lines(file, "file of verdicts") if file.is_file() else []
