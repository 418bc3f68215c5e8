"""The smoke test: run a loaded model on drawn images.

In: a `LoadedModel`. Out: findings. Three properties are checked: activations are finite and within the range of the stored
dtype, two different images give different outputs, and a prompt gives the same logits alone and padded in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llava.diagnose.checks.findings import DoctorFinding, found
from llava.diagnose.checks.sample_image import QUESTION, prepare_question, sample_image
from llava.processor import ModelInputs

if TYPE_CHECKING:
    from llava.model.builder import LoadedModel
    from llava.model.protocols import LlavaModel

LARGEST_HALF = 65504.0
# Share of the logits' standard deviation: rounding stays below it, wrong positions or masks do not.
ROUNDING = 0.02


@torch.inference_mode()
def run_smoke_test(loaded: LoadedModel, *, half: bool) -> Iterator[DoctorFinding]:
    """Run the smoke test. With `half` the weights are stored in float16, so activations should fit into its range."""
    inputs = prepare_question(loaded, QUESTION, [sample_image()])[1]
    with capture_peaks(loaded.model) as peaks:
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
    other = _last_logits(loaded.model, prepare_question(loaded, QUESTION, [sample_image(inverted=True)])[1])
    difference = float((logits - other).abs().max())
    if difference == 0:
        yield found(
            "image-ignored",
            "an image and its negative give the same numbers to the last bit: the image does not reach the output",
            "look at the projector and at the splice with llava trace",
            largest_difference=difference,
        )
    yield from _check_padding(loaded, inputs)


def _check_padding(loaded: LoadedModel, short: ModelInputs) -> Iterator[DoctorFinding]:
    """Compare the first new token's logits of a prompt alone with those of the same prompt padded in a batch."""
    longer = prepare_question(loaded, f"{QUESTION} {QUESTION} {QUESTION}", [sample_image()])[1]
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


def _last_logits(model: LlavaModel, inputs: ModelInputs) -> Tensor:
    ids = inputs.input_ids[None].to(model.device)
    if not inputs.pixels:
        return model(input_ids=ids).logits[0, -1].float()
    return model(input_ids=ids, images=inputs.images, image_sizes=inputs.image_sizes).logits[0, -1].float()


def _first_step(loaded: LoadedModel, ids: Tensor, **arguments: object) -> Tensor:
    """Return the logits from which `generate` chooses the first new token, (batch, vocabulary)."""
    end = loaded.tokenizer.eos_token_id
    output = loaded.model.generate(
        ids, **arguments, do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True,
        pad_token_id=end if end is not None else 0,
    )  # fmt: skip
    return output.logits[0].float()


@dataclass(frozen=True)
class Peak:
    """The largest activation of a module."""

    module: str
    largest: float
    finite: bool


@contextmanager
def capture_peaks(model: nn.Module) -> Iterator[list[Peak]]:
    """Record the largest output of every module that runs within the block."""
    peaks: list[Peak] = []

    def hook_of(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensor = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = float(tensor.abs().max())
                peaks.append(Peak(f"{name} ({type(module).__name__})", largest, bool(torch.isfinite(tensor).all())))

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
