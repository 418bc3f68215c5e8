"""Draft tokens for speculative decoding: what followed the same n-gram the last time (prompt lookup).

In: the token ids of a sequence. Out: a few token ids, or none. A step computes the draft tokens beside the known one and
accepts those that would have been sampled, so a greedy answer is the same with and without them. Answers that repeat their
prompt come sooner.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM_LENGTHS = (3, 2)  # how many tokens must agree; the longer match is the better proposal


class NgramProposer:
    """Where each n-gram of one sequence ended last, kept up to date as tokens come."""

    def __init__(self) -> None:
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in NGRAM_LENGTHS]
        self._num_read = 0

    def propose(self, ids: Sequence[int], count: int) -> tuple[int, ...]:
        """At most `count` tokens after `ids`; an image's features cannot be proposed."""
        for end in range(self._num_read, len(ids)):  # without the n-gram that ends with the newest token
            for length, ends in zip(NGRAM_LENGTHS, self._ends, strict=True):
                if end >= length:
                    ends[tuple(ids[end - length : end])] = end
        self._num_read = len(ids)
        for length, ends in zip(NGRAM_LENGTHS, self._ends, strict=True):
            found = ends.get(tuple(ids[-length:]))
            if found is not None:
                following = ids[found : found + count]
                stop = next((index for index, token in enumerate(following) if token < 0), len(following))
                return tuple(following[:stop])
        return ()
