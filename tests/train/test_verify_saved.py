"""The check at the end of a run: what was saved, loaded again, has the loss of what was trained; another loss is an error."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE
from safetensors.torch import load_file, save_file
from train_kit import BASE, argv

from llava.train import run as run_module
from llava.train.arguments import parse_train_args
from llava.train.run import run
from llava.train.run_folder import verify
from llava.train.train import main


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def flags(folder: Path, **more: Any) -> list[str]:
    return argv(folder, **{"max_steps": 2, "learning_rate": "1e-2", "verify_saved": True, **more})


RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora with a tower": {"lora_enable": True, "lora_r": 4, "unfreeze_mm_vision_tower": True},
    "projector": {"tune_mm_mlp_adapter": True, "model": BASE},
    "packed": {"packing": True},
    "bf16": {"bf16": True},
    "tiles": {
        "image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(56, 112), (112, 56)]",
        "mm_patch_merge_type": "spatial_unpad",
    },
}  # fmt: skip


@pytest.mark.parametrize("layer_by_layer", [False, True], ids=["loaded", "read layer by layer"])
@pytest.mark.parametrize("name", RUNS)
def test_both_losses_are_said(
    name: str, layer_by_layer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if layer_by_layer:
        monkeypatch.setattr(verify, "_SHARE_OF_MEMORY", 0)
        monkeypatch.setattr(verify, "load", None)
    with caplog.at_level(logging.INFO, logger="llava"):
        run(*parse_train_args(flags(tmp_path, **RUNS[name])))
    said = re.search(r"loss of the trained model on 2 samples (\S+), of the saved one (\S+)", caplog.text)
    assert said is not None
    trained, saved = (float(number) for number in said.groups())
    assert saved == pytest.approx(trained, rel=0.05 if name == "bf16" else 1e-4)


def spoiled(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen to the folder between saving and checking."""
    save = run_module._save_result

    def save_and_change(trainer: Any) -> None:
        save(trainer)
        changed(Path(trainer.args.output_dir))

    monkeypatch.setattr(run_module, "_save_result", save_and_change)


def another_layer(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mm_vision_select_layer": -1}))


def projector_of_ones(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.mm_projector.0.weight"] = torch.ones_like(weights["model.mm_projector.0.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_norm(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (another_layer, "is not the model that was trained: its loss on the same batch is"),
        (projector_of_ones, "is not the model that was trained"),
        (no_norm, "cannot be loaded: tensor 'model.norm.weight'"),
    ],
)
def test_another_model_is_an_error(
    changed: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled(changed, monkeypatch)
    assert main(flags(tmp_path)) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is False


def test_it_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(projector_of_ones, monkeypatch)
    assert main(flags(tmp_path, verify_saved=False)) == 0


def test_a_model_without_images_is_not_checked_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "well"}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": "1", "conversations": turns}] * 2))
    with caplog.at_level(logging.INFO, logger="llava"):
        run(*parse_train_args(flags(tmp_path / "run", model=BASE, vision_tower="", data_path=tmp_path / "text.json")))
    assert "the saved model is not checked: it has no vision tower" in caplog.text
