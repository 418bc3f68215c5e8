"""Score files of answers, without a model and without torch, and `llava eval score`, which does just that.

In: a task, a file or folder of answers, the data folder. Out: a `TaskReport`: figures at full precision, faults of the
answers, and each question's verdict. `llava eval TASKS` scores with the same functions.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava.cli.program import ArgumentParser
from llava.errors import InputError
from llava.eval.files import Faults
from llava.eval.tasks import find_task
from llava.eval.tasks.answers import pair, read_answers
from llava.eval.tasks.task import Task
from llava.eval.types import AnsweredQuestion, Figures, JsonRow, Question, Scores

DATA_DIR = "./playground/data/eval"


@dataclass(frozen=True)
class TaskReport:
    """A task's scores, and the answers they come from (none where a result file with its own references was scored)."""

    task: Task
    scores: Scores
    faults: Faults
    answered: Sequence[AnsweredQuestion] = field(default_factory=list)

    def as_dict(self) -> JsonRow:
        headline = {"name": self.task.headline, "value": self.scores.headline, "unit": self.task.unit}
        return {
            "task": self.task.name,
            "title": self.task.title,
            "headline": headline,
            "figures": dict(self.scores.figures),
            "categories": {name: dict(found) for name, found in self.scores.categories.items()},
            "notes": list(self.scores.notes),
            "faults": self.faults.as_dict(),
        }


def score_file(task: Task, answers: Path, data_dir: Path) -> TaskReport:
    """Score a file or folder of answers, in JSON lines or in the benchmark's own form.

    Raises:
        InputError: the file or the task's data is missing, or no answer belongs to the task.
    """
    if not answers.exists():
        raise InputError(f"there are no answers at {str(answers)!r}")
    home = task.home(data_dir)
    faults = Faults()
    if task.score_results is not None:
        scores = task.score_results(answers, home, faults)
        if scores is not None:
            return TaskReport(task, scores, faults)
    return score_questions(task, load_questions(task, data_dir), answers, faults)


def score_questions(task: Task, questions: Sequence[Question], path: Path, faults: Faults) -> TaskReport:
    """Score answers to questions that are read already."""
    answers = read_answers(path, faults)
    if task.fit_answers is not None:
        answers = task.fit_answers(answers, questions)
    answered = pair(questions, answers, faults, source=repr(str(path)))
    return TaskReport(task, task.score(answered), faults, answered)


def load_questions(task: Task, data_dir: Path) -> list[Question]:
    """Read a task's questions, or raise an `InputError` that says what is missing."""
    home = task.home(data_dir)
    if not home.is_dir():
        raise InputError(f"there is no data folder {str(data_dir)!r}; give the one with the benchmarks' folders in it")
    questions = task.read(home)
    if not questions:
        raise InputError(f"{task.title} has no questions in {str(home)!r}")
    return questions


def table(report: TaskReport) -> str:
    """Format a report for a terminal: the headline, the categories, and notes."""
    scores = report.scores
    lines = [report.task.title]
    if scores.headline is not None:
        lines.append(f"  {report.task.headline}: {scores.headline:.2f} {report.task.unit}".rstrip())
    lines += _columns({"": scores.figures}) if scores.figures else []
    lines += _columns(scores.categories) if scores.categories else []
    lines += [f"  note: {note}" for note in scores.notes]
    lines += [f"  warning: {sentence}" for sentence in report.faults.sentences()]
    return "\n".join(lines)


def _columns(rows: Mapping[str, Figures]) -> list[str]:
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    cells = [["", *names], *([row, *(shown(figures.get(name)) for name in names)] for row, figures in rows.items())]
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    return ["  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]


def shown(value: float | int | None) -> str:
    """Format a figure: counts whole, everything else with four digits after the point."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def add_data_dir(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(DATA_DIR),
        metavar="FOLDER",
        help=f"the folder with the benchmarks' folders in it (default: {DATA_DIR})",
    )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="llava eval score",
        description="Score answers that are there already. No model is loaded.",
        epilog="The answers may be JSON lines with question_id and text, or the benchmark's own result format.",
    )
    parser.add_argument("task", metavar="TASK", help="a task of `llava eval list`, or a file of your own")
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help="file or folder of answers")
    add_data_dir(parser)
    parser.add_argument("--json", action="store_true", help="print the figures at full precision as JSON")
    parser.add_argument("--strict", action="store_true", help="end with status 2 when any answer is missing or faulty")
    return parser


def run(args: Namespace) -> int:
    report = score_file(find_task(args.task), args.answers, args.data_dir)
    if args.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
    else:
        print(table(report))
    return 2 if args.strict and report.faults.kinds else 0
