"""What the training benchmarks train: LLaVA-1.5-7B's shapes with random weights, here and with stock transformers.

In: shapes. Out: two sides, each a model and batches for it, and samples whose lengths are those of real data. Measuring is
in train.py (one GPU) and train_scaling.py (several); `engine.py` serves the same shapes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from llava.model.attention import use_varlen
from llava.model.language_model.registry import llava_classes
from llava.train.memory import estimate
from llava.train.performance import compile_layers

FIRST_WORD = 5  # ids below are special
LORA: dict[str, Any] = {"r": 128, "lora_alpha": 256, "lora_dropout": 0.05}


@dataclass(frozen=True)
class Shapes:
    """A model, and the batches it is trained on."""

    text: dict[str, int]
    vision: dict[str, int]
    batch: int  # rows of the full and LoRA batches
    text_tokens: int
    captions: int  # rows of the projector batch
    caption_tokens: int
    samples: int  # of the run on realistic lengths
    longest_text: int
    row: int  # tokens of a packed row
    probe: int

    @property
    def image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def image_id(self) -> int:
        return self.text["vocab_size"] - 64


FULL = Shapes(
    text={
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
    },
    vision={
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
    batch=16, text_tokens=256, captions=32, caption_tokens=64, samples=96, longest_text=2048, row=13312, probe=8192,
)  # fmt: skip
TINY = Shapes(
    text={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 320, "max_position_embeddings": 512,
    },
    vision={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14, "projection_dim": 32,
    },
    batch=2, text_tokens=16, captions=2, caption_tokens=8, samples=8, longest_text=64, row=128, probe=64,
)  # fmt: skip


def say(**figures: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)


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
        self.model: Any = built(lambda: LlavaForConditionalGeneration(config), device)
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
        config_class, model_class = llava_classes("llama")
        with tempfile.TemporaryDirectory() as folder:
            side = shapes.vision["image_size"]
            Path(folder, "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **shapes.vision}))
            Path(folder, "preprocessor_config.json").write_text(
                json.dumps({"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}})
            )
            config = config_class(
                **shapes.text,
                mm_vision_tower=folder,
                unfreeze_mm_vision_tower=True,  # the tower's weights are the model's, random too
                mm_hidden_size=shapes.vision["hidden_size"],
                mm_projector_type="mlp2x_gelu",
                mm_vision_select_layer=-2,
                image_aspect_ratio="pad",
            )
            config.use_cache = False
            self.model: Any = built(lambda: model_class(config), device)
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
        """Bytes at the peak, as `llava train` foresees them."""
        lengths = [[s.text + s.image * self.shapes.image_tokens for s in batch] for batch in batches]
        rows_alike = len(batches) == 1
        arguments = SimpleNamespace(
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
        # As the data set gives it: a text-only sample has a black image, which no mark asks for.
        pixels = torch.randn(len(samples), 3, *[shapes.vision["image_size"]] * 2).to(torch.bfloat16)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": pixels}
        even = len(samples) > 1 and len({(s.text, s.image) for s in samples}) == 1
        packed = self.varlen or not even  # a square mask for rows that need no padding would be a waste
        return {**{name: value.to(self.device) for name, value in batch.items()}, "packed": packed, "loss_only": True}


def built(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A model with random weights, made where it stays."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.02)
    return model.train()
