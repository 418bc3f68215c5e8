"""Tiny models of every kind that the engine knows, mixed requests, and what `model.generate` alone answers to them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image

from llava.engine.config import EngineConfig
from llava.engine.request import Request, Result, SamplingParams

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "mpt": ("mpt", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "anyres": ("llama", dict(tiny.ANYRES)),
}
WAYS = {
    "as it is": EngineConfig(),
    "in pieces": EngineConfig(max_step_tokens=7),
    "without prefixes": EngineConfig(prefix_cache=False, feature_cache_bytes=0),
    "a tiny pool": EngineConfig(num_blocks=46, block_size=4),
    "small blocks, few rows": EngineConfig(block_size=4, max_running=3, max_step_tokens=16),
    "guessing ahead": EngineConfig(speculation=5),
    "guessing, tiny pool, in pieces": EngineConfig(speculation=3, num_blocks=46, block_size=4, max_step_tokens=9),
}


@cache
def loaded(kind: str) -> Any:
    """A tiny model, built and loaded once for all tests of a process."""
    from llava.model.builder import load

    language_model, changes = KINDS[kind]
    folder = Path(tempfile.mkdtemp(prefix="llava-engine-"))
    model = load(tiny.build(folder / kind, language_model, seed=3, **changes), device="cpu")
    with torch.no_grad():  # louder than the tiny model is, so that answers depend on all that was asked
        for name, parameter in model.model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif parameter.dim() > 1:
                parameter.mul_(2.0)
    return model


def random_image(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def greedy(max_new_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, **changes)


def sampled(seed: int | None, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_new_tokens": 24, "ignore_eos": True} | changes)


@cache
def mixed_requests() -> tuple[Request, ...]:
    """Text only, one image, several, the same image again, long and short; images of several shapes."""
    first = random_image(0)
    return (
        Request("hello there, how are you?", sampling=greedy(24)),
        Request("<image>\nwhat is it?", [first], greedy(31)),
        Request("a <image> and b <image>: which one?", [random_image(1, 90, 30), random_image(2, 30, 90)], greedy(20)),
        Request("x", sampling=greedy(40)),
        Request("<image>\nwhat is it? Something else, or the same?", [first], greedy(17)),
        Request("<image>\nwhat is it?", [random_image(3, 64, 64)], greedy(12)),
        Request("a long question without an end, " * 5, sampling=greedy(9)),
    )


def generated(kind: str, request: Request) -> list[int]:
    """What `model.generate` gives for one request alone."""
    model = loaded(kind)
    inputs = model.processor(request.prompt, request.images)
    return alone(kind, inputs.input_ids, inputs, request.sampling.max_new_tokens)


def alone(kind: str, ids: torch.Tensor, inputs: Any, max_new_tokens: int) -> list[int]:
    output = loaded(kind).model.generate(
        ids[None],
        images=inputs.images,
        image_sizes=inputs.image_sizes or None,
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return output[0].tolist()


@cache
def expected(kind: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(generated(kind, request)) for request in mixed_requests())


def answers_together(engine: Any, requests: Sequence[Request]) -> list[Result]:
    """All in the same first step: the engine's thread reads its mail when the last one is in."""
    with engine._worker._changed:
        handles = [engine.submit(request) for request in requests]
    return [handle.result(60) for handle in handles]
