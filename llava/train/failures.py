"""Explain why a run had to stop: which samples, which tensor, and what to change.

In: the model and the batch of the step that failed. Out: one sentence each for a loss that is not finite, for gradients
that are not, and for memory that ran out. The batch is run once more with hooks on each module; a run without failures has
no hooks. Sizes come from memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava.errors import InputError
from llava.train.arguments import TrainingArguments
from llava.train.memory import GIB, estimate, remedies
from llava.train.metrics import peak_memory

# In the message of the CPU allocator's error; GPUs have an exception class of their own.
_CPU_ALLOCATOR = "defaultcpuallocator"
_LISTED = 8


@dataclass(frozen=True)
class SampleLoss:
    """The name of a sample in a batch, and the loss of that sample alone."""

    name: str
    loss: float

    def __str__(self) -> str:
        return f"{self.name}: {self.loss:.4g}"


def explain_non_finite(
    model: nn.Module,
    compute_loss: Callable[[dict[str, object]], Tensor],
    batch: dict[str, object],
    suspects: Sequence[SampleLoss],
    *,
    step: int,
    what: str,
) -> str:
    """Explain a loss or gradients (`what`) of step `step` that are not finite."""
    bad = [suspect for suspect in suspects if not math.isfinite(suspect.loss)]
    if bad and len(bad) < len(suspects):
        blame = f"of the batch's {len(suspects)} samples these have such a loss alone: {_names(bad)}; the others do not"
    else:
        blame = f"the batch's samples and their losses alone are {_names(suspects)}"
    return (
        f"{what} of step {step} is not a finite number; {find_first_non_finite(model, compute_loss, batch)}; {blame}; no "
        "weight was changed in this step; try a lower --learning_rate, a longer --warmup_steps, --max_grad_norm 1, or "
        "--bf16 instead of --fp16, or check the samples named, and resume from the last checkpoint"
    )


def _names(suspects: Sequence[SampleLoss]) -> str:
    rest = f" and {len(suspects) - _LISTED} more" if len(suspects) > _LISTED else ""
    return ", ".join(map(str, suspects[:_LISTED])) + rest


def find_first_non_finite(
    model: nn.Module, compute_loss: Callable[[dict[str, object]], Tensor], batch: Mapping[str, object]
) -> str:
    """Find where values stop being finite: in the weights, the batch, the forward or the backward pass."""
    weights = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if weights:
        return f"the first of {len(weights)} weights that hold NaN or infinity is {weights[0]}"
    inputs = [name for name, value in batch.items() if not _finite(value)]
    if inputs:
        return f"the batch's {inputs[0]} hold NaN or infinity"
    found: list[str] = []
    with _hooked([m.register_forward_hook(partial(_record_output, found, name)) for name, m in model.named_modules()]):
        loss = compute_loss(dict(batch))
    if found:
        return f"the first module to give NaN or infinity, from weights and inputs that are finite, is {found[0]}"
    if not _finite(loss):
        return "every module's output is finite and the loss is not: is there a token to train on?"
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with _hooked([p.register_hook(partial(_record_gradient, found, name)) for name, p in trained]):
        loss.backward()
    model.zero_grad(set_to_none=True)
    if found:
        return f"the forward pass is finite (loss {loss.item():.4g}), and the first gradient that is not is that of {found[0]}"
    return "run once more, the batch gives finite values: the cause is dropout, the hardware, or another rank"


def _record_output(found: list[str], name: str, module: nn.Module, args: object, output: object) -> None:
    """A forward hook. Modules return in order, inner ones first."""
    if not _finite(output):
        found.append(f"{name or 'the model'} ({type(module).__name__})")


def _record_gradient(found: list[str], name: str, gradient: Tensor) -> None:
    if not _finite(gradient):
        found.append(name)


@contextmanager
def _hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: object) -> bool:
    """Whether all floating-point values in a tensor, or in a container of tensors, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return True


# Memory


@contextmanager
def explain_missing_package() -> Iterator[None]:
    """Turn the error of a setting whose package is absent into one sentence."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"a setting of this run needs a package that is not installed: {error}") from error


@contextmanager
def explain_hub() -> Iterator[None]:
    """Turn a hub that cannot be reached, or refuses, into one sentence; `--push_to_hub` asks it before the first step."""
    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, ConnectionError) as error:
        raise InputError(
            f"--push_to_hub True, and the hub cannot be used ({str(error).splitlines()[0]}); log in with: hf auth login, or "
            "leave it out and upload the result afterwards"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error).lower()
    )


def explain_out_of_memory(model: nn.Module, args: TrainingArguments, batch: Mapping[str, object], *, step: int) -> str:
    """Explain memory that ran out: what was used, what the batch was, and how much each remedy would save."""
    ids = batch.get("input_ids")
    size = (
        f"{ids.shape[0]} sequences of up to {ids.shape[1]:,} tokens before images" if isinstance(ids, Tensor) else "?"
    )
    images = batch.get("images")
    image_words = f" and {len(images)} images" if isinstance(images, Sized) else ""
    helps = "; ".join(
        f"{remedy.flags} (about {remedy.saved / GIB:.2g} GiB less)" for remedy in remedies(model, args)[:4]
    )
    return (
        f"out of memory in step {step}: {_memory()}; the batch had {size}{image_words}; with --model_max_length "
        f"{args.model_max_length} and --per_device_train_batch_size {args.per_device_train_batch_size} this run may need "
        f"{estimate(model, args).line()}; what helps, the most effective first: {helps}"
    )


def _memory() -> str:
    used = f"{peak_memory() / GIB:.1f} GiB"
    if not torch.cuda.is_available():
        return f"the process used at most {used} of main memory"
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"tensors used at most {used} of the GPU's {whole / GIB:.1f} GiB"
