"""The adapters of one step: which tokens go through which.

In: the chunks of a step. Out: what the decoder adds to its projections. Tokens of one adapter are multiplied together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.engine.adapters.adapter import LoadedAdapter
from llava.engine.input_batch import to_device
from llava.engine.scheduler import ScheduledChunk


class StepAdapters:
    """Implements `TokenAdapters` of engine/decoder.py. `rows` are the tokens of each adapter among those of the step."""

    def __init__(self, groups: Sequence[tuple[LoadedAdapter, slice | Tensor]]) -> None:
        self._groups = groups

    def add_(self, out: Tensor, x: Tensor, layer: int, field: str) -> None:
        for adapter, rows in self._groups:
            for start, a, b in adapter.layers[layer].get(field, ()):
                change = x[rows] @ a.T @ b.T
                part = out[:, start : start + len(b)]
                if isinstance(rows, slice):
                    part[rows] += change
                else:
                    part.index_add_(0, rows, change)


def adapters_of(chunks: Sequence[ScheduledChunk], device: torch.device) -> StepAdapters | None:
    """The adapters of a step, whose tokens are those of its chunks one after another; None without any."""
    first = chunks[0].sequence.adapter
    if all(chunk.sequence.adapter is first for chunk in chunks):
        return None if first is None else StepAdapters([(first, slice(None))])
    rows: dict[LoadedAdapter, list[int]] = {}
    end = 0
    for chunk in chunks:
        if chunk.sequence.adapter is not None:
            rows.setdefault(chunk.sequence.adapter, []).extend(range(end, end + chunk.count))
        end += chunk.count
    return StepAdapters([(adapter, to_device(numbers, device)) for adapter, numbers in rows.items()])
