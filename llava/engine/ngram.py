"""Guessing the next tokens of an answer from the text so far: what followed the same words the last time.

In: a sequence. Out: a few token ids, or none. A step computes guesses beside the sure token and keeps those that would
have been chosen anyway, so a greedy answer is the same with and without; answers that repeat their prompt come sooner.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.engine.sequence import Sequence

LENGTHS = (3, 2)  # how many tokens must agree; the longer match is the better guess


class Lookup:
    """Where each run of tokens ended last, kept up to date as tokens come."""

    def __init__(self) -> None:
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]
        self._num_read = 0

    def guess(self, ids: Ids[int], count: int) -> tuple[int, ...]:
        for end in range(
            self._num_read, len(ids)
        ):  # the run that ends with the newest token is not looked up in itself
            for length, ends in zip(LENGTHS, self._ends, strict=True):
                if end >= length:
                    ends[tuple(ids[end - length : end])] = end
        self._num_read = len(ids)
        for length, ends in zip(LENGTHS, self._ends, strict=True):
            found = ends.get(tuple(ids[-length:]))
            if found is not None:
                following = ids[found : found + count]
                image = next((place for place, token in enumerate(following) if token < 0), len(following))
                return tuple(following[:image])
        return ()


def guess(sequence: Sequence, count: int) -> tuple[int, ...]:
    """At most `count` tokens. Nothing where choosing is more than taking the likeliest, as guesses are then not exact."""
    choice = sequence.choice
    if not choice.is_plain or sequence.num_new < choice.params.min_new_tokens:
        return ()
    return sequence.lookup.guess(sequence.ids, count)
