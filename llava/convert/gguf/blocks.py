"""Pack tensors into GGUF's tensor types, with the gguf package for the quantized ones.

In: a tensor and a type by GGUF's name. Out: an array as it lies in the file. The opposite way is
model/checkpoints/gguf/blocks.py.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from llava.model.checkpoints.gguf.blocks import DTYPES

BLOCK = 32  # elements that share a scale in q8_0
CHUNK = 2**24  # elements packed at once, since packing makes several copies


def pack(gguf: ModuleType, tensor: Tensor, kind: str) -> np.ndarray:
    """Convert a tensor to the array that a GGUF file stores for it."""
    if kind not in DTYPES:
        rows = max(1, CHUNK // tensor.shape[-1])
        quantization = gguf.GGMLQuantizationType[kind]
        return np.concatenate([gguf.quants.quantize(part.float().numpy(), quantization) for part in tensor.split(rows)])
    numbers = tensor.to(DTYPES[kind]).contiguous()
    return (numbers.view(torch.int16) if kind == "BF16" else numbers).numpy()
