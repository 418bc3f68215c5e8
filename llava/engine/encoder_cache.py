"""A cache of image features, bounded in bytes; the least recently used are dropped first.

In and out: an image's key (content and layout) and its features (n, D). Whoever holds features keeps them alive, whatever
happens here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class EncoderCache:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._features

    def get(self, key: bytes) -> Tensor | None:
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
            self.num_hits += 1
        return features

    def put(self, key: bytes, features: Tensor) -> None:
        """Keep a copy: what is given may be part of something larger, which would stay alive with it."""
        size = features.nbytes
        if key in self._features or size > self.max_bytes:
            return
        self._features[key] = features.clone()
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, dropped = self._features.popitem(last=False)
            self.num_bytes -= dropped.nbytes
