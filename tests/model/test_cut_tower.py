"""A SigLIP tower that is stored as LLaVA-NeXT cuts it, without its last layer and its head, gives the whole one's features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family import NEXT_TRAINING, change, cut
from safetensors.torch import load_file, save_file
from tiny import ANYRES, TOWER, build
from torch import Tensor

from llava.convert.convert import convert
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.errors import InputError
from llava.model.builder import load

IDS = torch.tensor([[1, 5, -200, 9]])
TILES = torch.randn(1, 3, 3, 28, 28, generator=torch.Generator().manual_seed(0))  # an overview and two tiles
LAYERS = TOWER["num_hidden_layers"]


def logits(folder: Path, **options: object) -> Tensor:
    model = load(folder, device="cpu", **({"dtype": "fp32"} | options)).model
    with torch.inference_mode():
        return model(IDS, images=TILES, image_sizes=[(56, 28)]).logits[0, -1].float()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The logits of the same model with all of its tower, of which the last but one hidden state is used."""
    folder = build(tmp_path_factory.mktemp("whole") / "model", "qwen2", siglip=True, **ANYRES)
    return logits(change(folder, **NEXT_TRAINING))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return cut(tmp_path / "model")


def test_it_loads_as_it_was_cut(folder: Path, whole: Tensor) -> None:
    assert not any(
        f"layers.{LAYERS - 1}." in name and "tower" in name for name in load_file(folder / "model.safetensors")
    )
    assert torch.equal(logits(folder), whole)
    assert torch.equal(logits(folder, device_map={"": "cpu"}), whole)
    assert examine_checkpoint(change(folder, conv_mode="llava_v1")).codes == []


def test_it_saves_and_converts(folder: Path, whole: Tensor, tmp_path: Path) -> None:
    """Conversions compare logits with the source themselves."""
    load(folder, device="cpu", dtype="fp32").save(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), whole)
    convert(folder, tmp_path / "original", to="original")
    convert(folder, tmp_path / "transformers", to="transformers")
    convert(tmp_path / "transformers", tmp_path / "back", to="original")
    for name in ("original", "transformers", "back"):
        torch.testing.assert_close(logits(tmp_path / name), whole)


@pytest.mark.parametrize("select_layer", [-1, -3])
def test_the_last_layer_left_is_read_whatever_the_config_says(
    folder: Path, whole: Tensor, select_layer: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert torch.equal(logits(change(folder, mm_vision_select_layer=select_layer)), whole)
    assert f"mm_vision_select_layer {select_layer} is not used" in caplog.text


@pytest.mark.parametrize("damage", ["two layers", "a layer but not the head", "a tensor", "a layer of CLIP"])
def test_other_holes_are_errors(folder: Path, tmp_path: Path, damage: str) -> None:
    if damage in ("a layer but not the head", "a layer of CLIP"):
        siglip = damage != "a layer of CLIP"
        folder = change(build(tmp_path / "whole", "qwen2", siglip=siglip, **ANYRES), **NEXT_TRAINING)
    state = load_file(folder / "model.safetensors")
    part = {"two layers": f"vision_model.encoder.layers.{LAYERS - 2}.", "a tensor": "layers.0.layer_norm1.weight"}.get(
        damage, f"vision_model.encoder.layers.{LAYERS - 1}."
    )
    state = {name: tensor for name, tensor in state.items() if part not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"vision_model\.encoder\.layers\.\d\.\w+\.?\w* ?.* is in no weight file|layer_norm1"
    ):
        load(folder, device="cpu")


def test_a_tower_without_a_head_needs_none(tmp_path: Path, whole: Tensor) -> None:
    """Only the head is missing: its layers are all there, and the config's layer is read."""
    folder = change(build(tmp_path / "model", "qwen2", siglip=True, **ANYRES), **NEXT_TRAINING)
    state = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".vision_model.head." not in n}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(folder), whole)
    assert "stored_tower" not in json.loads((folder / "config.json").read_text())
