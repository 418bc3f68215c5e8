"""Packed weights for native.cpp: panels of 32 outputs, in which the 32 weights of each input are contiguous.

In: a weight (out, in), or one in 8 bits. Out: `PackedWeight`, a copy. A product then needs no sums across a vector
register, and reads memory in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.engine.kernels.quantized import QuantizedWeight

PANEL = 32  # as in native.cpp


@dataclass(frozen=True)
class PackedWeight(QuantizedWeight):
    """data (panels, in, 32), the last panel padded with zeros, times scales (out,) float32; empty scales are 1."""

    num_outputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.data.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        rows = self.data.transpose(1, 2).reshape(-1, self.data.shape[1])[: self.num_outputs]
        return rows.to(dtype) if not len(self.scales) else (rows.float() * self.scales[:, None]).to(dtype)


def pack_weight(weight: Tensor, scales: Tensor | None = None) -> PackedWeight:
    """Pack a weight (out, in) and its scales (out,), if any."""
    num_outputs, width = weight.shape
    full = F.pad(weight, (0, 0, 0, -num_outputs % PANEL))
    data = full.view(-1, PANEL, width).transpose(1, 2).contiguous()
    return PackedWeight("packed", data, torch.empty(0) if scales is None else scales, num_outputs)
