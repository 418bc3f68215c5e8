"""Order training samples so that a batch has similar lengths and one modality.

In: a length per sample (for modality grouping: positive with an image, negative without). Out: a permutation of indices.
Batches of one modality take every rank the same time: text-only samples are long, image samples are not. data.py counts
lengths; llava_trainer.py chooses the sampler.

A megabatch is what all ranks consume in one optimizer step: `world_size` batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from llava.errors import InputError


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Distribute a megabatch over `num_chunks` ranks so that their total lengths are close.

    Longest first (the order of `indices`), each index goes to the lightest chunk that still has room. A megabatch that
    cannot be divided evenly (the last one of an epoch) is distributed round robin.
    """
    if len(indices) % num_chunks != 0:
        return [list(indices[start::num_chunks]) for start in range(num_chunks)]

    capacity = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals: list[float] = [0.0] * num_chunks
    for index in indices:
        lightest = totals.index(min(totals))
        chunks[lightest].append(index)
        totals[lightest] += lengths[index]
        if len(chunks[lightest]) == capacity:
            totals[lightest] = float("inf")
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    merge: bool = True,
) -> list[int] | list[list[list[int]]]:
    """Shuffle, split into megabatches, sort each by length (longest first) and distribute it over the ranks.

    With `merge` the result is one flat list; without, a list of megabatches of per-rank batches.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    megabatches = [
        split_to_even_chunks(sorted(megabatch, key=lambda index: lengths[index], reverse=True), lengths, world_size)
        for megabatch in _chunks(order, world_size * batch_size)
    ]
    if not merge:
        return megabatches
    return [index for megabatch in megabatches for batch in megabatch for index in batch]


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Group by length inside each modality, then shuffle the megabatches of both modalities.

    Samples of each modality that do not fill a megabatch come last, together and in index order. The order inside a
    modality is drawn from torch's global generator and only the order of megabatches from `generator`, as published
    runs did; `LengthGroupedSampler(seed=...)` fixes both.
    """
    if 0 in lengths:
        raise InputError(f"sample {list(lengths).index(0)} has no words, so it cannot be grouped by length; remove it")

    with_image = [index for index, length in enumerate(lengths) if length > 0]
    text_only = [index for index, length in enumerate(lengths) if length < 0]
    if not with_image or not text_only:
        return get_length_grouped_indices(lengths, batch_size, world_size, generator=generator)  # type: ignore[return-value]

    megabatches: list[Sequence[int]] = []
    remainder: list[int] = []
    for members in (with_image, text_only):
        order = get_length_grouped_indices([abs(lengths[index]) for index in members], batch_size, world_size)
        *full, last = _chunks([members[position] for position in order], world_size * batch_size)  # type: ignore[index]
        megabatches += full
        remainder += last

    shuffled = torch.randperm(len(megabatches), generator=generator).tolist()
    return [index for position in shuffled for index in megabatches[position]] + sorted(remainder)


class LengthGroupedSampler(Sampler[int]):
    """Yield indices in one of the two orders above, drawn anew in each epoch.

    With `seed`, an epoch's order depends on `seed + epoch` only and leaves the global generator untouched, so that a
    resumed run has the order of the run that it continues.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int],
        generator: torch.Generator | None = None,
        group_by_modality: bool = False,
        *,
        seed: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.world_size = world_size
        self.lengths = lengths
        self.generator = generator
        self.group_by_modality = group_by_modality
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            return iter(self._order())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + self.epoch)
            # A DataLoader draws the seed of its workers before it asks the sampler, so that the first epoch has the order
            # of published runs.
            torch.empty((), dtype=torch.int64).random_()
            return iter(self._order())

    def _order(self) -> list[int]:
        grouped = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return grouped(self.lengths, self.batch_size, self.world_size, generator=self.generator)  # type: ignore[return-value]


def _chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
