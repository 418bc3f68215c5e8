"""Orders of training samples that put similar lengths, and one modality, into a batch.

In: a length per sample (for modality grouping: positive with an image, negative without). Out: a permutation of indices.
Batches of one modality keep every rank busy for the same time: text-only samples are long, image samples are not.
Lengths are counted in data.py; which sampler a run uses is decided in llava_trainer.py.

A megabatch is what all ranks consume in one optimizer step: `world_size` batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from llava.errors import InputError


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deal a megabatch out to `num_chunks` ranks so that their total lengths stay close.

    Longest first (the order of `indices`), each index goes to the lightest chunk that still has room. A megabatch that
    cannot be dealt out evenly (the last one of an epoch) is dealt round robin.
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
    """Shuffle, cut into megabatches, sort each by length (longest first) and deal it out to the ranks.

    With `merge` the result is one flat list; without, it is a list of megabatches of per-rank batches.
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
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
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
    """Yields indices in one of the two orders above, newly drawn in every epoch.

    With `seed`, an epoch's order depends on `seed + epoch` alone and leaves the global generator untouched, so that a
    resumed run sees the order of the run it continues.
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
            # A data loader draws the seed of its processes before it asks for an order: published runs have the order
            # that follows, so a first epoch is theirs.
            torch.empty((), dtype=torch.int64).random_()
            return iter(self._order())

    def _order(self) -> list[int]:
        grouped = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return grouped(self.lengths, self.batch_size, self.world_size, generator=self.generator)  # type: ignore[return-value]


def _chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
