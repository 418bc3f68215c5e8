"""Requests that pass through: a controller over several workers, and workers in front of servers that speak the OpenAI API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from serve_kit import WEATHER, controller, data_url, running, wait_until, worker

from llava.conversation import SeparatorStyle, conv_templates, get_template
from llava.errors import InputError
from llava.serve.backends.base import ModelCard
from llava.serve.backends.in_process import EngineBackend
from llava.serve.backends.prompt_parser import parse_prompt
from llava.serve.backends.remote import RemoteBackend
from llava.serve.router.dispatch import Dispatcher
from llava.serve.router.protocol import WorkerStatus, read_chunks

MODEL = "llava-v1.5-tiny"
CHAT = "/v1/chat/completions"
SHOW = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What do you see in this picture?"},
            {"type": "image_url", "image_url": {"url": data_url()}},
        ],
    }
]


@pytest.fixture(scope="module")
def house(backend: EngineBackend) -> Iterator[tuple[str, Dispatcher, list[Any]]]:
    """A controller and two workers over one engine."""
    with (
        controller() as (address, dispatcher),
        worker(backend, controller=address) as first,
        worker(backend, controller=address) as second,
    ):
        wait_until(lambda: len(dispatcher.workers()) == 2)
        yield address, dispatcher, [first, second]


@contextlib.contextmanager
def broken_worker(dispatcher: Dispatcher, answer: bytes) -> Iterator[list[int]]:
    """A worker that sends a few bytes to everybody and hangs up, registered as the one to ask first."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked: list[int] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                asked.append(1)
                with connection:
                    connection.recv(1_000_000)
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    name = f"http://127.0.0.1:{listener.getsockname()[1]}"
    dispatcher.register(name, WorkerStatus((MODEL,), 1, 0), check_heart_beat=False)
    usual = dispatcher._choose
    dispatcher._choose = lambda able, chance: min(able, key=lambda worker: worker.name != name)
    dispatcher._sticky.clear()
    try:
        yield asked
    finally:
        dispatcher._choose = usual
        dispatcher.unregister(name)
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def head(length: str, kind: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{length}\r\n\r\n".encode()


def test_responses_go_on_wherever_they_are_kept(house: tuple[str, Dispatcher, list[Any]]) -> None:
    """Either worker answers first, and the controller finds the one that keeps the answer; tools and scores pass too."""
    address, _, workers = house
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        for place, _ in workers:
            with openai.OpenAI(base_url=f"{place}/v1", api_key="none") as own:
                first = own.responses.create(model=MODEL, input="Who are you?", max_output_tokens=4)
            second = client.responses.create(
                model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=2
            )
            assert second.usage.input_tokens > first.usage.input_tokens
            assert client.responses.retrieve(first.id) == first
            client.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError, match="keeps no response"):
                client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="send the conversation itself") as refused:
            client.responses.create(model=MODEL, input="And?", previous_response_id="resp_unknown")
        assert refused.value.code == "previous_response_not_found"
        tool = {"type": "function", "function": {"name": "see", "parameters": {"properties": {"n": {"enum": [1, 2]}}}}}
        called = client.chat.completions.create(
            model=MODEL, messages=SHOW, tools=[tool], tool_choice="required", max_tokens=60
        )
        assert called.choices[0].message.tool_calls[0].function.name == "see"
        scored = client.completions.create(model=MODEL, prompt="A chat.", echo=True, logprobs=1, max_tokens=0)
        assert len(scored.choices[0].logprobs.token_logprobs) == len(scored.choices[0].logprobs.tokens) > 2
    nested = b'{"model": "' + MODEL.encode() + b'", "x": ' + b"[" * 200 + b"]" * 200 + b"}"
    refused_body = httpx.post(f"{address}{CHAT}", content=nested)
    assert refused_body.status_code == 400
    assert "levels deep" in refused_body.json()["error"]["message"]


