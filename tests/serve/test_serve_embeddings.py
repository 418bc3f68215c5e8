"""Embeddings over the APIs of real servers, at a worker and through a controller: they equal the engine's own."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serve_kit import DEMO, data_url, worker_and_controller

from llava.engine.request import EmbedRequest
from llava.images.io import load_image
from llava.serve.backends.in_process import EngineBackend

MODEL = "llava-v1.5-tiny"


@pytest.fixture(scope="module")
def addresses(backend: EngineBackend) -> Iterator[dict[str, str]]:
    with worker_and_controller(backend) as addresses:
        yield addresses


@pytest.fixture(params=["worker", "controller"])
def address(request: pytest.FixtureRequest, addresses: dict[str, str]) -> str:
    return addresses[request.param]


def shown(text: str) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": data_url()}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}] if text else [image]}]


def test_texts_and_ids_with_openai_s_client(address: str, backend: EngineBackend) -> None:
    texts = ["a red circle", "two dogs on the grass"]
    wanted = [engine_vector(backend, prompt=text, normalize=True) for text in texts]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    reply = client.embeddings.create(model=MODEL, input=texts)  # base64 on the way
    assert [entry.index for entry in reply.data] == [0, 1]
    for entry, vector in zip(reply.data, wanted, strict=True):
        np.testing.assert_allclose(entry.embedding, vector, atol=1e-5)
        assert np.linalg.norm(entry.embedding) == pytest.approx(1, abs=1e-5)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 4
    ids = backend.engine.tokenizer(texts[0]).input_ids
    for given in (ids, [ids]):
        plain = client.embeddings.create(model=MODEL, input=given, encoding_format="float")
        np.testing.assert_allclose(plain.data[0].embedding, wanted[0], atol=1e-5)


@pytest.mark.parametrize("stage", ["language", "projector", "tower"])
def test_an_image_in_a_chat(address: str, backend: EngineBackend, stage: Any) -> None:
    text = "What is this?" if stage == "language" else ""
    body = {"model": MODEL, "messages": shown(text), "stage": stage, "normalize": False, "encoding_format": "base64"}
    body |= {"span": "images", "layer": 2} if stage == "language" else {}
    reply = httpx.post(f"{address}/v1/embeddings", json=body, timeout=60).json()
    vector = np.frombuffer(base64.b64decode(reply["data"][0]["embedding"]), "<f4")
    prompt = {"prompt": "<image>\n" + text} if stage == "language" else {}
    if stage == "language":  # image features come before the question, so that their states do not depend on it
        template = backend.model.card.template
        prompt = {"prompt": f"{template.system} USER: <image>\n{text} ASSISTANT:", "span": "images", "layer": 2}
    wanted = engine_vector(backend, images=[load_image(DEMO)], stage=stage, **prompt)
    np.testing.assert_allclose(vector, wanted, atol=1e-4)


def engine_vector(backend: EngineBackend, **asked: Any) -> np.ndarray:
    return backend.engine.embed(EmbedRequest(**asked)).vectors[0]


def test_ollama_s_two_forms(address: str, backend: EngineBackend) -> None:
    texts = ["a red circle", "two dogs"]
    url = f"{address}/api/embed"
    reply = httpx.post(url, json={"model": MODEL, "input": texts}, timeout=60).json()
    wanted = [engine_vector(backend, prompt=text, normalize=True) for text in texts]
    np.testing.assert_allclose(reply["embeddings"], wanted, atol=1e-5)
    assert reply["prompt_eval_count"] > 4
    old = httpx.post(f"{address}/api/embeddings", json={"model": MODEL, "prompt": texts[0]}, timeout=60).json()
    np.testing.assert_allclose(old["embedding"], engine_vector(backend, prompt=texts[0]), atol=1e-5)
    import ollama

    given = ollama.Client(address).embed(model=MODEL, input=texts[1])
    np.testing.assert_allclose(given.embeddings[0], wanted[1], atol=1e-5)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/embeddings", {}, "input or messages"),
        ("/v1/embeddings", {"input": "x", "messages": shown("x")}, "input or messages"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [[]]}, "input"),
        ("/v1/embeddings", {"input": [10**9]}, "token id"),
        ("/v1/embeddings", {"input": "x", "dimensions": 7}, "dimensions is 7"),
        ("/v1/embeddings", {"input": "x", "layer": 99}, "layer is 99"),
        ("/v1/embeddings", {"input": "x", "span": "images"}, "no images"),
        ("/v1/embeddings", {"input": "x", "stage": "tower"}, "images"),
        ("/v1/embeddings", {"messages": shown("x"), "stage": "tower"}, "images alone"),
        ("/v1/embeddings", {"input": "x", "pooling": "none"}, "pooling"),
        ("/v1/embeddings", {"input": "<image>"}, "<image>"),
        ("/v1/embeddings", {"input": "x " * 3000}, "too long"),
        ("/v1/embeddings", {"input": ["x"] * 3000}, "3,000"),
        ("/api/embed", {"prompt": "x"}, "give input"),
        ("/api/embed", {"input": "x", "truncate": True}, "truncate"),
        ("/api/embeddings", {"input": "x"}, "give prompt"),
    ],
)
def test_what_is_refused(addresses: dict[str, str], path: str, body: dict[str, Any], words: str) -> None:
    reply = httpx.post(addresses["worker"] + path, json={"model": MODEL} | body, timeout=60)
    assert reply.status_code == 400, reply.text
    assert words in reply.text
