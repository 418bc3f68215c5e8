"""transformers' Trainer, changed where a LLaVA differs: parameter groups, order of samples, what a checkpoint holds.

In: model, arguments, data. Out: the trained model and its checkpoints. Orders are computed in sampler.py, files are
written by save.py; scheduling, precision, distribution and resuming are the library's.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from llava.train.sampler import LengthGroupedSampler
from llava.train.save import (
    NON_LORA_FILE,
    PROJECTOR_FILE,
    load_trained,
    save_non_lora,
    save_projector,
    saves_projector_only,
)

logger = logging.getLogger(__name__)


class LLaVATrainer(Trainer):
    """Takes what `Trainer` takes; `tokenizer=` is accepted as the old name of `processing_class=`."""

    def __init__(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(*args, **kwargs)
        # Every micro-batch weighs the same in an accumulated step, as in published runs. (The library would weigh by
        # tokens where a model takes the count of them.)
        self.model_accepts_loss_kwargs = False

    # Order of samples

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = "modality" if self.args.group_by_modality_length else self.args.train_sampling_strategy
        if (
            dataset is None
            or strategy not in ("modality", "group_by_length")
            or not hasattr(dataset, "modality_lengths")
        ):
            return super()._get_train_sampler(dataset)
        by_modality = strategy == "modality"
        return LengthGroupedSampler(
            self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            lengths=dataset.modality_lengths if by_modality else dataset.lengths,
            group_by_modality=by_modality,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    # Parameter groups

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The library's optimizer, its groups split where the projector or the tower has its own learning rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            own_rates = {
                "mm_projector": self.args.mm_projector_lr,
                "vision_tower": getattr(self.args, "mm_vision_tower_lr", None),
            }
            named = (self.model if model is None else model).named_parameters()
            split_groups(optimizer, {id(p): name for name, p in named}, own_rates)
        return optimizer

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the weights of a checkpoint: the projector alone, or adapters and projector, or everything."""
        folder = Path(output_dir or self.args.output_dir)
        if saves_projector_only(self.args):
            save_projector(self.model, self.args, folder / PROJECTOR_FILE, state_dict)
            self.model.config.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
            return
        super()._save(output_dir, state_dict)
        if self.args.lora_enable and self.args.should_save:
            save_non_lora(self.model, folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, target = Path(resume_from_checkpoint), self.model if model is None else model
        if saves_projector_only(self.args):
            load_trained(target, folder / PROJECTOR_FILE)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable:
            load_trained(target, folder / NON_LORA_FILE)


def split_groups(optimizer: torch.optim.Optimizer, names: dict[int, str], own_rates: dict[str, float | None]) -> None:
    """Move parameters whose names contain a key into groups with that key's learning rate, before the first step.

    The library's groups (with and without weight decay) stay first and in order, those of each rate follow.
    """
    base = list(optimizer.param_groups)
    for part, rate in own_rates.items():
        if rate is None:
            continue
        for group in base:
            chosen = [p for p in group["params"] if part in names[id(p)]]
            group["params"] = [p for p in group["params"] if part not in names[id(p)]]
            optimizer.param_groups.append({**group, "params": chosen, "lr": rate})
