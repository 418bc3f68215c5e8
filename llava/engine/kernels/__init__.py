"""The arithmetic of the engine: one set of methods, by PyTorch, by Triton, or compiled for a CPU.

In: packed tokens, a paged cache, an `AttentionPlan`. Out: tensors. `pick_kernels` chooses; what the methods promise is
in base.py; weights of 8 and 4 bits are in quantized.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llava.engine.kernels.base import Kernels


def pick_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels that run here; all of them compute the same within rounding.

    Triton's are for half precision on GPUs from Ampere on; launches overlap from Hopper on.
    """
    import torch

    from llava.engine.kernels.reference import ReferenceKernels

    if device.type == "cpu":
        from llava.engine.kernels.cpu import build as native_build
        from llava.engine.kernels.cpu.kernels import CpuKernels
        from llava.engine.kernels.cpu.native import NativeKernels

        functions = native_build.load()
        return CpuKernels() if functions is None else NativeKernels(functions)

    if device.type != "cuda" or dtype == torch.float32 or find_spec("triton") is None:
        return ReferenceKernels()
    generation, _ = torch.cuda.get_device_capability(device)
    if generation < 8:
        return ReferenceKernels()
    from llava.engine.kernels.triton.kernels import TritonKernels

    return TritonKernels(device, overlap=generation >= 9)