def test_the_controller_answers_as_its_workers_do(house: tuple[str, Dispatcher, list[Any]]) -> None:
    address, _, workers = house
    replies = []
    for place in (address, workers[0][0]):
        with openai.OpenAI(base_url=f"{place}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=SHOW)
            pieces = list(client.chat.completions.create(model=MODEL, messages=SHOW, stream=True))
            text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            assert text == whole.choices[0].message.content
            assert [model.id for model in client.models.list()] == [MODEL]
            assert client.models.retrieve(MODEL).model_dump()["conv_mode"] == "v1"
            plain = client.completions.create(model=MODEL, prompt="USER: hi ASSISTANT:", max_tokens=5)
            with pytest.raises(openai.BadRequestError, match="temperature"):
                client.chat.completions.create(model=MODEL, messages=SHOW, extra_body={"temperature": "1"})
            for streamed in (False, True):
                raw = client.chat.completions.with_raw_response
                response = raw.create(model=MODEL, messages=SHOW, stream=streamed, extra_body={"temprature": 1})
                assert response.headers["x-ignored-fields"] == "temprature"
            with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
                client.chat.completions.create(model="other", messages=SHOW)
            replies.append((text, plain.choices[0].text))
    assert replies[0] == replies[1]
    assert httpx.get(f"{address}/ready").status_code == 200
    assert "llava_workers 2.0" in httpx.get(f"{address}/metrics").text


def test_a_conversation_stays_with_its_worker(house: tuple[str, Dispatcher, list[Any]]) -> None:
    address, _, workers = house
    before = [service.metrics.finished.labels("finished")._value.get() for _, service in workers]
    history = list(SHOW)
    for number in range(4):
        reply = httpx.post(address + CHAT, json={"model": MODEL, "messages": history, "max_tokens": 3}).json()
        history += [reply["choices"][0]["message"], {"role": "user", "content": f"And? {number}"}]
    after = [service.metrics.finished.labels("finished")._value.get() for _, service in workers]
    assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0, 4]


@pytest.mark.parametrize(
    "answer",
    [
        b"",  # hangs up at once
        head("transfer-encoding: chunked", "text/event-stream"),  # ... after the head
        head("content-length: 100", "application/json") + b'{"half":',  # ... in the middle of an answer held back here
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n",
        b"no http at all\r\n\r\n",
    ],
)
def test_another_worker_is_asked_while_no_byte_has_been_sent(
    house: tuple[str, Dispatcher, list[Any]], answer: bytes
) -> None:
    address, dispatcher, _ = house
    with broken_worker(dispatcher, answer) as asked:
        for stream in (False, True):
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": stream}
            dispatcher._sticky.clear()
            response = httpx.post(address + CHAT, json=body)
            assert response.status_code == 200
            assert "Hello" in response.text
        assert asked


def test_a_response_that_has_begun_ends_with_an_error(house: tuple[str, Dispatcher, list[Any]]) -> None:
    address, dispatcher, _ = house
    event = b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'
    begun = head("transfer-encoding: chunked", "text/event-stream") + f"{len(event):x}\r\n".encode() + event + b"\r\n"
    with (
        broken_worker(dispatcher, begun) as asked,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="lost in the middle"),
    ):
        list(client.chat.completions.create(model=MODEL, messages=SHOW, stream=True))
    assert len(asked) == 1
    chunk = b'{"text": "begun", "error_code": 0}\0'
    begun = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n"
    with broken_worker(dispatcher, begun) as asked:
        response = httpx.post(f"{address}/worker_generate_stream", json={"model": MODEL, "prompt": "hi"})
        first, last = read_chunks([response.content])
    assert (first["text"], last["error_code"]) == ("begun", 3)
    assert "lost in the middle" in last["text"]


def test_no_worker_left_is_a_503_with_a_message() -> None:
    with controller() as (address, dispatcher):
        assert httpx.get(f"{address}/ready").status_code == 503
        dispatcher.register("http://127.0.0.1:9", WorkerStatus((MODEL,), 1, 0), check_heart_beat=False)
        for _ in range(2):  # also when it is known to be unreachable
            response = httpx.post(address + CHAT, json={"model": MODEL, "messages": SHOW})
            assert response.status_code == 503
            assert "retry-after" in response.headers
            assert f"no worker for '{MODEL}' can be reached" in response.json()["error"]["message"]
        chunks = list(read_chunks([httpx.post(f"{address}/worker_generate_stream", json={"model": MODEL}).content]))
        assert [chunk["error_code"] for chunk in chunks] == [2]


