"""`Kernels` in Triton for Hopper GPUs; what Triton does no better than the library comes from engine/kernels/reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.engine.kernels.base import AttentionPlan, SamplingTensors, Weight
from llava.engine.kernels.reference import ReferenceKernels
from llava.engine.kernels.triton import attention as triton_attention
from llava.engine.kernels.triton import linear as triton_linear
from llava.engine.kernels.triton import norm_rope as triton_rows
from llava.engine.kernels.triton import sampling as triton_sampling
from llava.engine.kernels.triton.launch import INTERPRETED

NUM_COUNTERS = 1 << 16  # more than a launch has tiles of output, or sequences times key heads


class TritonKernels(ReferenceKernels):
    """One object serves one stream at a time: kernels that split their work share its counters.

    `overlap` lets a kernel start while the one before it ends; it needs a Hopper GPU or a newer one.
    """

    def __init__(self, device: torch.device, *, overlap: bool = True) -> None:
        super().__init__()
        self._counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        self._overlap = overlap and not INTERPRETED

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return triton_rows.rms_norm(x, None, weight, eps, overlap=self._overlap)

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return triton_rows.rms_norm(x, residual, weight, eps, overlap=self._overlap)

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
        return triton_rows.rope_store_(
            qkv, cos, sin, plan.slots, plan.positions, k_cache, v_cache, num_heads, num_kv_heads, q_norm, k_norm, eps,
            overlap=self._overlap,
        )  # fmt: skip

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
        num_tokens, num_heads, head_dim = q.shape
        out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
        arguments = (q, k_cache, v_cache, out, plan, scale, window, alibi)
        if plan.max_query > 1:
            triton_attention.prefill(*arguments, overlap=self._overlap)
        if plan.max_query == 1 or len(plan.context_lens) > 1:
            triton_attention.decode(*arguments, self._counters, overlap=self._overlap)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return triton_rows.silu_mul(gate_up, overlap=self._overlap)

    def gated_linear(self, x: Tensor, weight: Weight) -> Tensor:
        if len(x) == 1 and x.shape[1] % 16 == 0 and triton_linear.kind_of(weight) != "int4":
            return triton_linear.gemv(x, weight, None, overlap=self._overlap, gated=True)
        return super().gated_linear(x, weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if len(x) > triton_linear.MAX_ROWS or x.shape[1] % 16:
            dense = weight if isinstance(weight, Tensor) else triton_linear.expand(weight, x.dtype)
            return super().linear(x, dense, bias)
        if len(x) == 1:
            return triton_linear.gemv(x, weight, bias, overlap=self._overlap)
        return triton_linear.skinny(x, weight, bias, self._counters, overlap=self._overlap)

    def sample(self, logits: Tensor, rows: SamplingTensors) -> tuple[Tensor, Tensor]:
        return triton_sampling.sample(logits, rows)
