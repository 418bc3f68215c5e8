"""Say which settings of a run are in force and where each came from, and which of those that were given change nothing.

In: the three argument dataclasses, as they were given and as they are used. Out: `Setting`s for the summary of a run, and one
sentence for each given setting that has no effect beside the others. What cannot be used is refused in train/arguments.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

Arguments = ModelArguments | DataArguments | TrainingArguments


@dataclass(frozen=True)
class Setting:
    """A setting of a run; `origin` is "given", "checkpoint", "derived" (from another setting or the machine) or "default"."""

    name: str
    value: object
    origin: str


@dataclass(frozen=True)
class RunSettings:
    """The arguments of a run."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments

    @property
    def groups(self) -> tuple[Arguments, ...]:
        return self.model, self.data, self.training


def settings_in_force(given: RunSettings, used: RunSettings) -> list[Setting]:
    """List every setting with its value and its origin; `used` has what the model's checkpoint completed."""
    found = []
    pairs: tuple[tuple[Arguments, Arguments], ...] = tuple(zip(given.groups, used.groups, strict=True))
    for before, after in pairs:
        for entry in dataclasses.fields(after):
            if not entry.init:
                continue
            value = getattr(after, entry.name)
            if before.is_given(entry.name):
                origin = "given"
            elif value != getattr(before, entry.name):
                origin = "checkpoint"
            else:
                origin = "default" if value == default_of(entry) else "derived"
            found.append(Setting(entry.name, value, origin))
    return found


def default_of(entry: dataclasses.Field[object]) -> object:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


def settings_line(settings: Iterable[Setting]) -> str:
    """One line for the terminal: how many were given, and what came from elsewhere."""
    by_origin: dict[str, list[str]] = {"given": [], "checkpoint": [], "derived": [], "default": []}
    for setting in settings:
        by_origin[setting.origin].append(f"{setting.name} {setting.value}")
    parts = [f"{len(by_origin['given'])} given", f"{len(by_origin['default'])} defaults"]
    if by_origin["checkpoint"]:
        parts.append(f"from the checkpoint {', '.join(by_origin['checkpoint'])}")
    return f"settings: {'; '.join(parts)} (README.md lists each with its origin)"


# Settings that change nothing unless a condition holds, and the words for what they need.
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_use_dora", "lora_use_rslora", "lora_target_modules")
_VISION = (
    "mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "mm_patch_merge_type", "mm_use_im_start_end",
    "pretrain_mm_mlp_adapter", "image_aspect_ratio", "image_grid_pinpoints", "freeze_mm_mlp_adapter",
)  # fmt: skip
_VALIDATION = (
    "eval_image_folder", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "eval_accumulation_steps",
    "bf16_full_eval", "fp16_full_eval", "load_best_model_at_end", "early_stopping_patience",
)  # fmt: skip
_HUB = ("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")
_WORKERS = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_LOSSES_ONLY = (
    "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object",
    "label_names",
)  # fmt: skip

Condition = Callable[[RunSettings], bool]
NEEDS: tuple[tuple[tuple[str, ...], Condition, str], ...] = (
    (_LORA, lambda run: run.training.lora_enable, "it needs --lora_enable True"),
    (("quant_type", "double_quant"), lambda run: run.training.bits == 4, "it needs --bits 4"),
    (("pack_length",), lambda run: run.training.packing, "it needs --packing True"),
    (_VISION, lambda run: bool(run.model.vision_tower), "it needs --vision_tower"),
    (
        ("mm_projector_lr",),
        lambda run: (
            bool(run.model.vision_tower)
            and not run.training.freeze_mm_mlp_adapter
            and run.model.trains("mm_mlp_adapter") is not False
        ),
        "no projector is trained",
    ),
    (
        ("mm_vision_tower_lr",),
        lambda run: run.model.unfreeze_mm_vision_tower,
        "it needs --unfreeze_mm_vision_tower True",
    ),
    (_VALIDATION, lambda run: bool(run.data.eval_data_path), "it needs --eval_data_path"),
    (("faster_token_stride",), lambda run: bool(run.model.add_faster_video), "it needs --add_faster_video True"),
    (("eval_steps",), lambda run: run.training.eval_strategy.value == "steps", "it needs --eval_strategy steps"),
    (("eval_max_new_tokens",), lambda run: run.training.eval_generate > 0, "it needs --eval_generate"),
    (
        ("metric_for_best_model", "greater_is_better"),
        lambda run: (
            run.training.load_best_model_at_end
            or run.training.early_stopping_patience is not None
            or run.training.save_strategy.value == "best"
        ),
        "it needs --load_best_model_at_end True or --early_stopping_patience",
    ),
    (("save_steps",), lambda run: run.training.save_strategy.value == "steps", "it needs --save_strategy steps"),
    (
        ("save_total_limit", "save_only_model", "save_on_each_node"),
        lambda run: run.training.save_strategy.value != "no",
        "it needs --save_strategy",
    ),
    (_HUB, lambda run: run.training.push_to_hub, "it needs --push_to_hub True"),
    (_WORKERS, lambda run: run.training.dataloader_num_workers > 0, "it needs --dataloader_num_workers"),
    (_TRACKIO, lambda run: "trackio" in (run.training.report_to or ()), "it needs --report_to trackio"),
    (("logging_dir",), lambda run: "tensorboard" in (run.training.report_to or ()), "it needs --report_to tensorboard"),
    (("fsdp_config",), lambda run: bool(run.training.fsdp), "it needs --fsdp"),
    (
        ("average_tokens_across_devices",),
        lambda run: run.training.loss_average != "micro_batches",
        "--loss_average micro_batches counts no tokens",
    ),
    (_LOSSES_ONLY, lambda run: False, "validation computes the loss, and answers with --eval_generate"),
    (("length_column_name",), lambda run: False, "lengths are measured"),
    (("do_train", "do_eval", "do_predict"), lambda run: False, "a run trains, and validates with --eval_strategy"),
    (("is_multimodal",), lambda run: False, "--vision_tower decides it"),
    (("logging_nan_inf_filter",), lambda run: False, "a loss that is not finite ends the run"),
    (("use_cache",), lambda run: False, "training needs no cache, and the result is saved with one"),
)


def idle_settings(run: RunSettings) -> list[str]:
    """One sentence for each given setting that changes nothing beside the others."""
    found: dict[str, str] = {}
    for names, has_effect, words in NEEDS:
        if has_effect(run):
            continue
        for group in run.groups:
            for entry in dataclasses.fields(group):
                if entry.name not in names or not entry.init or not group.is_given(entry.name):
                    continue
                value = getattr(group, entry.name)
                if value != default_of(entry):
                    found.setdefault(entry.name, f"--{entry.name} {value} has no effect: {words}")
    return list(found.values())


def rate_of_tower(run: RunSettings) -> str | None:
    """A warning of a tower that is trained at the rate of adapters."""
    training = run.training
    if not (training.lora_enable and run.model.unfreeze_mm_vision_tower) or training.mm_vision_tower_lr is not None:
        return None
    return (
        f"the vision tower's own weights are trained at the adapters' rate, --learning_rate {training.learning_rate:g}; a "
        "tower usually takes a tenth to a hundredth of it: give its own with --mm_vision_tower_lr"
    )
