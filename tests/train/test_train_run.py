"""Whole runs, from command line to a folder that loads and answers; going on after a stop; mistakes of a user's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE, golden
from train_kit import BASE, BY_BATCH, LLAVA, TOWER, argv, feed, recorded_batches, recording, trainer_for

from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.train.run_folder.save import load_trained
from llava.train.train import main, train

CHECKPOINTING = recording("training.json")["checkpointing"]


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def files_in(folder: Path) -> set[str]:
    return {f"./{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}


def answer(folder: Path, base: str | None = None) -> torch.Tensor:
    from PIL import Image

    tokenizer, model, image_processor, _ = load_pretrained_model(str(folder), base, "any", device="cpu")
    ids = tokenizer_image_token("USER: <image>\nWhat is it? ASSISTANT:", tokenizer, return_tensors="pt")[None]
    image = Image.open(golden("images/text_200x80.png"))
    pixels = process_images([image], image_processor, model.config)
    return model.generate(ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=5)


def trained_state(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_pretraining_then_finetuning_then_answering(tmp_path: Path) -> None:
    """Both stages as a user starts them, in processes of their own."""
    first, second = tmp_path / "pretrain", tmp_path / "finetune"
    stages = [
        argv(
            first,
            model=BASE,
            version="plain",
            data_path="train_data/pretrain.json",
            tune_mm_mlp_adapter=True,
            num_train_epochs=1,
            max_steps=-1,
        ),
        argv(
            second,
            model=BASE,
            pretrain_mm_mlp_adapter=first / "mm_projector.bin",
            group_by_modality_length=True,
            gradient_checkpointing=True,
            num_train_epochs=1,
            max_steps=-1,
            dataloader_num_workers=2,
        ),
    ]
    search_path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    for words in stages:
        command = [sys.executable, "-m", "llava.train.train", *words]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search_path})
        assert done.returncode == 0, done.stderr
    expected = {"./config.json", "./mm_projector.bin", "./trainer_state.json"}
    assert files_in(first) == expected | {f"./{name}" for name in OF_THE_RUN}
    projector = torch.load(first / "mm_projector.bin", weights_only=True)
    assert sorted(projector) == [f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("bias", "weight")]
    assert answer(first, BASE).shape[0] == 1

    tokens = answer(second)
    assert tokens.shape[0] == 1
    config = json.loads((second / "config.json").read_text())
    assert (config["model_type"], config["mm_vision_tower"], config["use_cache"]) == ("llava_llama", TOWER, True)
    saved = load_pretrained_model(str(second), None, "any", device="cpu")[1].state_dict()
    assert not torch.equal(saved["model.mm_projector.0.weight"], projector["model.mm_projector.0.weight"])


OF_THE_RUN = {"run.json", "README.md", "train.log", "loss.svg"}  # beyond what the original writes


@pytest.mark.parametrize("kind", ["full", "tune_mm_mlp_adapter", "lora"])
def test_going_on_after_a_stop_ends_where_an_uninterrupted_run_ends(kind: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "full": {},
        "tune_mm_mlp_adapter": {"tune_mm_mlp_adapter": True, "learning_rate": "1e-2"},
        "lora": {"lora_enable": True, "lora_r": 4, "learning_rate": "1e-2", "lora_dropout": 0.1},
    }[kind]
    # Six steps: the second epoch is entered, so that its order of samples has to be the same too.
    flags |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 5, "group_by_modality_length": True}
    whole = trained_state(train(argv=argv(tmp_path / "whole", **flags)))
    assert files_in(tmp_path / "whole") >= {f"./checkpoint-5/{name}" for name in ("optimizer.pt", "trainer_state.json")}

    resumed_folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", resumed_folder / "checkpoint-5")
    resumed = train(argv=argv(resumed_folder, **flags))
    assert resumed.state.global_step == 6
    for name, tensor in trained_state(resumed).items():
        assert torch.equal(tensor, whole[name]), name


def test_recorded_losses_across_a_stop(tmp_path: Path) -> None:
    recorded = CHECKPOINTING["resume"]
    flags = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 4, **BY_BATCH}
    whole = trainer_for(argv(tmp_path / "whole", max_steps=6, **flags))
    losses = feed(whole, recorded_batches())
    whole.train()
    resumed = trainer_for(argv(tmp_path / "whole", max_steps=6, **flags))
    after = feed(resumed, recorded_batches())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses == pytest.approx(recorded["uninterrupted 6 steps"], abs=1e-3)
    assert after == pytest.approx(recorded["losses after restart up to step 6"], abs=1e-3)


@pytest.mark.parametrize("kind", ["full", "tune_mm_mlp_adapter", "lora"])
def test_recorded_folder_layouts(kind: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"lora_enable": True, "lora_r": 4} if kind == "lora" else {}
    if kind == "tune_mm_mlp_adapter":
        flags = {"tune_mm_mlp_adapter": True}
    # Of the tokenizer, today's library writes fewer files and our class keeps the same ones.
    run = argv(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1, **flags)
    train(argv=run)
    # A checkpoint's card by PEFT is not kept.
    absent = ("special_tokens_map", "checkpoint-2", "checkpoint-4/README.md")
    recorded = {name for name in CHECKPOINTING[kind] if not any(part in name for part in absent)}
    found = files_in(tmp_path)
    assert recorded <= found, recorded - found
    # What is there beyond the recording lets the run be resumed, or the result be used without its base's tokenizer.
    extra = {Path(name).name for name in found - recorded}
    resumable = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    named = {
        "non_lora_trainables.bin",
        "config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert extra <= resumable | named | {"added_tokens.json"} | OF_THE_RUN, extra
    if kind == "lora":
        assert answer(tmp_path, LLAVA).shape[0] == 1


def test_recorded_layout_of_a_projector_saved_into_a_checkpoint_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"
    train(argv=argv(folder, tune_mm_mlp_adapter=True))
    recorded = CHECKPOINTING["output_dir_named_checkpoint-7 with tune_mm_mlp_adapter"]
    assert files_in(tmp_path) == set(recorded) | {f"./checkpoint-7/{name}" for name in OF_THE_RUN}


def test_a_trained_tower_is_saved_and_comes_back(tmp_path: Path) -> None:
    trainer = train(argv=argv(tmp_path, unfreeze_mm_vision_tower=True, mm_vision_tower_lr="1e-2", max_steps=2))
    trained = {name: p.detach() for name, p in trainer.model.named_parameters()}
    loaded = dict(load_pretrained_model(str(tmp_path), None, "any", device="cpu")[1].named_parameters())
    before = dict(load_pretrained_model(LLAVA, None, "any", device="cpu")[1].named_parameters())
    assert trained.keys() == loaded.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(loaded[name], tensor, atol=0, rtol=0)
    moved = [name for name in trained if "vision_tower" in name and not torch.equal(trained[name], before[name])]
    assert any("patch_embedding" in name for name in moved)
    assert not any("layers.2." in name or "post_layernorm" in name for name in moved)  # behind the layer that is read


@pytest.mark.parametrize("unfreeze", [False, True])
def test_a_tower_inside_the_base_folder_goes_along(unfreeze: bool, tmp_path: Path) -> None:
    base, result = tmp_path / "base", tmp_path / "result"
    shutil.copytree(golden(LLAVA), base)
    shutil.copytree(golden(TOWER), base / "tower")
    config = json.loads((base / "config.json").read_text()) | {"mm_vision_tower": "tower"}
    (base / "config.json").write_text(json.dumps(config))
    words = argv(result, model=base, unfreeze_mm_vision_tower=unfreeze)
    position = words.index("--vision_tower")
    del words[position : position + 2]
    train(argv=words)
    shutil.rmtree(base)
    assert answer(result).shape[0] == 1
    assert json.loads((result / "config.json").read_text())["conv_mode"] == "v1"


def test_bfloat16_keeps_float32_weights_while_training(tmp_path: Path) -> None:
    flags = {"bf16": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(argv(tmp_path, **flags))
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "vision_tower" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "vision_tower" not in name} == {torch.float32}
    losses = [entry["loss"] for entry in train(argv=argv(tmp_path, **flags)).state.log_history if "loss" in entry]
    exact = [
        entry["loss"] for entry in train(argv=argv(tmp_path / "fp32", max_steps=2)).state.log_history if "loss" in entry
    ]
    assert losses == pytest.approx(exact, abs=0.1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    from safetensors import safe_open

    for folder, expected in ((tmp_path, torch.bfloat16), (tmp_path / "checkpoint-2", torch.float32)):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.get_tensor("lm_head.weight").dtype == expected


def test_a_trained_tower_stays_in_one_precision(tmp_path: Path) -> None:
    """The layers behind the selected one are frozen, and still run on what the trained ones give them."""
    flags = {"unfreeze_mm_vision_tower": True, "max_steps": 2}
    mixed = train(argv=argv(tmp_path / "bf16", bf16=True, **flags))
    exact = train(argv=argv(tmp_path / "fp32", **flags))
    tower = mixed.model.get_vision_tower()
    assert len({parameter.dtype for parameter in tower.parameters()}) == 1
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (mixed, exact)]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_a_llava_checkpoint_keeps_its_vision_settings(tmp_path: Path) -> None:
    words = argv(tmp_path)
    for flag in ("--vision_tower", "--mm_vision_select_layer", "--mm_projector_type", "--image_aspect_ratio"):
        position = words.index(flag)
        del words[position : position + 2]
    trainer = trainer_for(words)
    config = trainer.model.config
    assert (config.mm_vision_tower, config.mm_vision_select_layer) == (TOWER, -2)
    assert (config.mm_projector_type, config.image_aspect_ratio) == ("mlp2x_gelu", "pad")
    assert trainer.train_dataset.data_args.image_aspect_ratio == "pad"


def test_another_tower_takes_the_place_of_the_checkpoints(tmp_path: Path) -> None:
    model = trainer_for(argv(tmp_path, vision_tower="checkpoints/vision/clip-tiny-28")).model
    assert model.get_vision_tower().tile_size == 28
    assert model.config.mm_vision_tower == "checkpoints/vision/clip-tiny-28"


def test_anyres_training_with_several_tilings(tmp_path: Path) -> None:
    flags = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "max_steps": 2}
    train(argv=argv(tmp_path, "--image_grid_pinpoints", "[(56, 112), (112, 56), (112, 112)]", model=BASE, **flags))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[56, 112], [112, 56], [112, 112]]
    assert answer(tmp_path).shape[0] == 1


def test_text_only_training_of_a_language_model(tmp_path: Path) -> None:
    data = tmp_path / "text.json"
    samples = [entry for entry in recording("train_data/finetune.json") if "image" not in entry]
    data.write_text(json.dumps(samples))
    words = argv(tmp_path / "out", model=BASE, data_path=data)
    position = words.index("--vision_tower")
    del words[position : position + 2]
    train(argv=words)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_path": "absent.json"}, "absent.json"),
        ({"image_folder": "train_data"}, "sample "),
        ({"version": "v9"}, "--version is 'v9'; known: "),
        ({"model": "absent-model"}, "absent-model"),
        ({"vision_tower": "absent-tower"}, "absent-tower"),
        ({"freeze_backbone": True, "tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True}, "nothing to train"),
        ({"lora_enable": True, "tune_mm_mlp_adapter": True}, "contradict"),
        ({"mm_projector_type": "mlp_gelu", "model": BASE}, "mlp_gelu"),
        ({"image_aspect_ratio": "anyres"}, "--image_grid_pinpoints"),
        ({"resume_from_checkpoint": "nowhere"}, "'nowhere' is not a checkpoint folder"),
        ({"resume_from_checkpoint": True}, "holds no complete checkpoint"),
        ({"evaluation_strategy": "epoch"}, "validation set"),
        ({"remove_unused_columns": True}, "--remove_unused_columns"),
        ({"pretrain_mm_mlp_adapter": "absent.bin"}, "absent.bin"),
        ({"image_folder": "train_data", "dataloader_num_workers": 2}, "sample "),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    flags: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(argv(tmp_path, **flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("llava train: error: ")
    assert message in error


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model = trainer_for(argv(tmp_path)).model
    for weights, message in (
        ({"model.mm_projector.9.weight": torch.zeros(1)}, "which this model does not have"),
        ({"model.mm_projector.0.bias": torch.zeros(3)}, r"\(3,\)"),
    ):
        torch.save(weights, tmp_path / "mm_projector.bin")
        with pytest.raises(ValueError, match=message):
            load_trained(model, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="is missing"):
        load_trained(model, tmp_path / "absent.bin")
