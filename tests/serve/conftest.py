"""A server of the embedded model for the tests of a file, its address, and OpenAI's client of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from serve_kit import embedded_backend, worker

from llava.serve.backends.in_process import EngineBackend

if TYPE_CHECKING:
    import openai


@pytest.fixture(scope="module")
def backend() -> Iterator[EngineBackend]:
    with embedded_backend() as backend:
        yield backend


@pytest.fixture(scope="module")
def address(backend: EngineBackend) -> Iterator[str]:
    with worker(backend) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client
