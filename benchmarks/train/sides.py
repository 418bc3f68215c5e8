"""What the training benchmarks train: LLaVA with random weights, by this package and by stock transformers.

In: shapes. Out: two sides, each a model and its batches, and samples with the lengths of real data. single_gpu.py and
scaling.py measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.shapes import Shapes, random_llava, random_weights
from llava.model.attention import use_varlen
from llava.train.memory import estimate
from llava.train.performance import compile_layers

FIRST_WORD = 5  # ids below are special
LORA: dict[str, Any] = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}


# Samples: number of text tokens, and whether there is an image.


@dataclass(frozen=True)
class Sample:
    text: int
    image: bool


def realistic(shapes: Shapes) -> list[Sample]:
    """Lengths as in the LLaVA-1.5 mix: mostly an image and some turns, 6 % text only and long; 20 to 2,048 text tokens."""
    draw = torch.Generator().manual_seed(0)
    num_text = max(1, round(0.06 * shapes.samples))
    medians = [900.0] * num_text + [180.0] * (shapes.samples - num_text)
    scale = shapes.longest_text / 2048
    lengths = [m * scale * float(torch.randn((), generator=draw).mul(0.8).exp()) for m in medians]
    shortest = max(4, int(20 * scale))
    samples = [
        Sample(int(min(max(length, shortest), shapes.longest_text)), image=number >= num_text)
        for number, length in enumerate(lengths)
    ]
    return [samples[i] for i in torch.randperm(len(samples), generator=draw).tolist()]


def token_squares(samples: Sequence[Sample], shapes: Shapes) -> tuple[int, int]:
    lengths = [sample.text + sample.image * shapes.image_tokens for sample in samples]
    return sum(lengths), sum(length**2 for length in lengths)


# The two sides. Each builds a model, and batches for it.


class Stock:
    """transformers' own LLaVA as its Trainer drives it: padded batches, gradient checkpointing, sdpa."""

    name = "stock"

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        self.shapes, self.device = shapes, device
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**shapes.vision),
            text_config=LlamaConfig(**shapes.text),
            image_token_index=shapes.image_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        self.model: Any = random_weights(lambda: LlavaForConditionalGeneration(config), device)
        self.model.config.use_cache = False
        self.projector, self.tower = self.model.model.multi_modal_projector, self.model.model.vision_tower
        self.inner, self.head = self.model.model.language_model, self.model.lm_head

    def prepare(self, *, frozen: bool) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if frozen:
            self.model.enable_input_require_grads()

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        shapes, width = self.shapes, max(s.text + s.image * self.shapes.image_tokens for s in samples)
        ids = torch.randint(FIRST_WORD, shapes.image_id, (len(samples), width))
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            mask[row, : sample.text + sample.image * shapes.image_tokens] = 1
            if sample.image:
                ids[row, 1 : 1 + shapes.image_tokens] = shapes.image_id
        labels = ids.masked_fill((ids == shapes.image_id) | (mask == 0), -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if images := sum(s.image for s in samples):
            batch["pixel_values"] = torch.randn(images, 3, *[shapes.vision["image_size"]] * 2).to(torch.bfloat16)
        return {name: value.to(self.device) for name, value in batch.items()}


class Ours:
    """This package as `llava train --compile_layers True --keep_activations K` drives it, packed where lengths differ."""

    name = "ours"

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.model: Any = random_llava(shapes, device, image_aspect_ratio="pad")
        self.model.config.use_cache = False
        self.varlen = use_varlen(self.model.config, device, torch.bfloat16)
        inner = self.model.get_model()
        self.projector, self.tower, self.inner, self.head = (
            inner.mm_projector, inner.get_vision_tower(), inner.layers, self.model.lm_head,
        )  # fmt: skip
        self.kept = 0.5
        self.backend: str | None = "inductor" if device.type == "cuda" else "eager"

    def prepare(self, keep: float, *, dynamic: bool) -> None:
        if self.backend is None:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
        torch._dynamo.reset()
        self.kept = keep
        compile_layers(self.model, keep=self.kept, dynamic=dynamic or None, backend=self.backend)

    def estimated(self, batches: list[list[Sample]]) -> float:
        """Return the peak in bytes that `llava train` estimates."""
        lengths = [[s.text + s.image * self.shapes.image_tokens for s in batch] for batch in batches]
        rows_alike = len(batches) == 1
        arguments: Any = SimpleNamespace(
            optim="adamw_torch_fused", deepspeed=None, fsdp="", fused_loss=True, compute_dtype=torch.bfloat16,
            packing=False, pack_length=None, lora_enable="lora_" in repr(self.model), lora_dropout=LORA["lora_dropout"],
            per_device_train_batch_size=len(lengths[0]) if rows_alike else 1,
            model_max_length=max(lengths[0]) if rows_alike else max(map(sum, lengths)),
            gradient_checkpointing=self.backend is None, compile_layers=self.backend is not None,
            keep_activations=self.kept,
        )  # fmt: skip
        return estimate(self.model, arguments).peak

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        shapes, width = self.shapes, max(s.text + s.image for s in samples)
        ids = torch.randint(FIRST_WORD, shapes.image_id, (len(samples), width))
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, sample in enumerate(samples):
            mask[row, : sample.text + sample.image] = True
            if sample.image:
                ids[row, 1] = -200
        labels = ids.masked_fill((ids < 0) | ~mask, -100)
        # As the data set does: a text-only sample has a black image, for which its ids have no placeholder.
        pixels = torch.randn(len(samples), 3, *[shapes.vision["image_size"]] * 2).to(torch.bfloat16)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": pixels}
        even = len(samples) > 1 and len({(s.text, s.image) for s in samples}) == 1
        packed = self.varlen or not even  # samples of one length need no mask
        return {**{name: value.to(self.device) for name, value in batch.items()}, "packed": packed, "loss_only": True}
