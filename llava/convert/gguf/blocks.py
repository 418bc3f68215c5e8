"""Numbers as GGUF stores them, and back to single precision, through the gguf package where it has an arithmetic.

In: a tensor and a kind by GGUF's name. Out: an array as it lies in the file; from the bytes of a file, a tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # numbers that share a scale in q8_0
CHUNK = 2**24  # numbers packed at once, since that takes several copies of them
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pack(gguf: Any, tensor: Tensor, kind: str) -> np.ndarray:
    if kind not in DTYPES:
        rows = max(1, CHUNK // tensor.shape[-1])
        quantity = gguf.GGMLQuantizationType[kind]
        return np.concatenate([gguf.quants.quantize(part.float().numpy(), quantity) for part in tensor.split(rows)])
    numbers = tensor.to(DTYPES[kind]).contiguous()
    return (numbers.view(torch.int16) if kind == "BF16" else numbers).numpy()


def unpack(gguf: Any, stored: np.ndarray, kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind not in DTYPES:
        rows = stored.reshape(*shape[:-1], -1)
        return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])).reshape(shape)
    return torch.from_numpy(stored).view(DTYPES[kind]).reshape(shape).float()
