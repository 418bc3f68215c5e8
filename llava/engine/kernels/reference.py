"""The engine's arithmetic in PyTorch's own operators: the reference, and what runs on a CPU.

Letters as in base.py. On a GPU, attention of a step with more than one new token per sequence reads lengths on the
host, so such a step cannot be captured in a graph; everything else can.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.engine.kernels.base import AttentionPlan, SamplingTensors, Weight
from llava.engine.kernels.philox import uniform
from llava.engine.kernels.quantized import QuantizedWeight

CACHED_WEIGHTS = 1 << 20  # so many weights at a time are expanded on a CPU: they stay in its cache until they are used


class ReferenceKernels:
    """`Kernels` by PyTorch operators."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(x), weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def add_layer_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return self.layer_norm(residual.add_(x), weight, bias, eps)

    def rope_store_(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        plan: AttentionPlan,
        k_cache: Tensor,
        v_cache: Tensor,
        num_heads: int,
        num_kv_heads: int,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
        turned, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
        if q_norm is not None and k_norm is not None:
            q, k = turned.split([num_heads, num_kv_heads], dim=1)
            turned = torch.cat([self.rms_norm(q, q_norm, eps), self.rms_norm(k, k_norm, eps)], dim=1)
        if cos is not None and sin is not None:
            turned = rotate(turned, *self._angles(cos, sin, plan))
        q, k = turned.split([num_heads, num_kv_heads], dim=1)
        self._store_(k_cache, k, plan)
        self._store_(v_cache, v, plan)
        return q

    def _angles(self, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        return cos.index_select(0, plan.positions), sin.index_select(0, plan.positions)

    def _store_(self, cache: Tensor, new: Tensor, plan: AttentionPlan) -> None:
        store_(cache, new, plan.slots)

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: AttentionPlan,
        scale: float,
        *,
        window: int | None = None,
        alibi: Tensor | None = None,
    ) -> Tensor:
        decoding = plan.max_query == 1 and len(q) == len(plan.context_lens)
        if decoding and (len(q) > 1 or q.device.type != "cpu"):
            return _attend_one_token_each(q, k_cache, v_cache, plan, scale, window, alibi)
        out = torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        starts, context_lens = plan.query_starts.tolist(), plan.context_lens.tolist()
        for row, (start, end, context) in enumerate(zip(starts[:-1], starts[1:], context_lens, strict=True)):
            if start < end and context:
                k, v = (_gather(cache, plan.block_tables[row : row + 1], context)[0] for cache in (k_cache, v_cache))
                out[start:end] = attend_sequence(q[start:end], k, v, scale, window, alibi)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gated_linear(self, x: Tensor, weight: Weight) -> Tensor:
        return self.silu_mul(self.linear(x, weight))

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def pack(self, weight: Weight) -> Weight:
        return weight

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Tensor):
            return F.linear(x, weight, bias)
        out = _linear_int8(x, weight) if weight.kind == "int8" else F.linear(x, weight.dequantize(x.dtype))
        return out if bias is None else out + bias

    def sample(self, logits: Tensor, rows: SamplingTensors) -> tuple[Tensor, Tensor]:
        logits = logits.float()
        tokens = logits.argmax(dim=-1)
        if not rows.all_greedy:
            tokens = torch.where(rows.temperature == 0, tokens, _draw(logits, rows))
        logprobs = logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
        return tokens, logprobs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of x (T, heads, d) by the angles of each token (T, d/2 or d). Angles in float32 make the
    arithmetic float32."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def store_(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """Write (T, K, d) to the slots of (B, b, K, d) that are not -1."""
    stored = slots >= 0
    if slots.device.type != "cpu":
        # Without asking the device how many there are: a row that is not stored repeats what the first stored one does.
        source = torch.where(stored, torch.arange(len(slots), device=slots.device), stored.int().argmax())
        slots, new = slots[source], new[source]
    elif not stored.all():
        slots, new = slots[stored], new[stored]
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new.to(cache.dtype))


def _gather(cache: Tensor, block_tables: Tensor, num_tokens: int) -> Tensor:
    """The first tokens of each sequence as (S, num_tokens, K, d). `index_select` is three times as fast as indexing."""
    block = cache.shape[1]
    tables = block_tables[:, : -(-num_tokens // block)]
    gathered = cache.index_select(0, tables.reshape(-1))
    return gathered.view(len(tables), tables.shape[1] * block, *cache.shape[2:])[:, :num_tokens]


def _attend_one_token_each(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    alibi: Tensor | None,
) -> Tensor:
    """Decoding: every sequence has one query."""
    k, v = (_gather(cache, plan.block_tables, plan.max_context) for cache in (k_cache, v_cache))
    out = attend_rows(q, k, v, decoding_mask(plan, k.shape[1:3], window, alibi, q.dtype), scale)
    # An empty row has read its first slot, so that no row is without a key.
    return torch.where(plan.context_lens[:, None] > 0, out, 0)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One query each, q (S, H, d), over keys (S, n, K, d); (S, H d). Queries that share a key head stand where a
    sequence's queries would."""
    num_rows, num_heads, width = q.shape
    grouped = q.reshape(num_rows, k.shape[2], -1, width)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.reshape(num_rows, num_heads * width)


