"""Completions, responses and compressed bodies of a real server: scored prompts, token ids, second turns, calls."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from serve_kit import WEATHER, data_url, worker

from llava.engine.request import Request, SamplingParams, ScoreRequest
from llava.serve.backends.in_process import EngineBackend
from llava.serve.chat_turns import ChatTurn
from llava.serve.http.errors import ApiError
from llava.serve.http.keys import client_name, owner_of
from llava.serve.openai.response_store import ResponseStore

MODEL = "llava-v1.5-tiny"


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def check_weather(arguments: str) -> None:
    given = json.loads(arguments)
    assert set(given) == {"city", "days"}
    assert given["city"] in ("Oslo", "Rome")
    assert 1 <= given["days"] <= 9


# Completions


def prompt_of(backend: EngineBackend, question: str) -> str:
    conversation = backend.model.card.template.copy()
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def test_a_text_grows_by_its_continuations(client: openai.OpenAI, backend: EngineBackend) -> None:
    """Two tokens at a time give the same text as all at once, with the spaces between."""
    prompt = prompt_of(backend, "Who are you?")
    whole = client.completions.create(model=MODEL, prompt=prompt, max_tokens=12).choices[0].text
    text = prompt
    for _ in range(6):
        text += client.completions.create(model=MODEL, prompt=text, max_tokens=2).choices[0].text
    assert text == prompt + whole
    pieces = client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole


def test_token_ids_are_a_prompt(client: openai.OpenAI, backend: EngineBackend) -> None:
    prompt = prompt_of(backend, "Who are you?")
    ids = backend.model.token_ids(prompt)
    expected = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6).choices[0].text
    for form in (ids, [ids]):
        assert client.completions.create(model=MODEL, prompt=form, max_tokens=6).choices[0].text == expected
    both = client.completions.create(model=MODEL, prompt=[ids, ids[:5]], max_tokens=6, echo=True)
    assert both.choices[0].text == prompt + expected
    with pytest.raises(openai.BadRequestError, match="token id 99999"):
        client.completions.create(model=MODEL, prompt=[1, 99999], max_tokens=2)


def test_an_echoed_prompt_is_scored(client: openai.OpenAI, backend: EngineBackend) -> None:
    """As lm-evaluation-harness asks: ids of context and continuation, echo, one more token; compared with the engine."""
    context, continuation = prompt_of(backend, "Who are you?"), " I am a small dog."
    ids = backend.model.token_ids(context + continuation)
    num_context = len(backend.model.token_ids(context))
    score = backend.engine.score(ScoreRequest(ids[:num_context], ids[num_context:], num_top=2))
    asking = {"model": MODEL, "max_tokens": 1, "logprobs": 2, "echo": True, "temperature": 0, "seed": 1234}
    reply = client.completions.create(prompt=[ids], **asking)
    logprobs = reply.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(ids) + 1
    own = slice(num_context, -1)
    assert logprobs.token_logprobs[own] == pytest.approx(score.logprobs, abs=1e-5)
    is_greedy = [
        max(top, key=top.get) == name
        for name, top in zip(logprobs.tokens[own], logprobs.top_logprobs[own], strict=True)
    ]
    assert all(is_greedy) == score.is_greedy
    assert not score.is_greedy
    assert any(is_greedy)
    # The offsets find each token in the text.
    text = reply.choices[0].text
    assert text.startswith(context + continuation)
    for token, start in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token in ("<s>", "</s>") or text[start : start + len(token)] == token
    only = client.completions.create(prompt=context + continuation, **asking | {"max_tokens": 0})
    assert only.choices[0].text == context + continuation
    assert only.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:-1]
    assert only.usage.completion_tokens == 0


def test_half_characters_are_their_bytes(client: openai.OpenAI, backend: EngineBackend) -> None:
    """A byte token is forced: its bytes are the byte, not those of a replacement character."""
    byte = backend.engine.tokenizer.convert_tokens_to_ids("<0xE2>")
    forced = {"logit_bias": {str(byte): 100}, "max_tokens": 1}
    (token,) = (
        client.chat.completions.create(model=MODEL, messages=said("hi"), logprobs=True, top_logprobs=1, **forced)
        .choices[0]
        .logprobs.content
    )
    assert token.bytes == [0xE2]
    assert len(token.top_logprobs) == 1
    plain = client.completions.create(model=MODEL, prompt="hi", logprobs=1, **forced).choices[0].logprobs
    assert plain.tokens == ["bytes:\\xe2"]
    end = client.chat.completions.create(model=MODEL, messages=said("Who are you?"), logprobs=True).choices[0]
    assert end.logprobs.content[-1].token == "</s>"
    assert bytes(end.logprobs.content[-1].bytes) == b"</s>"


def test_every_token_is_spelled_as_the_tokenizer_names_it(backend: EngineBackend) -> None:
    tokenizer = backend.engine.tokenizer
    for token in range(len(tokenizer)):
        name = tokenizer.convert_ids_to_tokens(token)
        piece = backend.model.token_piece(token)
        if name.startswith("<0x"):
            assert piece.data == bytes([int(name[3:5], 16)])
        else:
            assert piece.data.decode() == name.replace("▁", " ")
    text = "Ünïcode, 5 € for two words.\nAnd a line."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(backend.model.token_piece(token).data for token in ids).decode().lstrip(" ") == text


def test_a_leading_line_break_ends_an_answer(backend: EngineBackend) -> None:
    """A line break is forced first; it is no part of an answer, and yet a stop string finds it."""
    newline = backend.engine.tokenizer.convert_tokens_to_ids("<0x0A>")
    for stop, words in ((("\n",), ""), ((), "x"), (("\n\n",), "x"), (("\nx",), "")):
        letter = backend.engine.tokenizer.convert_tokens_to_ids("x")
        forced = SamplingParams(max_new_tokens=2, stop=stop, regex="\nx", logit_bias={newline: 1.0, letter: 1.0})
        result = backend.engine.generate(Request("hi", sampling=forced))
        assert result.text.lstrip("\n") == words
        assert result.completions[0].finish_reason == "stop"


def test_usage_so_far_is_in_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asking = {"model": MODEL, "messages": said("Who are you?"), "max_tokens": 6}
    *chunks, last = client.chat.completions.create(**asking, stream=True, stream_options=options)
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens}
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last.usage.completion_tokens


def test_scores_of_a_whole_prompt_add_up(client: openai.OpenAI, backend: EngineBackend) -> None:
    """The sum over an echoed prompt is what scoring it in two halves gives."""
    ids = backend.model.token_ids(prompt_of(backend, "What colour is grass?"))
    reply = client.completions.create(model=MODEL, prompt=ids, echo=True, logprobs=0, max_tokens=1)
    total = math.fsum(reply.choices[0].logprobs.token_logprobs[1:-1])
    half = len(ids) // 2
    first, second = backend.engine.score([ScoreRequest(ids[:1], ids[1:half]), ScoreRequest(ids[:half], ids[half:])])
    assert total == pytest.approx(first.total_logprob + second.total_logprob, abs=1e-3)


# Responses


def test_responses_go_on_from_earlier_ones(client: openai.OpenAI) -> None:
    image = [
        {"type": "input_image", "image_url": data_url()},
        {"type": "input_text", "text": "What colour is the star?"},
    ]
    asked = [{"role": "user", "content": image}]
    first = client.responses.create(model=MODEL, input=asked, instructions="Be brief.")
    history = [*asked, *(item.model_dump(exclude_none=True) for item in first.output), *said("Is it large?")]
    expected = client.responses.create(model=MODEL, input=history)
    second = client.responses.create(model=MODEL, input="Is it large?", previous_response_id=first.id)
    assert second.output_text == expected.output_text
    assert second.usage.input_tokens == expected.usage.input_tokens
    assert second.previous_response_id == first.id
    reference = [*asked, {"type": "item_reference", "id": first.output[0].id}, *said("Is it large?")]
    assert client.responses.create(model=MODEL, input=reference).output_text == expected.output_text
    third = client.responses.create(model=MODEL, input="And?", previous_response_id=second.id, max_output_tokens=2)
    assert third.usage.input_tokens > second.usage.input_tokens
    unkept = client.responses.create(model=MODEL, input="hi", store=False, max_output_tokens=2)
    assert unkept.store is False
    for name in (unkept.id, "resp_unknown"):
        with pytest.raises(openai.BadRequestError, match="send the conversation itself"):
            client.responses.create(model=MODEL, input="hi", previous_response_id=name)


def test_a_kept_response_is_got_and_deleted(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="Who are you?", max_output_tokens=4)
    second = client.responses.create(
        model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=2, stream=True
    )
    streamed = list(second)[-1].response
    assert client.responses.retrieve(first.id) == first
    assert client.responses.retrieve(streamed.id) == streamed
    client.responses.delete(first.id)
    for gone in (client.responses.retrieve, client.responses.delete):
        for name in (first.id, "resp_0", "resp_..%2fmodels", "x"):
            with pytest.raises(openai.NotFoundError, match="keeps no response"):
                gone(name)
    with pytest.raises(openai.BadRequestError, match="send the conversation itself"):
        client.responses.create(model=MODEL, input="And?", previous_response_id=first.id)
    assert client.responses.create(model=MODEL, input="And?", previous_response_id=streamed.id, max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="leave out stream"):
        client.responses.retrieve(streamed.id, stream=True)


def test_an_answer_is_its_owner_s_alone() -> None:
    store = ResponseStore()
    store.add("resp_1", [ChatTurn("user", "hi")], {"msg_1": ChatTurn("assistant", "x")}, "{}", owner="key-a")
    for other in ("key-b", ""):
        assert store.reply("resp_1", owner=other) is None
        assert not store.remove("resp_1", owner=other)
        for find in (partial(store.turns, "resp_1"), partial(store.item, "msg_1")):
            with pytest.raises(ApiError, match="send the conversation itself"):
                find(owner=other)
    assert store.remove("resp_1", owner="key-a")
    assert (store.num_bytes, store._of_item) == (0, {})
    names = [owner_of(client_name(given, "10.0.0.1")) for given in ("Bearer one", "Bearer two", None)]
    assert len(set(names)) == 3
    assert names[2] == ""


def test_the_store_is_bounded() -> None:
    store = ResponseStore(max_bytes=10_000)
    for number in range(50):
        item = {f"msg_{number}": ChatTurn("assistant", "y" * 100)}
        store.add(f"resp_{number}", [ChatTurn("user", "x" * 1000)], item, "z" * 500, owner="")
        assert store.num_bytes <= 10_000
    assert store.turns("resp_49", owner="")[1].text == "y" * 100
    assert store.item("msg_49", owner="").text == "y" * 100
    assert len(store._of_item) == len(store._responses) == 4
    for gone in (partial(store.turns, "resp_0"), partial(store.item, "msg_0")):
        with pytest.raises(ApiError):
            gone(owner="")
    for text, reply in (("x" * 20_000, "{}"), ("x", "z" * 20_000)):
        store.add("resp_large", [ChatTurn("user", text)], {}, reply, owner="")
        assert store.reply("resp_large", owner="") is None
    assert len(store.turns("resp_49", owner="")) == 2


def test_calls_in_responses(client: openai.OpenAI) -> None:
    tool = {"type": "function", **WEATHER["function"]}
    asking = {"model": MODEL, "input": "Weather?", "tools": [tool], "tool_choice": "required"}
    whole = client.responses.create(**asking)
    (call,) = whole.output
    assert (call.type, call.name) == ("function_call", "weather")
    check_weather(call.arguments)
    events = list(client.responses.create(**asking, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta") == call.arguments
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-3:] == ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    by_id = client.responses.create(model=MODEL, input=[output], previous_response_id=whole.id, max_output_tokens=8)
    history = [*said("Weather?"), call.model_dump(exclude_none=True), output]
    by_history = client.responses.create(model=MODEL, input=history, max_output_tokens=8)
    assert by_id.output_text == by_history.output_text
    with client.responses.stream(model=MODEL, input="Weather?", tools=[tool], tool_choice="required") as stream:
        check_weather(stream.get_final_response().output[0].arguments)


def test_responses_tell_what_applied(client: openai.OpenAI, backend: EngineBackend) -> None:
    reply = client.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    assert reply.top_p == backend.engine.sampling_defaults.top_p
    assert client.responses.create(model=MODEL, input="hi", max_output_tokens=2, top_p=0.5).top_p == 0.5
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    reply = client.responses.create(model=MODEL, input="hi", max_output_tokens=3, include=include, top_logprobs=2)
    tokens = reply.output[0].content[0].logprobs
    assert len(tokens) == 3
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


# Below the bodies


def test_bodies_may_be_compressed(address: str) -> None:
    body = json.dumps({"model": MODEL, "messages": said("Who are you?"), "max_tokens": 4}).encode()
    url = f"{address}/v1/chat/completions"
    plain = httpx.post(url, content=body, timeout=60).json()["choices"]
    for encoding, data in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("identity", body)):
        assert (
            httpx.post(url, content=data, headers={"content-encoding": encoding}, timeout=60).json()["choices"] == plain
        )
    bomb = gzip.compress(bytes(70 * 2**20))
    packed = gzip.compress(body)
    for encoding, data, status in (
        ("br", body, 415), ("gzip", body, 400), ("gzip", packed[:-12], 400), ("gzip", bomb, 413), ("gzip, gzip", packed, 415),
    ):  # fmt: skip
        assert httpx.post(url, content=data, headers={"content-encoding": encoding}, timeout=60).status_code == status


def test_head_is_get_without_a_body(address: str) -> None:
    for path in ("/v1/models", "/health", f"/v1/models/{MODEL}"):
        head = httpx.head(address + path)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-length"] == str(len(httpx.get(address + path).content))
    assert httpx.head(f"{address}/v1/chat/completions").status_code == 405


def test_names_with_a_slash() -> None:
    from engine_kit import loaded

    backend = EngineBackend(loaded("llama"), name="org/model:v1")
    with worker(backend) as (address, _), openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert client.models.retrieve("org/model:v1").id == "org/model:v1"
        assert client.chat.completions.create(model="org/model:v1", messages=said("hi"), max_tokens=2).choices
        assert httpx.get(f"{address}/v1/models/org/other").status_code == 404
    backend.engine.close()


def test_the_printed_command_works(address: str) -> None:
    """The command that a server prints at its start, with an image in it, by a real shell and curl."""
    import shutil
    import subprocess

    from llava.serve.http.flags import ListenAddress
    from llava.serve.http.middleware import AccessPolicy
    from llava.serve.serve import curl_command

    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    command = curl_command(ListenAddress([], address, AccessPolicy()), MODEL)
    reply = json.loads(subprocess.run(["sh", "-c", command], capture_output=True, check=True, timeout=60).stdout)
    assert "red" in reply["choices"][0]["message"]["content"]
    assert reply["usage"]["prompt_tokens_details"]["image_tokens"] == 64
