"""`--mm_tunable_parts`: which parts a run trains, as LLaVA-NeXT names them."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_data import HERE
from train_kit import BASE, LLAVA, argv, trainer_for

from llava.errors import InputError
from llava.train.arguments import parse_train_args

LANGUAGE, PROJECTOR, TOWER = "mm_language_model", "mm_mlp_adapter", "mm_vision_tower"


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def part_of(name: str) -> str:
    return TOWER if "vision_tower" in name else PROJECTOR if "mm_projector" in name else LANGUAGE


@pytest.mark.parametrize(
    "parts",
    [(PROJECTOR,), (LANGUAGE,), (TOWER,), (PROJECTOR, LANGUAGE), (TOWER, PROJECTOR), (TOWER, PROJECTOR, LANGUAGE)],
)
def test_the_named_parts_are_trained(parts: tuple[str, ...], tmp_path: Path) -> None:
    """With spaces after the commas, which LLaVA-NeXT takes for part of a name."""
    words = argv(tmp_path, mm_tunable_parts=", ".join(parts), mm_vision_tower_lr="2e-6", model=BASE)
    trainer = trainer_for(words)
    model = trainer.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in trained} == set(parts)
    used = {id(p) for module in model.get_vision_tower().modules_used() for p in module.parameters()}
    for name, parameter in model.named_parameters():
        expected = part_of(name) in parts and (part_of(name) != TOWER or id(parameter) in used)
        assert (name in trained) == expected, name
    assert model.config.mm_tunable_parts == ",".join(parts)
    rates = {
        part_of(name): group["lr"]
        for group in trainer.create_optimizer().param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is one for one in group["params"])
    }
    assert rates == {part: 2e-6 if part == TOWER else 2e-3 for part in parts}


def test_adapters_are_the_language_models_part(tmp_path: Path) -> None:
    words = argv(tmp_path, mm_tunable_parts=f"{LANGUAGE},{TOWER}", lora_enable=True, lora_r=4)
    trained = [name for name, parameter in trainer_for(words).model.named_parameters() if parameter.requires_grad]
    assert {part_of(name) for name in trained} == {LANGUAGE, TOWER}
    assert all("lora_" in name for name in trained if part_of(name) == LANGUAGE)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"mm_tunable_parts": "mm_projector"}, "names 'mm_projector'; known: mm_language_model, mm_mlp_adapter"),
        ({"mm_tunable_parts": " , "}, "is empty"),
        ({"mm_tunable_parts": LANGUAGE, "freeze_backbone": True}, "--freeze_backbone and .* contradict"),
        ({"mm_tunable_parts": LANGUAGE, "tune_mm_mlp_adapter": True}, "--tune_mm_mlp_adapter and .* contradict"),
        ({"mm_tunable_parts": LANGUAGE, "unfreeze_mm_vision_tower": True}, "--unfreeze_mm_vision_tower and .* contra"),
        ({"mm_tunable_parts": PROJECTOR, "freeze_mm_mlp_adapter": True}, "--freeze_mm_mlp_adapter and .* contradict"),
        ({"mm_tunable_parts": TOWER, "lora_enable": True}, "add mm_language_model, or leave --lora_enable out"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        trainer_for(argv(tmp_path, model=LLAVA, **flags))


def test_a_projector_alone_is_saved_alone(tmp_path: Path) -> None:
    trainer = trainer_for(argv(tmp_path, mm_tunable_parts=PROJECTOR, model=BASE))
    assert trainer.args.tune_mm_mlp_adapter
    model, _, _ = parse_train_args(argv(tmp_path, mm_tunable_parts=f"{TOWER}, {TOWER}"))
    assert (model.mm_tunable_parts, model.unfreeze_mm_vision_tower) == (TOWER, True)
