"""Attention and relevance: which image features each token of a traced question attends to, and which influence the answer.

In: a `TracedAnswer`. Out: `AttentionViews`, one share per token and image feature. Prompt and answer are run once more in one
forward pass with eager attention, which returns its weights; `agreement` is the distance of its logits from those of the
traced run. Attention shows where information was read from; the gradient of a token's log-probability times the features
shows what would have changed it. Neither proves a cause.

    T positions after the splice, F features of all images, R tokens with a view
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava.diagnose.tracer.generation import TracedAnswer
from llava.diagnose.tracer.hooks_sequence import decoder_layers, segments
from llava.images.layout import ImageSize
from llava.model.protocols import LlavaModel
from llava.model.transformers_internals import eager_attention

# Answer tokens with relevance, at most: each needs a backward pass.
MOST_GRADIENTS = 32


@dataclass(frozen=True)
class AttentionViews:
    """Shares per token and image feature.

    `rows` are the R tokens: (position after the splice, index into the prompt's ids or the answer's, is in the answer).
    `first_answer` is the first row of the answer. `attention` (layers, R, F) is the mean over heads; `relevance` (R', F)
    covers only the answer's tokens.
    """

    rows: list[tuple[int, int, bool]]
    first_answer: int
    attention: Tensor | None
    relevance: Tensor | None
    agreement: float | None


def compute_views(traced: TracedAnswer, *, gradients: bool = True) -> AttentionViews | None:
    """Compute the views, relevance only with `gradients`. Return None without an image or an answer."""
    answer = traced.answer
    if answer is None or traced.pixels is None or not answer.token_ids or not traced.record.layouts:
        return None
    lengths = [layout.num_features for layout in traced.record.layouts]
    before = segments(traced.ids, lengths)
    first = next(part["start"] for part in before if part["kind"] == "image")
    total = before[-1]["stop"]
    places = torch.cat([torch.arange(part["start"], part["stop"]) for part in before if part["kind"] == "image"])
    # A prompt token is viewed at its own position; an answer token at the position before it, whose logits chose it.
    own = [
        (part["start"] + offset, part["from_id"] + offset, False)
        for part in before
        if part["kind"] == "text"
        for offset in range(part["stop"] - part["start"])
        if part["start"] + offset > first
    ]
    chosen = [(total - 1 + step, step, True) for step in range(len(answer.token_ids))]
    rows = [*own, *chosen]
    model = traced.loaded.model
    ids = torch.tensor([[*traced.ids, *answer.token_ids[:-1]]], device=model.device)
    images = traced.pixels if isinstance(traced.pixels, Tensor) else list(traced.pixels)
    sizes = [layout.size for layout in traced.record.layouts]

    with torch.no_grad(), _capture_attention(model) as weights:
        logits = model(input_ids=ids, images=images, image_sizes=sizes, use_cache=False).logits[0].float()
    positions = torch.tensor([position for position, _, _ in rows])
    attention = torch.stack([layer[positions][:, places] for layer in weights]) if weights else None
    relevance = None
    if gradients:
        steps = [position for position, _, _ in chosen][:MOST_GRADIENTS]
        relevance = _relevance(model, ids, images, sizes, steps, answer.token_ids, places)
    return AttentionViews(rows, len(own), attention, relevance, _agreement(traced, logits[total - 1]))


def _agreement(traced: TracedAnswer, logits: Tensor) -> float | None:
    """Return the largest difference between the first token's probabilities in the traced run and here."""
    if "first_tokens" not in traced.record:
        return None
    probabilities = logits.softmax(-1)
    first = traced.record["first_tokens"]["steps"][0]
    return max(abs(entry["p"] - float(probabilities[entry["id"]])) for entry in first)


@contextmanager
def _capture_attention(model: LlavaModel) -> Iterator[list[Tensor]]:
    """Collect the attention weights of every layer (T, T), averaged over heads, of passes within the block."""
    weights: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: object) -> None:
        found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(found, Tensor) and found.dim() == 4:
            weights.append(found[0].float().mean(dim=0).cpu())

    handles = [
        module.register_forward_hook(hook)
        for layer in decoder_layers(model.get_model())
        for name, module in layer.named_children()
        if "attn" in name or "attention" in name
    ]
    try:
        with eager_attention(model.config, warns=False):
            yield weights
    finally:
        for handle in handles:
            handle.remove()


def _relevance(
    model: LlavaModel,
    ids: Tensor,
    images: Tensor | list[Tensor],
    sizes: Sequence[ImageSize],
    steps: list[int],
    token_ids: tuple[int, ...],
    places: Tensor,
) -> Tensor:
    """Return |gradient x feature| of each image feature for the log-probability of each answer token (R', F)."""
    with torch.no_grad():
        batch = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images, sizes)
        embeds = batch[4]
    assert embeds is not None
    embeds = embeds.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0].float()
        log_probabilities = logits.log_softmax(-1)
        found = []
        for step, position in enumerate(steps):
            is_last = step == len(steps) - 1
            chosen = log_probabilities[position, token_ids[step]]
            (gradient,) = torch.autograd.grad(chosen, embeds, retain_graph=not is_last)
            found.append((gradient[0] * embeds.detach()[0]).sum(-1).abs()[places.to(embeds.device)].float().cpu())
    return torch.stack(found)
