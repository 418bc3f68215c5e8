"""The blocks of the key-value cache: a pool with reference counts, and prefixes found again by their hash.

In: numbers of blocks, and hashes of their contents. Out: block numbers. The tensors are in decoder.py; importing this needs no
torch. A block holds the keys and values of `block_size` tokens of one sequence. Full blocks have a hash of everything up to
their end, text and images alike. A sequence that begins like another one shares its blocks instead of computing them: they
are counted, never copied, and written only by the sequence that filled them.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.errors import InputError

if TYPE_CHECKING:
    import torch

    from llava.engine.decoder import Decoder

HOST_SHARE = 0.25  # of the memory that is free on a CPU machine
UNKNOWN_HOST_MEMORY = 4 * 2**30  # where a system does not tell what is free
WORKSPACE = 2 * 2**30  # libraries' own buffers, recorded graphs, fragments


class BlockPool:
    """Blocks 0 to num_blocks - 1, each in use (counted), free, or evictable (unused, with a content that may be found again).

    Evictable blocks are allocated last, the least recently used one first.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.caching = caching
        self.num_hits = 0  # tokens' blocks found by content, for statistics
        self._free = deque(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._num_users = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` empty blocks; None where there are not so many."""
        if count > self.num_available:
            return None
        allocated = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._evictable.popitem(last=False)
                self._drop_hash(block)
            self._num_users[block] = 1
            allocated.append(block)
        return allocated

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a sequence with these block hashes."""
        found: list[int] = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def incref(self, blocks: Sequence[int]) -> None:
        """Count one more user of each block that `find` gave."""
        for block in blocks:
            if self._num_users[block] == 0:
                del self._evictable[block]
            self._num_users[block] += 1
        self.num_hits += len(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Count one user fewer. The end of a sequence is evictable before its beginning, which others may share."""
        for block in reversed(blocks):
            self._num_users[block] -= 1
            assert self._num_users[block] >= 0, f"block {block} was released more often than allocated"
            if self._num_users[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def register_hash(self, block: int, key: bytes) -> None:
        """Make a full, computed block findable by its hash. The first of equal ones stays."""
        if self.caching and key not in self._block_of and self._hash_of[block] is None:
            self._block_of[key] = block
            self._hash_of[block] = key

    def clear(self) -> None:
        """Drop all contents, for example after weights have changed."""
        for block in list(self._block_of.values()):
            self._drop_hash(block)
        self._free.extend(self._evictable)
        self._evictable.clear()

    def _drop_hash(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            del self._block_of[key]
            self._hash_of[block] = None


def block_hash(parent: bytes, token_ids: Sequence[int], image_keys: Sequence[bytes]) -> bytes:
    """The hash of one full block after a beginning with hash `parent`.

    A feature's id is -1 minus its index in its image; the keys (content and layout) of the images that the block has part
    of follow in order, so that images with equally many features are never taken for each other.
    """
    content = hashlib.blake2b(parent, digest_size=16)
    content.update(array("q", token_ids).tobytes())
    for key in image_keys:
        content.update(key)
    return content.digest()


def num_blocks_for(
    decoder: Decoder,
    *,
    block_size: int,
    memory_fraction: float,
    max_running: int,
    max_step_tokens: int,
    context_len: int,
) -> int:
    """Blocks for every running sequence at its longest, or as many as the memory takes."""
    if decoder.device.type == "cuda":
        step_bytes = _step_bytes(decoder, max_running, max_step_tokens)
        room = _free_on_gpu(decoder.device, memory_fraction) - WORKSPACE - step_bytes
    else:
        room = int(_free_on_host() * HOST_SHARE)
    num_blocks = min(max_running * -(-context_len // block_size), room // (decoder.bytes_per_token * block_size))
    if num_blocks * block_size < min(context_len, 256):
        raise InputError(
            f"beside the model there is room for {max(num_blocks, 0) * block_size} tokens of keys and values, too few to "
            "answer anything; free some memory, raise memory_fraction, or hold the weights in 8 bits (weights='int8')"
        )
    return num_blocks


def _free_on_gpu(device: torch.device, memory_fraction: float) -> int:
    import torch

    torch.cuda.empty_cache()  # what this process holds and does not use
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - memory_fraction) * total)


def _step_bytes(decoder: Decoder, max_running: int, max_step_tokens: int) -> int:
    """What the largest step needs beside weights and cache: a layer's activations, and logits in float32."""
    vocab_size, width = decoder.embedding.shape
    inner = max(layer.up.weight.shape[0] for layer in decoder.layers)
    activations = max_step_tokens * (6 * width + 2 * inner) * decoder.embedding.element_size()
    return activations + 4 * max_running * vocab_size * 4


def _free_on_host() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows; macOS
        return UNKNOWN_HOST_MEMORY
