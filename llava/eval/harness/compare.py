"""`llava eval compare A B`: which answers of two runs differ, and whether the difference in score is significant.

In: the folders of two runs. Out: for every task in both, the scores, the questions that only one got right, and a
p-value: McNemar's exact test where answers are right or wrong, else a bootstrap over questions.
"""

from __future__ import annotations

import json
import math
import random
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llava.cli.program import ArgumentParser, add_number
from llava.errors import InputError
from llava.eval.harness.manifest import differences
from llava.eval.harness.results import read_results, read_verdicts
from llava.eval.types import JsonRow

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class TaskComparison:
    """Two runs on one task. Means are of the questions that both answered, in percent."""

    task: str
    questions: int
    only_in_one: int
    changed: int  # answers with another text
    first: float
    second: float
    gained: list[str]  # questions that the second scores higher on
    lost: list[str]
    test: str
    p_value: float
    low: float  # of the difference in percent, 95 %
    high: float


def build_parser() -> ArgumentParser:
    about = "Which answers of two runs differ, and whether it matters."
    parser = ArgumentParser(prog="llava eval compare", description=about)
    parser.add_argument("first", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("second", type=Path, metavar="B", help="folder of another")
    add_number(parser, "--show", 5, "N", "changed verdicts to print for each task")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def run(args: Namespace) -> None:
    first, second = read_results(args.first), read_results(args.second)
    names = [task["task"] for task in first["tasks"] if task["task"] in {other["task"] for other in second["tasks"]}]
    if not names:
        raise InputError(f"{str(args.first)!r} and {str(args.second)!r} have no task in common")
    settings = differences(first["manifest"]["settings"], second["manifest"]["settings"])
    found = [compare_task(name, args.first, args.second) for name in names]
    if args.json:
        print(json.dumps({"settings": settings, "tasks": [asdict(one) for one in found]}, indent=2))
        return
    print("settings: " + ("the same" if not settings else "; ".join(settings)))
    for one in found:
        verdict = "significant" if one.p_value < 0.05 else "not significant"
        print(
            f"\n{one.task}: {one.first:.2f} and {one.second:.2f} of 100 over {one.questions} questions; difference "
            f"{one.second - one.first:+.2f} ({one.low:+.2f} to {one.high:+.2f}), p = {one.p_value:.4f} by {one.test}: {verdict}"
        )
        print(f"  {one.changed} answers changed, {len(one.gained)} scored higher, {len(one.lost)} lower")
        if one.only_in_one:
            print(f"  {one.only_in_one} questions are in one run only and are left out")
        for sign, names in (("+", one.gained), ("-", one.lost)):
            for name in names[: args.show]:
                print(f"  {sign} {name}")


def compare_task(task: str, first: Path, second: Path) -> TaskComparison:
    a, b = (_by_question(read_verdicts(folder, task)) for folder in (first, second))
    shared = [key for key in a if key in b and a[key]["score"] is not None and b[key]["score"] is not None]
    if not shared:
        raise InputError(f"the runs have no judged question of {task!r} in common")
    scores = [(a[key]["score"], b[key]["score"]) for key in shared]
    steps = [after - before for before, after in scores]
    low, high = bootstrap_interval(steps)
    binary = all(score in (0.0, 1.0) for pair in scores for score in pair)
    gained = [key for key, step in zip(shared, steps, strict=True) if step > 0]
    lost = [key for key, step in zip(shared, steps, strict=True) if step < 0]
    return TaskComparison(
        task,
        len(shared),
        len(a.keys() ^ b.keys()),
        sum(a[key]["text"] != b[key]["text"] for key in shared),
        100 * sum(before for before, _ in scores) / len(scores),
        100 * sum(after for _, after in scores) / len(scores),
        [_change(a[key], b[key]) for key in gained],
        [_change(a[key], b[key]) for key in lost],
        "McNemar's exact test" if binary else "bootstrap",
        mcnemar(len(gained), len(lost)) if binary else bootstrap_p_value(steps),
        100 * low,
        100 * high,
    )


def _by_question(rows: Sequence[JsonRow]) -> dict[tuple[str, str, int], JsonRow]:
    return {(str(row["question_id"]), row["prompt"], row["round_id"]): row for row in rows}


def _change(before: JsonRow, after: JsonRow) -> str:
    question = before["prompt"].split("\n")[0]
    return f"{before['question_id']}: {question!r} was answered {before['text']!r}, now {after['text']!r}"


def mcnemar(gained: int, lost: int) -> float:
    """Return the p-value of McNemar's exact test (two-sided), from how many questions only one of two runs has right."""
    total = gained + lost
    tail = sum(math.comb(total, number) for number in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def _resampled_means(steps: Sequence[float]) -> list[float]:
    generator = random.Random(0)
    # Fewer for large tasks, where means vary little, so that it takes some seconds at most.
    num_resamples = max(1000, min(NUM_RESAMPLES, 20_000_000 // len(steps)))
    return sorted(sum(generator.choices(steps, k=len(steps))) / len(steps) for _ in range(num_resamples))


def bootstrap_interval(steps: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference, by resampling the questions."""
    if len(set(steps)) == 1:
        return steps[0], steps[0]
    means = _resampled_means(steps)
    return means[round(0.025 * (len(means) - 1))], means[round(0.975 * (len(means) - 1))]


def bootstrap_p_value(steps: Sequence[float]) -> float:
    """Return twice the share of samples whose mean is on the other side of 0."""
    if not any(steps):
        return 1.0
    means = _resampled_means(steps)
    below, above = sum(mean <= 0 for mean in means), sum(mean >= 0 for mean in means)
    return min(1.0, 2 * max(1, min(below, above)) / len(means))
