"""The compiled arithmetic of a CPU: beside PyTorch's operators, on many threads, and where it cannot be compiled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import KINDS, answers_together, expected, loaded, mixed_requests
from torch import Tensor
from torch.nn import functional as F

from llava.engine.engine import Engine
from llava.engine.kernels import pick_kernels
from llava.engine.kernels.base import AttentionParams, AttentionPlan, KVCache
from llava.engine.kernels.cpu import build as native_build
from llava.engine.kernels.cpu.kernels import CpuKernels
from llava.engine.kernels.cpu.native import NativeKernels
from llava.engine.kernels.quantized import quantize
from llava.engine.kernels.reference import ReferenceKernels


@pytest.fixture
def native() -> NativeKernels:
    functions = native_build.load()
    if functions is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    return NativeKernels(functions)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user for whom nothing has been compiled, on a machine with no programs but those put into this folder."""
    native_build._compiled.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    yield tmp_path
    native_build._compiled.cache_clear()


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (6, 2, 128), (7, 1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_that_of_pytorch_s_operators(
    native: NativeKernels, dtype: torch.dtype, heads: int, kv_heads: int, width: int
) -> None:
    """Five sequences, one of them empty, of a step that decodes: rotation and norms of heads, attention, the MLP's gate."""
    contexts = [1, 33, 0, 16, 70]
    tables = torch.randperm(25).view(5, 5).int()
    slots = [int(tables[row, (n - 1) // 16]) * 16 + (n - 1) % 16 if n else -1 for row, n in enumerate(contexts)]
    lengths = torch.tensor(contexts, dtype=torch.int32)
    plan = AttentionPlan(
        torch.arange(6).int(), lengths, tables, torch.tensor(slots), (lengths - 1).clamp(min=0).long(), 1, 70
    )
    qkv, cos, sin = (
        torch.randn(rows, n).to(dtype) for rows, n in [(5, (heads + 2 * kv_heads) * width), *[(70, width // 2)] * 2]
    )
    params = AttentionParams(heads, kv_heads, 0.2, cos, sin, *torch.rand(2, width).to(dtype))
    keys, values = torch.randn(2, 25, 16, kv_heads, width).to(dtype)
    slopes = torch.rand(heads)
    results = []
    for kernels in (native, ReferenceKernels()):
        cache = KVCache(keys.clone(), values.clone())
        q = kernels.rope_store_(qkv, cache, params, plan)
        out = kernels.attend(q, cache, params, plan)
        limited = kernels.attend(q, cache, replace(params, window=20, alibi=slopes), plan)
        results.append((q, *cache, out, limited, kernels.silu_mul(qkv)))
    assert torch.equal(results[0][2], results[1][2])
    for ours, theirs in zip(*results, strict=True):
        assert far_from(ours, theirs) < (1e-5 if dtype == torch.float32 else 1e-2)


def far_from(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_the_exponential_holds_over_its_whole_range(native: NativeKernels) -> None:
    gate = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e3, 1e3, 0.0])])
    got = native.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0]
    torch.testing.assert_close(got, F.silu(gate), rtol=1e-6, atol=1e-35)


def test_two_threads_of_a_program_share_the_workers(native: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of few and of many items, one after another without a pause and with pauses in which the workers fall asleep."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    weights = [torch.randn(outputs, 24) for outputs in (33, 320, 2000)]
    packed = [native.pack(weight) for weight in weights] + [native.pack(quantize(weights[1], "int8"))]
    weights.append(quantize(weights[1], "int8").dequantize(torch.float32))
    wrong: list[int] = []

    def work(seed: int) -> None:
        pause = threading.Event()
        for number in range(300):
            x = torch.full((1 + number % 9, 24), float(number + seed)).sin_()
            at = number % len(weights)
            if far_from(native.linear(x, packed[at]), x @ weights[at].T) > 1e-5:
                wrong.append(number)
            if number % 50 == 0:
                pause.wait(0.003)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_without_a_compiler_are_those_of_generate(kind: str, empty_cache: Path) -> None:
    requests = mixed_requests()
    with Engine.from_loaded(loaded(kind)) as engine:
        assert not isinstance(engine._worker.runner.decoder.kernels, NativeKernels)
        results = answers_together(engine, requests)
    assert [result.completions[0].token_ids for result in results] == list(expected(kind))


def test_a_compiler_that_fails_is_told_of_and_nothing_stays(empty_cache: Path, caplog: Any) -> None:
    compiler = empty_cache / "g++"
    compiler.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with caplog.at_level(logging.INFO):
        assert native_build.load() is None
    assert "no such instruction" in caplog.text
    assert list((empty_cache / "cache/llava/kernels").iterdir()) == []


def test_what_was_compiled_once_needs_no_compiler(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = native_build._compiled()
    if made is None:
        pytest.skip("no C++ compiler")
    request.getfixturevalue("empty_cache")
    assert native_build.load() is None
    native_build._compiled.cache_clear()
    folder = tmp_path / "cache/llava/kernels"
    folder.mkdir(parents=True)
    (folder / made.name).write_bytes(made.read_bytes())
    assert native_build.load() is not None


def test_the_environment_can_leave_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_NATIVE", "0")
    assert type(pick_kernels(torch.device("cpu"), torch.float32)) is CpuKernels
