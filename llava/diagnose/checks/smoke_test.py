"""A loaded model tried out on drawn images: what only running shows.

In: a `LoadedModel`. Out: findings. Three questions: do numbers stay finite and within the stored precision, do two
different images give different outputs, and does a row give the same beside a longer one as alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava.conversation import get_template, with_image_placeholders
from llava.diagnose.checks.findings import Finding, found
from llava.diagnose.checks.test_image import drawing
from llava.processor import ModelInputs, Processor

if TYPE_CHECKING:
    from PIL import Image

    from llava.model.builder import LoadedModel

LARGEST_HALF = 65504.0
# Rows in a batch and alone differ by rounding; wrong positions differ by as much as logits do.
ROUNDING = 0.02
QUESTION = "What is in this picture?"


def try_model(loaded: LoadedModel, *, half: bool) -> Iterator[Finding]:
    """`half`: the weights were stored in float16, so numbers inside should fit into it."""
    with torch.inference_mode():
        yield from _try_model(loaded, half=half)


def _try_model(loaded: LoadedModel, *, half: bool) -> Iterator[Finding]:
    inputs = _ask(loaded, QUESTION, drawing())
    with watching_size(loaded.model) as peaks:
        logits = _last_logits(loaded.model, inputs)
    broken = next((peak for peak in peaks if not peak.finite), None)
    if broken is not None:
        yield found(
            "overflow",
            f"{broken.module} gives NaN or infinity on an ordinary image",
            "load the model in bfloat16 or float32 (--dtype bf16); if it stays, the weights are damaged",
            module=broken.module,
        )
        return
    largest = max(peaks, key=lambda peak: peak.largest)
    if half and largest.largest > LARGEST_HALF:
        yield found(
            "overflow",
            f"{largest.module} reaches {largest.largest:.4g}, and float16, in which the weights are stored, ends at 65504",
            "load the model in bfloat16 or float32 (--dtype bf16)",
            module=largest.module,
            largest=largest.largest,
            float16_ends_at=LARGEST_HALF,
        )
    if loaded.processor is None:
        return
    other = _last_logits(loaded.model, _ask(loaded, QUESTION, drawing(inverted=True)))
    difference = float((logits - other).abs().max())
    if difference == 0:
        yield found(
            "image-ignored",
            "an image and its negative give the same numbers to the last bit: the image does not reach the output",
            "look at the projector and at the splice with llava trace",
            largest_difference=difference,
        )
    yield from _try_padding(loaded, inputs)


def _try_padding(loaded: LoadedModel, short: ModelInputs) -> Iterator[Finding]:
    """The first new token's logits of a prompt alone, and of the same prompt padded beside a longer one."""
    longer = _ask(loaded, f"{QUESTION} {QUESTION} {QUESTION}", drawing())
    width = len(longer.input_ids)
    ids = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros(2, width, dtype=torch.long)
    for row, inputs in enumerate((short, longer)):
        ids[row, width - len(inputs.input_ids) :] = inputs.input_ids
        mask[row, width - len(inputs.input_ids) :] = 1
    tiles = [pixels for inputs in (short, longer) for pixels in inputs.pixels]
    same_shape = len({pixels.shape for pixels in tiles}) == 1 and tiles[0].dim() == 3
    beside = _first_step(
        loaded, ids, images=torch.stack(tiles) if same_shape else tiles,
        image_sizes=short.image_sizes + longer.image_sizes, attention_mask=mask,
    )  # fmt: skip
    alone = _first_step(loaded, short.input_ids[None], images=short.images, image_sizes=short.image_sizes)
    difference = float((beside[0] - alone[0]).abs().max())
    spread = float(alone[0].std())
    if difference > ROUNDING * spread:
        yield found(
            "padding",
            f"the logits of a prompt change by {difference:.3g} when it is padded beside a longer one (their spread is "
            f"{spread:.3g}): positions or mask do not leave the padding out",
            "use versions of transformers and torch that llava's tests pass with; llava trace shows mask and positions",
            largest_difference=difference,
            spread=spread,
        )


def _ask(loaded: LoadedModel, question: str, image: Image.Image) -> ModelInputs:
    from llava.model.config import LlavaSettings

    settings = LlavaSettings.from_hf(loaded.model.config)
    processor = loaded.processor or Processor(loaded.tokenizer, None, settings)
    conversation = get_template(loaded.conv_mode)
    conversation.messages = []
    images = [image] if loaded.processor is not None else []
    question = with_image_placeholders(question, len(images), processor.image_placeholder)
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return processor(conversation, images)


def _last_logits(model: Any, inputs: ModelInputs) -> Tensor:
    ids = inputs.input_ids[None].to(model.device)
    if not inputs.pixels:
        return model(input_ids=ids).logits[0, -1].float()
    return model(input_ids=ids, images=inputs.images, image_sizes=inputs.image_sizes).logits[0, -1].float()


def _first_step(loaded: LoadedModel, ids: Tensor, **arguments: Any) -> Tensor:
    """The logits from which `generate` takes the first new token (rows, vocabulary)."""
    end = loaded.tokenizer.eos_token_id
    output = loaded.model.generate(
        ids, **arguments, do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True,
        pad_token_id=end if end is not None else 0,
    )  # fmt: skip
    return output.logits[0].float()


@dataclass(frozen=True)
class Peak:
    """The largest number that a module gave."""

    module: str
    largest: float
    finite: bool


@contextmanager
def watching_size(model: nn.Module) -> Iterator[list[Peak]]:
    """Within the block, note for every module that ends a forward pass how large its output is."""
    peaks: list[Peak] = []

    def watch(name: str) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = float(tensor.abs().max())
                peaks.append(Peak(f"{name} ({type(module).__name__})", largest, bool(torch.isfinite(tensor).all())))

        return see

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
