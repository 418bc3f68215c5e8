"""The original protocol and the controller's choices, without servers, against what was recorded of the original."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from importlib import import_module
from typing import Any

import pytest
from golden_data import golden
from hypothesis import given
from hypothesis import strategies as st

from llava import constants
from llava.errors import InputError
from llava.serve.router import protocol
from llava.serve.router.dispatch import STICKY_SLACK, Dispatcher
from llava.serve.router.protocol import (
    ChunkReader,
    GenerateBody,
    HeartbeatBody,
    RegistrationBody,
    WorkerStatus,
    encode_chunk,
)

RECORDED = json.loads(golden("serving.json").read_text())
BEHAVIOURS = json.loads(golden("serving_behaviours.json").read_text())


def test_chunks_are_the_recorded_bytes() -> None:
    assert encode_chunk("a é", 0) == b'{"text": "a \\u00e9", "error_code": 0}\x00'


@given(st.lists(st.text()), st.integers(1, 7))
def test_chunks_survive_any_cut(texts: list[str], size: int) -> None:
    wire = b"".join(encode_chunk(text) for text in texts)
    reader = ChunkReader()
    read = [chunk for start in range(0, len(wire), size) for chunk in reader.feed(wire[start : start + size])]
    assert [chunk["text"] for chunk in read] == texts


def test_messages_and_intervals_are_the_original_s() -> None:
    for name, value in BEHAVIOURS["constants"].items():
        if name == "Exceeds_message":
            assert value == protocol.CONTEXT_FULL
        else:
            assert getattr(protocol if name.endswith("_msg") else constants, name) == value, name


@pytest.mark.parametrize("file", BEHAVIOURS["cli_flags"])
def test_every_recorded_flag_is_there(file: str) -> None:
    """By name, destination, type and choices. Defaults differ where docs/differences.md says so."""
    module = import_module(file.removesuffix(".py").replace("/", "."))
    actions = {flag: action for action in module.build_parser()._actions for flag in action.option_strings}
    different = {"model_path", "device", "host", "worker_address", "limit_model_concurrency", "port"}
    for row in BEHAVIOURS["cli_flags"][file]:
        action = actions[row["flags"][0]]
        assert action.dest == row["dest"]
        assert (action.type.__name__ if action.type else "str") == (row["type"] or "str")
        assert list(action.choices or []) == (row["choices"] or [])
        assert type(action).__name__ == f"_{row['action']}Action"
        if row["dest"] not in different:
            assert action.default == row["default"], row["dest"]


# What is posted


def test_the_defaults_of_a_request() -> None:
    body = GenerateBody.parse({"prompt": "hi"})
    assert body.sampling is not None
    assert (body.sampling.temperature, body.sampling.top_p, body.sampling.max_new_tokens) == (1.0, 1.0, 256)
    assert GenerateBody.parse({"prompt": "hi", "temperature": 0.0005, "top_p": 0.1}).sampling.greedy
    assert GenerateBody.parse({"prompt": "hi", "max_new_tokens": 0}).sampling is None
    assert GenerateBody.parse({"prompt": "hi", "stop": "###"}).sampling.stop == ("###",)
    assert GenerateBody.parse({"prompt": "hi", "stop": ""}).sampling.stop == ()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "JSON object"),
        ({"model": "m"}, "'prompt'"),
        ({"prompt": 5}, "'prompt'"),
        ({"prompt": "x", "images": "abc"}, "'images'"),
        ({"prompt": "x", "images": [1]}, "'images'"),
        ({"prompt": "<image>"}, "1 <image> placeholder for 0 images"),
        ({"prompt": "x", "images": ["a"]}, "0 <image> placeholders for 1 image"),
        ({"prompt": "x", "max_new_tokens": "abc"}, "'max_new_tokens' is 'abc'"),
        ({"prompt": "x", "max_new_tokens": 1e999}, "'max_new_tokens' is inf"),
        ({"prompt": "x", "temperature": True}, "'temperature' is True"),
        ({"prompt": "x", "temperature": -1}, None),
        ({"prompt": "x", "temperature": 1, "top_p": 2}, "top_p is 2.0"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "stop": ["a"]}, "'stop'"),
    ],
)
def test_invalid_bodies_are_explained(body: Any, words: str | None) -> None:
    if words is None:  # as in the original, everything up to 0.001 is greedy
        assert GenerateBody.parse(body).sampling.greedy
        return
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        GenerateBody.parse(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=10,
)
FIELDS = (
    "prompt", "images", "temperature", "top_p", "max_new_tokens", "stop", "worker_name", "check_heart_beat",
    "worker_status", "queue_length", "speed", "model_names",
)  # fmt: skip


@given(json_values | st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_no_body_is_worse_than_wrong(body: Any) -> None:
    for parse in (GenerateBody.parse, RegistrationBody.parse, HeartbeatBody.parse, WorkerStatus.parse):
        with contextlib.suppress(InputError):
            parse(body)


# The controller's choices


def table(dispatcher: Dispatcher, rows: list[dict[str, Any]], model: str = "m") -> Dispatcher:
    for row in rows:
        status = WorkerStatus((model,), row["speed"], row.get("queue_length", 0))
        dispatcher.register(row["name"], status, check_heart_beat=row.get("check_heart_beat", True))
    return dispatcher


def test_the_shortest_queue_is_the_recorded_one() -> None:
    recorded = RECORDED["dispatch"]["shortest_queue"]
    dispatcher = table(Dispatcher("shortest_queue"), recorded["workers"])
    assert [dispatcher.choose("m") for _ in recorded["sequence"]] == recorded["sequence"]
    assert dispatcher.heart_beat(recorded["workers"][0]["name"], 0)
    expected = recorded["after_heart_beat_queue0_for_worker0"]
    assert [dispatcher.choose("m") for _ in expected] == expected


def test_the_lottery_draws_by_speed() -> None:
    recorded = RECORDED["dispatch"]["lottery"]
    rows = [{"name": f"http://127.0.0.1:9/{name}", "speed": speed} for name, speed in recorded["speeds"].items()]
    dispatcher = table(Dispatcher("lottery", rng=random.Random(0)), rows)
    counts = Counter(dispatcher.choose("m") for _ in range(2000))
    for name, number in recorded["counts_of_2000"].items():
        assert abs(counts[name] - number) < 100
    assert dispatcher.choose("unknown") is None


@pytest.mark.parametrize("method", ["lottery", "shortest_queue"])
def test_a_worker_without_speed_gets_nothing(method: str) -> None:
    """The original's shortest queue divided by zero and answered 500."""
    dispatcher = table(Dispatcher(method), [{"name": "zero", "speed": 0}])
    assert dispatcher.choose("m") is None
    table(dispatcher, [{"name": "one", "speed": 1}])
    assert {dispatcher.choose("m") for _ in range(20)} == {"one"}


