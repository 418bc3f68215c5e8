"""Prepare training samples: data files and folders of images become batches of tensors.

In: samples `{"id", "image" (a path or a list of paths, optional), "conversations": [{"from", "value"}, ...]}`, which
data/samples.py finds in files of many forms. Out: per sample ids, labels and pixels; per batch padded ids, labels, a
mask, and images in the order of their image tokens. Prompts, tokens and labels come from text/labels.py, pixels from
mm_utils.py; the order of samples is in sampler.py.

    B samples, T tokens, I images in the batch
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Required, TypedDict, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, check_placeholders
from llava.data.formats import Sample, media_sources
from llava.data.media import MediaSource, VideoSource
from llava.data.media_files import image_label, open_image, open_video
from llava.data.samples import Samples, open_samples
from llava.data.skipped_samples import SkippedSamples, TruncatedSamples
from llava.data.truncation import check_trained, fit
from llava.errors import InputError
from llava.images.layout import image_mode, max_tiles_of, one_tile_each, plan_images
from llava.images.video import FrameSampling, Video
from llava.images.video_layout import VideoPolicy, plan_video
from llava.mm_utils import process_images
from llava.text.labels import encode_sample, preprocess_multimodal, speaker_of
from llava.text.tokenization import Tokenizer
from llava.train.arguments import DataArguments

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Words that one image counts for where samples are grouped by length; published runs counted so.
WORDS_PER_IMAGE = 128
# So many bad samples in succession mean a wrong image folder or a missing disk.
MAX_SKIPPED_IN_A_ROW = 100

Size = tuple[int, int]  # (width, height)


class TrainingItem(TypedDict, total=False):
    """A sample that is ready to be collated."""

    input_ids: Required[Tensor]  # (T,), IMAGE_TOKEN_INDEX for each image
    labels: Required[Tensor]  # (T,), IGNORE_INDEX where nothing is trained
    image: (
        Tensor | list[Tensor]
    )  # (3, H, W), (tiles, 3, H, W) with anyres, (frames, 3, H, W) of a video; a list for several
    image_size: Size | list[Size]  # with anyres only
    modality: list[str]  # "image" or "video", of each; only where there is a video


class DataModule(TypedDict):
    """What the trainer takes: data sets and the collator."""

    train_dataset: Dataset
    eval_dataset: Dataset | None
    data_collator: Callable[[Sequence[Any]], dict[str, object]]


class LazySupervisedDataset(Dataset):
    """The samples of a data file (or of several, see data/samples.py), prepared when they are drawn.

    In a multimodal run a text-only sample carries one black image without an image token, so that every rank's batch runs
    the tower and no collective operation waits for a rank that has no images.

    A bad sample raises `InputError`. With `on_bad_sample="skip"` the next good one is drawn in its place, of its modality if
    there is any: batches keep their sizes, and which samples a run sees depends only on the data.

    The tokenizer needs a padding token and `model_max_length`. Of `data_args`, `data_weights`, `on_bad_sample` and
    `pixel_dtype` may be absent. Without `conv`, `llava.conversation.default_conversation` is read at each call.
    """

    def __init__(
        self,
        data_path: str,
        tokenizer: Tokenizer,
        data_args: DataArguments | SimpleNamespace,
        *,
        conv: Conversation | None = None,
    ) -> None:
        super().__init__()
        # Data arguments of outside code lack the fields that the original does not have.
        self.list_data_dict = open_samples(data_path, weights=getattr(data_args, "data_weights", None))
        self.skips_bad = getattr(data_args, "on_bad_sample", "stop") == "skip"
        self.tokenizer = tokenizer
        self.data_args = data_args
        self.conv = conv
        for note in self.list_data_dict.notes():
            logger.warning("in the training data %s", note)
        self.truncated = TruncatedSamples(len(self))
        self.skipped = SkippedSamples(len(self))
        if not self.skips_bad:
            for index in self.list_data_dict.malformed():
                part, _ = self.list_data_dict.locate(index)
                error = self.fault(index)
                raise InputError(f"in the training data {str(part.file.path)!r}, {error}")

    def __len__(self) -> int:
        return len(self.list_data_dict)

    @property
    def lengths(self) -> list[int]:
        """Words per sample; an image counts as 128."""
        words, images = (self.list_data_dict.column(name) for name in ("words", "images"))
        return (words + WORDS_PER_IMAGE * (images > 0)).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """Words per sample, negative for a sample without an image."""
        words, images = (self.list_data_dict.column(name) for name in ("words", "images"))
        return (words * (2 * (images > 0) - 1)).tolist()

    def __getitem__(self, index: int) -> TrainingItem:
        if not self.skips_bad:
            return self._prepared(index)
        for tried, candidate in enumerate(self._candidates(index)):
            try:
                return self._prepared(candidate)
            except InputError as error:
                self.skipped.note(candidate)
                if tried + 1 == MAX_SKIPPED_IN_A_ROW:
                    raise InputError(f"{tried + 1} samples in a row are bad, the last one: {error}") from error
        raise InputError(f"every sample is bad, as {self.list_data_dict.describe(index)}: {self.fault(index)}")

    @property
    def _pixel_dtype(self) -> torch.dtype:
        return getattr(self.data_args, "pixel_dtype", torch.float32)

    def fault(self, index: int) -> InputError | None:
        """Return the error that makes a sample unusable, if any."""
        try:
            self._prepared(index)
        except InputError as error:
            return error
        return None

    def reports(self) -> list[str]:
        """Sentences about truncated and skipped samples, for the end of a run. A collective call: every rank has to make it."""
        found = (
            self.truncated.report(self.list_data_dict, self.tokenizer.model_max_length),
            self.skipped.report(self.fault) if self.skips_bad else None,
        )
        return [report for report in found if report]

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield the sample, then those after it (cyclically) that have images, if it has, or have none; then the others."""
        samples = self.list_data_dict
        wanted = _has_images(samples, index)
        for is_alike in (True, False):
            for step in range(len(self)):
                candidate = (index + step) % len(self)
                if (_has_images(samples, candidate) == wanted) == is_alike:
                    yield candidate

    def _prepared(self, index: int) -> TrainingItem:
        samples = self.list_data_dict
        part, row = samples.locate(index)
        try:
            return self._prepare(part.file[row], index, part.image_folder or self.data_args.image_folder)
        except InputError as error:
            raise InputError(f"{samples.describe(index)}: {error}") from error

    def tokens(self, sample: Sample, *, num_images: int) -> tuple[list[int], list[int]]:
        """A sample's ids, -200 for each image, and labels, however long it is."""
        turns = [sample["conversations"]]
        if num_images:  # a placeholder moves to the front of its turn, unless there are several in an order
            turns = preprocess_multimodal(turns, self.data_args, conv=self.conv, move_placeholders=num_images == 1)
        return encode_sample(turns[0], self.tokenizer, conv=self.conv, has_image=num_images > 0)

    def open_media(self, sources: Sequence[MediaSource], image_folder: str | None) -> list[Image.Image | Video]:
        """Open a sample's images, and its videos as the frames that the run trains on."""
        args, folder = self.data_args, getattr(self.data_args, "video_folder", None) or image_folder
        allow_urls = getattr(args, "image_urls", False)
        return [
            open_video(source, folder, frame_sampling(args), flag="--video_folder", allow_urls=allow_urls)
            if isinstance(source, VideoSource)
            else open_image(source, image_folder, allow_urls=allow_urls)
            for source in sources
        ]

    def told_times(self, sample: Sample, media: Sequence[Image.Image | Video]) -> Sample:
        """The sample with the times of its only video's frames before the first question, where the run tells them."""
        turns = sample["conversations"]
        first = next((at for at, turn in enumerate(turns) if speaker_of(turn["from"]) == "question"), None)
        if not getattr(self.data_args, "add_time_instruction", False) or len(media) != 1 or first is None:
            return sample
        words = media[0].time_instruction() if isinstance(media[0], Video) else ""
        if not words or DEFAULT_IMAGE_TOKEN not in turns[first]["value"]:
            return sample
        question = turns[first]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        told = {**turns[first], "value": f"{DEFAULT_IMAGE_TOKEN}\n{words}\n{question}"}
        return {**sample, "conversations": [*turns[:first], told, *turns[first + 1 :]]}

    def num_features(self, media: Sequence[Image.Image | Video]) -> list[int]:
        """The tokens of each image and video; one for each where the model is not known, as in outside code."""
        policy = getattr(self.data_args, "image_policy", None)
        if policy is None:
            return [1] * len(media)
        videos: VideoPolicy = self.data_args.video_policy or VideoPolicy()
        images = iter(plan_images([entry.size for entry in media if not isinstance(entry, Video)], policy))
        return [
            plan_video(len(entry.frames), policy, videos).num_features
            if isinstance(entry, Video)
            else next(images).num_features
            for entry in media
        ]

    def _prepare(self, sample: Sample, index: int, image_folder: str | None) -> TrainingItem:
        sources = media_sources(sample)
        if sources and not self.data_args.is_multimodal:
            raise InputError(f"it has an image ({image_label(sources[0])!r}) but the run has no --vision_tower")
        images = self.open_media(sources, image_folder)
        sample = self.told_times(sample, images)
        ids, labels = self.tokens(sample, num_images=len(sources))
        check_placeholders(
            ids.count(IMAGE_TOKEN_INDEX) if sources else num_placeholders(sample["conversations"]), len(sources)
        )
        limit = self.tokenizer.model_max_length
        fitted = fit(ids, self.num_features(images), limit)
        check_trained(labels, fitted, limit)
        if fitted.is_cut:
            self.truncated.note(index)

        item: TrainingItem = {
            "input_ids": torch.tensor(ids[: fitted.num_ids], dtype=torch.long),
            "labels": torch.tensor(labels[: fitted.num_ids], dtype=torch.long),
        }
        if fitted.num_images:
            # All of them, since the number of images decides about the tiles of each.
            pixels = self._pixels(images)[: fitted.num_images]
            sizes = [image.size for image in images[: fitted.num_images]]
            kinds = ["video" if isinstance(image, Video) else "image" for image in images[: fitted.num_images]]
            if "video" in kinds:
                item["modality"] = kinds
        elif self.data_args.is_multimodal:
            crop = self.data_args.image_processor.crop_size
            pixels, sizes = (
                [torch.zeros(3, crop["height"], crop["width"], dtype=self._pixel_dtype)],
                [(crop["width"], crop["height"])],
            )
        else:
            return item
        item["image"] = pixels if len(pixels) > 1 else pixels[0]
        if image_mode(self.data_args.image_aspect_ratio) not in (
            "square",
            "pad",
        ):  # the layout of tiles depends on the image's own size
            item["image_size"] = sizes if len(sizes) > 1 else sizes[0]
        return item

    def _pixels(self, media: Sequence[Image.Image | Video]) -> list[Tensor]:
        """Make the pixels of a sample's images, as `layout.plan_images` lays them out, and of the frames of its videos."""
        args: Any = self.data_args
        num_images = sum(not isinstance(entry, Video) for entry in media)
        if one_tile_each(max_tiles_of(args.image_aspect_ratio), num_images):
            args = SimpleNamespace(image_aspect_ratio="pad")
        processor = self.data_args.image_processor
        # One by one, since their numbers of tiles differ.
        pixels = [
            processor.preprocess(list(entry.frames), return_tensors="pt")["pixel_values"]
            if isinstance(entry, Video)
            else process_images([entry], processor, args)[0]
            for entry in media
        ]
        if getattr(self.data_args, "ends_with_newline", False):  # which a batch of single tiles has not
            pixels = [tiles[None] if tiles.dim() == 3 else tiles for tiles in pixels]
        return [tiles.to(self._pixel_dtype) for tiles in pixels]


