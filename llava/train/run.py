"""Run a training: from its arguments to the files that it leaves.

In: arguments (arguments.py). Out: a folder that `load_pretrained_model` reads. The steps: tokenizer and base model, freezing
and adapters, tower and projector (model_setup.py), data (data.py), LLaVATrainer (llava_trainer.py), files (run_folder/).
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import cast

import transformers
from transformers import EarlyStoppingCallback

from llava.conversation import Conversation, get_template
from llava.errors import InputError
from llava.model.attention import use_varlen
from llava.model.multimodal_encoder.builder import save_tower
from llava.model.protocols import LlavaModel
from llava.text.tokenization import Tokenizer
from llava.train.arguments import LANGUAGE_MODEL, PROJECTOR, DataArguments, ModelArguments, TrainingArguments
from llava.train.callbacks import Stopped
from llava.train.data import LazySupervisedDataset, make_supervised_data_module
from llava.train.failures import explain_hub, explain_missing_package
from llava.train.llava_trainer import LLaVATrainer
from llava.train.memory import GIB, estimate
from llava.train.metrics import peak_memory
from llava.train.model_setup import (
    add_vision,
    cast_weights,
    check_version,
    count_trained,
    fit_template,
    inherit_vision_settings,
    load_base_model,
    name_template,
    prepare_language_model,
    prepare_tokenizer,
    replace_settings,
)
from llava.train.packing import pack_data_module
from llava.train.performance import prepare_layers
from llava.train.run_folder.checkpoints import explain_full_disk
from llava.train.run_folder.record import open_run_folder
from llava.train.run_folder.save import safe_save_model_for_hf_trainer, saves_projector_only
from llava.train.run_folder.settings import RunSettings, idle_settings, rate_of_tower, settings_in_force
from llava.train.run_folder.summary import log_to_file, remember_base, summarize, write_summary
from llava.train.run_folder.verify import verify_saved
from llava.utils import rank0_print

logger = logging.getLogger(__name__)


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    *,
    attn_implementation: str | None = None,
) -> LLaVATrainer:
    """Train as the arguments say, save into `output_dir`, and return the trainer; with `--estimate_memory` nothing is trained.

    Raises:
        InputError: the arguments, the data or a checkpoint cannot be used, a loss is not finite, or the folder that was
            written has another loss than the model that was trained.
        Stopped: a signal ended the run after a checkpoint was written.
    """
    if training_args.estimate_memory:
        trainer = build_trainer(model_args, data_args, training_args, attn_implementation=attn_implementation)
        needed = estimate(trainer.model, training_args)
        rank0_print(f"memory on each device, for the longest batches that may come:\n{needed.table()}")
        return trainer
    with open_run_folder(model_args, data_args, training_args) as (record, resumed), log_to_file(training_args):
        trainer = build_trainer(model_args, data_args, training_args, attn_implementation=attn_implementation)
        remember_base(trainer, model_args)
        _train(trainer, resumed)
        run_folder = Path(training_args.output_dir)
        with explain_full_disk("the result", run_folder):
            _save_result(trainer)
        if training_args.verify_saved:
            verify_saved(trainer)
        with explain_full_disk("the summary", run_folder):
            if training_args.should_save:
                summary = summarize(trainer, model_args, data_args)
                write_summary(trainer, summary, record)
                replace(record, finished=True).write(run_folder)
                rank0_print("\n".join(summary.lines()))
    return trainer


def _train(trainer: LLaVATrainer, resumed: str | None) -> None:
    """Train to the last step, from a checkpoint if there is one, and report what was unusual."""
    args = trainer.args
    needed = estimate(trainer.model, args)
    logger.info("this run needs %s, for the longest batches that may come", needed.line())
    with trainer.stop.listening(), explain_missing_package():
        trainer.train(resume_from_checkpoint=resumed)
    if trainer.state.global_step < trainer.state.max_steps and trainer.stop.signal_number:
        raise Stopped(trainer.stop.signal_number, trainer.state.global_step)
    if args.device.type == "cuda":
        logger.info("the run used %.1f GiB, %.1f were estimated", peak_memory() / GIB, needed.peak / GIB)
    dataset = getattr(trainer.train_dataset, "samples", trainer.train_dataset)  # may be packed
    if isinstance(dataset, LazySupervisedDataset):
        for report in dataset.reports():
            logger.warning(report)


def build_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    *,
    attn_implementation: str | None = None,
) -> LLaVATrainer:
    """Load and prepare everything that the first step needs."""
    check_arguments(model_args, data_args, training_args)
    given = RunSettings(model_args, data_args, training_args)
    attn_implementation = model_args.attn_implementation or attn_implementation
    check_version(model_args.version)
    if training_args.logging_dir:
        os.environ["TENSORBOARD_LOGGING_DIR"] = training_args.logging_dir
    transformers.set_seed(training_args.seed)  # new modules are initialized at random

    language_model, tokenizer = load_base_model(model_args, training_args, attn_implementation=attn_implementation)
    model_args, data_args = inherit_vision_settings(language_model.config, model_args, data_args)
    used = RunSettings(model_args, data_args, training_args)
    for warning in [*idle_settings(used), *filter(None, [rate_of_tower(used)])]:
        logger.warning(warning)
    if not model_args.vision_tower and (model_args.tune_mm_mlp_adapter or model_args.unfreeze_mm_vision_tower):
        raise InputError("training a projector or a tower needs one: name it with --vision_tower")
    name = name_template(model_args.version, tokenizer, language_model.config.to_dict())
    generation = language_model.generation_config
    stops = None if generation is None else generation.eos_token_id
    name = fit_template(name, tokenizer, generation)
    training_args.adds_stop = generation is not None and generation.eos_token_id != stops
    model_args = replace_settings(model_args, {"version": name})
    conv = get_template(name)
    # Data first, so that a mistake there is reported before a tower is loaded.
    data_module = make_supervised_data_module(tokenizer, data_args, conv)
    prepare_tokenizer(tokenizer, language_model, model_args.version)
    # Without a tower it is no LLaVA, and only what a language model has is used.
    model = cast("LlavaModel", prepare_language_model(language_model, model_args, training_args))
    if model_args.vision_tower:
        add_vision(model, tokenizer, model_args, data_args, training_args)
    if data_args.eval_data_path:
        data_module["eval_dataset"] = _validation_set(tokenizer, data_args, conv)
        training_args.prediction_loss_only = True  # logits of a whole validation set would fill the memory
    cast_weights(model, training_args)
    if training_args.packing:
        data_module = pack_data_module(data_module, model, training_args)
        if attn_implementation is None:
            use_varlen(model.config, training_args.device, training_args.compute_dtype)
    num_trained = count_trained(model)
    rank0_print(
        f"training {num_trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters on "
        f"{len(data_module['train_dataset']):,} samples; template {model_args.version}"
    )
    prepare_layers(model, training_args)
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # every trained weight takes part in every batch
    with explain_missing_package(), explain_hub():
        trainer = LLaVATrainer(model=model, processing_class=tokenizer, args=training_args, **data_module)
    if training_args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(training_args.early_stopping_patience))
    trainer.settings = settings_in_force(given, RunSettings(model_args, data_args, training_args))
    return trainer


def _validation_set(tokenizer: Tokenizer, data_args: DataArguments, conv: Conversation) -> LazySupervisedDataset:
    arguments = copy.copy(data_args)
    arguments.image_folder = data_args.eval_image_folder or data_args.image_folder
    arguments.data_weights = None  # those of the training files
    return LazySupervisedDataset(str(data_args.eval_data_path), tokenizer, arguments, conv=conv)


def check_arguments(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raise `InputError` for arguments that contradict each other."""
    if training_args.lora_enable and model_args.tune_mm_mlp_adapter:
        raise InputError(
            "--lora_enable and --tune_mm_mlp_adapter contradict each other: the latter trains nothing but the projector"
        )
    parts = model_args.mm_tunable_parts
    if parts is not None and training_args.freeze_mm_mlp_adapter and model_args.trains(PROJECTOR):
        raise InputError(f"--freeze_mm_mlp_adapter and --mm_tunable_parts {parts} contradict each other; give one")
    if parts is not None and training_args.lora_enable and not model_args.trains(LANGUAGE_MODEL):
        raise InputError(
            f"--lora_enable trains adapters of the language model, which --mm_tunable_parts {parts} freezes; add "
            f"{LANGUAGE_MODEL}, or leave --lora_enable out"
        )
    if parts is not None and not model_args.vision_tower and parts != LANGUAGE_MODEL:
        raise InputError(f"--mm_tunable_parts {parts} needs a model with a tower: name it with --vision_tower")
    strategy = str(training_args.eval_strategy.value)
    if strategy != "no" and not data_args.eval_data_path:
        raise InputError(f"--eval_strategy {strategy} needs a validation set: name its samples with --eval_data_path")
    if strategy == "no" and data_args.eval_data_path:
        raise InputError(
            "--eval_data_path is given: say when to validate, with --eval_strategy epoch, or steps and --eval_steps"
        )
    if training_args.early_stopping_patience is not None:
        if strategy == "no":
            raise InputError(
                "--early_stopping_patience needs a validation set: give --eval_data_path and --eval_strategy"
            )
        training_args.metric_for_best_model = training_args.metric_for_best_model or "eval_loss"
        if training_args.greater_is_better is None:
            training_args.greater_is_better = not training_args.metric_for_best_model.endswith("loss")
    if training_args.eval_generate and not data_args.eval_data_path:
        raise InputError("--eval_generate answers validation samples: name them with --eval_data_path")
    if training_args.eval_generate and (training_args.fsdp or training_args.uses_zero3):
        raise InputError(
            "--eval_generate needs a whole model on each GPU, which FSDP and ZeRO-3 do not have; leave it at 0"
        )
    if training_args.remove_unused_columns:
        raise InputError("--remove_unused_columns True would throw the images away; leave it False")


def _save_result(trainer: LLaVATrainer) -> None:
    """Write the trained weights in the dtype that the run computed in."""
    args = trainer.args
    trainer.save_state()
    trainer.model.config.use_cache = True
    if not (args.deepspeed or args.fsdp or saves_projector_only(args) or args.lora_enable):
        # The float32 copies were for the optimizer; checkpoint-N folders still hold them.
        for parameter in trainer.model.parameters():
            if parameter.is_floating_point() and parameter.dtype != args.compute_dtype:
                parameter.data = parameter.data.to(args.compute_dtype)
    safe_save_model_for_hf_trainer(trainer, args.output_dir)
    partial = saves_projector_only(args) or args.lora_enable
    if partial and args.should_save and getattr(trainer.model.config, "mm_vision_tower", None):
        # A complete model saves this by itself. An adapter or a projector alone refers to its tower too.
        save_tower(trainer.model.get_vision_tower(), trainer.model.config, Path(args.output_dir))
    if partial and args.should_save and args.adds_stop:
        trainer.model.generation_config.save_pretrained(args.output_dir)  # it stops where answers were trained to end
