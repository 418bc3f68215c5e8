"""Keep the indices of a batch's items, so that a batch that fails can be traced to its samples.

In: a dataset and its collator. Out: the same batches, with the indices of their items under `ITEM_INDICES`, which the
trainer removes before the model gets the batch. An item is a sample or, with packing, a list of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch.utils.data import Dataset

from llava.train.data import LazySupervisedDataset, TrainingItem
from llava.train.packing import PackedDataset

ITEM_INDICES = "item_indices"


class SizedDataset(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> object: ...


class IndexedDataset(Dataset):
    """A dataset whose items come with their index."""

    def __init__(self, items: SizedDataset) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[int, object]:
        return index, self.items[index]


class IndexedCollator:
    """A collator for such items that adds their indices to the batch."""

    def __init__(self, collate: Callable[[Sequence[Any]], object]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[tuple[int, object]]) -> object:
        batch = self.collate([item for _, item in items])
        return {**batch, ITEM_INDICES: [index for index, _ in items]} if isinstance(batch, dict) else batch


def find_samples(dataset: Any, indices: Iterable[int]) -> list[tuple[str, TrainingItem]]:
    """Return the name and the content of each sample in these items of a training set."""
    if isinstance(dataset, PackedDataset):
        dataset, indices = dataset.samples, [i for index in indices for i in dataset.sequences[index]]
    return [(sample_name(dataset, index), dataset[index]) for index in indices]


def sample_name(dataset: object, index: int) -> str:
    """Name a sample in a message: its index, and its id if the data has one."""
    return dataset.list_data_dict.describe(index) if isinstance(dataset, LazySupervisedDataset) else f"sample {index}"
