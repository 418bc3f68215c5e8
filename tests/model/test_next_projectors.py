"""Recorded projectors and selections of LLaVA-NeXT: names of tensors, outputs, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_data import HERE

from llava.errors import InputError
from llava.model.config import LlavaSettings
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector

NEXT = HERE / "next"
RECORDED = json.loads((NEXT / "extras.json").read_text())
REFUSED = ("pooler", "nonsense")  # the first gives fewer features than its own way to merge tiles counts


@pytest.mark.parametrize("case", RECORDED["projectors"], ids=lambda case: case["mm_projector_type"])
def test_projector(case: dict) -> None:
    kind = case["mm_projector_type"]
    width = 32 if kind == "identity" else 64
    config = SimpleNamespace(mm_projector_type=kind, mm_hidden_size=32, hidden_size=width)
    if kind in REFUSED:
        with pytest.raises(InputError, match=f"unknown mm_projector_type '{kind}'"):
            build_vision_projector(config)  # type: ignore[arg-type]
        return
    projector = build_vision_projector(config)  # type: ignore[arg-type]
    assert {name: list(value.shape) for name, value in projector.state_dict().items()} == case["keys"]
    with np.load(NEXT / "extras.npz") as data:
        state = {name: torch.from_numpy(data[f"{kind}/state/{name}"]) for name in case["keys"]}
        given, wanted = (torch.from_numpy(data[f"{kind}/{end}"]) for end in ("in", "out"))
    projector.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(projector(given), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "case", RECORDED["clip_select"], ids=lambda case: f"{case['select_feature']}-{case['select_layer']}"
)
def test_selected_features(case: dict) -> None:
    config = SimpleNamespace(
        mm_vision_tower=str(NEXT / "checkpoints/vision/clip-28-p4"),
        mm_vision_select_layer=case["select_layer"],
        mm_vision_select_feature=case["select_feature"],
    )
    if case["select_feature"] not in ("patch", "cls_patch"):
        with pytest.raises(InputError, match="unknown mm_vision_select_feature"):
            LlavaSettings.from_hf(config)
        return
    tower = build_vision_tower(config)
    with np.load(NEXT / "extras.npz") as data, torch.no_grad():
        features = tower(torch.from_numpy(data["clip/in"])).double()
    assert list(features.shape) == case["out"]["shape"]
    assert float(features.sum()) == pytest.approx(case["out"]["sum"], abs=1e-3)
    assert float(features.square().sum()) == pytest.approx(case["out"]["sq_sum"], rel=1e-6)
