"""One primitive that puts image features into sequences of token embeddings, and two that lay sequences out.

In: token ids with -200 for each image, and the features of the images. Out: embeddings in which every -200 has become
its image's features, as a padded batch or packed into one row. Batches, packed rows and the engine use the same splice,
so they cannot disagree. There is no Python loop over tokens.

    B rows, L tokens of the longest row before the splice, T tokens after it, D text width
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spliced:
    """Rows one after another, without padding: `embeds` (sum of lengths, D), `labels` (sum of lengths,)."""

    embeds: Tensor
    labels: Tensor | None
    lengths: list[int]


def splice(
    input_ids: Tensor,
    valid: Tensor,
    features: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    *,
    labels: Tensor | None = None,
) -> Spliced:
    """Replace each -200 of the valid tokens of `input_ids` (B, L) by the features (n, D) of the next image.

    The ids may be on the host while the features are on a GPU: where everything goes is then worked out without waiting
    for it, and `embed` takes ids from the host.

    Images are taken in the order of the marks, row by row. A row without a mark may own one image all the same, as
    training batches give every row one: it contributes nothing but keeps its place, and its features stay in the
    gradient graph so that every rank of a distributed run does the same work.
    """
    is_image = (input_ids == IMAGE_TOKEN_INDEX) & valid
    marks_per_row = is_image.sum(dim=1).tolist()
    used = _used_images(marks_per_row, len(features))
    unused = sorted(set(range(len(features))) - set(used))
    feature_lengths = [len(features[index]) for index in used]

    flat_ids = input_ids[valid]
    flat_is_image = flat_ids == IMAGE_TOKEN_INDEX
    text_embeds = embed(flat_ids[~flat_is_image])
    # Unused features come last, where no index points at them.
    source = torch.cat([text_embeds, *(features[index].to(text_embeds.dtype) for index in [*used, *unused])])

    # How many positions each valid token takes, and where in `source` its first one is read.
    device = flat_ids.device
    spans = torch.ones_like(flat_ids)
    spans[flat_is_image] = torch.tensor(feature_lengths, dtype=spans.dtype, device=device)
    starts = torch.cumsum(~flat_is_image, dim=0) - 1
    num_text = text_embeds.shape[0]
    offsets = torch.tensor([0, *feature_lengths], dtype=starts.dtype, device=device).cumsum(0)[:-1]
    starts[flat_is_image] = num_text + offsets

    total = num_text + sum(feature_lengths)
    token = torch.repeat_interleave(torch.arange(len(flat_ids), device=device), spans, output_size=total)
    ends = torch.cumsum(spans, dim=0)
    within = torch.arange(total, device=device) - (ends - spans)[token]
    embeds = source[on_device(starts[token] + within, source.device)]

    spliced_labels = None
    if labels is not None:
        flat_labels = labels[valid].masked_fill(flat_is_image, IGNORE_INDEX)
        spliced_labels = flat_labels[token]
    lengths = _row_lengths(valid.sum(dim=1).tolist(), marks_per_row, feature_lengths)
    return Spliced(embeds, spliced_labels, lengths)


def check_max_length(lengths: Sequence[int], limit: int | None, *, is_prompt: bool) -> None:
    """Say which training rows will be cut, and refuse a prompt that would be: its end is the question."""
    longest = max(lengths)
    if limit is None or longest <= limit:
        return
    if is_prompt:
        raise InputError(
            f"the prompt is {longest} tokens long with its image features, but this model's limit "
            f"(tokenizer_model_max_length) is {limit}; shorten the text or give fewer or smaller images"
        )
    num_long = sum(length > limit for length in lengths)
    logger.warning(
        "%d of %d training rows are longer than tokenizer_model_max_length=%d (longest %d) and lose their end",
        num_long, len(lengths), limit, longest,
    )  # fmt: skip


@dataclass(frozen=True)
class PaddedBatch:
    """`embeds` (B, T, D), `mask` (B, T) bool, `positions` (B, T) counting from each row's first token, `labels` (B, T)."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor | None


