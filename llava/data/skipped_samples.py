"""What went wrong with which samples: noted by loader processes as they draw, told in one sentence at the end of a run.

In: numbers of samples. Out: sentences with counts and names. Each sample has one byte in memory that a rank's loader
processes share; in a distributed run the ranks' notes are joined when the report is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.data.samples import Samples
from llava.errors import InputError

LISTED = 20  # bad samples that a report names


class Notes:
    """A small number per sample, 0 until something is noted."""

    def __init__(self, num_samples: int) -> None:
        self.values = torch.zeros(num_samples, dtype=torch.uint8).share_memory_()

    def note(self, index: int, value: int) -> None:
        self.values[index] = value

    def joined(self) -> Tensor:
        """The values of all ranks, the larger where they differ. A collective call: every rank has to make it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.values
        found = self.values.nonzero().flatten()
        everyone: list[tuple[Tensor, Tensor]] = [None] * torch.distributed.get_world_size()  # type: ignore[list-item]
        torch.distributed.all_gather_object(everyone, (found, self.values[found]))
        joined = torch.zeros_like(self.values)
        for places, values in everyone:
            joined[places] = torch.maximum(joined[places], values)
        return joined


class CutSamples:
    """Which samples were longer than the limit."""

    CUT, NOTHING_LEFT = 1, 2

    def __init__(self, num_samples: int) -> None:
        self.notes = Notes(num_samples)

    def note(self, index: int, labels: Tensor, limit: int, *, already_cut: bool = False) -> None:
        if len(labels) > limit or already_cut:
            trained = (labels[:limit] != IGNORE_INDEX).any()
            self.notes.note(index, self.CUT if trained else self.NOTHING_LEFT)

    def report(self, samples: Samples, limit: int) -> str | None:
        """One sentence, or nothing when no sample was cut."""
        values = self.notes.joined()
        cut = values.nonzero().flatten().tolist()
        if not cut:
            return None
        untrained = int((values == self.NOTHING_LEFT).sum())
        lost = f", and {untrained} of them kept no token to train on" if untrained else ""
        return (
            f"{len(cut)} samples drawn were cut at --model_max_length {limit}{lost}; "
            f"the first is {samples.describe(cut[0])}"
        )


class BadSamples:
    """Which samples could not be used and had another one drawn in their place."""

    def __init__(self, num_samples: int) -> None:
        self.notes = Notes(num_samples)

    def note(self, index: int) -> None:
        self.notes.note(index, 1)

    def report(self, reason: Callable[[int], InputError | None]) -> str | None:
        """The count, and the first of them with their reasons, or nothing. `reason` prepares a sample once more."""
        bad = self.notes.joined().nonzero().flatten().tolist()
        if not bad:
            return None
        lines = [f"  {reason(index) or f'sample {index}: it can be used now'}" for index in bad[:LISTED]]
        more = [f"  and {len(bad) - LISTED} more; `llava data check` lists them all"] if len(bad) > LISTED else []
        return "\n".join(
            [f"{len(bad)} bad samples were skipped, others drawn in their place (--on_bad_sample skip):", *lines, *more]
        )
