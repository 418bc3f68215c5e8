"""What clients of OpenAI's API send, to a real server: tools, histories, unknown fields, scored prompts, second turns.

Requests of clients that are not installed here were recorded from the wire (client_requests.json), with IMAGE for an image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_kit import WEATHER, data_url, worker

from llava.serve.backends.in_process import EngineBackend
from llava.serve.http.limits import ServeLimits

MODEL = "llava-v1.5-tiny"
RECORDED = json.loads((Path(__file__).parent / "client_requests.json").read_text())
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "weather"}}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def post(address: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(address + path, json={"model": MODEL} | body, timeout=60)


def chat(address: str, messages: Any, **body: Any) -> httpx.Response:
    return post(address, "/v1/chat/completions", messages=messages, **{"max_tokens": 8} | body)


def check_weather(arguments: str) -> None:
    given = json.loads(arguments)
    assert set(given) == {"city", "days"}
    assert given["city"] in ("Oslo", "Rome")
    assert 1 <= given["days"] <= 9


# Recorded requests


@pytest.mark.parametrize(
    "row", RECORDED, ids=[f"{row['client']} {row['path'][4:]} {row['expect']}" for row in RECORDED]
)
def test_clients_get_what_they_ask_for(address: str, row: dict[str, Any]) -> None:
    body = json.loads(json.dumps(row["body"]).replace('"IMAGE"', json.dumps(data_url())))
    if row["expect"] == "text":
        limit = "max_output_tokens" if "responses" in row["path"] else "max_tokens"
        body |= {limit: 16}
        body.pop("max_completion_tokens", None)
    response = httpx.post(address + row["path"], json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.headers.get("x-ignored-fields", "messages[1].provider_specific_fields").endswith("specific_fields")
    text, calls = read_events(response.text) if body.get("stream") else read_reply(response.json())
    if row["expect"] == "call":
        assert text == ""
        (call,) = calls
        properties = row["body"]["tools"][0].get("function", row["body"]["tools"][0])["parameters"]["properties"]
        assert set(json.loads(call[1])) == set(properties)
    else:
        assert text or calls
    if row["expect"] == "json":
        assert isinstance(json.loads(text), dict)


def read_reply(reply: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls (name, arguments) of a whole reply, in either form."""
    if "output" in reply:
        texts = [part["text"] for item in reply["output"] if item["type"] == "message" for part in item["content"]]
        calls = [(item["name"], item["arguments"]) for item in reply["output"] if item["type"] == "function_call"]
        return "".join(texts), calls
    message = reply["choices"][0]["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["content"] or "", calls


def read_events(events: str) -> tuple[str, list[tuple[str, str]]]:
    """The same of a stream."""
    values = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    if "type" in values[0]:
        return read_reply(values[-1]["response"])
    deltas = [choice["delta"] for value in values for choice in value["choices"]]
    parts = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    names = [part["function"]["name"] for part in parts if part["function"].get("name")]
    arguments = "".join(part["function"].get("arguments") or "" for part in parts)
    return "".join(delta.get("content") or "" for delta in deltas), [(name, arguments) for name in names]


# Tools


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_required_call_comes_whole_and_in_pieces(client: openai.OpenAI, choice: Any) -> None:
    asking = {
        "model": MODEL, "messages": said("Weather in Rome?"), "tools": [WEATHER, CLOCK], "tool_choice": choice,
        "temperature": 2.0, "seed": 11, "n": 2, "max_tokens": 200,
    }  # fmt: skip
    whole = client.chat.completions.create(**asking)
    pieces = [piece.choices[0] for piece in client.chat.completions.create(**asking, stream=True)]
    assert len({choice.message.tool_calls[0].id for choice in whole.choices}) == 2
    for index, expected in enumerate(whole.choices):
        (call,) = expected.message.tool_calls
        assert expected.message.content is None
        assert expected.finish_reason == "tool_calls"
        if call.function.name == "weather":
            check_weather(call.function.arguments)
        else:
            assert json.loads(call.function.arguments) == {}
        own = [piece for piece in pieces if piece.index == index]
        assert own[-1].finish_reason == "tool_calls"
        deltas = [call for piece in own for call in piece.delta.tool_calls or ()]
        assert [delta.index for delta in deltas] == [0] * len(deltas)
        assert [(delta.function.name, delta.type) for delta in deltas if delta.id] == [(call.function.name, "function")]
        assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
        assert all(not piece.delta.content for piece in own)
    if choice == NAMED:
        assert all(choice.message.tool_calls[0].function.name == "weather" for choice in whole.choices)


def test_without_a_need_the_model_answers_in_words(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=said("Who are you?"))
    none = client.chat.completions.create(
        model=MODEL, messages=said("Who are you?"), tools=[WEATHER], tool_choice="none"
    )
    assert none.choices[0].message.content == plain.choices[0].message.content
    auto = client.chat.completions.create(model=MODEL, messages=said("Who are you?"), tools=[WEATHER])
    assert auto.choices[0].message.content
    assert auto.choices[0].message.tool_calls is None
    assert auto.choices[0].finish_reason == "stop"


def test_calls_and_results_are_read_again(client: openai.OpenAI) -> None:
    asked = said("Weather in Rome?")
    first = client.chat.completions.create(model=MODEL, messages=asked, tools=[WEATHER], tool_choice="required")
    message = first.choices[0].message
    history = [*asked, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    second = client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER])
    assert second.choices[0].message.content
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_the_older_form_of_tools(client: openai.OpenAI) -> None:
    asking = {
        "model": MODEL, "messages": said("Weather?"), "functions": [WEATHER["function"]],
        "function_call": {"name": "weather"}, "max_tokens": 200,
    }  # fmt: skip
    choice = client.chat.completions.create(**asking).choices[0]
    assert choice.finish_reason == "function_call"
    check_weather(choice.message.function_call.arguments)
    pieces = [piece.choices[0].delta.function_call for piece in client.chat.completions.create(**asking, stream=True)]
    parts = [piece for piece in pieces if piece is not None]
    assert [part.name for part in parts if part.name] == ["weather"]
    assert "".join(part.arguments or "" for part in parts) == choice.message.function_call.arguments
    history = [
        *said("Weather?"),
        {"role": "assistant", "content": None, "function_call": choice.message.function_call.model_dump()},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=history, max_tokens=8).choices[0].message.content


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names 'x'"),
        ({"tools": [WEATHER, WEATHER]}, "two tools are named 'weather'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tool name 'a b'"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "no object"),
        ({"tools": [WEATHER], "functions": [WEATHER["function"]]}, "older form"),
        ({"tools": [WEATHER], "tool_choice": "required", "regex": "a+"}, "regex"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": {"x": {"type": "y"}}}}}],
             "tool_choice": "required"},
            "grammar",
        ),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_called_are_refused(address: str, changes: dict[str, Any], words: str) -> None:
    response = chat(address, said("hi"), **changes)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


