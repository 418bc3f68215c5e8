"""The kernels for a CPU with a C++ compiler: native.cpp where it has a function, kernels.py for the rest.

With few new tokens, as in decoding, calling operators and gathering keys cost more than the arithmetic. native.cpp does
each kernel in one pass: it reads keys and values in their blocks, and 8-bit weights without expanding them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.engine.kernels.base import AttentionParams, AttentionPlan, KVCache, Weight
from llava.engine.kernels.cpu.build import NativeFunctions
from llava.engine.kernels.cpu.kernels import CpuKernels, packs
from llava.engine.kernels.cpu.packing import PackedWeight, pack_weight
from llava.engine.kernels.quantized import QuantizedWeight

FEW_TOKENS = 64  # with more, PyTorch's product is faster, where the processor has instructions for bfloat16


class NativeKernels(CpuKernels):
    def __init__(self, functions: dict[torch.dtype, NativeFunctions]) -> None:
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

    def rope_store_(self, qkv: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        optional = (params.cos, params.sin, params.q_norm, params.k_norm)
        native = self._native(qkv, *cache, *(tensor for tensor in optional if tensor is not None))
        if native is None:
            return super().rope_store_(qkv, cache, params, plan)
        cos, sin, q_norm, k_norm = optional
        q = qkv.new_empty(len(qkv), params.num_heads, cache.k.shape[-1])
        native.rope_store(
            _at(qkv), _at(cos), _at(sin), 0 if cos is None else cos.shape[1], _at(plan.positions), _at(plan.slots),
            _at(q_norm), _at(k_norm), params.norm_eps, _at(q), _at(cache.k), _at(cache.v),
            len(qkv), params.num_heads, params.num_kv_heads, cache.k.shape[-1], torch.get_num_threads(),
        )  # fmt: skip
        return q

    def attend(self, q: Tensor, cache: KVCache, params: AttentionParams, plan: AttentionPlan) -> Tensor:
        num_tokens, num_heads, width = q.shape
        native = self._native(q, *cache)
        if native is None or plan.max_query != 1 or len(plan.context_lens) != num_tokens:
            return super().attend(q, cache, params, plan)
        out = q.new_empty(num_tokens, num_heads * width)
        slopes = None if params.alibi is None else params.alibi.float().contiguous()
        _, block_size, num_kv_heads, _ = cache.k.shape
        native.attend(
            _at(q), _at(cache.k), _at(cache.v), _at(plan.block_tables), plan.block_tables.stride(0),
            _at(plan.context_lens), _at(slopes), params.scale, params.window or 0, _at(out),
            num_tokens, num_heads, num_kv_heads, width, block_size, torch.get_num_threads(),
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
            return pack_weight(weight.data, weight.scales) if weight.kind == "int8" else weight
        return pack_weight(weight) if weight.dtype in self._functions else super().pack(weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        many = len(x) > FEW_TOKENS and x.dtype == torch.bfloat16 and self._has_bfloat16
        native = self._native(x)
        fits = isinstance(weight, PackedWeight) and weight.data.dtype in (x.dtype, torch.int8)
        if native is None or many or not fits:
            return super().linear(x, weight, bias)
        outputs, width = weight.shape
        wide, out = x.float(), x.new_empty(len(x), outputs)
        size = (len(x), width, outputs, torch.get_num_threads())
        if weight.data.dtype == torch.int8:
            native.linear_int8(_at(wide), _at(weight.data), _at(weight.scales), _at(out), *size)
        else:
            native.linear(_at(wide), _at(weight.data), _at(out), *size)
        return out if bias is None else out.add_(bias)

    def _native(self, *tensors: Tensor) -> NativeFunctions | None:
        """Return the functions for these tensors; None unless all are contiguous and of one dtype that is compiled."""
        dtype = tensors[0].dtype
        fit = all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors)
        return self._functions.get(dtype) if fit else None


def _rms_norm(native: NativeFunctions, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, width = torch.empty_like(residual), residual.shape[-1]
    size = (residual.numel() // width, width)
    native.rms_norm(_at(x), _at(residual), _at(weight), _at(out), *size, eps, torch.get_num_threads())
    return out


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
