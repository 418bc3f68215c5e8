"""Questions, answers and scores of benchmarks, as values.

The modules of eval/tasks/ read `Question`s, eval/tasks/answers.py pairs them with answers, and a task's scorer turns the pairs
into `Scores`. Nothing is read or computed here, and nothing heavy imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

QuestionId = str | int
JsonRow = dict[str, Any]  # an object of a benchmark's file; its fields are the benchmark's
Figures = Mapping[str, float | int]


class QuestionKey(NamedTuple):
    """Tells the questions of a task apart. Where several share an id, the prompt or the round differs."""

    id: str
    prompt: str = ""
    round: int = 0


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: QuestionId
    prompt: str  # put to the model; with `<image>` only where images do not simply come first
    images: tuple[Path | bytes, ...] = ()  # files, or their content where the benchmark's file holds it
    category: str = ""
    answer: str | int | Sequence[str] | None = (
        None  # the reference, as the scorer takes it; None: only a server knows it
    )
    options: tuple[str, ...] = ()  # the choices of a multiple choice question, in the order of their letters
    round: int = 0  # for questions that are asked again with their options in another order
    shown_prompt: str | None = None  # the prompt in the answer's row, where that is not `prompt`
    extra: Mapping[str, Any] = field(default_factory=dict)  # what only this task's scorer and writer use

    @property
    def row_prompt(self) -> str:
        """The prompt as the answer's row has it."""
        return self.prompt if self.shown_prompt is None else self.shown_prompt

    @property
    def bare_prompt(self) -> str:
        """The prompt without options and without a request for a form of answer, where the task keeps it apart."""
        return str(self.extra.get("question", self.prompt))

    @property
    def reference(self) -> str:
        """The right answer of a task whose questions have one each, as text."""
        assert isinstance(self.answer, str)
        return self.answer

    @property
    def references(self) -> Sequence[str]:
        """The right answers of a task whose questions may have several."""
        assert not isinstance(self.answer, int)
        return (self.answer,) if isinstance(self.answer, str) else self.answer or ()


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the text that answers it; None where there is no answer, which always counts as wrong."""

    question: Question
    text: str | None


@dataclass(frozen=True)
class Scores:
    """The result of a task's scorer. Figures are in the benchmark's own scale, at full precision."""

    figures: Figures
    categories: Mapping[str, Figures] = field(default_factory=dict)
    verdicts: Sequence[float | None] = ()  # of each question, from 0 to 1; None: not judged here
    headline: float | None = None  # the figure that papers print; None where it comes from a server or a judge
    notes: tuple[str, ...] = ()  # what a reader of the figures must know, a sentence each


def ratio(part: float, whole: float) -> float:
    """Divide, with 0 for a division by zero; the caller counts those."""
    return part / whole if whole else 0.0
