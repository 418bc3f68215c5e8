"""Differences between a model's weights and its base's, the form in which the first LLaVA models were published.

In: a `Source` and a language model. Out: a folder in the original layout whose tensors are the source's minus the base's
(`delta`), or plus them (`from-delta`). Rows and tensors that the base does not have are copied.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llava.convert.layouts.original import OriginalLayout
from llava.convert.source import Source, chat_command
from llava.convert.verify import (
    TensorComparison,
    Verification,
    VerificationError,
    largest_difference,
    require_same_names,
)
from llava.convert.writer import SHARD_BYTES, PlannedTensor
from llava.errors import InputError
from llava.model.checkpoints.hub import resolve_checkpoint
from llava.model.checkpoints.inspect import inspect
from llava.model.checkpoints.meta_model import open_meta_model
from llava.model.checkpoints.weight_files import TORCH_DTYPES, read_tensor
from llava.model.config import LEARNED_ENDS

# Tensors that a language model does not have; any other tensor that is not in the base means that it is the wrong base.
ADDED = ("mm_projector.", "vision_tower.", *LEARNED_ENDS)


class DeltaLayout(OriginalLayout):
    """The original layout with a base's weights subtracted (sign -1) or added (sign 1)."""

    def __init__(self, source: Source, base: str | Path, *, sign: int, shard_bytes: int = SHARD_BYTES) -> None:
        super().__init__(source, shard_bytes=shard_bytes)
        self.sign = sign
        info = inspect(resolve_checkpoint(base, what="base model"))
        self.base = dict(info.tensors)
        for name in source.names:
            if name not in self.base and not any(part in name for part in ADDED):
                raise InputError(
                    f"tensor {name!r} of {source.folder} is not in the base {info.folder}; it is another base"
                )
            if name in self.base and not self._fits(name):
                raise InputError(
                    f"tensor {name!r} has shape {list(source.shape(name))} in {source.folder} and "
                    f"{list(self.base[name].shape)} in the base {info.folder}; it is another base"
                )

    def _fits(self, name: str) -> bool:
        ours, theirs = self.source.shape(name), self.base[name].shape
        grown = self.source.is_vocabulary(name) and ours[1:] == theirs[1:] and ours[0] >= theirs[0]
        return ours == theirs or grown

    def tensors(self) -> list[PlannedTensor]:
        return [self._changed(planned) if planned.name in self.base else planned for planned in super().tensors()]

    def _changed(self, planned: PlannedTensor) -> PlannedTensor:
        return replace(planned, make=partial(self._sum, planned.name, planned.dtype, self.sign), stored=None)

    def _sum(self, name: str, dtype: str, sign: int, start: Tensor | None = None) -> Tensor:
        """Compute in the target's dtype, as published differences were."""
        kind = getattr(torch, TORCH_DTYPES[dtype])
        numbers = (self.source.read(name) if start is None else start).to(kind, copy=True)
        other = read_tensor(self.base[name]).to(kind)
        numbers[: len(other)] += sign * other
        return numbers

    def verify(self, folder: Path, *, logits: bool) -> Verification:
        """Check that the target holds the planned sums, and that reversing them gives the source, except for rounding."""
        written = open_meta_model(folder)
        planned = {item.name: item for item in super().tensors()}
        require_same_names(
            planned, [name for name in written.found if name in planned or not self.source.is_tower(name)]
        )
        largest, num_bytes = 0.0, 0
        for name, item in planned.items():
            found, expected = written.read(name), item.make()
            if name in self.base:
                if not torch.equal(found, self._sum(name, item.dtype, self.sign)):
                    raise VerificationError(f"tensor {name!r} is not the planned difference")
                found = self._sum(name, item.dtype, -self.sign, found)
            largest = max(largest, largest_difference(found, expected))
            num_bytes += item.num_bytes
        return Verification(TensorComparison(len(planned), num_bytes, largest))

    def commands(self, target: Path) -> list[str]:
        return [chat_command(target)] if self.sign > 0 else []

    def notes(self) -> list[str]:
        return [
            "the difference above is between the source and the reversed sum, since sums round; --dtype fp32 rounds less"
        ]
