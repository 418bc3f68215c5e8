"""The vectors behind an answer: the engine's against those of the model's own forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_kit import WAYS, expected, loaded, mixed_requests, random_image

from llava.engine.config import EngineConfig
from llava.engine.engine import Engine
from llava.engine.hf_engine import HFEngine
from llava.engine.request import EmbedRequest, Request, SamplingParams
from llava.errors import InputError

PROMPT = "a picture\n<image>\nand another\n<image>\nwhat differs?"
IMAGES = [random_image(0), random_image(1)]


def states_of(kind: str, prompt: str, images: list[Any]) -> tuple[list[np.ndarray], np.ndarray]:
    """The model's hidden states, and where in the sequence image features are (T,)."""
    model = loaded(kind)
    inputs = model.processor(prompt, images)
    with torch.inference_mode():
        output = model.model(
            inputs.input_ids[None],
            images=inputs.images,
            image_sizes=inputs.image_sizes or None,
            output_hidden_states=True,
        )
    layouts = iter(inputs.layouts)
    is_image: list[bool] = []
    for token in inputs.input_ids.tolist():
        is_image += [True] * next(layouts).num_features if token < 0 else [False]
    return [states[0].float().numpy() for states in output.hidden_states], np.array(is_image)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_hidden_states_are_those_of_the_model(kind: str, way: str) -> None:
    states, is_image = states_of(kind, PROMPT, IMAGES)
    chosen = {"all": np.ones_like(is_image), "text": ~is_image, "images": is_image, (3, 11): slice(3, 11)}
    asked = [
        (EmbedRequest(PROMPT, IMAGES, layer=layer, span=span, pooling=pooling), states[layer][rows], pooling)
        for layer in (0, 1, -1)
        for span, rows in chosen.items()
        for pooling in ("none", "mean", "last")
    ]
    with Engine.from_loaded(loaded(kind), WAYS[way]) as engine:
        answers = [engine.submit(request) for request in mixed_requests()] if kind == "llama" else []
        embeddings = engine.embed([request for request, *_ in asked])
        texts = tuple(answer.result().completions[0].token_ids for answer in answers)
        again = engine.embed(asked[0][0])
        assert engine.stats().num_blocks_used == 0
    assert kind != "llama" or texts == expected("llama")
    for (_, rows, pooling), embedding in zip(asked, embeddings, strict=True):
        wanted = rows if pooling == "none" else rows.mean(0, keepdims=True) if pooling == "mean" else rows[-1:]
        np.testing.assert_allclose(embedding.vectors, wanted, atol=2e-5)
    np.testing.assert_allclose(again.vectors, embeddings[0].vectors, atol=2e-5)


def test_what_early_layers_left_in_the_cache_is_no_prefix_of_others() -> None:
    """A request for layer 1 computes no further, so its blocks lack the keys of later layers."""
    request = Request(PROMPT, IMAGES, SamplingParams(max_new_tokens=8))
    with Engine.from_loaded(loaded("llama"), EngineConfig(block_size=4)) as engine:
        right = engine.generate(request).completions
    with Engine.from_loaded(loaded("llama"), EngineConfig(block_size=4)) as engine:
        engine.embed(EmbedRequest(PROMPT, IMAGES, layer=1))
        after = engine.generate(request)
        assert after.usage.num_cached_tokens == 0
        assert after.completions == right
        embedding = engine.embed(EmbedRequest(PROMPT, IMAGES, layer=1, pooling="last"))
        assert embedding.usage.num_cached_tokens > 0


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_stages_before_the_language_model(pooling: Any) -> None:
    model = loaded("llama")
    inputs = model.processor("<image><image>", IMAGES)
    with torch.inference_mode():
        pixels = torch.stack(inputs.pixels) if inputs.pixels[0].dim() == 3 else torch.cat(inputs.pixels)
        tower = model.model.get_vision_tower()(pixels).flatten(0, 1).numpy()
        projected = torch.cat(model.model.image_features(inputs.images, inputs.image_sizes)).numpy()
    with Engine.from_loaded(model) as engine:
        for stage, rows in (("tower", tower), ("projector", projected)):
            given = engine.embed(EmbedRequest(images=IMAGES, stage=stage, pooling=pooling, normalize=True)).vectors
            wanted = rows.mean(0, keepdims=True) if pooling == "mean" else rows
            np.testing.assert_allclose(given, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)


def test_an_embedding_that_is_preempted_in_the_middle_is_the_same() -> None:
    ids = [10 + 7 * number % 290 for number in range(70)]
    request = EmbedRequest(ids, layer=1)
    with Engine.from_loaded(loaded("llama")) as engine:
        whole = engine.embed(request).vectors
    num_preemptions = 0
    for num_blocks in (21, 24, 27):
        config = EngineConfig(num_blocks=num_blocks, block_size=4, max_step_tokens=7)
        with Engine.from_loaded(loaded("llama"), config) as small:
            params = SamplingParams(max_new_tokens=60, ignore_eos=True)
            with small._worker._changed:  # all in the first step
                others = [small.submit(Request(f"hello {number}", sampling=params)) for number in range(3)]
                handle = small.submit_embed(request)
            np.testing.assert_allclose(handle.embedding(60).vectors, whole, atol=2e-5)
            for other in others:
                other.result(60)
            num_preemptions += small.stats().num_preemptions
    assert num_preemptions > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": "hi", "layer": 9}, "hidden states 0 to 2"),
        ({"prompt": "hi", "layer": True}, "integer"),
        ({"prompt": "hi", "span": "images"}, "no images"),
        ({"prompt": "hi", "span": (0, 900)}, "positions"),
        ({"prompt": "hi", "span": (4, 2)}, "start < stop"),
        ({"prompt": "hi", "pooling": "max"}, "mean, last, none"),
        ({"prompt": "hi", "stage": "projector"}, "nothing to embed"),
        ({"prompt": "<image>", "images": IMAGES[:1], "stage": "tower"}, "images alone"),
        ({"prompt": "<image>", "images": IMAGES}, "1 <image> placeholder"),
        ({}, "nothing to embed"),
        ({"prompt": []}, "empty"),
    ],
)
def test_what_cannot_be_embedded_is_refused(given: dict[str, Any], words: str) -> None:
    with Engine.from_loaded(loaded("llama")) as engine:
        with pytest.raises(InputError, match=words):
            engine.embed(EmbedRequest(**given))
        assert engine.alive
    with HFEngine.from_loaded(loaded("llama")) as engine, pytest.raises(InputError, match="no embeddings"):
        engine.embed(EmbedRequest("hi"))
