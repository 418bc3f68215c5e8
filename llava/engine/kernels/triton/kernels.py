"""The kernels for GPUs, in Triton, tuned on Hopper; engine/kernels/reference.py for what Triton does no faster."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.engine.kernels.base import AttentionParams, AttentionPlan, KVCache, SamplingTensors, Weight
from llava.engine.kernels.reference import ReferenceKernels
from llava.engine.kernels.triton import attention, linear, norm_rope
from llava.engine.kernels.triton.launch import INTERPRETED
from llava.engine.kernels.triton.sampling import sample

NUM_COUNTERS = 1 << 16  # more than a launch has output tiles, or sequences times key heads


class TritonKernels(ReferenceKernels):
    """One object serves one CUDA stream at a time: kernels that split their work share its counters.

    `overlap` lets a kernel start while the previous one ends; it needs a Hopper GPU or a newer one.
    """

    capturable = True

    def __init__(self, device: torch.device, *, overlap: bool = True) -> None:
        super().__init__()
        self._counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        self._overlap = overlap and not INTERPRETED

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm_rope.rms_norm(x, None, weight, eps, overlap=self._overlap)

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm_rope.rms_norm(x, residual, weight, eps, overlap=self._overlap)

    def rope_store_(self, qkv: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        return norm_rope.rope_store_(qkv, cache, params, plan, overlap=self._overlap)

    def attend(self, q: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        num_tokens, num_heads, head_dim = q.shape
        out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
        if plan.max_query > 1:
            attention.prefill(q, cache, out, params, plan, overlap=self._overlap)
        if plan.max_query == 1 or len(plan.context_lens) > 1:
            attention.decode(q, cache, out, params, plan, self._counters, overlap=self._overlap)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return norm_rope.silu_mul(gate_up, overlap=self._overlap)

    def gated_linear(self, x: Tensor, weight: Weight) -> Tensor:
        if len(x) == 1 and x.shape[1] % 16 == 0 and linear.kind_of(weight) != "int4":
            return linear.gemv(x, weight, None, overlap=self._overlap, gated=True)
        return super().gated_linear(x, weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if len(x) > linear.MAX_ROWS or x.shape[1] % 16:
            dense = weight if isinstance(weight, Tensor) else linear.expand(weight, x.dtype)
            return super().linear(x, dense, bias)
        if len(x) == 1:
            return linear.gemv(x, weight, bias, overlap=self._overlap)
        return linear.skinny(x, weight, bias, self._counters, overlap=self._overlap)

    def sample(self, logits: Tensor, sampling: SamplingTensors) -> tuple[Tensor, Tensor]:
        return sample(logits, sampling)
