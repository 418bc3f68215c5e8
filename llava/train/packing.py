"""Pack samples of different lengths into sequences of one length, without padding.

In: the training set, and how the model counts image features. Out: `PackedDataset`, whose items are lists of samples that
fit into one packed sequence, and the collator for it. The model concatenates the samples of a batch and keeps them apart
in attention (model/llava_arch.py with `packed=True`); no sample is cut to fit.

Lengths are exact, in tokens and image features. They are measured once, by the data loader's processes, and kept in the
output folder. Which samples share a sequence is drawn once from the seed, so that each epoch has as many sequences and a
resumed run has the same ones. The trainer shuffles sequences in each epoch and distributes them over ranks like samples.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.formats import media_sources
from llava.data.media import VideoSource
from llava.data.truncation import check_trained, fit
from llava.errors import InputError
from llava.images.layout import ImagePolicy, plan, plan_images
from llava.images.video_layout import VideoPolicy, plan_video
from llava.model.protocols import LlavaModel
from llava.text.tokenization import Tokenizer
from llava.train.arguments import TrainingArguments
from llava.train.data import (
    DataCollatorForSupervisedDataset,
    DataModule,
    LazySupervisedDataset,
    TrainingItem,
    frame_sampling,
)

logger = logging.getLogger(__name__)

# Sequences that are being filled at the same time: more of them leave less empty, but need longer to plan.
OPEN_SEQUENCES = 1000
SAMPLES_PER_TASK = 256


def plan_sequences(lengths: Sequence[int], limit: int, *, seed: int) -> list[list[int]]:
    """Choose the samples of each packed sequence of `limit` tokens: best fit, in an order drawn from `seed`.

    `lengths` are tokens, image features included; a sample longer than `limit` is an `InputError`. Returns indices.
    """
    longest = max(lengths)
    if longest > limit:
        raise InputError(
            f"sample {list(lengths).index(longest)} has {longest} tokens; a packed sequence of {limit} is too short for it"
        )
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of open sequences: tokens left, and index of the sequence; ascending
    for index in order:
        fit = bisect_left(room, (lengths[index], 0))
        left, sequence = room.pop(fit) if fit < len(room) else (limit, len(sequences))
        if sequence == len(sequences):
            sequences.append([])
        sequences[sequence].append(index)
        insort(room, (left - lengths[index], sequence))
        if len(room) > OPEN_SEQUENCES:
            del room[0]  # the fullest
    return sequences


class PackedDataset(Dataset):
    """A training set of packed sequences: item `i` is the list of the samples in sequence `i`."""

    def __init__(
        self,
        samples: LazySupervisedDataset,
        lengths: Sequence[int],
        limit: int,
        policy: ImagePolicy | None,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.limit = limit
        self.policy = policy
        self.sequences = plan_sequences(lengths, limit, seed=seed)
        self.filled = sum(lengths) / (len(self.sequences) * limit)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> list[TrainingItem]:
        items: list[TrainingItem] = []
        room = self.limit
        for sample in self.sequences[index]:
            item = self.samples[sample]
            room -= item_length(item, self.policy, getattr(self.samples.data_args, "video_policy", None))
            if room >= 0:
                items.append(item)
            elif not self.samples.skips_bad:
                raise InputError(
                    f"{self.samples.list_data_dict.describe(sample)} is longer than it was when sequences were planned; the "
                    "data were changed, so start a new run"
                )
            # Otherwise it replaces a bad sample and is too long here; it is part of another sequence as well.
        return items


class PackedCollator:
    """Collate packed sequences into one batch of their samples, which the model concatenates.

    Single samples, as a validation set has them, become a padded batch.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.collate = DataCollatorForSupervisedDataset(tokenizer)

    def __call__(self, items: Sequence[TrainingItem] | Sequence[list[TrainingItem]]) -> dict[str, object]:
        samples = [sample for item in items for sample in (item if isinstance(item, list) else [item])]
        batch = self.collate(samples)
        return {**batch, "packed": True} if isinstance(items[0], list) else batch


