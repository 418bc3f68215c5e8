"""Ollama's and Anthropic's APIs of real servers over the embedded model, at a worker and through a controller.

Requests are those that the clients send; the clients themselves are asked where they are installed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serve_kit import DEMO, data_url, worker, worker_and_controller

from llava.serve.backends.in_process import EngineBackend
from llava.serve.backends.remote import RemoteBackend
from llava.serve.http.limits import ServeLimits
from llava.serve.http.middleware import AccessPolicy, ApiKeys
from llava.serve.ollama.requests import closed

MODEL = "llava-v1.5-tiny"
QUESTION = "What colour is the star?"
IMAGE = base64.b64encode(DEMO.read_bytes()).decode()
SHOWN = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": IMAGE}}
ASKED = [{"role": "user", "content": [SHOWN, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def addresses(backend: EngineBackend) -> Iterator[dict[str, str]]:
    with worker_and_controller(backend) as addresses:
        yield addresses


@pytest.fixture(params=["worker", "controller"])
def address(request: pytest.FixtureRequest, addresses: dict[str, str]) -> str:
    return addresses[request.param]


@pytest.fixture(scope="module")
def reference(addresses: dict[str, str]) -> str:
    """The answer of the OpenAI-compatible API."""
    parts = [{"type": "image_url", "image_url": {"url": data_url()}}, {"type": "text", "text": QUESTION}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
    reply = httpx.post(f"{addresses['worker']}/v1/chat/completions", json=body, timeout=60).json()
    return str(reply["choices"][0]["message"]["content"])


def post(url: str, body: dict[str, Any], status: int = 200, **headers: str) -> Any:
    reply = httpx.post(url, json=body, headers=headers, timeout=60)
    assert reply.status_code == status, reply.text
    return reply.json()


def lines(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = httpx.post(url, json=body, timeout=60)
    assert reply.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.text.splitlines()]


def events(url: str, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    reply = httpx.post(url, json=body | {"stream": True}, timeout=60)
    assert reply.headers["content-type"].startswith("text/event-stream")
    pairs = [event.split("\n") for event in reply.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


# Ollama


def test_an_ollama_chat_streams_lines_that_end_with_what_it_took(address: str, reference: str) -> None:
    messages = [{"role": "user", "content": QUESTION, "images": [IMAGE]}]
    body = {"model": MODEL, "messages": messages}
    *parts, last = lines(f"{address}/api/chat", body)
    assert "".join(part["message"]["content"] for part in parts) == reference
    assert all(not part["done"] and part["message"]["role"] == "assistant" for part in parts)
    assert last["done"]
    assert last["done_reason"] == "stop"
    assert last["message"]["content"] == ""
    whole = post(f"{address}/api/chat", body | {"stream": False})
    assert whole["message"] == {"role": "assistant", "content": reference}
    assert (whole["prompt_eval_count"], whole["eval_count"]) == (last["prompt_eval_count"], last["eval_count"])
    times = [whole[name] for name in ("total_duration", "prompt_eval_duration", "eval_duration", "load_duration")]
    assert all(isinstance(time, int) for time in times)
    assert times[0] >= times[1] + times[2] > 0
    asked = post(f"{address}/api/generate", {"model": MODEL, "prompt": QUESTION, "images": [IMAGE], "stream": False})
    assert asked["response"] == reference


def test_ollama_names_may_have_the_tag_latest(address: str) -> None:
    models = httpx.get(f"{address}/api/tags").json()["models"]
    names = [model["name"] for model in models]
    assert names == [f"{MODEL}:latest"]
    for name in (MODEL, *names):
        answer = post(f"{address}/api/generate", {"model": name, "prompt": "Who are you?", "stream": False})
        assert (answer["model"], answer["done"]) == (name, True)
        shown = post(f"{address}/api/show", {"model": name})
        assert {"completion", "vision"} <= set(shown["capabilities"])
        architecture = shown["model_info"]["general.architecture"]
        assert shown["model_info"][f"{architecture}.context_length"] == 1024
        assert post(f"{address}/api/pull", {"model": name}) == {"status": "success"}
    running = httpx.get(f"{address}/api/ps").json()["models"]
    assert [(model["model"], model["context_length"]) for model in running] == [(f"{MODEL}:latest", 1024)]
    assert models[0]["details"]["parameter_size"] == "19.56M"
    for path in ("chat", "generate", "show", "pull"):
        wrong = post(
            f"{address}/api/{path}",
            {"model": "absent", "prompt": "x"} if path == "generate" else {"model": "absent"},
            404,
        )
        assert "absent" in wrong["error"]


def test_ollama_options_are_those_of_the_engine(address: str) -> None:
    def answer(**options: Any) -> dict[str, Any]:
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "Who are you?"}], "options": options}
        return post(f"{address}/api/chat", asked | {"stream": False})

    greedy = answer()["message"]["content"]
    cut = answer(num_predict=3, num_ctx=512, num_gpu=1)
    assert (cut["done_reason"], cut["eval_count"]) == ("length", 3)
    assert greedy.startswith(cut["message"]["content"])
    assert answer(num_predict=-1)["message"]["content"] == greedy
    assert greedy.startswith(answer(stop=["vision"])["message"]["content"] + " vision")
    assert answer(temperature=2.0, top_p=0)["message"]["content"] == greedy
    drawn = [answer(temperature=3.0, seed=seed, num_predict=12)["message"]["content"] for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    body = {"model": MODEL, "temperature": 3.0, "seed": 5, "max_tokens": 12}
    body["messages"] = [{"role": "user", "content": "Who are you?"}]
    reply = post(f"{address}/v1/chat/completions", body)
    assert reply["choices"][0]["message"]["content"] == drawn[0]


def test_ollama_formats(address: str) -> None:
    schema = {"type": "object", "properties": {"seen": {"enum": ["star", "circle"]}}, "required": ["seen"]}
    body = {"model": MODEL, "prompt": QUESTION, "images": [IMAGE], "format": schema, "stream": False}
    assert json.loads(post(f"{address}/api/generate", body)["response"])["seen"] in ("star", "circle")
    plain = {"model": MODEL, "prompt": "Who are you?", "stream": False}
    raw = plain | {"prompt": "A chat. USER: Who are you? ASSISTANT:", "raw": True}
    assert "assistant" in post(f"{address}/api/generate", raw)["response"]
    for wrong, word in (
        ({"think": True}, "think"),
        ({"raw": True, "system": "Be brief."}, "system"),
        ({"format": "yaml"}, "format"),
        ({"options": {"temperature": "hot"}}, "temperature"),
        ({"images": ["%%%"]}, "base64"),
        ({"suffix": "."}, "suffix"),
        ({"context": [1, 2]}, "context"),
    ):
        assert word in post(f"{address}/api/generate", plain | wrong, 400)["error"]
    assert httpx.request("DELETE", f"{address}/api/delete", json={"model": MODEL}).status_code == 400


def test_a_request_without_a_question_loads_the_model(address: str) -> None:
    assert post(f"{address}/api/generate", {"model": MODEL})["done_reason"] == "load"
    unloaded = post(f"{address}/api/chat", {"model": MODEL, "messages": [], "keep_alive": 0})
    assert (unloaded["done"], unloaded["done_reason"]) == (True, "unload")


def test_schemas_of_ollama_are_closed() -> None:
    inner = {"type": "object", "properties": {"properties": {"type": "string"}}}
    schema = {"properties": {"a": inner, "b": {"items": inner}}, "$defs": {"x": {"anyOf": [inner, True]}}}
    shut = inner | {"additionalProperties": False}
    assert closed(schema) == {
        "properties": {"a": shut, "b": {"items": shut}},
        "$defs": {"x": {"anyOf": [shut, True]}},
        "additionalProperties": False,
    }
    for left in ({"properties": {"a": True}, "additionalProperties": {"type": "null"}}, {"allOf": [inner, inner]}, {}):
        assert closed(left) == left


# Anthropic


def test_a_message_whole_and_streamed(address: str, reference: str) -> None:
    body = {"model": MODEL, "max_tokens": 64, "messages": ASKED}
    whole = post(f"{address}/v1/messages", body)
    assert whole["content"] == [{"type": "text", "text": reference}]
    ending = (whole["type"], whole["role"], whole["stop_reason"], whole["stop_sequence"])
    assert ending == ("message", "assistant", "end_turn", None)
    named = events(f"{address}/v1/messages", body)
    assert all(name == event["type"] for name, event in named)
    kinds = [name for name, _ in named if name not in ("ping", "content_block_delta")]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"] for name, event in named if name == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == reference
    start, last = named[0][1]["message"], named[-2][1]
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    counted = post(f"{address}/v1/messages/count_tokens", {"model": MODEL, "messages": ASKED})["input_tokens"]
    for usage in (whole["usage"], start["usage"], last["usage"]):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted
    cut = post(f"{address}/v1/messages", body | {"max_tokens": 2})
    assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 2)


def test_a_stop_sequence_is_named(address: str) -> None:
    body = {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": "Who are you?"}]}
    sequences = {"stop_sequences": ["zebra", " vision", "small"]}
    whole = post(f"{address}/v1/messages", body | sequences)
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "small")
    delta = events(f"{address}/v1/messages", body | sequences)[-2][1]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == ("stop_sequence", "small")
    assert post(f"{address}/v1/messages", body)["stop_reason"] == "end_turn"


def test_errors_have_the_form_of_their_protocol(address: str) -> None:
    said = [{"role": "user", "content": "Who are you?"}]
    for body, status, kind, word in (
        ({"model": "absent", "max_tokens": 4, "messages": said}, 404, "not_found_error", "absent"),
        ({"model": MODEL, "messages": said}, 400, "invalid_request_error", "max_tokens"),
        ({"model": MODEL, "max_tokens": 4, "messages": []}, 400, "invalid_request_error", "messages"),
        (
            {"model": MODEL, "max_tokens": 4, "messages": said, "stop_sequences": [" "]},
            400,
            "invalid_request_error",
            "blank",
        ),
    ):
        reply = post(f"{address}/v1/messages", body, status)
        assert (reply["type"], reply["error"]["type"]) == ("error", kind)
        assert word in reply["error"]["message"]
    for path, word in (
        ("/v1/audio/speech", "no audio"),
        ("/v1/nothing", "/v1/nothing"),
        ("/chat/completions", "/v1"),
    ):
        assert word in post(f"{address}{path}", {}, 404)["error"]["message"]
    assert "/api/nothing" in post(f"{address}/api/nothing", {}, 404)["error"]
    assert post(f"{address}/v1/messages/batches", {}, 404)["error"]["type"] == "not_found_error"
    assert httpx.get(f"{address}/v1/messages").json()["type"] == "error"


def test_models_in_the_form_of_the_client(address: str) -> None:
    version = {"anthropic-version": "2023-06-01"}
    listed = httpx.get(f"{address}/v1/models", headers=version).json()
    assert [(model["type"], model["id"]) for model in listed["data"]] == [("model", MODEL)]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (MODEL, MODEL, False)
    assert httpx.get(f"{address}/v1/models/{MODEL}", headers=version).json() == listed["data"][0]
    assert httpx.get(f"{address}/v1/models").json()["object"] == "list"


def test_keys_and_limits_hold_for_all_protocols(backend: EngineBackend) -> None:
    access = AccessPolicy(keys=ApiKeys(["right-key"]), max_body_bytes=20_000)
    limits = ServeLimits(max_requests=1)
    small = {
        "model": MODEL,
        "max_tokens": 4,
        "stream": False,
        "messages": [{"role": "user", "content": "Who are you?"}],
    }
    large = small | {"messages": [{"role": "user", "content": "x" * 30_000}]}
    with worker(backend, limits, access=access) as (address, service):
        for path in ("/v1/messages", "/api/chat", "/v1/chat/completions"):
            url, ollama = f"{address}{path}", path == "/api/chat"

            def message(reply: Any, ollama: bool = ollama) -> str:
                return str(reply["error"] if ollama else reply["error"]["message"])

            body = {name: small[name] for name in ("model", "stream", "messages")} if ollama else small
            assert "API key" in message(post(url, body, 401, **{"x-api-key": "wrong-key"}))
            for headers in ({"x-api-key": "right-key"}, {"authorization": "Bearer right-key"}):
                post(url, body, **headers)
                assert "20,000" in message(post(url, large, 413, **headers))
                service.num_answers += 1
                assert "running" in message(post(url, body, 429, **headers))
                service.num_answers -= 1


def test_a_worker_before_another_server_answers_all_protocols(
    addresses: dict[str, str], backend: EngineBackend, reference: str
) -> None:
    card = backend.model.card
    with worker(RemoteBackend(addresses["worker"], model=MODEL, card=card)) as (address, _):
        body = {"model": MODEL, "max_tokens": 64, "messages": ASKED}
        assert post(f"{address}/v1/messages", body)["content"][0]["text"] == reference
        asked = {"model": MODEL, "prompt": QUESTION, "images": [IMAGE], "stream": False}
        assert post(f"{address}/api/generate", asked)["response"] == reference
        counted = post(f"{address}/v1/messages/count_tokens", {"model": MODEL, "messages": ASKED}, 400)
        assert "server behind" in counted["error"]["message"]


# Tools


PARAMETERS = {
    "type": "object",
    "properties": {"colour": {"enum": ["yellow", "red"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
TOOL = {"name": "paint", "description": "Paints stars.", "input_schema": PARAMETERS}


def test_a_tool_that_must_be_called_through_messages(address: str) -> None:
    body = {"model": MODEL, "max_tokens": 80, "messages": ASKED, "tools": [TOOL], "tool_choice": {"type": "any"}}
    whole = post(f"{address}/v1/messages", body)
    (block,) = whole["content"]
    assert (block["type"], block["name"], whole["stop_reason"]) == ("tool_use", "paint", "tool_use")
    assert block["input"]["colour"] in ("yellow", "red")
    assert 1 <= block["input"]["count"] <= 9
    named = events(f"{address}/v1/messages", body)
    kinds = [name for name, _ in named if name not in ("ping", "content_block_delta")]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    started = next(event for name, event in named if name == "content_block_start")["content_block"]
    assert (started["type"], started["name"], started["input"]) == ("tool_use", "paint", {})
    deltas = [event["delta"] for name, event in named if name == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"input_json_delta"}
    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == block["input"]
    assert named[-2][1]["delta"]["stop_reason"] == "tool_use"
    # The result goes back with the call that it belongs to.
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "done"}, SHOWN]}
    history = [*ASKED, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": [result]}]
    more = body | {"messages": history, "tool_choice": {"type": "none"}}
    assert post(f"{address}/v1/messages", more)["content"][0]["type"] == "text"
    counted = {name: more[name] for name in ("model", "messages", "tools")}
    plain = post(f"{address}/v1/messages/count_tokens", {"model": MODEL, "messages": ASKED})["input_tokens"]
    assert post(f"{address}/v1/messages/count_tokens", counted)["input_tokens"] > plain + 64  # a second image
    stray = {"role": "user", "content": [result | {"tool_use_id": "other"}]}
    assert "other" in post(f"{address}/v1/messages", body | {"messages": [stray]}, 400)["error"]["message"]
    served = body | {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}
    assert "runs none" in post(f"{address}/v1/messages", served, 400)["error"]["message"]
    missing = body | {"tool_choice": {"type": "tool", "name": "carve"}}
    assert "carve" in post(f"{address}/v1/messages", missing, 400)["error"]["message"]


def test_tools_of_ollama_s_chats(address: str) -> None:
    function = {"name": "paint", "description": "Paints stars.", "parameters": PARAMETERS}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Who are you?"}]}
    body["tools"] = [{"type": "function", "function": function}]
    *parts, last = lines(f"{address}/api/chat", body)
    assert last["done"]
    assert "".join(part["message"]["content"] for part in parts)  # this model does not call by itself
    call = {"function": {"name": "paint", "arguments": {"colour": "red", "count": 2}}}
    history = [*body["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}]
    history.append({"role": "tool", "tool_name": "paint", "content": "done"})
    assert post(f"{address}/api/chat", body | {"messages": history, "stream": False})["message"]["content"]


def test_calls_are_written_in_each_protocol_s_form() -> None:
    from llava.engine.request import Chunk, Timings, Usage
    from llava.serve.anthropic.replies import MessageWriter
    from llava.serve.ollama.replies import OllamaWriter
    from llava.serve.service import RequestStats
    from llava.serve.tools import Tool, ToolCall, ToolCallReader, ToolUse, written_calls

    use = ToolUse((Tool("paint", parameters=PARAMETERS), Tool("carve")))
    calls = [ToolCall("paint", '{"colour": "red", "count": 2}'), ToolCall("carve", "{}")]
    text = "Sure. " + written_calls(use.form, calls)
    stats = RequestStats(Usage(5, 0, 0, 9), Timings(0.0, 0.1, 0.2))
    for size in (1, 3, 1000):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        chunks = [Chunk(0, piece) for piece in pieces[:-1]] + [Chunk(0, pieces[-1], finish_reason="stop")]
        ollama, anthropic = OllamaWriter(MODEL, as_message=True), MessageWriter(MODEL, ())
        readers = ToolCallReader(use), ToolCallReader(use)
        streamed = [json.loads(reply.as_json()) for chunk in chunks for reply in ollama.deltas(readers[0].read(chunk))]
        streamed += [json.loads(reply.as_json()) for reply in ollama.closing(stats)]
        assert "".join(part["message"]["content"] for part in streamed).strip() == "Sure."
        calls = [call["function"] for part in streamed for call in part["message"].get("tool_calls", ())]
        assert [(call["name"], call["arguments"]) for call in calls] == [
            ("paint", {"colour": "red", "count": 2}),
            ("carve", {}),
        ]
        assert streamed[-1]["done"]
        named = [json.loads(reply.as_json()) for chunk in chunks for reply in anthropic.deltas(readers[1].read(chunk))]
        named += [json.loads(reply.as_json()) for reply in anthropic.closing(stats)]
        blocks: dict[int, Any] = {}
        for event in named:
            if event["type"] == "content_block_start":
                assert event["index"] == len(blocks)
                blocks[event["index"]] = [event["content_block"]["type"], event["content_block"].get("name"), ""]
            elif event["type"] == "content_block_delta":
                delta = event["delta"]
                blocks[event["index"]][2] += delta["text"] if delta["type"] == "text_delta" else delta["partial_json"]
        assert [block[:2] for block in blocks.values()] == [
            ["text", None],
            ["tool_use", "paint"],
            ["tool_use", "carve"],
        ]
        assert blocks[0][2].strip() == "Sure."
        assert json.loads(blocks[1][2]) == {"colour": "red", "count": 2}
        assert json.loads(blocks[2][2]) == {}
        assert [event["type"] for event in named].count("content_block_stop") == 3
        assert named[-2]["delta"]["stop_reason"] == "tool_use"


# The clients themselves


def test_the_client_of_ollama(address: str, reference: str) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=address)
    assert [model.model for model in client.list().models] == [f"{MODEL}:latest"]
    assert "vision" in client.show(MODEL).capabilities
    messages = [{"role": "user", "content": QUESTION, "images": [str(DEMO)]}]
    assert client.chat(MODEL, messages).message.content == reference
    pieces = list(client.generate(MODEL, QUESTION, images=[DEMO.read_bytes()], stream=True))
    assert "".join(piece.response for piece in pieces) == reference
    assert pieces[-1].done_reason == "stop"
    with pytest.raises(ollama.ResponseError, match="absent"):
        client.chat("absent", messages)


def test_the_client_of_anthropic(address: str, reference: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
    asked: Any = {"model": MODEL, "max_tokens": 64, "messages": ASKED, "system": "Be brief."}
    message = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == message.content[0].text
    assert client.messages.count_tokens(model=MODEL, messages=ASKED, system="Be brief.").input_tokens > 64
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(anthropic.NotFoundError, match="absent"):
        client.messages.create(**(asked | {"model": "absent"}))
