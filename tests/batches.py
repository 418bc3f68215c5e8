"""Random training batches for the models of tiny.py."""

from __future__ import annotations

from typing import Any

import torch

SIDE = 28


def batch_of(*rows: tuple[int, int], seed: int = 0, tiles: int = 0) -> dict[str, Any]:
    """Rows of (number of text tokens, number of images) with random ids; every row owns at least one image.

    Some labels are masked, but never the first: what a packed row must not predict from its neighbour would be trained.
    """
    draw = torch.Generator().manual_seed(seed)
    width = max(text + marks for text, marks in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (text, marks) in enumerate(rows):
        tokens = torch.randint(3, 300, (text + marks,), generator=draw)
        tokens[1 : 1 + 2 * marks : 2] = -200
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    labels = ids.masked_fill(~mask | (torch.rand(ids.shape, generator=draw) < 0.3), -100)
    labels[:, 0] = ids[:, 0]
    num_images = [max(1, marks) for _, marks in rows]
    shape = (tiles, 3, SIDE, SIDE) if tiles else (3, SIDE, SIDE)
    images = torch.randn(sum(num_images), *shape, generator=draw)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": images}
    if tiles:  # 28 x 56 pixels: an overview and two tiles
        batch["image_sizes"] = [(SIDE, 2 * SIDE)] * sum(num_images)
    return batch
