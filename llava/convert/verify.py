"""Verify that a finished target equals its source: every tensor in both directions, then logits of a sample with an image.

In: a `Source` and the folder of a target that has not been moved into place. Out: a `Verification` with the largest
differences, or a `VerificationError`, after which the target is removed. No model is held in memory: tensors are compared
one by one, and logits are computed in float32 with weights that are read layer by layer (model/checkpoints/meta_model.py).

    T positions, V vocabulary
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import get_template, with_image_placeholders
from llava.convert.source import Source
from llava.convert.writer import ByteProgress, pieces
from llava.errors import InputError
from llava.files import read_json
from llava.images.video_layout import plan_video
from llava.model.checkpoints.hf_layout import published_name
from llava.model.checkpoints.meta_model import MetaModel, build_empty_model, open_meta_model, stream_weights
from llava.model.checkpoints.weight_files import TORCH_DTYPES
from llava.model.config import LlavaSettings
from llava.model.protocols import LanguageModel
from llava.processor import ModelInputs, Processor

if TYPE_CHECKING:
    from PIL import Image

TOLERANCE = 1e-4  # of logits in float32, relative to the largest logit where that is above 1
SAMPLE_QUESTION = "What is in this picture?"
CHUNK = 2**22  # elements compared at once


class VerificationError(Exception):
    """A conversion changed what it should have kept: a fault of this package, not of its input."""


@dataclass(frozen=True)
class TensorComparison:
    """The tensors of source and target, compared one by one; neither has one that the other lacks."""

    num_tensors: int
    num_bytes: int
    largest: float  # difference between an element of the source, merged where there is an adapter, and the target's

    @property
    def is_exact(self) -> bool:
        return self.largest == 0


@dataclass(frozen=True)
class LogitComparison:
    """The logits of one sample from both models, in float32."""

    num_positions: int
    largest: float  # difference
    scale: float  # the largest logit
    same_token: int  # positions at which both have the same argmax
    pixels: float | None = None  # largest difference between the two image processors; None where there is one

    def summary(self) -> str:
        return (
            f"largest difference {self.largest:.3g} at a magnitude of {self.scale:.3g}, the same most likely token at "
            f"{self.same_token} of {self.num_positions} positions"
        )


class Verification(NamedTuple):
    """What was compared; logits are None where they were not."""

    tensors: TensorComparison
    logits: LogitComparison | None = None  # of a sample with an image
    video_logits: LogitComparison | None = None  # of one with a video, for transformers' classes that take them


def verify_folder(source: Source, folder: Path, *, logits: bool) -> Verification:
    """Verify a target that our own loader reads: its tensors and, if asked for, its logits."""
    tensors = verify_tensors(source, folder)
    if not logits:
        return Verification(tensors)
    compare = (verify_logits, verify_video_logits)
    return Verification(tensors, *(verify(source, folder, exact=tensors.is_exact) for verify in compare))


# --- tensors ----------------------------------------------------------------------------------------------------------


def verify_tensors(source: Source, target: Path) -> TensorComparison:
    """Read a target as the loader does, and compare it with the source under published names."""
    written = open_meta_model(target)
    require_same_names(source.names, written.found)
    total = sum(written.found[name].num_bytes for name in source.names)
    largest = 0.0
    with ByteProgress("comparing", total) as progress:
        for name in source.names:
            largest = max(largest, _difference(source, written, name))
            progress.update(written.found[name].num_bytes)
    return TensorComparison(len(source.names), total, largest)


def require_same_names(ours: Iterable[str], theirs: Iterable[str]) -> None:
    """Raise a `VerificationError` if source and target do not have the same tensors."""
    ours, theirs = set(ours), set(theirs)
    for one, other, where in ((ours, theirs, "is missing in the target"), (theirs, ours, "is not in the source")):
        if one - other:
            raise VerificationError(f"tensor {min(one - other)!r} {where}, with {len(one - other) - 1} more")


def _difference(source: Source, written: MetaModel, name: str) -> float:
    """Return 0 where the bytes are equal; otherwise check that the target is the source, rounded to its dtype."""
    before, after = source.meta_model.found[name], written.found[name]
    if before == after and source.meta_model.is_stored_as_is(name):
        return 0.0  # the same file: a tower that both configs name
    as_is = source.meta_model.is_stored_as_is(name) and written.is_stored_as_is(name)
    if as_is and (before.dtype, before.shape) == (after.dtype, after.shape) and None not in (before.start, after.start):
        if any(a != b for a, b in zip(pieces(before), pieces(after), strict=True)):
            raise VerificationError(f"tensor {name!r} of {after.file} has other bytes than the source's")
        return 0.0
    numbers = source.read(name)
    found = written.read(name)[: numbers.shape[0]] if source.is_vocabulary(name) else written.read(name)
    return rounding(name, numbers, found, getattr(torch, TORCH_DTYPES[after.dtype]))


def rounding(name: str, numbers: Tensor, found: Tensor, dtype: torch.dtype) -> float:
    """Check that `found` is `numbers` rounded to `dtype`, and return the largest change."""
    parts = zip(numbers.reshape(-1).split(CHUNK), found.reshape(-1).split(CHUNK), strict=True)
    if not all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in parts):
        raise VerificationError(f"tensor {name!r} is not the source's, rounded to {dtype}")
    return largest_difference(numbers, found)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference, in float32, in chunks, since the copies are larger than the tensors."""
    parts = zip(ours.reshape(-1).split(CHUNK), theirs.reshape(-1).split(CHUNK), strict=True)
    differences = [(a.float() - b.float()).abs().max().item() for a, b in parts if a.numel()]
    if any(map(math.isnan, differences)):
        raise InputError("a tensor of the checkpoint holds NaN, so that no conversion of it can be verified")
    return max(differences, default=0.0)


