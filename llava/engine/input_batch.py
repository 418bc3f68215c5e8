"""The input batch of a step: what it attends to, in one buffer that is written on the host and copied to the device once.

In: the chunks of a step and the block tables of the running sequences. Out: an `AttentionPlan`. A step may be padded to more
tokens and sequences than it has, as a recorded graph needs; what is padded is stored nowhere and attends to nothing.

    T tokens, S sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava.engine.kernels.base import AttentionPlan
from llava.engine.scheduler import ScheduledChunk


class StepArrays:
    def __init__(self, num_tokens: int, num_sequences: int, num_blocks: int, *, pinned: bool = False) -> None:
        self.size = (num_tokens, num_sequences, num_blocks)
        self.max_context = 0
        self._flat = torch.empty(_length(self.size), dtype=torch.int64, pin_memory=pinned)
        parts = _split(self._flat, self.size)
        self._slot_mapping, self._positions, self._slots, self._starts, self._contexts, self._tables = (
            part.numpy() for part in parts
        )

    @classmethod
    def of(
        cls,
        chunks: Sequence[ScheduledChunk],
        tables: np.ndarray,
        block_size: int,
        *,
        padded_to: tuple[int, int, int] | None = None,
        whole_tables: bool = False,
        pinned: bool = False,
    ) -> StepArrays:
        """`tables` (slots, blocks) are the running sequences' blocks; `padded_to` is the size to fill up to (T, S, blocks).

        `whole_tables` keeps their width, where kernels are compiled for it; else only blocks in use are taken.
        """
        starts = np.array([chunk.start for chunk in chunks])
        stops = np.array([chunk.stop for chunk in chunks])
        slots = np.array([chunk.sequence.slot for chunk in chunks])
        counts = stops - starts
        num_tokens, num_sequences = int(counts.sum()), len(chunks)
        max_context = int(stops.max())
        num_table = tables.shape[1] if whole_tables else -(-max_context // block_size)
        arrays = cls(*(padded_to or (num_tokens, num_sequences, num_table)), pinned=pinned)
        arrays.max_context = max_context
        ends = np.cumsum(counts)
        arrays._starts[0], arrays._starts[1 : num_sequences + 1] = 0, ends
        # Sequences of the padding take a token of the padding each, while there are any.
        padding = num_tokens + np.arange(1, arrays.size[1] - num_sequences + 1)
        arrays._starts[num_sequences + 1 :] = np.minimum(padding, arrays.size[0])
        arrays._contexts[:num_sequences], arrays._contexts[num_sequences:] = stops, 0
        arrays._slots[:num_sequences], arrays._slots[num_sequences:] = slots, 0
        own = tables[slots, : arrays.size[2]]
        arrays._tables[:num_sequences], arrays._tables[num_sequences:] = own, 0
        owner = np.repeat(np.arange(num_sequences), counts)
        positions = np.arange(num_tokens) + (starts - (ends - counts))[owner]
        arrays._positions[:num_tokens], arrays._positions[num_tokens:] = positions, 0
        block, offset = np.divmod(positions, block_size)
        arrays._slot_mapping[:num_tokens] = own[owner, block].astype(np.int64) * block_size + offset
        arrays._slot_mapping[num_tokens:] = -1
        return arrays

    def sent(self, device: torch.device, into: Tensor | None = None) -> StepTensors:
        """On the device, without waiting for it; `into` a buffer that a graph reads, if one is given."""
        if into is not None:
            return StepTensors(into.copy_(self._flat, non_blocking=True), self.size)
        return StepTensors(self._flat.to(device, non_blocking=True), self.size)


@dataclass(frozen=True)
class StepTensors:
    """The same buffer on the device."""

    flat: Tensor
    size: tuple[int, int, int]

    @classmethod
    def empty(cls, size: tuple[int, int, int], device: torch.device) -> StepTensors:
        """A buffer for steps of this size, at first of one in which nothing happens."""
        tensors = cls(torch.zeros(_length(size), dtype=torch.int64, device=device), size)
        _split(tensors.flat, size)[0].fill_(-1)
        return tensors

    @property
    def slots(self) -> Tensor:
        """(S,) the slot of each sequence."""
        return _split(self.flat, self.size)[2]

    def plan(self, max_query: int, max_context: int) -> AttentionPlan:
        slot_mapping, positions, _, starts, contexts, tables = _split(self.flat, self.size)
        return AttentionPlan(starts, contexts, tables, slot_mapping, positions, max_query, max_context)


def _split(flat: Tensor, size: tuple[int, int, int]) -> list[Tensor]:
    """slot mapping, positions (T,), slots (S,) of int64, then starts (S + 1,), contexts (S,), tables (S, blocks) of int32."""
    num_tokens, num_sequences, num_blocks = size
    rest = len(flat) - 2 * num_tokens - _even(num_sequences)
    slot_mapping, positions, slots, small = flat.split([num_tokens, num_tokens, _even(num_sequences), rest])
    starts, contexts, tables, _ = small.view(torch.int32).split(_int32_parts(size))
    return [
        slot_mapping,
        positions,
        slots[:num_sequences],
        starts[: num_sequences + 1],
        contexts[:num_sequences],
        tables.view(num_sequences, num_blocks),
    ]


def _int32_parts(size: tuple[int, int, int]) -> list[int]:
    """Each begins at a multiple of 16 bytes, which kernels load fastest from."""
    _, num_sequences, num_blocks = size
    num_table = num_sequences * num_blocks
    return [-(-(num_sequences + 1) // 4) * 4, -(-num_sequences // 4) * 4, num_table, num_table % 2]


def _even(number: int) -> int:
    return number + number % 2


def _length(size: tuple[int, int, int]) -> int:
    num_tokens, num_sequences, _ = size
    return 2 * num_tokens + _even(num_sequences) + sum(_int32_parts(size)) // 2


def to_device(values: np.ndarray | list[int], device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
