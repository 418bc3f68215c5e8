"""The training loss from hidden states, without the logits of all tokens in memory.

In: hidden states, labels, and the output layer. Out: the sum of the cross-entropies of the trained tokens, and their number.
The logits and their gradient, in float32, would be the largest tensors of a training step. Here only trained tokens are
projected, in chunks, and the gradients are computed with the loss from the probabilities of the chunk; what is kept has
the size of the hidden states. The result is exact, except for the order of sums.

    B rows, L tokens of a row, T trained tokens, D width, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from llava.constants import IGNORE_INDEX
from llava.model.splice import on_device

# Logits per chunk: large enough for fast matrix products, small compared with the weights of the output layer.
CHUNK_VALUES = 2**26


def next_token_loss(head: nn.Linear, hidden: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sum the losses of the trained labels, each predicted from the hidden state before it; return sum and count.

    Args:
        hidden: Hidden states (B, L, D).
        labels: (B, L), -100 where nothing is trained. On the host they are counted without a synchronisation.
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    trained = (following != IGNORE_INDEX).nonzero().flatten()
    states = hidden.flatten(0, 1)[on_device(trained, hidden.device)]
    targets = on_device(following[trained], hidden.device)

    def project_to_loss(states: Tensor) -> Tensor:
        return linear_cross_entropy(states, head.weight, targets, head.bias)

    # Called through the module: where its weight is sharded over GPUs, hooks around the call gather it.
    head.forward = project_to_loss  # type: ignore[method-assign]
    try:
        total = head(states)
    finally:
        del head.forward
    return total, len(trained)


def can_fuse(head: nn.Module) -> bool:
    """Whether an output layer is a plain matrix product: not quantized, without LoRA, its `forward` not replaced."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `cross_entropy(linear(hidden, weight, bias), targets, reduction="sum")` in float32.

    Shapes: `hidden` (T, D), `weight` (V, D), `targets` (T,), `bias` (V,).
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
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
                # The gradient of the loss by the logits: the probabilities, minus one for the target.
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
    def backward(ctx: FunctionCtx, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)
