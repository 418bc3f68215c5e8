"""Check at the end of a run that its folder, loaded as anyone loads it, has the loss of the model that was trained.

In: a trainer after its run, whose result is written. Out: both losses on one batch in the log, or an `InputError`. Weights that
were not saved, settings that the config lacks and tensors under other names all show as another loss.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from llava.errors import InputError
from llava.model.builder import load
from llava.model.checkpoints.meta_model import open_meta_model, stream_weights
from llava.train.llava_trainer import LLaVATrainer
from llava.train.metrics import base_model, vision_tower
from llava.train.run_folder.record import raise_on_all_ranks

logger = logging.getLogger(__name__)

# Of the first samples, those with the fewest tokens: a large model takes a minute for them on a CPU.
_SAMPLES_SEEN, _SAMPLES_TAKEN = 16, 2
# A model of more than this share of the free memory is read layer by layer.
_SHARE_OF_MEMORY = 0.25


@dataclass(frozen=True)
class Tolerance:
    """By how much two losses may differ: relative and absolute."""

    relative: float
    absolute: float

    def covers(self, one: float, other: float) -> bool:
        return abs(one - other) <= self.absolute + self.relative * abs(one)


# By what the run computed in; the loaded model computes in float32, with the base's weights as they are stored.
EXACT, ROUNDED, QUANTIZED = Tolerance(1e-3, 1e-4), Tolerance(0.1, 0.05), Tolerance(0.3, 0.2)


def verify_saved(trainer: LLaVATrainer) -> None:
    """Compare the loss of the trained model with that of its folder. A collective call.

    Raises:
        InputError: The folder cannot be loaded, or its loss is another one.
    """
    fault = None
    try:
        _verify(trainer)
    except InputError as error:
        fault = error
    raise_on_all_ranks(fault, trainer.args)


def _verify(trainer: LLaVATrainer) -> None:
    args, folder = trainer.args, Path(trainer.args.output_dir)
    reason = _unverifiable(trainer)
    batch = None if reason is not None else _small_batch(trainer)
    if batch is None:
        logger.info("the saved model is not checked: %s", reason or "none of the first samples can be used")
        return
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if not (sharded or args.should_save):
        return
    trained = _trained_loss(trainer, batch, sharded=sharded)
    if not args.should_save:
        return
    try:
        saved = _saved_loss(folder, batch)
    except (MemoryError, torch.OutOfMemoryError) as error:
        logger.warning(
            "the saved model is not checked, for lack of memory (%s); llava doctor %s does it", error, folder
        )
        return
    except InputError as error:
        raise InputError(f"the run's result is written, but {str(folder)!r} cannot be loaded: {error}") from error
    logger.info(
        "loss of the trained model on %d samples %.5f, of the saved one %.5f", len(batch["labels"]), trained, saved
    )
    if not _tolerance(trainer).covers(trained, saved):
        raise InputError(
            f"the run's result in {str(folder)!r} is not the model that was trained: its loss on the same batch is "
            f"{saved:.5f}, and {trained:.5f} before it was saved; the last checkpoint-N, if there is one, holds the trained "
            "weights (--verify_saved False leaves this check out)"
        )


def _unverifiable(trainer: LLaVATrainer) -> str | None:
    """Why the result of a run is not checked, if so."""
    if vision_tower(trainer.model) is None:
        return "it has no vision tower"
    if getattr(base_model(trainer.model).config, "quantization_config", None) is not None and trainer.args.bits == 16:
        return "its base is stored quantized"
    return None


def _small_batch(trainer: LLaVATrainer) -> dict[str, Any] | None:
    dataset: Any = getattr(trainer.train_dataset, "samples", trainer.train_dataset)  # may be packed
    items = []
    for index in range(min(len(dataset), _SAMPLES_SEEN)):
        try:
            items.append(dataset[index])
        except InputError:  # a bad sample, which --on_bad_sample skip passed over
            continue
    items.sort(key=lambda item: len(item["input_ids"]))
    batch = trainer.data_collator(items[:_SAMPLES_TAKEN]) if items else None
    return batch if isinstance(batch, dict) and isinstance(batch.get("labels"), torch.Tensor) else None


@torch.no_grad()
def _trained_loss(trainer: LLaVATrainer, batch: Mapping[str, Any], *, sharded: bool) -> float:
    model = trainer.model_wrapped if sharded else trainer.model
    was_training = model.training
    model.eval()
    try:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
    finally:
        model.train(was_training)
    return float(loss[0] if isinstance(loss, tuple) else loss)


@torch.no_grad()
def _saved_loss(folder: Path, batch: Mapping[str, Any]) -> float:
    """The loss of the model in a folder, in float32 on the CPU."""
    batch = {name: _in_float32(value) for name, value in batch.items()}
    meta = open_meta_model(folder)
    size = sum(4 * header.num_elements for header in meta.found.values())
    if size < _SHARE_OF_MEMORY * psutil.virtual_memory().available:
        del meta
        return float(load(folder, device="cpu", dtype=torch.float32).model.eval()(**batch).loss)
    with stream_weights(meta.model, meta.read):  # type: ignore[arg-type]
        return float(meta.model(**batch).loss)


def _in_float32(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return [_in_float32(each) for each in value] if isinstance(value, list) else value


def _tolerance(trainer: LLaVATrainer) -> Tolerance:
    if trainer.args.bits != 16:
        return QUANTIZED
    return EXACT if trainer.args.compute_dtype == torch.float32 else ROUNDED
