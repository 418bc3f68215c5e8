"""Training samples: a JSON file and a folder of images become batches of tensors.

In: samples `{"id", "image" (a path or a list of paths, optional), "conversations": [{"from", "value"}, ...]}`.
Out: per sample ids, labels and pixels; per batch padded ids, labels, a mask and images in the order of their marks.
Prompts, tokens and labels come from processor.py, pixels from mm_utils.py; the order of samples is in sampler.py.

    B samples, T tokens, I images in the batch
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.errors import InputError
from llava.image_io import load_image
from llava.labels import preprocess, preprocess_multimodal
from llava.mm_utils import process_images

logger = logging.getLogger(__name__)

Sample = dict[str, Any]

# Words that one image counts for where samples are grouped by length; published runs counted so.
WORDS_PER_IMAGE = 128
MAX_LOADER_PROCESSES = 256


class LazySupervisedDataset(Dataset):
    """The samples of one JSON file, prepared when they are drawn.

    `data_args` says where images lie and how they are prepared: `image_folder`, `image_processor`, `image_aspect_ratio`,
    `image_grid_pinpoints` (anyres), `is_multimodal`, `mm_use_im_start_end`. `conv` is the conversation template;
    without one it is `llava.conversation.default_conversation`, read at each call.

    In a multimodal run a text-only sample carries one black image without a mark, so that every rank's batch runs the
    tower and no collective operation waits for a rank that has no images.
    """

    def __init__(self, data_path: str, tokenizer: Any, data_args: Any, *, conv: Conversation | None = None) -> None:
        super().__init__()
        self.list_data_dict = load_samples(data_path)
        self.tokenizer = tokenizer
        self.data_args = data_args
        self.conv = conv
        self.cuts = CutSamples()

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Words per sample, an image counting for 128."""
        return [_num_words(sample) + (WORDS_PER_IMAGE if image_names(sample) else 0) for sample in self.list_data_dict]

    @property
    def modality_lengths(self) -> list[int]:
        """Words per sample, negative for a sample without an image."""
        return [_num_words(sample) * (1 if image_names(sample) else -1) for sample in self.list_data_dict]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.list_data_dict[index]
        try:
            return self._prepare(sample, index)
        except InputError as error:
            raise InputError(f"{describe(sample, index)}: {error}") from error

    def _prepare(self, sample: Sample, index: int) -> dict[str, Any]:
        names = image_names(sample)
        turns = sample["conversations"]
        if names and not self.data_args.is_multimodal:
            raise InputError(f"it has an image ({names[0]!r}) but the run has no --vision_tower")
        pictures = [load_image(self._image_path(name)) for name in names]

        sources: Any = [turns]
        if names:  # a mark moves to the front of its turn, unless there are several to be kept in order
            sources = preprocess_multimodal(sources, self.data_args, conv=self.conv, move_marks=len(names) == 1)
        tokens = preprocess(sources, self.tokenizer, has_image=bool(names), conv=self.conv, keep_empty_answers=True)
        input_ids, labels = tokens["input_ids"][0], tokens["labels"][0]
        num_marks = int((input_ids == IMAGE_TOKEN_INDEX).sum()) if names else _num_text_marks(turns)
        if num_marks != len(names):
            raise InputError(f"its text has {num_marks} {DEFAULT_IMAGE_TOKEN} marks for {len(names)} images")
        if not (labels != IGNORE_INDEX).any() and not tokens["num_truncated"]:
            raise InputError("it has no answer to train on")
        self.cuts.note(index, labels, self.tokenizer.model_max_length, already_cut=bool(tokens["num_truncated"]))

        item: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        if names:
            pixels = [
                process_images([picture], self.data_args.image_processor, self.data_args)[0] for picture in pictures
            ]
            sizes = [picture.size for picture in pictures]
        elif self.data_args.is_multimodal:
            crop = self.data_args.image_processor.crop_size
            pixels, sizes = [torch.zeros(3, crop["height"], crop["width"])], [(crop["width"], crop["height"])]
        else:
            return item
        item["image"] = pixels if len(pixels) > 1 else pixels[0]
        if self.data_args.image_aspect_ratio == "anyres":  # the model lays tiles out by the picture's own size
            item["image_size"] = sizes if len(sizes) > 1 else sizes[0]
        return item

    def _image_path(self, name: str) -> str:
        """The file of an image, confined to the image folder (links inside the folder may lead out of it)."""
        if not self.data_args.image_folder:
            raise InputError(f"image {name!r} cannot be found: say where the images are with --image_folder")
        folder = os.path.abspath(self.data_args.image_folder)
        path = os.path.normpath(os.path.join(folder, name))
        if os.path.commonpath([folder, path]) != folder:
            raise InputError(f"image {name!r} lies outside the image folder {folder!r}")
        return path


