"""Compute the numbers of GGUF's tensor types from their bytes.

In: the bytes of a tensor, its type by GGUF's name, its shape. Out: a tensor, for quantized types in float32. A quantized
tensor is a sequence of blocks, each with its scales and small integers; the products are computed in the order in which
the gguf package computes them, so that results are equal. Packing is convert/gguf/blocks.py.

    B blocks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 2**16  # blocks computed at once, since the steps make several copies
# The 16 numbers that the 4 bits of IQ4_NL and IQ4_XS stand for.
NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(stored: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """Convert the bytes of a tensor (uint8, in one dimension) to its numbers."""
    if kind in DTYPES:
        return stored.view(DTYPES[kind]).reshape(shape)
    size, compute = BLOCKS[kind]
    numbers = torch.empty(shape)
    at, flat = 0, numbers.view(-1)
    for part in stored.reshape(-1, size).split(CHUNK):
        made = compute(part).flatten()
        flat[at : at + len(made)] = made
        at += len(made)
    return numbers


def _half(bytes_: Tensor) -> Tensor:
    """Half-precision numbers (B, n) in float32, from their bytes (B, 2n)."""
    return bytes_.contiguous().view(torch.float16).float()


def _nibbles(bytes_: Tensor) -> Tensor:
    """(B, n) -> (B, 2n): the lower four bits of all bytes, then the upper ones."""
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1)


def _bits(bytes_: Tensor, shifts: range, mask: int) -> Tensor:
    """(B, n) -> (B, len(shifts), n): the bits of each byte under `mask` at each shift."""
    steps = torch.tensor(list(shifts), dtype=torch.uint8)[:, None]
    return (bytes_[:, None, :] >> steps) & mask


def _fifth_bits(bytes_: Tensor) -> Tensor:
    """(B, 4) -> (B, 32): bit by bit, the lowest first, as the fifth bit of a number."""
    return _bits(bytes_, range(8), 1).transpose(1, 2).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:]).float() + _half(blocks[:, 2:4])


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks[:, :2]) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks[:, :2]) * numbers.float() + _half(blocks[:, 2:4])


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks[:, :2])


def _q2_k(blocks: Tensor) -> Tensor:
    scales, numbers, ends = blocks[:, :16], blocks[:, 16:80], blocks[:, 80:]
    scale = _half(ends[:, :2]) * (scales & 15).float()
    least = _half(ends[:, 2:]) * (scales >> 4).float()
    two_bits = _bits(numbers.reshape(-1, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    return scale[..., None] * two_bits.float() - least[..., None]


def _q3_k(blocks: Tensor) -> Tensor:
    high, numbers, scales, whole = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108], blocks[:, 108:]
    upper = _bits(scales[:, 8:], range(0, 8, 2), 3).flatten(1)
    scale = _half(whole) * ((_nibbles(scales[:, :8]) | (upper << 4)).to(torch.int8) - 32).float()
    two_bits = _bits(numbers.reshape(-1, 32), range(0, 8, 2), 3).reshape(-1, 8, 32).to(torch.int8)
    third = _bits(high, range(8), 1).to(torch.int8)
    return scale[..., None] * (two_bits - ((third ^ 1) << 2)).reshape(-1, 16, 16).float()


def _scales_and_least(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and minima (B, 8 each) of Q4_K and Q5_K from their 12 bytes."""
    first, second, third = packed.reshape(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=-1)
    least = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=-1)
    return scales, least


def _scaled(blocks: Tensor, numbers: Tensor) -> Tensor:
    """The numbers (B, 8, 32) of Q4_K and Q5_K times their scales, less their minima."""
    scales, least = _scales_and_least(blocks[:, 4:16])
    scale, low = _half(blocks[:, :2]) * scales.float(), _half(blocks[:, 2:4]) * least.float()
    return scale[..., None] * numbers.float() - low[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(blocks, _bits(blocks[:, 16:].reshape(-1, 32), range(0, 8, 4), 15).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, 48:].reshape(-1, 32), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return _scaled(blocks, low | (_bits(blocks[:, 16:48], range(8), 1) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, :128].reshape(-1, 64), range(0, 8, 4), 15).reshape(-1, 8, 32)
    high = _bits(blocks[:, 128:192].reshape(-1, 32), range(0, 8, 2), 3).reshape(-1, 8, 32)
    numbers = (low | (high << 4)).to(torch.int8) - 32
    scale = _half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8).float()
    return scale[..., None] * numbers.reshape(-1, 16, 16).float()


def _looked_up(numbers: Tensor) -> Tensor:
    return torch.tensor(NON_LINEAR, dtype=torch.float32)[numbers.long()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks[:, :2]) * _looked_up(_nibbles(blocks[:, 2:]))


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, 4:8], range(0, 8, 4), 15).transpose(1, 2).flatten(1)
    high = _bits(blocks[:, 2:4], range(0, 8, 2), 3).transpose(1, 2).flatten(1)
    scale = _half(blocks[:, :2]) * ((low | (high << 4)).to(torch.int8) - 32).float()
    numbers = _bits(blocks[:, 8:].reshape(-1, 16), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return scale[..., None] * _looked_up(numbers)


# Type -> bytes of a block, and the function from bytes (B, bytes) to numbers.
BLOCKS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "IQ4_NL": (18, _iq4_nl),
    "IQ4_XS": (136, _iq4_xs),
}
