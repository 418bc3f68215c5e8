"""The same tensors in transformers' own LLaVA classes and in ours give the same logits.

transformers puts `<image>` tokens into the ids, one for every feature, and fills them; ours has one -200 per image. The two
implementations share nothing above the vision and language models themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipVisionConfig
from transformers_kit import (
    GENERATIONS,
    IMAGE_TOKEN,
    TEXT,
    TOWER,
    save_peer,
    small_granite_vision,
    small_llava,
    small_llava_next,
    small_vipllava,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.images.layout import ImageSize, plan
from llava.model.builder import load


def compare(
    peer: Any,
    ours: Any,
    rows: list[list[int]],
    pixels: list[torch.Tensor],
    sizes: list[tuple[int, int]],
    next_layout: bool,
) -> None:
    """`rows` hold -200 per image, over the batch in order; `sizes` are (width, height)."""
    policy = ours.image_policy()
    counts = iter(
        plan(ImageSize(*size), policy).num_features if next_layout else policy.features_per_tile for size in sizes
    )
    expanded = [
        [t for token in row for t in ([IMAGE_TOKEN] * next(counts) if token == IMAGE_TOKEN_INDEX else [token])]
        for row in rows
    ]
    width, own_width = max(map(len, expanded)), max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in expanded])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in expanded])
    own_ids = torch.tensor([row + [0] * (own_width - len(row)) for row in rows])
    own_mask = torch.tensor([[1] * len(row) + [0] * (own_width - len(row)) for row in rows])
    extra: dict[str, Any] = {}
    if next_layout:
        most = max(len(tiles) for tiles in pixels)
        padded = [torch.cat([tiles, tiles.new_zeros(most - len(tiles), *tiles.shape[1:])]) for tiles in pixels]
        extra["pixel_values"] = torch.stack(padded)
        extra["image_sizes"] = torch.tensor([(height, width) for width, height in sizes])
    else:
        extra["pixel_values"] = torch.stack(pixels)
    labels = torch.where((ids == IMAGE_TOKEN) | (mask == 0), -100, ids)
    own_labels = torch.where((own_ids == IMAGE_TOKEN_INDEX) | (own_mask == 0), -100, own_ids)
    with torch.no_grad():
        theirs = peer(input_ids=ids, attention_mask=mask, labels=labels, **extra)
        images = pixels if next_layout else torch.stack(pixels)
        mine = ours(own_ids, attention_mask=own_mask, labels=own_labels, images=images, image_sizes=sizes)
    assert theirs.logits.std() > 0.1  # the numbers say something
    torch.testing.assert_close(mine.logits[mask.bool()], theirs.logits[mask.bool()], atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-4, rtol=0)


def random_tiles(num: int, side: int, seed: int) -> torch.Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("text", TEXT)
def test_llava(tmp_path: Path, text: str, generation: str) -> None:
    peer = small_llava(text)
    ours = load(save_peer(tmp_path, peer, generation), device="cpu").model
    pixels = list(random_tiles(3, 28, seed=1))
    rows = [[1, 5, IMAGE_TOKEN_INDEX, 9, 17], [1, IMAGE_TOKEN_INDEX, 6, IMAGE_TOKEN_INDEX, 7, 8, 200]]
    compare(peer, ours, rows, pixels, [(28, 28)] * 3, next_layout=False)


@pytest.mark.parametrize(("layer", "strategy", "side"), [(-1, "default", 28), (1, "full", 28), (-3, "full", 56)])
def test_llava_layers_strategies_and_sizes(tmp_path: Path, layer: int, strategy: str, side: int) -> None:
    peer = small_llava(layer=layer, strategy=strategy, side=side)
    ours = load(save_peer(tmp_path, peer), device="cpu").model
    compare(
        peer,
        ours,
        [[1, 5, IMAGE_TOKEN_INDEX, 9]],
        list(random_tiles(1, side, seed=2)),
        [(side, side)],
        next_layout=False,
    )


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("layers", [(-2, -3, 1), (3, 0)], ids=str)
def test_vipllava(tmp_path: Path, layers: tuple[int, ...], generation: str) -> None:
    peer = small_vipllava(layers)
    ours = load(save_peer(tmp_path, peer, generation), device="cpu").model
    rows = [[1, 5, IMAGE_TOKEN_INDEX, 9, 17], [1, IMAGE_TOKEN_INDEX, 6, IMAGE_TOKEN_INDEX, 7, 8, 200]]
    compare(peer, ours, rows, list(random_tiles(3, 28, seed=1)), [(28, 28)] * 3, next_layout=False)


def test_granite_vision(tmp_path: Path) -> None:
    peer = small_granite_vision()
    ours = load(save_peer(tmp_path, peer), device="cpu").model
    sizes = [(60, 20), (100, 99)]
    tiles = [plan(ImageSize(*size), ours.image_policy()).num_tiles for size in sizes]
    pixels = [random_tiles(num, 28, seed=4 + i) for i, num in enumerate(tiles)]
    compare(peer, ours, [[1, 5, IMAGE_TOKEN_INDEX, 4, IMAGE_TOKEN_INDEX, 9]], pixels, sizes, next_layout=True)


def test_llava_with_siglip(tmp_path: Path) -> None:
    peer = small_llava("qwen2", strategy="full", tower=SiglipVisionConfig(**TOWER, image_size=28, patch_size=14))
    ours = load(save_peer(tmp_path, peer), device="cpu").model
    compare(
        peer, ours, [[1, 5, IMAGE_TOKEN_INDEX, 9]], list(random_tiles(1, 28, seed=3)), [(28, 28)], next_layout=False
    )


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        [(28, 28)],
        [(60, 20)],
        [(20, 60), (300, 100)],
        [(100, 99), (31, 77), (640, 480)],
    ],
    ids=str,
)
def test_llava_next(tmp_path: Path, sizes: list[tuple[int, int]], generation: str) -> None:
    peer = small_llava_next()
    ours = load(save_peer(tmp_path, peer, generation), device="cpu").model
    policy = ours.image_policy()
    pixels = [random_tiles(plan(ImageSize(*size), policy).num_tiles, 28, seed=4 + i) for i, size in enumerate(sizes)]
    rows = [[1, 5 + i, IMAGE_TOKEN_INDEX, *range(9, 9 + 3 * i + 2)] for i in range(len(sizes))]
    compare(peer, ours, rows, pixels, sizes, next_layout=True)


def test_llava_next_of_another_size(tmp_path: Path) -> None:
    peer = small_llava_next("mistral", side=56)
    ours = load(save_peer(tmp_path, peer), device="cpu").model
    sizes = [(500, 375), (90, 200)]
    pixels = [
        random_tiles(plan(ImageSize(*size), ours.image_policy()).num_tiles, 56, seed=9 + i)
        for i, size in enumerate(sizes)
    ]
    compare(peer, ours, [[1, IMAGE_TOKEN_INDEX, 4, IMAGE_TOKEN_INDEX, 9, 10]], pixels, sizes, next_layout=True)


@pytest.mark.parametrize("make", [small_llava, small_llava_next, small_vipllava, small_granite_vision])
def test_saved_in_the_original_layout(tmp_path: Path, make: Callable[[], Any]) -> None:
    """Loaded from transformers' layout, saved in the original one, loaded again: the same tensors, the same settings."""
    first = load(save_peer(tmp_path / "theirs", make()), device="cpu")
    first.save(tmp_path / "ours")
    again = load(tmp_path / "ours", device="cpu")
    assert again.info.kind == "full"
    state = first.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    assert again.model.image_policy() == first.model.image_policy()
    assert again.image_processor == first.image_processor