def test_silent_workers_expire_where_their_heart_beat_is_checked() -> None:
    now = 0.0
    dispatcher = Dispatcher(clock=lambda: now)
    table(dispatcher, [{"name": "a", "speed": 1}, {"name": "b", "speed": 1, "check_heart_beat": False}])
    now = constants.CONTROLLER_HEART_BEAT_EXPIRATION
    assert dispatcher.drop_expired() == []
    now += 0.1
    assert dispatcher.drop_expired() == ["a"]
    assert [worker.name for worker in dispatcher.workers()] == ["b"]
    assert not dispatcher.heart_beat("a", 0)


def test_an_unreachable_worker_is_left_out_until_it_is_heard_of() -> None:
    now = 0.0
    dispatcher = table(Dispatcher(clock=lambda: now), [{"name": "a", "speed": 1}, {"name": "b", "speed": 1}])
    dispatcher.mark_unreachable("a")
    assert {dispatcher.choose("m") for _ in range(5)} == {"b"}
    dispatcher.heart_beat("a", 0)
    assert dispatcher.choose("m") == "a"
    dispatcher.mark_unreachable("a")
    now = dispatcher.expiration_s + 1
    assert dispatcher.choose("m") == "a"


def test_conversations_stay_where_they_are_unless_that_is_busy() -> None:
    dispatcher = table(Dispatcher(), [{"name": "a", "speed": 1}, {"name": "b", "speed": 1}])
    home = dispatcher.choose("m", conversation="c")
    with dispatcher.serving(home):
        pass
    other = next(name for name in "ab" if name != home)
    dispatcher.heart_beat(home, STICKY_SLACK)
    dispatcher.heart_beat(other, 0)
    assert dispatcher.choose("m", conversation="c") == home
    dispatcher.heart_beat(home, STICKY_SLACK + 2)
    assert dispatcher.choose("m", conversation="c") == other
    dispatcher.heart_beat(home, 0)
    assert dispatcher.choose("m", conversation="c") == other  # it has moved


def test_a_queue_is_shorter_when_a_request_has_passed_through() -> None:
    dispatcher = table(Dispatcher(), [{"name": "a", "speed": 1}])
    with dispatcher.serving(dispatcher.choose("m")):
        assert dispatcher.workers()[0].queue_length == 1
    assert dispatcher.workers()[0].queue_length == 0
