"""The towers of hidden_state_towers.py and docs/extend.md's recipe: features are transformers' own, a model with each of
them is trained, saved, loaded, asked and examined."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from golden_data import HERE, golden
from PIL import Image
from train_kit import argv

from llava.convert.describe import describe_checkpoint
from llava.diagnose.checks.checkpoint import examine_checkpoint
from llava.diagnose.checks.checkpoint_vision import judge_projector
from llava.engine import SamplingParams
from llava.errors import InputError
from llava.images.image_processor import ClipImageProcessor
from llava.model.builder import load
from llava.model.checkpoints.weight_files import TensorHeader
from llava.model.config import TOWER_TYPES
from llava.model.multimodal_encoder.builder import TOWER_CLASSES, build_vision_tower
from llava.session import Session
from llava.train.train import train

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_size": 64,
}
# model type: transformers' model and config, the config's values, features per tile, width of hidden state -2
TOWERS: dict[str, tuple[str, str, dict[str, Any], int, int]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", {**SMALL, "mlp_ratio": 2}, 4, 32),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**SMALL, "mlp_ratio": 2},
        4,
        32,
    ),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {**SMALL, "num_register_tokens": 2}, 4, 32),
    "aimv2_vision_model": ("Aimv2VisionModel", "Aimv2VisionConfig", SMALL, 4, 32),
    "mlcd_vision_model": ("MLCDVisionModel", "MLCDVisionConfig", SMALL, 4, 32),
    "siglip_vision_model": (
        "SiglipVisionModel",
        "SiglipVisionConfig",
        SMALL,
        4,
        32,
    ),  # SigLIP 2 of one size is of this type
    "siglip2_vision_model": ("Siglip2VisionModel", "Siglip2VisionConfig", {**SMALL, "num_patches": 4}, 4, 32),
    "convnext": (
        "ConvNextModel",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "image_size": 64},
        16,
        32,
    ),
}


@pytest.fixture(params=TOWERS)
def tower_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model_class, config_class, values, _, _ = TOWERS[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values))
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_attention_weights_and_gradients_of_pixels(tower_folder: Path) -> None:
    args = SimpleNamespace(mm_vision_tower=str(tower_folder), mm_vision_select_layer=-2)
    tower = build_vision_tower(args)
    pixels = torch.randn(2, 3, tower.tile_size, tower.tile_size, requires_grad=True)
    features = tower(pixels)
    features.sum().backward()
    assert pixels.grad.abs().sum() > 0
    if tower_folder.name == "convnext":
        with pytest.raises(InputError, match="'convnext' has no attention"):
            tower(pixels, output_attentions=True)
        return
    again, attentions = tower(pixels, output_attentions=True)
    assert torch.allclose(again, features, atol=1e-5)
    assert len(attentions) == tower.config.num_hidden_layers
    assert torch.allclose(attentions[0].sum(-1), torch.ones(()), atol=1e-5)


def described(folder: Path) -> tuple[Any, int, int]:
    """transformers' own model of a folder, and the numbers that are expected of the tower."""
    model_class, _, _, num_features, width = TOWERS[folder.name]
    return getattr(transformers, model_class).from_pretrained(folder).eval(), num_features, width


def arguments(folder: Path, layer: int = -2, feature: str = "patch") -> Any:
    return transformers.PreTrainedConfig(
        mm_vision_tower=str(folder), mm_vision_select_layer=layer, mm_vision_select_feature=feature
    )


