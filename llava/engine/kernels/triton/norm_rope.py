"""Norms, rotary embeddings with the write to the KV cache, and the activation of the MLP.

Each kernel reads its input once; the arithmetic is in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llava.engine.kernels.base import AttentionParams, AttentionPlan, KVCache
from llava.engine.kernels.triton.launch import let_next_start, wait_for_previous

MANY_TOKENS = 256  # from this number on, a program of rope_store_ takes more heads
GATE_WIDTH = 2048


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, overlap: bool) -> Tensor:
    """Return the RMS norm of x (T, D); with a residual, that of residual + x, which is written to `residual`."""
    out = torch.empty_like(x)
    num_rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(num_rows,)](
        x, residual, weight, out, width, eps,
        BLOCK=block, OVERLAP=overlap, num_warps=max(1, min(16, block // 512)), launch_pdl=overlap,
    )  # fmt: skip
    return out


def rope_store_(qkv: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan, *, overlap: bool) -> Tensor:
    """`Kernels.rope_store_`."""
    num_tokens, head_dim = len(qkv), cache.k.shape[3]
    num_heads, num_kv_heads, cos = params.num_heads, params.num_kv_heads, params.cos
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    heads = 16 if num_tokens >= MANY_TOKENS else 8
    groups = triton.cdiv(num_heads, heads), triton.cdiv(num_kv_heads, heads)
    _rope_store[(num_tokens, groups[0] + 2 * groups[1])](
        qkv, q, cos, params.sin, plan.slots, plan.positions, *cache, params.q_norm, params.k_norm, params.norm_eps,
        0 if cos is None else cos.stride(0), num_heads, num_kv_heads, groups[0], groups[1],
        HALF=head_dim // 2, BLOCK=triton.next_power_of_2(head_dim // 2), HEADS=heads,
        OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return q


def silu_mul(gate_up: Tensor, *, overlap: bool) -> Tensor:
    """`Kernels.silu_mul`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, triton.cdiv(width, GATE_WIDTH))
    _silu_mul[grid](gate_up, out, width, BLOCK=GATE_WIDTH, OVERLAP=overlap, num_warps=8, launch_pdl=overlap)
    return out


@triton.jit
def _rms_norm(x, residual, weight, out, width, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        stored = values.to(residual.dtype.element_ty)
        tl.store(residual + row + columns, stored, mask=inside)
        values = stored.to(tl.float32)  # what later layers will read
    values *= tl.rsqrt(tl.sum(values * values) / width + eps)
    tl.store(out + row + columns, (values * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rope_store(
    qkv, q, cos, sin, slots, positions, k_cache, v_cache, q_norm, k_norm, eps,
    table_stride, num_heads, num_kv_heads, q_groups, kv_groups,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program has some heads of one token, all of them queries, keys or values, as two halves of a head's width."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    is_query = group < q_groups
    is_value = group >= q_groups + kv_groups
    # This program's first head among its own kind (query, key, value), and where its kind begins.
    head = (group - tl.where(is_query, 0, tl.where(is_value, q_groups + kv_groups, q_groups))) * HEADS
    before = tl.where(is_query, 0, tl.where(is_value, num_heads + num_kv_heads, num_heads))
    heads = head + tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, BLOCK)[None, :]
    inside = (heads < tl.where(is_query, num_heads, num_kv_heads)) & (dims < HALF)
    source = qkv + (token * (num_heads + 2 * num_kv_heads) + before + heads) * (2 * HALF) + dims
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if not is_value:
        if q_norm is not None:
            mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
            rate = tl.rsqrt(mean + eps)[:, None]
            first *= rate * _either(is_query, q_norm, k_norm, dims, HALF)
            second *= rate * _either(is_query, q_norm + HALF, k_norm + HALF, dims, HALF)
        if cos is not None:
            angles = tl.load(positions + token) * table_stride + dims
            c = tl.load(cos + angles, mask=dims < HALF, other=0.0).to(tl.float32)
            s = tl.load(sin + angles, mask=dims < HALF, other=0.0).to(tl.float32)
            first, second = first * c - second * s, second * c + first * s
    if is_query:
        target = q + (token * num_heads + heads) * (2 * HALF) + dims
        tl.store(target, first.to(q.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(q.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        place = (slot * num_kv_heads + heads) * (2 * HALF) + dims
        inside &= slot >= 0
        dtype = k_cache.dtype.element_ty
        if is_value:
            tl.store(v_cache + place, first.to(dtype), mask=inside)
            tl.store(v_cache + place + HALF, second.to(dtype), mask=inside)
        else:
            tl.store(k_cache + place, first.to(dtype), mask=inside)
            tl.store(k_cache + place + HALF, second.to(dtype), mask=inside)


@triton.jit
def _either(is_query, q_norm, k_norm, dims, HALF: tl.constexpr):
    return tl.where(
        is_query,
        tl.load(q_norm + dims, mask=dims < HALF, other=0.0).to(tl.float32),
        tl.load(k_norm + dims, mask=dims < HALF, other=0.0).to(tl.float32),
    )


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)
