"""transformers' Trainer for a LLaVA: parameter groups, order of samples, checkpoints, log figures, explained failures.

In: model, arguments, data. Out: the trained model and its checkpoints. sampler.py computes orders, the files are written by
run_folder/save.py and run_folder/checkpoints.py; metrics.py counts figures, failures.py explains errors. Scheduling,
precision, distribution and resuming are transformers'. The private methods that are overridden here are listed in
model/transformers_internals.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from llava.constants import IGNORE_INDEX
from llava.errors import InputError
from llava.files import read_json
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.loss import TOKEN_MEAN, LossRule, mean_loss, router_loss
from llava.text.tokenization import Tokenizer
from llava.train.arguments import TrainingArguments
from llava.train.callbacks import ConsoleCallback, StopCallback
from llava.train.eval_samples import generate_answers, write_answers
from llava.train.failures import SampleLoss, explain_non_finite, explain_out_of_memory, is_out_of_memory
from llava.train.indexed_dataset import ITEM_INDICES, IndexedCollator, IndexedDataset, find_samples
from llava.train.metrics import Throughput, base_model, measure_matmul_rate
from llava.train.performance import one_host_thread, raise_fetch_limit
from llava.train.run_folder.checkpoints import (
    STATE_FILE,
    explain_full_disk,
    finalize_checkpoint,
    rotate_checkpoints,
    staging_folder,
)
from llava.train.run_folder.save import (
    NON_LORA_FILE,
    PROJECTOR_FILE,
    gathered_projector,
    get_mm_adapter_state_maybe_zero_3,
    load_trained,
    maybe_zero_3,
    save_non_lora,
    save_projector,
    saves_projector_only,
)
from llava.train.sampler import (
    LengthGroupedSampler,
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)

__all__ = [
    "LLaVATrainer",
    "LengthGroupedSampler",
    "get_length_grouped_indices",
    "get_mm_adapter_state_maybe_zero_3",
    "get_modality_length_grouped_indices",
    "maybe_zero_3",
    "split_to_even_chunks",
]

logger = logging.getLogger(__name__)

TOKEN_TENSORS = ("input_ids", "labels", "attention_mask")


@dataclass(frozen=True)
class _Batch:
    """A micro-batch after its forward pass: the model's inputs, the indices of its items, and its loss."""

    inputs: dict[str, object]
    indices: list[int]
    loss: Tensor


