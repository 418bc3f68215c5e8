"""The comparison with which kernels.py begins: the Triton kernels and the reference in float64, on random inputs.

In: kernels on a GPU. Out: a table of each kernel's worst relative error (of norms), and whether all are below 1 %.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.engine.kernels.base import AttentionParams, AttentionPlan, Kernels, KVCache, SamplingTensors, Weight
from llava.engine.kernels.quantized import WeightKind, quantize
from llava.engine.kernels.reference import ReferenceKernels

Kind = WeightKind | Literal["bf16"]
KINDS: tuple[Kind, ...] = ("bf16", "int8", "fp8", "int4")
BLOCKS = (16, 64)  # tokens of a cache block: fewer than a kernel takes at a time, and as many
WORST = 0.01
DEVICE = torch.device("cuda")
BF16 = torch.bfloat16


@dataclass(frozen=True)
class KernelCase:
    """A kernel on some input: what it gave, and what it should."""

    kernel: str
    what: str
    got: Tensor
    wanted: Tensor

    @property
    def error(self) -> float:
        wanted = self.wanted.double()
        return float((self.got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def print_checks(kernels: Kernels) -> bool:
    """Print the worst case of each kernel, NaN being the worst; return whether all are good."""
    cases = list(all_cases(kernels))
    print("## Against float64\n\nThe largest relative error of each kernel, in bfloat16 on fresh random numbers.\n")
    print("| kernel | cases | worst | where |\n| --- | ---: | ---: | --- |")
    for name in dict.fromkeys(case.kernel for case in cases):
        mine = [case for case in cases if case.kernel == name]
        worst = max(mine, key=lambda case: case.error if case.error == case.error else float("inf"))
        print(f"| `{name}` | {len(mine)} | {worst.error:.1e} | {worst.what} |")
    failed = [case for case in cases if not case.error < WORST]
    for case in failed:
        print(f"\nfailed: {case.kernel}, {case.what}: {case.error:.3g}", file=sys.stderr)
    agreed, drawn = same_tokens(kernels)
    print(f"\nSampling chose the same token as float64 in {agreed:,} of {drawn:,} rows.\n", flush=True)
    return not failed and agreed > 0.995 * drawn


def all_cases(kernels: Kernels) -> Iterator[KernelCase]:
    for rows in (1, 3, 8, 100):
        for width in (4096, 3584, 320):
            yield from row_cases(kernels, rows, width)
    for rows in (1, 2, 7, 16, 33, 64, 100):
        for shape in ((4096, 4096), (12288, 4096), (4096, 11008), (1000, 3584), (321, 1024)):
            for kind in KINDS:
                yield from linear_cases(kernels, rows, shape, kind)
    for heads, kv_heads, width in ((32, 32, 128), (32, 8, 128), (28, 4, 128), (5, 5, 64), (8, 2, 96)):
        for block in BLOCKS:
            yield from attention_cases(kernels, heads, kv_heads, width, block)


def row_cases(kernels: Kernels, rows: int, width: int) -> Iterator[KernelCase]:
    plain, what = ReferenceKernels(), f"{rows} x {width}"
    x, residual, weight = random(rows, width), random(rows, width), random(width)
    yield KernelCase("rms_norm", what, kernels.rms_norm(x, weight, 1e-5), norm64(x, weight))
    total = residual.clone()
    normed = kernels.add_rms_norm_(x, total, weight, 1e-5)
    yield KernelCase("add_rms_norm_", what, normed, norm64(total, weight))
    yield KernelCase("add_rms_norm_", f"{what}, sum", total, residual.double() + x.double())
    yield KernelCase("silu_mul", what, kernels.silu_mul(x), plain.silu_mul(x.double()))


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)


def linear_cases(kernels: Kernels, rows: int, shape: tuple[int, int], kind: Kind) -> Iterator[KernelCase]:
    x, weight, bias = random(rows, shape[1]), random(*shape), random(shape[0])
    held: Weight = weight if kind == "bf16" else quantize(weight, kind)
    dense = held.double() if isinstance(held, Tensor) else held.dequantize(torch.float64)
    what = f"{rows} rows, {shape[0]} x {shape[1]}"
    yield KernelCase(f"linear, {kind}", what, kernels.linear(x, held), x.double() @ dense.T)
    yield KernelCase(
        f"linear, {kind}", f"{what}, bias", kernels.linear(x, held, bias), x.double() @ dense.T + bias.double()
    )
    if shape[0] % 2 == 0:
        gated = ReferenceKernels().silu_mul(x.double() @ dense.T)
        yield KernelCase(f"gated_linear, {kind}", what, kernels.gated_linear(x, held), gated)


def attention_cases(kernels: Kernels, heads: int, kv_heads: int, width: int, block: int) -> Iterator[KernelCase]:
    """Decoding alone, with rows that pad a batch; and a step that has decoding, first and later chunks of prompts."""
    decoding = [(1, 704), (1, 1), (1, 0), (1, 3000), (1, 65)]
    mixed = [(1, 300), (640, 640), (100, 1500), (1, 0), (129, 129), (2, 2), (1, 64)]
    for lengths in ([(1, 3000)], decoding, mixed):
        plan, num_blocks = random_plan(lengths, block)
        num_tokens = len(plan.slots)
        ours = KVCache(random(num_blocks, block, kv_heads, width), random(num_blocks, block, kv_heads, width))
        wanted = KVCache(ours.k.double(), ours.v.double())
        qkv = random(num_tokens, (heads + 2 * kv_heads) * width)
        angles = torch.rand(4096, width // 2, device=DEVICE) * 6
        norms = {"q_norm": random(width), "k_norm": random(width)} if kv_heads == 4 else {}
        what = f"{heads} heads of {width} over {kv_heads}, {len(lengths)} sequences"
        params = AttentionParams(heads, kv_heads, width**-0.5, angles.cos(), angles.sin(), **norms)
        wide = replace(
            params, cos=angles.double().cos(), sin=angles.double().sin(),
            **{name: norm.double() for name, norm in norms.items()},
        )  # fmt: skip
        q = kernels.rope_store_(qkv, ours, params, plan)
        q64 = ReferenceKernels().rope_store_(qkv.double(), wanted, wide, plan)
        for name, got, expected in (("q", q, q64), ("k", ours.k, wanted.k), ("v", ours.v, wanted.v)):
            yield KernelCase("rope_store_", f"{what}, {name}", got, expected)
        for window in (None, 100, 1024):
            for alibi in (None, torch.rand(heads, device=DEVICE) * 0.2):
                limited = replace(params, window=window, alibi=alibi)
                got = kernels.attend(q, ours, limited, plan)
                stored = KVCache(ours.k.double(), ours.v.double())
                expected = ReferenceKernels().attend(q.double(), stored, limited, plan)
                yield KernelCase(
                    "attend", f"{what}, window {window}, {'ALiBi' if alibi is not None else 'none'}", got, expected
                )


def random_plan(lengths: Sequence[tuple[int, int]], block: int) -> tuple[AttentionPlan, int]:
    """A step of sequences with (new tokens, tokens in the cache), their blocks in random order; and the pool's size."""
    num_sequences, most = len(lengths), max(context for _, context in lengths)
    per_sequence = -(-most // block)
    tables = torch.randperm(num_sequences * per_sequence, device=DEVICE).view(num_sequences, per_sequence).int()
    starts = [0, *accumulate(new for new, _ in lengths)]
    positions = torch.cat([torch.arange(context - new, context) for new, context in lengths]).to(DEVICE)
    owners = torch.repeat_interleave(torch.arange(num_sequences), torch.tensor([new for new, _ in lengths])).to(DEVICE)
    known = positions.clamp(min=0)
    slots = tables[owners, known // block].long() * block + known % block
    plan = AttentionPlan(
        query_starts=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32, device=DEVICE),
        block_tables=tables,
        slots=torch.where(positions < 0, -1, slots),
        positions=known,
        max_query=max(new for new, _ in lengths),
        max_context=most,
    )
    return plan, tables.numel()


def same_tokens(kernels: Kernels) -> tuple[int, int]:
    """Return how many tokens Triton samples like float64, of how many, over rows with limits of every kind."""
    agreed = drawn = 0
    for vocabulary in (891, 32064, 151936):
        for dtype in (BF16, torch.float32):
            rows = sampling_tensors(256)
            logits = (torch.randn(256, vocabulary, device=DEVICE) * 3).to(dtype)
            tokens, logprobs = kernels.sample(logits, rows)
            wanted, wanted_logprobs = ReferenceKernels().sample(logits, rows)
            same = tokens == wanted
            assert (logprobs - wanted_logprobs)[same].abs().max() < 1e-4
            agreed, drawn = agreed + int(same.sum()), drawn + len(tokens)
    return agreed, drawn


def sampling_tensors(count: int) -> SamplingTensors:
    def pick(*values: float) -> Tensor:
        return torch.tensor(values, device=DEVICE)[torch.randint(len(values), (count,), device=DEVICE)]

    return SamplingTensors(
        temperature=pick(0.0, 0.2, 0.7, 1.0, 1.5),
        top_k=pick(0, 1, 5, 50).int(),
        top_p=pick(1.0, 0.95, 0.7, 0.01),
        min_p=pick(0.0, 0.05, 0.3),
        seeds=torch.randint(-(2**62), 2**62, (count,), device=DEVICE),
        positions=torch.randint(0, 2**34, (count,), device=DEVICE),
    )


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(BF16)
