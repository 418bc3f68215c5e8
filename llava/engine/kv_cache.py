"""Which block of the cache holds what: a pool with reference counts, and prefixes found again by their content.

In: numbers of blocks, and hashes of what is in them. Out: block numbers. The tensors themselves are decoder.py's; nothing
here imports torch. A block holds the keys and values of `block_size` tokens of one sequence. Full blocks have a hash of
everything up to their end, text and images alike, so a sequence that begins like another one takes its blocks instead
of computing them: they are counted, never copied, and written only by whoever filled them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence


class BlockPool:
    """Blocks 0 to num_blocks - 1. A block is in use (counted), or idle (nobody's, but its content may be wanted again),
    or free. Idle blocks are given out last, the one not used for longest first.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.caching = caching
        self.num_hits = 0  # tokens' blocks found by content, for statistics
        self._free = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._users = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def take(self, count: int) -> list[int] | None:
        """`count` blocks with nothing in them, or None where there are not so many."""
        if count > self.num_available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._idle.popitem(last=False)
                self._forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a sequence with these block hashes."""
        found: list[int] = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Count one more user of each block that `find` gave."""
        for block in blocks:
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1
        self.num_hits += len(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """One user fewer. The end of a sequence becomes idle before its beginning, which others may share."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was released more often than taken"
            if self._users[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def remember(self, block: int, key: bytes) -> None:
        """A block in use is full and computed, and can be found by its hash from now on. The first of equal ones stays."""
        if self.caching and key not in self._block_of and self._hash_of[block] is None:
            self._block_of[key] = block
            self._hash_of[block] = key

    def clear(self) -> None:
        """Forget all contents, where weights have changed, say."""
        for block in list(self._block_of.values()):
            self._forget(block)
        self._free.extend(self._idle)
        self._idle.clear()

    def _forget(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            del self._block_of[key]
            self._hash_of[block] = None


def block_hash(parent: bytes, token_ids: Sequence[int], image_keys: Sequence[bytes]) -> bytes:
    """The hash of one full block after a beginning with hash `parent`.

    A feature's id is -1 minus its place in its image; the keys (content and layout) of the images that the block has part
    of follow in order, so that images with equally many features are never taken for each other.
    """
    content = hashlib.blake2b(parent, digest_size=16)
    content.update(array("q", token_ids).tobytes())
    for key in image_keys:
        content.update(key)
    return content.digest()
