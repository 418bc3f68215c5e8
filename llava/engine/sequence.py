"""One completion on its way: its tokens, how far they are computed, and where its keys and values lie.

In: a prompt with a place for every image feature. The scheduler decides what is computed of it and gives it blocks, the
runner computes, and the engine adds the tokens that come back. Nothing here imports torch.

Positions count text tokens and image features alike. An image feature stands in `ids` as -1 minus its place in its image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.engine.kv_cache import block_hash
from llava.engine.ngram import Lookup

if TYPE_CHECKING:
    from llava.engine.prompt import PromptImage


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    ids: list[int]  # text tokens, and a negative number for each image feature
    images: tuple[PromptImage, ...]

    @property
    def num_image_tokens(self) -> int:
        return sum(image.num_features for image in self.images)

    @property
    def num_text_tokens(self) -> int:
        return len(self.ids) - self.num_image_tokens


class Sequence:
    """`owner` is whose completion this is, and `index` which of them; `choice` is how its tokens are chosen.

    `max_total` is the number of positions that it may take altogether. With a `continuation`, nothing is chosen: the
    probabilities of these tokens are asked for.
    """

    _placements = itertools.count()

    def __init__(
        self,
        prompt: Prompt,
        *,
        max_total: int,
        owner: Any = None,
        index: int = 0,
        choice: Any = None,
        continuation: Ids[int] = (),
    ):
        self.owner = owner
        self.index = index
        self.choice = choice
        self.images = prompt.images
        self.num_prompt = len(prompt.ids)
        self.ids = [*prompt.ids, *continuation]
        self.is_scored = bool(continuation)
        self.max_total = max_total
        self.num_computed = 0  # positions whose keys and values are there, or being made by a step under way
        self.num_pending = 0  # tokens being chosen by a step under way
        self.num_cached = 0  # positions that were found when it was admitted first
        self.blocks: list[int] = []
        self.placement = -1  # a new number whenever it gets blocks and a row
        self.row: int | None = None  # its place among the running ones, where its newest token and counts are kept
        self.has_token_in_row = False
        self.done = False
        self.lookup = Lookup()
        self._hashes: list[bytes] = []
        self._num_remembered = 0

    @property
    def num_new(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def num_total(self) -> int:
        """Positions with a token, chosen or being chosen."""
        return len(self.ids) + self.num_pending

    @property
    def num_missing(self) -> int:
        """Positions still to be computed before the next token can be chosen."""
        return self.num_total - self.is_scored - self.num_computed

    @property
    def is_exhausted(self) -> bool:
        """The last token that it may have is chosen, or being chosen."""
        return self.num_total >= self.max_total and not self.is_scored

    def block_hashes(self, block_size: int) -> list[bytes]:
        """Of every full block of tokens that are known."""
        for index in range(len(self._hashes), len(self.ids) // block_size):
            start, stop = index * block_size, (index + 1) * block_size
            keys = [image.key for image in self.images if image.start < stop and image.stop > start]
            self._hashes.append(block_hash(self._hashes[-1] if index else b"", self.ids[start:stop], keys))
        return self._hashes

    def newly_full(self, block_size: int) -> list[tuple[int, bytes]]:
        """Blocks that have become full since this was asked last, with their hashes."""
        num_full = min(self.num_computed, len(self.ids)) // block_size
        first, self._num_remembered = self._num_remembered, max(num_full, self._num_remembered)
        if num_full <= first:
            return []
        hashes = self.block_hashes(block_size)
        return [(self.blocks[index], hashes[index]) for index in range(first, num_full)]

    def place(self, blocks: list[int], num_found: int, row: int) -> None:
        """Begin with these blocks, of which the first hold `num_found` positions already."""
        self.blocks, self.row, self.num_computed = blocks, row, num_found
        self.placement = next(self._placements)
        self._num_remembered = 0

    def displace(self) -> list[int]:
        """Lose all that is computed, and give the blocks back."""
        blocks, self.blocks = self.blocks, []
        self.row, self.num_computed, self.has_token_in_row = None, 0, False
        return blocks
