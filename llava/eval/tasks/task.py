"""Define `Task`: where a benchmark's questions come from, how answers are scored, what its server takes.

A task reads a folder in the layout of LLaVA's evaluation guide. Each benchmark is a file of this folder, and __init__.py is
the table of them. What scorers and writers of several tasks share is here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import InputError
from llava.eval.files import Faults
from llava.eval.metrics.accuracy import by_category, percent
from llava.eval.tasks.answers import AnswerRecord
from llava.eval.types import AnsweredQuestion, Question, Scores

WORD_SUFFIX = "Answer the question using a single word or phrase."
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
LETTER_SUFFIX_CN = "请直接回答选项字母。"

Reader = Callable[[Path], list[Question]]  # from the task's folder
Scorer = Callable[[Sequence[AnsweredQuestion]], Scores]
Writer = Callable[
    [Sequence[AnsweredQuestion], Path, Path], Path
]  # answers, the task's folder, where to write; the file
ResultScorer = Callable[[Path, Path, Faults], Scores | None]  # a result file, the task's folder


@dataclass(frozen=True)
class Task:
    """A benchmark.

    `read` makes its questions, `score` judges answers, `write` makes the file for its server. `score_results` scores a
    result file that holds its own references (MME's text files, a judge's reviews), and returns None for any other file.
    `fit_answers` translates answers whose ids are not those of the questions. `unit` is the headline figure's.
    """

    name: str
    title: str
    folder: str
    read: Reader
    score: Scorer
    headline: str
    unit: str = "%"
    highest: float = 100.0  # of the headline figure, for the radar plot
    max_new_tokens: int = 128
    write: Writer | None = None
    fit_answers: Callable[[Sequence[AnswerRecord], Sequence[Question]], list[AnswerRecord]] | None = None
    score_results: ResultScorer | None = None
    judge: str | None = None  # the kind of judge that its answers need, by its name in eval/harness/judge.py

    def home(self, data_dir: Path) -> Path:
        """Return the task's own folder, whether the folder of all benchmarks or that one was given.

        The evaluation guide writes `mmvet` where its scripts read `mm-vet`, so either is taken.
        """
        places = (data_dir / self.folder, data_dir / self.folder.replace("-", ""))
        return next((place for place in places if place.is_dir()), data_dir)


def accuracy(answered: Sequence[AnsweredQuestion], verdicts: Sequence[float]) -> Scores:
    """Score by the percentage of right answers, in all and in each category."""
    total, right = percent(verdicts), float(sum(verdicts))
    return Scores(
        {"accuracy": total, "right": int(right) if right.is_integer() else right, "questions": len(verdicts)},
        by_category((one.question.category, verdict) for one, verdict in zip(answered, verdicts, strict=True)),
        verdicts,
        headline=total,
    )


def unscored(answered: Sequence[AnsweredQuestion], note: str) -> Scores:
    """Score nothing, where the references are not public or a judge is needed; `note` says what to do instead."""
    return Scores({"answers": sum(one.text is not None for one in answered)}, {}, [None] * len(answered), notes=(note,))


def refuse_gaps(answered: Sequence[AnsweredQuestion], title: str) -> None:
    """Refuse to write a submission with missing answers, for servers that take none."""
    missing = [one.question.id for one in answered if one.text is None]
    if missing:
        raise InputError(f"{title} wants every question answered; {len(missing)} are not, the first is {missing[0]!r}")
