"""Attention over a paged KV cache: sequences with one new token (`decode`), or with several (`prefill`).

A step that has both kinds calls both, and each skips the sequences of the other kind. `decode` splits a context among
programs, so that one sequence fills the chip; the last program to finish combines the parts. Shapes as in
engine/kernels/base.py; scores are exponents of 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.engine.kernels.base import AttentionParams, AttentionPlan, KVCache
from llava.engine.kernels.triton.launch import MULTIPROCESSORS, let_next_start, prefetch, wait_for_previous

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = tl.constexpr(32)


@dataclass(frozen=True)
class AttentionTile:
    """How attention kernels cut their work: keys read at a time, queries of a program (prefill), warps, pipeline stages."""

    keys: int
    queries: int = 1
    warps: int = 4
    stages: int = 1


SINGLE_TILE = AttentionTile(keys=32, warps=2, stages=3)  # decoding where every query head has its own key head
GROUPED_TILE = AttentionTile(keys=64, warps=2, stages=3)
PREFILL_TILE = AttentionTile(keys=64, queries=64, warps=4, stages=2)
PROGRAMS_PER_MULTIPROCESSOR = 4


def decode(
    q: Tensor,
    cache: KVCache,
    out: Tensor,
    params: AttentionParams,
    plan: AttentionPlan,
    counters: Tensor,
    *,
    overlap: bool,
    tile: AttentionTile | None = None,
    splits: int | None = None,
) -> None:
    """Write the attention of the sequences with one new token to their tokens of `out` (T, H d)."""
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = cache.k.shape[1:3]
    window = params.window
    num_sequences, group = len(plan.context_lens), num_heads // num_kv_heads
    tile = tile or (SINGLE_TILE if group == 1 else GROUPED_TILE)
    reach = plan.max_context if window is None else min(window, plan.max_context)
    splits = splits or pick_splits(num_sequences * num_kv_heads, triton.cdiv(reach, tile.keys))
    shape = (num_sequences, num_heads, splits) if splits > 1 else (1,)
    partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(2, *shape, dtype=torch.float32, device=q.device)
    kernel = _decode_single if group == 1 else _decode_grouped
    kernel[(num_sequences, num_kv_heads, splits)](
        q, *cache, out, partial, *stats, counters,
        plan.query_starts, plan.context_lens, plan.block_tables, params.alibi,
        params.scale * LOG2_E.value, window or 0, plan.block_tables.stride(0), q.stride(0), num_kv_heads, splits,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        BLOCK=block_size, KEYS=tile.keys, SHARED=splits > 1, STAGES=tile.stages, WINDOWED=window is not None,
        OVERLAP=overlap, num_warps=tile.warps, launch_pdl=overlap,
    )  # fmt: skip


def pick_splits(num_pairs: int, num_steps: int) -> int:
    """Return among how many programs the context of each pair of sequence and key head is split."""
    return max(1, min(PROGRAMS_PER_MULTIPROCESSOR * MULTIPROCESSORS // num_pairs, num_steps, MAX_SPLITS.value))


def prefill(
    q: Tensor,
    cache: KVCache,
    out: Tensor,
    params: AttentionParams,
    plan: AttentionPlan,
    *,
    overlap: bool,
    tile: AttentionTile | None = None,
) -> None:
    """Write the attention of the sequences with several new tokens to their tokens of `out` (T, H d)."""
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = cache.k.shape[1:3]
    window = params.window
    tile = tile or PREFILL_TILE
    grid = (triton.cdiv(plan.max_query, tile.queries), num_heads, len(plan.context_lens))
    _prefill[grid](
        q, *cache, out, plan.query_starts, plan.context_lens, plan.block_tables, params.alibi,
        params.scale * LOG2_E.value, window or 0, plan.block_tables.stride(0), q.stride(0), num_kv_heads,
        GROUP=num_heads // num_kv_heads, DIM=head_dim, DIMS=triton.next_power_of_2(head_dim),
        BLOCK=block_size, KEYS=tile.keys, QUERIES=tile.queries, STAGES=tile.stages, WINDOWED=window is not None,
        OVERLAP=overlap, num_warps=tile.warps, launch_pdl=overlap,
    )  # fmt: skip


@triton.jit
def _share(context, window, splits, KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """Return the first key in reach, this program's keys from begin to end, and how many programs have any."""
    reach = 0
    if WINDOWED:
        reach = tl.maximum(context - window, 0)
    first_tile = reach // KEYS
    num_tiles = tl.cdiv(context, KEYS) - first_tile
    tiles = tl.cdiv(num_tiles, splits)
    begin = (first_tile + tl.program_id(2) * tiles) * KEYS
    return reach, begin, tl.minimum(begin + tiles * KEYS, context), tl.cdiv(num_tiles, tl.maximum(tiles, 1))


