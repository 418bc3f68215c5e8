"""Cut a sample that is longer than a run allows: behind a token of text, never within an image.

In: ids with one placeholder for each image, the features of each image, and the limit. Out: how many ids and images are kept.
Training, packing and `llava data check` call `fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError


class FittedLength(NamedTuple):
    """What is kept of a sample."""

    num_ids: int
    num_images: int
    length: int  # tokens, image features included
    full_length: int  # before the cut

    @property
    def is_cut(self) -> bool:
        return self.length < self.full_length


def fit(ids: Sequence[int], features: Sequence[int], limit: int) -> FittedLength:
    """Keep the first ids whose tokens, image features included, fit into `limit`; an image that does not fit ends them.

    `features` has a number for each placeholder among the ids.
    """
    full_length = len(ids) - len(features) + sum(features)
    if full_length <= limit:
        return FittedLength(len(ids), len(features), full_length, full_length)
    length = num_images = 0
    num_ids = len(ids)
    for position, token in enumerate(ids):
        size = features[num_images] if token == IMAGE_TOKEN_INDEX else 1
        if length + size > limit:
            num_ids = position
            break
        length += size
        num_images += token == IMAGE_TOKEN_INDEX
    return FittedLength(num_ids, num_images, length, full_length)


def check_trained(labels: Sequence[int], fitted: FittedLength, limit: int) -> None:
    """Raise where no token is left to train on."""
    if any(label != IGNORE_INDEX for label in labels[: fitted.num_ids]):
        return
    if not fitted.is_cut or not any(label != IGNORE_INDEX for label in labels):
        raise InputError("it has no answer to train on")
    raise InputError(
        f"its answers begin behind the limit of {limit} tokens (it has {fitted.full_length}, image features included); raise "
        "--model_max_length, shorten the text, or give fewer or smaller images"
    )
