"""Samples that know their number, so that a batch that goes wrong can be traced to the data.

In: any data set and its collator. Out: the same batches, with the numbers of their items under `ITEM_INDICES`, which the
trainer takes out again before the model sees the batch. An item is a sample, or with packing a row of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.utils.data import Dataset

ITEM_INDICES = "item_indices"


class IndexedDataset(Dataset):
    """A data set whose items come with their index."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.items[index]


class IndexedCollator:
    """A collator for such items that hands their indices on."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[tuple[int, Any]]) -> Any:
        batch = self.collate([item for _, item in items])
        return {**batch, ITEM_INDICES: [index for index, _ in items]} if isinstance(batch, dict) else batch


def find_samples(dataset: Any, numbers: Iterable[int]) -> list[tuple[str, Any]]:
    """What messages call the samples in items of a training set, and the samples."""
    found = []
    for number in numbers:
        if hasattr(dataset, "rows"):  # packed
            found += [(sample_name(dataset.samples, index), dataset.samples[index]) for index in dataset.rows[number]]
        else:
            found.append((sample_name(dataset, number), dataset[number]))
    return found


def sample_name(dataset: Any, index: int) -> str:
    """What messages call a sample: its number, and its id where the data has one."""
    samples: Any = getattr(dataset, "list_data_dict", None)
    return samples.describe(index) if hasattr(samples, "describe") else f"sample {index}"
