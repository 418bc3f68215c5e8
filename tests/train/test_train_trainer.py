"""What a run trains and at which rates, before its first step; and the names that adapters go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import HERE, golden
from train_kit import LLAVA, argv, recording, trainer_for

from llava.errors import InputError
from llava.model.language_model.registry import llava_classes
from llava.train.llava_trainer import LLaVATrainer
from llava.train.lora import find_all_linear_names
from llava.train.run_folder.save import get_peft_state_maybe_zero_3, get_peft_state_non_lora_maybe_zero_3
from llava.train.sampler import LengthGroupedSampler

TRAINING = recording("training.json")
CASES = {name: case for name, case in TRAINING["param_groups_cases"].items() if "failed" not in case}


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def replayed(case: dict[str, Any], tmp_path: Path) -> list[str]:
    words = list(case["argv"])
    words[words.index("--output_dir") + 1] = str(tmp_path)
    return words


def groups_of(trainer: LLaVATrainer) -> list[dict[str, Any]]:
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return [
        {
            "names": [names[id(p)] for p in group["params"]],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "betas": list(group["betas"]),
            "eps": group["eps"],
        }
        for group in trainer.create_optimizer().param_groups
    ]


@pytest.mark.parametrize("name", CASES)
def test_recorded_parameter_groups(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trainer = trainer_for(replayed(case, tmp_path))
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert list(trained) == case["requires_grad"]
    assert sum(p.numel() for p in trained.values()) == case["n_params_trainable"]
    assert groups_of(trainer) == case["groups"]
    assert type(trainer.optimizer).__name__ == case["optimizer_class"]
    config = trainer.model.config
    for key, value in case["trainer_class_config"].items():
        if key not in ("use_bfloat16", "tokenizer_class"):  # of transformers 4, unused
            assert getattr(config, key) == value, key


@pytest.mark.parametrize("name", ["lora_bias_lora_only", "start_end_tune"])
def test_cases_that_the_original_failed_on(name: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        "lora_bias_lora_only": {"lora_enable": True, "lora_r": 4, "lora_bias": "lora_only"},
        "start_end_tune": {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True},
    }[name]
    trainer = trainer_for(argv(tmp_path, **flags))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    if name == "start_end_tune":
        assert {n for n in trained if "mm_projector" not in n} == {"model.embed_tokens.weight"}
    else:
        assert all("lora_" in n or "mm_projector" in n for n in trained)
    trainer.train()


def test_tower_with_its_own_rate(tmp_path: Path) -> None:
    trainer = trainer_for(
        argv(
            tmp_path, unfreeze_mm_vision_tower=True, mm_vision_tower_lr="1e-6", mm_projector_lr="1e-5", weight_decay=0.1
        )
    )
    groups = groups_of(trainer)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (2e-3, 0.1),
        (2e-3, 0.0),
        (1e-5, 0.1),
        (1e-5, 0.0),
        (1e-6, 0.1),
        (1e-6, 0.0),
    ]
    assert all("vision_tower" in name for group in groups[4:] for name in group["names"])
    assert not any("vision_tower" in name for group in groups[:4] for name in group["names"])
    assert trainer.model.config.unfreeze_mm_vision_tower is True
    # Every trained parameter gets a gradient: a distributed run waits for each of them.
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 2)])
    trainer.model(**batch).loss.backward()
    trained = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None for _, p in trained)
    assert any(p.grad.abs().sum() > 0 for name, p in trained if "patch_embedding" in name)


def test_text_only_rows_keep_every_part_in_the_graph(tmp_path: Path) -> None:
    trainer = trainer_for(argv(tmp_path, unfreeze_mm_vision_tower=True))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (1, 4)])  # no image in either
    trainer.model(**batch).loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("recorded", "model_type"),
    [
        ("llava_llama (mm modules present)", None),
        ("llava_mpt", "mpt"),
        ("llava_mistral", "mistral"),
        ("llama base", "llama"),
    ],
)
def test_linear_layers_for_adapters(recorded: str, model_type: str | None, tmp_path: Path) -> None:
    if model_type is None:
        model = trainer_for(argv(tmp_path)).model
    else:
        config_class, model_class = llava_classes(model_type)
        sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        if model_type == "mpt":
            sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1}
        model = model_class(config_class(vocab_size=50, **sizes))
    assert find_all_linear_names(model) == TRAINING["find_all_linear_names_sorted"][recorded]


def test_adapters_leave_a_tower_alone_that_is_there_already(tmp_path: Path) -> None:
    trainer = trainer_for(argv(tmp_path, lora_enable=True, lora_r=2))
    assert not any("lora_" in name for name, _ in trainer.model.named_parameters() if "vision_tower" in name)


def test_states_that_lora_runs_save() -> None:
    names = [
        "a.q.base_layer.weight",
        "a.q.base_layer.bias",
        "a.q.lora_A.default.weight",
        "a.k.bias",
        "mm_projector.weight",
    ]
    named = [(name, torch.nn.Parameter(torch.ones(1), requires_grad="lora_" in name or "mm" in name)) for name in names]
    assert list(get_peft_state_maybe_zero_3(named, "none")) == [names[2]]
    assert list(get_peft_state_maybe_zero_3(named, "all")) == [names[1], names[2], names[3]]
    assert list(get_peft_state_maybe_zero_3(named, "lora_only")) == [names[1], names[2]]
    assert list(get_peft_state_non_lora_maybe_zero_3(named)) == [names[4]]
    with pytest.raises(InputError, match="lora_bias"):
        get_peft_state_maybe_zero_3(named, "some")


def test_which_sampler(tmp_path: Path) -> None:
    grouped = trainer_for(argv(tmp_path, group_by_modality_length=True, gradient_accumulation_steps=3))
    sampler = grouped._get_train_sampler()
    assert isinstance(sampler, LengthGroupedSampler)
    assert sampler.group_by_modality
    assert (sampler.batch_size, sampler.world_size, sampler.seed) == (2, 3, 42)
    assert list(sampler.lengths) == grouped.train_dataset.modality_lengths
    by_length = trainer_for(argv(tmp_path, group_by_length=True))._get_train_sampler()
    assert isinstance(by_length, LengthGroupedSampler)
    assert not by_length.group_by_modality
    assert not isinstance(trainer_for(argv(tmp_path))._get_train_sampler(), LengthGroupedSampler)


MARKERS = {
    "none": {},
    "patch": {"mm_use_im_patch_token": True},
    "start_end": {"mm_use_im_start_end": True},
    "patch+start_end": {"mm_use_im_patch_token": True, "mm_use_im_start_end": True},
    "start_end+tune": {"mm_use_im_start_end": True, "tune_mm_mlp_adapter": True},
    "patch+tune": {"mm_use_im_patch_token": True, "tune_mm_mlp_adapter": True},
}


@pytest.mark.parametrize("name", MARKERS)
def test_recorded_marker_tokens(name: str, tmp_path: Path) -> None:
    recorded = TRAINING["initialize_vision_tokenizer"][name]
    trainer = trainer_for(argv(tmp_path, **MARKERS[name]))
    model, tokenizer = trainer.model, trainer.processing_class
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    assert len(tokenizer) == recorded["len_tokenizer"]
    assert inputs.weight.shape[0] == recorded["embed_rows"]
    assert outputs.weight.shape[0] == recorded["lm_head_rows"]
    assert model.config.vocab_size == recorded["config_vocab_size"]
    for token, number in recorded["added"].items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    if "tune" in name:  # elsewhere both tables are trained anyway
        assert inputs.weight.requires_grad == recorded["embed_requires_grad"]
        assert outputs.weight.requires_grad == recorded["lm_head_requires_grad"]
    if recorded.get("start_end_rows_equal_mean_of_previous_rows"):
        rows = np.load(golden("training/vision_tokenizer_rows.npz"))
        for table, key in ((inputs.weight, "embed"), (outputs.weight, "lm_head")):
            new = table.detach()[-2:]
            torch.testing.assert_close(new, table.detach()[:-2].mean(0, keepdim=True).expand_as(new), atol=1e-6, rtol=0)
            if "patch" not in name:  # the patch token's row is drawn at random, and enters the mean
                np.testing.assert_allclose(new.numpy(), rows[f"{name}/{key}_new_rows"], atol=1e-6)


@pytest.mark.parametrize("num_rows", [2, 1002, 7])
def test_recorded_marker_rows_from_a_pretrained_adapter(num_rows: int, tmp_path: Path) -> None:
    first = trainer_for(argv(tmp_path))
    state = {name: p.detach() for name, p in first.model.named_parameters() if "mm_projector" in name}
    state["model.embed_tokens.weight"] = torch.randn(num_rows, 64)
    adapter = tmp_path / "mm_projector.bin"
    torch.save(state, adapter)
    words = argv(
        tmp_path, mm_use_im_start_end=True, tune_mm_mlp_adapter=True, pretrain_mm_mlp_adapter=adapter, model=LLAVA
    )
    if num_rows == 7:
        with pytest.raises(InputError, match=r"\[7, 64\]"):
            trainer_for(words)
        return
    table = trainer_for(words).model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(table[-2:], state["model.embed_tokens.weight"][-2:])


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_pixels_in_the_precision_of_the_run_change_nothing(frozen: bool, tmp_path: Path) -> None:
    """A run in bfloat16, whose loader rounds pixels, against one whose first layer does."""

    def trained(folder: Path, dtype: torch.dtype | None) -> LLaVATrainer:
        trainer = trainer_for(argv(folder, bf16=True, unfreeze_mm_vision_tower=not frozen, max_steps=2))
        settings = trainer.train_dataset.data_args
        assert settings.pixel_dtype == torch.bfloat16
        settings.pixel_dtype = dtype or settings.pixel_dtype
        trainer.train()
        return trainer

    rounded, exact = trained(tmp_path / "a", None), trained(tmp_path / "b", torch.float32)
    assert rounded.state.log_history[1]["loss"] == exact.state.log_history[1]["loss"]
    for (name, tensor), (_, other) in zip(
        rounded.model.named_parameters(), exact.model.named_parameters(), strict=True
    ):
        assert torch.equal(tensor, other), name
