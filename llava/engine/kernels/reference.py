"""The kernels in PyTorch's operators: the reference for the other back ends, and their fallback.

Shapes as in base.py. On a GPU, attention of a step in which a sequence has several new tokens reads lengths on the host,
so that such a step cannot be captured in a CUDA graph; everything else can.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.engine.kernels.base import AttentionParams, AttentionPlan, Kernels, KVCache, SamplingTensors, Weight
from llava.engine.kernels.philox import uniform
from llava.engine.kernels.quantized import QuantizedWeight

CACHED_WEIGHTS = 1 << 20  # int8 weights that a CPU expands at a time: they stay in its cache until they are multiplied


class ReferenceKernels(Kernels):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def rope_store_(self, qkv: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        num_heads, num_kv_heads, eps = params.num_heads, params.num_kv_heads, params.norm_eps
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, -1)
        qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
        if params.q_norm is not None and params.k_norm is not None:
            q, k = qk.split([num_heads, num_kv_heads], dim=1)
            qk = torch.cat([self.rms_norm(q, params.q_norm, eps), self.rms_norm(k, params.k_norm, eps)], dim=1)
        if params.cos is not None and params.sin is not None:
            qk = rotate(qk, *self._angles(params.cos, params.sin, plan))
        q, k = qk.split([num_heads, num_kv_heads], dim=1)
        self._store_(cache.k, k, plan)
        self._store_(cache.v, v, plan)
        return q

    def _angles(self, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        return cos.index_select(0, plan.positions), sin.index_select(0, plan.positions)

    def _store_(self, cache: Tensor, new: Tensor, plan: AttentionPlan) -> None:
        store_(cache, new, plan.slots)

    def attend(self, q: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        decoding = plan.max_query == 1 and len(q) == len(plan.context_lens)
        if decoding and (len(q) > 1 or q.device.type != "cpu"):
            k, v = (_gather(part, plan.block_tables, plan.max_context) for part in cache)
            out = attend_decoding(q, k, v, decoding_mask(params, plan, k.shape[1], q.dtype), params.scale)
            # A sequence with an empty context has attended to its first slot, since no mask may hide every key.
            return torch.where(plan.context_lens[:, None] > 0, out, 0)
        out = torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        starts, context_lens = plan.query_starts.tolist(), plan.context_lens.tolist()
        for number, (start, end, context) in enumerate(zip(starts[:-1], starts[1:], context_lens, strict=True)):
            if start < end and context:
                k, v = (_gather(part, plan.block_tables[number : number + 1], context)[0] for part in cache)
                out[start:end] = attend_sequence(q[start:end], k, v, params)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Tensor):
            return F.linear(x, weight, bias)
        out = _linear_int8(x, weight) if weight.kind == "int8" else F.linear(x, weight.dequantize(x.dtype))
        return out if bias is None else out + bias

    def sample(self, logits: Tensor, sampling: SamplingTensors) -> tuple[Tensor, Tensor]:
        logits = logits.float()
        tokens = logits.argmax(dim=-1)
        if not sampling.all_greedy:
            tokens = torch.where(sampling.temperature == 0, tokens, _draw(logits, sampling))
        logprobs = logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
        return tokens, logprobs


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of x (T, heads, d) by each token's angles (T, d/2 or d).

    Angles in float32 make the arithmetic float32.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def store_(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """Write (T, K, d) to the slots of (B, b, K, d) that are not -1."""
    stored, flat = slots >= 0, cache.view(-1, *cache.shape[2:])
    if slots.device.type != "cpu":
        slots, new = without_gaps(flat, new.to(cache.dtype), slots)
    elif not stored.all():
        slots, new = slots[stored], new[stored]
    flat.index_copy_(0, slots, new.to(cache.dtype))


def without_gaps(cache: Tensor, new: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Slots, all of them in the cache (n, K, d), and what is written to each, without reading back how many are stored.

    A token that is not stored repeats the write of the first stored one; where none is, slot 0 is written as it was.
    """
    stored = slots >= 0
    source = torch.where(stored, torch.arange(len(slots), device=slots.device), stored.int().argmax())
    slots = slots[source].clamp(min=0)
    return slots, torch.where(stored.any(), new[source], cache[slots])


def _gather(cache: Tensor, block_tables: Tensor, num_tokens: int) -> Tensor:
    """Return the first tokens of each sequence, (S, num_tokens, K, d). `index_select` is three times as fast as indexing."""
    block = cache.shape[1]
    tables = block_tables[:, : -(-num_tokens // block)]
    gathered = cache.index_select(0, tables.reshape(-1))
    return gathered.view(len(tables), tables.shape[1] * block, *cache.shape[2:])[:, :num_tokens]


def attend_decoding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the attention (S, H d) of one query of each sequence, q (S, H, d), over its keys (S, n, K, d).

    SDPA gets the queries that share a key head in the dimension of a sequence's queries.
    """
    num_sequences, num_heads, width = q.shape
    grouped = q.reshape(num_sequences, k.shape[2], -1, width)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.reshape(num_sequences, num_heads * width)


def decoding_mask(params: AttentionParams, plan: AttentionPlan, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores of each sequence's one query, (S, 1 or K, 1 or H / K, num_keys)."""
    window, alibi = params.window, params.alibi
    last = plan.context_lens.clamp(min=1)[:, None] - 1
    back = last - torch.arange(num_keys, device=last.device, dtype=last.dtype)  # (S, num_keys): distance to the query
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    bias = torch.zeros((), dtype=dtype, device=last.device)
    if alibi is not None:
        bias = (alibi.view(1, params.num_kv_heads, -1, 1) * -back[:, None, None, :]).to(dtype)
    return torch.where(hidden[:, None, None, :], -torch.inf, bias)


def attend_sequence(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """Return the attention (n, H d) of a sequence's last tokens q (n, H, d) over all its keys and values (m, K, d)."""
    window, alibi, num_new, num_keys = params.window, params.alibi, len(q), len(k)
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
        scale=params.scale,
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


def _draw(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """Sample one token of each row of logits (S, V), by inverting the cumulative distribution at its random number."""
    temperature = torch.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None]
    scaled = logits / temperature
    if not sampling.unlimited:
        scaled = scaled.masked_fill(scaled < _lowest_kept(scaled, sampling), -torch.inf)
    # In float64: sums in float32 over a large vocabulary favour some tokens by more than rounding.
    cumulative = scaled.softmax(dim=-1).double().cumsum(dim=-1)
    target = uniform(sampling.seeds, sampling.positions).double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def _lowest_kept(scaled: Tensor, sampling: SamplingTensors) -> Tensor:
    """Return the smallest value (S, 1) that top_k, top_p and min_p all keep. Equal values are kept or dropped together."""
    ordered = scaled.sort(dim=-1, descending=True).values
    num_tokens = scaled.shape[1]
    num_kept = torch.where(sampling.top_k == 0, num_tokens, sampling.top_k).clamp(max=num_tokens)
    kth = ordered.gather(1, num_kept[:, None].long() - 1)
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    above = probabilities.cumsum(dim=-1) - probabilities  # the probability of all more probable tokens
    top_p = sampling.top_p[:, None]
    inside = ((above < top_p) | (top_p == 1)) & (ordered >= ordered[:, :1] + sampling.min_p[:, None].log())
    inside &= ordered > -torch.inf
    return torch.where(inside, ordered, torch.inf).amin(dim=-1, keepdim=True)
