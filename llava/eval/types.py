"""What evaluation is about, as values: a question, an answer given to it, and the scores of many.

In and out: nothing is read or computed here, and nothing heavy imported. Readers (tasks/) make `Question`s,
eval/tasks/answers.py pairs them with answers, metrics/ and tasks/ turn pairs into `Scores`, eval/harness/runner.py
asks a model, eval/harness/report.py shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

QuestionId = str | int


class QuestionKey(NamedTuple):
    """What tells the questions of a task apart. Some benchmarks use an id for several; then the prompt tells, or the round."""

    id: str
    prompt: str = ""
    round: int = 0


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: QuestionId
    prompt: str  # put to the model; with `<image>` marks only where images do not simply come first
    images: tuple[Path | bytes, ...] = ()  # files, or their content where the benchmark's file holds it
    category: str = ""
    answer: Any = None  # the reference, in the form that the task's scorer takes; None where only a server knows it
    options: tuple[str, ...] = ()  # the choices of a multiple choice question, in the order of their letters
    round: int = 0  # for questions that are asked again with their options in another order
    shown_prompt: str | None = None  # what the answer's row has as its prompt, where that is not `prompt`
    extra: Mapping[str, Any] = field(default_factory=dict)  # what only this task's scorer and writer know

    @property
    def row_prompt(self) -> str:
        return self.prompt if self.shown_prompt is None else self.shown_prompt


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the text that answers it; None when there is no answer, which always counts as wrong."""

    question: Question
    text: str | None


@dataclass(frozen=True)
class Scores:
    """What a task's scorer found. Figures are in the benchmark's own scale, at full precision."""

    figures: Mapping[str, float | int]
    categories: Mapping[str, Mapping[str, float | int]] = field(default_factory=dict)
    verdicts: Sequence[float | None] = ()  # for each question 0 to 1; None: not judged here
    headline: float | None = None  # the figure that papers print; None where a server or a judge has the last word
    notes: tuple[str, ...] = ()  # what a reader of the figures must know, a sentence each


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 where there is nothing to divide by; whoever divides also counts."""
    return part / whole if whole else 0.0
