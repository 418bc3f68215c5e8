"""Clients of load.py: requests in both protocols, and what came back.

In: an address and a body. Out: a `ClientAnswer` with its text, times, and how it ended.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
GENERATE = "/worker_generate_stream"
LONGEST_S = 900.0  # timeout of a client

QUESTION = "What is written here?\nAnswer the question using a single word or phrase."


def original_prompt(turns: str) -> str:
    """Turns behind the system text of the template v1."""
    return (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        f"and polite answers to the user's questions. {turns}"
    )


def original_body(model: str, image: str, tag: str) -> dict[str, Any]:
    prompt = original_prompt(f"USER: {tag} ASSISTANT: Yes.</s>USER: <image>\n{QUESTION} ASSISTANT:")
    return {
        "model": model,
        "prompt": prompt,
        "images": [image],
        "temperature": 0,
        "max_new_tokens": 16,
        "stop": "</s>",
    }


@dataclass
class ClientAnswer:
    text: str = ""
    first_s: float | None = None
    total_s: float = 0.0
    status: int = 0
    error: str | None = None  # the message
    finished: bool = False
    num_tokens: int = 0


def number_image(number: int) -> str:
    """An image of a number, which the embedded model reads."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (224, 224), (250, 250, 250))
    ImageDraw.Draw(image).text((112, 112), str(number), (20, 20, 20), ImageFont.load_default(72), anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image_text(buffer.getvalue())


def image_text(png: bytes) -> str:
    return base64.b64encode(png).decode()


def chat_body(model: str, text: str, image: str | None = None, **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}})
    return {"model": model, "messages": [{"role": "user", "content": parts}], "stream": True} | more


async def ask_chat(
    client: httpx.AsyncClient, address: str, body: dict[str, Any], *, pause_s: float = 0.0
) -> ClientAnswer:
    """A streamed answer over the OpenAI-compatible API; `pause_s` is how long a slow client waits after each event."""
    answer, started = ClientAnswer(), time.perf_counter()
    try:
        async with client.stream("POST", address + CHAT, json=body) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = json.loads(await response.aread())["error"]["message"]
                return answer
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    answer.finished = True
                elif line.startswith("data:"):
                    event = json.loads(line[5:])
                    if "error" in event:
                        answer.error = event["error"]["message"]
                    for choice in event.get("choices") or ():
                        piece = choice["delta"].get("content")
                        if piece:
                            answer.first_s = answer.first_s or time.perf_counter() - started
                            answer.text += piece
                            answer.num_tokens += 1
                    if pause_s:
                        await asyncio.sleep(pause_s)
    except httpx.HTTPError as error:
        answer.text += f" [{type(error).__name__}]"
    answer.total_s = time.perf_counter() - started
    return answer


async def ask_original(client: httpx.AsyncClient, address: str, body: dict[str, Any]) -> ClientAnswer:
    """A streamed answer in the original protocol; its text begins with the prompt."""
    from llava.serve.router.protocol import ChunkReader

    answer, started, reader = ClientAnswer(), time.perf_counter(), ChunkReader()
    try:
        async with client.stream("POST", address + GENERATE, json=body) as response:
            answer.status = response.status_code
            async for data in response.aiter_raw():
                for chunk in reader.feed(data):
                    answer.first_s = answer.first_s or time.perf_counter() - started
                    answer.text, answer.error = chunk["text"], chunk["text"] if chunk["error_code"] else None
            answer.finished = answer.error is None
    except httpx.HTTPError as error:
        answer.text += f" [{type(error).__name__}]"
    answer.total_s = time.perf_counter() - started
    return answer


def new_client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.0)
    return httpx.AsyncClient(timeout=httpx.Timeout(LONGEST_S, connect=60), limits=limits, trust_env=False)


async def at_most(number: int, jobs: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Do all jobs, so many at a time."""
    gate = asyncio.Semaphore(number)

    async def one(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    return await asyncio.gather(*(one(job) for job in jobs))
