"""The language model's layers compiled for training, and how much of what they compute is kept for the backward pass.

In: a model. Out: the same model, whose layers run as compiled programs: their many small operations (norms, rotations,
gates, sums) become a few, which is most of what keeps a GPU from its rate in training. Layers are alike, so one is
compiled and all use it; images and the splice, whose shapes change from batch to batch, stay as they are.

Under ZeRO-3 weights are fetched and given away by hooks. With hooks around whole layers, rather than around each of their
parts, fetching goes on beside the computation, and layers can be compiled, from within the hooks.

A compiled layer can decide operation by operation what to keep and what to compute again. `keep` says how much: 0 keeps its
input only, as gradient checkpointing does, and 1 everything that is worth it. What is cheap to compute again goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llava.train.metrics import language_model


def compile_layers(
    model: Any,
    *,
    keep: float | None = None,
    dynamic: bool | None = None,
    backend: str | Callable[..., Any] = "inductor",
    within_hooks: bool = False,
) -> None:
    """Compile each decoder layer, at its first call. `dynamic` promises that lengths will vary, as packed rows do.

    `within_hooks` leaves hooks around a layer out of the program, which DeepSpeed's need.
    """
    if keep is not None:
        # Read when a layer is compiled; there is no other way to pass it on.
        torch._functorch.config.activation_memory_budget = keep
    for layer in language_model(model).layers:
        if within_hooks:
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=dynamic)
        else:
            layer.compile(backend=backend, dynamic=dynamic)


def fetch_whole_layers(model: Any) -> None:
    """Let ZeRO-3 gather the weights of a decoder layer together."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list({type(layer) for layer in language_model(model).layers}))
