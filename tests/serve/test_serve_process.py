"""An engine in a process of its own answers as one in this process does, and neither outlives the other."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from serve_kit import DEMO, Program, embedded_backend, wait_until

from llava.assets import embedded_model_path
from llava.engine.request import Chunk, EmbedRequest, Request, SamplingParams, TokenLogprob
from llava.errors import InputError
from llava.model.builder import load
from llava.serve.backends.base import Backend, BackendError
from llava.serve.backends.subprocess import ProcessBackend
from llava.serve.service import merged

MODEL = "llava-v1.5-tiny"
ENDLESS = SamplingParams(max_new_tokens=1500, ignore_eos=True)


def apart(path: Any = None) -> ProcessBackend:
    return ProcessBackend(partial(load, path or embedded_model_path(), device="cpu"), name=MODEL)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all: a backend belongs to a server, which has one."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def backend(runner: asyncio.Runner) -> Iterator[ProcessBackend]:
    backend = apart()
    yield backend
    runner.run(backend.close())
    assert not psutil.pid_exists(backend.pid)


def asking(backend: Backend, text: str, images: tuple[Any, ...] = (), **sampling: Any) -> Request:
    conversation = backend.model.card.template.copy()
    conversation.append_message(conversation.roles[0], "<image>\n" * len(images) + text)
    conversation.append_message(conversation.roles[1], None)
    return Request(conversation, images, SamplingParams(**{"max_new_tokens": 40, **sampling}))


async def answer(backend: Backend, request: Request, *, streamed: bool) -> tuple[Any, ...]:
    """The completions, their cost, and the number of pieces."""
    answering = await backend.start(request, streamed=streamed)
    chunks = [chunk async for batch in answering.batches(lambda: 0.0) for chunk in batch]
    return [rounded(chunk) for chunk in merged(chunks)], answering.usage, len(chunks)


def rounded(chunk: Chunk) -> Chunk:
    """Sums of floats depend on what else is computed in the step."""
    logprobs = [TokenLogprob(t.token_id, round(t.logprob, 3), tuple(i for i, _ in t.top)) for t in chunk.logprobs]
    return replace(chunk, logprobs=tuple(logprobs))


@pytest.mark.parametrize("streamed", [True, False])
def test_it_answers_as_an_engine_in_this_process_does(
    backend: ProcessBackend, runner: asyncio.Runner, streamed: bool
) -> None:
    image = Image.open(DEMO).convert("RGB")

    def requests(to: Backend) -> list[Request]:
        return [
            asking(to, "Who are you?"),
            asking(to, "What is in the picture?", (image,)),
            asking(to, "Name two colours.", (image, image.rotate(90)), logprobs=2),
            asking(to, "Who are you?", temperature=1.0, seed=7, n=3),
            asking(to, "Who are you?", stop=("vision",)),
            asking(to, "Which shapes are there?", (image,), regex="[a-z]{3,9}"),
            replace(asking(to, ""), prompt="USER: Who are you? ASSISTANT:"),
        ]

    async def all_of(to: Backend) -> list[Any]:
        return await asyncio.gather(*(answer(to, request, streamed=streamed) for request in requests(to)))

    with embedded_backend() as here:
        expected = runner.run(all_of(here))
        card = here.model.card
    found = runner.run(all_of(backend))
    assert [completions for completions, _, _ in found] == [completions for completions, _, _ in expected]
    # What was found in the cache depends on who came first.
    assert [replace(usage, num_cached_tokens=0) for _, usage, _ in found] == [
        replace(usage, num_cached_tokens=0) for _, usage, _ in expected
    ]
    if streamed:
        assert min(pieces for _, _, pieces in found) > 1
    assert backend.model.card == card
    assert [backend.model.token_piece(token) for token in (3, 301)] == [here.model.token_piece(t) for t in (3, 301)]


def test_it_embeds_as_an_engine_in_this_process_does(backend: ProcessBackend, runner: asyncio.Runner) -> None:
    image = Image.open(DEMO).convert("RGB")
    requests = [EmbedRequest("Who are you?"), EmbedRequest(images=[image], stage="tower", pooling="none")]
    with embedded_backend() as own:
        for request in requests:
            there, here = runner.run(backend.embed(request)), own.engine.embed(request)
            assert there.vectors.shape == here.vectors.shape
            assert abs(there.vectors - here.vectors).max() < 1e-5
            assert there.usage == here.usage


def test_what_cannot_work_is_refused_before_an_answer_begins(backend: ProcessBackend, runner: asyncio.Runner) -> None:
    for request, words in (
        (
            replace(asking(backend, "What is that?"), images=(Image.new("RGB", (8, 8)),)),
            "0 <image> placeholders for 1 image",
        ),
        (asking(backend, "<image>\nWhat is that?"), "1 <image> placeholder for 0 images"),
        (asking(backend, "Who are you?", logit_bias={10**6: 1.0}), "token 1000000"),
    ):
        with pytest.raises(InputError, match=words):
            runner.run(answer(backend, request, streamed=True))
    completions, _, _ = runner.run(answer(backend, asking(backend, "Who are you?"), streamed=True))
    assert "assistant" in completions[0].text


def test_who_goes_away_frees_a_place(backend: ProcessBackend, runner: asyncio.Runner) -> None:
    """In the middle of an answer, and while a prompt with an image is being made."""
    large = Image.effect_noise((1500, 1500), 80).convert("RGB")

    async def leave() -> None:
        answering = await backend.start(replace(asking(backend, "Go on."), sampling=ENDLESS), streamed=True)
        async for _ in answering.batches(lambda: 0.0):
            break
        waiting = replace(asking(backend, "Go on.", (large,)), sampling=ENDLESS)
        starting = asyncio.ensure_future(backend.start(waiting, streamed=True))
        await asyncio.sleep(0)  # it is on its way
        starting.cancel()
        assert backend.gauges()["engine_running"] == 1
        answering.abort()
        async for _ in answering.batches(lambda: 0.0):
            pass
        assert answering.usage.num_new_tokens < 1500
        # A request afterwards is answered, with news of how the engine is.
        await answer(backend, asking(backend, "Who are you?"), streamed=False)

    runner.run(leave())

    def is_free() -> bool:
        runner.run(answer(backend, asking(backend, "Who are you?", max_new_tokens=1), streamed=False))
        return backend.gauges()["engine_running"] + backend.gauges()["engine_waiting"] == 0

    wait_until(is_free, seconds=5)


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="nowhere"):
        apart(tmp_path / "nowhere")


def test_an_engine_that_dies_ends_its_answers_with_an_error(runner: asyncio.Runner) -> None:
    backend = apart()

    async def outlive() -> None:
        answering = await backend.start(replace(asking(backend, "Go on."), sampling=ENDLESS), streamed=True)
        batches = answering.batches(lambda: 0.0)
        await anext(batches)
        os.kill(backend.pid, signal.SIGKILL)
        with pytest.raises(BackendError, match="ended before the answer did: its process was ended by SIGKILL"):
            [batch async for batch in batches]
        with pytest.raises(BackendError, match="the engine is gone"):
            await backend.start(asking(backend, "Who are you?"), streamed=True)
        assert not await backend.is_alive()
        await backend.close()

    runner.run(outlive())


def worker() -> Program:
    return Program("worker", "--no-register", "--port", "0", "--device", "cpu", "--engine-process", "on")


def address_of(program: Program) -> str:
    return program.line("worker ").split()[0]


def engine_of(program: Program) -> psutil.Process:
    """The other process of a worker that has started."""
    address_of(program)
    (engine,) = psutil.Process(program.process.pid).children()
    return engine


@pytest.mark.slow
def test_a_signal_to_all_processes_lets_answers_finish() -> None:
    """As a terminal's Ctrl-C and a service manager's SIGTERM reach them."""
    with worker() as program:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 300}
        body |= {"ignore_eos": True, "stream": True}
        engine, ended = engine_of(program), []
        with httpx.stream("POST", f"{address_of(program)}/v1/chat/completions", json=body, timeout=180) as response:
            for line in response.iter_lines():
                if not ended:
                    for process in (engine, psutil.Process(program.process.pid)):
                        process.send_signal(signal.SIGTERM)
                if line.startswith("data: {"):
                    ended += [choice["finish_reason"] for choice in json.loads(line[6:])["choices"]]
        assert ended[-1] == "length"
        assert program.stop() == 0
        assert not engine.is_running()


@pytest.mark.slow
def test_health_says_that_the_engine_is_gone_and_an_engine_does_not_outlive_its_server() -> None:
    with worker() as program:
        address = address_of(program)
        assert httpx.get(f"{address}/health").status_code == 200
        engine_of(program).kill()
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 503, seconds=10)
        assert program.stop() == 0
    with worker() as program:
        engine = engine_of(program)
        program.process.kill()
        wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, seconds=20)
