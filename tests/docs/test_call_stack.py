"""The path from a command to its first matrix product stays short (scripts/docs/call_stack.py)."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
from repository import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("call_stack", ROOT / "scripts/docs/call_stack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", ["chat", "eval", "serve", "cli", "train"])
def test_few_calls_lie_before_the_first_product(script: ModuleType, command: str) -> None:
    entry, *calls = script.path_of(command)
    assert entry == script.ENTRIES[command]
    assert calls[-1].function in ("hidden_states", "forward")
    assert len(calls) <= script.LIMITS[command], "\n".join(map(str, calls))
    if command != "train":  # whose trainer calls the model in the same thread
        assert "EngineWorker.add" in [call.function for call in calls]
