"""The kernels for a CPU without a compiler: those of engine/kernels/reference.py with less overhead.

- Small weights are multiplied in oneDNN's own layout.
- Gathered keys and values go into a buffer that the next layer uses again: the system takes back large blocks when they
  are freed, and allocating them anew costs more than the arithmetic.
- What is the same for all layers of a step (masks, angles, lengths) is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.engine.kernels.base import AttentionParams, AttentionPlan, KVCache, Weight
from llava.engine.kernels.reference import ReferenceKernels, attend_decoding, attend_sequence, decoding_mask, store_


@dataclass
class _StepValues:
    """What the layers of a step share."""

    plan: AttentionPlan
    all_stored: bool
    none_empty: bool
    context_lens: list[int]
    query_starts: list[int]
    angles: tuple[Tensor, Tensor] | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window


def packs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has a layout of its own for weights of this type on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class CpuKernels(ReferenceKernels):
    """One object serves one thread at a time."""

    def __init__(self) -> None:
        self._scratch: dict[str, Tensor] = {}
        self._last: _StepValues | None = None

    def pack(self, weight: Weight) -> Weight:
        """In oneDNN's layout, which multiplies few rows two to four times as fast."""
        if not isinstance(weight, Tensor) or not packs(weight.dtype):
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Tensor) and weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return super().linear(x, weight, bias)

    def attend(self, q: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        step = self._step(plan)
        if plan.max_query == 1 and len(step.context_lens) == len(q) > 1:
            k, v = (self._gather(cache, name, plan, plan.max_context) for name in cache._fields)
            mask = step.masks.get(params.window)
            if mask is None:
                mask = step.masks[params.window] = decoding_mask(params, plan, k.shape[1], q.dtype)
            out = attend_decoding(q, k, v, mask, params.scale)
            return out if step.none_empty else torch.where(plan.context_lens[:, None] > 0, out, 0)
        out = torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)
        for number, context in enumerate(step.context_lens):
            start, end = step.query_starts[number : number + 2]
            if start < end and context:
                k, v = (self._tokens(cache, name, plan, number, context) for name in cache._fields)
                out[start:end] = attend_sequence(q[start:end], k, v, params)
        return out

    def _step(self, plan: AttentionPlan) -> _StepValues:
        if self._last is None or self._last.plan is not plan:
            contexts = plan.context_lens.tolist()
            self._last = _StepValues(
                plan, bool((plan.slots >= 0).all()), min(contexts) > 0, contexts, plan.query_starts.tolist()
            )
        return self._last

    def _angles(self, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        step = self._step(plan)
        if step.angles is None:
            step.angles = super()._angles(cos, sin, plan)
        return step.angles

    def _store_(self, cache: Tensor, new: Tensor, plan: AttentionPlan) -> None:
        if self._step(plan).all_stored:
            cache.view(-1, *cache.shape[2:]).index_copy_(0, plan.slots, new)
        else:
            store_(cache, new, plan.slots)

    def _tokens(self, cache: KVCache, name: str, plan: AttentionPlan, number: int, context: int) -> Tensor:
        """Return the keys or values (context, K, d) of one sequence: a view if its blocks are consecutive, else gathered."""
        pool: Tensor = getattr(cache, name)
        blocks = plan.block_tables[number, : -(-context // pool.shape[1])].tolist()
        if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            return pool[blocks[0] : blocks[-1] + 1].view(-1, *pool.shape[2:])[:context]
        return self._gather(cache, name, plan, context, slice(number, number + 1))[0]

    def _gather(
        self, cache: KVCache, name: str, plan: AttentionPlan, num_tokens: int, sequences: slice = slice(None)
    ) -> Tensor:
        """Return the first tokens' keys or values of some sequences, (S, num_tokens, K, d)."""
        pool: Tensor = getattr(cache, name)
        tables = plan.block_tables[sequences, : -(-num_tokens // pool.shape[1])]
        flat = pool.detach().view(len(pool), -1)
        size, num = (tables.numel(), flat.shape[1]), tables.numel() * flat.shape[1]
        held = self._scratch.get(name)
        if held is None or held.dtype != pool.dtype or held.numel() < num:
            held = self._scratch[name] = torch.empty(num + num // 2, dtype=pool.dtype)
        gathered = torch.index_select(flat, 0, tables.reshape(-1), out=held[:num].view(size))
        return gathered.view(len(tables), -1, *pool.shape[2:])[:, :num_tokens]
