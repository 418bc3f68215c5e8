"""Insert image features into sequences of token embeddings, then pad the sequences or pack them into one row.

In: token ids with -200 for each image, and the features of the images. Out: embeddings in which every -200 is replaced by
its image's features, as a padded batch or as one packed row. Training and the engine use the same splice. There is no
Python loop over tokens.

    B rows, L tokens of the longest row before the splice, T tokens after it, n features of an image, D text width
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
    """Rows concatenated without padding: `embeds` (sum of lengths, D), `labels` (sum of lengths,)."""

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
    """Replace each -200 by the features of the next image.

    Images are taken in the order of the placeholders, row by row. A row without a placeholder may have one image, since
    training batches give every row one: it adds nothing to the row, but its features stay in the gradient graph, so that
    every rank of a distributed run does the same work. Another number of images is an `InputError`.

    Args:
        input_ids: (B, L). They may be on the host while the features are on a GPU: indices are then computed without a
            synchronisation, and `embed` gets ids on the host.
        valid: (B, L) bool, False for padding.
        features: One (n, D) per image.
        embed: Token ids (T,) to embeddings (T, D).
        labels: (B, L); features get the label -100.
    """
    is_image = (input_ids == IMAGE_TOKEN_INDEX) & valid
    placeholders_per_row = is_image.sum(dim=1).tolist()
    used = _used_images(placeholders_per_row, len(features))
    unused = sorted(set(range(len(features))) - set(used))
    feature_lengths = [len(features[index]) for index in used]

    flat_ids = input_ids[valid]
    flat_is_image = flat_ids == IMAGE_TOKEN_INDEX
    text_embeds = embed(flat_ids[~flat_is_image])
    # Unused features come last; no index refers to them.
    source = torch.cat([text_embeds, *(features[index].to(text_embeds.dtype) for index in [*used, *unused])])

    # The number of positions of each valid token, and the index in `source` of the first.
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
    lengths = _row_lengths(valid.sum(dim=1).tolist(), placeholders_per_row, feature_lengths)
    return Spliced(embeds, spliced_labels, lengths)


def check_max_length(lengths: Sequence[int], limit: int | None, *, is_prompt: bool) -> None:
    """Warn of training rows of more than `limit` tokens, image features included, which will be truncated.

    A prompt of this length is an `InputError`, since its end is the question. Without a limit any length passes.
    """
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
    """Pad spliced rows on `side` to (B, T); rows longer than `max_length` are truncated at the end."""
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
    """One row of T tokens: `embeds` (1, T, D), `positions` (1, T) that restart with each sample, `labels` (1, T), which
    may be on the host.

    `boundaries` (samples + 1,) int32 are the starts of the samples and the end of the last; `lengths` are those of the
    samples, on the host.
    """

    embeds: Tensor
    positions: Tensor
    labels: Tensor | None
    boundaries: Tensor
    lengths: list[int]

    @property
    def longest(self) -> int:
        return max(self.lengths)


def pack(spliced: Spliced, *, max_length: int | None = None) -> PackedRow:
    """Pack spliced rows into one; rows longer than `max_length` are truncated at the end.

    The first label of a sample is masked, since the token before it is another sample's. Labels stay on their device, the
    host if the ids are there, so that nothing waits for a GPU.
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
    # A copy, not a view: a compiled first layer would otherwise be compiled a second time.
    row = torch.stack([embeds])
    return PackedRow(row, on_device(positions, device)[None], labels, on_device(boundaries, device), row_lengths)


def _positions(row_lengths: list[int]) -> Tensor:
    lengths = torch.tensor(row_lengths)
    return torch.arange(sum(row_lengths)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; from the host to a GPU by an asynchronous copy."""
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _used_images(placeholders_per_row: list[int], num_images: int) -> list[int]:
    """The indices of the images that placeholders stand for; the others belong to rows without a placeholder."""
    num_placeholders = sum(placeholders_per_row)
    if num_images == num_placeholders:
        return list(range(num_images))
    if num_images == sum(max(1, count) for count in placeholders_per_row):
        used: list[int] = []
        position = 0
        for count in placeholders_per_row:
            used += range(position, position + count)
            position += max(1, count)
        return used
    raise InputError(
        f"the prompt has {num_placeholders} <image> placeholder{'s' * (num_placeholders != 1)} but {num_images} "
        f"image{'s' * (num_images != 1)} came with it; give one image for each placeholder"
    )


def _row_lengths(valid_per_row: list[int], placeholders_per_row: list[int], feature_lengths: list[int]) -> list[int]:
    lengths, position = [], 0
    for valid, count in zip(valid_per_row, placeholders_per_row, strict=True):
        lengths.append(valid - count + sum(feature_lengths[position : position + count]))
        position += count
    return lengths
