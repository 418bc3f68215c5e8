"""Every Triton kernel against the reference, in float32 on a CPU; test_engine_kernels.py runs it with TRITON_INTERPRET=1."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, product

import torch
from torch import Tensor

from llava.engine.kernels.base import AttentionParams, AttentionPlan, KVCache, SamplingTensors
from llava.engine.kernels.quantized import quantize
from llava.engine.kernels.reference import ReferenceKernels
from llava.engine.kernels.triton.kernels import TritonKernels

Pair = tuple[str, Tensor, Tensor]
REFERENCE, TRITON = ReferenceKernels(), TritonKernels(torch.device("cpu"))
STEPS = [[(1, 300)], [(1, 1), (1, 150), (1, 0), (1, 300)], [(1, 1), (3, 3), (70, 200), (1, 150), (1, 0), (2, 65)]]


def rows() -> Iterator[Pair]:
    x, residual, weight = torch.randn(3, 96), torch.randn(3, 96), torch.rand(96)
    yield "rms_norm", TRITON.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)
    ours, theirs = residual.clone(), residual.clone()
    yield "sum's norm", TRITON.add_rms_norm_(x, ours, weight, 1e-5), REFERENCE.add_rms_norm_(x, theirs, weight, 1e-5)
    yield "sum", ours, theirs
    yield "silu_mul", TRITON.silu_mul(x), REFERENCE.silu_mul(x)


def linear() -> Iterator[Pair]:
    for num_rows, kind in product((1, 2, 17, 70), (None, "int8", "fp8", "int4")):
        x, weight, bias = torch.randn(num_rows, 1280), torch.randn(200, 1280), torch.randn(200)
        held = weight if kind is None else quantize(weight, kind)  # type: ignore[arg-type]
        name = f"{num_rows} rows, {kind}"
        yield name, TRITON.linear(x, held), REFERENCE.linear(x, held)
        yield f"{name}, bias", TRITON.linear(x, held, bias), REFERENCE.linear(x, held, bias)
        yield f"{name}, gated", TRITON.gated_linear(x, held), REFERENCE.gated_linear(x, held)


def attention() -> Iterator[Pair]:
    for (heads, kv_heads, width), block, lengths in product(((3, 3, 32), (6, 2, 40)), (16, 128), STEPS):
        plan, num_blocks = a_plan(lengths, block)
        ours, theirs = (KVCache(*torch.randn(2, num_blocks, block, kv_heads, width)) for _ in range(2))
        for part, other in zip(ours, theirs, strict=True):
            other.copy_(part)
        qkv, angles = torch.randn(len(plan.slots), (heads + 2 * kv_heads) * width), torch.randn(400, width // 2)
        norms = {"q_norm": torch.rand(width), "k_norm": torch.rand(width)} if kv_heads == 2 else {}
        params = AttentionParams(heads, kv_heads, 0.2, angles.cos(), angles.sin(), **norms)
        q, wanted = (
            kernels.rope_store_(qkv, cache, params, plan) for kernels, cache in ((TRITON, ours), (REFERENCE, theirs))
        )
        name = f"{len(lengths)} sequences, {heads} heads over {kv_heads}, blocks of {block}"
        yield f"{name}, q", q, wanted
        yield f"{name}, k", ours.k, theirs.k
        yield f"{name}, v", ours.v, theirs.v
        for window, alibi in product((None, 20), (None, torch.rand(heads) * 0.1)):
            limited = replace(params, window=window, alibi=alibi)
            got, wanted = (
                kernels.attend(q, ours, limited, plan)[: int(plan.query_starts[-1])] for kernels in (TRITON, REFERENCE)
            )
            yield f"{name}, window {window}, {'no ' if alibi is None else ''}ALiBi", got, wanted


def a_plan(lengths: list[tuple[int, int]], block: int) -> tuple[AttentionPlan, int]:
    most = -(-max(context for _, context in lengths) // block)
    tables = torch.randperm(len(lengths) * most).view(len(lengths), most).int()
    places = [(row, at) for row, (new, context) in enumerate(lengths) for at in range(context - new, context)]
    slots = [int(tables[row, at // block]) * block + at % block if at >= 0 else -1 for row, at in places]
    starts = torch.tensor([0, *accumulate(new for new, _ in lengths)], dtype=torch.int32)
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    positions = torch.tensor([max(at, 0) for _, at in places] + [0])
    sizes = max(new for new, _ in lengths), int(contexts.max())
    return AttentionPlan(starts, contexts, tables, torch.tensor([*slots, -1]), positions, *sizes), tables.numel()


def sampling() -> Iterator[Pair]:
    chosen = SamplingTensors(
        temperature=torch.tensor([0, 1.0, 0.7, 1, 1, 0.5] * 2),
        top_k=torch.tensor([0, 5, 0, 50, 0, 3] * 2, dtype=torch.int32),
        top_p=torch.tensor([1, 1, 0.9, 0.8, 1, 0.5] * 2),
        min_p=torch.tensor([0, 0, 0.1, 0, 0.05, 0] * 2),
        seeds=torch.randint(-(2**62), 2**62, (12,)),
        positions=torch.arange(12) * (2**33 + 1),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (torch.randn(12, 9000) * 3 - 5).to(dtype)  # bfloat16 has many equal ones
        logits[:, 5] = -torch.inf
        ours, theirs = TRITON.sample(logits, chosen), REFERENCE.sample(logits, chosen)
        yield f"tokens, {dtype}", ours[0], theirs[0]
        yield f"logprobs, {dtype}", ours[1], theirs[1]


def main() -> int:
    torch.manual_seed(0)
    failed = 0
    for name, got, wanted in (pair for part in (rows, linear, attention, sampling) for pair in part()):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9)
        failed += not error < 1e-6
        print(f"{name}: {'agrees' if error < 1e-6 else f'differs by {error:.2g}'}")
    assert not TRITON._counters.any()
    return failed


if __name__ == "__main__":
    sys.exit(main())
