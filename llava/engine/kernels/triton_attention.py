"""Attention over a paged cache: one new token per sequence (`decode`), or runs of them (`prefill`).

Both are called for every step that has both kinds of sequences, and each passes over those of the other kind. `decode`
splits a context among programs, so that one sequence fills the chip; the last to finish joins what they found. Letters
as in contract.py; scores are kept as powers of 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.engine.kernels.contract import AttentionPlan
from llava.engine.kernels.triton_device import MULTIPROCESSORS, let_next_start, wait_for_previous

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tile:
    """Keys that a program reads at a time, queries it has (prefill), warps, and pipeline stages."""

    keys: int
    queries: int = 1
    warps: int = 4
    stages: int = 1


SINGLE_TILE = Tile(keys=64)  # decoding where every query head has its own key head
GROUPED_TILE = Tile(keys=64, stages=3)
PREFILL_TILE = Tile(keys=64, queries=128, warps=8, stages=3)
PROGRAMS_PER_MULTIPROCESSOR = 4


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    alibi: Tensor | None,
    counters: Tensor,
    *,
    overlap: bool,
    tile: Tile | None = None,
    splits: int | None = None,
) -> None:
    """Attention of the sequences with one new token, written to their rows of `out` (T, H d)."""
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_sequences, group = len(plan.context_lens), num_heads // num_kv_heads
    tile = tile or (SINGLE_TILE if group == 1 else GROUPED_TILE)
    reach = plan.max_context if window is None else min(window, plan.max_context)
    splits = splits or pick_splits(num_sequences * num_kv_heads, triton.cdiv(reach, tile.keys))
    shape = (num_sequences, num_kv_heads, splits, group)
    partial = torch.empty((*shape, head_dim) if splits > 1 else (1,), dtype=torch.float32, device=q.device)
    stats = torch.empty((*shape, 2) if splits > 1 else (1,), dtype=torch.float32, device=q.device)
    kernel = _decode_single if group == 1 else _decode_grouped
    kernel[(num_sequences, num_kv_heads, splits)](
        q, k_cache, v_cache, out, partial, stats, counters,
        plan.query_starts, plan.context_lens, plan.block_tables, alibi,
        scale * LOG2_E.value, window or 0, plan.block_tables.stride(0), q.stride(0), num_kv_heads,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        BLOCK=block_size, KEYS=tile.keys, SPLITS=splits, STAGES=tile.stages, WINDOWED=window is not None,
        OVERLAP=overlap, num_warps=tile.warps, launch_pdl=overlap,
    )  # fmt: skip


def pick_splits(num_rows: int, num_steps: int) -> int:
    """Among how many programs a context is split."""
    return max(1, min(PROGRAMS_PER_MULTIPROCESSOR * MULTIPROCESSORS // num_rows, num_steps, 32))


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    alibi: Tensor | None,
    *,
    overlap: bool,
    tile: Tile | None = None,
) -> None:
    """Attention of the sequences with several new tokens, written to their rows of `out` (T, H d)."""
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    tile = tile or PREFILL_TILE
    grid = (triton.cdiv(plan.max_query, tile.queries), num_heads, len(plan.context_lens))
    _prefill[grid](
        q, k_cache, v_cache, out, plan.query_starts, plan.context_lens, plan.block_tables, alibi,
        scale * LOG2_E.value, window or 0, plan.block_tables.stride(0), q.stride(0), num_kv_heads,
        GROUP=num_heads // num_kv_heads, DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        BLOCK=block_size, KEYS=tile.keys, QUERIES=tile.queries, STAGES=tile.stages, WINDOWED=window is not None,
        OVERLAP=overlap, num_warps=tile.warps, launch_pdl=overlap,
    )  # fmt: skip


@triton.jit
def _share(context, window, KEYS: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr):
    """The first key in reach, this program's keys from begin to end, and how many programs have any."""
    reach = 0
    if WINDOWED:
        reach = tl.maximum(context - window, 0)
    first_tile = reach // KEYS
    num_tiles = tl.cdiv(context, KEYS) - first_tile
    tiles = tl.cdiv(num_tiles, SPLITS)
    begin = (first_tile + tl.program_id(2) * tiles) * KEYS
    return reach, begin, tl.minimum(begin + tiles * KEYS, context), tl.cdiv(num_tiles, tl.maximum(tiles, 1))