@torch.inference_mode()
def test_features_are_a_hidden_state_of_transformers_model(tower_folder: Path) -> None:
    model, num_features, width = described(tower_folder)
    tower = build_vision_tower(arguments(tower_folder))
    side = tower.tile_size
    images = torch.randn(2, 3, side, side)
    features = tower(images)
    assert features.shape == (2, num_features, width) == (2, tower.num_patches, tower.hidden_size)
    kind = tower_folder.name
    if kind == "siglip2_vision_model":
        rows = images.unfold(2, 14, 14).unfold(3, 14, 14)  # (N, 3, rows, columns, y, x)
        patches = rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        grid = torch.tensor([[2, 2], [2, 2]])
        states = model(
            patches, pixel_attention_mask=torch.ones(2, 4), spatial_shapes=grid, output_hidden_states=True
        ).hidden_states
    else:
        states = model(images, output_hidden_states=True).hidden_states
    expected = states[-2].flatten(2).transpose(1, 2) if kind == "convnext" else states[-2][:, -num_features:]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_the_recipe_trains_saves_loads_and_answers(
    tower_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    result = tmp_path / "result"
    trainer = train(
        argv=argv(
            result, model="checkpoints/vicuna-tiny-base", vision_tower=tower_folder, unfreeze_mm_vision_tower=True,
            mm_vision_tower_lr="1e-2", max_steps=2,
        )
    )  # fmt: skip
    trained = {name: value.detach() for name, value in trainer.model.named_parameters()}
    loaded = load(result, device="cpu")
    stored = dict(loaded.model.named_parameters())
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], trained[name]) for name in trained)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    answers = [
        Session(loaded, sampling=SamplingParams(max_new_tokens=4)).answer("What is it?", image) for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert describe_checkpoint(result).readers["llava"] == "yes"
    findings = [f for f in examine_checkpoint(str(result)).findings if f.code.startswith(("tower", "projector", "pre"))]
    assert findings == []


def test_class_tokens_and_registers_are_no_patches(tmp_path: Path) -> None:
    model_class, config_class, values, _, _ = TOWERS["dinov2_with_registers"]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**values)).eval()
    model.save_pretrained(tmp_path)
    tower = build_vision_tower(arguments(tmp_path, feature="cls_patch"))
    images = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        state = model(images, output_hidden_states=True).hidden_states[-2]
        features = tower(images)
    torch.testing.assert_close(features, torch.cat([state[:, :1], state[:, -4:]], dim=1), atol=1e-5, rtol=1e-5)
    aim = transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**SMALL))
    aim.save_pretrained(tmp_path / "aim")
    tower = build_vision_tower(arguments(tmp_path / "aim", feature="cls_patch"))
    with pytest.raises(InputError, match="cls_patch"):
        tower(images)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (
            {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 28},
            "BitImageProcessor",
        ),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}}, "ConvNextImageProcessor"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}}, "ConvNextImageProcessor"),
    ],
)
def test_pixels_are_those_of_transformers_processor(values: dict[str, Any], kind: str, tmp_path: Path) -> None:
    theirs = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    image = Image.open(golden("images/grad_64x48.png")).convert("RGB")
    reference = theirs.from_dict(dict(values))(image, return_tensors="np")["pixel_values"]
    ours = ClipImageProcessor.from_dict(values)
    again = ClipImageProcessor.from_dict(json.loads(json.dumps(ours.to_dict())))
    for processor in (ours, again):
        pixels = processor(image, return_tensors="np")["pixel_values"]
        assert pixels.shape == reference.shape
        assert np.abs(pixels - np.asarray(reference)).max() < 0.05  # a resized value may round to the next of 256


def test_each_type_of_tower_is_registered_everywhere() -> None:
    assert set(TOWER_TYPES) == set(TOWER_CLASSES)
    assert set(TOWERS) <= set(TOWER_CLASSES)


def test_a_norm_in_a_projector_is_no_sign_of_sharded_saving(tmp_path: Path) -> None:
    layers = {0: TensorHeader(tmp_path / "mm_projector.bin", "model.mm_projector.0.weight", "F32", (32,))}
    found = list(
        judge_projector(layers, kind="mlp2x_gelu", config_width=32, tower_width=32, text_width=64, place=str(tmp_path))
    )
    assert [finding.code for finding in found] == ["projector-type"]
    assert "ZeRO" not in found[0].what
