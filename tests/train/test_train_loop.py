"""What a run says of itself while it goes on: figures, validation, estimates; and why it stops when it has to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import HERE
from torch.utils.flop_counter import FlopCounterMode
from train_kit import argv, recording, trainer_for

from llava.constants import IGNORE_INDEX
from llava.train.arguments import parse_train_args
from llava.train.callbacks import log_line
from llava.train.data import LazySupervisedDataset
from llava.train.llava_trainer import LLaVATrainer
from llava.train.memory import _activations, _tower_activations, estimate, remedies, shape_of
from llava.train.metrics import FlopsCounter
from llava.train.performance import one_host_thread
from llava.train.run import build_trainer
from llava.train.train import main, train

EVAL: dict[str, Any] = {
    "eval_data_path": "train_data/finetune.json",
    "evaluation_strategy": "steps",
    "eval_steps": 1,
}
DATA = recording("train_data/finetune.json")


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def logged(trainer: LLaVATrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# Figures


@pytest.mark.parametrize("packing", [False, True])
def test_counts_are_those_of_the_batches(packing: bool, tmp_path: Path) -> None:
    flags = {"max_steps": 2, "logging_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = train(argv=argv(tmp_path, **flags, packing=packing, per_device_train_batch_size=1 if packing else 4))
    dataset, collate = trainer.train_dataset, trainer.data_collator
    if packing:  # all samples are in one row, which both steps draw
        assert len(dataset) == 1
    batches = [[0]] if packing else [[0, 1, 2, 3], [4, 5, 6, 7]]
    tokens = places = trained = 0
    for indices in batches:
        mask, labels = _spliced(trainer.model, collate([dataset[index] for index in indices]))
        tokens += int(mask.sum())
        places += mask.numel()
        trained += int((labels != IGNORE_INDEX).sum())
    entry = next(entry for entry in trainer.state.log_history if "padding" in entry)
    assert entry["padding"] == pytest.approx(0 if packing else 1 - tokens / places)
    assert entry["trained_tokens"] == pytest.approx(trained / tokens)
    assert entry["memory_gib"] > 0
    assert "mfu" not in entry  # a CPU has no rate that would mean something


def _spliced(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, mask, _, _, labels = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    return mask, labels


@pytest.mark.parametrize("kind", ["full", "tower", "lora"])
def test_flops_are_those_of_the_operations(kind: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "full": {},
        "tower": {"unfreeze_mm_vision_tower": True},
        "lora": {"lora_enable": True, "lora_dropout": 0.0, "lora_r": 8},
    }[kind]
    trainer = trainer_for(argv(tmp_path, fused_loss=False, **flags))
    model = trainer.model
    model.config._attn_implementation = "eager"  # whose products the counter sees
    batch = trainer.data_collator([trainer.train_dataset[0]])
    mask, _ = _spliced(model, batch)
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    tokens = mask.numel()
    # Eager attention computes the half of the square that is masked away too.
    expected = FlopsCounter.of_model(model).total(tokens, 2 * tokens**2, 1)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_a_line_can_be_read() -> None:
    logs = {"loss": 1.23456, "learning_rate": 2e-5, "grad_norm": 0.9, "tokens_per_second": 12345.6, "mfu": 0.613}
    assert log_line(logs | {"total_flos": 1e20, "epoch": 0.5}, 10, 5197, 3725.0) == (
        "step 10/5,197  loss 1.2346  lr 2.00e-05  grad 0.9  12,346 tok/s  MFU 61 %  ETA 1:02:05"
    )


def test_lines_without_a_terminal_have_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(argv(tmp_path, disable_tqdm=False, max_steps=2)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == ["step 1/2", "step 2/2", "step 2/2"]
    assert not any("it/s" in line or "\r" in line for line in lines)


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(argv=argv(tmp_path, report_to="tensorboard", logging_dir=tmp_path / "board", max_steps=2))
    (file,) = (tmp_path / "board").rglob("events.*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    names = {name.rpartition("/")[2] for name in events.Tags()["scalars"]}
    assert names >= {"loss", "tokens_per_second", "images_per_second", "padding", "trained_tokens", "memory_gib"}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_an_absent_tracker_names_its_extra(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda package, *rest: None if package == name else find(package, *rest)
    )
    assert main(argv(tmp_path, report_to=name)) == 2
    assert f"--report_to {name} needs the package {name!r}; install it with: pip install -e '.[report]'" in (
        capsys.readouterr().err
    )


# Validation


def test_validation_loss_is_the_mean_over_tokens_whatever_the_batches(tmp_path: Path) -> None:
    total = num_tokens = 0.0
    for size in (1, 3):
        trainer = train(argv=argv(tmp_path / str(size), per_device_eval_batch_size=size, learning_rate=0, **EVAL))
        if size == 1:
            trainer.model.eval()
            for index in range(len(trainer.eval_dataset)):
                batch = trainer.data_collator([trainer.eval_dataset[index]])
                with torch.no_grad():
                    loss = trainer.model(**batch).loss.item()
                count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                total, num_tokens = total + loss * count, num_tokens + count
        (found,) = logged(trainer, "eval_loss")
        assert found == pytest.approx(total / num_tokens, rel=1e-5)


def test_validation_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    flags = {"max_steps": 5, "lora_enable": True, "lora_r": 4, "lora_dropout": 0.2}
    alone = train(argv=argv(tmp_path / "alone", **flags))
    watched = train(argv=argv(tmp_path / "watched", **flags, **EVAL, eval_generate=1, eval_max_new_tokens=3))
    assert len(logged(watched, "eval_loss")) == 5
    assert logged(alone, "loss") == logged(watched, "loss")


def test_answers_are_the_models_own(tmp_path: Path) -> None:
    trainer = train(argv=argv(tmp_path, **EVAL, eval_generate=2, eval_max_new_tokens=6, learning_rate=0))
    rows = [json.loads(line) for line in (tmp_path / "eval_answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1]
    for row, sample in zip(rows, DATA, strict=False):
        question, answer = (turn["value"] for turn in sample["conversations"][:2])
        assert row["expected"] == answer.strip()
        assert row["question"].endswith("ASSISTANT:")
        assert question.replace("<image>", "").strip() in row["question"]
        assert str(sample["id"]) in row["sample"]
    model, item = trainer.model, trainer.eval_dataset[0]
    first = int((item["labels"] != IGNORE_INDEX).nonzero()[0])
    model.eval()
    ids = item["input_ids"][None, :first]
    for _ in range(6):  # by hand, one token at a time, without a cache
        logits = model(input_ids=ids, images=item["image"][None]).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        if ids[0, -1] == trainer.processing_class.eos_token_id:
            break
    assert rows[0]["answer"] == trainer.processing_class.decode(ids[0, first:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eval_steps": 1, "evaluation_strategy": "steps"}, "--eval_data_path"),
        ({"eval_data_path": "train_data/finetune.json"}, "--eval_strategy"),
        ({"eval_generate": 2}, "--eval_data_path"),
        ({**EVAL, "eval_data_path": "absent.json"}, "absent.json"),
    ],
)
def test_validation_that_cannot_work_is_refused(
    flags: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(argv(tmp_path, **flags)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["full", "tune_mm_mlp_adapter", "lora"])
def test_the_best_checkpoint_is_kept_and_comes_back(kind: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"full": {}, "tune_mm_mlp_adapter": {kind: True}, "lora": {"lora_enable": True}}[kind]
    # At this rate the whole model gets worse and worse, and its parts better: for those the worst is called the best.
    choose = min if kind == "full" else max
    flags |= {"max_steps": 4, "learning_rate": "0.5", "lr_scheduler_type": "constant", "save_strategy": "steps"}
    flags |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": choose is max}
    trainer = train(argv=argv(tmp_path, **EVAL, **flags, save_steps=1, save_total_limit=1))
    losses = logged(trainer, "eval_loss")
    best = losses.index(choose(losses)) + 1
    assert best < 4  # or the test would show nothing
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    state = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(choose(losses), rel=1e-4)


# Numbers that are none


def stopped_by(trainer: LLaVATrainer) -> str:
    before = trainer.model.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match="is not a finite number") as caught:
        trainer.train()
    assert trainer.state.global_step > 0 or torch.equal(trainer.model.lm_head.weight, before)
    return str(caught.value)


def sequential(tmp_path: Path, **flags: Any) -> LLaVATrainer:
    return trainer_for(argv(tmp_path, train_sampling_strategy="sequential", lr_scheduler_type="constant", **flags))


@pytest.mark.parametrize("packing", [False, True])
def test_a_sample_that_breaks_the_loss_is_named(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = 3  # of the second batch
    draw = LazySupervisedDataset.__getitem__

    def poisoned(self: Any, index: int) -> dict[str, Any]:
        item = draw(self, index)
        return {**item, "image": item["image"] * float("nan")} if index == bad else item

    monkeypatch.setattr(LazySupervisedDataset, "__getitem__", poisoned)
    message = stopped_by(sequential(tmp_path, max_steps=4, packing=packing))
    if not packing:
        assert message.startswith(
            "the loss of step 2 is not a finite number; the batch's images hold NaN or infinity; "
        )
    assert f"these have such a loss alone: sample {bad} (id {DATA[bad]['id']!r}): nan; the others do not" in message


def test_a_module_that_overflows_is_named(tmp_path: Path) -> None:
    trainer = sequential(tmp_path, max_steps=2)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    message = stopped_by(trainer)
    assert "the loss of step 1" in message
    assert "from weights and inputs that are finite, is model.layers.1.mlp.down_proj (Linear)" in message
    assert "sample 0 (id" in message
    assert "sample 1 (id" in message


def test_a_gradient_that_breaks_is_named(tmp_path: Path) -> None:
    trainer = sequential(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    name = "model.layers.0.self_attn.q_proj.weight"
    dict(trainer.model.named_parameters())[name].register_hook(lambda gradient: gradient * float("inf"))
    message = stopped_by(trainer)
    assert "the gradient of step 1 is not a finite number; the forward pass is finite (loss " in message
    assert f"the first gradient that is not is that of {name}" in message


def test_weights_that_broke_in_the_step_before_are_named(tmp_path: Path) -> None:
    message = stopped_by(sequential(tmp_path, max_steps=4, learning_rate="1e38", max_grad_norm=0))
    assert re.search(r"the loss of step [23] is not a finite number", message)


# Memory


def test_running_out_of_memory_says_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*args: Any, **kwargs: Any) -> None:
        torch.empty(2**50)  # the allocator's own words

    monkeypatch.setattr("transformers.Trainer.training_step", too_much)
    assert main(argv(tmp_path, per_device_train_batch_size=4)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llava train: error: out of memory in step 1: the process used at most ")
    assert "the batch had 4 sequences" in error
    helps = error.partition("the most effective first: ")[2]
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 (about " in helps
    assert "--gradient_checkpointing True" in helps


@pytest.mark.parametrize("flags", [{}, {"lora_enable": True}, {"tune_mm_mlp_adapter": True}])
def test_counted_memory_is_what_tensors_take(flags: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_for(argv(tmp_path, **flags))
    model, expected = trainer.model, estimate(trainer.model, trainer.args)
    sizes: dict[str, int] = {}

    def look(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sizes["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    trainer.console.on_pre_optimizer_step = look  # type: ignore[method-assign]
    trainer.train()
    states = trainer.optimizer.state.values()
    sizes["optimizer"] = sum(t.nbytes for state in states for t in state.values() if t.dim() > 0)
    assert expected.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert (expected.gradients, expected.optimizer) == (sizes["gradients"], sizes["optimizer"])


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_estimated_activations_are_near_what_is_kept(flags: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_for(argv(tmp_path, model_max_length=96, unfreeze_mm_vision_tower=True, **flags))
    model, shape = trainer.model, shape_of(trainer.model, trainer.args)
    if shape.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    embeds = torch.randn(2, 96, shape.width, requires_grad=True)
    language, tower = model.get_model(), model.get_vision_tower()
    kept = bytes_kept(
        lambda: language(inputs_embeds=embeds, use_cache=False).last_hidden_state, language.layers, **flags
    )
    assert kept == pytest.approx(_activations(shape), rel=0.15)
    embeds = torch.randn(2, tower.num_patches + 1, tower.hidden_size, requires_grad=True)
    layers = torch.nn.ModuleList(tower.layers_used())
    kept = bytes_kept(lambda: reduce(lambda states, layer: layer(states, None), layers, embeds), layers, **flags)
    assert kept == pytest.approx(_tower_activations(model, shape, packed=False), rel=0.15)


def bytes_kept(run: Callable[[], torch.Tensor], layers: torch.nn.Module, *, bf16: bool = False, **_: Any) -> int:
    """What a forward pass keeps for its backward pass, weights and copies of weights not counted."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in layers.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dtype.is_floating_point:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        assert run().requires_grad
    copied = [module.weight for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    return sum(kept.values()) - (2 * sum(weight.numel() for weight in copied) if bf16 else 0)


@pytest.mark.parametrize(
    ("flags", "tiles"),
    [
        ({}, 1),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[[56, 112], [112, 112], [56, 168]]"}, 5),
        ({"packing": True, "on_bad_sample": "skip"}, 4),  # six in ten of a row's 96 tokens, 16 to a tile
    ],
)
def test_an_estimate_counts_the_tiles_of_a_tower_that_is_trained(
    flags: dict[str, Any], tiles: int, tmp_path: Path
) -> None:
    trainer = trainer_for(argv(tmp_path, model_max_length=96, unfreeze_mm_vision_tower=True, **flags))
    model, shape = trainer.model, shape_of(trainer.model, trainer.args)
    one = trainer_for(argv(tmp_path, model_max_length=96, unfreeze_mm_vision_tower=True))
    of_one = _tower_activations(one.model, shape, packed=False)
    assert _tower_activations(model, shape, packed=trainer.args.packing) == tiles * of_one > 0


def test_an_estimate_before_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = argv(tmp_path / "out", estimate_memory=True)
    assert main(words) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("weights", "gradients", "optimizer", "activations", "logits", "peak"))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_remedies_help(tmp_path: Path) -> None:
    """What is advised makes the estimate smaller by what is said, where the same run can be built with it."""
    words = argv(tmp_path, per_device_train_batch_size=8)
    trainer = trainer_for(words)
    before = estimate(trainer.model, trainer.args).peak
    advised = {remedy.flags: remedy.saved for remedy in remedies(trainer.model, trainer.args)}
    for flags, saved in advised.items():
        if "lora" in flags or "deepspeed" in flags:
            continue
        other = build_trainer(*parse_train_args([*words, *flags.split()]))
        assert before - estimate(other.model, other.args).peak == pytest.approx(saved)
    assert list(advised.values()) == sorted(advised.values(), reverse=True)


SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize(
    ("flags", "variable", "expected"),
    [
        ({}, None, 1),
        ({}, "3", 3),  # as torchrun sets it, or its user
        ({"deepspeed": str(SCRIPTS / "zero2.json")}, None, 1),
        ({"deepspeed": str(SCRIPTS / "zero3_offload.json")}, None, 3),
        ({"fsdp": "full_shard"}, None, 1),
        ({"fsdp": "full_shard offload"}, None, 3),
    ],
)
def test_beside_a_gpu_the_cores_are_the_loaders(
    flags: dict[str, str], variable: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "deepspeed" in flags:
        pytest.importorskip("deepspeed")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    _, _, args = parse_train_args(argv(tmp_path, **flags))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_host_thread(args):
            assert torch.get_num_threads() == 3  # on a CPU all of them compute
        monkeypatch.setattr(type(args), "device", torch.device("cuda"))
        with one_host_thread(args):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
