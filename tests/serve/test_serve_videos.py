"""Videos and several images over HTTP: what a real server makes of them is what the library makes of them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_kit import data_url, wait_until, worker
from video_kit import loaded, make_animation, make_video, write_frames

from llava.engine.config import EngineConfig
from llava.serve.backends.in_process import EngineBackend
from llava.serve.http.limits import SERVED_VIDEOS, ServeLimits
from llava.session import Session

MODEL = "llava-tiny-video"
QUESTION = "What happens?"


@pytest.fixture(scope="module")
def backend() -> Iterator[EngineBackend]:
    backend = EngineBackend(loaded("rows"), name=MODEL, config=EngineConfig(max_running=4))
    yield backend
    backend.engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    (folder / "clip.mp4").write_bytes(make_video())
    return folder


@pytest.fixture(scope="module")
def address(backend: EngineBackend, folder: Path) -> Iterator[str]:
    with worker(backend, ServeLimits(image_folder=folder, videos=replace(SERVED_VIDEOS, max_frames=40))) as (
        address,
        _,
    ):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def video_url(data: bytes = b"", kind: str = "mp4") -> str:
    return f"data:video/{kind};base64,{base64.b64encode(data or make_video()).decode()}"


def asked(*parts: dict[str, Any], text: str = QUESTION) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": text}]
    return {"model": MODEL, "max_tokens": 12, "messages": [{"role": "user", "content": content}]}


def video(url: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url or video_url(), **fields}}


IMAGE = {"type": "image_url", "image_url": {"url": data_url()}}


def answer_of(address: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    reply = httpx.post(f"{address}/v1/chat/completions", json=body | {"inspect": True}, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"], reply.json()


def test_an_answer_about_a_video_is_the_one_of_the_library(client: openai.OpenAI, address: str, folder: Path) -> None:
    session = Session(loaded("rows"))
    session.sampling = replace(session.sampling, max_new_tokens=12)
    expected = session.answer(QUESTION, folder / "clip.mp4")
    text, reply = answer_of(address, asked(video()))
    assert text == expected
    assert reply["inspect"]["videos"] == [{"frames": 32, "grid": [1, 1], "tokens": 64}]
    assert reply["usage"]["prompt_tokens_details"]["image_tokens"] == 64
    whole = client.chat.completions.create(**asked(video()))
    assert whole.choices[0].message.content == expected
    stream = client.chat.completions.create(**asked(video(f"file://{folder}/clip.mp4")), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


def test_the_frames_that_are_asked_for(address: str) -> None:
    for fields, num_frames in (
        ({"num_frames": 5}, 5),
        ({"fps": 2}, 8),
        ({"fps": 10.0, "num_frames": 7}, 7),
        ({"fps": 2, "start": 1, "end": 2.04}, 3),
        ({"num_frames": 40}, 36),
    ):
        _, reply = answer_of(address, asked(video(**fields)))
        assert reply["inspect"]["videos"][0]["frames"] == num_frames, fields
    _, reply = answer_of(address, asked(video(video_url(make_animation(kind="GIF"), "gif"))))
    assert reply["inspect"]["videos"][0]["frames"] == 5
    _, plain = answer_of(address, asked(video(num_frames=2)))
    _, told = answer_of(address, asked(video(num_frames=2, time_instruction=True)))
    assert told["usage"]["prompt_tokens"] - plain["usage"]["prompt_tokens"] > 100  # tokens are bytes


def test_usage_counts_the_times_that_are_told_from_the_first_chunk_on(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = asked(video(num_frames=2, time_instruction=True))
    *chunks, last = client.chat.completions.create(**body, stream=True, stream_options=options)
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens}


def test_a_folder_of_frames_is_not_opened(address: str, folder: Path) -> None:
    write_frames(folder / "frames", 3)
    reply = httpx.post(f"{address}/v1/chat/completions", json=asked(video(f"file://{folder}/frames")))
    assert reply.status_code == 400
    assert "is that of a folder; name a file in it" in reply.json()["error"]["message"]


def test_several_images_and_videos_in_one_turn(address: str) -> None:
    _, reply = answer_of(address, asked(IMAGE, video(num_frames=3), IMAGE, text="<image> or <image> or <image>?"))
    assert [seen["frames"] for seen in reply["inspect"]["videos"]] == [3]
    assert len(reply["inspect"]["images"]) == 2
    _, again = answer_of(address, asked(IMAGE, IMAGE))
    assert "videos" not in again["inspect"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (video(num_frames=41), "video 1: num_frames is 41, and at most 40 frames are taken"),
        (video(fps=1000), None),
        (video(fps=0), "messages[0].content[0].video_url.fps"),
        (video(num_frames=0), "messages[0].content[0].video_url.num_frames"),
        (
            video(start=2, end=1),
            "[0].video_url: the end of a video is 1.0 seconds; it is after the start, 2",
        ),
        (video(start=9), "video 1: the video in the data: URL has no frame from 9 s on"),
        (video(data_url()), "video 1: the video in the data: URL is an image, not a video; give it as an image"),
        (video("file:///etc/passwd"), "leaves the folder"),
        (video("http://127.0.0.1/clip.mp4"), "videos are not downloaded from there"),
        (video("clip.mp4"), "videos in base64 go into a data: URL"),
        (video(video_url(make_video()[:700])), "video 1: the video in the data: URL is a broken video"),
        ({"type": "image_url", "image_url": {"url": video_url()}}, "not an image; give it as a video"),
    ],
)
def test_refusals(address: str, part: dict[str, Any], message: str | None) -> None:
    reply = httpx.post(f"{address}/v1/chat/completions", json=asked(part), timeout=60)
    if message is None:
        assert reply.status_code == 200
        return
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


def test_models_and_the_document_say_what_is_taken(address: str) -> None:
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["takes_videos"] is True
    document = httpx.get(f"{address}/openapi.json").json()
    fields = document["components"]["schemas"]["VideoURL"]["properties"]
    assert {"url", "num_frames", "fps", "start", "end", "time_instruction"} == set(fields)


def test_other_protocols_refuse_videos_in_a_sentence(address: str) -> None:
    encoded = base64.b64encode(make_video()).decode()
    ollama = {"model": MODEL, "stream": False, "messages": [{"role": "user", "content": "What?", "images": [encoded]}]}
    reply = httpx.post(f"{address}/api/chat", json=ollama)
    assert (reply.status_code, reply.json()["error"]) == (
        400,
        "images[0] is a video, and Ollama's API has none; send it to /v1/chat/completions, as a video_url part of a message",
    )
    source = {"type": "base64", "media_type": "video/mp4", "data": encoded}
    for block in ({"type": "image", "source": source}, {"type": "video", "source": source}):
        body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": [block]}]}
        reply = httpx.post(f"{address}/v1/messages", json=body)
        assert reply.status_code == 400
        assert "is a video, and Anthropic's API has none" in reply.json()["error"]["message"]


def test_a_model_that_takes_no_videos_says_so() -> None:
    from engine_kit import loaded as loaded_plain

    backend = EngineBackend(loaded_plain("llama"), name=MODEL, config=EngineConfig(max_running=2))
    with contextlib.closing(backend.engine), worker(backend) as (address, service):
        reply = httpx.post(f"{address}/v1/chat/completions", json=asked(video()))
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == (
            f"{MODEL} takes images and no videos; send some frames of the video, as an image_url part for each"
        )
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["takes_videos"] is False
        wait_until(lambda: service.memory.num_bytes == 0)


def test_the_memory_of_videos_is_counted_and_released(backend: EngineBackend) -> None:
    from llava.serve.http.memory_budget import MemoryBudget
    from llava.serve.http.middleware import AccessPolicy

    access = AccessPolicy(memory=MemoryBudget(150 * 2**20))  # less than opening a video may take
    with worker(backend, access=access) as (address, service):
        reply = httpx.post(f"{address}/v1/chat/completions", json=asked(video()))
        assert reply.status_code == 400
        assert "bytes of memory are needed for this" in reply.json()["error"]["message"]
        wait_until(lambda: service.memory.num_bytes == 0)
    with worker(backend) as (address, service):
        answer_of(address, asked(video()))
        wait_until(lambda: service.memory.num_bytes == 0)


# The page


def test_the_page_passes_a_video_on_and_shows_its_frames(backend: EngineBackend, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from PIL import Image

    from llava.serve.web.client import PageClient, PageSettings, PageTurn, conversation_of
    from llava.serve.web.page import _messages, describe

    clip = str(folder / "clip.mp4")
    with worker(backend) as (address, service):
        client = PageClient(address, ServeLimits())

        async def answers() -> list[Any]:
            await client.models()
            settings = PageSettings(MODEL, temperature=0.0, max_new_tokens=12)
            return [partial async for partial in client.answer([PageTurn(QUESTION, (clip,))], settings)]

        *_, last = asyncio.run(answers())
        assert not last.failed
        _, images = conversation_of([PageTurn(QUESTION, (clip,))], client.template(MODEL), "Default")
        wait_until(lambda: service.memory.num_bytes == 0)
    assert [image.partition(",")[0] for image in images] == ["data:video/mp4;base64"]
    assert last.stats["inspect"]["videos"] == [{"frames": 32, "grid": [1, 1], "tokens": 64}]
    assert "| 32 | 64 |" in describe(last.stats)
    overview = client.overview(clip)
    assert overview is not None
    frames = tmp_path / "frames.jpg"
    frames.write_bytes(overview)
    with Image.open(frames) as sheet:
        assert sheet.size == (8 * 160, 4 * 120)
    (shown, _) = _messages([PageTurn(QUESTION, (clip,), frames=(str(frames),))])
    assert shown["content"] == {"path": str(frames)}
    (named, _) = _messages([PageTurn(QUESTION, (clip,), frames=("",))])
    assert named["content"] == "*clip.mp4*"
    (tmp_path / "broken.mp4").write_bytes(make_video()[:700])
    assert client.overview(str(tmp_path / "broken.mp4")) is None
