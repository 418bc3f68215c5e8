"""Set-ups of LLaVA-NeXT's training, over a OneVision checkpoint as it is published: what is trained, at which rates."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import golden
from train_kit import argv, trainer_for
from transformers import set_seed

import llava
from llava.errors import InputError
from llava.train.arguments import parse_train_args
from llava.train.llava_trainer import LLaVATrainer
from llava.train.run import run
from llava.train.sampler import LengthGroupedSampler

RECORD = json.loads(golden("next/training.json").read_text(encoding="utf-8"))
SETUPS = {setup["name"]: setup for setup in RECORD["setups"]}
# What LLaVA-NeXT takes in silence, and its reason here.
REFUSED = {
    "parts:mm_vision_resampler": "nothing to train",  # the model has none
    "parts:nonsense": "names 'nonsense'; known:",
    "version_unknown": "--version is 'nothing'",
    "rope_scaling": "unknown flag --rope_scaling_factor",
    "video_options": "unknown flag --use_pos_skipping",
}


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded checkpoint with its tower's folder by a path of this machine."""
    folder = tmp_path_factory.mktemp("onevision") / "llava-onevision-tiny"
    shutil.copytree(golden("next/checkpoints/onevision-siglip28-qwen"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(golden("next/checkpoints/vision/siglip-28-p4"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "data.json"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A star."}]
    image = str(golden("images/grad_64x48.png"))
    rows = [{"id": str(number), "image": image, "conversations": turns} for number in range(3)]
    file.write_text(json.dumps([*rows, {"id": "text", "conversations": [{**turns[0], "value": "Hi"}, turns[1]]}]))
    return file


def words_of(setup: dict[str, Any], onevision: Path, data: Path, out: Path) -> list[str]:
    """The recorded flags; bfloat16 and GPUs are left out."""
    flags = dict(zip(setup["args"][::2], setup["args"][1::2], strict=True))
    tower = {"vision_tower": str(golden("next/checkpoints/vision/siglip-28-p4"))}
    named = {name.removeprefix("--"): value for name, value in flags.items()}
    common = {
        "image_folder": golden("images"),
        "data_path": data,
        "warmup_ratio": 0.03,
        "mm_projector_type": "mlp2x_gelu",
    }
    return argv(out, model=str(onevision), **{**common, **tower, **named})


def part_of(name: str) -> str:
    for part in ("image_newline", "vision_tower", "mm_projector", "embed_tokens", "lm_head"):
        if part in name:
            return part
    return "llm"


@pytest.mark.parametrize("name", [name for name in SETUPS if name not in REFUSED])
def test_recorded_setups(name: str, onevision: Path, data: Path, tmp_path: Path) -> None:
    setup = SETUPS[name]
    words = words_of(setup, onevision, data, tmp_path)
    trainer = trainer_for(words)
    model = trainer.model
    trained = Counter(part_of(n) for n, p in model.named_parameters() if p.requires_grad)
    expected = {part: count for part, (_, count) in setup["tensors"].items() if count}
    if "vision_tower" in expected:  # without what gets no gradient: the norm behind the layers
        expected["vision_tower"] -= 2
    if name == "no_parts_tune_adapter":  # the learned line break belongs to the projector
        expected["image_newline"] = 1
    if name == "parts:mm_vision_tower, mm_mlp_adapter":  # a space hides the projector from LLaVA-NeXT
        expected["mm_projector"] = 4
    assert dict(trained) == expected
    if name not in ("parts:mm_vision_tower, mm_mlp_adapter", "no_parts_tune_adapter"):
        assert groups_of(trainer) == recorded_groups(setup)
    for key, (_, value) in setup["config_changes"].items():
        if key in ("mm_tunable_parts", "image_grid_pinpoints", "mm_projector_lr"):
            assert getattr(model.config, key) == (value.replace(" ", "") if isinstance(value, str) else value), key
    # A flag that is not given leaves the checkpoint's setting: LLaVA-NeXT writes its own default there.
    assert model.config.mm_newline_position == "one_token"


def groups_of(trainer: LLaVATrainer) -> dict[str, tuple[float, float]]:
    """Rate and decay by parameter."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def recorded_groups(setup: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Without the norm behind the tower's layers; Qwen2's norms decay there, as transformers 4 did not know them."""
    rows = {name: (g["lr"], g["weight_decay"]) for g in setup["groups"] for name in g["names"]}
    return {
        name: (lr, 0.0 if "norm" in name else decay)
        for name, (lr, decay) in rows.items()
        if "post_layernorm" not in name
    }


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name: str, onevision: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        trainer_for(words_of(SETUPS[name], onevision, data, tmp_path))


@pytest.mark.parametrize(
    "row", RECORD["samplers"], ids=lambda row: f"{row['lengths']}-{row['batch_size']}-{row['world_size']}"
)
def test_recorded_orders(row: dict[str, Any]) -> None:
    torch.manual_seed(row["torch_manual_seed"])
    generator = torch.Generator()
    generator.manual_seed(row["generator_seed"])
    sampler = LengthGroupedSampler(
        row["batch_size"],
        row["world_size"],
        RECORD["lengths"][row["lengths"]],
        generator=generator,
        group_by_modality=True,
    )
    assert list(sampler) == row["order"]


@pytest.mark.parametrize("lora", [False, True])
def test_a_published_checkpoint_goes_on_without_an_edit(
    onevision: Path, data: Path, tmp_path: Path, lora: bool
) -> None:
    """Full training of two parts, and LoRA: the result loads, with the checkpoint's trained tower, and has the run's loss."""
    flags: dict[str, Any] = {"lora_enable": True, "lora_r": 4, "learning_rate": "1e-2"} if lora else {}
    parts = {} if lora else {"mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}
    words = argv(
        tmp_path / "run", model=str(onevision), version="qwen_1_5", data_path=data, image_folder=golden("images"),
        vision_tower=str(golden("next/checkpoints/vision/siglip-28-p4")), max_steps=2, **flags, **parts,
    )  # fmt: skip
    without = {"--image_aspect_ratio", "--mm_vision_select_layer", "--mm_projector_type"}  # the checkpoint's own
    words = [word for at, word in enumerate(words) if not {word, words[at - 1]} & without]
    set_seed(0)
    trainer = run(*parse_train_args(words))
    before, after = llava.load(onevision, device="cpu"), llava.load(tmp_path / "run", device="cpu")
    assert after.model.config.image_aspect_ratio == "anyres_max_9"
    assert after.conv_mode == "qwen_1_5"
    for (name, old), new in zip(
        before.model.get_vision_tower().named_parameters(), after.model.get_vision_tower().parameters(), strict=True
    ):
        assert torch.equal(old, new), name
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        trainer.model.eval()
        left = trainer.model(**batch).loss
        assert torch.allclose(after.model(**batch).loss, left, atol=2e-4)
        assert not torch.allclose(before.model(**batch).loss, left, atol=2e-4)