@triton.jit
def _slots(block_table, tokens, inside, BLOCK: tl.constexpr):
    blocks = tl.load(block_table + tokens // BLOCK, mask=inside, other=0)
    return blocks.to(tl.int64) * BLOCK + tokens % BLOCK


@triton.jit
def _decode_single(
    q, k_cache, v_cache, out, partial, stats, counters, query_starts, context_lens, block_tables, alibi,
    scale, window, table_stride, q_stride, num_kv_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query and one key head. Each of KEYS places keeps a softmax of its own; they meet after the last key, so that
    the loop has no exchange between threads but the sums over a head's width."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_starts + sequence)
    context = tl.load(context_lens + sequence)
    if tl.load(query_starts + sequence + 1) - row == 1:
        reach, begin, end, num_parts = _share(context, window, KEYS, SPLITS, WINDOWED)
        dims = tl.arange(0, DIMS)
        wide = (dims < DIM)[None, :]
        places = tl.arange(0, KEYS)
        target = out + row.to(tl.int64) * (num_kv_heads * DIM) + head * DIM + dims
        if context == 0:
            tl.store(target, tl.zeros((DIMS,), tl.float32).to(out.dtype.element_ty), mask=dims < DIM)
        if begin < end:
            query = tl.load(q + row.to(tl.int64) * q_stride + head * DIM + dims, mask=dims < DIM, other=0.0)
            query = query.to(tl.float32)[None, :] * scale
            slope = 0.0
            if alibi is not None:
                slope = tl.load(alibi + head).to(tl.float32) * LOG2_E
            top = tl.full((KEYS,), -1e30, tl.float32)
            total = tl.zeros((KEYS,), tl.float32)
            sums = tl.zeros((KEYS, DIMS), tl.float32)
            for start in tl.range(begin, end, KEYS, num_stages=STAGES):
                tokens = start + places
                inside = tokens < end
                slots = _slots(block_tables + sequence * table_stride, tokens, inside, BLOCK)
                offsets = (slots * num_kv_heads + head)[:, None] * DIM + dims[None, :]
                keys = tl.load(k_cache + offsets, mask=inside[:, None] & wide, other=0.0)
                values = tl.load(v_cache + offsets, mask=inside[:, None] & wide, other=0.0)
                scores = tl.sum(keys.to(tl.float32) * query, axis=1)
                if alibi is not None:
                    scores += slope * (tokens - (context - 1)).to(tl.float32)
                scores = tl.where(inside & (tokens >= reach), scores, float("-inf"))
                higher = tl.maximum(top, scores)
                shrink = tl.exp2(top - higher)
                weights = tl.exp2(scores - higher)
                total = total * shrink + weights
                sums = sums * shrink[:, None] + weights[:, None] * values.to(tl.float32)
                top = higher
            best = tl.max(top, axis=0)
            shrink = tl.exp2(top - best)
            weight = tl.sum(total * shrink, axis=0)
            result = tl.sum(sums * shrink[:, None], axis=0)
            is_last = True
            if SPLITS > 1:
                line = sequence * num_kv_heads + head
                parts = partial + line.to(tl.int64) * (SPLITS * DIM) + dims
                numbers = stats + line.to(tl.int64) * (SPLITS * 2)
                part = tl.program_id(2)
                tl.store(parts + part * DIM, result, mask=dims < DIM)
                tl.store(numbers + part * 2, best)
                tl.store(numbers + part * 2 + 1, weight)
                tl.debug_barrier()  # all threads have stored before one of them says so
                is_last = tl.atomic_add(counters + line, 1, sem="acq_rel") == num_parts - 1
                if is_last:
                    best = -1e30
                    weight = 0.0
                    result = tl.zeros((DIMS,), tl.float32)
                    for other in range(num_parts):
                        their_best = tl.load(numbers + other * 2, cache_modifier=".cg")
                        their_weight = tl.load(numbers + other * 2 + 1, cache_modifier=".cg")
                        theirs = tl.load(parts + other * DIM, mask=dims < DIM, other=0.0, cache_modifier=".cg")
                        higher_best = tl.maximum(best, their_best)
                        mine, yours = tl.exp2(best - higher_best), tl.exp2(their_best - higher_best)
                        result = result * mine + theirs * yours
                        weight = weight * mine + their_weight * yours
                        best = higher_best
                    tl.store(counters + line, 0)
            if is_last:
                tl.store(target, (result / weight).to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit
def _decode_grouped(
    q, k_cache, v_cache, out, partial, stats, counters, query_starts, context_lens, block_tables, alibi,
    scale, window, table_stride, q_stride, num_kv_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All queries that share a key head, as rows of a product by tensor cores."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_starts + sequence)
    context = tl.load(context_lens + sequence)
    if tl.load(query_starts + sequence + 1) - row == 1:
        reach, begin, end, num_parts = _share(context, window, KEYS, SPLITS, WINDOWED)
        dims = tl.arange(0, DIMS)
        wide = (dims < DIM)[None, :]
        members = tl.arange(0, ROWS)
        filled = (members < GROUP)[:, None] & wide
        heads = kv_head * GROUP + members
        target = out + row.to(tl.int64) * (num_kv_heads * GROUP * DIM) + heads[:, None] * DIM + dims[None, :]
        if context == 0:
            tl.store(target, tl.zeros((ROWS, DIMS), tl.float32).to(out.dtype.element_ty), mask=filled)
        if begin < end:
            query = tl.load(
                q + row.to(tl.int64) * q_stride + heads[:, None] * DIM + dims[None, :], mask=filled, other=0.0
            )
            slope = tl.zeros((ROWS,), tl.float32)
            if alibi is not None:
                slope = tl.load(alibi + heads, mask=members < GROUP, other=0.0).to(tl.float32) * LOG2_E
            top = tl.full((ROWS,), -1e30, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, DIMS), tl.float32)
            for start in tl.range(begin, end, KEYS, num_stages=STAGES):
                tokens = start + tl.arange(0, KEYS)
                inside = tokens < end
                slots = _slots(block_tables + sequence * table_stride, tokens, inside, BLOCK)
                offsets = (slots * num_kv_heads + kv_head)[:, None] * DIM + dims[None, :]
                keys = tl.load(k_cache + offsets, mask=inside[:, None] & wide, other=0.0)
                values = tl.load(v_cache + offsets, mask=inside[:, None] & wide, other=0.0)
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
                if alibi is not None:
                    scores += slope[:, None] * (tokens - (context - 1)).to(tl.float32)[None, :]
                scores = tl.where((inside & (tokens >= reach))[None, :], scores, float("-inf"))
                higher = tl.maximum(top, tl.max(scores, axis=1))
                shrink = tl.exp2(top - higher)
                weights = tl.exp2(scores - higher[:, None])
                total = total * shrink + tl.sum(weights, axis=1)
                sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
                top = higher
            is_last = True
            if SPLITS > 1:
                line = sequence * num_kv_heads + kv_head
                parts = partial + line.to(tl.int64) * (SPLITS * GROUP * DIM) + members[:, None] * DIM + dims[None, :]
                numbers = stats + line.to(tl.int64) * (SPLITS * GROUP * 2) + members * 2
                part = tl.program_id(2)
                tl.store(parts + part * (GROUP * DIM), sums, mask=filled)
                tl.store(numbers + part * (GROUP * 2), top, mask=members < GROUP)
                tl.store(numbers + part * (GROUP * 2) + 1, total, mask=members < GROUP)
                tl.debug_barrier()  # all threads have stored before one of them says so
                is_last = tl.atomic_add(counters + line, 1, sem="acq_rel") == num_parts - 1
                if is_last:
                    top = tl.full((ROWS,), -1e30, tl.float32)
                    total = tl.zeros((ROWS,), tl.float32)
                    sums = tl.zeros((ROWS, DIMS), tl.float32)
                    for other in range(num_parts):
                        there = numbers + other * (GROUP * 2)
                        their_top = tl.load(there, mask=members < GROUP, other=-1e30, cache_modifier=".cg")
                        their_total = tl.load(there + 1, mask=members < GROUP, other=0.0, cache_modifier=".cg")
                        theirs = tl.load(parts + other * (GROUP * DIM), mask=filled, other=0.0, cache_modifier=".cg")
                        higher = tl.maximum(top, their_top)
                        mine, yours = tl.exp2(top - higher), tl.exp2(their_top - higher)
                        sums = sums * mine[:, None] + theirs * yours[:, None]
                        total = total * mine + their_total * yours
                        top = higher
                    tl.store(counters + line, 0)
            if is_last:
                tl.store(target, (sums / total[:, None]).to(out.dtype.element_ty), mask=filled)


@triton.jit
def _prefill(
    q, k_cache, v_cache, out, query_starts, context_lens, block_tables, alibi,
    scale, window, table_stride, q_stride, num_kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of QUERIES new tokens of a sequence. The last tokens have the longest way, and are begun first."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sequence = tl.program_id(1), tl.program_id(2)
    row = tl.load(query_starts + sequence)
    num_new = tl.load(query_starts + sequence + 1) - row
    if (num_new > 1) & (tile * QUERIES < num_new):
        context = tl.load(context_lens + sequence)
        rows = tile * QUERIES + tl.arange(0, QUERIES)
        positions = context - num_new + rows
        dims = tl.arange(0, DIMS)
        filled = (rows < num_new)[:, None] & (dims < DIM)[None, :]
        tokens = (row + rows).to(tl.int64)
        query = tl.load(q + tokens[:, None] * q_stride + head * DIM + dims[None, :], mask=filled, other=0.0)
        slope = 0.0
        if alibi is not None:
            slope = tl.load(alibi + head).to(tl.float32) * LOG2_E
        begin = 0
        first = context - num_new + tile * QUERIES  # the position of the first query
        if WINDOWED:
            begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        end = tl.minimum(first + QUERIES, context)
        # Tiles of keys that every query sees whole need no mask.
        whole = begin if WINDOWED else tl.maximum(first + 1, 0) // KEYS * KEYS
        table = block_tables + sequence * table_stride
        top = tl.full((QUERIES,), -1e30, tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        sums = tl.zeros((QUERIES, DIMS), tl.float32)
        top, total, sums = _prefill_keys(
            begin, whole, top, total, sums, query, positions, k_cache, v_cache, table, slope, scale, window, context,
            head // GROUP, num_kv_heads, alibi is not None, False,
            DIM, DIMS, BLOCK, KEYS, STAGES, WINDOWED,
        )  # fmt: skip
        top, total, sums = _prefill_keys(
            whole, end, top, total, sums, query, positions, k_cache, v_cache, table, slope, scale, window, context,
            head // GROUP, num_kv_heads, alibi is not None, True,
            DIM, DIMS, BLOCK, KEYS, STAGES, WINDOWED,
        )  # fmt: skip
        result = sums / tl.where(total == 0, 1.0, total)[:, None]
        target = out + tokens[:, None] * (num_kv_heads * GROUP * DIM) + head * DIM + dims[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=filled)


@triton.jit
def _prefill_keys(
    begin, end, top, total, sums, query, positions, k_cache, v_cache, table, slope, scale, window, context,
    kv_head, num_kv_heads, BIASED: tl.constexpr, MASKED: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, DIMS)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        tokens = start + tl.arange(0, KEYS)
        inside = tokens < context
        slots = _slots(table, tokens, inside, BLOCK)
        offsets = (slots * num_kv_heads + kv_head)[:, None] * DIM + dims[None, :]
        if MASKED or DIM < DIMS:
            held = inside[:, None] & (dims < DIM)[None, :]
            keys = tl.load(k_cache + offsets, mask=held, other=0.0)
            values = tl.load(v_cache + offsets, mask=held, other=0.0)
        else:
            keys = tl.load(k_cache + offsets)
            values = tl.load(v_cache + offsets)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if BIASED:
            scores += slope * (tokens[None, :] - positions[:, None]).to(tl.float32)
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            if WINDOWED:
                seen &= tokens[None, :] > positions[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        top = higher
    return top, total, sums
