"""LLaVA-1.5-7B's shapes, or tiny ones, with random weights: what the GPU benchmarks of the engine and of training measure."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.model.language_model.registry import llava_classes


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


def random_llava(shapes: Shapes, device: torch.device, **config: Any) -> Any:
    """Return this package's LLaVA with random weights; `config` are further keys of its config."""
    config_class, model_class = llava_classes("llama")
    side = shapes.vision["image_size"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **shapes.vision}))
        Path(folder, "preprocessor_config.json").write_text(
            json.dumps({"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}})
        )
        built = config_class(
            **shapes.text,
            mm_vision_tower=folder,
            unfreeze_mm_vision_tower=True,  # the tower's weights are the model's, random too
            mm_hidden_size=shapes.vision["hidden_size"],
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2,
            **config,
        )
        return random_weights(lambda: model_class(built), device)


def random_weights(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Build a model in bfloat16 on a device, and draw its weights there."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.02)
    return model.train()
