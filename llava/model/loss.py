"""The training loss: how the losses of tokens become one number, and that number without the logits of all tokens.

In: hidden states or logits, labels, and the output layer. Out: the sum of the cross-entropies of the trained tokens, and their
number; or their mean.

The logits and their gradient, in float32, would be the largest tensors of a training step. Here only trained tokens are
projected, in chunks, and the gradients are computed with the loss from the probabilities of the chunk; what is kept has
the size of the hidden states. The result is exact, except for the order of sums.

    B rows, L tokens of a row, T trained tokens, D width, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from llava.constants import IGNORE_INDEX
from llava.model.splice import on_device

# Logits per chunk: large enough for fast matrix products, small compared with the weights of the output layer.
CHUNK_VALUES = 2**26


@dataclass(frozen=True)
class LossRule:
    """How the losses of the trained tokens of a batch become one number.

    Attributes:
        by_sample: Average within each sample, then over samples; otherwise over all tokens.
        smoothing: Share of each target's probability that is spread evenly over the vocabulary.
    """

    by_sample: bool = False
    smoothing: float = 0.0


TOKEN_MEAN = LossRule()


def next_token_loss(
    head: nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    *,
    rule: LossRule = TOKEN_MEAN,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, int]:
    """Sum the losses of the trained labels, each predicted from the hidden state before it; return sum and count.

    Args:
        hidden: Hidden states (B, L, D).
        labels: (B, L), -100 where nothing is trained. On the host they are counted without a synchronisation.
        rule: With `by_sample` the losses are weighted so that sum / count is the mean over samples.
        lengths: Of the samples in a packed row.
    """
    following = following_labels(labels).flatten()
    trained = (following != IGNORE_INDEX).nonzero().flatten()
    states = hidden.flatten(0, 1)[on_device(trained, hidden.device)]
    targets = on_device(following[trained], hidden.device)
    weights = None
    if rule.by_sample:
        weights = on_device(sample_weights(labels, lengths).flatten()[trained], hidden.device)

    def project_to_loss(states: Tensor) -> Tensor:
        return linear_cross_entropy(states, head.weight, targets, head.bias, weights=weights, smoothing=rule.smoothing)

    # Called through the module: where its weight is sharded over GPUs, hooks around the call gather it.
    head.forward = project_to_loss  # type: ignore[method-assign]
    try:
        total = head(states)
    finally:
        del head.forward
    return total, len(trained)


def mean_loss(logits: Tensor, labels: Tensor, rule: LossRule, *, lengths: Sequence[int] | None = None) -> Tensor:
    """Average the losses of the trained labels as `rule` says, from the logits (B, L, V) of every token."""
    following = following_labels(labels).to(logits.device)
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), following.flatten(), ignore_index=IGNORE_INDEX, reduction="none",
        label_smoothing=rule.smoothing,
    )  # fmt: skip
    if rule.by_sample:
        losses = losses * sample_weights(labels, lengths).to(logits.device).flatten()
    return losses.sum() / (following != IGNORE_INDEX).sum().clamp(min=1)


def router_loss(config: object, output: object) -> Tensor | float:
    """The loss that balances the experts of a mixture, where a model computes one; its own forward adds it likewise."""
    balance = getattr(output, "aux_loss", None)
    return 0.0 if balance is None else float(getattr(config, "router_aux_loss_coef", 0)) * balance


def following_labels(labels: Tensor) -> Tensor:
    """The label that each position predicts, that of the next one: (B, L)."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def sample_weights(labels: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Weight the predictions (B, L) so that each sample with a trained token has the same weight; their mean is 1.

    Samples are the rows, or the parts of `lengths` of one packed row.
    """
    trained = following_labels(labels) != IGNORE_INDEX
    device = labels.device
    if lengths is None:
        sample = torch.arange(len(labels), device=device)[:, None].expand_as(labels)
    else:
        sizes = torch.tensor(lengths, device=device)
        sample = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes, output_size=labels.numel())
    counts = torch.zeros(len(labels) if lengths is None else len(lengths), device=device)
    counts.index_add_(0, sample.flatten(), trained.flatten().float())
    share = counts.sum() / (counts > 0).sum().clamp(min=1)  # of each sample, in tokens
    return (share / counts.clamp(min=1))[sample.flatten()].view_as(labels)


def can_fuse(head: nn.Module) -> bool:
    """Whether an output layer is a plain matrix product: not quantized, without LoRA, its `forward` not replaced."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Compute `cross_entropy(linear(hidden, weight, bias), targets, reduction="sum")` in float32.

    Shapes: `hidden` (T, D), `weight` (V, D), `targets` (T,), `bias` (V,), `weights` (T,) of the losses of the targets.
    `smoothing` is `cross_entropy`'s `label_smoothing`.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, smoothing, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        smoothing: float,
        dtype: torch.dtype,
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
                expected = (1 - smoothing) * logits.gather(1, wanted)
                if smoothing:
                    expected += smoothing * logits.mean(dim=1, keepdim=True)
                losses = scale - expected
                total += losses.sum() if weights is None else (losses * weights[chunk, None]).sum()
                if grad_hidden is None and grad_weight is None and grad_bias is None:
                    continue
                # The gradient of the loss by the logits: the probabilities, minus those of the target.
                errors = logits.sub_(scale).exp_()
                errors.scatter_add_(1, wanted, errors.new_full(wanted.shape, smoothing - 1.0))
                if smoothing:
                    errors -= smoothing / errors.shape[1]
                if weights is not None:
                    errors *= weights[chunk, None]
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
        return (*scaled, None, None, None, None)
