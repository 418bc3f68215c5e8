"""The peer of gpu.py, measured in the same run: transformers' own classes in the same shapes, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from benchmarks.engine.workload import NUM_TEXT, PINPOINTS, Workload
from benchmarks.measure import free_memory, median_seconds
from benchmarks.shapes import random_weights


def measure_stock(workload: Workload) -> dict[str, float]:
    """Measure a prompt's forward in ms, and `generate` for 1, 8 and 64 prompts in tokens per second."""
    shapes = workload.shapes
    common = {
        "vision_config": CLIPVisionConfig(**shapes.vision),
        "text_config": LlamaConfig(**shapes.text),
        "image_token_index": shapes.image_id,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "attn_implementation": "sdpa",
    }
    figures = dict(
        one_tile(
            workload, random_weights(lambda: LlavaForConditionalGeneration(LlavaConfig(**common)), workload.device)
        )
    )
    free_memory()
    pinpoints = [[x * workload.side, y * workload.side] for x, y in PINPOINTS]
    config = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
    figures |= dict(
        five_tiles(workload, random_weights(lambda: LlavaNextForConditionalGeneration(config), workload.device))
    )
    free_memory()
    return figures


@torch.inference_mode()
def one_tile(workload: Workload, model: Any) -> Iterator[tuple[str, float]]:
    shapes, device, side = workload.shapes, workload.device, workload.side
    model.eval()

    def batch(num: int) -> dict[str, Any]:
        pixels = torch.randn(num, 3, side, side, device=device, dtype=torch.bfloat16)
        return {**prompts(workload, num, shapes.image_tokens), "pixel_values": pixels}

    def generate(inputs: dict[str, Any], new: int) -> int:
        return int(model.generate(**inputs, do_sample=False, min_new_tokens=new, max_new_tokens=new)[0, -1])

    yield "first token", 1e3 * median_seconds(partial(first, model, batch(1)), 7)
    for num in (1, 8, 64):
        inputs = batch(num)
        long, short = (median_seconds(partial(generate, inputs, new), 1) for new in (40, 8))
        yield f"decode {num}", num * 32 / (long - short)


@torch.inference_mode()
def five_tiles(workload: Workload, model: Any) -> Iterator[tuple[str, float]]:
    """Four tiles and an overview; preprocessing is not measured."""
    device, side = workload.device, workload.side
    model.eval()
    per_side = side // workload.shapes.vision["patch_size"]
    num_features = per_side**2 + 2 * per_side * (2 * per_side + 1)  # a newline after each row of the four
    inputs = {
        **prompts(workload, 1, num_features),
        "pixel_values": torch.randn(1, 5, 3, side, side, device=device, dtype=torch.bfloat16),
        "image_sizes": torch.tensor([[2 * side, 2 * side]], device=device),
    }
    yield "anyres first token", 1e3 * median_seconds(partial(first, model, inputs), 5)


def prompts(workload: Workload, num: int, num_features: int) -> dict[str, torch.Tensor]:
    image_id = workload.shapes.image_id
    ids = torch.randint(5, image_id, (num, NUM_TEXT + 1 + num_features), device=workload.device)
    ids[:, 30 : 30 + num_features] = image_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def first(model: Any, inputs: dict[str, Any]) -> int:
    return int(model(**inputs, logits_to_keep=1).logits.argmax())
