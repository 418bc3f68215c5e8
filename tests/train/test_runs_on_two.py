"""A run of `llava train` on two processes, under DeepSpeed ZeRO-3 and under DDP: begun, resumed, and taken by one process
alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE
from safetensors.torch import load_file
from train_kit import BASE, argv

from llava.train.train import main

ROOT = Path(__file__).parents[2]
# A thread of gloo's that is left may abort the process while the interpreter exits.
CHECKS_THREADS = """
import pathlib, sys
from llava.train.train import main
assert main(sys.argv[1:]) == 0
names = [(task / "comm").read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*")]
assert not any("gloo" in name for name in names), names
"""
# A token weighs the same on both ranks as in accumulated batches. SGD, since Adam makes the least difference a whole step.
FLAGS: dict[str, Any] = {"save_strategy": "steps", "optim": "sgd", "model": BASE}


ZERO3: dict[str, Any] = {"deepspeed": ROOT / "scripts" / "zero3.json"}
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def run_on_two(folder: Path, program: Sequence[str] = ("-m", "llava", "train"), **flags: Any) -> None:
    words = argv(folder, **FLAGS, **flags)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def run_alone(folder: Path, **flags: Any) -> None:
    assert main(argv(folder, gradient_accumulation_steps=2, **FLAGS, **flags)) == 0


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@needs_deepspeed
@pytest.mark.slow
def test_a_run_on_two_ranks_equals_one_process_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, resumed, alone = tmp_path / "whole", tmp_path / "resumed", tmp_path / "alone"
    steps: dict[str, Any] = {"max_steps": 4, "save_steps": 2}
    run_on_two(whole, **ZERO3, **steps)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run_on_two(resumed, **ZERO3, **steps)
    run_alone(alone, **steps)
    expected, by_one = weights_of(whole), weights_of(alone)
    assert expected.keys() == by_one.keys() == weights_of(resumed).keys()
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, expected[name]), name
        torch.testing.assert_close(by_one[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@needs_deepspeed
def test_a_projector_alone_is_saved_by_two_ranks_as_by_one_process(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"tune_mm_mlp_adapter": True, "save_steps": 1, "max_steps": 2}
    run_on_two(tmp_path / "two", **ZERO3, **flags)
    run_alone(tmp_path / "one", **flags)
    for place in ("checkpoint-1", "."):
        two, one = (
            torch.load(tmp_path / folder / place / "mm_projector.bin", weights_only=True) for folder in ("two", "one")
        )
        assert two.keys() == one.keys()
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@needs_deepspeed
@pytest.mark.slow
def test_bfloat16_alone_is_held_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole, resumed, alone = tmp_path / "whole", tmp_path / "resumed", tmp_path / "alone"
    flags: dict[str, Any] = {"max_steps": 3, "save_steps": 2, "learning_rate": 0.5, "warmup_ratio": 0.0}
    flags |= {"bf16": True, "trainable_dtype": "bfloat16"}
    run_on_two(whole, **ZERO3, **flags)
    states = whole / "checkpoint-2" / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    held = torch.load(states, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]  # a name of old
    assert {part.dtype for part in held} == {torch.bfloat16}
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run_on_two(resumed, **ZERO3, **flags)
    run_alone(alone, **flags)
    before, expected, by_one = weights_of(whole / "checkpoint-2"), weights_of(whole), weights_of(alone)
    moved, between = 0.0, 0.0
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, expected[name]), name
        moved += (weight.float() - before[name].float()).square().sum().item()
        between += (weight.float() - by_one[name].float()).square().sum().item()
    assert 4 * between < moved, "one step goes twice as far as rounding takes three steps apart"


@pytest.mark.slow
def test_text_on_one_rank_and_tiles_on_the_other_under_ddp(tmp_path: Path) -> None:
    """Every trained weight takes part in every batch, the newline that ends rows of features included: DDP, which does not
    look for those that do not, would stop, or take another rank's gradients for them."""
    flags: dict[str, Any] = {
        "image_aspect_ratio": "anyres", "image_grid_pinpoints": "[[56,112],[112,56],[112,112]]",
        "mm_patch_merge_type": "spatial_unpad", "unfreeze_mm_vision_tower": True, "per_device_train_batch_size": 1,
        "max_steps": 4, "save_steps": 4,
    }  # fmt: skip
    program = tmp_path / "train_and_check_threads.py"
    program.write_text(CHECKS_THREADS)
    run_on_two(tmp_path / "two", [str(program)], **flags)
    run_alone(tmp_path / "one", **flags)
    expected = weights_of(tmp_path / "one")
    for name, weight in weights_of(tmp_path / "two").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4, msg=name)
