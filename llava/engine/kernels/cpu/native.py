"""The engine's arithmetic on a CPU with a compiler: what native.cpp does in one pass, and kernels.py's for the rest.

Few new tokens at a time, as in decoding, cost more in starting operators and in gathering keys than in arithmetic.
native.cpp reads keys and values where they lie, and 8-bit weights as they are. What it was not written for goes to kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.engine.kernels.base import AttentionPlan, Weight
from llava.engine.kernels.cpu.build import Functions
from llava.engine.kernels.cpu.kernels import CpuKernels, packs
from llava.engine.kernels.cpu.packing import PanelWeight, in_panels
from llava.engine.kernels.quantized import QuantizedWeight

FEW_ROWS = 64  # more are multiplied faster by a processor's instructions for bfloat16, which PyTorch's product uses


class NativeKernels(CpuKernels):
    def __init__(self, functions: dict[torch.dtype, Functions]) -> None:
        super().__init__()
        self._functions = functions
        self._has_bfloat16 = packs(torch.bfloat16)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        native = self._native(x, weight)
        return super().rms_norm(x, weight, eps) if native is None else _rms_norm(native, None, x, weight, eps)

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        native = self._native(x, residual, weight)
        if native is None:
            return super().add_rms_norm_(x, residual, weight, eps)
        return _rms_norm(native, x, residual, weight, eps)

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
        native = self._native(qkv, k_cache, v_cache, *given)
        if native is None:
            return super().rope_store_(
                qkv, cos, sin, plan, k_cache, v_cache, num_heads, num_kv_heads, q_norm=q_norm, k_norm=k_norm, eps=eps
            )
        q = qkv.new_empty(len(qkv), num_heads, k_cache.shape[-1])
        native.rope_store(
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
        native = self._native(q, k_cache, v_cache)
        if native is None or plan.max_query != 1 or len(plan.context_lens) != num_rows:
            return super().attend(q, k_cache, v_cache, plan, scale, window=window, alibi=alibi)
        out = q.new_empty(num_rows, num_heads * width)
        slopes = None if alibi is None else alibi.float().contiguous()
        native.attend(
            _at(q), _at(k_cache), _at(v_cache), _at(plan.block_tables), plan.block_tables.stride(0),
            _at(plan.context_lens), _at(slopes), scale, window or 0, _at(out),
            num_rows, num_heads, k_cache.shape[2], width, k_cache.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        native = self._native(gate_up)
        if native is None:
            return super().silu_mul(gate_up)
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        native.silu_mul(_at(gate_up), _at(out), rows, width // 2, torch.get_num_threads())
        return out

    def pack(self, weight: Weight) -> Weight:
        if isinstance(weight, QuantizedWeight):
            return in_panels(weight.data, weight.scales) if weight.kind == "int8" else weight
        return in_panels(weight) if weight.dtype in self._functions else super().pack(weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        many = len(x) > FEW_ROWS and x.dtype == torch.bfloat16 and self._has_bfloat16
        native = self._native(x)
        if (
            native is None
            or many
            or not isinstance(weight, PanelWeight)
            or weight.data.dtype not in (x.dtype, torch.int8)
        ):
            return super().linear(x, weight, bias)
        outputs, width = weight.shape
        wide, out = x.float(), x.new_empty(len(x), outputs)
        size = (len(x), width, outputs, torch.get_num_threads())
        if weight.data.dtype == torch.int8:
            native.linear_int8(_at(wide), _at(weight.data), _at(weight.scales), _at(out), *size)
        else:
            native.linear(_at(wide), _at(weight.data), _at(out), *size)
        return out if bias is None else out.add_(bias)

    def _native(self, *tensors: Tensor) -> Functions | None:
        """The functions for these tensors, which have one type of numbers and no gaps."""
        dtype = tensors[0].dtype
        fit = all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors)
        return self._functions.get(dtype) if fit else None


def _rms_norm(native: Functions, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, width = torch.empty_like(residual), residual.shape[-1]
    size = (residual.numel() // width, width)
    native.rms_norm(_at(x), _at(residual), _at(weight), _at(out), *size, eps, torch.get_num_threads())
    return out


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
