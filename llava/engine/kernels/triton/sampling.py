"""Sampling on the device: greedy, or at random among the tokens that top_k, top_p and min_p keep.

One program has one row of logits, which stay in the GPU's cache while it passes over them. Nothing is sorted: the smallest
logit that is kept is found by bisection over float32 as ordered integers. Equal logits are kept or dropped together. Then
a random number is looked up in the cumulative distribution, in the order of token ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.engine.kernels.base import SamplingTensors

BLOCK = 4096
LOWEST = tl.constexpr(-(2**31))  # below every number's integer


def sample(logits: Tensor, sampling: SamplingTensors) -> tuple[Tensor, Tensor]:
    """`Kernels.sample`."""
    num_rows, num_tokens = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _sample[(num_rows,)](
        logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seeds, sampling.positions,
        tokens, logprobs, logits.stride(0), num_tokens,
        GREEDY=sampling.all_greedy, UNLIMITED=sampling.unlimited, BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
    return tokens, logprobs


@triton.jit
def _sample(
    logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, tokens, logprobs, stride, num_tokens,
    GREEDY: tl.constexpr, UNLIMITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    best, token, total = _greedy(line, num_tokens, BLOCK)
    if not GREEDY:
        temperature = tl.load(temperatures + row)
        if temperature > 0:
            rate = 1.4426950408889634 / temperature
            bound = tl.full((), LOWEST, tl.int32)
            floor = float("-inf")
            if not UNLIMITED:
                top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
                bound = _bound(line, num_tokens, best, rate, top_k, top_p, BLOCK)
                floor = best + temperature * tl.log(tl.load(min_ps + row))
            bits, _, _, _ = tl.philox(
                tl.load(seeds + row),
                (tl.load(positions + row) & 0xFFFFFFFF).to(tl.uint32),
                (tl.load(positions + row) >> 32).to(tl.uint32),
                tl.full((), 0, tl.uint32),
                tl.full((), 0, tl.uint32),
            )
            target = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08
            target *= _mass(line, num_tokens, best, rate, bound, floor, BLOCK)
            token = _look_up(line, num_tokens, best, rate, bound, floor, target, BLOCK)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.load(line + token).to(tl.float32) - best - tl.log(total))


@triton.jit
def _part(line, start, num_tokens, BLOCK: tl.constexpr):
    places = start + tl.arange(0, BLOCK)
    return places, tl.load(line + places, mask=places < num_tokens, other=float("-inf")).to(tl.float32)


@triton.jit
def _order(values, line):
    """Return integers in the order of the values, with no more bits than the dtype has, so that the bisection is short."""
    dtype: tl.constexpr = line.dtype.element_ty
    UNUSED: tl.constexpr = 16 if dtype == tl.bfloat16 else 13 if dtype == tl.float16 else 0
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> UNUSED


# Below, every lane keeps a result of its own until the last block: reductions over all threads take most of the time.


@triton.jit
def _greedy(line, num_tokens, BLOCK: tl.constexpr):
    """Return the largest logit, the first token that has it, and the sum of exp(logit - largest)."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.full((BLOCK,), 0, tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tokens, BLOCK):
        places, values = _part(line, start, num_tokens, BLOCK)
        higher = tl.maximum(best, values)
        token = tl.where(values > best, places, token)
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
        total = total * tl.exp(best - safe) + tl.exp(values - safe)
        best = higher
    largest = tl.max(best, axis=0)
    first = tl.min(tl.where(best == largest, token, num_tokens - 1), axis=0)
    return largest, first, tl.sum(total * tl.exp(best - largest), axis=0)


@triton.jit
def _mass(line, num_tokens, best, rate, bound, floor, BLOCK: tl.constexpr):
    """Return the sum of the unnormalized probabilities of tokens not below `bound` (an integer) nor `floor` (a logit)."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_tokens, BLOCK):
        _, values = _part(line, start, num_tokens, BLOCK)
        kept = (_order(values, line) >= bound) & (values >= floor)
        total += tl.where(kept, tl.exp2((values - best) * rate), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _count(line, num_tokens, bound, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_tokens, BLOCK):
        places, values = _part(line, start, num_tokens, BLOCK)
        total += ((_order(values, line) >= bound) & (places < num_tokens)).to(tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def _bound(line, num_tokens, best, rate, top_k, top_p, BLOCK: tl.constexpr):
    """Return the integer of the smallest logit that top_k and top_p keep, or a smaller one with no logit between."""
    largest = tl.max(_order(tl.full((1,), 0.0, tl.float32) + best, line), axis=0).to(tl.int64)
    bound = tl.full((), LOWEST, tl.int64)
    if (top_k > 0) & (top_k < num_tokens):
        # At least top_k logits are not below `bound`, fewer are not below `above`.
        bound = tl.min(_order(tl.full((1,), float("-inf"), tl.float32), line), axis=0).to(tl.int64)
        above = largest + 1
        count = num_tokens
        while (above - bound > 1) & (count != top_k):
            middle = (above + bound) >> 1
            count = _count(line, num_tokens, middle.to(tl.int32), BLOCK)
            if count >= top_k:
                bound = middle
            else:
                above = middle
    if top_p < 1:
        # Logits above `low` have at least top_p of the mass; those above `high` have less, so that `high` is kept.
        everything = float("-inf")
        wanted = top_p * _mass(line, num_tokens, best, rate, bound.to(tl.int32), everything, BLOCK)
        smallest = tl.min(_order(tl.full((1,), float("-inf"), tl.float32), line), axis=0).to(tl.int64)
        low = tl.maximum(bound, smallest) - 1
        high = largest
        while high - low > 1:
            middle = (high + low) >> 1
            if _mass(line, num_tokens, best, rate, (middle + 1).to(tl.int32), everything, BLOCK) < wanted:
                high = middle
            else:
                low = middle
        bound = high
    return bound.to(tl.int32)


@triton.jit
def _look_up(line, num_tokens, best, rate, bound, floor, target, BLOCK: tl.constexpr):
    """Return the first token at which the cumulative mass passes the target; the last kept one if rounding prevents that."""
    token = num_tokens
    last = 0
    before = 0.0
    for start in range(0, num_tokens, BLOCK):
        if token == num_tokens:
            places, values = _part(line, start, num_tokens, BLOCK)
            kept = (_order(values, line) >= bound) & (values >= floor) & (values > float("-inf"))
            masses = tl.where(kept, tl.exp2((values - best) * rate), 0.0)
            cumulative = before + tl.cumsum(masses, axis=0)
            token = tl.min(tl.where(kept & (cumulative > target), places, num_tokens), axis=0)
            last = tl.maximum(last, tl.max(tl.where(kept, places, 0), axis=0))
            before += tl.sum(masses, axis=0)
    return tl.where(token == num_tokens, last, token)