def pack_data_module(data_module: DataModule, model: LlavaModel, args: TrainingArguments) -> DataModule:
    """Pack the training set of a data module that `make_supervised_data_module` made."""
    if not hasattr(model, "check_packable"):
        raise InputError("--packing needs a model with images; name its tower with --vision_tower, or leave it False")
    model.check_packable()
    samples, limit = data_module["train_dataset"], args.pack_length or args.model_max_length
    if limit < args.model_max_length:
        raise InputError(
            f"--pack_length {limit} is shorter than --model_max_length {args.model_max_length}, so a long sample would not "
            "fit into a packed sequence"
        )
    policy = model.image_policy() if model.get_vision_tower() is not None else None
    with args.main_process_first(local=False, desc="measuring samples"):
        lengths = measured_lengths(samples, policy, Path(args.output_dir), num_workers=args.dataloader_num_workers)
    packed = PackedDataset(
        samples, lengths, limit, policy, seed=args.seed if args.data_seed is None else args.data_seed
    )
    logger.info(
        "packed %s samples into %s sequences of up to %s tokens, %.1f %% filled",
        f"{len(samples):,}", f"{len(packed):,}", f"{limit:,}", 100 * packed.filled,
    )  # fmt: skip
    if args.group_by_modality_length:
        logger.info("--group_by_modality_length has no effect on packed sequences, which are about equally long")
    return {**data_module, "train_dataset": packed, "data_collator": PackedCollator(samples.tokenizer)}


# Lengths


def measured_lengths(
    samples: LazySupervisedDataset, policy: ImagePolicy | None, folder: Path, *, num_workers: int = 0
) -> list[int]:
    """Measure the samples, or read what an earlier call wrote into `folder`.

    Lengths are tokens, image features included, truncated as the run truncates them.
    """
    cached = folder / f"pack_lengths-{_fingerprint(samples, policy)}.npy"
    if cached.is_file():
        return np.load(cached).tolist()
    loader = DataLoader(
        _Lengths(samples, policy),  # type: ignore[arg-type]
        batch_size=SAMPLES_PER_TASK,
        num_workers=num_workers,
        collate_fn=list,
    )
    lengths = [length for batch in loader for length in batch]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = cached.with_suffix(".unfinished.npy")
    np.save(unfinished, np.array(lengths, dtype=np.int32))
    unfinished.replace(cached)
    return lengths


class _Lengths(Dataset):
    def __init__(self, samples: LazySupervisedDataset, policy: ImagePolicy | None) -> None:
        self.samples, self.policy = samples, policy

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> int:
        try:
            return self._measure(index)
        except InputError as error:
            if self.samples.skips_bad:  # it is never drawn
                return 1
            raise InputError(f"{self.samples.list_data_dict.describe(index)}: {error}") from error

    def _measure(self, index: int) -> int:
        part, row = self.samples.list_data_dict.locate(index)
        sample, folder = part.file[row], part.image_folder or self.samples.data_args.image_folder
        sources = media_sources(sample)
        limit = self.samples.tokenizer.model_max_length
        has_video = any(isinstance(source, VideoSource) for source in sources)
        if has_video or (self.policy is not None and self.policy.cuts_tiles):
            media = self.samples.open_media(sources, folder)
            ids, labels = self.samples.tokens(self.samples.told_times(sample, media), num_images=len(sources))
            features = self.samples.num_features(media)
        else:
            ids, labels = self.samples.tokens(sample, num_images=len(sources))
            features = _features([(1, 1)] * len(sources), self.policy)  # one tile, whatever their size
        fitted = fit(ids, features, limit)
        check_trained(labels, fitted, limit)
        return fitted.length


def item_length(item: TrainingItem, policy: ImagePolicy | None, video_policy: VideoPolicy | None = None) -> int:
    """Count the tokens of a sample that has been drawn, image features included."""
    num_images = int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum())
    length = len(item["input_ids"])
    if policy is None or not num_images:
        return length
    tiles = item["image"] if isinstance(item["image"], list) else [item["image"]]
    sizes = item.get("image_size", (1, 1))
    kinds = item.get("modality", ["image"] * num_images)
    for pixels, size, kind in zip(
        tiles, sizes if isinstance(sizes, list) else [sizes] * num_images, kinds, strict=True
    ):
        if kind == "video":
            assert video_policy is not None
            length += plan_video(len(pixels), policy, video_policy).num_features - 1
            continue
        length += plan(size, policy, num_tiles=len(pixels) if pixels.dim() == 4 else 1).num_features - 1
    return length


def _features(sizes: Sequence[Sequence[int]], policy: ImagePolicy | None) -> list[int]:
    return [1] * len(sizes) if policy is None else [layout.num_features for layout in plan_images(sizes, policy)]


def _fingerprint(samples: LazySupervisedDataset, policy: ImagePolicy | None) -> str:
    """Hash everything that lengths depend on."""
    files = [
        (str(part.file.path), part.file.path.stat().st_mtime_ns, len(part)) for part in samples.list_data_dict.parts
    ]
    tokenizer = samples.tokenizer
    args = samples.data_args
    video = (getattr(args, "video_policy", None), frame_sampling(args), getattr(args, "add_time_instruction", False))
    about = (files, samples.conv, policy, video, tokenizer.name_or_path, len(tokenizer), tokenizer.model_max_length)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:12]
