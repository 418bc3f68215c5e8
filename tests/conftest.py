"""The order of the test files: those that take longest first, so that the processes of `make test` end together."""

from __future__ import annotations

import pytest

# By the time that they took on two cores, from the longest on.
LONGEST = (
    "test_serve_load.py", "test_eval_runs.py", "test_runs_on_two.py", "test_serve_process.py", "test_convert_errors.py",
    "test_serve_programs.py", "test_train_run.py", "test_chat.py", "test_engine_tools.py", "test_distributed.py",
    "test_serve_openai.py", "test_finetune_howto.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
