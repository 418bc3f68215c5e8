"""Answer a task's questions: what is missing is asked, in this process or spread over several, and written as it comes.

In: an `AnswerLog` and a model. Out: the log, complete. Which shard asks what changes no answer, and a run that was killed goes
on where it stopped. Asking is client.py's, writing answer_log.py's.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.engine.request import SamplingParams
from llava.errors import InputError
from llava.eval.files import Faults
from llava.eval.harness.answer_log import AnswerLog, PartWriter
from llava.eval.harness.client import Asker, Done, Failure, ModelChoice
from llava.eval.harness.progress import ProgressBar
from llava.eval.types import Question

Numbered = Sequence[tuple[int, Question]]
Seen = Callable[[int, int, "str | None"], None]  # a job's place, a question's number, why it failed
NOT_ASKED = "questions that could not be asked"


@dataclass(frozen=True)
class TaskJob:
    """One task's questions, and where their answers go."""

    title: str
    questions: Sequence[Question]
    folder: Path
    max_new_tokens: int
    left_out: frozenset[int] = frozenset()  # numbers of questions that are not to be asked


@dataclass(frozen=True)
class AskSettings:
    """How to ask: the model, how tokens are chosen, and how the work is spread."""

    model: ModelChoice
    model_id: str
    sampling: SamplingParams
    seed: int = 0
    shards: int = 1
    quiet: bool = False


@dataclass(frozen=True)
class AskOutcome:
    """What could not be asked, for each job, and the template that was used; None if nothing had to be asked."""

    faults: list[Faults]
    template: str | None


def answer_jobs(jobs: Sequence[TaskJob], settings: AskSettings) -> AskOutcome:
    """Answer what is missing of every job."""
    logs = [AnswerLog(job.folder, job.questions, settings.model_id) for job in jobs]
    missing = [
        [(number, question) for number, question in log.missing() if number not in job.left_out]
        for job, log in zip(jobs, logs, strict=True)
    ]
    faults = [Faults() for _ in jobs]
    template = None
    if any(missing):
        bars = [
            ProgressBar(job.title, len(job.questions), len(job.questions) - len(found), quiet=settings.quiet)
            for job, found in zip(jobs, missing, strict=True)
        ]
        watcher = _Watcher(bars)
        if settings.shards > 1:
            _ask_in_shards(jobs, missing, settings, watcher)
        else:
            with Asker.open(settings.model, settings.sampling, seed=settings.seed) as asker:
                watcher.template = asker.conv_mode
                for job, numbered, done in _open_jobs(jobs, missing, settings.model_id, "0", watcher.seen):
                    asker.ask(numbered, done, max_new_tokens=job.max_new_tokens)
        watcher.close()
        template = watcher.template
        for place, number in sorted(watcher.failures):
            name = repr(jobs[place].questions[number].id)
            reason = watcher.failures[place, number]
            faults[place].add(NOT_ASKED, "they count as wrong", f"{name}: {reason}")
    for log in logs:
        log.merge()
    return AskOutcome(faults, template)


class _Watcher:
    """Counts answers and failures as they come, from this process or another."""

    def __init__(self, bars: Sequence[ProgressBar]) -> None:
        self._bars = bars
        self.failures: dict[tuple[int, int], str] = {}
        self._current: int | None = None
        self.template: str | None = None

    def seen(self, job: int, number: int, failure: str | None) -> None:
        bar = self._bars[job]
        if self._current not in (None, job):
            self.close()
            bar.begin()
        self._current = job
        bar.update(bar.done + 1)
        if failure is not None:
            self.failures[job, number] = failure

    def close(self) -> None:
        if self._current is not None:
            self._bars[self._current].close()
            self._current = None


def _open_jobs(
    jobs: Sequence[TaskJob], missing: Sequence[Numbered], model_id: str, part: str, seen: Seen
) -> Iterator[tuple[TaskJob, Numbered, Done]]:
    """Each job that has questions left, with these and what to call with an answer, while its part of the log is open."""
    for place, (job, numbered) in enumerate(zip(jobs, missing, strict=True)):
        if not numbered:
            continue
        with AnswerLog(job.folder, job.questions, model_id).part(part) as writer:

            def done(number: int, text: str | Failure, place: int = place, writer: PartWriter = writer) -> None:
                if isinstance(text, Failure):
                    seen(place, number, text.reason)
                else:
                    writer.write_answer(number, text)
                    seen(place, number, None)

            yield job, numbered, done


# --- several processes ----------------------------------------------------------------------------------------------


def share(numbered: Sequence[tuple[int, Question]], index: int, count: int) -> list[tuple[int, Question]]:
    """One of `count` parts of the questions, neighbours together since they are often about one image; none is lost."""
    start, stop = (len(numbered) * edge // count for edge in (index, index + 1))
    return list(numbered[start:stop])


def _ask_in_shards(
    jobs: Sequence[TaskJob], missing: Sequence[Numbered], settings: AskSettings, watcher: _Watcher
) -> None:
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    workers = []
    for index in range(settings.shards):
        parts = [share(found, index, settings.shards) for found in missing]
        worker = context.Process(target=_shard, args=(index, jobs, parts, settings, news), daemon=True)
        worker.start()
        workers.append(worker)
    open_shards = set(range(len(workers)))
    problem = None
    try:
        while open_shards:
            try:
                kind, index, *rest = news.get(timeout=0.5)
            except queue.Empty:
                dead = [index for index in open_shards if not workers[index].is_alive()]
                if dead and news.empty():
                    ended = workers[dead[0]].exitcode
                    how = f"signal {-ended}" if ended is not None and ended < 0 else f"exit status {ended}"
                    raise InputError(
                        f"process {dead[0]} of {len(workers)} ended with {how} before it was through; what was answered is "
                        "kept, and the same command goes on from there"
                    ) from None
                continue
            if kind == "answer":
                watcher.seen(*rest)
            elif kind == "template":
                watcher.template = rest[0]
            else:
                open_shards.discard(index)
                problem = problem or (rest[0] if kind == "error" else None)
                if problem is not None:
                    break
    finally:
        for worker in workers:
            if problem is not None or open_shards:
                worker.terminate()
            worker.join()
    if problem is not None:
        raise InputError(problem)


def _shard(index: int, jobs: Sequence[TaskJob], missing: Sequence[Numbered], settings: AskSettings, news: Any) -> None:
    import torch

    try:
        model = settings.model
        if torch.cuda.is_available() and model.device in ("auto", "cuda"):
            model = replace(model, device=f"cuda:{index % torch.cuda.device_count()}")
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.shards))
        with Asker.open(model, settings.sampling, seed=settings.seed) as asker:
            news.put(("template", index, asker.conv_mode))
            seen: Seen = lambda *found: news.put(("answer", index, *found))  # noqa: E731
            for job, numbered, done in _open_jobs(jobs, missing, settings.model_id, f"{index}", seen):
                asker.ask(numbered, done, max_new_tokens=job.max_new_tokens)
        news.put(("end", index))
    except InputError as error:
        news.put(("error", index, str(error)))
    except KeyboardInterrupt:
        news.put(("end", index))


def num_shards(wanted: int | None) -> int:
    """As many processes as were asked for, else one for each GPU."""
    if wanted is not None:
        if wanted < 1:
            raise InputError(f"the number of shards is {wanted}; give 1 or more")
        return wanted
    import torch

    return max(1, torch.cuda.device_count())
