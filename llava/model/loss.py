"""The training loss straight from hidden states, without ever holding the logits of all tokens.

In: hidden states, labels, and the output layer. Out: the sum of the cross-entropies of the trained tokens, and how many
there are. A vocabulary is some ten times wider than a model, so logits (and their gradient, in float32) are the largest
tensors of a training step. Here only trained tokens are projected, a chunk of them at a time, and the gradients are
made beside the loss, when the chunk's probabilities are at hand; what is kept is as large as the hidden states.
Nothing is approximated: sums are taken in another order, that is all.

    T trained tokens, D width, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llava.constants import IGNORE_INDEX
from llava.model.splice import on_device

# Logits at a time: large enough for matrix products at full speed, small beside the weights of the output layer.
CHUNK_VALUES = 2**26


def next_token_loss(head: nn.Linear, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sum of the losses of `labels` (B, T), each predicted from the hidden state (B, T, D) before it, and their number.

    Labels may be on the host while states are on a GPU: nothing then waits for it to count them.
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    trained = (following != IGNORE_INDEX).nonzero().flatten()
    states = hidden.flatten(0, 1)[on_device(trained, hidden.device)]
    targets = on_device(following[trained], hidden.device)

    def project_to_loss(states: Tensor) -> Tensor:
        return linear_cross_entropy(states, head.weight, targets, head.bias)

    # Called through the module: where its weight lies in pieces on several GPUs, hooks around the call gather it.
    head.forward = project_to_loss  # type: ignore[method-assign]
    try:
        total = head(states)
    finally:
        del head.forward
    return total, len(trained)


def can_fuse(head: Any) -> bool:
    """Whether an output layer is a plain matrix product: not quantized, not adapted, its `forward` not replaced."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias), targets, reduction="sum")`, in float32, of (T, D) states."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias and bias is not None else None
        rows = max(1, CHUNK_VALUES // weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                states, wanted = hidden[chunk].to(dtype), targets[chunk, None]
                logits = (states @ matrix.T).to(wide)  # (rows, V)
                if bias is not None:
                    logits += bias
                scale = logits.logsumexp(dim=1, keepdim=True)
                total += (scale - logits.gather(1, wanted)).sum()
                if grad_hidden is None and grad_weight is None and grad_bias is None:
                    continue
                # The gradient of a loss by its logits: the probabilities, less one for the token that was right.
                errors = logits.sub_(scale).exp_()
                errors.scatter_add_(1, wanted, errors.new_full(wanted.shape, -1.0))
                if grad_bias is not None:
                    grad_bias += errors.sum(dim=0)
                errors = errors.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (errors @ matrix).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += errors.T @ states
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)
