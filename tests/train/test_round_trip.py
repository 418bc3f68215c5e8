"""What a run trains is what loads: the loss of the trained model and that of the model that its folder gives are equal.

A matrix over what is trained, what is added to it, and what the run starts from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family import READ
from golden_data import HERE, golden
from train_kit import BASE, LLAVA, TOWER, argv

from llava.errors import InputError
from llava.model.builder import load
from llava.text.tokenization import load_tokenizer
from llava.train.arguments import parse_train_args
from llava.train.run import run

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4},
    "projector": {"tune_mm_mlp_adapter": True},
}
ADDED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "trained tower": {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": "1e-2"},
    "frozen projector": {"freeze_mm_mlp_adapter": True},
    "start and end tokens": {"mm_use_im_start_end": True},
    "patch token": {"mm_use_im_patch_token": True},
    "packed": {"packing": True},
    "another layer": {"mm_vision_select_layer": -1},
    "class feature": {"mm_vision_select_feature": "cls_patch"},
}
# A projector run trains nothing but the projector, so that it can have no trained tower and no frozen projector.
CELLS = [
    (kind, added)
    for kind in KINDS
    for added in ADDED
    if not (kind == "projector" and added in ("trained tower", "frozen projector"))
]


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@torch.no_grad()
def loss_of(model: Any, batch: dict[str, Any]) -> float:
    return float(model.eval()(**batch).loss)


def losses(folder: Path, *extra: str, **flags: Any) -> tuple[float, float]:
    """Train, and give the loss of the trained model and of the loaded one, on the same batch."""
    trainer = run(*parse_train_args(argv(folder, *extra, **{"max_steps": 2, "learning_rate": "1e-2", **flags})))
    dataset = getattr(trainer.train_dataset, "samples", trainer.train_dataset)  # may be packed
    packed = dataset is not trainer.train_dataset
    items = [trainer.train_dataset[0]] if packed else [dataset[index] for index in range(4)]
    batch = trainer.data_collator(items)
    return loss_of(trainer.model, batch), loss_of(load(folder, device="cpu").model, batch)


@pytest.mark.parametrize(("kind", "added"), CELLS)
def test_from_a_llava(kind: str, added: str, tmp_path: Path) -> None:
    trained, loaded = losses(tmp_path / "run", model=LLAVA, **KINDS[kind], **ADDED[added])
    assert loaded == pytest.approx(trained, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "added"), CELLS)
def test_from_a_language_model(kind: str, added: str, tmp_path: Path) -> None:
    if added == "frozen projector":
        losses(tmp_path / "stage1", model=BASE, tune_mm_mlp_adapter=True)
        first: dict[str, Any] = {"pretrain_mm_mlp_adapter": tmp_path / "stage1" / "mm_projector.bin"}
    else:
        first = {}
    trained, loaded = losses(tmp_path / "run", model=BASE, **first, **KINDS[kind], **ADDED[added])
    assert loaded == pytest.approx(trained, rel=1e-5)


def own_settings(folder: Path, **flags: Any) -> list[str]:
    """A run that leaves what the checkpoint says to it."""
    words = argv(folder, **{"max_steps": 2, "learning_rate": "1e-2"} | flags)
    for name in ("mm_vision_select_layer", "mm_projector_type", "image_aspect_ratio", "vision_tower"):
        place = words.index(f"--{name}")
        del words[place : place + 2]
    return words


THEIRS = [name for name in READ if name.startswith(("llava-hf/llava-onevision", "llava-hf/vip-llava"))]


@pytest.mark.parametrize("added", ["trained tower", "packed"])
@pytest.mark.parametrize("name", THEIRS)
def test_from_the_layout_of_transformers(name: str, added: str, tmp_path: Path) -> None:
    """With features of many tiles reduced, and with those of several layers: as the checkpoint has it."""
    base = READ[name](tmp_path / "base")
    trainer = run(*parse_train_args(own_settings(tmp_path / "run", model=base, **ADDED[added])))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    before, after = load(base, device="cpu").model, load(tmp_path / "run", device="cpu").model
    assert loss_of(after, batch) == pytest.approx(loss_of(trainer.model, batch), rel=1e-5)
    assert after.image_policy() == before.image_policy()
    assert after.get_vision_tower().hidden_state_indices == before.get_vision_tower().hidden_state_indices


def test_layers_that_the_projector_does_not_take_are_refused(tmp_path: Path) -> None:
    base = READ[THEIRS[1]](tmp_path / "base")
    words = [*own_settings(tmp_path / "run", model=base), "--mm_vision_select_layer", "-2"]
    with pytest.raises(InputError, match="mm_vision_select_layer -2 gives features of width 32"):
        run(*parse_train_args(words))


@pytest.mark.parametrize("kind", KINDS)
def test_from_an_adapter(kind: str, tmp_path: Path) -> None:
    losses(tmp_path / "first", **KINDS["lora"])
    trained, loaded = losses(tmp_path / "second", model=tmp_path / "first", **KINDS[kind])
    assert loaded == pytest.approx(trained, rel=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_tokens_that_the_base_has_no_rows_for(kind: str, tmp_path: Path) -> None:
    base = shutil.copytree(golden(BASE), tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens([f"<loc_{number}>" for number in range(5)], special_tokens=True)
    tokenizer.save_pretrained(base)
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "<loc_1><loc_4>"}]
    rows = [{"id": str(n), "image": "grad_64x48.png", "conversations": turns} for n in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    trained, loaded = losses(tmp_path / "run", model=base, data_path=tmp_path / "data.json", **KINDS[kind])
    assert loaded == pytest.approx(trained, rel=1e-5)


def without(*names: str) -> list[str]:
    """The settings of `argv` without some flags, as a user leaves them out."""
    words = argv("unused", max_steps=2, learning_rate="1e-2")
    for name in names:
        place = words.index(f"--{name}")
        del words[place : place + 2]
    return words


def test_settings_that_are_not_given_are_the_checkpoints(tmp_path: Path) -> None:
    words = without("mm_vision_select_layer", "image_aspect_ratio", "mm_projector_type", "output_dir")
    trainer = run(*parse_train_args([*words, "--output_dir", str(tmp_path)]))
    before = json.loads((golden(LLAVA) / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    for key in ("mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "image_aspect_ratio"):
        assert after.get(key) == before.get(key), key
    assert trainer.model.get_vision_tower().select_layer == before["mm_vision_select_layer"]


def test_a_setting_that_is_given_is_obeyed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = without("image_aspect_ratio", "output_dir", "vision_tower")
    tiles = ["--image_aspect_ratio", "anyres", "--image_grid_pinpoints", "[(56, 112), (112, 56)]"]
    trainer = run(*parse_train_args([*words, *tiles, "--output_dir", str(tmp_path)]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["image_aspect_ratio"], config["image_grid_pinpoints"]) == ("anyres", [[56, 112], [112, 56]])
    assert config["mm_vision_tower"].endswith(Path(TOWER).name)
    assert "--image_aspect_ratio anyres replaces the checkpoint's pad" in caplog.text
    image = next(item["image"] for item in trainer.train_dataset if "image" in item and "image_size" in item)
    assert image.ndim == 4
