"""Packed rows on a GPU, by every attention kernel that is present: the loss and gradients of the padded batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from batches import batch_of

from llava.model.attention import use_varlen
from llava.model.builder import load
from llava.train.llava_trainer import TOKEN_TENSORS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BATCHES = {
    "images": batch_of((9, 1), (15, 1), (4, 1)),
    "images-and-text": batch_of((9, 1), (200, 0), (3, 0), (12, 1), seed=1),
    "text": batch_of((9, 0), (2, 0), (30, 0), seed=2),
    "several-images": batch_of((9, 3), (12, 0), (11, 2), seed=3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("tiny"))


def outcome(
    folder: Path, batch: dict[str, Any], kernel: str, dtype: torch.dtype, *, packed: bool, on_host: bool = False
) -> torch.Tensor:
    """Loss, and the norm of each gradient, as one tensor. `on_host` leaves ids and labels there, as the trainer does."""
    model = load(folder, device="cuda", dtype=dtype).model.train()
    if kernel == "varlen":
        assert use_varlen(model.config, torch.device("cuda"), dtype)
    else:
        model.config._attn_implementation = kernel
    placed = {
        name: value.cuda() if isinstance(value, torch.Tensor) and not (on_host and name in TOKEN_TENSORS) else value
        for name, value in batch.items()
    }
    loss = model(**placed, packed=packed, loss_only=packed)["loss"]
    loss.backward()
    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    return torch.stack([loss.detach().float(), *norms])


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("on_host", [False, True], ids=["gpu", "host"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention", "varlen", "flash_attention_2"])
def test_a_packed_row_is_its_padded_batch(kernel: str, batch: dict[str, Any], on_host: bool, folder: Path) -> None:
    if kernel == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    expected = outcome(folder, batch, "sdpa", torch.float32, packed=False)
    if kernel in ("varlen", "flash_attention_2"):  # these take half precision only
        padded = outcome(folder, batch, "sdpa", torch.bfloat16, packed=False)
        found = outcome(folder, batch, kernel, torch.bfloat16, packed=True, on_host=on_host)
        # As near to the exact numbers as the same precision is without packing.
        assert (found[0] - expected[0]).abs() <= 2 * (padded[0] - expected[0]).abs() + 2e-3
        torch.testing.assert_close(found, expected, rtol=0.1, atol=2e-3)
    else:
        found = outcome(folder, batch, kernel, torch.float32, packed=True, on_host=on_host)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
