"""Pack tensors into GGUF's tensor types and unpack them to float32, with the gguf package for the quantized ones.

In: a tensor and a type by GGUF's name. Out: an array as it lies in the file; from the bytes of a file, a tensor.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # elements that share a scale in q8_0
CHUNK = 2**24  # elements packed at once, since packing makes several copies
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pack(gguf: ModuleType, tensor: Tensor, kind: str) -> np.ndarray:
    """Convert a tensor to the array that a GGUF file stores for it."""
    if kind not in DTYPES:
        rows = max(1, CHUNK // tensor.shape[-1])
        quantization = gguf.GGMLQuantizationType[kind]
        return np.concatenate([gguf.quants.quantize(part.float().numpy(), quantization) for part in tensor.split(rows)])
    numbers = tensor.to(DTYPES[kind]).contiguous()
    return (numbers.view(torch.int16) if kind == "BF16" else numbers).numpy()


def unpack(gguf: ModuleType, stored: np.ndarray, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Convert the stored array of a tensor of `shape` back, to float32."""
    if kind not in DTYPES:
        rows = stored.reshape(*shape[:-1], -1)
        return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])).reshape(shape)
    return torch.from_numpy(stored).view(DTYPES[kind]).reshape(shape).float()
