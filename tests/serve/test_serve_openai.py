"""The OpenAI-compatible API of a real server over the embedded model, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from engine_kit import loaded
from hypothesis import HealthCheck, given, settings
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serve_kit import DEMO, ROOT, data_url, wait_until, worker

from llava.serve.backends.in_process import EngineBackend
from llava.serve.service import Service

MODEL = "llava-v1.5-tiny"
SEE = "What do you see in this picture?"


@pytest.fixture(scope="module")
def served(backend: EngineBackend) -> Iterator[tuple[str, Service]]:
    with worker(backend) as pair:
        yield pair


@pytest.fixture(scope="module")
def address(served: tuple[str, Service]) -> str:
    return served[0]


def shown(*urls: str, text: str = SEE, detail: str = "auto") -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": detail}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# Answers


def test_an_answer_is_the_one_of_the_library(client: openai.OpenAI) -> None:
    from llava.assets import embedded_model_path
    from llava.model.builder import load
    from llava.session import Session

    session = Session(load(embedded_model_path(), device="cpu"))
    first = session.answer(SEE, DEMO)
    second = session.answer("What colour is the star?")
    reply = client.chat.completions.create(model=MODEL, messages=shown(data_url()))
    assert reply.choices[0].message.content == first
    assert reply.choices[0].finish_reason == "stop"
    history = [*shown(data_url()), reply.choices[0].message.model_dump(), *said("What colour is the star?")]
    assert client.chat.completions.create(model=MODEL, messages=history).choices[0].message.content == second


def test_usage_counts_what_the_model_reads(client: openai.OpenAI, backend: EngineBackend) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=shown(data_url(), data_url(ROOT / "images/wide.png")))
    usage, details = reply.usage, reply.usage.prompt_tokens_details.model_dump()
    prompt_ids = backend.engine.tokenizer(  # what stands around two images
        backend.model.card.template.system + " USER:", add_special_tokens=True
    )["input_ids"]
    assert details["image_tokens"] == 2 * 64
    assert details["text_tokens"] > len(prompt_ids)
    assert usage.prompt_tokens == details["image_tokens"] + details["text_tokens"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    again = client.chat.completions.create(model=MODEL, messages=shown(data_url(), data_url(ROOT / "images/wide.png")))
    assert again.usage.prompt_tokens_details.cached_tokens > 64


def test_streamed_text_is_the_unstreamed(client: openai.OpenAI) -> None:
    asking = {"model": MODEL, "messages": shown(data_url()), "n": 2, "temperature": 3.0, "seed": 5, "max_tokens": 12}
    whole = client.chat.completions.create(**asking)
    pieces = list(client.chat.completions.create(**asking, stream=True, stream_options={"include_usage": True}))
    *chunks, last = pieces
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert all(chunk.usage is None for chunk in chunks)
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in own) == choice.message.content
        assert [piece.finish_reason for piece in own if piece.finish_reason] == [choice.finish_reason]
        assert own[-1].finish_reason == choice.finish_reason
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_logprobs_name_the_text(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=shown(data_url()), logprobs=True, top_logprobs=3, max_tokens=8
    )
    content = reply.choices[0].logprobs.content
    assert "".join(token.token for token in content).strip() == reply.choices[0].message.content
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1.0001


def test_an_answer_of_json(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=MODEL,
        messages=shown(data_url(), text="How many circles, and in which colour?"),
        response_format={"type": "json_schema", "json_schema": {"name": "seen", "schema": schema, "strict": True}},
        max_tokens=64,
    )
    answer = json.loads(reply.choices[0].message.content)
    assert answer["colour"] in ("red", "green")
    assert 0 <= answer["count"] <= 9


def test_plain_completions(client: openai.OpenAI, backend: EngineBackend) -> None:
    """The chat's prompt written out gives the chat's answer; several prompts give several choices, streamed and not."""
    conversation = backend.model.card.template.copy()
    conversation.append_message(conversation.roles[0], "Who are you?")
    conversation.append_message(conversation.roles[1], None)
    chat = client.chat.completions.create(model=MODEL, messages=said("Who are you?"))
    prompts = [conversation.get_prompt(), "USER: hi ASSISTANT:"]
    both = client.completions.create(model=MODEL, prompt=prompts, max_tokens=64, stop="</s>")
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == " " + chat.choices[0].message.content
    texts = {0: "", 1: ""}
    for piece in client.completions.create(model=MODEL, prompt=prompts, max_tokens=64, stop="</s>", stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert list(texts.values()) == [choice.text for choice in both.choices]


def test_responses_are_the_chat_in_another_form(client: openai.OpenAI) -> None:
    asked = [
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": data_url()}, {"type": "input_text", "text": SEE}],
        }
    ]
    chat = client.chat.completions.create(model=MODEL, messages=shown(data_url()))
    whole = client.responses.create(model=MODEL, input=asked)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.status == "completed"
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    events = list(client.responses.create(model=MODEL, input=asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == whole.output_text
    # An earlier answer goes back as it was given; instructions are the system's text.
    more = [
        *asked,
        *(item.model_dump(exclude_none=True) for item in whole.output),
        {"role": "user", "content": "And the star?"},
    ]
    following = client.responses.create(model=MODEL, input=more, instructions="You are terse.", max_output_tokens=3)
    assert following.status == "incomplete"
    assert following.incomplete_details.reason == "max_output_tokens"
    history = [
        {"role": "system", "content": "You are terse."},
        *shown(data_url()),
        {"role": "assistant", "content": whole.output_text},
        *said("And the star?"),
    ]
    alike = client.chat.completions.create(model=MODEL, messages=history, max_tokens=3)
    assert following.output_text == alike.choices[0].message.content
    with client.responses.stream(model=MODEL, input="Who are you?") as stream:  # the client puts events together itself
        assert (
            stream.get_final_response().output_text
            == client.responses.create(model=MODEL, input="Who are you?").output_text
        )
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.responses.create(model=MODEL, input="hi", tools=[{"type": "web_search"}])


def test_stop_strings_end_an_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=said("Who are you?")).choices[0].message.content
    word = whole.split()[4]
    cut = client.chat.completions.create(model=MODEL, messages=said("Who are you?"), stop=[word]).choices[0]
    assert cut.message.content == whole[: whole.index(word)].rstrip()
    assert cut.finish_reason == "stop"


def test_many_at_once_get_the_answers_that_they_get_alone(address: str) -> None:
    questions = [f"Who are you? {number}" for number in range(24)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            replies = await asyncio.gather(
                *(client.chat.completions.create(model=MODEL, messages=said(text), max_tokens=12) for text in questions)
            )
        return [reply.choices[0].message.content for reply in replies]

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        alone = [
            client.chat.completions.create(model=MODEL, messages=said(text), max_tokens=12).choices[0].message.content
            for text in questions
        ]
    assert asyncio.run(ask_all()) == alone


def test_inspection_says_what_became_of_the_images(address: str) -> None:
    body = {"model": MODEL, "messages": shown(data_url(ROOT / "images/wide.png")), "inspect": True, "max_tokens": 4}
    seen = httpx.post(f"{address}/v1/chat/completions", json=body).json()["inspect"]
    width, height = Image.open(ROOT / "images/wide.png").size
    assert seen["images"] == [{"width": width, "height": height, "tiles": 1, "grid": None, "tokens": 64}]
    assert 0 <= seen["queued_s"] <= seen["first_token_s"] <= seen["total_s"]


def test_detail_says_into_how_many_tiles_an_image_is_cut() -> None:
    backend = EngineBackend(loaded("anyres"), name="tiles")
    with worker(backend) as (address, _):
        for detail, tiles in (("low", 1), ("high", 5), ("auto", 5)):
            body = {
                "model": "tiles",
                "messages": shown(data_url(ROOT / "images/wide.png"), detail=detail),
                "max_tokens": 2,
            }
            reply = httpx.post(f"{address}/v1/chat/completions", json=body | {"inspect": True}).json()
            (seen,) = reply["inspect"]["images"]
            assert seen["tiles"] == tiles
            assert reply["usage"]["prompt_tokens_details"]["image_tokens"] == seen["tokens"]
    backend.engine.close()


# Refusals


BAD = [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": data_url()}]}]}, "image_url"),
    ({"messages": shown("https://")}, "image 1"),
    ({"messages": shown("iVBORw0KGgo=")}, "data:, http:// or https://"),
    ({"messages": shown("file:///etc/passwd")}, "no file:// addresses"),
    ({"messages": shown("data:image/png;base64,!!!")}, "base64"),
    ({"messages": shown("data:image/png;base64,aGVsbG8=")}, "not an image"),
    ({"messages": shown(*["data:,"] * 17)}, "17 images, and this server takes at most 16"),
    ({"messages": shown(data_url(), text="<image> and <image>")}, "2 <image> placeholders for 1 image"),
    ({"messages": []}, "messages"),
    ({"messages": said("")}, "the content is empty"),
    ({"messages": [{"role": "system", "content": "be kind"}]}, "there is no question"),
    ({"messages": said("hi"), "temperature": "1"}, "temperature"),
    ({"messages": said("hi"), "n": 0}, "n:"),
    ({"messages": said("hi"), "top_logprobs": 2}, "logprobs"),
    ({"messages": said("hi"), "tools": [{"type": "function"}]}, "tools"),
    ({"messages": said("hi"), "logit_bias": {"99999": 1}}, "99999"),
    ({"messages": said("hi"), "regex": "("}, "regex"),
    (
        {
            "messages": said("hi"),
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        },
        "json_schema",
    ),
    ({"messages": said("word " * 3000)}, "too long"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_work_is_a_400_with_a_sentence(
    address: str, changes: dict[str, Any], words: str, stream: bool
) -> None:
    response = httpx.post(f"{address}/v1/chat/completions", json={"model": MODEL, "stream": stream} | changes)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"model": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"1" * 5000 + b"}",
     b'{"model": "llava-v1.5-tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/worker_generate_stream"])
def test_malformed_bodies_are_the_client_s_fault(address: str, path: str, content: bytes) -> None:
    response = httpx.post(address + path, content=content)
    assert 400 <= response.status_code < 500 or b'"error_code": 1' in response.content, response.text


def test_an_unknown_model_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'gpt-4o'; models: llava-v1.5-tiny"):
        client.chat.completions.create(model="gpt-4o", messages=said("hi"))
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


# Leaving, and being watched


def test_a_client_that_leaves_frees_its_place(address: str, served: tuple[str, Service]) -> None:
    """Streamed and not: within a second, nothing of the request is left in the engine."""
    service = served[1]
    long = {"model": MODEL, "messages": said("hi"), "max_tokens": 900, "ignore_eos": True, "temperature": 1.5}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=long | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert service.num_requests == 1
    wait_until(lambda: service.num_requests == 0, seconds=1)
    wait_until(lambda: service.backend.engine.stats().num_running == 0, seconds=1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/chat/completions", json=long, timeout=0.3)
    wait_until(lambda: service.num_requests == 0, seconds=1)
    wait_until(lambda: service.backend.engine.stats().num_running == 0, seconds=1)


def test_metrics_are_prometheus_s(address: str) -> None:
    def read() -> dict[str, float]:
        page = httpx.get(f"{address}/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = [sample for family in text_string_to_metric_families(page.text) for sample in family.samples]
        return {sample.name + "".join(sorted(sample.labels.values())): sample.value for sample in samples}

    before = read()
    body = {"model": MODEL, "messages": shown(data_url()), "max_tokens": 5}
    httpx.post(f"{address}/v1/chat/completions", json=body)
    httpx.post(f"{address}/v1/chat/completions", content=b"{")
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["llava_generated_tokens_total"] == 5
    assert grown["llava_prompt_tokens_totalimage"] == 64
    assert grown["llava_requests_totalfinished"] == 1
    assert grown["llava_first_token_seconds_count"] == 1
    assert grown["llava_http_responses_total/v1/chat/completions200"] == 1
    assert grown["llava_http_responses_total/v1/chat/completions400"] == 1
    assert after["llava_requests_in_flight"] == 0


def test_health_and_documents(address: str) -> None:
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/ready").json() == {"status": "ok"}
    assert "ChatRequest" in httpx.get(f"{address}/docs").text


POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
READ = ("/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics")
OPERATIONS = [
    *((path, "POST", mode) for path in POSTED for mode in ("POSITIVE", "NEGATIVE")),
    *((path, "GET", "POSITIVE") for path in READ),
    *((path, "POST", "POSITIVE") for path in ("/worker_get_status", "/list_models")),
]


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_every_answer_is_as_published(address: str, path: str, method: str, mode: str) -> None:
    """Requests made from the published OpenAPI document, right ones and wrong ones: no 5xx, nothing unpublished."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import checks
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    operation = schemathesis.openapi.from_url(f"{address}/openapi.json")[path][method]
    wanted = [
        checks.not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
        *([negative_data_rejection] if path.startswith("/v1/") else []),
    ]

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def conforms(case: Any) -> None:
        if mode == "POSITIVE" and isinstance(case.body, dict):  # so that some reach the model, and are answered shortly
            short = {"max_output_tokens": 2} if path.endswith("responses") else {"max_tokens": 2, "n": 1}
            case.body = case.body | short | {"model": MODEL}
            case.body.pop("max_completion_tokens", None)
        case.validate_response(case.call(), checks=wanted)

    conforms()