# Histories and fields


EXPECTED = {
    "role": "assistant",
    "content": None,
    "tool_calls": None,
    "refusal": None,
    "parsed": {"a": 1},
    "audio": None,
}


@pytest.mark.parametrize(
    "messages",
    [
        [*said("hi"), {"role": "assistant", "content": None}, *said("Who are you?")],
        [*said("hi"), {"role": "assistant", "content": "Hello"}, {"role": "system", "content": "Be brief"}, *said("Who?")],
        [{"role": "assistant", "content": "Hello!"}, *said("Who are you?")],
        [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, *said("Who?"),
         {"role": "system", "content": "c"}],
        [*said("hi"), EXPECTED, *said("Who?")],
        [*said("hi"), {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *said("Who?")],
        [*said("hi"), {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
         {"role": "tool", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(), "detail": None}}]}],
    ],
    ids=range(8),
)  # fmt: skip
def test_histories_of_any_shape_are_answered(address: str, messages: list[Any]) -> None:
    response = chat(address, messages)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"]


def test_the_last_words_are_continued(address: str) -> None:
    whole = chat(address, said("Who are you?"), max_tokens=30).json()["choices"][0]["message"]["content"]
    for head in (whole[:12], whole[: whole.index(" ", 12)]):
        messages = [*said("Who are you?"), {"role": "assistant", "content": head}]
        for extra in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
            rest = chat(address, messages, max_tokens=30, **extra).json()["choices"][0]["message"]["content"]
            assert head + rest == whole
        events = chat(address, messages, max_tokens=30, stream=True).text
        assert head + read_events(events)[0] == whole
    again = chat(address, messages, continue_final_message=False).json()["choices"][0]["message"]["content"]
    assert again != rest


ACCEPTED = [
    {"top_k": -1}, {"seed": -1}, {"seed": -5}, {"top_p": 0, "temperature": 1}, {"best_of": 1}, {"prediction": None},
    {"max_tokens": 4, "max_completion_tokens": 4}, {"response_format": {"type": "text"}}, {"stop": None}, {"tools": []},
    {"logprobs": False, "top_logprobs": 0}, {"store": True, "metadata": {"a": "b"}},
]  # fmt: skip


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_what_asks_for_nothing_new_is_accepted(address: str, changes: dict[str, Any]) -> None:
    response = chat(address, said("Who are you?"), **{"max_tokens": 4} | changes)
    assert response.status_code == 200, response.text
    assert "best_of" in response.headers.get("x-ignored-fields", "best_of")


def test_a_top_p_of_zero_is_greedy(address: str) -> None:
    greedy = chat(address, said("Who are you?")).json()["choices"][0]["message"]
    assert chat(address, said("Who are you?"), top_p=0, temperature=5.0).json()["choices"][0]["message"] == greedy


