"""Train with FlashAttention 2: `python -m llava.train.train_mem`, same flags as `llava.train.train`."""

from __future__ import annotations

import sys

from llava.train.train import main, train

__all__ = ["main", "train"]

ATTENTION = "flash_attention_2"

if __name__ == "__main__":
    sys.exit(main(attn_implementation=ATTENTION))