def decoding_mask(
    plan: AttentionPlan, size: tuple[int, ...], window: int | None, alibi: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What is added to the scores of each sequence's one query, for `size` keys and key heads: (S, 1 or K, 1 or H / K, n)."""
    num_keys, num_kv_heads = size
    last = plan.context_lens.clamp(min=1)[:, None] - 1
    back = last - torch.arange(num_keys, device=last.device, dtype=last.dtype)  # (S, n): how far each key lies back
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    bias = torch.zeros((), dtype=dtype, device=last.device)
    if alibi is not None:
        bias = (alibi.view(1, num_kv_heads, -1, 1) * -back[:, None, None, :]).to(dtype)
    return torch.where(hidden[:, None, None, :], -torch.inf, bias)


def attend_sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, alibi: Tensor | None) -> Tensor:
    """Attention of the last tokens q (n, H, d) of a sequence over all its keys (m, K, d); returns (n, H d)."""
    num_new, num_keys = len(q), len(k)
    mask = None
    if (num_new > 1 and num_new < num_keys) or alibi is not None or (window is not None and window < num_keys):
        back = torch.arange(num_keys - num_new, num_keys, device=q.device)[:, None] - torch.arange(
            num_keys, device=q.device
        )
        mask = back >= 0 if window is None else (back >= 0) & (back < window)
        if alibi is not None:
            mask = torch.where(mask, alibi[:, None, None] * -back, -torch.inf).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and num_new > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1).reshape(num_new, -1)


def _linear_int8(x: Tensor, weight: QuantizedWeight) -> Tensor:
    scales = weight.scales.to(x.dtype)
    if x.device.type != "cpu":
        return F.linear(x, weight.data.to(x.dtype)) * scales
    if x.dtype == torch.bfloat16 and len(x) <= 8:  # torch's kernel wins for few rows, and only in bfloat16
        return torch._weight_int8pack_mm(x, weight.data, scales)
    step = max(1, CACHED_WEIGHTS // weight.shape[1])
    parts = [F.linear(x, part.to(x.dtype)) for part in weight.data.split(step)]
    return torch.cat(parts, dim=1) * scales


def _draw(logits: Tensor, rows: SamplingTensors) -> Tensor:
    """One token for each row of (S, V), by inverting the cumulative distribution at the row's random number."""
    warm = torch.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
    scaled = logits / warm
    if not rows.unlimited:
        scaled = scaled.masked_fill(scaled < _lowest_kept(scaled, rows), -torch.inf)
    # In float64: float32 sums of a large vocabulary would favour some tokens by more than its rounding.
    cumulative = scaled.softmax(dim=-1).double().cumsum(dim=-1)
    target = uniform(rows.seeds, rows.positions).double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def _lowest_kept(scaled: Tensor, rows: SamplingTensors) -> Tensor:
    """The smallest value (S, 1) that top_k, top_p and min_p all keep. Equal values are kept or dropped together."""
    ordered = scaled.sort(dim=-1, descending=True).values
    num_tokens = scaled.shape[1]
    num_kept = torch.where(rows.top_k == 0, num_tokens, rows.top_k).clamp(max=num_tokens)
    kth = ordered.gather(1, num_kept[:, None].long() - 1)
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    above = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens have together
    top_p = rows.top_p[:, None]
    inside = ((above < top_p) | (top_p == 1)) & (ordered >= ordered[:, :1] + rows.min_p[:, None].log())
    inside &= ordered > -torch.inf
    return torch.where(inside, ordered, torch.inf).amin(dim=-1, keepdim=True)
