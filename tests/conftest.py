"""What every test run shares: the order of the test files, and signals as a program in the foreground has them."""

from __future__ import annotations

import os
import signal

import pytest

os.environ["LLAVA_PROGRESS"] = "0"  # a busy machine waits, and says so, where another does not

# Files that take longest, from the longest on, so that the processes of `make test` end together.
LONGEST = (
    "test_runs_on_two.py", "test_eval_runs.py", "test_serve_programs.py", "test_serve_process.py", "test_convert_errors.py",
    "test_train_run.py", "test_chat.py", "test_distributed.py", "test_errors.py", "test_engine_tools.py",
    "test_serve_openai.py", "test_serve_load.py", "test_finetune_howto.py",
)  # fmt: skip

# A shell starts `command &` of a script with SIGINT ignored, and programs inherit that from the tests: Ctrl-C, which some
# tests send, would have no effect.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
