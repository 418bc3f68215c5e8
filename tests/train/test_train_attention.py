"""The programs that choose an attention kernel."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE
from train_kit import argv, recorded_batches

from llava.train import train_mem, train_xformers
from llava.train.arguments import parse_train_args
from llava.train.run import build_trainer


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


class LowerTriangularMask:
    pass


def plain_attention(query: Any, key: Any, value: Any, attn_bias: Any = None, p: float = 0.0, scale: Any = None) -> Any:
    """What xformers computes, written out: (B, T, heads, width)."""
    scores = torch.einsum("bthd,bshd->bhts", query, key) * scale
    if isinstance(attn_bias, LowerTriangularMask):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    elif attn_bias is not None:
        assert attn_bias.shape == scores.shape
        assert attn_bias.stride(-2) % 8 == 0
        scores = scores + attn_bias
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value)


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = plain_attention  # type: ignore[attr-defined]
    ops.LowerTriangularMask = LowerTriangularMask  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def test_xformers_gives_the_same_loss(xformers: None, tmp_path: Path) -> None:
    train_xformers.register_xformers()
    arguments = parse_train_args(argv(tmp_path))
    usual = build_trainer(*arguments).model
    other = build_trainer(*parse_train_args(argv(tmp_path)), attn_implementation="xformers").model
    assert other.config._attn_implementation == "xformers"
    for batch in recorded_batches()[:4]:  # rows of unequal lengths among them
        torch.testing.assert_close(other(**batch).loss, usual(**batch).loss, atol=1e-5, rtol=0)
    single = {key: value[:1] for key, value in recorded_batches()[0].items()}
    single["attention_mask"] = torch.ones_like(single["attention_mask"])
    torch.testing.assert_close(other(**single).loss, usual(**single).loss, atol=1e-5, rtol=0)


def test_xformers_trains(xformers: None, tmp_path: Path) -> None:
    assert train_xformers.train(argv(tmp_path)).state.global_step == 1


@pytest.mark.parametrize("program", [train_xformers.main, lambda words: train_mem.main(words, train_mem.ATTENTION)])
def test_an_absent_kernel_package_is_named(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "flash_attn" else find(name, *a))
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    assert program(argv(tmp_path)) == 2
    assert "pip install" in capsys.readouterr().err
