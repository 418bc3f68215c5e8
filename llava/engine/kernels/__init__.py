"""The arithmetic of the engine: one set of methods, by plain PyTorch or by Triton.

In: packed tokens, a paged cache, an `AttentionPlan`. Out: tensors. `pick_kernels` chooses; what the methods promise is
in contract.py; weights of 8 and 4 bits are in quantized.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llava.engine.kernels.contract import Kernels


def pick_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels that run here; all of them compute the same within rounding."""
    from llava.engine.kernels.plain import PlainKernels

    return PlainKernels()