@triton.jit
def _locate(table, start, end, kv_head, num_kv_heads, dims, DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Return where `dims` of KEYS keys from `start` lie: a common base, and an offset for each."""
    stride = num_kv_heads * DIM
    if BLOCK >= KEYS:  # all in one block: one lookup, and the same offsets for every tile
        block = tl.load(table + start // BLOCK).to(tl.int64)
        first = (block * BLOCK + start % BLOCK) * stride + kv_head * DIM
        offsets = tl.arange(0, KEYS)[:, None] * stride + dims[None, :]
    else:
        tokens = start + tl.arange(0, KEYS)
        blocks = tl.load(table + tokens // BLOCK, mask=tokens < end, other=0).to(tl.int64)
        first = (kv_head * DIM).to(tl.int64)
        offsets = (blocks * BLOCK + tokens % BLOCK)[:, None] * stride + dims[None, :]
    return first, offsets


@triton.jit
def _read(
    k_cache, v_cache, table, start, end, kv_head, num_kv_heads,
    WHOLE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Load KEYS keys and values of one head from `start`, zeros from `end`; WHOLE means that none is beyond the end."""
    dims = tl.arange(0, DIMS)
    first, offsets = _locate(table, start, end, kv_head, num_kv_heads, dims, DIM, BLOCK, KEYS)
    if WHOLE and DIM == DIMS:
        keys, values = tl.load(k_cache + first + offsets), tl.load(v_cache + first + offsets)
    else:
        held = (start + tl.arange(0, KEYS) < end)[:, None] & (dims < DIM)[None, :]
        keys = tl.load(k_cache + first + offsets, mask=held, other=0.0)
        values = tl.load(v_cache + first + offsets, mask=held, other=0.0)
    return keys, values


@triton.jit
def _prefetch_keys(
    k_cache, v_cache, table, begin, end, kv_head, num_kv_heads,
    DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Prefetch the first keys and values before the previous kernel has ended, which writes only the newest ones."""
    SIZE: tl.constexpr = 128 * 8 // k_cache.dtype.element_ty.primitive_bitwidth
    lines = tl.arange(0, (DIM + SIZE - 1) // SIZE) * SIZE
    for start in range(begin, tl.minimum(end, begin + 4 * KEYS), KEYS):
        first, offsets = _locate(table, start, end, kv_head, num_kv_heads, lines, DIM, BLOCK, KEYS)
        prefetch(k_cache + first + offsets)
        prefetch(v_cache + first + offsets)


@triton.jit
def _is_last(counters, line, num_parts):
    """Return whether this program is the last of those that share a line; what the others stored is then visible."""
    tl.debug_barrier()  # all threads have stored before one of them says so
    return tl.atomic_add(counters + line, 1, sem="acq_rel") == num_parts - 1


@triton.jit
def _join(partial, tops, totals, head_line, target, splits, num_parts, DIM: tl.constexpr, DIMS: tl.constexpr):
    """Combine the parts of one query's context. All parts are read at once."""
    parts = tl.arange(0, MAX_SPLITS)
    there = parts < num_parts
    line = head_line.to(tl.int64) * splits + parts
    dims = tl.arange(0, DIMS)
    top = tl.load(tops + line, mask=there, other=-1e30, cache_modifier=".cg")
    total = tl.load(totals + line, mask=there, other=0.0, cache_modifier=".cg")
    held = there[:, None] & (dims < DIM)[None, :]
    sums = tl.load(partial + line[:, None] * DIM + dims[None, :], mask=held, other=0.0, cache_modifier=".cg")
    shrink = tl.exp2(top - tl.max(top, axis=0))
    result = tl.sum(sums * shrink[:, None], axis=0) / tl.sum(total * shrink, axis=0)
    tl.store(target + dims, result.to(target.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=["window", "splits"])
def _decode_single(
    q, k_cache, v_cache, out, partial, tops, totals, counters, query_starts, context_lens, block_tables, alibi,
    scale, window, table_stride, q_stride, num_kv_heads, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SHARED: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query head and its own key head.

    Each of the KEYS lanes keeps a softmax of its own, and they are combined after the last key, so that the only exchange
    between threads in the loop is the sum over a head's width.
    """
    let_next_start(OVERLAP)
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_starts + sequence)
    next_row = tl.load(query_starts + sequence + 1)
    context = tl.load(context_lens + sequence)
    table = block_tables + sequence * table_stride
    reach, begin, end, num_parts = _share(context, window, splits, KEYS, WINDOWED)
    if SHARED and OVERLAP:
        _prefetch_keys(k_cache, v_cache, table, begin, end, head, num_kv_heads, DIM, BLOCK, KEYS)
    wait_for_previous(OVERLAP)
    if next_row - row == 1:
        dims = tl.arange(0, DIMS)
        target = out + row.to(tl.int64) * (num_kv_heads * DIM) + head * DIM
        if context == 0:
            tl.store(target + dims, tl.zeros((DIMS,), out.dtype.element_ty), mask=dims < DIM)
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
                keys, values = _read(
                    k_cache, v_cache, table, start, end, head, num_kv_heads, False, DIM, DIMS, BLOCK, KEYS
                )
                tokens = start + tl.arange(0, KEYS)
                scores = tl.sum(keys.to(tl.float32) * query, axis=1)
                if alibi is not None:
                    scores += slope * (tokens - (context - 1)).to(tl.float32)
                scores = tl.where((tokens < end) & (tokens >= reach), scores, float("-inf"))
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
            if SHARED:
                line = sequence * num_kv_heads + head
                part = line.to(tl.int64) * splits + tl.program_id(2)
                tl.store(partial + part * DIM + dims, result, mask=dims < DIM)
                tl.store(tops + part, best)
                tl.store(totals + part, weight)
                if _is_last(counters, line, num_parts):
                    _join(partial, tops, totals, line, target, splits, num_parts, DIM, DIMS)
                    tl.store(counters + line, 0)
            else:
                tl.store(target + dims, (result / weight).to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=["window", "splits"])
def _decode_grouped(
    q, k_cache, v_cache, out, partial, tops, totals, counters, query_starts, context_lens, block_tables, alibi,
    scale, window, table_stride, q_stride, num_kv_heads, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SHARED: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All query heads that share a key head, as the rows of a tensor-core product."""
    let_next_start(OVERLAP)
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_starts + sequence)
    next_row = tl.load(query_starts + sequence + 1)
    context = tl.load(context_lens + sequence)
    table = block_tables + sequence * table_stride
    reach, begin, end, num_parts = _share(context, window, splits, KEYS, WINDOWED)
    if SHARED and OVERLAP:
        _prefetch_keys(k_cache, v_cache, table, begin, end, kv_head, num_kv_heads, DIM, BLOCK, KEYS)
    wait_for_previous(OVERLAP)
    if next_row - row == 1:
        dims = tl.arange(0, DIMS)
        members = tl.arange(0, ROWS)
        filled = (members < GROUP)[:, None] & (dims < DIM)[None, :]
        heads = kv_head * GROUP + members
        places = heads[:, None] * DIM + dims[None, :]
        target = out + row.to(tl.int64) * (num_kv_heads * GROUP * DIM)
        if context == 0:
            tl.store(target + places, tl.zeros((ROWS, DIMS), out.dtype.element_ty), mask=filled)
        if begin < end:
            query = tl.load(q + row.to(tl.int64) * q_stride + places, mask=filled, other=0.0)
            slope = tl.zeros((ROWS,), tl.float32)
            if alibi is not None:
                slope = tl.load(alibi + heads, mask=members < GROUP, other=0.0).to(tl.float32) * LOG2_E
            top = tl.full((ROWS,), -1e30, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, DIMS), tl.float32)
            for start in tl.range(begin, end, KEYS, num_stages=STAGES):
                keys, values = _read(
                    k_cache, v_cache, table, start, end, kv_head, num_kv_heads, False, DIM, DIMS, BLOCK, KEYS
                )
                tokens = start + tl.arange(0, KEYS)
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
                if alibi is not None:
                    scores += slope[:, None] * (tokens - (context - 1)).to(tl.float32)[None, :]
                scores = tl.where(((tokens < end) & (tokens >= reach))[None, :], scores, float("-inf"))
                higher = tl.maximum(top, tl.max(scores, axis=1))
                shrink = tl.exp2(top - higher)
                weights = tl.exp2(scores - higher[:, None])
                total = total * shrink + tl.sum(weights, axis=1)
                sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
                top = higher
            if SHARED:
                line = sequence * num_kv_heads + kv_head
                part = (line * GROUP + members).to(tl.int64) * splits + tl.program_id(2)
                tl.store(partial + part[:, None] * DIM + dims[None, :], sums, mask=filled)
                tl.store(tops + part, top, mask=members < GROUP)
                tl.store(totals + part, total, mask=members < GROUP)
                if _is_last(counters, line, num_parts):
                    for member in tl.static_range(GROUP):
                        head = kv_head * GROUP + member
                        _join(
                            partial, tops, totals, line * GROUP + member, target + head * DIM, splits, num_parts, DIM, DIMS
                        )  # fmt: skip
                    tl.store(counters + line, 0)
            else:
                tl.store(target + places, (sums / total[:, None]).to(out.dtype.element_ty), mask=filled)


@triton.jit(do_not_specialize=["window"])
def _prefill(
    q, k_cache, v_cache, out, query_starts, context_lens, block_tables, alibi,
    scale, window, table_stride, q_stride, num_kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of QUERIES new tokens of a sequence. The last tokens have the most keys, and are started first."""
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
        # Tiles of keys that every query attends to as a whole need no mask.
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
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        tokens = start + tl.arange(0, KEYS)
        keys, values = _read(
            k_cache, v_cache, table, start, context, kv_head, num_kv_heads, not MASKED, DIM, DIMS, BLOCK, KEYS
        )
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if BIASED:
            scores = scores * scale + slope * (tokens[None, :] - positions[:, None]).to(tl.float32)
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            if WINDOWED:
                seen &= tokens[None, :] > positions[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))
        rate = 1.0 if BIASED else scale  # multiplied late, where it is fused with the subtraction
        higher = tl.maximum(top, tl.max(scores, axis=1) * rate)
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores * rate - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        top = higher
    return top, total, sums
