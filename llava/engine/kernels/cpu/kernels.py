"""The engine's arithmetic on a CPU: engine/kernels/reference.py's, with what costs most there done otherwise.

Small weights are multiplied in oneDNN's own layout. What a layer gathers goes into memory that the next one uses again:
the system takes large pieces back when they are freed, and giving them out anew costs more than the arithmetic. And what
is the same for all layers of a step is worked out once. None of this would survive a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.engine.kernels.base import AttentionPlan, Weight
from llava.engine.kernels.reference import ReferenceKernels, attend_rows, attend_sequence, decoding_mask, store_


@dataclass
class _Step:
    """What layers of a step share."""

    plan: AttentionPlan
    all_stored: bool
    none_empty: bool
    context_lens: list[int]
    query_starts: list[int]
    angles: tuple[Tensor, Tensor] | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout of its own for such weights on this processor, as for bfloat16 not on every one."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class CpuKernels(ReferenceKernels):
    """One object serves one thread at a time."""

    def __init__(self) -> None:
        self._scratch: dict[str, Tensor] = {}
        self._last: _Step | None = None

    def pack(self, weight: Weight) -> Weight:
        """In oneDNN's layout, which multiplies few rows two to four times as fast."""
        if not isinstance(weight, Tensor) or not packs(weight.dtype):
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Tensor) and weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return super().linear(x, weight, bias)

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
        step = self._step(plan)
        if plan.max_query == 1 and len(step.context_lens) == len(q) > 1:
            k, v = (
                self._gather("k", k_cache, plan, plan.max_context),
                self._gather("v", v_cache, plan, plan.max_context),
            )
            if window not in step.masks:
                step.masks[window] = decoding_mask(plan, k.shape[1:3], window, alibi, q.dtype)
            out = attend_rows(q, k, v, step.masks[window], scale)
            return out if step.none_empty else torch.where(plan.context_lens[:, None] > 0, out, 0)
        out = torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)
        for row, context in enumerate(step.context_lens):
            start, end = step.query_starts[row : row + 2]
            if start < end and context:
                k, v = self._keys("k", k_cache, plan, row, context), self._keys("v", v_cache, plan, row, context)
                out[start:end] = attend_sequence(q[start:end], k, v, scale, window, alibi)
        return out

    def _step(self, plan: AttentionPlan) -> _Step:
        if self._last is None or self._last.plan is not plan:
            contexts = plan.context_lens.tolist()
            self._last = _Step(
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

    def _keys(self, name: str, cache: Tensor, plan: AttentionPlan, row: int, context: int) -> Tensor:
        """The keys (n, K, d) of one sequence: where they lie, if its blocks follow one another, else gathered."""
        blocks = plan.block_tables[row, : -(-context // cache.shape[1])].tolist()
        if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            return cache[blocks[0] : blocks[-1] + 1].view(-1, *cache.shape[2:])[:context]
        return self._gather(name, cache, plan, context, slice(row, row + 1))[0]

    def _gather(
        self, name: str, cache: Tensor, plan: AttentionPlan, num_tokens: int, rows: slice = slice(None)
    ) -> Tensor:
        """The first tokens of each sequence as (S, num_tokens, K, d)."""
        tables = plan.block_tables[rows, : -(-num_tokens // cache.shape[1])]
        flat = cache.detach().view(len(cache), -1)  # nobody trains through this
        size, num = (tables.numel(), flat.shape[1]), tables.numel() * flat.shape[1]
        held = self._scratch.get(name)
        if held is None or held.dtype != cache.dtype or held.numel() < num:
            held = self._scratch[name] = torch.empty(num + num // 2, dtype=cache.dtype)
        gathered = torch.index_select(flat, 0, tables.reshape(-1), out=held[:num].view(size))
        return gathered.view(len(tables), -1, *cache.shape[2:])[:, :num_tokens]
