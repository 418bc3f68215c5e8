"""Every flag that `llava train --help-all` lists is obeyed, refused in one sentence, or named in a warning."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from golden_data import HERE
from train_kit import argv, trainer_for

from llava.errors import InputError
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_train_args
from llava.train.llava_trainer import LLaVATrainer
from llava.train.run_folder.settings import NEEDS, RunSettings, idle_settings, settings_in_force
from llava.train.train import main


@pytest.fixture(autouse=True)
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@dataclass(frozen=True)
class Try:
    """What a flag does: a value to give it, and what that shows; `extra` are other flags that it needs."""

    value: object
    shows: str | Callable[[LLaVATrainer], object]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def refused(value: object, words: str, **extra: Any) -> Try:
    return Try(value, f"refused: {words}", extra)


def named(value: object, **extra: Any) -> Try:
    return Try(value, "named", extra)


def obeyed(value: object, check: Callable[[LLaVATrainer], object], **extra: Any) -> Try:
    return Try(value, check, extra)


def groups(trainer: LLaVATrainer) -> list[dict[str, Any]]:
    return trainer.create_optimizer().param_groups


def trained(trainer: LLaVATrainer) -> set[str]:
    return {name for name, p in trainer.model.named_parameters() if p.requires_grad}


LORA = {"lora_enable": True, "lora_r": 4}
VALIDATED = {"eval_data_path": "train_data/finetune.json", "evaluation_strategy": "steps", "eval_steps": 1}
CONFIG: Callable[[LLaVATrainer], Any] = lambda trainer: trainer.model.config  # noqa: E731
PEFT: Callable[[LLaVATrainer], Any] = lambda trainer: trainer.model.peft_config["default"]  # noqa: E731

OWN: dict[str, Try] = {
    "freeze_backbone": obeyed(True, lambda t: not any(".layers." in name and "vision" not in name for name in trained(t))),
    "tune_mm_mlp_adapter": obeyed(True, lambda t: all("mm_projector" in name for name in trained(t))),
    "mm_vision_select_layer": obeyed(-1, lambda t: t.model.get_vision_tower().select_layer == -1),
    "mm_vision_select_feature": obeyed("cls_patch", lambda t: CONFIG(t).mm_vision_select_feature == "cls_patch"),
    "mm_projector_type": named("linear"),
    "mm_use_im_start_end": obeyed(True, lambda t: "<im_start>" in t.processing_class.get_vocab()),
    "mm_use_im_patch_token": obeyed(True, lambda t: "<im_patch>" in t.processing_class.get_vocab()),
    "mm_patch_merge_type": obeyed("spatial", lambda t: CONFIG(t).mm_patch_merge_type == "spatial"),
    "unfreeze_mm_vision_tower": obeyed(True, lambda t: any("vision_tower" in name for name in trained(t))),
    "mm_tunable_parts": obeyed("mm_mlp_adapter", lambda t: all("mm_projector" in name for name in trained(t))),
    "faster_token_stride": named(3),
    "attn_implementation": obeyed("eager", lambda t: CONFIG(t)._attn_implementation == "eager"),
    "version": refused("v9", "--version is 'v9'; known:"),
    "pretrain_mm_mlp_adapter": refused("nowhere.bin", "nowhere.bin"),
    "data_weights": refused("1,2", "data_weights"),
    "on_bad_sample": refused("hide", "known: stop, skip"),
    "lazy_preprocess": named(False),
    "is_multimodal": named(True),
    "image_aspect_ratio": obeyed("square", lambda t: CONFIG(t).image_aspect_ratio == "square"),
    "image_grid_pinpoints": refused("[(5", "image_grid_pinpoints", image_aspect_ratio="anyres"),
    "eval_data_path": refused("train_data/finetune.json", "--eval_strategy"),
    "eval_image_folder": named("images"),
    "remove_unused_columns": refused(True, "would throw the images away"),
    "freeze_mm_mlp_adapter": obeyed(True, lambda t: not any("mm_projector" in name for name in trained(t))),
    "mpt_attn_impl": named("triton"),
    "double_quant": named(False),
    "quant_type": named("fp4"),
    "bits": refused(8, "--lora_enable"),
    "lora_r": named(8),
    "lora_alpha": named(8),
    "lora_dropout": named(0.5),
    "lora_bias": named("all"),
    "lora_use_dora": named(True),
    "lora_use_rslora": named(True),
    "lora_target_modules": obeyed("q_proj,v_proj", lambda t: PEFT(t).target_modules == {"q_proj", "v_proj"}, **LORA),
    "lora_weight_path": named("somewhere"),
    "mm_projector_lr": obeyed("1e-5", lambda t: 1e-5 in {group["lr"] for group in groups(t)}),
    "mm_vision_tower_lr": named("1e-5"),
    "pack_length": named(4096),
    "group_by_modality_length": obeyed(True, lambda t: type(t._get_train_sampler()).__name__ == "LengthGroupedSampler"),
    "packing": obeyed(True, lambda t: type(t.train_dataset).__name__ == "PackedDataset"),
    "compile_layers": obeyed(True, lambda t: t.args.compile_layers),
    "keep_activations": refused(0.5, "--compile_layers"),
    "loss_average": obeyed("samples", lambda t: t.loss_rule.by_sample),
    "global_batch_size": obeyed(8, lambda t: t.args.gradient_accumulation_steps == 4),
    "trainable_dtype": obeyed("bfloat16", lambda t: t.model.lm_head.weight.dtype == torch.bfloat16),
    "logging_dir": named("logs"),
    "eval_generate": refused(2, "--eval_data_path"),
    "eval_max_new_tokens": named(7),
    "early_stopping_patience": obeyed(
        2, lambda t: any(type(c).__name__ == "EarlyStoppingCallback" for c in t.callback_handler.callbacks), **VALIDATED
    ),
}  # fmt: skip
LIBRARY: dict[str, Try] = {
    "ddp_backend": named("gloo"),
    "lr_scheduler_kwargs": obeyed(
        '{"power": 3.0}',
        lambda t: t.create_optimizer_and_scheduler(4) is None and t.lr_scheduler.lr_lambdas[0].keywords["power"] == 3.0,
        lr_scheduler_type="polynomial",
    ),
    "neftune_noise_alpha": refused(5, "joined after the embedding layer"),
    "use_liger_kernel": refused(True, "liger-kernel"),
    "report_to": refused("wandb", "needs the package"),
    "fp16": refused(True, "needs a GPU"),
    "fsdp": refused("full_shard", "", bits=8, **LORA),
    "label_smoothing_factor": obeyed(0.1, lambda t: t.loss_rule.smoothing == 0.1),
    "average_tokens_across_devices": named(False, loss_average="micro_batches"),
    "tf32": named(True),
    "eval_steps": named(3),
    "eval_delay": named(3),
    "per_device_eval_batch_size": named(3),
    "prediction_loss_only": named(True),
    "eval_do_concat_batches": named(False),
    "save_steps": named(3),
    "save_total_limit": named(3),
    "save_only_model": named(True),
    "hub_model_id": named("me/mine"),
    "metric_for_best_model": named("loss"),
    "length_column_name": named("len"),
    "label_names": named("labels"),
    "do_train": named(True),
    "do_eval": named(True),
    "do_predict": named(True),
    "use_cache": named(True),
    "project": named("mine"),
    "max_steps": obeyed(3, lambda t: t.args.max_steps == 3),
    "weight_decay": obeyed(0.5, lambda t: 0.5 in {group["weight_decay"] for group in groups(t)}),
    "adam_beta1": obeyed(0.5, lambda t: groups(t)[0]["betas"][0] == 0.5),
    "adam_epsilon": obeyed(0.5, lambda t: groups(t)[0]["eps"] == 0.5),
    "optim": obeyed("sgd", lambda t: isinstance(t.create_optimizer(), torch.optim.SGD)),
    "train_sampling_strategy": obeyed(
        "group_by_length", lambda t: type(t._get_train_sampler()).__name__ == "LengthGroupedSampler"
    ),
    "dataloader_drop_last": obeyed(
        True, lambda t: len(t.get_train_dataloader()) == 2, per_device_train_batch_size=3
    ),
    "gradient_checkpointing": obeyed(True, lambda t: t.args.activation_checkpointing or t.args.gradient_checkpointing),
}  # fmt: skip


# transformers' own, which obeys them: a step is taken with each.
PASSED: dict[str, object] = {
    "num_train_epochs": 1, "learning_rate": 0.1, "lr_scheduler_type": "polynomial",
    "warmup_steps": 1, "optim_args": "momentum=0.5", "adam_beta2": 0.5, "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1, "max_grad_norm": 0.1, "bf16": True, "torch_empty_cache_steps": 1,
    "activation_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "activation_checkpointing_kwargs": '{"use_reentrant": false}', "auto_find_batch_size": True, "logging_strategy": "epoch",
    "logging_steps": 2, "logging_first_step": True, "log_on_each_node": False, "include_num_input_tokens_seen": True,
    "log_level": "error", "log_level_replica": "error", "disable_tqdm": False, "run_name": "mine",
    "ignore_data_skip": True, "full_determinism": False, "seed": 7, "data_seed": 8, "use_cpu": True,
    "accelerator_config": '{"split_batches": false}', "dataloader_num_workers": 1, "dataloader_pin_memory": False,
    "dataloader_in_order": False, "ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 5,
    "ddp_broadcast_buffers": False, "ddp_static_graph": False, "ddp_backend": "gloo", "ddp_timeout": 100,
    "skip_memory_metrics": False, "save_strategy": "epoch", "eval_strategy": "no", "debug": "underflow_overflow",
    "restore_callback_states_from_checkpoint": True,
}  # fmt: skip
# Those that need a GPU, several processes, a hub, another package or another machine; tested elsewhere, or by their library.
ELSEWHERE = {
    "output_dir", "resume_from_checkpoint", "deepspeed", "fsdp_config", "parallelism_config", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "liger_kernel_config", "push_to_hub", "enable_jit_checkpoint",
    "optim_target_modules", "local_rank",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSED)
def test_a_step_with_each_flag_of_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = argv(tmp_path, optim="sgd", warmup_ratio=0)
    for flag in ("evaluation_strategy", "warmup_ratio"):
        place = words.index(f"--{flag}")
        del words[place : place + 2]
    assert main([*words, f"--{name}", str(PASSED[name])]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_every_flag_of_transformers_is_in_a_table() -> None:
    """So that one that a later version adds is looked at."""
    library = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments) if entry.init}
    conditional = {name for names, _, _ in NEEDS for name in names}
    sorted_in = {*OWN, *LIBRARY, *PASSED, *ELSEWHERE, *conditional}
    assert library <= sorted_in, library - sorted_in


@pytest.mark.parametrize("name", [*OWN, *LIBRARY])
def test_a_flag_is_obeyed_refused_or_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flag = {**OWN, **LIBRARY}[name]
    words = argv(tmp_path, **{**flag.extra, name: flag.value})
    if isinstance(flag.shows, str) and flag.shows.startswith("refused"):
        with pytest.raises(InputError) as error:
            trainer_for(words)
        assert flag.shows.removeprefix("refused: ") in str(error.value)
        return
    trainer = trainer_for(words)
    if callable(flag.shows):
        assert flag.shows(trainer)
    else:
        assert re.search(rf"--{name}\b", caplog.text)


def test_every_own_flag_is_in_the_table() -> None:
    """Those that are missing are in every run of the tests: what to train, on what, and where it goes."""
    library = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments)}
    own = {
        entry.name
        for kind in (ModelArguments, DataArguments, TrainingArguments)
        for entry in dataclasses.fields(kind)
        if entry.init and (kind is not TrainingArguments or entry.name not in library)
    }
    elsewhere = {
        "model_name_or_path", "vision_tower", "data_path", "image_folder", "cache_dir", "model_max_length", "lora_enable",
        "fused_loss", "verify_saved", "estimate_memory", "image_urls", "image_crop_resolution", "image_split_resolution",
        # of videos, which tests of their own try
        "mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_newline_position", "add_faster_video", "video_folder",
        "video_fps", "frames_upbound", "force_sample", "add_time_instruction",
    }  # fmt: skip
    assert own - set(OWN) <= elsewhere, own - set(OWN) - elsewhere


def test_settings_of_another_schedule_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv(tmp_path, lr_scheduler_kwargs='{"power": 2.0}')) == 2
    printed = capsys.readouterr().err
    assert "does not fit --lr_scheduler_type cosine" in printed
    assert "Traceback" not in printed


def test_conditions_name_flags_that_exist() -> None:
    known = {
        entry.name for kind in (ModelArguments, DataArguments, TrainingArguments) for entry in dataclasses.fields(kind)
    }
    named_in_table = {name for names, _, _ in NEEDS for name in names}
    assert named_in_table <= known, named_in_table - known


def test_a_flag_with_its_condition_is_not_called_idle(tmp_path: Path) -> None:
    words = argv(tmp_path, **LORA, lora_alpha=8, unfreeze_mm_vision_tower=True, mm_vision_tower_lr="1e-6", **VALIDATED)
    assert idle_settings(RunSettings(*parse_train_args(words))) == []


def test_a_tower_without_a_rate_of_its_own_under_lora_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_for(argv(tmp_path, **LORA, unfreeze_mm_vision_tower=True))
    assert "give its own with --mm_vision_tower_lr" in caplog.text


def test_the_summary_says_where_each_setting_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = argv(tmp_path)
    place = words.index("--mm_vision_select_layer")
    del words[place : place + 2]
    assert main(words) == 0
    assert "from the checkpoint mm_vision_select_layer -2" in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    assert "| mm_vision_select_layer | `-2` | checkpoint |" in card
    assert "| learning_rate | `0.002` | given |" in card
    assert "| max_grad_norm | `1.0` | default |" in card
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is True


def test_origins(tmp_path: Path) -> None:
    arguments = RunSettings(*parse_train_args(argv(tmp_path, global_batch_size=8)))
    found = {setting.name: setting.origin for setting in settings_in_force(arguments, arguments)}
    assert found["global_batch_size"] == "given"
    assert found["gradient_accumulation_steps"] == "derived"
    assert found["adam_beta1"] == "default"
