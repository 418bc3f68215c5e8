"""Which parts of an image each token of a traced question looked at, and which mattered for what was answered.

In: an answered question. Out: `Views`: per token, a share for each feature of the images. The answer is gone through once
more, all tokens at once, with attention that hands out its weights; `agreement` says how far its logits are from those of
the run, so that it is known to be the same computation. Attention says where information was read from; the gradient of a
token's log-probability times the features says what would have changed it. Neither is proof of why.

    T positions after the splice, F features of all images, R tokens looked at
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.diagnose.tracer.generation import Answered
from llava.diagnose.tracer.hooks_sequence import decoder_layers, segments

# So many tokens of an answer at most: each needs a backward pass of its own.
MOST_GRADIENTS = 32


@dataclass(frozen=True)
class Views:
    """`attention` (layers, R, F): weights, the mean over heads. `relevance` (R', F): the answer's tokens alone.

    `rows` are the R tokens: (position after the splice whose output was looked at, index into prompt and answer, is it
    the answer's). `first_answer` is the first row of the answer.
    """

    rows: list[tuple[int, int, bool]]
    first_answer: int
    attention: Tensor | None
    relevance: Tensor | None
    agreement: float | None


def look(answered: Answered, *, gradients: bool = True) -> Views | None:
    """None where there is no image or no answer to look at."""
    answer = answered.answer
    if answer is None or not answer.token_ids or not answered.record.layouts:
        return None
    lengths = [layout.num_features for layout in answered.record.layouts]
    before = segments(answered.ids, lengths)
    first = next(part["start"] for part in before if part["kind"] == "image")
    total = before[-1]["stop"]
    places = torch.cat([torch.arange(part["start"], part["stop"]) for part in before if part["kind"] == "image"])
    # A token of the prompt is looked at in its own place; one of the answer in the place before it, where it was chosen.
    own = [
        (part["start"] + offset, part["from_id"] + offset, False)
        for part in before
        if part["kind"] == "text"
        for offset in range(part["stop"] - part["start"])
        if part["start"] + offset > first
    ]
    chosen = [(total - 1 + step, step, True) for step in range(len(answer.token_ids))]
    rows = [*own, *chosen]
    model = answered.loaded.model
    ids = torch.tensor([[*answered.ids, *answer.token_ids[:-1]]], device=model.device)
    images = answered.pixels if isinstance(answered.pixels, Tensor) else list(answered.pixels)
    sizes = [tuple(layout.size) for layout in answered.record.layouts]

    with torch.no_grad(), _weights_of_attention(model) as weights:
        logits = model(input_ids=ids, images=images, image_sizes=sizes, use_cache=False).logits[0].float()
    positions = torch.tensor([position for position, _, _ in rows])
    attention = torch.stack([layer[positions][:, places] for layer in weights]) if weights else None
    relevance = None
    if gradients:
        steps = [position for position, _, _ in chosen][:MOST_GRADIENTS]
        relevance = _relevance(model, ids, images, sizes, steps, answer.token_ids, places)
    return Views(rows, len(own), attention, relevance, _agreement(answered, logits[total - 1]))


def _agreement(answered: Answered, logits: Tensor) -> float | None:
    """The largest difference between the chances of the first token in the run and here."""
    if "first_tokens" not in answered.record:
        return None
    chances = logits.softmax(-1)
    return max(abs(entry["p"] - float(chances[entry["id"]])) for entry in answered.record["first_tokens"]["steps"][0])


@contextmanager
def _weights_of_attention(model: Any) -> Iterator[list[Tensor]]:
    """Within the block, the attention of every layer leaves its weights (T, T) here, the mean over its heads."""
    weights: list[Tensor] = []
    before = model.config._attn_implementation

    def see(module: Any, args: Any, output: Any) -> None:
        found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(found, Tensor) and found.dim() == 4:
            weights.append(found[0].float().mean(dim=0).cpu())

    handles = [
        module.register_forward_hook(see)
        for layer in decoder_layers(model.get_model())
        for name, module in layer.named_children()
        if "attn" in name or "attention" in name
    ]
    # The kernels that are fast keep their weights to themselves. The switch warns of parts that it does not know.
    library = logging.getLogger("transformers.modeling_utils")
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        model.set_attn_implementation("eager")
        yield weights
    finally:
        model.set_attn_implementation(before)
        library.setLevel(level)
        for handle in handles:
            handle.remove()


def _relevance(
    model: Any, ids: Tensor, images: Any, sizes: Any, steps: list[int], token_ids: tuple[int, ...], places: Tensor
) -> Tensor:
    """|gradient x feature| of each image feature, for the log-probability of each token of the answer."""
    with torch.no_grad():
        batch = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images, sizes)
        embeds = batch[4]
    embeds = embeds.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(inputs_embeds=embeds, use_cache=False).logits[0].float()
        chances = logits.log_softmax(-1)
        found = []
        for step, position in enumerate(steps):
            is_last = step == len(steps) - 1
            (gradient,) = torch.autograd.grad(chances[position, token_ids[step]], embeds, retain_graph=not is_last)
            found.append((gradient[0] * embeds.detach()[0]).sum(-1).abs()[places.to(embeds.device)].float().cpu())
    return torch.stack(found)