class DataCollatorForSupervisedDataset:
    """Pad samples to the longest one, cut them at the tokenizer's `model_max_length`, gather their images.

    `images` is one tensor (I, 3, H, W) where all have a shape, else a list; a sample with several images contributes
    them in the order of its marks. `image_sizes` (width, height) is there when the samples have sizes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = min(max(len(item["input_ids"]) for item in instances), self.tokenizer.model_max_length)
        shape = (len(instances), longest)
        input_ids = torch.full(shape, self.tokenizer.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        for row, item in enumerate(instances):
            length = min(len(item["input_ids"]), longest)
            input_ids[row, :length] = item["input_ids"][:length]
            labels[row, :length] = item["labels"][:length]
            attention_mask[row, :length] = True
        if not (labels != IGNORE_INDEX).any():
            raise InputError(
                f"a batch of {len(instances)} samples has nothing to train on: every answer is empty or begins after "
                f"--model_max_length {self.tokenizer.model_max_length}"
            )
        # A padding id inside a sequence (an unknown character, where it is the unknown id) is not attended to, as in
        # published runs; but never the end mark, where a tokenizer pads with that: the model has to learn it.
        if self.tokenizer.pad_token_id != self.tokenizer.eos_token_id:
            attention_mask &= input_ids != self.tokenizer.pad_token_id

        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        if "image" in instances[0]:
            images = _flatten(item["image"] for item in instances)
            same = all(image.shape == images[0].shape for image in images)
            batch["images"] = torch.stack(images) if same else images
        if "image_size" in instances[0]:
            batch["image_sizes"] = _flatten(item["image_size"] for item in instances)
        return batch


def make_supervised_data_module(tokenizer: Any, data_args: Any, conv: Conversation | None = None) -> dict[str, Any]:
    """What the trainer takes: the training set, no evaluation set, and the collator."""
    return {
        "train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args, conv=conv),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


class CutSamples:
    """Which samples were longer than the limit: counted in memory that loader processes share, reported at the end."""

    def __init__(self) -> None:
        # Per process: samples cut, samples of which no trained token was left, and the first index cut.
        self.counts = torch.zeros(MAX_LOADER_PROCESSES, 3, dtype=torch.long).share_memory_()

    def note(self, index: int, labels: Tensor, limit: int, *, already_cut: bool = False) -> None:
        if len(labels) <= limit and not already_cut:
            return
        worker = get_worker_info()
        row = self.counts[0 if worker is None else (worker.id + 1) % MAX_LOADER_PROCESSES]
        if row[0] == 0:
            row[2] = index
        row[0] += 1
        row[1] += int(not (labels[:limit] != IGNORE_INDEX).any())

    def report(self, samples: Sequence[Sample], limit: int) -> str | None:
        """One sentence, or nothing when no sample was cut."""
        total, untrained, _ = self.counts.sum(dim=0).tolist()
        if total == 0:
            return None
        first = min(int(row[2]) for row in self.counts if row[0] > 0)
        lost = f", and {untrained} of them kept no token to train on" if untrained else ""
        return (
            f"{total} samples drawn were cut at --model_max_length {limit}{lost}; "
            f"the first is {describe(samples[first], first)}"
        )


def load_samples(data_path: str | None) -> list[Sample]:
    """Read the JSON file of a data set."""
    if not data_path:
        raise InputError("no training data: give its JSON file with --data_path")
    try:
        text = Path(data_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the training data {data_path!r}: {error}") from error
    try:
        samples = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"the training data {data_path!r} is not valid JSON: {error.msg} at line {error.lineno}, "
            f"column {error.colno}"
        ) from error
    if not isinstance(samples, list):
        raise InputError(
            f"the training data {data_path!r} must be a JSON list of samples, not a {type(samples).__name__}"
        )
    if not samples:
        raise InputError(f"the training data {data_path!r} holds no samples")
    for index, sample in enumerate(samples):
        if fault := _fault(sample):
            raise InputError(f"{describe(sample, index)} of {data_path!r}: {fault}")
    return samples


def image_names(sample: Sample) -> list[str]:
    """Paths of a sample's images; none, one or several."""
    image = sample.get("image")
    if not image:
        return []
    return [image] if isinstance(image, str) else list(image)


def describe(sample: Sample, index: int) -> str:
    named = isinstance(sample, dict) and "id" in sample
    return f"sample {index}" + (f" (id {sample['id']!r})" if named else "")


def _fault(sample: Any) -> str | None:
    """What is wrong with the form of a sample, or nothing."""
    if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
        return "it is not an object with a list 'conversations'"
    if not sample["conversations"]:
        return "it has no turns"
    for number, turn in enumerate(sample["conversations"]):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            return f"turn {number} is not an object with 'from' and a text 'value'"
    image = sample.get("image")
    if (
        image
        and not isinstance(image, str)
        and not (isinstance(image, list) and all(isinstance(i, str) for i in image))
    ):
        return "'image' is neither a path nor a list of paths"
    return None


def _num_words(sample: Sample) -> int:
    return sum(len(turn["value"].split()) for turn in sample["conversations"])


def _num_text_marks(turns: Sequence[Sample]) -> int:
    """Image marks in the human's turns of a sample without an image."""
    return sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns if turn["from"] == "human")


def _flatten(values: Any) -> list[Any]:
    return [entry for value in values for entry in (value if isinstance(value, list) else [value])]
