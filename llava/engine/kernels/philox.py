"""A counter-based random number generator: the same numbers on every device and in every batch.

Philox4x32 with 10 rounds (Salmon et al. 2011): the seed is the key, the position the counter.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
ROUNDS = 10

Number = TypeVar("Number", int, Tensor)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return one number in [0, 1) for each pair of int64, as float32 with 24 random bits."""
    if seeds.device.type == "cpu":  # a hundred operators on a few numbers cost more than Python's arithmetic
        words = [_first_word(*pair) for pair in zip(seeds.tolist(), positions.tolist(), strict=True)]
        bits = torch.tensor(words, dtype=torch.int64)
    else:
        bits = _first_word(seeds, positions)
    return (bits >> 8).float() * 2**-24


def _first_word(key: Number, counter: Number) -> Number:
    """Return the first 32 bits of a block. Products of int64 tensors wrap, and all 64 bits are right."""
    k0, k1 = key & WORD, (key >> 32) & WORD
    c0, c1, c2, c3 = counter & WORD, (counter >> 32) & WORD, key & 0, key & 0
    for _ in range(ROUNDS):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1 = ((product1 >> 32) & WORD) ^ c1 ^ k0, product1 & WORD
        c2, c3 = ((product0 >> 32) & WORD) ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0
