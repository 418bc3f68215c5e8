"""Weights of a linear layer in 8 or 4 bits; activations are not quantized.

In: a weight (out, in). Out: `QuantizedWeight`, small integers or floats with scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from llava.errors import InputError

WeightKind = Literal["int8", "fp8", "int4"]
GROUP = 128  # input features that share a scale in int4
FP8_MAX = 448.0  # the largest float8_e4m3fn


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in), which is `data` times `scales`.

    int8, fp8: data (out, in), scales (out,) float32. int4: data (out, in / 2) uint8, scales (out, in / 128); byte j of a
    group holds feature j in its low half and feature j + 64 in its high half, each with 8 added.
    """

    kind: WeightKind | Literal["packed"]  # "packed": a `PackedWeight` of cpu/packing.py
    data: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.data.shape
        return rows, width * 2 if self.kind == "int4" else width

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        if self.kind != "int4":
            return (self.data.float() * self.scales[:, None]).to(dtype)
        rows, width = self.shape
        packed = self.data.view(rows, width // GROUP, GROUP // 2)
        values = torch.cat([packed & 15, packed >> 4], dim=-1).float() - 8
        return (values * self.scales[:, :, None].float()).to(dtype).view(rows, width)


def quantize(weight: Tensor, kind: WeightKind) -> QuantizedWeight:
    """Round a weight (out, in) to the nearest values of `kind`."""
    if kind not in get_args(WeightKind):
        raise InputError(f"unknown kind of weights {kind!r}; known: {', '.join(get_args(WeightKind))}")
    if kind == "int4":
        return _quantize_int4(weight)
    largest = weight.abs().amax(dim=1).float().clamp(min=1e-30)
    scales = largest / (127 if kind == "int8" else FP8_MAX)
    scaled = weight.float() / scales[:, None]
    if kind == "int8":
        return QuantizedWeight(kind, scaled.round().clamp(-127, 127).to(torch.int8), scales)
    return QuantizedWeight(kind, scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales)


def _quantize_int4(weight: Tensor) -> QuantizedWeight:
    rows, width = weight.shape
    if width % GROUP:
        raise InputError(f"int4 weights need a width that {GROUP} divides; this layer's is {width}; use int8")
    groups = weight.float().view(rows, width // GROUP, GROUP)
    # The value farthest from 0 becomes -8, whichever sign it has, so that all 16 steps are used and not 15.
    farthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = torch.where(farthest == 0, 1.0, farthest / -8).bfloat16()
    values = (groups / scales.float()).round().clamp(-8, 7).to(torch.int8) + 8
    low, high = values.to(torch.uint8).split(GROUP // 2, dim=2)
    return QuantizedWeight("int4", (low | high << 4).view(rows, width // 2), scales.squeeze(2))
