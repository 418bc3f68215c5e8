"""Tiles as a GPU makes them: Pillow's pixels to the bit, whichever way a model cuts its images."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import answers_together, expected, loaded, mixed_requests
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.engine.engine import Engine
from llava.images.gpu_preprocess import FILTERS, GpuPreprocessor, scaled
from llava.images.image_processor import ClipImageProcessor
from llava.images.layout import ImagePolicy, plan
from llava.mm_utils import process_images
from llava.processor import Processor

SIDE = 24
PINPOINTS = ((24, 48), (48, 24), (48, 48), (72, 24), (24, 72))
CLIP = {"do_rescale": False, "do_normalize": False, "size": {"shortest_edge": SIDE}}
PROCESSORS = {
    "clip": ClipImageProcessor(**CLIP, crop_size={"height": SIDE, "width": SIDE}),
    "no crop needed": ClipImageProcessor(
        **{**CLIP, "size": {"height": SIDE, "width": SIDE}}, crop_size={"height": SIDE, "width": SIDE}
    ),
    "scaled to less than the crop": ClipImageProcessor(
        **{**CLIP, "size": {"shortest_edge": 17}}, crop_size={"height": SIDE, "width": SIDE}
    ),
    "lanczos": ClipImageProcessor(**CLIP, crop_size={"height": SIDE, "width": SIDE}, resample=1),
}
SIZES = ((24, 24), (48, 48), (31, 77), (200, 33), (1, 90), (7, 3), (301, 299))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=150, deadline=None)
@given(
    *[st.integers(1, 260) for _ in range(4)],
    st.sampled_from(sorted(FILTERS)),
    st.booleans(),
)
def test_scaling_gives_pillow_s_bits(
    width: int, height: int, new_width: int, new_height: int, resample: int, extreme: bool
) -> None:
    image = noise(width, height)
    if extreme:  # black and white: sums overshoot on both sides
        image = image.point(lambda value: 255 * (value > 127))
    wanted = torch.from_numpy(np.array(image.resize((new_width, new_height), resample)))
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(scaled(planes, (new_width, new_height), resample).permute(1, 2, 0), wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_tiles_are_those_that_the_processor_makes(name: str, mode: Any, size: tuple[int, int]) -> None:
    processor = PROCESSORS[name]
    policy = ImagePolicy(mode, SIDE, 8, PINPOINTS if mode == "anyres" else (), "flat")
    image = noise(*size)
    config = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=PINPOINTS)
    pixels = process_images([image], processor, config)[0]
    wanted = pixels if mode == "anyres" else pixels[None]
    tiler = GpuPreprocessor(processor, policy, torch.device("cpu"))
    colours = torch.from_numpy(np.array(image))
    layout = plan(size, policy)
    assert torch.equal(tiler(colours, layout), wanted)
    alone = plan(size, policy, num_tiles=1)
    assert torch.equal(tiler(colours, alone), wanted[:1])  # an overview alone, where little detail was asked for
    config.image_aspect_ratio = "pad"
    padded = process_images([image], processor, config)
    assert torch.equal(tiler(colours, replace(alone, is_padded=True)), padded)  # one of several images


@pytest.mark.parametrize("kind", ["llama", "anyres"])
def test_an_engine_that_cuts_on_its_device_answers_the_same(kind: str) -> None:
    model = loaded(kind)
    processor: Processor = model.processor
    with Engine.from_loaded(model) as engine:
        # As on a GPU, where these two are set.
        engine._prompt_builder._on_device = True
        engine._worker.runner._gpu_preprocessor = GpuPreprocessor(
            processor.image_processor, processor.policy, model.model.device
        )
        results = answers_together(engine, mixed_requests())
    for result, tokens in zip(results, expected(kind), strict=True):
        assert result.completions[0].token_ids == tokens


def test_a_filter_that_it_does_not_know_is_left_to_the_host() -> None:
    policy = ImagePolicy("pad", SIDE, 8)
    assert GpuPreprocessor.supports(PROCESSORS["clip"], policy)
    assert not GpuPreprocessor.supports(replace(PROCESSORS["clip"], resample=0), policy)
    assert GpuPreprocessor.supports(replace(PROCESSORS["clip"], resample=0, do_resize=False), policy)
    squares = ImagePolicy("highres", SIDE, 8, ((2 * SIDE, 2 * SIDE),))
    assert not GpuPreprocessor.supports(PROCESSORS["clip"], squares)
