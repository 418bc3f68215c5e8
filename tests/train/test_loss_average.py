"""What has the same weight in a step's loss, and that a step is the same however its samples are split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from batches import batch_of
from golden_data import HERE
from safetensors.torch import load_file
from torch import nn
from train_kit import BASE, argv, trainer_for

from llava.constants import IGNORE_INDEX
from llava.model.builder import load
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loss import LossRule, linear_cross_entropy, mean_loss, sample_weights

ROOT = Path(__file__).parents[2]
ONE_STEP: dict[str, Any] = {
    "max_steps": 1, "optim": "sgd", "learning_rate": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0, "max_grad_norm": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def updates(folder: Path, **flags: Any) -> tuple[torch.Tensor, float]:
    """How a step over the eight samples changes the weights, and the loss that it logs."""
    trainer = trainer_for(argv(folder, **{**ONE_STEP, **flags}))
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in named.items()}
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return torch.cat([(p.detach() - before[name]).flatten() for name, p in named.items()]), logged


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


SPLITS: dict[str, dict[str, Any]] = {
    "8 of 1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "2 of 4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "logits": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "fused_loss": False},
    "packed": {"per_device_train_batch_size": 1, "packing": True, "pack_length": 2048 * 16},
    "packed, accumulated": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "packing": True, "pack_length": 2048,
    },
}  # fmt: skip


@pytest.mark.parametrize("average", ["tokens", "samples"])
def test_a_step_does_not_depend_on_how_its_samples_are_split(average: str, tmp_path: Path) -> None:
    whole, loss = updates(tmp_path, per_device_train_batch_size=8, loss_average=average)
    for name, split in SPLITS.items():
        update, logged = updates(tmp_path / name, loss_average=average, **split)
        assert difference(whole, update) < 1e-5, name
        assert logged == pytest.approx(loss, rel=1e-5), name


def test_the_averages_differ(tmp_path: Path) -> None:
    """So that equal updates above show something."""
    split: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    by = {name: updates(tmp_path, loss_average=name, **split)[0] for name in ("tokens", "samples", "micro_batches")}
    assert difference(by["tokens"], by["samples"]) > 0.05
    assert difference(by["tokens"], by["micro_batches"]) > 0.05
    assert difference(by["samples"], by["micro_batches"]) > 0.05
    alone = updates(tmp_path, loss_average="micro_batches", **SPLITS["8 of 1"])[0]
    assert difference(by["samples"], alone) < 1e-5, "a micro-batch of one sample is that sample"


def test_text_alone(tmp_path: Path) -> None:
    """A language model without images computes its loss by itself."""
    turns = [[{"from": "human", "value": "Say"}, {"from": "gpt", "value": "well " * (1 + n * n)}] for n in range(4)]
    data = tmp_path / "text.json"
    data.write_text(json.dumps([{"id": str(n), "conversations": turn} for n, turn in enumerate(turns)]))
    words = argv(tmp_path, **{**ONE_STEP, "model": BASE, "data_path": data, "vision_tower": ""})

    def update(*more: str) -> torch.Tensor:
        trainer = trainer_for([*words, *more])
        assert not isinstance(trainer.model, LlavaMetaForCausalLM)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        return torch.cat([(p.detach() - b).flatten() for p, b in zip(trainer.model.parameters(), before, strict=True)])

    by_ones = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    for rule in (["--loss_average", "tokens"], ["--loss_average", "samples", "--label_smoothing_factor", "0.1"]):
        at_once = update("--per_device_train_batch_size", "4", *rule)
        assert difference(at_once, update(*by_ones, *rule)) < 1e-5


# The rule by itself


def by_hand(logits: torch.Tensor, labels: torch.Tensor, rule: LossRule) -> torch.Tensor:
    """The loss of each row, written out; (rows,) and the tokens of each."""
    sums, counts = [], []
    for row, wanted in zip(logits.float(), labels, strict=True):
        losses = []
        for place in range(len(wanted) - 1):
            target = wanted[place + 1]
            if target != IGNORE_INDEX:
                log = row[place].log_softmax(-1)
                losses.append(-(1 - rule.smoothing) * log[target] - rule.smoothing * log.mean())
        if losses:
            sums.append(torch.stack(losses).sum())
            counts.append(len(losses))
    if rule.by_sample:
        return torch.stack([total / count for total, count in zip(sums, counts, strict=True)]).mean()
    return torch.stack(sums).sum() / sum(counts)


RULES = [LossRule(by_sample, smoothing) for by_sample in (False, True) for smoothing in (0.0, 0.2)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_is_what_its_words_say(rule: LossRule, tmp_path: Path) -> None:
    model = load(tiny.build(tmp_path, "llama"), device="cpu", dtype=torch.float32).model.requires_grad_(True).train()
    batch = batch_of((9, 1), (20, 0), (3, 0), (12, 2), seed=1)
    batch["labels"][2] = IGNORE_INDEX  # nothing to train
    spliced = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    expected = by_hand(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, spliced[-1], rule)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for packed in (False, True):
        for fused in (False, True):
            model.zero_grad()
            loss = model(**batch, packed=packed, loss_only=fused, loss_rule=rule).loss
            torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-5)
            loss.backward()
            for name, gradient in gradients.items():
                torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, atol=1e-5, rtol=1e-4)


def test_smoothing_is_torch_s() -> None:
    logits, labels = torch.randn(2, 9, 11), torch.randint(0, 11, (2, 9))
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3)
    torch.testing.assert_close(mean_loss(logits, labels, LossRule(smoothing=0.3)), expected)


def test_weights_and_smoothing_have_the_right_derivative() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (7, 3)))
    options: dict[str, Any] = {"weights": torch.rand(5, dtype=torch.float64), "smoothing": 0.2}
    targets = torch.randint(0, 7, (5,))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, **options), (hidden, weight))


def test_weights_of_a_batch_with_nothing_to_train_are_finite() -> None:
    assert torch.isfinite(sample_weights(torch.full((2, 5), IGNORE_INDEX))).all()


# Two processes


def step_of_processes(folder: Path, processes: int, **flags: Any) -> dict[str, torch.Tensor]:
    words = argv(folder, **{**ONE_STEP, "learning_rate": "1e-1", **flags})
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "llava", "train"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one_unless_they_count_alone(tmp_path: Path) -> None:
    split: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    two = step_of_processes(tmp_path / "two", 2, **split)
    apart = step_of_processes(tmp_path / "apart", 2, average_tokens_across_devices=False, **split)
    trainer = trainer_for(
        argv(tmp_path / "one", **{**ONE_STEP, "learning_rate": "1e-1", "per_device_train_batch_size": 8})
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    one = dict(trainer.model.named_parameters())

    def flat(weights: dict[str, Any]) -> torch.Tensor:
        return torch.cat([(weights[name].detach() - before).flatten() for name, before in start.items()])

    assert difference(flat(one), flat(two)) < 1e-5
    assert difference(flat(one), flat(apart)) > 0.01
