"""Training runs on the tiny recorded checkpoints, for the tests of llava.train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_data import golden

from llava.train.arguments import parse_train_args
from llava.train.llava_trainer import LLaVATrainer
from llava.train.run import build_trainer

BASE = "checkpoints/vicuna-tiny-base"
LLAVA = "checkpoints/llava-v1.5-tiny-vicuna"
TOWER = "checkpoints/vision/clip-tiny-56"


def recording(name: str) -> Any:
    return json.loads(golden(name).read_text(encoding="utf-8"))


def argv(output_dir: Path | str, *extra: str, model: str = LLAVA, **flags: Any) -> list[str]:
    """The command line of the recorded runs; configs name towers relative to the folder of recordings, so go there."""
    values = {
        "model_name_or_path": model,
        "version": "v1",
        "data_path": "train_data/finetune.json",
        "image_folder": "images",
        "vision_tower": TOWER,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "model_max_length": 2048,
        "lazy_preprocess": True,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "seed": 42,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "max_steps": 1,
        "learning_rate": "2e-3",
        "weight_decay": 0.0,
        "output_dir": output_dir,
        "disable_tqdm": True,
        "verify_saved": False,  # takes a load; tests of what loads turn it on
        **flags,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + list(extra)


def trainer_for(arguments: list[str]) -> LLaVATrainer:
    return build_trainer(*parse_train_args(arguments))


def recorded_batches() -> list[dict[str, torch.Tensor]]:
    """The ten batches that all recorded runs saw, in their order."""
    arrays = np.load(golden("training/adamw_full.npz"))
    names = sorted({key.split("/")[0] for key in arrays}, key=lambda name: int(name.removeprefix("step")))
    keys = ("input_ids", "labels", "attention_mask", "images")
    return [{key: torch.from_numpy(arrays[f"{name}/{key}"]) for key in keys} for name in names]


def feed(trainer: LLaVATrainer, batches: list[Any]) -> list[float]:
    """Let a trainer see whole batches in the given order; the list returned fills with the loss of each."""
    losses: list[float] = []
    compute = trainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    trainer.compute_loss = noted  # type: ignore[method-assign]
    trainer.train_dataset = batches
    trainer.data_collator = lambda items: items[0]
    return losses


# One recorded batch is one "sample", taken in order.
BY_BATCH = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