def pad(spliced: Spliced, *, side: str, max_length: int | None = None) -> PaddedBatch:
    """Lay spliced rows in one rectangle, padded on `side`; rows longer than `max_length` keep their beginning."""
    device = spliced.embeds.device
    lengths = torch.tensor(spliced.lengths, device=device)
    kept = lengths if max_length is None else lengths.clamp(max=max_length)
    width = min(max(spliced.lengths), max_length) if max_length is not None else max(spliced.lengths)
    column = torch.arange(width, device=device).expand(len(spliced.lengths), width)
    positions = column - (width - kept)[:, None] if side == "left" else column
    mask = (positions >= 0) & (positions < kept[:, None])

    first = lengths.cumsum(0) - lengths
    index = torch.where(mask, first[:, None] + positions, 0)
    embeds = spliced.embeds[index].masked_fill(~mask[..., None], 0.0)
    labels = None
    if spliced.labels is not None:
        labels = spliced.labels[index].masked_fill(~mask, IGNORE_INDEX)
    return PaddedBatch(embeds, mask, positions.masked_fill(~mask, 0), labels)


@dataclass(frozen=True)
class PackedRow:
    """One row of T tokens: `embeds` (1, T, D), `positions` (1, T) that begin anew with each sample, `labels` (1, T), which
    may be on the host.

    `boundaries` (samples + 1,) int32: where each sample begins, and the end; `longest` is the longest sample's length.
    """

    embeds: Tensor
    positions: Tensor
    labels: Tensor | None
    boundaries: Tensor
    longest: int


def pack(spliced: Spliced, *, max_length: int | None = None) -> PackedRow:
    """Leave spliced rows one after another; those longer than `max_length` keep their beginning.

    A sample's first label is masked, as nothing before it may predict it: what stands there is another sample's end.
    Labels stay where they are, on the host if the ids are: rows are laid out there, and nothing waits for a GPU.
    """
    device = spliced.embeds.device
    embeds, labels, row_lengths = spliced.embeds, spliced.labels, spliced.lengths
    positions = _positions(row_lengths)
    if max_length is not None and max(row_lengths) > max_length:
        kept = (positions < max_length).nonzero().flatten()
        embeds, positions = embeds[on_device(kept, device)], positions[kept]
        labels = None if labels is None else labels[on_device(kept, labels.device)]
        row_lengths = [min(length, max_length) for length in row_lengths]
    if labels is not None:
        labels = labels.masked_fill(on_device(positions == 0, labels.device), IGNORE_INDEX)[None]
    boundaries = torch.tensor([0, *row_lengths]).cumsum(0).to(torch.int32)
    # A copy, not a view: a compiled first layer would otherwise be a program of its own.
    row = torch.stack([embeds])
    return PackedRow(
        row, on_device(positions, device)[None], labels, on_device(boundaries, device), longest=max(row_lengths)
    )


def _positions(row_lengths: list[int]) -> Tensor:
    lengths = torch.tensor(row_lengths)
    return torch.arange(sum(row_lengths)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Numbers where they are needed; from the host to a GPU by a copy that nobody waits for."""
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _used_images(marks_per_row: list[int], num_images: int) -> list[int]:
    """Which images the marks stand for, in order; the others belong to rows without a mark."""
    num_marks = sum(marks_per_row)
    if num_images == num_marks:
        return list(range(num_images))
    if num_images == sum(max(1, marks) for marks in marks_per_row):
        used: list[int] = []
        position = 0
        for marks in marks_per_row:
            used += range(position, position + marks)
            position += max(1, marks)
        return used
    raise InputError(
        f"the prompt has {num_marks} <image> placeholder{'s' * (num_marks != 1)} but {num_images} "
        f"image{'s' * (num_images != 1)} came with it; give one image for each placeholder"
    )


def _row_lengths(valid_per_row: list[int], marks_per_row: list[int], feature_lengths: list[int]) -> list[int]:
    lengths, position = [], 0
    for valid, marks in zip(valid_per_row, marks_per_row, strict=True):
        lengths.append(valid - marks + sum(feature_lengths[position : position + marks]))
        position += marks
    return lengths
