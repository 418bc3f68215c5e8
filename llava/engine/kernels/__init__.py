"""The engine's kernels: one interface, implemented by PyTorch's operators, by Triton, and by C++ for a CPU.

In: packed tokens, a paged KV cache, an `AttentionPlan`. Out: tensors. `pick_kernels` chooses the back end; base.py is the
interface; weights of 8 and 4 bits are in quantized.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llava.engine.kernels.base import Kernels


def pick_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the fastest kernels for this machine; all compute the same, but for rounding.

    Triton's need half precision and a GPU from Ampere on; launches overlap from Hopper on.
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
