"""Samples of different lengths in rows of one length: which go together, and how long each is.

In: the training set and how the model counts image features. Out: `PackedDataset`, whose items are lists of samples that
fit into one row, and the collator for it. The model lays a batch's samples one after another and keeps them apart
(model/llava_arch.py with `packed=True`); nothing is padded and no sample is cut to fit.

Lengths are exact, tokens and image features: a row never exceeds the limit. They are measured once, by the loader's
processes, and kept in the output folder. Which samples share a row is drawn once from the seed, so that every epoch has
the same number of rows and a resumed run has the rows of the run it continues; the trainer shuffles rows in each epoch and
deals them out to the ranks as it does with samples.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.formats import image_sources
from llava.data.image_files import locate_image
from llava.errors import InputError
from llava.images.io import load_image
from llava.images.layout import ImagePolicy, plan
from llava.train.arguments import TrainingArguments
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset

logger = logging.getLogger(__name__)

# Rows that wait for samples at the same time. More of them waste less room, but samples stay apart longer.
OPEN_SEQUENCES = 1000
SAMPLES_PER_TASK = 256


def plan_sequences(lengths: Sequence[int], limit: int, *, seed: int) -> list[list[int]]:
    """Indices of samples, row by row: each into the fullest open row that has room, in an order drawn from `seed`."""
    longest = max(lengths)
    if longest > limit:
        raise InputError(
            f"sample {list(lengths).index(longest)} has {longest} tokens; a row of {limit} is too short for it"
        )
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of open rows: tokens left, and number of the row; ascending
    for index in order:
        place = bisect_left(room, (lengths[index], 0))
        left, row = room.pop(place) if place < len(room) else (limit, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
        if len(room) > OPEN_SEQUENCES:
            del room[0]  # the fullest
    return rows


class PackedDataset(Dataset):
    """A training set by rows: item `i` is the list of the samples in row `i`."""

    def __init__(
        self, samples: LazySupervisedDataset, lengths: Sequence[int], limit: int, policy: Any, *, seed: int
    ) -> None:
        super().__init__()
        self.samples = samples
        self.limit = limit
        self.policy = policy
        self.rows = plan_sequences(lengths, limit, seed=seed)
        self.filled = sum(lengths) / (len(self.rows) * limit)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        room = self.limit
        for sample in self.rows[index]:
            item = self.samples[sample]
            room -= item_length(item, self.policy, self.samples.tokenizer.model_max_length)
            if room >= 0:
                items.append(item)
            elif not self.samples.skips_bad:
                raise InputError(
                    f"{self.samples.list_data_dict.describe(sample)} is longer than it was when rows were planned; the data "
                    "were changed, so start a new run"
                )
            # Otherwise it stands in for a bad sample, has its own place elsewhere, and is too long for this one.
        return items


class PackedCollator:
    """Rows of samples -> one batch of samples, which the model is to lay one after another.

    Single samples, as a validation set gives them, become a padded batch.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.collate = DataCollatorForSupervisedDataset(tokenizer)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        if isinstance(rows[0], dict):
            return self.collate(rows)
        return {**self.collate([item for row in rows for item in row]), "packed": True}


def pack_data_module(data_module: dict[str, Any], model: Any, args: TrainingArguments) -> dict[str, Any]:
    """A data module as `make_supervised_data_module` makes it, with its training set by rows."""
    if not hasattr(model, "check_packable"):
        raise InputError("--packing needs a model with images; name its tower with --vision_tower, or leave it False")
    model.check_packable()
    samples, limit = data_module["train_dataset"], args.pack_length or args.model_max_length
    if limit < args.model_max_length:
        raise InputError(
            f"--pack_length {limit} is shorter than --model_max_length {args.model_max_length}, so a long sample would not "
            "fit into a row"
        )
    policy = model.image_policy() if model.get_vision_tower() is not None else None
    with args.main_process_first(local=False, desc="measuring samples"):
        lengths = measured_lengths(samples, policy, Path(args.output_dir), num_workers=args.dataloader_num_workers)
    packed = PackedDataset(
        samples, lengths, limit, policy, seed=args.seed if args.data_seed is None else args.data_seed
    )
    logger.info(
        "packed %s samples into %s rows of up to %s tokens, %.1f %% filled",
        f"{len(samples):,}", f"{len(packed):,}", f"{limit:,}", 100 * packed.filled,
    )  # fmt: skip
    if args.group_by_modality_length:
        logger.info("--group_by_modality_length has no effect on packed rows, which are about equally long")
    return {**data_module, "train_dataset": packed, "data_collator": PackedCollator(samples.tokenizer)}


# Lengths


def measured_lengths(
    samples: LazySupervisedDataset, policy: ImagePolicy | None, folder: Path, *, num_workers: int = 0
) -> list[int]:
    """Tokens of each sample, image features included, cut as the run will cut them; remembered in `folder`."""
    remembered = folder / f"pack_lengths-{_fingerprint(samples, policy)}.npy"
    if remembered.is_file():
        return np.load(remembered).tolist()
    loader = DataLoader(
        _Lengths(samples, policy),  # type: ignore[arg-type]
        batch_size=SAMPLES_PER_TASK,
        num_workers=num_workers,
        collate_fn=list,
    )
    lengths = [length for batch in loader for length in batch]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = remembered.with_suffix(".unfinished.npy")
    np.save(unfinished, np.array(lengths, dtype=np.int32))
    unfinished.replace(remembered)
    return lengths


class _Lengths(Dataset):
    def __init__(self, samples: LazySupervisedDataset, policy: ImagePolicy | None) -> None:
        self.samples, self.policy = samples, policy

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        samples = self.samples
        try:
            return self._measure(index)
        except InputError as error:
            if samples.skips_bad:  # it will never be drawn
                return 1
            raise InputError(f"{samples.list_data_dict.describe(index)}: {error}") from error

    def _measure(self, index: int) -> int:
        part, row = self.samples.list_data_dict.locate(index)
        sample, folder = part.file[row], part.image_folder or self.samples.data_args.image_folder
        sources = image_sources(sample)
        ids = self.samples.tokens(sample, num_images=len(sources))["input_ids"][0]
        if self.policy is None or self.policy.mode != "anyres":
            sizes = [(1, 1)] * len(sources)  # which have one tile, whatever their size
        else:
            sizes = [load_image(locate_image(source, folder)).size for source in sources]
        return _length(ids, sizes, self.policy, self.samples.tokenizer.model_max_length)


def item_length(item: dict[str, Any], policy: ImagePolicy | None, max_length: int) -> int:
    """The same for a sample that has been drawn."""
    ids, sizes = item["input_ids"], item.get("image_size", (1, 1))
    num_images = int((ids == IMAGE_TOKEN_INDEX).sum())
    return _length(ids, sizes if isinstance(sizes, list) else [sizes] * num_images, policy, max_length)


def _length(ids: torch.Tensor, sizes: Sequence[Sequence[int]], policy: ImagePolicy | None, max_length: int) -> int:
    features = sum(plan(size, policy).num_features for size in sizes) if policy is not None else 0
    return min(len(ids) - len(sizes) + features, max_length)


def _fingerprint(samples: LazySupervisedDataset, policy: ImagePolicy | None) -> str:
    """Names everything that lengths depend on."""
    files = [
        (str(part.file.path), part.file.path.stat().st_mtime_ns, len(part)) for part in samples.list_data_dict.parts
    ]
    tokenizer = samples.tokenizer
    about = (files, samples.conv, policy, tokenizer.name_or_path, len(tokenizer), tokenizer.model_max_length)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:12]
