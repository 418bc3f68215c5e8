"""Validate training samples without training: list every fault with its kind and one sentence.

In: a sample, its image folder, and optionally a model's tokenizer and template. Out: all of its faults, and its length.
Training refuses the same samples one at a time (train/data.py); check.py counts and prints faults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import check_placeholders
from llava.data.formats import Sample, is_lost, media_sources, num_words
from llava.data.media import MediaSource, VideoSource
from llava.data.media_files import locate_image, locate_video, open_image, open_video
from llava.data.reader import SampleReader
from llava.data.samples import Samples
from llava.data.truncation import check_trained, fit
from llava.errors import InputError
from llava.images.video import FrameSampling
from llava.text.labels import is_unwanted, speaker_of

FAULT_KINDS = {
    "malformed": "not a sample at all, or a turn without its text",
    "missing-image": "an image that is not there, or not where samples may look",
    "broken-image": "an image that cannot be decoded",
    "placeholders": f"the number of {DEFAULT_IMAGE_TOKEN} placeholders is not that of the images",
    "turn-order": "questions and answers that do not alternate",
    "empty-answer": "an answer without text",
    "nothing-to-train": "no answer, or none within the length limit",
    "too-long": "more tokens than the limit; training cuts the end off, and what follows the first image that does not fit",
    "unread-key": "it says something that supervised training does not use",
    "duplicate-id": "an id that an earlier sample has",
}


@dataclass(frozen=True)
class SampleFault:
    kind: str  # of FAULT_KINDS
    message: str


@dataclass(frozen=True)
class CheckedSample:
    """The faults and the size of one sample."""

    index: int
    faults: tuple[SampleFault, ...]
    num_images: int = 0
    length: int | None = None  # tokens, image features included; words without a model; None where unknown


@dataclass(frozen=True)
class SampleChecker:
    """Validates samples one by one; made once and copied to every process."""

    samples: Samples
    image_folder: str | None
    reader: SampleReader | None = None
    look_at_images: bool = True
    allow_urls: bool = False

    def __call__(self, index: int) -> CheckedSample:
        part, row = self.samples.locate(index)
        try:
            sample, notes = part.file.read(row)
        except InputError as error:
            return CheckedSample(index, (SampleFault("malformed", str(error)),))
        sources = media_sources(sample)
        faults = _turn_faults(sample["conversations"]) + _placeholder_faults(sample, len(sources))
        faults += [
            SampleFault("unread-key", f"{note}; take it out, or use it where it belongs")
            for note in notes
            if is_lost(note)
        ]
        folder = part.image_folder or self.image_folder
        sizes: list[tuple[int, int]] = []
        for source in sources if self.look_at_images else ():
            fault, size = self._look_at(source, folder)
            faults += [fault] if fault is not None else []
            sizes += [size] if size is not None else []
        length: int | None = num_words(sample)
        if self.reader is not None:
            length, more = self._tokens(sample, sizes if len(sizes) == len(sources) else None)
            known = {fault.kind for fault in faults}
            faults += [fault for fault in more if fault.kind not in known]
        return CheckedSample(index, tuple(faults), len(sources), length)

    def _look_at(self, source: MediaSource, folder: str | None) -> tuple[SampleFault | None, tuple[int, int] | None]:
        """Open an image, or the first frame of a video: its fault, or an image's size."""
        is_video = isinstance(source, VideoSource)
        locate: Callable[..., object] = locate_video if is_video else locate_image
        try:
            found = locate(source, folder, flag="--image-folder", allow_urls=self.allow_urls)
        except InputError as error:
            return SampleFault("missing-image", str(error)), None
        absent = (
            isinstance(found, str)
            and "://" not in found
            and not found.startswith("data:")
            and not os.path.exists(found)
        )
        try:
            if isinstance(source, VideoSource):
                open_video(source, folder, FrameSampling(1), flag="--image-folder", allow_urls=self.allow_urls)
                return None, None
            return None, open_image(source, folder, flag="--image-folder", allow_urls=self.allow_urls).size
        except InputError as error:
            return SampleFault("missing-image" if absent else "broken-image", str(error)), None

    def _tokens(self, sample: Sample, sizes: list[tuple[int, int]] | None) -> tuple[int | None, list[SampleFault]]:
        """Count a sample's tokens, image features included, and list faults of the length; no length without image sizes."""
        reader = self.reader
        assert reader is not None
        try:
            reading = reader.read(sample)
            features = reader.image_tokens(sizes) if sizes is not None else []
        except InputError as error:
            return None, [SampleFault("turn-order", str(error))]
        if sizes is None:
            untrained = not any(label != IGNORE_INDEX for label in reading.labels)
            return None, [SampleFault("nothing-to-train", "it has no answer to train on")] * untrained
        faults: list[SampleFault] = []
        if reading.ids.count(IMAGE_TOKEN_INDEX) != len(features):  # a fault of its own
            return len(reading.ids), faults
        fitted = fit(reading.ids, features, reader.max_length)
        if fitted.is_cut:
            lost = len(features) - fitted.num_images
            images = f", {lost} of its {len(features)} images with it" if lost else ""
            faults.append(
                SampleFault(
                    "too-long",
                    f"it has {fitted.full_length} tokens, and the limit is {reader.max_length}: the end is cut off{images}",
                )
            )
        try:
            check_trained(reading.labels, fitted, reader.max_length)
        except InputError as error:
            faults.append(SampleFault("nothing-to-train", str(error)))
        return fitted.full_length, faults


def _turn_faults(turns: Sequence[Sample]) -> list[SampleFault]:
    speakers = [speaker_of(turn["from"]) for turn in turns]
    faults = []
    order = _order_fault(turns, speakers)
    if order:
        faults.append(SampleFault("turn-order", order))
    empty = [
        number
        for number, (turn, speaker) in enumerate(zip(turns, speakers, strict=True), 1)
        if speaker == "answer" and not turn["value"].strip()
    ]
    if empty:
        faults.append(SampleFault("empty-answer", f"turn {empty[0]} is an answer without text"))
    trained = [
        speaker == "answer" and not is_unwanted(turn) for turn, speaker in zip(turns[1:], speakers[1:], strict=True)
    ]
    if not any(trained):
        faults.append(SampleFault("nothing-to-train", "it has no answer to train on"))
    return faults


def _order_fault(turns: Sequence[Sample], speakers: Sequence[str | None]) -> str | None:
    """Describe the first turn that is out of order."""
    first = 1 if speakers[0] == "system" else 0
    for number, (turn, speaker) in enumerate(zip(turns, speakers, strict=True)):
        if number < first:
            continue
        if speaker is None:
            return f"turn {number + 1} is from {turn['from']!r}, which no template knows"
        expected = ("question", "answer")[(number - first) % 2]
        if speaker != expected:
            if number == first and speaker == "answer":
                return "it begins with an answer, which training leaves out since nothing was asked"
            return f"turn {number + 1} is from {turn['from']!r} where the {expected} is expected"
    if speakers[-1] == "question" and "answer" in speakers:
        return "its last question has no answer"
    return None


def _placeholder_faults(sample: Sample, num_images: int) -> list[SampleFault]:
    """Compare placeholders with images as training does: a turn about a single image may name it twice."""
    counts = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in sample["conversations"]]
    try:
        check_placeholders(sum(count > 0 for count in counts) if num_images == 1 else sum(counts), num_images)
    except InputError as error:
        return [SampleFault("placeholders", str(error))]
    return []
