"""Adapters: over packed weights, of other kinds, stopped and resumed, merged, loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE, golden
from safetensors.torch import load_file
from train_kit import BASE, LLAVA, argv, trainer_for

from llava.convert.merge_lora import main as merge
from llava.errors import InputError
from llava.model.builder import load, load_pretrained_model
from llava.train.arguments import parse_train_args
from llava.train.train import train

ROOT = HERE.parents[1]
ADAPTERS: dict[str, Any] = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": "1e-2", "max_steps": 3}


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def base_of(adapter: Path) -> str:
    """What an adapter says that it belongs to."""
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def unpacked(layer: Any) -> torch.Tensor:
    """What bitsandbytes multiplies by."""
    from bitsandbytes import functional

    if layer.weight.dtype == torch.int8:
        scale = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        return layer.weight.float() * scale.float()[:, None] / 127
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ({"bits": 4}, 1e-4),
        ({"bits": 4, "quant_type": "fp4", "double_quant": False, "model": BASE}, 1e-4),
        ({"bits": 8}, 0.05),  # products of 8-bit activations besides
    ],
)
def test_training_over_packed_weights_is_training_over_their_values(
    flags: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = ADAPTERS | {"gradient_checkpointing": True, "lora_dropout": 0, "max_steps": 4} | flags
    packed = trainer_for(argv(tmp_path / "packed", **settings))
    mark = "quant_state" if settings["bits"] == 4 else "SCB"
    layers = {
        name: module
        for name, module in packed.model.named_modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module.weight, mark)
    }
    assert len(layers) == 14  # seven of each of the two layers; not the tower's, the projector's, the output layer
    assert not any(part in name for name in layers for part in ("vision_tower", "mm_projector", "lm_head"))
    if settings["bits"] == 4:
        state = next(iter(layers.values())).weight.quant_state
        assert (state.quant_type, state.nested) == (
            settings.get("quant_type", "nf4"),
            settings.get("double_quant", True),
        )

    plain = trainer_for(argv(tmp_path / "plain", **{**settings, "bits": 16}))
    weights = dict(plain.model.named_parameters())
    before = {name: weights[f"{name}.weight"].detach().clone() for name in layers}
    for name, layer in layers.items():
        weights[f"{name}.weight"].data.copy_(unpacked(layer))
        assert not torch.equal(weights[f"{name}.weight"], before[name])
    start = trained_state(packed.model)
    assert start.keys() == trained_state(plain.model).keys()
    for name, tensor in start.items():  # the two ways of loading draw from the random generator differently
        weights[name].data.copy_(tensor)
    packed.train()
    plain.train()
    assert losses(packed) == pytest.approx(losses(plain), abs=tolerance)


@pytest.mark.parametrize("flags", [{"bits": 4}, {"lora_use_dora": True}, {"lora_use_rslora": True}])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(flags: dict[str, Any], tmp_path: Path) -> None:
    if "bits" in flags:
        pytest.importorskip("bitsandbytes")
    settings = ADAPTERS | {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1} | flags
    whole = train(argv=argv(tmp_path / "whole", **settings))
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", stopped / "checkpoint-2")
    held = {path.name for path in (stopped / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "non_lora_trainables.bin", "optimizer.pt", "scheduler.pt"} <= held
    assert base_of(stopped / "checkpoint-2") == base_of(tmp_path / "whole") == str(Path(LLAVA).absolute())
    resumed = train(argv=argv(stopped, **settings))
    assert len(losses(resumed)) == 3
    end = trained_state(whole.model)
    for name, tensor in trained_state(resumed.model).items():
        assert torch.equal(tensor, end[name]), name


@pytest.mark.parametrize("flags", [{}, {"lora_use_dora": True}, {"lora_use_rslora": True}, {"lora_bias": "all"}])
@pytest.mark.parametrize("model", [BASE, LLAVA])
def test_a_trained_adapter_loads_and_merges(flags: dict[str, Any], model: str, tmp_path: Path) -> None:
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    trainer = train(argv=argv(adapter, model=model, **(ADAPTERS | {"save_strategy": "no"} | flags)))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 2)])
    assert base_of(adapter) == str(Path(model).absolute())
    trainer.model.eval()
    with torch.no_grad():
        trained = trainer.model(**batch).logits
        beside = load_pretrained_model(str(adapter), model, "any", device="cpu")[1].eval()
        torch.testing.assert_close(beside(**batch).logits, trained, atol=1e-4, rtol=1e-4)
        base = load(model, device="cpu").model if model == LLAVA else None
        if base is not None:
            assert (base(**batch).logits - trained).abs().max() > 0.01
        command = [
            "--model-path",
            str(adapter),
            "--model-base",
            model,
            "--save-model-path",
            str(whole),
            "--dtype",
            "fp32",
        ]
        assert merge(command) == 0
        alone = load_pretrained_model(str(whole), None, "any", device="cpu")[1].eval()
        assert torch.equal(alone(**batch).logits, beside(**batch).logits)


def test_the_recorded_merge(tmp_path: Path) -> None:
    """The script as users call it, against what the original's wrote."""
    command = [sys.executable, str(ROOT / "scripts" / "merge_lora_weights.py")]
    command += ["--model-path", "checkpoints/llava-v1.5-tiny-lora", "--model-base", BASE]
    done = subprocess.run(
        [*command, "--save-model-path", str(tmp_path / "merged"), "--dtype", "fp16"],
        capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recorded = load_file(golden("checkpoint_outputs/lora_merged_fp16.safetensors"))
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert all("vision_tower" in name for name in saved.keys() - recorded.keys())  # left out of the recording
    for name, tensor in recorded.items():
        assert saved[name].dtype == torch.float16
        # The original added in half precision, here the sum is rounded once: at most a unit in the last place apart.
        torch.testing.assert_close(saved[name], tensor, atol=1e-4, rtol=2e-3)
    merged = load_pretrained_model(str(tmp_path / "merged"), None, "any", device="cpu")[1]
    beside = load_pretrained_model("checkpoints/llava-v1.5-tiny-lora", BASE, "any", device="cpu")[1].to(torch.float16)
    for name, tensor in beside.state_dict().items():
        assert torch.equal(merged.state_dict()[name].half(), tensor), name


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_a_merged_model_is_stored_as_its_base_is(stored: str, tmp_path: Path) -> None:
    base = load(BASE, device="cpu", dtype=stored)
    base.save(tmp_path / "base")
    command = ["--model-path", "checkpoints/llava-v1.5-tiny-lora", "--model-base", str(tmp_path / "base")]
    assert merge([*command, "--save-model-path", str(tmp_path / "merged")]) == 0
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, stored)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model-path", LLAVA, "--save-model-path", "x"], "holds no LoRA adapter"),
        (["--model-path", "absent", "--save-model-path", "x"], "absent"),
        (
            ["--model-path", "checkpoints/llava-v1.5-tiny-lora", "--save-model-path", BASE, "--model-base", BASE],
            "name a new folder",
        ),
    ],
)
def test_what_cannot_be_merged(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert merge(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("llava merge: error: ")
    assert message in error


def test_packed_weights_that_cannot_be_trained(tmp_path: Path) -> None:
    for flags, message in (
        ({"bits": 4}, "--lora_enable"),
        ({"bits": 4, "lora_enable": True, "quant_type": "nf5"}, "nf4, fp4"),
        ({"bits": 8, "lora_enable": True, "fsdp": "full_shard"}, "exclude each other"),
    ):
        with pytest.raises(InputError, match=message):
            parse_train_args(argv(tmp_path, **flags))