def test_ignored_fields_are_named(address: str, backend: EngineBackend, caplog: pytest.LogCaptureFixture) -> None:
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    unknown = {"cache_prompt": True, "chat_template_kwargs": {"a": 1}, "wéird\r\nname": 1}
    with caplog.at_level("INFO", logger="llava.serve"):
        response = chat(address, [{"role": "user", "content": parts, "id": "m1"}], **unknown)
    assert response.status_code == 200, response.text
    named = response.headers["x-ignored-fields"].split(", ")
    assert named == ["cache_prompt", "chat_template_kwargs", "w\\xe9ird\\r\\nname", "messages[0].id",
                     "messages[0].content[0].cache_control"]  # fmt: skip
    assert any("ignored fields: cache_prompt" in record.getMessage() for record in caplog.records)
    many = chat(address, said("hi"), **{f"field{number}": 1 for number in range(500)}).headers["x-ignored-fields"]
    assert many.endswith(" and 480 more")
    with worker(backend, ServeLimits(strict=True)) as (strict, _):
        assert chat(strict, said("hi")).status_code == 200
        for body, name, hint in (
            ({"temprature": 1}, "temprature", "; did you mean 'temperature'?"),
            ({"cache_prompt": 1}, "cache_prompt", ""),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "shema": {}}}},
             "response_format.json_schema.shema", "; did you mean 'schema'?"),
        ):  # fmt: skip
            refused = chat(strict, said("hi"), **body)
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert (error["message"], error["param"]) == (f"unknown field {name!r}{hint}", name)
        refused = chat(strict, [{"role": "user", "content": [{"type": "text", "name": "x", "text": "hi"}]}])
        assert refused.json()["error"]["param"] == "messages[0].content[0].name"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 1}}]}]},
         "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "nobody", "content": "hi"}]}, "messages[0]"),
        ({"messages": "hi"}, "messages"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"tools": [{"type": "function", "function": {"name": 1}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, "tools[0].function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": 1}}}, "tool_choice.function.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_refusal_names_the_field(address: str, changes: dict[str, Any], param: str) -> None:
    response = post(address, "/v1/chat/completions", **{"messages": said("hi")} | changes)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)


def test_seventeen_stop_strings_are_counted(address: str) -> None:
    assert "16" in chat(address, said("hi"), stop=["a"] * 17).json()["error"]["message"]


# Any JSON


NAMES = st.sampled_from(
    ["messages", "role", "content", "type", "text", "tools", "tool_choice", "function", "name", "parameters", "prompt", "input",
     "echo", "logprobs", "stop", "n", "seed", "stream", "response_format", "json_schema", "schema", "tool_calls", "call_id",
     "previous_response_id", "include", "top_p", "regex", "arguments", "id", "x"]
)  # fmt: skip
WORDS = st.sampled_from(
    ["user", "assistant", "system", "tool", "text", "function", "auto", "required", "none", "json_schema", "hi", "", "\x00",
     "{", "é€", "message", "function_call", "item_reference", "input_text", "object", "string", "weather", "<image>"]
)  # fmt: skip
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=25
)
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
SEEDS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [*said("hi"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
                     {"role": "tool", "content": "x"}],
        "tools": [WEATHER], "tool_choice": "auto", "max_tokens": 2, "stop": ["x"],
    },
    "/v1/completions": {"prompt": [[1, 5, 6]], "echo": True, "logprobs": 1, "max_tokens": 1},
    "/v1/responses": {
        "input": [*said("hi"), {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "x"}],
        "tools": [{"type": "function", "name": "weather", "parameters": {}}], "max_output_tokens": 2,
    },
}  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value with one part, somewhere inside, replaced by any JSON."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: draw(changed(value[key]))} | draw(st.dictionaries(NAMES, JSON, max_size=1))
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(changed(value[at])), *value[at + 1 :]]
    return draw(JSON)


@pytest.mark.parametrize("path", list(SEEDS))
@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_no_json_makes_the_server_fail(address: str, path: str, examples: int) -> None:
    limits = {"max_tokens": 2, "n": 1} if "responses" not in path else {"max_output_tokens": 2}

    @given(changed(SEEDS[path]), st.booleans())
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    def holds(body: Any, whole: bool) -> None:
        if isinstance(body, dict):
            body = body | {"model": MODEL} | ({} if whole else limits)
            if isinstance(body.get("n"), int) and body["n"] > 4:
                body["n"] = 4
            for name in ("max_tokens", "max_output_tokens", "max_completion_tokens"):
                if isinstance(body.get(name), int) and body[name] > 4:
                    body[name] = 4
        response = httpx.post(address + path, json=body, timeout=60)
        assert response.status_code < 500, (body, response.text)
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    holds()
