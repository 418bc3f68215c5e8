"""The recorded training runs, repeated by our trainer on the recorded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE, golden
from safetensors.torch import load_file
from train_kit import BY_BATCH, argv, feed, recorded_batches, recording, trainer_for

from llava.train.train import train


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


RUNS: dict[str, dict[str, Any]] = {
    "adamw_full": {"max_steps": 10},
    "adamw_accum2_constant": {
        "max_steps": 5,
        "learning_rate": "1e-3",
        "gradient_accumulation_steps": 2,
        "loss_average": "micro_batches",
        "lr_scheduler_type": "constant",
    },
    "adamw_projector_only": {"max_steps": 10, "learning_rate": "1e-2", "tune_mm_mlp_adapter": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_recorded_run(name: str, tmp_path: Path) -> None:
    recorded = recording(f"training/{name}.json")
    trainer = trainer_for(argv(tmp_path, **{**RUNS[name], **BY_BATCH}))
    losses = feed(trainer, recorded_batches())
    trainer.train()

    accumulated = RUNS[name].get("gradient_accumulation_steps", 1)  # a micro-batch's loss is its part of the step's
    assert [loss * accumulated for loss in losses] == pytest.approx([s["loss"] for s in recorded["steps"]], abs=2e-4)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    per_step = len(recorded["steps"]) // trainer.state.global_step
    assert rates == pytest.approx([step["lr"][0] for step in recorded["steps"][::per_step]], rel=1e-6)
    trained = dict(trainer.model.named_parameters())
    assert sorted(n for n, p in trained.items() if p.requires_grad) == sorted(recorded["requires_grad"])
    for key, expected in load_file(golden(f"training/{name}.final.safetensors")).items():
        assert (trained[key].detach() - expected).abs().max().item() < 5e-4, key


def test_recorded_finetuning_from_its_command_line(tmp_path: Path) -> None:
    """Everything from the arguments on: the order of samples, their tokens and pixels, the steps, the saved weights."""
    recorded = recording("training.json")["checkpoint_making_runs"]["full"]
    words = list(recorded["argv"])
    words[words.index("--output_dir") + 1] = str(tmp_path)
    trainer = train(argv=[*words, "--disable_tqdm", "True"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([step["loss"] for step in recorded["steps"]], abs=1e-3)
    saved = load_file(tmp_path / "model.safetensors")
    for name, expected in load_file(golden("training/finetune_full.final.safetensors")).items():
        assert (saved[name] - expected).abs().max().item() < 5e-4, name


def test_first_gradients_and_sgd_curve(tmp_path: Path) -> None:
    """Gradients of the first batch, then ten plain gradient steps without clipping."""
    recorded = recording("training.json")
    model = trainer_for(argv(tmp_path)).model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    curve = []
    for step, batch in enumerate(recorded_batches()):
        loss = model(**batch).loss
        loss.backward()
        if step == 0:
            assert loss.item() == pytest.approx(recorded["step0_grad"]["loss"], abs=1e-4)
            norms = {name: p.grad.norm().item() for name, p in parameters.items()}
            assert norms == pytest.approx(recorded["step0_grad"]["norms"], rel=1e-3, abs=1e-5)
            for name, expected in load_file(golden("training/step0_grads_small.safetensors")).items():
                torch.testing.assert_close(parameters[name].grad, expected, atol=1e-4, rtol=1e-3)
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters.values()])).item()
        curve.append((loss.item(), norm))
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    steps = recorded["sgd_curve"]["steps"]
    assert [loss for loss, _ in curve] == pytest.approx([step["loss"] for step in steps], abs=1e-3)
    assert [norm for _, norm in curve] == pytest.approx([step["grad_norm"] for step in steps], rel=1e-2)
    sums = {name: p.sum(dtype=torch.float64).item() for name, p in parameters.items()}
    assert sums == pytest.approx(recorded["sgd_curve"]["final_param_sums"], abs=5e-2)
