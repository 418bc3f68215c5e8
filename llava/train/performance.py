"""What lets a GPU train at its rate: a model's layers compiled, as much of what they compute kept as there is room for, and
a host that is not in the way.

In: a model, and the arguments of its run. Out: the same model, whose layers run as compiled programs: their many small
operations (norms, rotations, gates, sums) become a few, which is most of what keeps a GPU from its rate in training.
Layers are alike, so one is compiled and all use it. The language model's are, and those of a vision tower that learns; the
splice, whose shapes change from batch to batch, stays as it is.

Under ZeRO-3 weights are fetched and given away by hooks. With hooks around whole layers rather than around each of their
parts, fetching goes on beside the computation, and layers can be compiled, from within the hooks. A frozen vision tower is
left whole on each GPU: it is small, but of many weights, each of which takes time; and fetching may run ahead by whole
layers, not by weights. DeepSpeed also puts a product of its own in the place of torch's, which knows each weight by its
number, so that no two layers are alike to the compiler; `disable_memory_efficient_linear` keeps torch's.

A compiled layer can decide operation by operation what to keep and what to compute again. `keep` says how much: 0 keeps its
input only, as gradient checkpointing does, and 1 everything that is worth it. What is cheap to compute again goes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llava.errors import InputError
from llava.train.metrics import language_model, vision_tower

FETCH_LIMIT_ATTRIBUTE = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"


def prepare_layers(model: Any, args: Any, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Do to a model's layers what the arguments of a run ask for, before its trainer takes the model."""
    zero3 = uses_zero3(args)
    if zero3:
        replicate_frozen_tower(model, args.device, args.compute_dtype)
        set_leaf_modules(model)
    if args.compile_layers:
        dynamic = True if args.packing else None
        compile_layers(model, keep=args.keep_activations, dynamic=dynamic, backend=backend, within_hooks=zero3)


def compile_layers(
    model: Any,
    *,
    keep: float | None = None,
    dynamic: bool | None = None,
    backend: str | Callable[..., Any] = "inductor",
    within_hooks: bool = False,
) -> None:
    """Compile the decoder layers, and those of a tower that is trained, each at its first call. `dynamic` promises that
    lengths will vary, as packed rows do.

    `within_hooks` leaves hooks around a layer out of the program, which DeepSpeed's need.
    """
    if keep is not None:
        # Read when a layer is compiled; there is no other way to pass it on.
        torch._functorch.config.activation_memory_budget = keep
    tower = vision_tower(model)
    # Layers that ZeRO-3 does not fetch whole have hooks inside.
    learns = tower is not None and tower.trainable and (tower.passes_once or not within_hooks)
    for layer in [*language_model(model).layers, *(tower.layers_used() if learns else [])]:
        if within_hooks:
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=dynamic)
        else:
            layer.compile(backend=backend, dynamic=dynamic)


@contextmanager
def one_host_thread(args: Any) -> Iterator[None]:
    """Keep torch to one thread on the host while a GPU trains.

    What is left to the host is laying out ids and counting tokens, which is over in microseconds; but torch divides any
    tensor of 32,768 numbers among as many threads as there are cores, where loader processes run, and each such operation
    waits for the last of them, for milliseconds. torchrun sets OMP_NUM_THREADS for this reason, which is heeded here. A run
    that leaves the optimizer's work to the host keeps its threads.
    """
    if args.device.type != "cuda" or _works_on_host(args) or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _works_on_host(args: Any) -> bool:
    """Whether DeepSpeed or FSDP keep the optimizer's states in main memory."""
    if args.deepspeed:
        return bool(args.hf_deepspeed_config.is_offload())
    return bool(args.fsdp and args.fsdp_config.get("cpu_offload"))


def uses_zero3(args: Any) -> bool:
    return bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()


def disable_memory_efficient_linear(deepspeed_config: dict[str, Any]) -> None:
    """Have DeepSpeed leave torch's product as it is, in this configuration of a run whose layers are compiled.

    A compiled layer keeps a weight itself for its backward pass, which is fetched anew. An eager product would keep the
    gathered numbers, so this is for compiled layers alone.
    """
    zero = deepspeed_config["zero_optimization"]
    if zero.get("memory_efficient_linear"):
        raise InputError(
            "memory_efficient_linear: true in --deepspeed's file and --compile_layers exclude each other, since layers with "
            "that product cannot share a compiled program; take it out of the file, or leave the layers uncompiled"
        )
    zero["memory_efficient_linear"] = False


def enable_bfloat16_states(deepspeed_config: dict[str, Any]) -> None:
    """Have DeepSpeed hold trained weights and the optimizer's states in bfloat16, without its copy in float32."""
    deepspeed_config["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def replicate_frozen_tower(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Make a frozen tower's weights buffers, which ZeRO-3 does not shard. Their names in checkpoints stay the same.

    A CLIP tower has a twentieth of LLaVA-1.5-7B's numbers, in more weights than the language model: fetching and giving
    away each of them at every step takes far longer than all that the tower computes, and the GPU has nothing else to do.
    """
    tower = vision_tower(model)
    if tower is None or tower.trainable:
        return
    import deepspeed

    for module in tower.modules():
        weights = dict(module.named_parameters(recurse=False))
        # transformers may have scattered them as it read them
        with deepspeed.zero.GatheredParameters(list(weights.values())):
            for name, weight in weights.items():
                delattr(module, name)
                module.register_buffer(name, weight.detach().to(device, dtype, copy=hasattr(weight, "ds_id")))


def set_leaf_modules(model: Any) -> None:
    """Let ZeRO-3 gather the weights of a layer together, in the language model and in a vision tower that is trained."""
    from deepspeed.utils import set_z3_leaf_module

    for layer in [*getattr(language_model(model), "layers", []), *_parts_of_tower(vision_tower(model))]:
        set_z3_leaf_module(layer, True)


def raise_fetch_limit(engine: Any) -> None:
    """Let a DeepSpeed engine have the weights of two layers under way, as many as it would let of two modules with one each.

    It waits on the host when more than two fetched weights are not in place yet. A layer's nine come at once, so that it
    would wait within each layer, and submit the next one's work late. No setting reaches that number.
    """
    from deepspeed.utils import z3_leaf_module

    layers = [module for module in engine.module.modules() if z3_leaf_module(module)]
    most = max((sum(1 for _ in layer.parameters()) for layer in layers), default=1)
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if hasattr(coordinator, FETCH_LIMIT_ATTRIBUTE):  # another version may count otherwise
        setattr(coordinator, FETCH_LIMIT_ATTRIBUTE, getattr(coordinator, FETCH_LIMIT_ATTRIBUTE) * most)


def _parts_of_tower(tower: Any) -> list[nn.Module]:
    """What hooks go around: all of a frozen tower, which has nothing to fetch, and the layers of another.

    DeepSpeed notices by a layer's output when its gradients come, and takes them after its first backward pass. A layer
    that has looked at several scales has several.
    """
    if tower is None:
        return []
    if not tower.trainable:
        return [tower]
    return tower.layers_used() if tower.passes_once else []
