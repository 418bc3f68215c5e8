"""Record which samples a run truncated or skipped, for a report at its end.

In: numbers of samples, from loader processes as they draw. Out: sentences with counts and ids. Each sample has one byte
in memory that a rank's loader processes share; in a distributed run the ranks' flags are joined for the report.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava.data.samples import Samples
from llava.errors import InputError

LISTED = 20  # skipped samples that a report names


class SampleFlags:
    """One byte per sample, 0 at first, shared by a rank's loader processes."""

    def __init__(self, num_samples: int) -> None:
        self.values = torch.zeros(num_samples, dtype=torch.uint8).share_memory_()

    def joined(self) -> Tensor:
        """The values of all ranks, the larger one where they differ. A collective call: every rank has to make it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.values
        found = self.values.nonzero().flatten()
        everyone: list[tuple[Tensor, Tensor]] = [None] * torch.distributed.get_world_size()  # type: ignore[list-item]
        torch.distributed.all_gather_object(everyone, (found, self.values[found]))
        joined = torch.zeros_like(self.values)
        for indices, values in everyone:
            joined[indices] = torch.maximum(joined[indices], values)
        return joined


class TruncatedSamples(SampleFlags):
    """Samples that were longer than the limit."""

    def note(self, index: int) -> None:
        self.values[index] = 1

    def report(self, samples: Samples, limit: int) -> str | None:
        """One sentence, or None where no sample was truncated. A collective call."""
        truncated = self.joined().nonzero().flatten().tolist()
        if not truncated:
            return None
        return (
            f"{len(truncated)} samples drawn were truncated to --model_max_length {limit} (image tokens included, no image in "
            f"part); the first is {samples.describe(truncated[0])}"
        )


class SkippedSamples(SampleFlags):
    """Samples that could not be used, in whose place another one was drawn."""

    def note(self, index: int) -> None:
        self.values[index] = 1

    def report(self, reason: Callable[[int], InputError | None]) -> str | None:
        """The count and the first of them with their reasons, or None where none was skipped. A collective call.

        `reason` prepares a sample again and returns why it cannot be used.
        """
        skipped = self.joined().nonzero().flatten().tolist()
        if not skipped:
            return None
        lines = [f"  {reason(index) or f'sample {index}: it can be used now'}" for index in skipped[:LISTED]]
        more = [f"  and {len(skipped) - LISTED} more; `llava data check` lists them all"] * (len(skipped) > LISTED)
        head = f"{len(skipped)} bad samples were skipped, others drawn in their place (--on_bad_sample skip):"
        return "\n".join([head, *lines, *more])