class LLaVATrainer(Trainer):
    """Take what `Trainer` takes; `tokenizer=` is the old name of `processing_class=`."""

    args: TrainingArguments
    train_dataset: Any
    data_collator: Callable[[Sequence[Any]], Any]

    def __init__(self, *args: Any, tokenizer: Tokenizer | None = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        super().__init__(*args, **kwargs)
        # The loss is averaged here, for every language model alike; transformers passes counts to those that take them.
        self.model_accepts_loss_kwargs = False
        self.loss_rule = LossRule(
            by_sample=self.args.loss_average == "samples", smoothing=self.args.label_smoothing_factor
        )
        self.label_smoother = None  # which needs the labels at the places of the logits
        self.args.logging_nan_inf_filter = False  # such a loss ends the run and must not be filtered out
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.console = ConsoleCallback(bar=not self.args.disable_tqdm)
        self.stop = StopCallback()
        self.add_callback(self.console)
        self.add_callback(self.stop)
        self.throughput: Throughput | None = None
        self.settings: Sequence[object] = ()  # those in force, for the summary
        self._batches: list[_Batch] = []  # of the current optimizer step
        self._staging: Path | None = None
        self._eval_sums = torch.zeros(2)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        rate = measure_matmul_rate(torch.float16 if self.args.fp16 else torch.bfloat16)
        if rate is not None:
            logger.info("this GPU multiplies matrices at %.0f TFLOP/s; MFU is a share of that", rate / 1e12)
            torch.cuda.reset_peak_memory_stats()
        self.throughput = Throughput(self.model, device=self.args.device, matmul_rate=rate)
        try:
            with one_host_thread(self.args):
                return super().train(*args, **kwargs)
        finally:
            self.throughput.close()
            self.throughput = None

    def _prepare_for_training(self, *args: object, **kwargs: object) -> tuple[nn.Module, DataLoader]:
        prepared: tuple[nn.Module, DataLoader] = super()._prepare_for_training(*args, **kwargs)
        if self.args.uses_zero3:
            raise_fetch_limit(self.deepspeed)
        return prepared

    # Order of samples

    def get_train_dataloader(self) -> DataLoader:
        """Build the dataloader over indexed items; batches stay on the host until `_prepare_inputs`."""
        if self.train_dataset is None or isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        given = self.train_dataset, self.data_collator, self.accelerator.device_placement
        self.train_dataset, self.data_collator = IndexedDataset(self.train_dataset), IndexedCollator(self.data_collator)
        self.accelerator.device_placement = False
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator, self.accelerator.device_placement = given

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, IndexedDataset):
            dataset = dataset.items
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build transformers' optimizer, with groups of their own for a projector or tower that has its own learning rate."""
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

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            raise InputError(
                f"--lr_scheduler_kwargs {self.args.lr_scheduler_kwargs} does not fit --lr_scheduler_type "
                f"{self.args.lr_scheduler_type.value}: {error}"
            ) from error

    # Steps

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, object]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, object]], Tensor | int | None]:
        """Take the micro-batches of a step, and count what its loss is averaged over."""
        with self.throughput.waiting() if self.throughput is not None else nullcontext():
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.compute_loss_func is not None or not all(isinstance(batch.get("labels"), Tensor) for batch in batches):
            return batches, num_items
        counts = [self._count(batch["labels"]) for batch in batches]
        total = torch.stack(counts).sum().to(self.args.device) if counts else torch.zeros((), device=self.args.device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            total = self.accelerator.reduce(total, "mean")  # the ranks' gradients are averaged, too
        self.loss_is_scaled_for_ga = True
        return batches, total

    def _count(self, labels: Tensor) -> Tensor:
        """Count in a micro-batch what each has the same weight in the loss: trained tokens, samples, or micro-batches."""
        trained = labels[:, 1:] != IGNORE_INDEX
        counts = {"tokens": trained.sum(), "samples": trained.any(dim=1).sum(), "micro_batches": torch.ones(())}
        return counts[self.args.loss_average].float()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        indices = inputs.pop(ITEM_INDICES, [])
        if self.throughput is not None:
            self.throughput.count_batch(inputs)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.args.auto_find_batch_size:  # transformers tries again with a smaller batch
                self._batches.clear()
                raise
            step = self.state.global_step + 1
            raise InputError(explain_out_of_memory(self.model, self.args, inputs, step=step)) from error
        self._batches.append(_Batch(inputs, indices, loss))
        if self.is_deepspeed_enabled:  # which computes its norm elsewhere
            self._stop_unless_finite([loss])
            self._batches.clear()
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move inputs to the device without waiting for the GPU.

        Images are copied asynchronously. Ids of packed samples stay on the host, where the model lays them out, unless
        weights are sharded: DeepSpeed and FSDP place inputs themselves.
        """
        batch, on_host = dict(inputs), {}
        if isinstance(images := batch.get("images"), Tensor):
            batch["images"] = images.to(self.args.device, non_blocking=True)
        if batch.get("packed") and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            on_host = {name: batch.pop(name) for name in TOKEN_TENSORS if name in batch}
        return {**super()._prepare_inputs(batch), **on_host}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute a micro-batch's loss, in training multiplied by its share of the step (`num_items_in_batch`)."""
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rule = self.loss_rule if model.training else TOKEN_MEAN
        if isinstance(base_model(self.model), LlavaMetaForCausalLM):
            options = {"loss_only": self.args.fused_loss} | ({"loss_rule": rule} if rule != TOKEN_MEAN else {})
            loss, outputs = super().compute_loss(model, {**inputs, **options}, return_outputs=True)
        elif rule == TOKEN_MEAN:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        else:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = mean_loss(outputs.logits, labels, rule) + router_loss(base_model(self.model).config, outputs)
        if model.training and num_items_in_batch is not None:
            loss = loss * (self._count(labels).to(loss.device) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.is_deepspeed_enabled:
            values = [batch.loss for batch in self._batches]
            # Under float16 such gradients are usual: the scaler skips the step and lowers its scale.
            if isinstance(norm, Tensor) and not self.args.fp16:
                values.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            self._stop_unless_finite(values)
            self._batches.clear()
        return norm

    def _stop_unless_finite(self, values: list[Tensor]) -> None:
        """Check losses and the gradient norm together, once per step, since reading them waits for the GPU."""
        if not values or torch.isfinite(torch.stack([value.float() for value in values])).all():
            return
        broken = [batch for batch in self._batches if not torch.isfinite(batch.loss)]
        self._stop_for("the loss" if broken else "the gradient", broken[0] if broken else self._batches[-1])

    def _stop_for(self, what: str, batch: _Batch) -> NoReturn:
        """Raise an error that explains the failure. The weights are those before the step."""
        step, samples = self.state.global_step + 1, find_samples(self.train_dataset, batch.indices)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # one rank alone cannot run its batch again
            names = ", ".join(name for name, _ in samples)
            raise InputError(f"{what} of step {step} is not a finite number; the batch's samples are {names}")
        self.model.zero_grad(set_to_none=True)

        def loss_of(batch: dict[str, object]) -> Tensor:
            with self.compute_loss_context_manager():
                return super(LLaVATrainer, self).compute_loss(self.model, self._prepare_inputs(batch))

        with torch.no_grad():
            suspects = [SampleLoss(name, loss_of(self.data_collator([sample])).item()) for name, sample in samples]
        raise InputError(explain_non_finite(self.model, loss_of, batch.inputs, suspects, step=step, what=what))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.throughput is not None:
            over_ranks = self.accelerator.reduce
            logs.update(self.throughput.take(lambda counts: over_ranks(counts, "sum"), self.args.world_size))
        super().log(logs, start_time)

    # Validation

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate without an effect on the run's random state and its throughput figures."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._paused():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if getattr(self.args, "eval_generate", 0):
                self._log_answers()
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Average the loss over trained tokens, independent of the batches."""
        self._eval_sums = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        total, num_tokens = self.accelerator.reduce(self._eval_sums, "sum").tolist()
        for name in [name for name in output.metrics if name.endswith("_loss")]:
            output.metrics[name] = total / num_tokens if num_tokens else float("nan")
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if output[0] is not None:
            num_tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(self._eval_sums.device)
            self._eval_sums += torch.stack([output[0].float() * num_tokens, num_tokens])
        return output

    def _log_answers(self) -> None:
        with self.accelerator.autocast():
            answers = generate_answers(
                self.model,
                self.processing_class,
                self.eval_dataset,
                num_samples=self.args.eval_generate,
                max_new_tokens=self.args.eval_max_new_tokens,
                step=self.state.global_step,
            )
        if self.args.should_save:
            write_answers(answers, Path(self.args.output_dir))
            for answer in answers:
                self.console.write(f"  {answer}")

    def _paused(self) -> AbstractContextManager[None]:
        return nullcontext() if self.throughput is None else self.throughput.paused()

    # Checkpoints

    def _get_output_dir(self, trial: object) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save into a staging folder, rename it when it is complete, and only then delete older checkpoints."""
        run_folder, step = Path(self.args.output_dir), self.state.global_step
        self._staging = staging_folder(run_folder, step)
        with self._paused(), explain_full_disk(f"checkpoint-{step}", run_folder, discard=self._staging):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                staging, self._staging = self._staging, None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if str(self.state.best_model_checkpoint).startswith(str(staging)):
                    self.state.best_model_checkpoint = str(run_folder / f"checkpoint-{step}")
                    self.state.save_to_json(str(staging / f"checkpoint-{step}" / STATE_FILE))
                finalize_checkpoint(staging, step)
                rotate_checkpoints(run_folder, self.args.save_total_limit, keep=self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; of a projector run under DeepSpeed, only the projector's weights are gathered."""
        if self.is_deepspeed_enabled and saves_projector_only(self.args):
            self._save(output_dir, gathered_projector(self.model, self.args))  # every rank gathers, one writes
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the weights of a checkpoint: projector only, or adapters and projector, or all."""
        folder = Path(output_dir or self.args.output_dir)
        if saves_projector_only(self.args):
            if self.args.should_save:
                save_projector(self.model, self.args, folder / PROJECTOR_FILE, state_dict)
                self.model.config.save_pretrained(folder)
                torch.save(self.args, folder / TRAINING_ARGS_NAME)
            return
        super()._save(output_dir, state_dict)
        if self.args.lora_enable and self.args.should_save:
            (folder / "README.md").unlink(
                missing_ok=True
            )  # PEFT's card has no content; run_folder/summary.py writes one
            save_non_lora(self.model, folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, target = Path(resume_from_checkpoint), self.model if model is None else model
        if saves_projector_only(self.args):
            load_trained(target, folder / PROJECTOR_FILE)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable:
            load_trained(target, folder / NON_LORA_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and schedule, and keep the settings of this run, which may differ."""
        settings = [{name: value for name, value in group.items() if name != "params"} for group in self._groups()]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:
            return
        folder = Path(checkpoint)
        if not any(folder.glob("optimizer*")) or not (folder / SCHEDULER_NAME).is_file():
            logger.warning(
                "%s holds no state of the optimizer (--save_only_model, or its files were removed): the weights and the "
                "schedule go on, the optimizer begins anew", folder,
            )  # fmt: skip
            self.lr_scheduler.last_epoch = int(read_json(folder / STATE_FILE)["global_step"])
        follows_formula = isinstance(self.lr_scheduler, LambdaLR)
        for group, own in zip(self._groups(), settings, strict=True):
            if not follows_formula and own.pop("lr") != group.get("initial_lr", group["lr"]):
                logger.warning(
                    "--lr_scheduler_type %s lowers the rate as it goes: the checkpoint's rate %g counts, not --learning_rate",
                    self.args.lr_scheduler_type.value, group["lr"],
                )  # fmt: skip
            group.update(own)
        if follows_formula:
            resume_schedule(self.lr_scheduler)

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def resume_schedule(scheduler: LambdaLR) -> None:
    """Apply the base rates of the optimizer's groups at the schedule's step."""
    groups = scheduler.optimizer.param_groups
    base = [group["initial_lr"] for group in groups]
    rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": base, "_last_lr": rates})


def split_groups(optimizer: torch.optim.Optimizer, names: dict[int, str], own_rates: dict[str, float | None]) -> None:
    """Move parameters whose names contain a key into groups with that key's learning rate, before the first step.

    transformers' groups (with and without weight decay) stay first and in order; those of each rate follow.
    """
    base = list(optimizer.param_groups)
    for part, rate in own_rates.items():
        if rate is None:
            continue
        for group in base:
            chosen = [p for p in group["params"] if part in names[id(p)]]
            group["params"] = [p for p in group["params"] if part not in names[id(p)]]
            optimizer.param_groups.append({**group, "params": chosen, "lr": rate})
