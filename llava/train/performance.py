"""Compile a model's layers, keep as many activations as fit, and adapt ZeRO-3 to many small weights.

In: a model and the arguments of its run. Out: the same model, prepared in place before the trainer takes it.

Compilation fuses a layer's small operations (norms, rotary embeddings, activations, additions). Layers are alike, so one
compiled program serves all. The language model's layers are compiled, and those of a trained vision tower; the splice,
whose shapes change with each batch, is not. A compiled layer decides per operation whether to keep its result for the
backward pass or to compute it again; `keep` is the share to keep (0: the layer's input only, as gradient checkpointing
does; 1: everything that is not cheap to compute again).

Under ZeRO-3 each layer is a DeepSpeed leaf module: its weights are gathered together, and the hooks stay outside the
compiled program. A frozen vision tower is replicated on each GPU. DeepSpeed's own linear function is disabled, since it
identifies each weight by its id, so that no two layers could share a program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from llava.model.protocols import VisionTower
from llava.train.arguments import TrainingArguments
from llava.train.metrics import language_model, vision_tower

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# Private to DeepSpeed, which has no setting for it; checked with 0.19. A version without it keeps its own limit.
FETCH_LIMIT_ATTRIBUTE = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"


def prepare_layers(
    model: nn.Module, args: TrainingArguments, *, backend: str | Callable[..., object] = "inductor"
) -> None:
    """Prepare a model's layers as the arguments of a run ask, before its trainer takes the model."""
    if args.uses_zero3:
        replicate_frozen_tower(model, args.device, args.compute_dtype)
        set_leaf_modules(model)
    if args.compile_layers:
        dynamic, keep = True if args.packing else None, args.keep_activations
        compile_layers(model, keep=keep, dynamic=dynamic, backend=backend, within_hooks=args.uses_zero3)


def compile_layers(
    model: nn.Module,
    *,
    keep: float | None = None,
    dynamic: bool | None = None,
    backend: str | Callable[..., object] = "inductor",
    within_hooks: bool = False,
) -> None:
    """Compile the decoder layers, and those of a trained tower, each at its first call.

    Args:
        keep: share of activations to keep for the backward pass, 0 to 1; None leaves it to torch.
        dynamic: True where sequence lengths vary, as those of packed sequences do.
        backend: what `torch.compile` takes.
        within_hooks: leave a layer's hooks out of the program, as DeepSpeed's require.
    """
    if keep is not None:
        # Read when a layer is compiled; torch has no public setting for it. Checked with torch 2.13.
        torch._functorch.config.activation_memory_budget = keep
    tower = vision_tower(model)
    # A tower's layers that are not leaf modules have ZeRO-3's hooks inside.
    layers = [*language_model(model).layers]
    if tower is not None and tower.trainable and (tower.passes_once or not within_hooks):
        layers += tower.layers_used()
    for layer in layers:
        if within_hooks:
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=dynamic)
        else:
            layer.compile(backend=backend, dynamic=dynamic)


@contextmanager
def one_host_thread(args: TrainingArguments) -> Iterator[None]:
    """Keep torch to one thread on the host while a GPU trains.

    The host only lays out ids and counts tokens, which takes microseconds. But torch divides any tensor of 32,768 numbers
    among as many threads as there are cores, where loader processes run, and each such operation then waits
    milliseconds for the last thread. OMP_NUM_THREADS, which torchrun sets for this reason, takes precedence. A run that
    offloads the optimizer to the host keeps its threads.
    """
    if args.device.type != "cuda" or _offloads_optimizer(args) or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _offloads_optimizer(args: TrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP keep the optimizer's states in main memory."""
    if args.deepspeed:
        return bool(args.hf_deepspeed_config.is_offload())
    return bool(args.fsdp and args.fsdp_config.get("cpu_offload"))


def replicate_frozen_tower(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make a frozen tower's weights buffers, which ZeRO-3 does not partition. Checkpoints keep their names.

    A CLIP tower has a twentieth of LLaVA-1.5-7B's parameters in more tensors than the language model. Gathering and
    releasing each of them at every step takes far longer than the tower's computation.
    """
    tower = vision_tower(model)
    if tower is None or tower.trainable:
        return
    import deepspeed

    for module in tower.modules():
        weights = dict(module.named_parameters(recurse=False))
        # transformers may have partitioned them as it read them
        with deepspeed.zero.GatheredParameters(list(weights.values())):
            for name, weight in weights.items():
                delattr(module, name)
                module.register_buffer(name, weight.detach().to(device, dtype, copy=hasattr(weight, "ds_id")))


def set_leaf_modules(model: nn.Module) -> None:
    """Let ZeRO-3 gather the weights of a layer together, in the language model and in a trained vision tower."""
    from deepspeed.utils import set_z3_leaf_module

    for layer in [*getattr(language_model(model), "layers", []), *_leaf_modules_of_tower(vision_tower(model))]:
        set_z3_leaf_module(layer, True)


def raise_fetch_limit(engine: DeepSpeedEngine) -> None:
    """Let a DeepSpeed engine fetch the weights of two layers at a time, instead of two weights.

    The engine waits on the host when more than two fetched weights are not there yet. A layer's nine weights are fetched
    together, so that it would wait within each layer and submit the next one's work late.
    """
    from deepspeed.utils import z3_leaf_module

    layers = [module for module in engine.module.modules() if z3_leaf_module(module)]
    most = max((sum(1 for _ in layer.parameters()) for layer in layers), default=1)
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if hasattr(coordinator, FETCH_LIMIT_ATTRIBUTE):
        setattr(coordinator, FETCH_LIMIT_ATTRIBUTE, getattr(coordinator, FETCH_LIMIT_ATTRIBUTE) * most)


def _leaf_modules_of_tower(tower: VisionTower | None) -> list[nn.Module]:
    """A frozen tower as a whole, which has nothing to gather, or the layers of a trained one.

    DeepSpeed recognizes a layer's gradients by its output, and collects them after its first backward pass. A layer that
    runs at several scales has several, so it is no leaf.
    """
    if tower is None:
        return []
    if not tower.trainable:
        return [tower]  # type: ignore[list-item]
    return tower.layers_used() if tower.passes_once else []