# --- logits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerificationSample:
    """A question about a generated image: the prompt as text, and the inputs for our models."""

    image: Image.Image
    prompt: str
    inputs: ModelInputs


def make_sample(source: Source) -> VerificationSample:
    """Make the sample whose logits are compared, with the source's template, tokenizer and image processor."""
    conversation = get_template(source.conv_mode)
    image = draw_image(source.policy.tile_size)
    use_im_start_end = source.settings.tokens.use_im_start_end
    processor = Processor(source.tokenizer, source.image_processor, source.policy, use_im_start_end=use_im_start_end)
    question = with_image_placeholders(SAMPLE_QUESTION, 1, processor.image_placeholder)
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return VerificationSample(image, conversation.get_prompt(), processor(conversation, [image]))


def draw_image(side: int) -> Image.Image:
    """Draw a smooth pattern that varies everywhere, not square, and a little larger than the tower's `side` pixels."""
    import numpy as np
    from PIL import Image

    width, height = side * 5 // 4, side * 7 // 8
    across, down = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 5, height))
    channels = [np.sin(across + shift) * np.cos(down * (1 + shift)) for shift in (0.0, 0.7, 1.9)]
    return Image.fromarray(((np.stack(channels, axis=-1) + 1) * 127).astype(np.uint8))


def own_logits(model: LanguageModel, read: Callable[[str], Tensor], inputs: ModelInputs) -> Tensor:
    """Compute the logits (T, V) of one of our models, with weights that come from `read(name)`; T counts image features."""
    with torch.no_grad(), stream_weights(model, read):
        output = model(inputs.input_ids[None], images=inputs.images, image_sizes=inputs.image_sizes, use_cache=False)
    return output.logits[0]


def verify_logits(source: Source, target: Path, *, exact: bool) -> LogitComparison:
    """Compare the logits of a source with those of a target in the original or in transformers' layout."""
    sample = make_sample(source)
    ours = own_logits(source.model, source.meta_model.read, sample.inputs)
    written = open_meta_model(target)
    if written.info.kind == "transformers":
        theirs, pixels = transformers_logits(written, sample)
    else:
        theirs, pixels = own_logits(written.model, written.read, sample.inputs), None
    return compare_logits(ours, theirs, exact=exact, pixels=pixels)


def compare_logits(ours: Tensor, theirs: Tensor, *, exact: bool, pixels: float | None = None) -> LogitComparison:
    """Compare logits (T, V); if `exact`, a difference above `TOLERANCE` is a `VerificationError`."""
    rows = min(ours.shape[-1], theirs.shape[-1])  # without the rows of padding and new tokens
    if len(ours) != len(theirs):
        raise VerificationError(f"the sample has {len(ours)} positions in the source and {len(theirs)} in the target")
    largest = (ours[:, :rows] - theirs[:, :rows]).abs().max().item()
    scale = ours.abs().max().item()
    if exact and not largest <= TOLERANCE * max(1.0, scale):  # NaN fails too
        raise VerificationError(f"logits differ by {largest:.3g} at a magnitude of {scale:.3g}")
    same = int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
    return LogitComparison(len(ours), largest, scale, same, pixels)


