"""Choosing tokens on the device: greedy, or at random among those that top_k, top_p and min_p keep.

One program has one row of logits, which stay in its cache while it passes over them. Nothing is sorted: the smallest logit
that is kept is found by halving the range of float32, taken as ordered integers, until one number is left. Equal logits
are kept or dropped together. Then a random number is looked up in the cumulative distribution, in the order of token ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.engine.kernels.contract import SamplingRows

BLOCK = 4096
LOWEST = tl.constexpr(-(2**31))  # below every number's integer


def sample(logits: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    num_rows, num_tokens = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _sample[(num_rows,)](
        logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.positions, tokens, logprobs,
        logits.stride(0), num_tokens,
        GREEDY=rows.all_greedy, UNLIMITED=rows.unlimited, BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
    return tokens, logprobs


@triton.jit
def _sample(
    logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, tokens, logprobs, stride, num_tokens,
    GREEDY: tl.constexpr, UNLIMITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    best, token, total = _likeliest(line, num_tokens, BLOCK)
    if not GREEDY:
        temperature = tl.load(temperatures + row)
        if temperature > 0:
            rate = 1.4426950408889634 / temperature
            bound = tl.full((), LOWEST, tl.int64)
            if not UNLIMITED:
                bound = _bound(
                    line, num_tokens, best, rate, temperature,
                    tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row), BLOCK,
                )  # fmt: skip
            bits, _, _, _ = tl.philox(
                tl.load(seeds + row),
                (tl.load(positions + row) & 0xFFFFFFFF).to(tl.uint32),
                (tl.load(positions + row) >> 32).to(tl.uint32),
                tl.full((), 0, tl.uint32),
                tl.full((), 0, tl.uint32),
            )
            target = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08
            target *= _mass(line, num_tokens, best, rate, bound, BLOCK)
            token = _look_up(line, num_tokens, best, rate, bound, target, BLOCK)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.load(line + token).to(tl.float32) - best - tl.log(total))


@triton.jit
def _part(line, start, num_tokens, BLOCK: tl.constexpr):
    places = start + tl.arange(0, BLOCK)
    return places, tl.load(line + places, mask=places < num_tokens, other=float("-inf")).to(tl.float32)


@triton.jit
def _order(values):
    """Integers in the order of float32 numbers."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _likeliest(line, num_tokens, BLOCK: tl.constexpr):
    """The largest logit, the first token that has it, and the sum of exp(logit - largest)."""
    best = float("-inf")
    token = 0
    total = 0.0
    for start in range(0, num_tokens, BLOCK):
        places, values = _part(line, start, num_tokens, BLOCK)
        here = tl.max(values, axis=0)
        higher = tl.maximum(best, here)
        if here > best:
            token = tl.min(tl.where(values == here, places, num_tokens), axis=0)
        if higher > float("-inf"):
            total = total * tl.exp(best - higher) + tl.sum(tl.exp(values - higher), axis=0)
        best = higher
    return best, token, total


@triton.jit
def _mass(line, num_tokens, best, rate, bound, BLOCK: tl.constexpr):
    """The sum of the unnormalized probabilities of tokens whose integer is not below a bound."""
    total = 0.0
    for start in range(0, num_tokens, BLOCK):
        _, values = _part(line, start, num_tokens, BLOCK)
        total += tl.sum(tl.where(_order(values) >= bound, tl.exp2((values - best) * rate), 0.0), axis=0)
    return total


@triton.jit
def _bound(line, num_tokens, best, rate, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """The integer of the smallest logit that all three keep, or less where nothing lies between."""
    largest = tl.max(_order(tl.full((1,), 0.0, tl.float32) + best), axis=0)
    bound = tl.full((), LOWEST, tl.int64)
    if (top_k > 0) & (top_k < num_tokens):
        # At least top_k logits are not below `bound`, fewer are not below `above`.
        above = largest + 1
        count = num_tokens
        while (above - bound > 1) & (count != top_k):
            middle = (above + bound) >> 1
            count = 0
            for start in range(0, num_tokens, BLOCK):
                places, values = _part(line, start, num_tokens, BLOCK)
                count += tl.sum(((_order(values) >= middle) & (places < num_tokens)).to(tl.int32), axis=0)
            if count >= top_k:
                bound = middle
            else:
                above = middle
    if top_p < 1:
        # What lies above `low` has top_p or more of the mass; what lies above `high` has less, so that `high` is kept.
        wanted = top_p * _mass(line, num_tokens, best, rate, bound, BLOCK)
        low = bound - 1
        high = largest
        while high - low > 1:
            middle = (high + low) >> 1
            if _mass(line, num_tokens, best, rate, middle + 1, BLOCK) < wanted:
                high = middle
            else:
                low = middle
        bound = high
    if min_p > 0:
        smallest = best + temperature * tl.log(min_p)
        bound = tl.maximum(bound, tl.max(_order(tl.full((1,), 0.0, tl.float32) + smallest), axis=0))
    return bound


@triton.jit
def _look_up(line, num_tokens, best, rate, bound, target, BLOCK: tl.constexpr):
    """The first token at which the cumulative mass passes the target; rounding at the end gives the last kept one."""
    token = num_tokens
    last = 0
    before = 0.0
    for start in range(0, num_tokens, BLOCK):
        if token == num_tokens:
            places, values = _part(line, start, num_tokens, BLOCK)
            kept = (_order(values) >= bound) & (values > float("-inf"))
            masses = tl.where(kept, tl.exp2((values - best) * rate), 0.0)
            cumulative = before + tl.cumsum(masses, axis=0)
            token = tl.min(tl.where(kept & (cumulative > target), places, num_tokens), axis=0)
            last = tl.maximum(last, tl.max(tl.where(kept, places, 0), axis=0))
            before += tl.sum(masses, axis=0)
    return tl.where(token == num_tokens, last, token)