def test_a_worker_that_is_stopped_says_goodbye(
    house: tuple[str, Dispatcher, list[Any]], backend: EngineBackend
) -> None:
    address, dispatcher, _ = house
    with worker(backend, controller=address) as (own, _):
        wait_until(lambda: own in [known.name for known in dispatcher.workers()])
    assert own not in [known.name for known in dispatcher.workers()]


def test_a_client_s_leaving_reaches_the_worker(
    house: tuple[str, Dispatcher, list[Any]], backend: EngineBackend
) -> None:
    address, dispatcher, workers = house
    body = {"model": MODEL, "messages": SHOW, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", address + CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert sum(service.num_requests for _, service in workers) == 1
    wait_until(lambda: sum(service.num_requests for _, service in workers) == 0, seconds=1)
    wait_until(lambda: backend.engine.stats().num_running == 0, seconds=1)
    wait_until(lambda: sum(known.queue_length for known in dispatcher.workers()) == 0, seconds=2)


# A worker in front of another server


@pytest.fixture(scope="module")
def remote(house: tuple[str, Dispatcher, list[Any]]) -> Iterator[str]:
    """A worker whose model is our own API behind the controller."""
    template = get_template("v1")
    card = ModelCard("far-away", template, "v1", context_len=None, image_placeholder="<image>", takes_grammar=False)
    with worker(RemoteBackend(house[0], model=MODEL, card=card)) as (address, _):
        yield address


def test_a_worker_in_front_of_another_server_answers_alike(
    remote: str, house: tuple[str, Dispatcher, list[Any]]
) -> None:
    history = [
        *SHOW,
        {"role": "assistant", "content": "Three things."},
        {"role": "user", "content": "What colour is the star?"},
    ]
    for messages in (SHOW, history, [{"role": "system", "content": "You are terse."}, *SHOW]):
        for more in ({}, {"temperature": 0.8, "seed": 3, "n": 2, "stop": ["yellow"]}):
            replies = []
            for address, model in ((remote, "far-away"), (house[0], MODEL)):
                with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=24, **more)
                    replies.append([(choice.message.content, choice.finish_reason) for choice in whole.choices])
                    assert whole.usage.prompt_tokens_details.model_dump()["image_tokens"] == 64
                    replies[-1].append(whole.usage.completion_tokens)
            assert replies[0] == replies[1]


# A tool whose schema refers to itself, as pydantic writes them.
DRAW = {
    "name": "draw",
    "parameters": {
        "properties": {"place": {"$ref": "#/$defs/Place"}},
        "required": ["place"],
        "$defs": {"Place": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}},
    },
}


