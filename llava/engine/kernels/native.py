"""The engine's arithmetic on a CPU with a compiler: what native.cpp does in one pass, and cpu.py's for the rest.

Few new tokens at a time, as in decoding, cost more in starting operators and in gathering keys than in arithmetic. native.cpp
reads keys and values where they lie, and 8-bit weights as they are. Shapes that it was not written for go to cpu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.engine.kernels.contract import AttentionPlan, Weight
from llava.engine.kernels.cpu import CpuKernels
from llava.engine.kernels.native_build import Library
from llava.engine.kernels.quantized import QuantizedWeight

LANES = 16  # numbers that native.cpp takes at once
FEW_ROWS = 16  # more rows are multiplied faster by expanding 8-bit weights for a product of PyTorch's


class NativeKernels(CpuKernels):
    """`library` is for one type of numbers; tensors of others, of a test say, go to cpu.py."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        super().__init__()
        self._library, self._dtype = library, dtype

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._rms_norm(None, x, weight, eps) if self._takes(x, weight) else super().rms_norm(x, weight, eps)

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self._takes(x, residual, weight):
            return self._rms_norm(x, residual, weight, eps)
        return super().add_rms_norm_(x, residual, weight, eps)

    def _rms_norm(self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(residual)
        width = residual.shape[-1]
        self._library.rms_norm(
            _at(x), _at(residual), _at(weight), _at(out), residual.numel() // width, width, eps, torch.get_num_threads()
        )
        return out

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
        given = [tensor for tensor in (cos, sin, q_norm, k_norm) if tensor is not None]
        if not self._takes(qkv, k_cache, v_cache, *given):
            return super().rope_store_(
                qkv, cos, sin, plan, k_cache, v_cache, num_heads, num_kv_heads, q_norm=q_norm, k_norm=k_norm, eps=eps
            )
        q = qkv.new_empty(len(qkv), num_heads, k_cache.shape[-1])
        self._library.rope_store(
            _at(qkv), _at(cos), _at(sin), 0 if cos is None else cos.shape[1], _at(plan.positions), _at(plan.slots),
            _at(q_norm), _at(k_norm), eps, _at(q), _at(k_cache), _at(v_cache),
            len(qkv), num_heads, num_kv_heads, k_cache.shape[-1], torch.get_num_threads(),
        )  # fmt: skip
        return q

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
        num_rows, num_heads, width = q.shape
        if plan.max_query != 1 or len(plan.context_lens) != num_rows or not self._takes(q, k_cache, v_cache):
            return super().attend(q, k_cache, v_cache, plan, scale, window=window, alibi=alibi)
        out = q.new_empty(num_rows, num_heads * width)
        self._library.attend(
            _at(q), _at(k_cache), _at(v_cache), _at(plan.block_tables), plan.block_tables.stride(0),
            _at(plan.context_lens), _at(alibi), scale, window or 0, _at(out),
            num_rows, num_heads, k_cache.shape[2], width, k_cache.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if not self._takes(gate_up):
            return super().silu_mul(gate_up)
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        self._library.silu_mul(_at(gate_up), _at(out), rows, width // 2, torch.get_num_threads())
        return out

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        few = isinstance(weight, QuantizedWeight) and weight.kind == "int8" and len(x) <= FEW_ROWS
        if not few or x.dtype != torch.float32 or weight.shape[0] < 4 or not self._takes(x):
            return super().linear(x, weight, bias)
        outputs, width = weight.shape
        out = x.new_empty(len(x), outputs)
        self._library.linear_int8(
            _at(x), _at(weight.data), _at(weight.scales), _at(out), len(x), width, outputs, torch.get_num_threads()
        )
        return out if bias is None else out.add_(bias)

    def _takes(self, *tensors: Tensor) -> bool:
        return all(
            tensor.dtype == self._dtype and tensor.is_contiguous() and tensor.shape[-1] % LANES == 0
            for tensor in tensors
        )


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
