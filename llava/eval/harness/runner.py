"""Answer the open questions of tasks, in this process or in several, and write every answer as it comes.

In: tasks' questions and the choice of a model. Out: complete `AnswerLog`s. Which shard asks a question changes no answer, and a
run that was killed continues where it stopped. The model is asked by client.py, the log written by answer_log.py.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava.engine.request import SamplingParams
from llava.errors import InputError
from llava.eval.files import Faults
from llava.eval.harness.answer_log import AnswerLog, PartWriter
from llava.eval.harness.client import EvalClient, Failure, ModelChoice, OnResult
from llava.eval.harness.progress import ProgressBar
from llava.eval.types import Question

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

Numbered = Sequence[tuple[int, Question]]
OnAnswer = Callable[[int, int, "str | None"], None]  # index of the job, number of the question, why it failed
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
    """The model, its sampling parameters, and the number of processes."""

    model: ModelChoice
    model_id: str
    sampling: SamplingParams
    seed: int = 0
    shards: int = 1
    quiet: bool = False


@dataclass(frozen=True)
class AskOutcome:
    """Counted failures of each job, and the template that was used; None where no question was open."""

    faults: list[Faults]
    template: str | None


def answer_jobs(jobs: Sequence[TaskJob], settings: AskSettings) -> AskOutcome:
    """Answer the open questions of every job; `InputError` if the model cannot be loaded or a shard ended early."""
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
        tracker = _ProgressTracker(bars)
        if settings.shards > 1:
            _ask_in_shards(jobs, missing, settings, tracker)
        else:
            with EvalClient.open(settings.model, settings.sampling, seed=settings.seed) as client:
                tracker.template = client.conv_mode
                for job, numbered, on_result in _open_jobs(jobs, missing, settings.model_id, "0", tracker.on_answer):
                    client.answer(numbered, on_result, max_new_tokens=job.max_new_tokens)
        tracker.close()
        template = tracker.template
        for index, number in sorted(tracker.failures):
            name = repr(jobs[index].questions[number].id)
            reason = tracker.failures[index, number]
            faults[index].add(NOT_ASKED, "they count as wrong", f"{name}: {reason}")
    for log in logs:
        log.merge()
    return AskOutcome(faults, template)


class _ProgressTracker:
    """Counts answers and failures as they come, from this process or another."""

    def __init__(self, bars: Sequence[ProgressBar]) -> None:
        self._bars = bars
        self.failures: dict[tuple[int, int], str] = {}
        self._current: int | None = None
        self.template: str | None = None

    def on_answer(self, job: int, number: int, failure: str | None) -> None:
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
    jobs: Sequence[TaskJob], missing: Sequence[Numbered], model_id: str, part: str, on_answer: OnAnswer
) -> Iterator[tuple[TaskJob, Numbered, OnResult]]:
    """Yield jobs with open questions, these, and the function that takes an answer while the job's log is open."""
    for index, (job, numbered) in enumerate(zip(jobs, missing, strict=True)):
        if not numbered:
            continue
        with AnswerLog(job.folder, job.questions, model_id).part(part) as writer:

            def on_result(number: int, text: str | Failure, index: int = index, writer: PartWriter = writer) -> None:
                if isinstance(text, Failure):
                    on_answer(index, number, text.reason)
                else:
                    writer.write_answer(number, text)
                    on_answer(index, number, None)

            yield job, numbered, on_result


def shard_of(numbered: Sequence[tuple[int, Question]], index: int, count: int) -> list[tuple[int, Question]]:
    """Return one of `count` parts of the questions. Neighbours stay together, since they are often about one image."""
    start, stop = (len(numbered) * edge // count for edge in (index, index + 1))
    return list(numbered[start:stop])


@dataclass(frozen=True)
class ShardEvent:
    """A message from a shard. `kind` is "template", "answer", "error" or "end"."""

    kind: str
    shard: int
    text: str | None = None  # the template, the error, or why a question could not be asked
    job: int = 0
    number: int = 0


def _ask_in_shards(
    jobs: Sequence[TaskJob], missing: Sequence[Numbered], settings: AskSettings, tracker: _ProgressTracker
) -> None:
    context = multiprocessing.get_context("spawn")
    events: Queue[ShardEvent] = context.Queue()
    workers = []
    for index in range(settings.shards):
        parts = [shard_of(found, index, settings.shards) for found in missing]
        worker = context.Process(target=_shard, args=(index, jobs, parts, settings, events), daemon=True)
        worker.start()
        workers.append(worker)
    open_shards = set(range(len(workers)))
    error: str | None = None
    try:
        while open_shards:
            try:
                event = events.get(timeout=0.5)
            except queue.Empty:
                dead = [index for index in open_shards if not workers[index].is_alive()]
                if dead and events.empty():
                    ended = workers[dead[0]].exitcode
                    how = f"signal {-ended}" if ended is not None and ended < 0 else f"exit status {ended}"
                    raise InputError(
                        f"process {dead[0]} of {len(workers)} ended with {how} before it was done; the answers so far are "
                        "kept, and the same command continues from there"
                    ) from None
                continue
            if event.kind == "answer":
                tracker.on_answer(event.job, event.number, event.text)
            elif event.kind == "template":
                tracker.template = event.text
            elif event.kind == "error":
                error = event.text
                break
            else:
                open_shards.discard(event.shard)
    finally:
        for worker in workers:
            if open_shards:
                worker.terminate()
            worker.join()
    if error is not None:
        raise InputError(error)


def _shard(
    index: int, jobs: Sequence[TaskJob], missing: Sequence[Numbered], settings: AskSettings, events: Queue[ShardEvent]
) -> None:
    import torch

    def on_answer(job: int, number: int, failure: str | None) -> None:
        events.put(ShardEvent("answer", index, failure, job, number))

    try:
        model = settings.model
        if torch.cuda.is_available() and model.device in ("auto", "cuda"):
            model = replace(model, device=f"cuda:{index % torch.cuda.device_count()}")
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.shards))
        with EvalClient.open(model, settings.sampling, seed=settings.seed) as client:
            events.put(ShardEvent("template", index, client.conv_mode))
            for job, numbered, on_result in _open_jobs(jobs, missing, settings.model_id, f"{index}", on_answer):
                client.answer(numbered, on_result, max_new_tokens=job.max_new_tokens)
        events.put(ShardEvent("end", index))
    except InputError as error:
        events.put(ShardEvent("error", index, str(error)))
    except KeyboardInterrupt:
        events.put(ShardEvent("end", index))


def num_shards(wanted: int | None) -> int:
    """Return the number of processes: `wanted`, or one for each GPU."""
    if wanted is not None:
        if wanted < 1:
            raise InputError(f"the number of shards is {wanted}; give 1 or more")
        return wanted
    import torch

    return max(1, torch.cuda.device_count())
