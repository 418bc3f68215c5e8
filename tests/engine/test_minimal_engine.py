"""The engine in one file that docs/ explains: its answers are those of the package's engine."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from engine_kit import expected, loaded, mixed_requests

FILE = Path(__file__).resolve().parents[2] / "docs" / "minimal_engine.py"


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_engine", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimal_engine"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("page", "num_pages", "budget"), [(16, 512, 256), (4, 46, 9), (1, 180, 1), (3, 60, 40)])
def test_its_answers_are_those_of_generate(
    minimal: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, page: int, num_pages: int, budget: int
) -> None:
    monkeypatch.setattr(minimal, "PAGE", page)
    monkeypatch.setattr(minimal, "BUDGET", budget)
    engine = minimal.MinimalEngine(loaded(kind), num_pages)
    requests = list(enumerate(mixed_requests()))
    random.Random(budget).shuffle(requests)
    asked, answers = {}, {}
    for number, request in requests:
        asked[engine.ask(request.prompt, request.images, request.sampling.max_new_tokens)] = number
        for question in engine.step():  # while others run
            answers[asked[question]] = tuple(question.answer)
    for question in engine.run():
        answers[asked[question]] = tuple(question.answer)
    assert tuple(answers[number] for number in range(len(requests))) == expected(kind)
    assert sorted(engine.scheduler.pages.free) == list(range(num_pages))


def test_a_pool_that_is_too_small_preempts(minimal: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimal, "PAGE", 4)
    engine = minimal.MinimalEngine(loaded("llama"), 46)
    released = []
    release = engine.scheduler.pages.release
    monkeypatch.setattr(
        engine.scheduler.pages, "release", lambda question: (released.append(question), release(question))
    )
    for request in mixed_requests():
        engine.ask(request.prompt, request.images, request.sampling.max_new_tokens)
    assert len(list(engine.run())) == len(mixed_requests()) < len(released)


def test_a_question_that_can_never_fit_is_refused(minimal: ModuleType) -> None:
    engine = minimal.MinimalEngine(loaded("llama"), 2)
    with pytest.raises(minimal.llava.InputError, match="positions are more than"):
        engine.ask("hello", max_new_tokens=100)
