"""What a benchmark is: where its questions come from, how an answer is scored, and what its server wants.

In: a folder in the layout of LLaVA's evaluation guide. Out: `Task`, the unit that the runner, the scorer and the report
work on. The tasks themselves are in tasks/, one small file each; the table of them is __init__.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.eval.files import Faults
from llava.eval.tasks.answers import AnswerRecord
from llava.eval.types import AnsweredQuestion, Question, Scores

WORD_SUFFIX = "Answer the question using a single word or phrase."
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
LETTER_SUFFIX_CN = "请直接回答选项字母。"

Reader = Callable[[Path], list[Question]]
Scorer = Callable[[Sequence[AnsweredQuestion]], Scores]
Writer = Callable[[Sequence[AnsweredQuestion], Path, Path], Path]  # answers, the task's folder, where to write
ResultScorer = Callable[[Path, Path, Faults], Scores | None]


@dataclass(frozen=True)
class Task:
    """A benchmark.

    `read` makes its questions from the benchmark's folder, `score` judges answers, `write` makes the file for its server.
    `score_results` scores a result file that carries its own truth (MME's text files, a judge's reviews) and gives None
    for any other. `fit_answers` translates answers whose ids are not the items'. `unit` is the headline figure's.
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
        """The task's own folder, whether the folder of all benchmarks or that one was given.

        The evaluation guide writes `mmvet` where its scripts read `mm-vet`, so either is taken.
        """
        places = (data_dir / self.folder, data_dir / self.folder.replace("-", ""))
        return next((place for place in places if place.is_dir()), data_dir)