def transformers_logits(written: MetaModel, sample: VerificationSample) -> tuple[Tensor, float]:
    """Compute the logits (T, V) of transformers' own class for the prompt and ids of the target's own processor.

    The second value is the largest difference between the two image processors' pixels.
    """
    from transformers import AutoConfig

    folder = written.info.folder
    processor = hf_processor(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": SAMPLE_QUESTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    if prompt != sample.prompt:
        raise VerificationError(f"the chat template gives {prompt!r}, and the prompt is {sample.prompt!r}")
    # As transformers does: a begin token that the template has written is not added again.
    begins = bool(begin := processor.tokenizer.bos_token) and prompt.startswith(begin)
    inputs = processor(text=prompt, images=sample.image, return_tensors="pt", add_special_tokens=not begins)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    ids = inputs["input_ids"][0].tolist()
    if collapsed(ids, config.image_token_index) != sample.inputs.input_ids.tolist():
        raise VerificationError("the target's processor gives other ids than ours")

    ours = sample.inputs.images
    assert ours is not None
    # Both models get our pixels, so that the logits compare the models alone; pixels are compared separately.
    given = ours if isinstance(ours, Tensor) else torch.stack(list(ours))
    pixels = (inputs["pixel_values"] - given).abs().max().item()
    return run_transformers(written, **{**inputs, "pixel_values": given}), pixels


def run_transformers(written: MetaModel, **inputs: object) -> Tensor:
    """Compute the logits (T, V) of transformers' own class of a target, with weights that are read layer by layer."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(written.info.folder, trust_remote_code=False)
    model = build_empty_model(
        lambda: AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=False)
    )
    stored = {published_name(header.name): name for name, header in written.found.items()}
    with torch.no_grad(), stream_weights(model, lambda name: written.read(stored[published_name(name)])):
        return model(**inputs, use_cache=False).logits[0]


def verify_video_logits(source: Source, target: Path, *, exact: bool) -> LogitComparison | None:
    """Compare the logits of a prompt with a video; None where the target's class of transformers' takes none, or reduces its
    frames otherwise (layouts/hf.py says so)."""
    written = open_meta_model(target)
    video_token = written.info.config.get("video_token_index") if written.info.kind == "transformers" else None
    if video_token is None or LlavaSettings.from_hf(written.model.config).video != source.settings.video:
        return None
    sample = make_sample(source)
    from PIL.Image import Transpose

    turns = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180)
    frames = [sample.image, *(sample.image.transpose(turn) for turn in turns)]
    pixels = source.image_processor.preprocess(frames, return_tensors="pt")["pixel_values"]  # (F, 3, S, S)
    ids = sample.inputs.input_ids
    with torch.no_grad(), stream_weights(source.model, source.meta_model.read):
        ours = source.model(
            ids[None], images=[pixels], image_sizes=[sample.image.size], modalities=["video"], use_cache=False
        ).logits[0]
    count = plan_video(len(frames), source.policy, source.settings.video).num_features
    repeats = torch.where(ids == IMAGE_TOKEN_INDEX, count, 1)
    expanded = torch.where(ids == IMAGE_TOKEN_INDEX, video_token, ids).repeat_interleave(repeats)[None]
    theirs = run_transformers(written, input_ids=expanded, pixel_values_videos=pixels[None])
    return compare_logits(ours, theirs, exact=exact)


def hf_processor(folder: Path) -> Any:
    """Read transformers' processor of a folder; without torchvision, one that takes images and no videos.

    Its processors of videos need torchvision, and those that take both refuse to be built without it.
    """
    import transformers

    values = read_json(folder / "processor_config.json")
    if not values.get("video_token") or importlib.util.find_spec("torchvision"):
        return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    base = getattr(transformers, values.pop("processor_class"))
    kind = read_json(folder / "preprocessor_config.json")["image_processor_type"]
    images_only = type(base.__name__, (base,), {"check_argument_for_proper_class": lambda self, name, part: type(part)})
    return images_only(
        image_processor=getattr(transformers, f"{kind}Pil").from_pretrained(folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        video_processor=None,
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **values,
    )


def collapsed(ids: list[int], image_token: int) -> list[int]:
    """Replace each run of image tokens by a single -200, as our ids have."""
    return [
        IMAGE_TOKEN_INDEX if token == image_token else token
        for index, token in enumerate(ids)
        if token != image_token or index == 0 or ids[index - 1] != image_token
    ]