def frame_sampling(args: DataArguments | SimpleNamespace) -> FrameSampling:
    """Which frames of a video a run trains on; outside code has LLaVA-NeXT's names of these arguments, or none."""
    return FrameSampling(
        getattr(args, "frames_upbound", 0) or None,
        fps=float(getattr(args, "video_fps", 1.0)),
        repeats=getattr(args, "force_sample", False),
    )


def num_placeholders(turns: Sequence[Sample]) -> int:
    """Image placeholders in the questions of a sample without an image."""
    return sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns if speaker_of(turn["from"]) == "question")


def _has_images(samples: Samples, index: int) -> bool:
    part, row = samples.locate(index)
    return bool(part.file.columns.images[row])


class DataCollatorForSupervisedDataset:
    """Pad samples to the longest one, truncate them at the tokenizer's `model_max_length`, gather their images.

    Returns a batch of `input_ids`, `labels` and `attention_mask` (B, T); `images`, one tensor (I, 3, H, W) where all have
    the same shape, else a list, in the order of their image tokens; `image_sizes` (width, height) if samples have sizes; and
    `modalities`, "image" or "video" of each, if there is a video.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, instances: Sequence[TrainingItem]) -> dict[str, Any]:
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
        # A padding id inside a sequence (an unknown character, where the unknown id pads) is not attended to, as in
        # published runs. The end token always is, also where a tokenizer pads with it: the model has to learn it.
        if self.tokenizer.pad_token_id != self.tokenizer.eos_token_id:
            attention_mask &= input_ids != self.tokenizer.pad_token_id

        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        if "image" in instances[0]:
            images = _flatten(item["image"] for item in instances)
            same = all(image.shape == images[0].shape for image in images)
            batch["images"] = torch.stack(images) if same else images
        if any("modality" in item for item in instances):
            batch["modalities"] = _flatten(
                item.get("modality") or ["image"] * len(_flatten([item["image"]])) for item in instances
            )
        if "image_size" in instances[0]:
            batch["image_sizes"] = _flatten(item["image_size"] for item in instances)
        return batch


def make_supervised_data_module(
    tokenizer: Tokenizer, data_args: DataArguments | SimpleNamespace, conv: Conversation | None = None
) -> DataModule:
    """Build what the trainer takes: the training set, no evaluation set, and the collator."""
    return {
        "train_dataset": LazySupervisedDataset(str(data_args.data_path), tokenizer, data_args, conv=conv),
        "eval_dataset": None,
        "data_collator": DataCollatorForSupervisedDataset(tokenizer),
    }


def _flatten(values: Iterable[T | list[T]]) -> list[T]:
    return [entry for value in values for entry in (value if isinstance(value, list) else [value])]