def test_tools_are_called_through_a_worker_in_front_of_another_server(remote: str) -> None:
    tools = [WEATHER, {"type": "function", "function": DRAW}]
    named = {"type": "function", "function": {"name": "draw"}}
    with openai.OpenAI(base_url=f"{remote}/v1", api_key="none", max_retries=0) as client:
        for messages in (SHOW, [{"role": "user", "content": "Draw."}]):
            asked = {"model": "far-away", "messages": messages, "tools": tools, "tool_choice": named, "max_tokens": 60}
            (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
            assert call.function.name == "draw"
            assert json.loads(call.function.arguments) in ({"place": {"x": 1}}, {"place": {"x": 2}})
            with client.chat.completions.stream(**asked) as stream:
                (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
            assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
        asked["tool_choice"] = "required"
        (call,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
        assert call.function.name in ("draw", "weather")
        history = [
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "done"},
        ]
        asked |= {"messages": [*asked["messages"], *history], "tool_choice": "auto", "max_tokens": 4}
        assert client.chat.completions.create(**asked).choices[0].finish_reason == "length"
        strict = {"type": "function", "function": DRAW | {"strict": True}}
        for refused in ({"tools": [strict]}, {"tool_choice": named, "extra_body": {"regex": "a"}}):
            with pytest.raises(openai.BadRequestError, match=r"leave strict out|leave one of them out"):
                client.chat.completions.create(**asked | refused)
    anthropic = {"name": "draw", "input_schema": DRAW["parameters"]}
    body = {"model": "far-away", "max_tokens": 60, "messages": [{"role": "user", "content": "Draw."}]}
    body |= {"tools": [anthropic], "tool_choice": {"type": "any"}}
    (block,) = httpx.post(f"{remote}/v1/messages", json=body).json()["content"]
    assert (block["type"], block["name"]) == ("tool_use", "draw")
    assert block["input"]["place"]["x"] in (1, 2)


def test_when_to_try_again_is_passed_on() -> None:
    app, saying = FastAPI(), [""]

    @app.post(CHAT)
    async def refuse() -> JSONResponse:
        return JSONResponse({"error": {"message": "full"}}, 429, {"retry-after": saying[0]})

    card = ModelCard("far-away", get_template("v1"), "v1", context_len=None, image_placeholder="<image>")
    body = {"model": "far-away", "messages": [{"role": "user", "content": "hi"}]}
    with (
        running(app) as far,
        controller() as (front, dispatcher),
        worker(RemoteBackend(far, model="x", card=card), controller=front) as (address, _),
    ):
        wait_until(dispatcher.workers)
        for place in (address, front):
            for saying[0], told in (("17", "17"), ("0.2", "1"), ("1e9", "120"), ("-3", "2"), ("x", "2")):
                response = httpx.post(place + CHAT, json=body)
                assert (response.status_code, response.headers["retry-after"]) == (429, told)


def test_original_clients_reach_another_server_s_model(remote: str, house: tuple[str, Dispatcher, list[Any]]) -> None:
    conversation = get_template("v1")
    image = data_url().partition(",")[2]
    for text, images in (("<image>\nWhat colour is the star?", [image]), ("Who are you?", [])):
        conversation.messages = []
        conversation.append_message("USER", text)
        conversation.append_message("ASSISTANT", None)
        body = {"prompt": conversation.get_prompt(), "images": images, "temperature": 0, "stop": "</s>"}
        own, far = (
            list(read_chunks([httpx.post(f"{address}/worker_generate_stream", json=body | {"model": MODEL}).content]))
            for address in (house[0], remote)
        )
        assert far[-1] == own[-1]
        assert len(far[-1]["text"]) > len(body["prompt"])
    body |= {"prompt": "<image> who knows which template", "images": [image]}
    (chunk,) = read_chunks([httpx.post(f"{remote}/worker_generate_stream", json=body).content])
    assert chunk["error_code"] == 1
    assert "--conv-mode" in chunk["text"]


def test_what_the_other_server_says_is_passed_on(remote: str) -> None:
    too_long = {"model": "far-away", "messages": [{"role": "user", "content": "word " * 3000}]}
    response = httpx.post(remote + CHAT, json=too_long)
    assert response.status_code == 400
    assert "too long" in response.json()["error"]["message"]
    for body in ({"logprobs": True}, {"regex": "a"}):
        response = httpx.post(remote + CHAT, json={"model": "far-away", "messages": SHOW} | body)
        assert response.status_code == 400
        assert "another server" in response.json()["error"]["message"]
    card = ModelCard("gone", get_template("v1"), "v1", context_len=None, image_placeholder="<image>")
    with worker(RemoteBackend("http://127.0.0.1:9", model="x", card=card)) as (address, _):
        response = httpx.post(address + CHAT, json={"model": "gone", "messages": SHOW})
        assert response.status_code == 503
        assert "cannot be reached" in response.json()["error"]["message"]
        assert httpx.get(f"{address}/health").status_code == 503


def test_a_worker_whose_server_is_gone_is_passed_over(backend: EngineBackend) -> None:
    card = ModelCard(MODEL, get_template("v1"), "v1", context_len=None, image_placeholder="<image>")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    with (
        controller() as (address, dispatcher),
        worker(RemoteBackend("http://127.0.0.1:9", model="x", card=card), controller=address),
    ):
        wait_until(dispatcher.workers)
        response = httpx.post(address + CHAT, json=body)
        assert response.status_code == 503
        assert "the server that answers cannot be reached" in response.json()["error"]["message"]
        chunk = httpx.post(f"{address}/worker_generate_stream", json={"model": MODEL, "prompt": "hi"}).content
        assert "the server that answers cannot be reached" in next(read_chunks([chunk]))["text"]
        with worker(backend, controller=address):
            wait_until(lambda: len(dispatcher.workers()) == 2)
            assert [httpx.post(address + CHAT, json=body).status_code for _ in range(4)] == [200] * 4


# As llama.cpp tells it: blanks before an answer, and what each choice cost in an event of its own.
AS_LLAMA_CPP = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]},
    *({"choices": [{"index": n, "delta": {"content": text}}]} for text in (" ", " A cat", " sits.") for n in (0, 1)),
    *({"choices": [{"index": n, "delta": {}, "finish_reason": "stop"}]} for n in (0, 1)),
    *({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": cost}} for cost in (3, 4)),
]


def test_answers_of_other_servers_look_like_ours() -> None:
    app = FastAPI()

    @app.post(CHAT)
    @app.post("/v1/completions")
    async def answer(request: Request) -> StreamingResponse:
        wanted = (await request.json()).get("n", 1)

        async def events() -> AsyncIterator[str]:
            for event in AS_LLAMA_CPP:
                if all(choice["index"] < wanted for choice in event["choices"]):
                    yield f"data: {json.dumps(event)}\n\n"
                    await asyncio.sleep(0.02)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    card = ModelCard("far-away", get_template("v1"), "v1", context_len=None, image_placeholder="<image>")
    with running(app) as far, worker(RemoteBackend(far, model="x", card=card)) as (address, _):
        reply = httpx.post(address + CHAT, json={"model": "far-away", "messages": SHOW, "n": 2}).json()
        assert [choice["message"]["content"] for choice in reply["choices"]] == ["A cat sits."] * 2
        assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (7, 7)
        streamed = httpx.post(f"{address}/worker_generate_stream", json={"model": "far-away", "prompt": "Q:"}).content
        chunks = [chunk["text"] for chunk in read_chunks([streamed])]
        assert chunks == ["Q:A cat", "Q:A cat sits."]  # piece by piece, though there are no token ids


# Prompts back into turns


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_rendered_prompts_come_apart_again(name: str) -> None:
    template = conv_templates[name]
    for system in (None, "Be kind: always."):
        conversation = template.with_system(system) if system else template.copy()
        conversation.messages, conversation.offset = [], 0
        turns = ["<image>\nWhat is it?", "A cat:\na small one.", "Sure?", "Yes", "And now?", None]
        for number, text in enumerate(turns):
            conversation.append_message(conversation.roles[number % 2], text)
        prompt = conversation.get_prompt()
        if template.roles[0] == template.roles[1]:  # nothing says where a turn begins
            with pytest.raises(InputError, match="--conv-mode"):
                parse_prompt(prompt, template)
            continue
        found = parse_prompt(prompt, template)
        if system and template.sep_style == SeparatorStyle.GEMMA:  # whose system text is the start of the question
            turns[0] = f"{system}\n\n{turns[0]}"
        assert [text for _, text in found.messages][:5] == turns[:5]
        assert found.get_prompt().rstrip() == prompt.rstrip()


@pytest.mark.parametrize("prompt", ["", "hello", "USER: a ASSISTANT: b"])
def test_other_prompts_are_not_guessed_at(prompt: str) -> None:
    with pytest.raises(InputError, match="--conv-mode"):
        parse_prompt(prompt, conv_templates["llava_v1"])
