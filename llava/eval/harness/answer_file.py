"""Answer a file of questions, as the original's scripts model_vqa*.py do, whole or in chunks.

In: a command line and the questions. Out: the answers file, a line for each question in their order. The scripts read the
questions; their flags are in eval/common_flags.py.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TextIO, TypeVar

from llava.conversation import get_model_name_from_path
from llava.errors import InputError
from llava.eval.harness.answer_log import answer_row
from llava.eval.harness.client import EvalClient, Failure, ModelChoice, missing_images
from llava.eval.harness.progress import ProgressBar
from llava.eval.types import Question

T = TypeVar("T")
FREE_TOKENS = 1024  # maximum number of tokens of an answer, in scripts without a flag for it


def split_list(questions: Sequence[T], num_chunks: int) -> list[list[T]]:
    """Cut a list into `num_chunks` parts whose sizes differ by one at most.

    The original rounds up: 5 questions in 4 chunks make three, and asking for the fourth is an error.
    """
    if num_chunks < 1:
        raise InputError(f"--num-chunks is {num_chunks}; give 1 or more")
    edges = [len(questions) * number // num_chunks for number in range(num_chunks + 1)]
    return [list(questions[start:stop]) for start, stop in pairwise(edges)]


def get_chunk(questions: Sequence[T], num_chunks: int, index: int) -> list[T]:
    if not 0 <= index < num_chunks:
        raise InputError(f"--chunk-idx is {index}; of {num_chunks} chunks it is 0 to {num_chunks - 1}")
    return split_list(questions, num_chunks)[index]


def answer_file(args: Namespace, questions: Sequence[Question], *, max_new_tokens: int) -> None:
    """Answer questions into the file `args.answers_file`; `InputError` after all others if some could not be asked."""
    from llava.cli.model_flags import find_model, sampling_from

    missing = missing_images(questions)
    if missing:
        raise InputError(f"{len(missing)} images of the questions are missing; the first is {str(missing[0])!r}")
    sampling = sampling_from(args)
    path = find_model(args.model_path)
    choice = ModelChoice(path, args.model_base, args.device, conv_mode=args.conv_mode)
    model_id = get_model_name_from_path(path)
    file = Path(args.answers_file).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    bar = ProgressBar(file.name, len(questions))
    failures: dict[int, str] = {}
    with file.open("w", encoding="utf-8") as out:
        lines = _InOrder(out)

        def on_result(number: int, text: str | Failure) -> None:
            if isinstance(text, Failure):
                failures[number] = text.reason
                lines.put(number, "")
            else:
                row = answer_row(questions[number], text, model_id)
                lines.put(number, json.dumps(row, ensure_ascii=False) + "\n")
            bar.update(bar.done + 1)

        if questions:
            with EvalClient.open(choice, sampling) as client:
                client.answer(list(enumerate(questions)), on_result, max_new_tokens=max_new_tokens)
            bar.close()
    if failures:
        number = min(failures)
        raise InputError(
            f"{len(failures)} of {len(questions)} questions could not be asked; the first is {questions[number].id!r}: "
            f"{failures[number]} (the other answers are in {str(file)!r})"
        )


class _InOrder:
    """Writes numbered lines in the order of their numbers, each as soon as all before it are written."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._waiting: dict[int, str] = {}
        self._next = 0

    def put(self, number: int, line: str) -> None:
        self._waiting[number] = line
        while self._next in self._waiting:
            self._out.write(self._waiting.pop(self._next))
            self._next += 1
        self._out.flush()
